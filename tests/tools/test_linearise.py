"""`linsight linearise`: a teacher with softmax attention, a student with linear attention."""

import json

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import MODELS
from mmengine.visualization import Visualizer
from PIL import Image
from sklearn.datasets import load_digits
from typer.testing import CliRunner

import linsight
import linsight.heads
from linsight.backbones.conversion import convert_timm_model
from linsight.heads.backbone import TimmBackbone
from linsight.heads.classification import ImageClassifier
from linsight.kernels import force
from linsight.tools import linearise_report
from linsight.tools.export import write_safetensors
from linsight.tools.linearise import train_student
from linsight_command import app

NANO = {"img_size": 8, "in_chans": 1, "patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 2}
MIXERS = ("mala", "rala", "inline", "hedgehog")
STEPS = 1500


@pytest.fixture(scope="module")
def digits():
    """Standardised handwritten digits (N, 1, 8, 8) and their labels, of training and of test."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    labels = torch.tensor(labels)
    return images[:1400], labels[:1400], images[1400:], labels[1400:]


def train_teacher(digits, steps, folder):
    """A folder with a softmax transformer that was trained by labels."""
    torch.manual_seed(0)
    overlay = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,)}
    model = timm.create_model(
        "softmax_deit_tiny", num_classes=10, pretrained_cfg_overlay=overlay, **NANO
    )
    fit(model, digits, steps)
    write_safetensors(model.eval(), folder)
    return folder


@pytest.fixture(scope="module")
def teacher(digits, tmp_path_factory):
    return train_teacher(digits, 120, tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def skilled_teacher(digits, tmp_path_factory):
    return train_teacher(digits, STEPS, tmp_path_factory.mktemp("skilled"))


def student_of(teacher, mixer, **options):
    source = {"model_name": f"local-dir:{teacher}", "pretrained": True}
    return MODELS.build({"type": "Linearisation", "teacher": source, "mixer": mixer, **options})


def learn(model, images, steps):
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for step in range(steps):
        model.set_progress(step / steps)
        losses = model(images[torch.randint(len(images), (32,))], mode="loss")
        sum(value for name, value in losses.items() if "loss" in name).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


def fit(model, digits, steps):
    """Train by labels."""
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = torch.randint(1400, (64,))
        F.cross_entropy(model(digits[0][batch]), digits[1][batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def accuracy(model, digits):
    return (model(digits[2]).argmax(1) == digits[3]).float().mean().item()


@torch.no_grad()
def distance(model, images):
    """1 - the mean cosine of a student's features with its teacher's."""
    return 1 - sum(r["cosine"] for r in model(images, mode="predict")) / len(images)


@pytest.mark.parametrize("mixer", ["mala", "hedgehog"])
def test_a_student_recovers_its_teachers_features(mixer, teacher, digits):
    torch.manual_seed(0)
    model = student_of(teacher, mixer).eval()
    untrained = distance(model, digits[2])
    learn(model, digits[0], 60)
    assert distance(model, digits[2]) < untrained / 3


def test_each_mixer_is_compared_at_its_teachers_places():
    """DINOv3's attention under another name errs nowhere: it rotates q and k by the same angles."""
    model = MODELS.build(
        {
            "type": "Linearisation",
            "teacher": {"model_name": "softmax_dinov3_small", "num_classes": 0, **NANO},
            "mixer": "gated_softmax",
            "mixer_options": {"gated_softmax": {"gate": False, "local_kernel": 0}},
        }
    )
    (teacher,), student = model._teacher, model.backbone
    torch.manual_seed(0)
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    teacher.load_state_dict(student.state_dict())
    errors, _ = model.block_errors(teacher, torch.randn(2, 1, 6, 8))
    assert errors.shape == (2, 2)
    assert errors.max() < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_student_is_within_a_point_of_its_teacher(mixer, skilled_teacher, digits):
    """The same model as swapped, and trained from scratch by labels in the same steps, beside it:
    `pytest --slow -s` prints the row of docs/linearise.md."""
    torch.manual_seed(0)
    stages = {"mixers": 0.3, "features": 0.5, "logits": 0.2}
    model = student_of(skilled_teacher, mixer, stages=stages).eval()
    scratch = timm.create_model("softmax_deit_tiny", mixer=mixer, num_classes=10, **NANO)
    rates = [accuracy(m, digits) for m in (model._teacher[0], model.backbone)]
    learn(model, digits[0], STEPS)
    fit(scratch, digits, STEPS)
    rates += [accuracy(m.eval(), digits) for m in (model.backbone, scratch)]
    print("", f"`{mixer}`", *(f"{100 * rate:.1f}" for rate in rates), "", sep=" | ")
    original, swapped, linear, _ = rates
    assert original > 0.9
    assert swapped < original - 0.05
    assert linear > original - 0.01


def test_each_mixer_learns_from_its_own_block(teacher, digits):
    """In the first stage a block's error reaches that block's mixer, and nothing else."""
    model = student_of(teacher, "hedgehog", blocks=[0])
    assert model.swapped == [0]
    losses = model(digits[0][:4], mode="loss")
    assert losses.keys() == {"loss", "error_00"}
    losses["loss"].backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None}
    assert touched == {n for n, _ in model.named_parameters() if ".blocks.0.mixer." in n}
    assert not any("teacher" in name for name in model.state_dict())


