"""Semantic segmentation from the command line, on a training of seconds, and its configs."""

import csv
import re

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS
from PIL import Image
from typer.testing import CliRunner

from linsight.backbones.initialization import shapes_only
from linsight.data.digits import digit_scene
from linsight.tools import main
from linsight.tools.config import CONFIGS, ConfigError, load_config
from linsight.tools.demo import DEMOS
from linsight.tools.test import test as run_test
from linsight.tools.train import train

from .test_train import command

cli_train, cli_test = command(train), command(run_test)
METHODS = ("segformer", "semantic_fpn", "upernet")
NAMES = sorted(path.stem for method in METHODS for path in CONFIGS.glob(f"{method}/*.py"))
# The papers' millions of parameters; for UPerNet they include the auxiliary head.
PARAMETERS = {
    "semantic_fpn_rala_vit": {"tiny": 18, "small": 28, "base": 51, "large": 98},
    "upernet_rala_vit": {"small": 55, "base": 77, "large": 125},
    "upernet_softmax_swin": {"tiny": 60, "small": 81, "base": 121},
    "upernet_agent_swin": {"tiny": 61, "small": 81, "base": 121},
    "semantic_fpn_agent_pvt": {"tiny": 15, "small": 24, "medium": 40, "large": 52},
    "upernet_soft_norm_vit": {"small": 54, "medium": 76},
}

CONFIG = """
_base_ = "{base}"
model = dict(decode_head=dict(channels=8))
train_dataloader = dict(batch_size=2, num_workers=0, dataset=dict(length=8, size=48))
val_dataloader = dict(batch_size=2, num_workers=0, dataset=dict(length=3, size=48))
test_dataloader = val_dataloader
train_cfg = dict(max_iters=4, val_interval=2)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=2))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished training: its config, its work dir, and what it printed."""
    folder = tmp_path_factory.mktemp("segmented")
    config = folder / "tiny.py"
    config.write_text(CONFIG.format(base=CONFIGS / "segformer/segformer_rala_vit_nano_digits.py"))
    return config, folder / "run", cli_train(config, "--work-dir", folder / "run")


def test_training_leaves_weights_and_figures(trained):
    _, work_dir, output = trained
    assert "segmentation/mIoU" in output
    assert {p.name for p in work_dir.glob("iter_*")} == {"iter_2.pth", "iter_4.pth"}
    assert len(list(work_dir.glob("best_segmentation_mIoU_iter_*.pth"))) == 1
    for figure in ("learning_curve.png", "predictions.png"):
        with Image.open(work_dir / figure) as picture:
            assert min(picture.size) > 300


def test_training_goes_on(trained, tmp_path):
    config, work_dir, _ = trained
    checkpoint = work_dir / "iter_2.pth"
    output = cli_train(config, "--work-dir", tmp_path, "--resume", checkpoint)
    assert "Iter(train) [3/4]" in output
    assert "Iter(train) [2/4]" not in output
    # Only the scenes are drawn at random, so it ends where the unbroken training did.
    unbroken, resumed = (
        torch.load(folder / "iter_4.pth", weights_only=False)["state_dict"]
        for folder in (work_dir, tmp_path)
    )
    assert all(weight.equal(resumed[name]) for name, weight in unbroken.items())


def test_a_test_prints_every_class(trained, tmp_path):
    config, work_dir, _ = trained
    words = (config, work_dir / "iter_4.pth", "--work-dir", tmp_path)
    output = cli_test(*words, "model.window=32", "model.test_flip=True")
    assert re.search(r"background .* \d+\.\d\d", output)
    assert re.search(r"mIoU .* \d+\.\d\d", output)
    assert (tmp_path / "predictions.png").exists()
    wrong = cli_test(*words, "model.decode_head.channels=16", expect=1)
    assert "iter_4.pth does not fit the model of the config" in wrong
    wrong = cli_test(*words, "model.num_classes=7", expect=1)
    assert "was trained for 11 classes, and the config has 7" in wrong


def test_fine_tuning_leaves_the_classifier_out(trained, tmp_path):
    config, work_dir, _ = trained
    output = cli_train(
        config,
        *("--work-dir", tmp_path, f"load_from={work_dir / 'iter_4.pth'}"),
        *("model.num_classes=12", "train_cfg.max_iters=1", "val_dataloader=None", "val_cfg=None"),
        *("val_evaluator=None", "train_dataloader.dataset.type=DigitSegmentation"),
        *("default_hooks.data_check=None",),
    )
    assert "its classifier is left out" in output


