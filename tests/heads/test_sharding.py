"""Fully sharded models in one process: what their layers see, and damaged folders."""

import os
import pickle
import shutil
from typing import Any

import pytest
import timm
import torch
from mmengine.config import Config
from torch import nn
from torch.distributed.tensor import DTensor

import linsight  # noqa: F401  registers the models
from linsight.backbones.checkpoint import CheckpointError
from linsight.backbones.layers import BatchNormAct2d
from linsight.heads.checkpoint import AtomicLocalBackend, read_checkpoint
from linsight.heads.runner import SafeRunner
from linsight.heads.sharding import REST, FullyShardedModel, write_shards


@pytest.fixture
def alone(tmp_path):
    """A group of one process."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("param_dtype", [None, "bfloat16"])
def test_layers_see_ordinary_weights(alone, param_dtype):
    model = timm.create_model("rala_vit_nano", num_classes=3)
    plain = timm.create_model("rala_vit_nano", num_classes=3)
    plain.load_state_dict(model.state_dict())
    sharded = FullyShardedModel(model, param_dtype)
    seen = {}

    def look(module, args):
        for name, weight in module.named_parameters(recurse=False):
            # The kernels' direct path takes tensors of these types alone.
            assert type(weight) is nn.Parameter
            seen[module, name] = weight.dtype

    for module in model.modules():
        module.register_forward_pre_hook(look)
    x = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    sharded(x).float().square().sum().backward()
    plain(x).square().sum().backward()

    assert len(seen) == len(list(model.parameters()))
    exact = (nn.BatchNorm2d, BatchNormAct2d)
    for (module, _), dtype in seen.items():
        lower = param_dtype and not isinstance(module, exact)
        assert dtype == (torch.bfloat16 if lower else torch.float32)
    weights = list(model.parameters())
    assert all(isinstance(w, DTensor) and w.grad.dtype == torch.float32 for w in weights)
    found = torch.cat([weight.grad.to_local().flatten() for weight in weights])
    wanted = torch.cat([weight.grad.flatten() for weight in plain.parameters()])
    assert (found - wanted).norm() < (0.05 if param_dtype else 1e-5) * wanted.norm()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clips", [False, True])
def test_gradients_are_unscaled_and_clipped(alone, fused, clips):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    sharded = FullyShardedModel(model, units="0|1")
    optimizer = torch.optim.AdamW(sharded.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(sharded(torch.ones(2, 4)).sum()).backward()
    if clips:
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(sharded.parameters(), 0.5)
        assert 1 < float(norm) < 100
        clipped = [p.grad.full_tensor() for p in sharded.parameters()]
        torch.testing.assert_close(sum(g.square().sum() for g in clipped).sqrt(), torch.tensor(0.5))
    before = [p.full_tensor().clone() for p in sharded.parameters()]
    scaler.step(optimizer)
    for old, new in zip(before, sharded.parameters(), strict=True):
        assert not torch.equal(old, new.full_tensor())


def test_gradients_accumulate(alone):
    sharded = FullyShardedModel(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), units="0|1")
    gradients = []
    for _ in range(2):
        sharded(torch.ones(2, 4)).sum().backward()
        gradients.append([p.grad.full_tensor().clone() for p in sharded.parameters()])
    for once, twice in zip(*gradients, strict=True):
        torch.testing.assert_close(twice, 2 * once)


def test_wrong_arguments(alone):
    model = timm.create_model("rala_vit_nano")
    with pytest.raises(ValueError, match="param_dtype is 'int8', expected bfloat16"):
        FullyShardedModel(model, "int8")
    with pytest.raises(ValueError, match=r"units is 'layers', .* the first are stem"):
        FullyShardedModel(model, units="layers")


@pytest.mark.parametrize(
    ("ema_type", "named"),
    [({}, "ExponentialMovingAverage"), ({"ema_type": "MomentumAnnealingEMA"}, "MomentumAnnealing")],
)
@pytest.mark.parametrize("place", ["custom_hooks", "default_hooks"])
def test_averages_that_copy_the_model_are_refused(alone, place, ema_type, named):
    runner: Any = object.__new__(SafeRunner)
    hook = {"type": "EMAHook", **ema_type}
    hooks = [hook] if place == "custom_hooks" else {"ema": hook, "figures": None}
    runner._distributed, runner.cfg = True, Config({place: hooks})
    with pytest.raises(ValueError, match=f"ema_type of EMAHook is '{named}"):
        runner.wrap_model({"type": "FullyShardedModel"}, timm.create_model("rala_vit_nano"))


@pytest.fixture
def folder(alone, tmp_path):
    """A sharded checkpoint."""
    model = FullyShardedModel(timm.create_model("rala_vit_nano")).module
    path = tmp_path / "epoch_1.pth"
    write_shards({"state_dict": model.state_dict(), "meta": {"epoch": 1}}, path)
    return path


class TestFolder:
    def test_whole_tensors_are_read(self, folder):
        state = read_checkpoint(folder)["state_dict"]
        assert all(type(value) is torch.Tensor and not value.is_meta for value in state.values())
        timm.create_model("rala_vit_nano").load_state_dict(state)

    def test_it_takes_the_place_of_what_was_left(self, folder):
        state = read_checkpoint(folder)
        write_shards(state, folder)
        assert read_checkpoint(folder)["meta"] == {"epoch": 1}
        assert [p.name for p in folder.parent.glob(".*")] == []

    def test_a_shard_is_missing(self, folder):
        next(folder.glob("*.distcp")).unlink()
        with pytest.raises(CheckpointError, match="incomplete or damaged"):
            read_checkpoint(folder)

    @pytest.mark.parametrize("divisor", [2, 100_000])
    def test_truncated(self, folder, divisor):
        shard = next(folder.glob("*.distcp"))
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // divisor])
        with pytest.raises(CheckpointError, match=r"incomplete or damaged: \S"):
            read_checkpoint(folder)

    def test_the_index_is_missing(self, folder, caplog):
        (folder / ".metadata").unlink()
        with pytest.raises(CheckpointError, match=r"incomplete or damaged: .*\.metadata"):
            read_checkpoint(folder)
        assert not caplog.records, "no traceback beside the error"

    def test_a_whole_checkpoint_takes_its_place(self, folder):
        """A sharded training was killed after it wrote the folder; whole models go on with it."""
        AtomicLocalBackend().put(b"whole", folder)
        assert folder.read_bytes() == b"whole"

    def test_code_in_the_index_is_not_run(self, folder, tmp_path):
        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "evil"),)

        (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
        with pytest.raises(CheckpointError, match=r"asks for \w+.mkdir"):
            read_checkpoint(folder)
        assert not (tmp_path / "evil").exists()

    def test_a_folder_of_something_else(self, folder):
        (folder / REST).unlink()
        with pytest.raises(CheckpointError, match="is a folder: name the file of weights in it"):
            read_checkpoint(folder)
        shutil.rmtree(folder)