def test_batches_are_resized(teacher, digits):
    """The teacher and the student see the same side of those that are named."""
    model = student_of(teacher, "mala", sizes=(4, 12), stages={"features": 1})
    sides = set()
    for part in (model._teacher[0], model.backbone):
        part.patch_embed.register_forward_pre_hook(lambda _, args: sides.add(args[0].shape[-1]))
    torch.manual_seed(0)
    for _ in range(8):
        model(digits[0][:2], mode="loss")
    assert sides == {4, 12}
    sides.clear()
    model.eval()(digits[0][:2], mode="predict")
    assert sides == {8}


def test_images_get_pieces_of_one_another(teacher, digits):
    model = student_of(teacher, "mala", cutmix=1.0)
    seen = []
    model._teacher[0].patch_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    images = digits[0][:2]
    np.random.seed(0)  # noqa: NPY002 -- timm draws by it
    model(images.clone(), mode="loss")
    mixed = seen[0]
    assert not torch.equal(mixed, images)
    assert ((mixed == images) | (mixed == images.flip(0))).all()
    with pytest.raises(ValueError, match="a batch has 3 images, and cutmix takes an even number"):
        model(digits[0][:3], mode="loss")


def test_windows_of_swin_become_global(tmp_path):
    """Blocks are counted through the stages, and features are maps."""
    options = {"img_size": 32, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4)}
    theirs = timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **options)
    write_safetensors(convert_timm_model(theirs.eval()), tmp_path)
    model = student_of(tmp_path, "mala", blocks=[1, -1])
    assert model.swapped == [1, 2]
    images = torch.randn(2, 3, 48, 32)
    assert model(images, mode="loss").keys() == {"loss", "error_01", "error_02"}
    model.set_progress(0.9)
    model(images, mode="loss")["loss_features"].backward()
    assert model.backbone.stages[1].blocks[0].mixer.in_proj.weight.grad is not None
    results = model.eval()(images, mode="predict")
    assert all(-1 <= result["cosine"] <= 1 for result in results)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--report-sizes", "224;518"], "--report-sizes is '224;518', expected sides such as"),
        (["--keep-last", "2"], "--keep-last is 2, expected less than 2 blocks"),
        (["--mixer", "care", "--data", "."], "1 class tokens stand before the map"),
        ([], "data: give a folder of pictures by --data, or a config by --config"),
        (["--data", "none"], "the folder data_root 'none' does not exist"),
    ],
)
def test_wrong_words_are_one_line(teacher, tmp_path, words, message):
    words = ["linearise", str(teacher), *words, "--work-dir", str(tmp_path / "work")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1
    assert done.output.startswith(f"error: {message}")
    assert "\n" not in done.output.strip()


def test_a_swap_keeps_all_other_weights():
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24)
    teacher, student = convert_timm_model(theirs), linsight.linearise(theirs, "mala", blocks=[-2])
    own, old = student.state_dict(), teacher.state_dict()
    wide = own.pop("blocks.0.mixer.in_proj.weight"), own.pop("blocks.0.mixer.in_proj.bias")
    assert torch.equal(wide[0][:72], old["blocks.0.mixer.in_proj.weight"])
    assert torch.equal(wide[1][72:], torch.ones(24))
    assert [name for name in own if name not in old] == [
        "blocks.0.mixer.attention.local_weight",
        "blocks.0.mixer.attention.local_bias",
    ]
    assert all(torch.equal(value, own[name]) for name, value in old.items() if name in own)
    again = timm.create_model(student.pretrained_cfg["architecture"], **student.model_args)
    assert again.state_dict().keys() == student.state_dict().keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": [2]}, "blocks is .2., expected at least one index from -2 to 1"),
        ({"mixer": "mla"}, "there is no mixer 'mla'; did you mean"),
        ({"mixer": "care"}, "class tokens stand before the map"),
        (
            {"name": "inline_deit_tiny"},
            "blocks 0, 1 hold inline, inline, and softmax",
        ),
        ({"name": "rala_vit_nano"}, "model is a RAVLT; supported are timm's plain"),
    ],
)
def test_an_impossible_swap_is_named(options, message):
    options = {"name": "softmax_deit_tiny", **options}
    name = options.pop("name")
    model = timm.create_model(name, **NANO if "deit" in name else {})
    with pytest.raises(ValueError, match=message):
        linsight.linearise(model, **options)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(11):
        Image.effect_noise((40, 40), 30 + i).convert("RGB").save(folder / f"{i:02d}.png")
    return folder


