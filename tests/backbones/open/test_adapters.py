"""Adapters of peft (LoRA) at all linear layers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .models import PARTS, distance, images, little, of_type, one_image, two_blocks


def adapted(model: nn.Module) -> nn.Module:
    """The model with an adapter at each linear layer, as peft initialises it."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules="all-linear")
    model = get_peft_model(model, config)
    # peft keeps adapters in float32.
    return model.double()


def test_peft_can_be_imported_from_a_checkout():
    """No folder of the repository may hide a package that others import by the same name."""
    root = Path(__file__).parents[3]
    command = [sys.executable, "-W", "ignore", "-c", "import linsight.backbones, peft"]
    # With transformers, which peft needs.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]


def scales(model: nn.Module) -> dict[str, Tensor]:
    """The weights `lora_B`, which begin at zero, so that adapters change nothing at first."""
    return {name: p for name, p in model.named_parameters() if ".lora_B." in name}


@pytest.mark.parametrize("name", PARTS)
def test_lora_trains_all_linear_layers_and_nothing_else(name):
    model = adapted(little(name, **two_blocks(name))).train()
    assert len(scales(model)) == len(of_type(little(name, **two_blocks(name)), nn.Linear))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    F.cross_entropy(model(images()), torch.tensor([1, 3])).backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(scales(model))


@pytest.mark.parametrize("name", PARTS)
@torch.no_grad()
def test_each_lora_adapter_changes_the_output(name):
    model, x = adapted(little(name, **two_blocks(name))), one_image()
    wanted = model(x)
    silent = []
    for layer, scale in scales(model).items():
        nn.init.normal_(scale)
        if distance(model(x), wanted) < 1e-9:
            silent.append(layer)
        nn.init.zeros_(scale)
    assert silent == []


@pytest.mark.parametrize("name", PARTS)
@torch.no_grad()
def test_merged_lora_gives_the_same_output(name):
    model, x = adapted(little(name, **two_blocks(name))), images()
    for scale in scales(model).values():
        nn.init.normal_(scale, std=0.1)
    wanted = model(x)
    assert distance(wanted, little(name, **two_blocks(name))(x)) > 1e-3
    torch.testing.assert_close(model.merge_and_unload()(x), wanted)
