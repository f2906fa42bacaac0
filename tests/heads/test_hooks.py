"""Hooks of a training run."""

from types import SimpleNamespace

import pytest
import timm
import torch
from mmengine.registry import HOOKS

import linsight.heads  # noqa: F401  registers the hooks
from linsight.backbones.norms import PRepBN


def test_norms_move_with_the_iterations():
    """However often a norm runs in an iteration, as recomputation runs it twice."""
    model = timm.create_model("rala_vit_nano", norm_layer="prepbn", num_classes=3)
    model.set_grad_checkpointing()
    norms = [part for part in model.modules() if isinstance(part, PRepBN)]
    hook = HOOKS.build({"type": "NormProgressHook", "iterations": 4})
    seen = []
    # A run that was resumed after its first iteration.
    for iteration in range(1, 7):
        runner = SimpleNamespace(model=model, iter=iteration)
        hook.before_train_iter(runner, batch_idx=iteration)
        model(torch.randn(2, 3, 32, 32)).sum().backward()
        (progress,) = {norm.progress.item() for norm in norms}
        seen.append(progress)
    assert seen == [0.25, 0.5, 0.75, 1, 1, 1]


def test_a_transition_takes_iterations():
    with pytest.raises(ValueError, match="iterations is 0"):
        HOOKS.build({"type": "NormProgressHook", "iterations": 0})