def test_the_command(pictures, tmp_path, monkeypatch):
    """It trains on pictures without labels, reports, goes on, and writes a model for timm."""
    monkeypatch.setattr(linearise_report, "SECONDS", 0)
    options = {"img_size": 42, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = timm.create_model("softmax_dinov2_small.lvd142m_reg4", **options)
    write_safetensors(model.eval(), tmp_path / "model")
    words = ["linearise", str(tmp_path / "model"), "--mixer", "hedgehog", "--data", str(pictures)]
    words += ["--image-size", "42", "--batch-size", "4", "--work-dir", str(tmp_path / "work")]
    words += ["--cfg-options", "train_dataloader.num_workers=0"]
    words += ["--cfg-options", "val_dataloader.num_workers=0", "--keep-last", "1"]
    words += ["--report-sizes", "28,56", "--cfg-options", "default_hooks.learning_curve=None"]
    for more in (["--epochs", "1"], ["--epochs", "2", "--resume"]):
        done = CliRunner().invoke(app, [*words, *more])
        assert done.exit_code == 0, done.output
        for shared in (MMLogger, MessageHub, Visualizer):
            shared._instance_dict.clear()  # mmengine finds them again by the second
    assert "resumed epoch: 1" in done.output
    report = json.loads((tmp_path / "work/report.json").read_text())
    assert report["blocks"] == [0]
    assert report["trained"].keys() == {"cosine", "error_0"}
    for row, size in zip(report["sizes"], (28, 56), strict=True):
        assert row["size"] == size
        assert 0 < row["cosine"] <= 100
        assert min(row[model]["images_per_second"] for model in ("teacher", "student")) > 0
    # One linear block among a teacher's blocks is the student.
    assert report["linear blocks"]["first"] == report["linear blocks"]["last"]
    assert len(report["linear blocks"]["first"]) == 1
    assert report["attention"].keys() == {"blocks.1"}
    assert 0 < report["attention"]["blocks.1"] < 100.01
    for figure in ("block_errors.png", "features.png", "linear_blocks.png"):
        assert (tmp_path / "work" / figure).is_file()
    student = timm.create_model(f"local-dir:{tmp_path / 'work/student'}", pretrained=True)
    kinds = [type(block.mixer).__name__ for block in student.blocks]
    assert kinds == ["Hedgehog", "Softmax"]
    assert student(torch.randn(1, 3, 56, 70)).shape == (1, 32)


def test_data_are_asked_for(tmp_path):
    model = timm.create_model("softmax_deit_tiny", **NANO)
    with pytest.raises(ValueError, match="give a folder of pictures by --data"):
        train_student(model, "mala", work_dir=tmp_path)
    with pytest.raises(ValueError, match=r"data_root .* does not exist"):
        train_student(model, "mala", data=tmp_path / "none", work_dir=tmp_path)


@pytest.mark.parametrize("name", ["softmax_dinov2_small.lvd142m_reg4", "softmax_dinov3_small"])
def test_the_result_is_a_model_of_timm(name, tmp_path):
    """A folder that timm, predict, torch.export, classifiers and dense tasks take."""
    options = {"img_size": 56, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 3}
    names = ["cat", "dog", "owl"]
    overlay = {"input_size": (3, 56, 56), "label_names": names}
    teacher = timm.create_model(name, pretrained_cfg_overlay=overlay, **options)
    student = linsight.linearise(teacher, "mhla", mixer_options={"mhla": {"squares": 2}})
    write_safetensors(student, tmp_path)
    source = f"local-dir:{tmp_path}"
    images = torch.randn(2, 3, 70, 56)
    with torch.inference_mode():
        wanted = student(images)
        assert torch.equal(timm.create_model(source, pretrained=True).eval()(images), wanted)
    result = linsight.load(tmp_path, device="cpu").predict(Image.new("RGB", (80, 60)))
    assert result.name in names
    classifier = ImageClassifier({"model_name": source, "pretrained": True}, 5)
    classifier(images, torch.tensor([0, 4]), mode="loss")["loss"].backward()
    (fmap,) = TimmBackbone(source, out_indices=(0,), pretrained=True)(images)
    assert fmap.shape == (2, 24, 5, 4)
    with force("reference"):
        program = torch.export.export(student, (images,)).module()
        torch.testing.assert_close(program(images), wanted)


def test_a_folder_keeps_a_models_arguments(tmp_path):
    """`write_safetensors` compares what timm makes of the folder with the model."""
    overlay = {"input_size": (3, 64, 64)}
    model = timm.create_model(
        "rala_vit_nano", global_pool="max", drop_path_rate=0.1, pretrained_cfg_overlay=overlay
    )
    model.reset_classifier(3, "avg")
    write_safetensors(model.eval(), tmp_path / "pooled")
    # The tag brings registers, of which timm knows nothing; and before 1.0.31 nothing of the rest.
    model = timm.create_model(
        "softmax_dinov2_small.lvd142m_reg4",
        img_size=28,
        embed_dim=24,
        depth=1,
        num_heads=2,
        num_classes=0,
        pretrained_cfg_overlay={"input_size": (3, 28, 28)},
    )
    vars(model).pop("_model_args", None)
    write_safetensors(model.eval(), tmp_path / "tagged")
    arguments = json.loads((tmp_path / "tagged/config.json").read_text())["model_args"]
    assert arguments["reg_tokens"] == 4
