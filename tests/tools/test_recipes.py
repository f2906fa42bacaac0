"""Recipes against a table of what their authors' files say, one row per recipe.

The column `also` has words: bf16 (training in bfloat16), squash (both sides of a test image are
resized), random (random interpolation), erasing (after Mixup), local_bn (batch norms per GPU),
multi (many scales), smooth (the region proposals' loss), and names with a value: ema (1 - decay),
mix (of Mixup and CutMix), val (iterations between validations).
"""

import csv
from pathlib import Path

import pytest

from linsight.tools.config import CONFIGS, load_config

TABLE = list(csv.DictReader(Path(__file__).with_name("recipes.csv").open()))


@pytest.mark.parametrize("row", TABLE, ids=[row["config"] for row in TABLE])
def test_is_the_authors(row):
    cfg = load_config(row["config"])
    optimizer = cfg.optim_wrapper.optimizer
    assert optimizer.lr == pytest.approx(float(row["rate"]), rel=1e-4)
    assert optimizer.weight_decay == pytest.approx(float(row["decay"]))
    assert cfg.auto_scale_lr == {"enable": True, "base_batch_size": int(row["batch"])}
    assert int(row["length"]) in (cfg.train_cfg.get("max_epochs"), cfg.train_cfg.get("max_iters"))
    assert cfg.model.backbone.get("drop_path_rate") == pytest.approx(float(row["drop_path"]))
    clip = (cfg.optim_wrapper.get("clip_grad") or {}).get("max_norm")
    assert clip == (float(row["clip"]) if row["clip"] else None)
    words = row["also"].split()
    values = {name: words[words.index(name) + 1] for name in ("ema", "mix", "val") if name in words}
    assert (cfg.optim_wrapper.get("dtype") == "bfloat16") == ("bf16" in words)
    if "in1k" in row["config"]:
        check_classifier(cfg, words, values)
    elif "coco" in row["config"]:
        resizes = "RandomChoice" in str(cfg.train_dataloader.dataset.pipeline)
        assert resizes == ("multi" in words)
        if "smooth" in words:
            loss = cfg.model.rpn_head.loss_bbox
            assert (loss.type, loss.beta) == ("SmoothL1Loss", pytest.approx(1 / 9))
    else:
        assert "PhotometricDistortion" in str(cfg.train_dataloader.dataset.transforms)
        if "val" in values:
            assert cfg.train_cfg.val_interval == int(values["val"])


def check_classifier(cfg, words, values):
    train, test = cfg.train_dataloader.dataset.transform, cfg.test_dataloader.dataset.transform
    assert (test.get("crop_mode") == "squash") == ("squash" in words)
    assert train.interpolation == ("random" if "random" in words else "bicubic")
    erasing = cfg.model.get("erasing") or {"probability": 0.0}
    assert (train.re_prob, erasing["probability"]) == (
        (0, 0.25) if "erasing" in words else (0.25, 0)
    )
    assert cfg.sync_bn == (None if "local_bn" in words else "torch")
    average = cfg.default_hooks.get("ema") or {}
    if "per" in words:
        assert (average.decay, average.base_batch_size) == (float(values["ema"]), int(words[-1]))
    else:
        expected = float(values["ema"]) if "ema" in values else None
        assert average.get("momentum") == pytest.approx(expected)
    if "mix" in values:
        mixed = float(values["mix"])
        assert (cfg.model.mixup.mixup_alpha, cfg.model.mixup.cutmix_alpha) == (mixed, mixed)


def test_the_table_names_configs():
    names = {path.stem for path in CONFIGS.glob("[!_]*/*.py")}
    assert {row["config"] for row in TABLE} <= names
