"""Checkpoints: written whole or not at all, read without running code, refused when foreign."""

import argparse
import datetime
import enum
import errno
import functools
import json
import logging
import os
import pickle
import random
import shutil
import subprocess
import zipfile
from collections import defaultdict, deque
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from mmengine.config import Config
from mmengine.fileio import get_file_backend
from mmengine.hooks import EarlyStoppingHook
from mmengine.logging import MessageHub
from mmengine.registry import MODELS
from mmengine.runner import save_checkpoint
from PIL import Image
from timm.models import load_state_dict
from torch import nn
from torchvision.transforms import InterpolationMode

from linsight.backbones.checkpoint import CheckpointError, check_fit
from linsight.heads.checkpoint import (
    CheckedLoadHook,
    SafeCheckpointHook,
    fetch_checkpoint,
    read_checkpoint,
)
from linsight.heads.classification_metric import Accuracy

from ..reference import fill
from .test_segmentation import REFERENCE, authors

ATOMIC = {"backend": "atomic"}
STATE = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.zeros(2)}


class Mode(enum.Enum):
    A = 1


class Settings(dict):
    pass


class Names(list):
    pass


# What training scripts save beside weights.
BESIDE = {
    "deque": deque([1, 2], maxlen=3),
    "defaultdict": defaultdict(list, {"a": [1]}),
    "function": json.dumps,
    "functions of NumPy and PyTorch": [np.mean, torch.relu, nn.functional.gelu],
    "built-in function": len,
    "partial": functools.partial(json.dumps, indent=1),
    "method": Settings(a=1).get,
    "class": Mode,
    "enumeration": [Mode.A, InterpolationMode.BICUBIC, Image.Resampling.BICUBIC],
    "config": Config({"a": {"b": 1}}),
    "dict of a class": Settings(a=Settings(b=1)),
    "list of a class": Names([1, 2]),
    "path": Path("a"),
    "object": SimpleNamespace(a=Settings()),
    "generators": [np.random.RandomState(0), np.random.default_rng(0), random.Random(0)],
    "exception": ValueError("a"),
}


class TestWriting:
    def test_full_disk_leaves_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / "epoch_1.pth"
        save_checkpoint({"state_dict": STATE}, str(path), backend_args=ATOMIC)
        before = path.read_bytes()

        def full(fd):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"epoch_1.pth: No space left on device.*before"):
            save_checkpoint({"state_dict": {}}, str(path), backend_args=ATOMIC)
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["epoch_1.pth"]

    def test_a_part_is_never_under_the_name(self, tmp_path, monkeypatch):
        path = tmp_path / "last_checkpoint"
        backend = get_file_backend(str(path), backend_args=ATOMIC)
        backend.put_text("old", path)
        seen = []
        monkeypatch.setattr(os, "fsync", lambda fd: seen.append(path.read_text()))
        backend.put_text("new", path)
        assert seen[0] == "old"
        assert path.read_text() == "new"


