"""`linsight train` replays from graphs by itself, and trains the same as without them."""

import copy

import pytest
import torch
from mmengine.optim import OptimWrapper

from linsight.backbones.graphs import _Graphs
from linsight.heads.classification import ImageClassifier
from linsight.kernels.runtime.private import get_call

from ..backbones.graph_stand import Stand, install
from ..heads.test_segmentation import batch, segmentor
from .conftest import write_config, write_images
from .test_train import cli_train

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# With what a recipe may have: accumulation and clipping of gradients; drop path, Mixup, batch norms
# and averaged weights are in the config.
OPTIONS = (
    "train_cfg.max_epochs=2",
    "train_dataloader.batch_size=6",  # an epoch ends with a whole step
    "default_hooks.checkpoint.max_keep_ckpts=9",
    "default_hooks.predictions=None",
    "default_hooks.learning_curve=None",
    "optim_wrapper.accumulative_counts=2",
    "optim_wrapper.clip_grad.max_norm=1.0",
)


@pytest.fixture
def train(tmp_path):
    write_images(tmp_path / "images")
    config = write_config(tmp_path)

    def run(name, *options):
        folder = tmp_path / name
        cli_train(config, *OPTIONS, *options, "--work-dir", folder)
        saved = torch.load(folder / "epoch_2.pth", weights_only=False)
        return {"now": saved["state_dict"], "averaged": saved["ema_state_dict"]}

    return run


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in replays on the CPU")
def test_training_and_resuming_are_the_same(train, monkeypatch, tmp_path):
    install(monkeypatch)
    eager = train("eager", "model.graph=False")
    assert not Stand.recorded
    graphed = train("graphed")
    assert (Stand.recorded, Stand.replayed) == (2, 2 * 3)
    (tmp_path / "graphed" / "epoch_2.pth").unlink()
    (tmp_path / "graphed" / "last_checkpoint").write_text(str(tmp_path / "graphed" / "epoch_1.pth"))
    resumed = train("graphed", "--resume")
    assert Stand.recorded == 4
    for kind, values in eager.items():
        for name, value in values.items():
            assert torch.equal(value, graphed[kind][name]), (kind, name)
            assert torch.equal(value, resumed[kind][name]), (kind, name)


@needs_gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_training_on_a_gpu(train, dtype):
    amp = ("--amp", f"optim_wrapper.dtype={dtype}")
    eager, graphed = train("eager", "model.graph=False", *amp), train("graphed", *amp)
    for kind, values in eager.items():
        for name, value in values.items():
            torch.testing.assert_close(graphed[kind][name], value, rtol=1e-2, atol=1e-3)


def test_what_a_classifier_replays():
    def build(**options):
        return ImageClassifier({"model_name": "test_resnet"}, 3, **options).backbone

    assert isinstance(get_call(build()), _Graphs)
    assert get_call(build(graph=False)) is None
    assert not isinstance(get_call(build(compile={"backend": "eager"})), _Graphs)


def test_a_segmentor_trains_the_same(monkeypatch):
    install(monkeypatch)
    results = []
    for graph in (False, True):
        model = segmentor(
            neck={"type": "FPN", "out_channels": 16},
            decode_head={"type": "FPNHead", "channels": 16, "dropout_ratio": 0.1},
            auxiliary_head={"type": "FCNHead", "channels": 16, "dropout_ratio": 0.1},
            graph=graph,
        ).train()
        averaged = copy.deepcopy(model)
        assert all(get_call(part) is None for part in averaged.modules())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        wrapper = OptimWrapper(optimizer, accumulative_counts=2, clip_grad={"max_norm": 1.0})
        wrapper.initialize_count_status(model, 0, 4)
        torch.manual_seed(1)
        images, labels = batch(64, 64)
        losses = [model.train_step({"inputs": images, "labels": labels}, wrapper) for _ in range(4)]
        results.append((losses, model.state_dict()))
    # Four parts, of which each is recorded in the second iteration.
    assert (Stand.recorded, Stand.replayed) == (8, 24)
    (losses, state), (other_losses, other_state) = results
    for a, b in zip(losses, other_losses, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    # Where a tensor lies in memory decides how AVX-512 adds it up, so that last bits may differ. An
    # optimiser's step is a thousand times as large as what is allowed.
    for name, value in state.items():
        torch.testing.assert_close(other_state[name], value, rtol=1e-5, atol=1e-6, msg=name)
