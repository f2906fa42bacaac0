"""`linsight train --data`: from a user's data to a config, a training, and predictions."""

import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image, ImageDraw

import linsight
from linsight.backbones.checkpoint import CheckpointError
from linsight.data.loading import DataError
from linsight.data.source_check import Report, check_source
from linsight.data.sources import Sample, Source, read_source
from linsight.heads import published
from linsight.heads.classification import ImageClassifier
from linsight.tools.check import check
from linsight.tools.config import ConfigError, load_config
from linsight.tools.look import look
from linsight.tools.recipe import Recipe, Wishes, write_recipe
from linsight.tools.recipe_start import Start
from linsight.tools.results import Objects
from linsight.tools.schedule import drop_empty_schedules, schedule_faults, set_epochs
from linsight.tools.test import test as run_test

ROOT = Path(__file__).parents[2]


def draw(kind: int, index: int, size: int = 48) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """A picture of a disc, a square or a cross, and its box."""
    rng = np.random.default_rng((kind, index))
    picture = Image.fromarray(rng.integers(0, 90, (size, size, 3), dtype=np.uint8))
    x, y = (int(v) for v in rng.integers(2, size // 2, 2))
    box = (x, y, x + size // 3, y + size // 3)
    pen = ImageDraw.Draw(picture)
    colour = tuple(int(v) for v in np.roll([230, 60, 60], kind))
    (pen.ellipse, pen.rectangle, pen.line)[kind](box, fill=colour)
    return picture, box


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "photos"
    for kind, name in enumerate(("disc", "square", "cross")):
        (root / name).mkdir(parents=True)
        for index in range(20):
            draw(kind, index)[0].save(root / name / f"{index} ü.png")
    return root


@pytest.fixture(scope="module")
def boxes(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "boxes"
    (root / "images").mkdir(parents=True)
    content = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": 3, "name": "disc"}, {"id": 8, "name": "square"}]
    for index in range(6):
        picture, (x, y, right, bottom) = draw(index % 2, index, 64)
        picture.save(root / "images" / f"{index}.png")
        content["images"].append(
            {"id": index, "file_name": f"{index}.png", "width": 64, "height": 64}
        )
        content["annotations"].append(
            {
                "id": index,
                "image_id": index,
                "category_id": (3, 8)[index % 2],
                "bbox": [x, y, right - x, bottom - y],
            }
        )
    (root / "labels.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "masks"
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    for index in range(6):
        picture, box = draw(1, index, 64)
        picture.save(root / "images" / f"{index}.png")
        mask = Image.new("L", picture.size)
        ImageDraw.Draw(mask).rectangle(box, fill=255)
        mask.save(root / "masks" / f"{index}.png")
    return root


def recipe(data: Path, folder: Path, **wishes):
    source = read_source(data)
    wishes = {"model": "rala_vit_nano", "weights": "none", "workers": 0, **wishes}
    return load_config(write_recipe(source, check_source(source), Wishes(**wishes), folder))


def test_the_config_holds_what_the_command_line_changes(photos, tmp_path):
    """So that `linsight test work_dir/config.py` finds the model that was trained."""
    source = read_source(photos)
    wishes = Wishes(model="rala_vit_nano", weights="none", image_size=32)
    words = [
        "model.backbone.depths=(1,0,0,1)",
        "train_dataloader.dataset.transform.scale=[0.6,1.0]",
    ]
    file = write_recipe(
        source, check_source(source), wishes, tmp_path, [*words, "auto_scale_lr=None"]
    )
    config = load_config(file)
    assert config.model.backbone == {"model_name": "rala_vit_nano", "depths": (1, 0, 0, 1)}
    assert list(config.train_dataloader.dataset.transform.scale) == [0.6, 1.0]
    assert words[0] in file.read_text()
    with pytest.raises(ConfigError, match="the config has no such key"):
        write_recipe(source, check_source(source), wishes, tmp_path, ["mode.depths=1"])


class TestConfig:
    def test_of_classes(self, photos, tmp_path):
        cfg = recipe(photos, tmp_path, epochs=10, class_weights=True, frozen_stages=2)
        assert (cfg.model.type, cfg.model.num_classes) == ("ImageClassifier", 3)
        assert cfg.model.loss.weight == [1.0, 1.0, 1.0]
        assert cfg.model.backbone.frozen_stages == 2
        iterations = 48 // cfg.train_dataloader.batch_size
        assert iterations >= 8
        warmup, cosine = cfg.param_scheduler
        assert 2 <= warmup.end <= iterations * 10 / 5
        assert cosine.end == iterations * 10
        # The average forgets most of the first weights within a fifth of the training.
        assert cfg.default_hooks.ema.decay ** (iterations * 2) < 0.3
        assert cfg.train_dataloader.dataset.transform.input_size == 96
        assert recipe(photos, tmp_path, lr=0.0).optim_wrapper.optimizer.lr == 0

    def test_norms_of_random_weights_become_batch_norms(self, photos, tmp_path):
        """In evaluation they are batch norms, whose weights training must have reached."""
        cfg = recipe(photos, tmp_path, model="slab_pvtv2_b0", epochs=10, batch_size=4)
        steps = cfg.param_scheduler[-1].end
        assert cfg.default_hooks.norm_progress.iterations == steps // 6
        assert "norm_progress" not in recipe(photos, tmp_path).default_hooks

    def test_small_images_are_cropped_less(self, photos, tmp_path):
        """They show one thing, whole."""
        large = tmp_path / "large"
        for file in photos.glob("*/[1-3] *.png"):
            (large / file.parent.name).mkdir(parents=True, exist_ok=True)
            Image.open(file).resize((64, 48)).save(large / file.parent.name / file.name)
        wanted = {photos: ([0.6, 1.0], None), large: ([0.35, 1.0], "rand-m5-n2-mstd0.5-inc1")}
        for data, (scale, augment) in wanted.items():
            transform = recipe(data, tmp_path / "run").train_dataloader.dataset.transform
            assert (list(transform.scale), transform.auto_augment) == (scale, augment)
            text = (tmp_path / "run" / "config.py").read_text()
            assert ("show one thing, whole: crops keep 60 %" in text) == (data == photos)

    @pytest.mark.parametrize(
        ("images", "pretrained", "batch", "lr", "epochs"),
        [
            (55_000, False, 256, 2e-3, 40),
            (19_000, False, 128, 1.4e-3, 40),
            (55_000, True, 128, 7.1e-4, 10),
        ],
    )
    def test_many_images_on_a_gpu(self, monkeypatch, images, pretrained, batch, lr, epochs):
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (100 << 30, 140 << 30))
        samples = [Sample(Path("a.png"), 0)] * images
        source = Source("", "", "classification", ["a", "b"], {"train": samples, "val": samples})
        start = Start("rala_vit_nano")
        start.pretrained = pretrained
        chosen = Recipe(source, Report({}, {}, [(28, 28)]), Wishes(), start, {})
        assert (chosen.batch, chosen.lr, chosen.epochs) == (batch, lr, epochs)
        assert ("20,000 images or more" in chosen.batch_said) == (batch == 256)

    def test_of_boxes(self, boxes, tmp_path):
        cfg = recipe(boxes, tmp_path, epochs=2, batch_size=2)
        assert (cfg.model.type, cfg.model.bbox_head.num_classes) == ("TimmRetinaNet", 2)
        assert cfg.param_scheduler[0].end == 2
        written = json.loads((tmp_path / "data" / "train.json").read_text())
        assert [c["name"] for c in written["categories"]] == ["disc", "square"]

    def test_of_masks(self, masks, tmp_path):
        cfg = recipe(masks, tmp_path, class_weights=True)
        assert cfg.model.num_classes == 2
        assert cfg.train_dataloader.dataset.label_map == {0: 0, 255: 1}
        assert len(cfg.model.loss.class_weight) == 2

    @pytest.mark.parametrize(
        ("wishes", "message"),
        [
            ({"weights": "pretrained"}, "rala_vit_nano has no published weights to fetch"),
            ({"model": None}, "--model is missing, such as --model rala_vit_tiny"),
            ({"model": "rala_vit_nan"}, "the nearest are rala_vit_nano"),
            ({"frozen_stages": 9}, "frozen_stages is 9"),
        ],
    )
    def test_mistakes_are_one_line(self, photos, tmp_path, wishes, message):
        with pytest.raises(ValueError, match=message):
            ImageClassifier(
                **{k: v for k, v in recipe(photos, tmp_path, **wishes).model.items() if k != "type"}
            )

    def test_a_plain_body_gets_a_simple_feature_pyramid(self, boxes, masks, tmp_path):
        for data in (boxes, masks):
            model = recipe(data, tmp_path / data.name, model="agent_deit_tiny", batch_size=2).model
            assert model.neck.type == "SimpleFeaturePyramid"
            assert "out_indices" not in model.backbone
        model = recipe(boxes, tmp_path, model="agent_deit_tiny", batch_size=2).model
        assert model.neck.strides == (8, 16, 32, 64, 128)
        assert model.bbox_head.anchor_generator.strides == [8, 16, 32, 64, 128]

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            ("crossvit_9_240", "takes images of 240 pixels alone, and detection needs any size"),
            ("efficientvim_m1", "has maps of the strides 16, 32, 64 alone"),
        ],
    )
    def test_a_body_that_fits_no_detector_is_refused(self, boxes, tmp_path, model, message):
        with pytest.raises(ConfigError, match=message):
            recipe(boxes, tmp_path, model=model)

    def test_timms_own_vits(self, boxes, photos, tmp_path):
        model = recipe(boxes, tmp_path, model="vit_tiny_patch16_224", batch_size=2).model
        assert model.backbone.dynamic_img_size
        name = "swin_tiny_patch4_window7_224"
        model = recipe(boxes, tmp_path, model=name, batch_size=2).model
        options = model.backbone
        assert options.get("dynamic_img_size") or options.get("strict_img_size") is False
        sized = recipe(photos, tmp_path, model="vit_tiny_patch16_224", image_size=64)
        assert sized.model.backbone.img_size == 64
        with pytest.raises(ConfigError, match="--image-size is 10, expected 32 or more"):
            recipe(boxes, tmp_path, model="rala_vit_nano", image_size=10)
        transform = recipe(photos, tmp_path, model="vit_tiny_patch16_224", batch_size=2)
        assert transform.train_dataloader.dataset.transform.input_size == 224


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """The best checkpoint of a classifier of the photos, with averaged weights."""
    work_dir = tmp_path_factory.mktemp("run")
    options = {"model": "test_resnet", "weights": "none", "epochs": 12, "image_size": 32}
    return linsight.train(data=photos, work_dir=work_dir, workers=0, lr=5e-3, **options)


class TestTraining:
    def test_a_classifier_learns_from_sixty_pictures(self, photos, trained):
        model = linsight.load(trained)
        right = [
            model.predict(photos / name / f"{index} ü.png").name == name
            for name in ("disc", "square", "cross")
            for index in range(20)
        ]
        assert sum(right) > 45
        result = model.predict(np.zeros((40, 50, 3), np.uint8))
        assert result.scores.shape == (3,)
        assert result.top(2)[0][1] == result.scores.max()

    def test_its_work_dir(self, trained):
        text = (trained.parent / "config.py").read_text()
        assert text.startswith("# Written by `linsight train --data`")
        assert "# There is no validation split: 12 of 60 images" in text
        assert (trained.parent / "samples.png").stat().st_size > 10_000
        assert "cross," in (trained.parent / "class_report.csv").read_text()
        assert (trained.parent / "confusion_matrix.png").stat().st_size > 10_000
        with pytest.raises(ConfigError, match="holds a training: --resume goes on with it"):
            linsight.train(data="elsewhere", model="rala_vit_nano", work_dir=trained.parent)

    def test_its_checkpoint_starts_other_tasks(self, trained, boxes, masks, photos, tmp_path):
        options = {"model": None, "weights": str(trained)}
        same = recipe(photos, tmp_path, **options)
        assert same.load_from == str(trained.resolve())
        assert same.val_dataloader.dataset.transform.input_size == 32

    def test_the_example_of_the_docs(self, trained, photos, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "best.pth").write_bytes(trained.read_bytes())
        Image.open(photos / "disc" / "0 ü.png").save("picture.jpg")
        text = (ROOT / "docs" / "your_own_data.md").read_text()
        (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        exec(example, {})
        assert "['cross', 'disc', 'square']" in capsys.readouterr().out

    def test_a_detector_and_a_segmentor_train_and_predict(self, photos, boxes, masks, tmp_path):
        options = {"model": "rala_vit_nano", "weights": "none", "epochs": 1, "workers": 0}
        for name, data in (("masks", masks), ("boxes", boxes)):
            folder = tmp_path / name
            size = {"image_size": 64, "batch_size": 2}
            best = linsight.train(data=data, work_dir=folder, **options, **size)
            model = linsight.load(best, score=0.0)
            result = model.predict(data / "images" / "0.png")
            look(data / "images" / "0.png", model=str(best), out=folder / "look.png")
            assert Image.open(folder / "look.png").size[0] > 500
            with pytest.raises(SystemExit):
                look(data / "images" / "0.png", model=str(best), label="disc")
            # What it has learned starts any other task.
            other = recipe(photos, tmp_path / "other", model=None, weights=str(best)).model
            other = ImageClassifier(**{k: v for k, v in other.items() if k != "type"})
            learned = torch.load(best, weights_only=False)["state_dict"]
            taken = other.backbone.state_dict()
            for key in ("stem.0.conv.weight", "stages.3.downsample.conv.weight"):
                assert torch.equal(taken[key], learned[f"backbone.model.{key}"])
            if name == "boxes":
                assert model.names == ["disc", "square"]
                assert result.boxes.shape == (len(result), 4)
                assert result.boxes.max(initial=0) <= 64
            else:
                assert result.labels.shape == (64, 64)
                assert sum(result.shares().values()) == pytest.approx(1)

    @pytest.mark.slow
    def test_masks_of_objects(self, boxes, tmp_path):
        """COCO with segmentations trains Mask R-CNN, whose checkpoint is tested and continued."""
        data = tmp_path / "outlines"
        shutil.copytree(boxes, data)
        content = json.loads((data / "labels.json").read_text())
        for entry in content["annotations"]:
            x, y, w, h = entry["bbox"]
            entry["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        (data / "labels.json").write_text(json.dumps(content))
        folder = tmp_path / "run"
        options = {"work_dir": folder, "workers": 0, "epochs": 1, "batch_size": 2, "image_size": 64}
        best = linsight.train(data=data, model="agent_deit_tiny", weights="none", **options)
        cfg = load_config(folder / "config.py")
        assert (cfg.model.type, cfg.model.neck.type) == ("TimmMaskRCNN", "SimpleFeaturePyramid")
        found = linsight.load(best, score=0.0).predict(data / "images" / "0.png")
        assert found.masks.shape == (len(found), 64, 64)
        run_test(str(folder / "config.py"), str(best), work_dir=tmp_path / "test")

    @pytest.mark.slow
    def test_its_checkpoint_is_tested_and_resumed(self, photos, trained, tmp_path, capsys):
        run_test(str(trained.parent / "config.py"), str(trained))
        assert "accuracy/top1" in capsys.readouterr().out
        assert (trained.parent / "test" / "class_report.csv").is_file()
        folder = tmp_path / "run"
        options = {"data": photos, "model": "test_resnet", "weights": "none", "image_size": 32}
        options |= {"work_dir": folder, "workers": 0, "layer_decay": 0.7}
        linsight.train(**options, epochs=1)
        assert load_config(folder / "config.py").optim_wrapper.optimizer.layer_decay == 0.7
        linsight.train(**options, epochs=2, resume=True)
        assert [file.name for file in folder.glob("epoch_*.pth")] == ["epoch_2.pth"]


def test_scripts_of_timm_know_the_models(tmp_path):
    """By the line of docs/your_own_data.md."""
    text = (ROOT / "docs" / "your_own_data.md").read_text()
    (line,) = re.findall(r"^python -c \"(import runpy, linsight;.*)\" ", text, re.MULTILINE)
    (tmp_path / "train.py").write_text(
        "import sys, timm\nif __name__ == '__main__':\n    print(timm.is_model(sys.argv[2]))\n"
    )
    words = [sys.executable, "-c", line, "--model", "rala_vit_tiny"]
    run = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout == "True\n"


def test_names_that_the_font_of_figures_lacks_are_no_warning(photos, tmp_path):
    for name in ("鳥", "disc"):
        shutil.copytree(photos / "disc", tmp_path / "birds" / name)
    with warnings.catch_warnings(record=True) as said:
        check(str(tmp_path / "birds"), out=tmp_path / "samples.png")
    assert not [each for each in said if "Glyph" in str(each.message)]


def test_a_work_dir_has_one_training(photos, tmp_path):
    with FileLock(tmp_path / ".lock"), pytest.raises(ConfigError, match="another training writes"):
        linsight.train(config="rala_vit_nano_digits", work_dir=tmp_path)


def test_options_of_data_are_refused_beside_a_config():
    with pytest.raises(ConfigError, match="--model goes with --data"):
        linsight.train(config="rala_vit_nano_digits", model="rala_vit_tiny")
    with pytest.raises(ConfigError, match="rala_vit_nano_digits stands beside --data, which"):
        linsight.train(config="rala_vit_nano_digits", data="x", model="rala_vit_nano")
    with pytest.raises(TypeError, match="no option 'epoch'; the nearest are epochs"):
        linsight.train(data="x", epoch=1)
    with pytest.raises(DataError, match="do not exist"):
        linsight.train(data="nowhere", model="rala_vit_nano", weights="none")
    # Wrong names are said before the data are looked through.
    for options, said in (
        ({"weights": "none"}, "--model is missing"),
        ({"weights": "none", "model": "rala_vit_nan"}, "the nearest are rala_vit_nano"),
        ({"weights": "no.pth", "model": "rala_vit_nano"}, "--weights is 'no.pth'"),
        ({"weights": "none", "model": "timm:resnet18"}, "expected a name, local-dir:FOLDER or"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            linsight.train(data="nowhere", **options)


def test_another_number_of_epochs_moves_the_whole_schedule():
    cfg = load_config("rala_vit_tiny_300e_in1k")
    set_epochs(cfg, 30)
    warmup, cosine = cfg.param_scheduler
    assert (cfg.train_cfg.max_epochs, cosine.end) == (30, 30)
    assert (warmup.end, cosine.begin, cosine.T_max) == (0.5, 0.5, 29.5)
    assert cfg.default_hooks.ema.decay == pytest.approx(1 - 4e-4)
    cfg = load_config("mask_rcnn_rala_vit_tiny_fpn_1x_coco")
    set_epochs(cfg, 3)
    assert cfg.param_scheduler[0].end == 125
    assert cfg.param_scheduler[1].milestones == [2, 3]
    with pytest.raises(ConfigError, match="counts in iterations"):
        set_epochs(load_config("segformer_rala_vit_nano_digits"), 3)


def test_a_warm_up_of_no_iteration_is_left_out():
    cfg = load_config("rala_vit_tiny_300e_in1k")
    set_epochs(cfg, 1)
    (cosine,) = drop_empty_schedules(cfg.param_scheduler, 4)
    assert cosine.type == "CosineAnnealingLR"
    assert len(drop_empty_schedules(cfg.param_scheduler, 400)) == 2


def test_a_schedule_that_outlasts_the_training_is_said():
    cfg = load_config("rala_vit_tiny_300e_in1k", ["train_cfg.max_epochs=3"])
    warmup, average = schedule_faults(cfg, iterations=30, epoch=10)
    assert "warms up for 50 of 30 iterations" in warmup
    assert "and the training has 30: they keep the first" in average
    assert not schedule_faults(load_config("rala_vit_nano_digits"), 9 * 66, 66)
    detector = load_config("retinanet_rala_vit_tiny_fpn_1x_coco", ["train_cfg.max_epochs=2"])
    assert len(schedule_faults(detector, iterations=20, epoch=10)) == 1


class TestFrozen:
    def model(self, stages: int) -> ImageClassifier:
        backbone = {"model_name": "rala_vit_nano", "frozen_stages": stages}
        return ImageClassifier(backbone, num_classes=3).train()

    def trained(self, model: ImageClassifier) -> set[str]:
        return {n.split(".")[1] for n, p in model.named_parameters() if p.requires_grad}

    def test_stages_of_a_classifier(self):
        model = self.model(2)
        assert {"head", "stages"} <= self.trained(model)
        assert not any(m.training for m in model.backbone.stem.modules())
        assert not any(m.training for m in model.backbone.stages[1].modules())
        assert any(m.training for m in model.backbone.stages[2].modules())

    def test_a_linear_probe(self):
        assert self.trained(self.model(4)) == {"head"}


class TestPublishedWeights:
    def test_no_network_is_said_at_once(self, monkeypatch):
        monkeypatch.setattr(published, "answers", lambda address: False)
        monkeypatch.setattr(published, "is_cached", lambda config: False)
        with pytest.raises(CheckpointError, match="rala_vit_tiny are not in the cache, and"):
            published.require_weights("rala_vit_tiny")

    def test_cached_weights_need_none(self, monkeypatch):
        monkeypatch.setattr(published, "answers", lambda address: False)
        monkeypatch.setattr(published, "is_cached", lambda config: True)
        published.require_weights("rala_vit_tiny")
        published.require_weights("rala_vit_nano")  # it has none to fetch

    def test_a_place_that_does_not_answer(self, monkeypatch):
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.delenv(name, raising=False)
        assert not published.answers("http://127.0.0.1:9/weights.pth")


def test_objects_for_supervision():
    supervision = pytest.importorskip("supervision", reason="it is not installed")
    boxes = np.array([[1, 2, 30, 40], [5, 5, 9, 9]], np.float32)
    masks = np.zeros((2, 48, 48), bool)
    masks[0, 2:40, 1:30] = True
    scores = np.array([0.9, 0.4], np.float32)
    found = Objects(["cat", "dog"], boxes, scores, np.array([1, 0]), masks)
    detections = found.to_supervision()
    assert isinstance(detections, supervision.Detections)
    assert detections.xyxy.tolist() == boxes.tolist()
    assert detections.class_id.tolist() == [1, 0]
    assert detections.data["class_name"].tolist() == ["dog", "cat"]
    assert detections.mask.sum() == masks.sum()
    assert len(detections[detections.confidence > 0.5]) == 1
    none = Objects(["cat"], boxes[:0], np.zeros(0, np.float32), np.zeros(0, np.int64))
    assert len(none.to_supervision()) == 0