def test_predictions(trained, tmp_path):
    scene = digit_scene(0, "test", size=(60, 90), digits=2, digit_size=(0.5, 0.7))
    Image.fromarray(scene.image).save(tmp_path / "scene.png")

    def predict(checkpoint, out, *options):
        words = ["predict", checkpoint, tmp_path / "scene.png", "--out", tmp_path / out, *options]
        result = CliRunner().invoke(main.app, list(map(str, words)))
        assert result.exit_code == 0, result.output
        with open(tmp_path / out / "predictions.csv", newline="") as file:
            return list(csv.reader(file))

    config, work_dir, _ = trained
    rows = predict(work_dir / "iter_4.pth", "out")
    assert rows[0] == ["picture", "class", "share of the pixels"]
    assert sum(float(row[2]) for row in rows[1:]) == pytest.approx(1, abs=1e-4)
    assert (tmp_path / "out" / "scene.png").stat().st_size > 5000
    slid = predict(work_dir / "iter_4.pth", "slid", "--cfg-options", "model.window=64")
    assert len(slid) > 1
    # Weights alone, as authors release them, fit the config that is named.
    state = torch.load(work_dir / "iter_4.pth", weights_only=False)["state_dict"]
    names = tuple(f"thing {i}" for i in range(11))
    torch.save({"state_dict": state, "meta": {"CLASSES": names}}, tmp_path / "authors.pth")
    named = predict(tmp_path / "authors.pth", "named", "--model", config)
    assert {row[1] for row in named[1:]} <= set(names)


def test_a_picture_that_is_too_small_costs_no_other(trained, tmp_path):
    for name, side in (("a_tiny", 9), ("large", 64)):
        Image.new("RGB", (side, side)).save(tmp_path / f"{name}.png")
    words = ["predict", str(trained[1] / "iter_4.pth"), str(tmp_path), "--out", str(tmp_path / "o")]
    result = CliRunner().invoke(main.app, words)
    assert result.exit_code == 0, result.output
    assert "1 of 2 pictures could not be read: " in result.output
    assert "a_tiny.png (images are 9 x 9 pixels, at least 32 x 32 are needed" in result.output
    assert (tmp_path / "o" / "large.png").exists()


def test_the_demonstration_has_its_config():
    assert DEMOS["segmentation"].config in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_configs_build(name):
    cfg = load_config(name)
    family, _, size = re.sub("_(80|160|40)k_ade20k", "", name).rpartition("_")
    published = PARAMETERS.get(family, {}).get(size)
    if published or re.search("nano|tiny|segformer", name):
        settings = {**cfg.model, "backbone": {**cfg.model.backbone, "pretrained": False}}
        with shapes_only():
            model = MODELS.build(settings)
        if published:
            count = sum(p.numel() for p in model.parameters()) / 1e6
            assert count == pytest.approx(published, abs=0.7)
    for hook in cfg.default_hooks.values():
        assert HOOKS.build(hook)
    METRICS.build(cfg.val_evaluator)
    if "digits" in name:
        assert DATASETS.build(cfg.train_dataloader.dataset)[0][0].shape == (3, 96, 96)
        return
    iterations = int(re.search(r"_(\d+)k_", name)[1]) * 1000
    assert cfg.train_cfg.max_iters == cfg.param_scheduler[-1].end == iterations
    assert cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size
    assert cfg.model.backbone.pretrained


def test_the_transforms_of_ade20k(tmp_path):
    from torchvision import tv_tensors

    from linsight.data.mask_transforms import build_transforms

    cfg = load_config("semantic_fpn_rala_vit_tiny_80k_ade20k", [f"data_root={tmp_path}"])
    assert cfg.train_dataloader.dataset.root == cfg.val_dataloader.dataset.root == str(tmp_path)
    image = tv_tensors.Image(torch.randint(256, (3, 60, 200), dtype=torch.uint8))
    mask = tv_tensors.Mask(torch.randint(9, (60, 200), dtype=torch.uint8))
    image, mask = build_transforms(cfg.train_dataloader.dataset.transforms)(image, mask)
    assert image.shape == (3, 512, 512)
    assert mask.shape == (512, 512)
    image = tv_tensors.Image(torch.zeros(3, 60, 300, dtype=torch.uint8))
    assert build_transforms(cfg.val_dataloader.dataset.transforms)(image).shape[1:] == (409, 2048)


def test_a_misspelt_transform():
    override = "val_dataloader.dataset.transforms.0.type=torchvision.transforms.v2.Resise"
    with pytest.raises(ConfigError, match=r"there is no 'torchvision\.transforms\.v2\.Resise'"):
        load_config("semantic_fpn_rala_vit_tiny_80k_ade20k", [override])


def test_what_does_not_decay():
    """The parameters that the papers except do not decay, under the models' names for them."""
    cfg = load_config("upernet_agent_swin_tiny_160k_ade20k")
    with shapes_only():
        model = MODELS.build({**cfg.model, "backbone": {**cfg.model.backbone, "pretrained": False}})
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    names = {id(p): name for name, p in model.named_parameters()}
    kept = {
        names[id(p)] for g in wrapper.param_groups if not g["weight_decay"] for p in g["params"]
    }
    excepted = "norm|relative_position_bias_table|map_bias|row_bias|column_bias"
    assert kept == {name for name in names.values() if re.search(excepted, name)}
    assert not any(name.startswith("decode_head") for name in kept)