class TestReading:
    def test_averaged_weights_are_taken_before_raw_ones(self, tmp_path):
        """As timm's own reader does, and after it every way by which weights are read here."""
        average, path = {name: value + 1 for name, value in STATE.items()}, tmp_path / "a.pth"
        for content in (
            {"state_dict": STATE, "state_dict_ema": average, "epoch": 3},
            {"state_dict": average, "state_dict_ema": None},
            {"model": STATE, "model_ema": average},
            average,
        ):
            torch.save(content, path)
            for found in (load_state_dict(path), read_checkpoint(path)["state_dict"]):
                assert found.keys() == average.keys()
                assert all(torch.equal(found[name], average[name]) for name in average)

    @pytest.mark.parametrize(
        "key", ["ema_state_dict", "ema", "model_ema", "state_dict_ema", "ema_model", "params_ema"]
    )
    @pytest.mark.parametrize("nested", [False, True])
    def test_averages_of_other_scripts(self, tmp_path, caplog, key, nested):
        average = {f"module.{name}": value + 1 for name, value in STATE.items()}
        content = {"module": average, "updates": 7} if nested else {**average, "n_averaged": 3}
        for raw in ("state_dict", "model"):
            torch.save({raw: STATE, key: content, "epoch": 3}, tmp_path / "a.pth")
            found = read_checkpoint(tmp_path / "a.pth")
            assert found["state_dict"].keys() == STATE.keys()
            assert torch.equal(found["state_dict"]["bias"], STATE["bias"] + 1)
            assert key not in found
            assert f"the averaged weights ({key}) of the checkpoint are taken" in caplog.text

    def test_mmengines_averages_are_in_the_state_dict(self, tmp_path, caplog):
        """Its EMAHook lets both change places before it saves them."""
        raw = {"steps": torch.tensor(3), **{f"module.{k}": v - 1 for k, v in STATE.items()}}
        torch.save({"state_dict": STATE, "ema_state_dict": raw, "meta": {}}, tmp_path / "a.pth")
        found = read_checkpoint(tmp_path / "a.pth")
        assert torch.equal(found["state_dict"]["bias"], STATE["bias"])
        assert found["ema_state_dict"].keys() == raw.keys()
        assert not caplog.text

    @pytest.mark.parametrize(
        "prefixes",
        [
            ["module."],
            ["_orig_mod."],
            ["model."],
            ["module._orig_mod."],
            ["_orig_mod.module.", ""],
            ["model.module.", "model._orig_mod."],
            ["module.model."],
            ["timm_model."],
            ["model.net."],
        ],
    )
    def test_what_wrappers_put_before_names(self, tmp_path, prefixes):
        state = {prefixes[i % len(prefixes)] + name: v for i, (name, v) in enumerate(STATE.items())}
        for content in (state, {"state_dict": state}, {"model_ema": {"module": state}}):
            torch.save(content, tmp_path / "a.pth")
            assert read_checkpoint(tmp_path / "a.pth")["state_dict"].keys() == STATE.keys()
        # A part that torch.compile has wrapped by itself.
        torch.save({f"blocks.0._orig_mod.{k}": v for k, v in STATE.items()}, tmp_path / "a.pth")
        names = read_checkpoint(tmp_path / "a.pth")["state_dict"]
        assert set(names) == {"blocks.0.weight", "blocks.0.bias"}

    def test_what_lightning_saves(self, tmp_path):
        for attribute in ("backbone.", "model._orig_mod."):
            state = {attribute + name: value for name, value in STATE.items()}
            state["criterion.weight"] = torch.ones(3)
            content = {"state_dict": state, "pytorch-lightning_version": "2.5"}
            torch.save(content, tmp_path / "a.ckpt")
            assert read_checkpoint(tmp_path / "a.ckpt")["state_dict"].keys() == STATE.keys()

    @pytest.mark.parametrize("key", ["module", "weights", "network"])
    def test_the_only_weights_under_another_key(self, tmp_path, key):
        extras = {"step": torch.tensor(3), "optimizer": {"state": {0: {"m": torch.ones(2)}}}}
        torch.save({key: STATE, **extras}, tmp_path / "a.pth")
        assert read_checkpoint(tmp_path / "a.pth")["state_dict"].keys() == STATE.keys()

    def test_the_content_counts_and_not_the_name(self, tmp_path):
        safetensors.torch.save_file(STATE, tmp_path / "a.bin")
        torch.save(STATE, tmp_path / "a.safetensors")
        for name in ("a.bin", "a.safetensors"):
            assert read_checkpoint(tmp_path / name)["state_dict"].keys() == STATE.keys()

    def test_a_web_address_is_downloaded_once(self, tmp_path, monkeypatch):
        torch.save(STATE, tmp_path / "served.pth")
        downloads = []

        def download(address: str, target: str) -> None:
            downloads.append(address)
            shutil.copy(tmp_path / "served.pth", target)

        monkeypatch.setattr(torch.hub, "download_url_to_file", download)
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
        for _ in range(2):
            content = fetch_checkpoint("https://example.org/a.pth?version=1")
            assert torch.equal(content["state_dict"]["weight"], STATE["weight"])
        assert downloads == ["https://example.org/a.pth?version=1"]
        assert (tmp_path / "hub" / "checkpoints" / "a.pth").is_file()

    def test_mmengines_with_its_log_history(self, tmp_path):
        hub = MessageHub.get_instance("test_reading")
        hub.update_scalar("train/loss", 0.5)
        hub.update_info("epoch", 3)
        path = tmp_path / "a.pth"
        save_checkpoint({"state_dict": STATE, "message_hub": hub.state_dict()}, str(path))
        content = read_checkpoint(path)
        assert torch.equal(content["state_dict"]["weight"], STATE["weight"])
        history = content["message_hub"]["log_scalars"]["train/loss"]
        assert history.data[0].tolist() == [0.5]
        assert history.mean() == 0.5

    @pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s, "epoch": 3}])
    def test_bare_weights_and_the_authors(self, tmp_path, wrap):
        torch.save(wrap(STATE), tmp_path / "a.pth")
        assert torch.equal(read_checkpoint(tmp_path / "a.pth")["state_dict"]["bias"], STATE["bias"])

    def test_safetensors(self, tmp_path):
        path = tmp_path / "a.safetensors"
        safetensors.torch.save_file(STATE, path)
        assert torch.equal(read_checkpoint(path)["state_dict"]["weight"], STATE["weight"])

    @pytest.mark.parametrize("zipped", [True, False])
    def test_code_is_refused_and_not_run(self, tmp_path, zipped):
        class Payload:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "ran"),)

        path = tmp_path / "a.pth"
        if zipped:
            torch.save({"state_dict": STATE, "x": Payload()}, path)
        else:
            path.write_bytes(pickle.dumps({"state_dict": STATE, "x": Payload()}))
        with pytest.raises(CheckpointError, match=r"a.pth is a Python pickle .*code.*safetensors"):
            read_checkpoint(path)
        assert not (tmp_path / "ran").exists()

    def test_getattr_reaches_log_statistics_alone(self, tmp_path):
        class Reach:
            def __reduce__(self):
                return getattr, (torch.Tensor, "__init__")

        path = tmp_path / "a.pth"
        torch.save({"state_dict": STATE, "x": Reach()}, path)
        with pytest.raises(CheckpointError, match=r"a\.pth"):
            read_checkpoint(path)

    @pytest.mark.parametrize("suffix", ["pth", "safetensors"])
    @pytest.mark.parametrize("kept", [0.0, 0.3, 0.9])
    def test_truncated(self, tmp_path, suffix, kept):
        path = tmp_path / f"a.{suffix}"
        if suffix == "pth":
            torch.save({"state_dict": STATE}, path)
        else:
            safetensors.torch.save_file(STATE, path)
        whole = path.read_bytes()
        path.write_bytes(whole[: int(kept * len(whole))])
        with pytest.raises(CheckpointError, match="damaged"):
            read_checkpoint(path)

    def test_arguments_of_a_training_script(self, tmp_path):
        """timm's script saves a Namespace, and others paths in it."""
        args = argparse.Namespace(lr=1e-3, out=Path("runs"), classes=["a"])
        torch.save({"model": STATE, "args": args}, tmp_path / "a.pth")
        assert torch.equal(read_checkpoint(tmp_path / "a.pth")["state_dict"]["bias"], STATE["bias"])

    def test_scores_and_dates_of_a_training_script(self, tmp_path):
        extras = {
            "best": np.float32(0.5), "flags": np.array([True]), "names": np.array(["a"]),
            "when": datetime.datetime(2026, 1, 2), "sizes": range(3), "kinds": frozenset({1}),
        }  # fmt: skip
        torch.save({"model": STATE, **extras}, tmp_path / "a.pth")
        content = read_checkpoint(tmp_path / "a.pth")
        assert torch.equal(content["state_dict"]["bias"], STATE["bias"])

    @pytest.mark.parametrize("package", ["addict", "mmengine", "yacs"])
    def test_config_of_a_training_script(self, tmp_path, package):
        """Swin's script saves a yacs node, which is a dict, and so are others' configs."""
        module = pytest.importorskip(f"{package}.config" if package != "addict" else package)
        make = {"addict": "Dict", "mmengine": "ConfigDict", "yacs": "CfgNode"}[package]
        node = getattr(module, make)({"MODEL": getattr(module, make)({"DEPTHS": [2, 2, 6, 2]})})
        torch.save({"model": STATE, "config": node}, tmp_path / "a.pth")
        content = read_checkpoint(tmp_path / "a.pth")
        assert torch.equal(content["state_dict"]["bias"], STATE["bias"])

    @pytest.mark.parametrize("zipped", [True, False])
    @pytest.mark.parametrize("key", [*BESIDE])
    def test_harmless_things_beside_weights(self, tmp_path, key, zipped):
        path = tmp_path / "a.pth"
        content = {"state_dict": STATE, "x": BESIDE[key], "y": {"z": [BESIDE[key]]}}
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        assert torch.equal(read_checkpoint(path)["state_dict"]["bias"], STATE["bias"])

    def test_whole_models_and_other_protocols(self, tmp_path):
        path = tmp_path / "a.pth"
        torch.save({"model": STATE, "transform": timm.data.create_transform(8)}, path)
        assert read_checkpoint(path)["state_dict"].keys() == STATE.keys()
        for content in (nn.Linear(2, 2), {"model": nn.Linear(2, 2), "epoch": 3}):
            torch.save(content, path)
            with pytest.raises(CheckpointError, match=r"whole objects \(torch\.nn.*state_dict\(\)"):
                read_checkpoint(path)
        torch.save({"state_dict": STATE}, path, pickle_protocol=4)
        with pytest.raises(CheckpointError, match=r"pickle of protocol 4, .* reads protocol 2"):
            read_checkpoint(path)

    @pytest.mark.parametrize(
        "call",
        [(eval, "1"), (subprocess.Popen, "true"), (torch.load, "x"), (getattr, os, "system")],
        ids=lambda call: call[0].__name__,
    )
    def test_what_holds_code_is_called_so(self, tmp_path, call):
        class Payload:
            def __reduce__(self):
                return call[0], tuple("os" if part is os else part for part in call[1:])

        torch.save({"state_dict": STATE, "x": Payload()}, tmp_path / "a.pth")
        with pytest.raises(CheckpointError, match=rf"to run code \(.*{call[0].__name__}"):
            read_checkpoint(tmp_path / "a.pth")

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (b"weights of the model\n", "it begins with the text 'weights of the model'"),
            (
                b"version https://git-lfs.github.com/spec/v1\noid",
                "it begins with the text 'version",
            ),
            (b"<!DOCTYPE html><html>", "it is a web page"),
            (b'{"error": "not found"}', "it begins with the text"),
            (b"\xef\xbb\xbf<!DOCTYPE html><html>", "it is a web page"),
            (bytes(range(256)), r"no checkpoint \(256 bytes\)"),
        ],
    )
    def test_other_files(self, tmp_path, content, said):
        path = tmp_path / "a.pth"
        for file in (path, tmp_path / "a.safetensors"):
            file.write_bytes(content)
            with pytest.raises(CheckpointError, match=rf"{file.name} is damaged or .*{said}"):
                read_checkpoint(file)
        with pytest.raises(CheckpointError, match=r"a\.pth"):
            MODELS.build(
                {"type": "TimmBackbone", "model_name": "rala_vit_nano", "checkpoint": path}
            )

    def test_an_archive_of_something_else(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
            archive.writestr("notes.txt", "nothing")
        with pytest.raises(CheckpointError, match=r"a\.pth is truncated or damaged"):
            read_checkpoint(tmp_path / "a.pth")

    def test_no_weights_and_no_file(self, tmp_path):
        torch.save({"meta": 1}, tmp_path / "a.pth")
        with pytest.raises(CheckpointError, match="no weights"):
            read_checkpoint(tmp_path / "a.pth")
        with pytest.raises(FileNotFoundError, match=r"b\.pth does not exist"):
            read_checkpoint(tmp_path / "b.pth")
        with pytest.raises(CheckpointError, match=r"is a folder: .* \(there are a\.pth\)"):
            read_checkpoint(tmp_path)


def test_a_misspelt_best_metric_is_named_before_training():
    metric = Accuracy(topk=(1, 5))
    metric.dataset_meta = {"classes": list(range(10))}
    loop = SimpleNamespace(evaluator=SimpleNamespace(metrics=[metric]))
    runner = SimpleNamespace(val_loop=loop, hooks=[], param_schedulers=[])
    SafeCheckpointHook(save_best="accuracy/top1")._check_watched_metrics(runner)
    SafeCheckpointHook(save_best="auto")._check_watched_metrics(runner)
    with pytest.raises(ValueError, match=r"'accuracy/top_1', and .* accuracy/top1, accuracy/top5"):
        SafeCheckpointHook(save_best="accuracy/top_1", rule="greater")._check_watched_metrics(
            runner
        )
    stop = EarlyStoppingHook(monitor="accuracy/topp", rule="greater")
    wrong = SimpleNamespace(val_loop=loop, hooks=[stop], param_schedulers=[])
    with pytest.raises(ValueError, match=r"EarlyStoppingHook, is 'accuracy/topp', and .*top1"):
        SafeCheckpointHook()._check_watched_metrics(wrong)
    plateau = SimpleNamespace(monitor="accuracy/topp")
    wrong = SimpleNamespace(val_loop=loop, hooks=[], param_schedulers={"a": [plateau]})
    with pytest.raises(ValueError, match=r"monitor of a param_scheduler, .* is 'accuracy/topp'"):
        SafeCheckpointHook()._check_watched_metrics(wrong)
    metric.dataset_meta = {"classes": ["a", "b"]}  # of which there are no five
    with pytest.raises(ValueError, match="accuracy/top5"):
        SafeCheckpointHook(save_best="accuracy/top5", rule="greater")._check_watched_metrics(runner)


def test_fit_names_what_differs():
    model = nn.Linear(3, 2)
    check_fit(STATE, model, "x.pth")
    with pytest.raises(CheckpointError, match=r"x.pth: 1 weights missing \(bias\)"):
        check_fit({"weight": STATE["weight"]}, model, "x.pth")
    with pytest.raises(CheckpointError, match=r"1 weights unexpected \(scale\)"):
        check_fit({**STATE, "scale": STATE["bias"]}, model, "x.pth")
    with pytest.raises(CheckpointError, match=r"weight is \(2, 3\), the model's \(4, 3\)"):
        check_fit(STATE, nn.Linear(3, 4), "x.pth")


def detector(classes: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {"backbone": nn.Linear(3, 4), "neck": nn.Linear(4, 4), "bbox_head": nn.Linear(4, classes)}
    )


# A model, its weights that a detector has not, names of the norms on its outputs, their epsilon.
AUTHORS = [
    ("rala_vit_tiny", ("proj.", "norm.", "head."), "backbone.extra_norms.{}.norm.", 1e-6),
    ("agent_swin_tiny", ("norm.", "head."), "backbone.norm{}.", 1e-5),
    ("agent_pvt_tiny", ("norm.", "head.", "cls_token"), "", None),
]


class TestDetector:
    def load(self, model: nn.Module, state: dict, names: str = "", training: bool = False) -> dict:
        data = SimpleNamespace(dataset=SimpleNamespace(metainfo={"classes": ("cat", "dog")}))
        loop = SimpleNamespace(dataloader=data)
        runner = SimpleNamespace(
            model=model,
            work_dir="",
            logger=logging.getLogger("test"),
            test_dataloader=data,
            _load_from="coco.pth",
            _resume=False,
            _train_loop=loop if training else None,
            _test_loop=None if training else loop,
        )
        meta = {"dataset_meta": {"classes": tuple(names.split())}}
        checkpoint = {"state_dict": dict(state), "meta": meta}
        CheckedLoadHook().after_load_checkpoint(runner, checkpoint)
        return checkpoint["state_dict"]

    def test_other_classes_are_refused_in_testing(self):
        wanted = r"coco\.pth was trained .*bbox_head\.weight is \(80, 4\), the model's \(2, 4\)"
        with pytest.raises(CheckpointError, match=wanted):
            self.load(detector(2), detector(80).state_dict())

    def test_other_classes_are_left_out_in_fine_tuning(self, caplog):
        state = self.load(detector(2), detector(80).state_dict(), training=True)
        assert state.keys() == {f"{part}.{kind}" for part in ("backbone", "neck") for kind in STATE}
        assert "2 weights of its heads are left out" in caplog.text

    def test_another_backbone_is_refused(self):
        state = detector(2).state_dict() | {"backbone.weight": torch.zeros(5, 3)}
        with pytest.raises(CheckpointError, match=r"backbone\.weight is \(5, 3\)"):
            self.load(detector(2), state, training=True)

    def test_other_names_of_as_many_classes(self, caplog):
        self.load(detector(2), detector(2).state_dict(), "cat dog")
        assert not caplog.text
        self.load(detector(2), detector(2).state_dict(), "dog cat")
        assert "other names of classes than the test data have: dog for cat" in caplog.text

    @pytest.mark.parametrize(("name", "head", "norms", "eps"), AUTHORS)
    def test_authors_detectors(self, name, head, norms, eps):
        """RALA's, Swin's and Agent Attention's files: the backbone's names, in a detector."""
        model = detector(3)
        backbone = {"type": "TimmBackbone", "model_name": name, "output_norm_eps": eps}
        model["backbone"] = MODELS.build(backbone)
        manifest = json.loads((REFERENCE / f"{name}.json").read_text())
        theirs = authors(manifest, head, norms, model)
        assert {key.partition(".")[0] for key in theirs} == {"backbone", "neck", "bbox_head"}
        Detector = type("Detector", (nn.Module,), {})
        whole = Detector()
        for part, module in model.items():
            setattr(whole, part, module)
        state = self.load(whole, theirs)
        missing, unexpected = whole.load_state_dict(state, strict=False)
        assert [key for key in missing if "num_batches" not in key] == unexpected == []
        for i in range(4 if eps else 0):
            wanted = theirs[norms.format(i) + "weight"]
            assert whole.backbone.norms[i].weight.equal(wanted)
        with pytest.raises(
            CheckpointError, match=r"coco\.pth does not fit the model of the config"
        ):
            self.load(whole, dict(list(theirs.items())[::2]))

    def test_authors_classifiers(self):
        name = "rala_vit_tiny"
        manifest = json.loads((REFERENCE / f"{name}.json").read_text())
        theirs = {k: torch.from_numpy(v) for k, v in fill.state_dict(manifest).items()}
        theirs |= {k: torch.tensor(0) for k in manifest["not_filled"]}
        whole = nn.Module()
        whole.backbone = timm.create_model(name)
        state = self.load(whole, {f"module.{k}": v for k, v in theirs.items()})
        missing, unexpected = whole.load_state_dict(state, strict=False)
        assert [key for key in missing if "num_batches" not in key] == unexpected == []
