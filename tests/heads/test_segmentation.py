"""The segmentor: its modes, its inference, its losses, its metric and the authors' weights."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import METRICS, MODELS
from safetensors.torch import load_file

from linsight.backbones.checkpoint import CheckpointError
from linsight.heads.segmentation import SemanticSegmentor
from linsight.heads.segmentation_loss import PixelCrossEntropy

from ..reference import fill

REFERENCE = Path(fill.__file__).parent


def segmentor(**options) -> SemanticSegmentor:
    torch.manual_seed(0)
    settings = {
        "backbone": {"model_name": "rala_vit_nano"},
        "decode_head": {"type": "SegformerHead", "channels": 16, "dropout_ratio": 0.0},
        "num_classes": 5,
        **options,
    }
    model = MODELS.build({"type": "SemanticSegmentor", **settings})
    # The logits are far enough apart that rounding decides no pixel.
    torch.nn.init.normal_(model.decode_head.conv_seg.weight)
    return model


def batch(height=64, width=96, classes=5):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (2, height, width), generator=generator, dtype=torch.uint8)
    labels[:, :9] = 255
    return torch.randn(2, 3, height, width, generator=generator), labels


class TestModes:
    def test_shapes_and_the_loss(self):
        model = segmentor(
            neck={"type": "FPN", "out_channels": 16},
            decode_head={"type": "FPNHead", "channels": 16, "dropout_ratio": 0.0},
            auxiliary_head={"type": "FCNHead", "channels": 16, "dropout_ratio": 0.0},
        ).eval()
        images, labels = batch()
        logits = model(images)
        assert logits.shape == (2, 5, 16, 24)
        whole = F.interpolate(logits, labels.shape[1:], mode="bilinear")
        outputs = model(images, labels, mode="predict")
        for output, expected in zip(outputs, whole.argmax(1), strict=True):
            assert output["labels"].equal(expected)
        losses = model(images, labels, mode="loss")
        assert set(losses) == {"decode.loss", "auxiliary.loss"}
        # mmsegmentation averages in this way: ignored pixels count, with a loss of zero.
        entropy = F.cross_entropy(whole, labels.long(), ignore_index=255, reduction="sum")
        torch.testing.assert_close(losses["decode.loss"], entropy / labels.numel())
        with pytest.raises(ValueError, match="'los'"):
            model(images, labels, mode="los")

    def test_every_parameter_has_a_gradient(self):
        """A parameter that nothing trains would stop distributed training."""
        model = segmentor(
            backbone={"model_name": "softmax_swin_tiny", "output_norm_eps": 1e-5},
            auxiliary_head={"type": "FCNHead", "channels": 16},
        )
        sum(model(*batch(32, 32), mode="loss").values()).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []

    def test_any_backbone_of_timm(self):
        model = segmentor(
            backbone={"model_name": "resnet10t", "out_indices": (1, 2, 3, 4)},
            decode_head={"type": "UPerHead", "channels": 16},
        ).eval()
        assert model(batch()[0]).shape == (2, 5, 16, 24)

    def test_nothing_labelled_is_no_loss_and_no_gradient(self):
        images, labels = batch()
        for loss in (None, {"type": "PixelCrossEntropy", "hard_threshold": 0.7, "min_kept": 50}):
            model = segmentor(loss=loss)
            total = sum(model(images, torch.full_like(labels, 255), mode="loss").values())
            total.backward()
            assert total == 0
            assert all((p.grad == 0).all() for p in model.parameters())


class TestInference:
    @pytest.mark.parametrize("size", [(64, 96), (50, 71)])
    def test_one_window_is_the_whole(self, size):
        images, _ = batch(*size)
        whole, slid = (
            segmentor(window=window).eval()(images, mode="predict") for window in (None, 128)
        )
        assert whole[0]["labels"].equal(slid[0]["labels"])

    def test_windows_against_the_formula(self):
        """Every pixel's logits are the average over the windows that it is in."""
        model = segmentor(window=(32, 40), window_stride=(20, 30)).eval()
        images, _ = batch(50, 96)
        total, count = torch.zeros(2, 5, 50, 96), torch.zeros(50, 96)
        for y in (0, 18):
            for x in (0, 30, 56):
                logits = model(images[..., y : y + 32, x : x + 40])
                part = (..., slice(y, y + 32), slice(x, x + 40))
                total[part] += F.interpolate(logits, (32, 40), mode="bilinear")
                count[part] += 1
        found = torch.stack([o["labels"] for o in model(images, mode="predict")])
        assert found.equal((total / count).argmax(1))

    def test_scales_and_mirroring_against_the_formula(self):
        model = segmentor(test_scales=(0.5, 1.0), test_flip=True).eval()
        images, _ = batch()
        total = 0
        for scale in (0.5, 1.0):
            view = F.interpolate(images, (int(64 * scale), int(96 * scale)), mode="bilinear")
            for flip in (False, True):
                logits = model(view.flip(-1) if flip else view)
                for size in (view.shape[2:], images.shape[2:]):
                    logits = F.interpolate(logits, size, mode="bilinear")
                scores = logits.softmax(1)
                total = total + (scores.flip(-1) if flip else scores)
        found = torch.stack([o["labels"] for o in model(images, mode="predict")])
        assert (found == total.argmax(1)).float().mean() > 0.999

    def test_labels_at_the_size_that_is_asked_for(self):
        model = segmentor(window=32).eval()
        images, _ = batch()
        assert model(images, mode="predict", size=(33, 47))[1]["labels"].shape == (33, 47)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"window": 0}, "window must be"),
            ({"window": 32, "window_stride": 40}, "would leave gaps"),
            ({"test_scales": (0.0,)}, "test_scales must be"),
            ({"loss": [{"type": "PixelCrossEntropy"}], "loss_weights": (1, 2)}, "for 1 losses"),
        ],
    )
    def test_bad_arguments_are_named(self, options, message):
        with pytest.raises(ValueError, match=message):
            segmentor(**options)


class TestLosses:
    logits = torch.randn(2, 5, 8, 9, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(5, (2, 8, 9), generator=torch.Generator().manual_seed(1))
    labels[:, :4] = 255

    def test_class_weights(self):
        labels = self.labels
        weights = [1.0, 2.0, 3.0, 0.5, 0.0]
        loss = PixelCrossEntropy(weights)(self.logits, labels)
        chances = self.logits.log_softmax(1)
        known = labels != 255
        each = [
            -weights[label] * chances[i, label, y, x]
            for (i, y, x), label in zip(
                known.nonzero().tolist(), labels[known].tolist(), strict=True
            )
        ]
        torch.testing.assert_close(loss, sum(each) / labels.numel())

    def test_hard_pixels(self):
        labels = self.labels
        plain = F.cross_entropy(self.logits, labels, ignore_index=255, reduction="none")
        known = plain[labels != 255]
        loss = PixelCrossEntropy(hard_threshold=0.2, min_kept=5)(self.logits, labels)
        torch.testing.assert_close(loss, known[known >= -math.log(0.2)].mean())
        # Where fewer pixels are below the threshold, the loss takes the worst ones.
        loss = PixelCrossEntropy(hard_threshold=1e-9, min_kept=5)(self.logits, labels)
        torch.testing.assert_close(loss, known.topk(10).values.mean())

    @pytest.mark.parametrize("name", ["DiceLoss", "FocalLoss", "LovaszLoss"])
    def test_another_librarys(self, name):
        pytest.importorskip("segmentation_models_pytorch", reason="it is not installed")
        kind = f"segmentation_models_pytorch.losses.{name}"
        model = segmentor(
            loss=[
                {"type": "PixelCrossEntropy"},
                {"type": kind, "mode": "multiclass", "ignore_index": 255},
            ],
            loss_weights=(1.0, 3.0),
        )
        images, labels = batch()
        loss = model(images, labels, mode="loss")["decode.loss"]
        assert loss.isfinite()
        labels = torch.full_like(labels, 255)
        loss = model(images, labels, mode="loss")["decode.loss"]
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad.isfinite().all() for p in model.parameters())

    def test_the_models_label_to_ignore_is_the_losses(self):
        model = segmentor(ignore_index=0, loss=[{"type": "PixelCrossEntropy"}] * 2)
        assert [loss.ignore_index for loss in model.losses] == [0, 0]
        model = segmentor(ignore_index=0)
        images, labels = batch()
        labels = torch.where(labels == 255, 0, labels)
        logits = F.interpolate(model.eval()(images), labels.shape[1:], mode="bilinear")
        wanted = F.cross_entropy(logits, labels.long(), ignore_index=0, reduction="sum")
        loss = model(images, labels, mode="loss")["decode.loss"]
        torch.testing.assert_close(loss, wanted / labels.numel())
        with pytest.raises(ValueError, match="ignore_index=3, and the model 0"):
            segmentor(ignore_index=0, loss={"type": "PixelCrossEntropy", "ignore_index": 3})


class TestMeanIoU:
    def test_the_data_sets_label_to_ignore(self):
        pytest.importorskip("torchmetrics")
        metric = METRICS.build({"type": "MeanIoU"})
        metric.dataset_meta = {"classes": "abc", "ignore_index": 0}
        labels, predicted = torch.tensor([[0, 0, 1, 2]]), torch.tensor([[1, 0, 1, 0]])
        metric.process((None, labels[None]), [{"labels": predicted}])
        found = metric.evaluate(1)
        assert [round(v) for v in found.values()] == [50, 50, 50]

    def evaluate(self, pairs, classes, **options):
        metric = METRICS.build({"type": "MeanIoU", **options})
        metric.dataset_meta = {"classes": [f"class {i}" for i in range(classes)]}
        for labels, predicted in pairs:
            metric.process((None, labels[None]), [{"labels": predicted}])
        return metric.evaluate(len(pairs))

    def test_against_the_formula(self, capsys):
        pytest.importorskip("torchmetrics")
        generator = np.random.default_rng(0)
        pairs = []
        for _ in range(3):
            labels = generator.integers(4, size=(20, 30)).astype(np.uint8)
            predicted = np.where(generator.random(labels.shape) < 0.6, labels, 2)
            predicted[:4] = 4  # This class is in no label.
            labels[-3:] = 255
            pairs.append((torch.from_numpy(labels), torch.from_numpy(predicted.astype(np.int64))))
        # The last of six classes is in no label and no prediction.
        found = self.evaluate(pairs, 6, table=True)
        labels, predicted = (np.stack([p[i].numpy() for p in pairs]) for i in (0, 1))
        known = labels != 255
        labels, predicted = labels[known], predicted[known]
        iou = [
            ((labels == c) & (predicted == c)).sum() / ((labels == c) | (predicted == c)).sum()
            for c in range(5)
        ]
        accuracy = [np.mean(predicted[labels == c] == c) for c in range(4)]
        assert found["segmentation/mIoU"] == pytest.approx(100 * np.mean(iou))
        assert found["segmentation/mAcc"] == pytest.approx(100 * np.mean(accuracy))
        assert found["segmentation/aAcc"] == pytest.approx(100 * np.mean(labels == predicted))
        table = capsys.readouterr().out
        assert re.search(r"class 4 *. *0\.00 *. *absent", table)
        assert re.search(r"class 5 *. *absent *. *absent", table)

    def test_against_mmsegmentation(self):
        pytest.importorskip("mmseg", reason="mmsegmentation is not installed")
        from mmseg.evaluation import IoUMetric

        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(5, (2, 20, 30), generator=generator, dtype=torch.uint8)
        predicted = torch.randint(6, (2, 20, 30), generator=generator)
        labels[:, :3] = 255
        found = self.evaluate(list(zip(labels, predicted, strict=True)), 7)
        areas = [
            IoUMetric.intersect_and_union(p, y.long(), 7, 255)
            for p, y in zip(predicted, labels, strict=True)
        ]
        wanted = IoUMetric.total_area_to_metrics(
            *(sum(a[i] for a in areas) for i in range(4)), metrics=["mIoU"]
        )
        assert found["segmentation/mIoU"] == pytest.approx(100 * np.nanmean(wanted["IoU"]))
        assert found["segmentation/mAcc"] == pytest.approx(100 * np.nanmean(wanted["Acc"]))
        assert found["segmentation/aAcc"] == pytest.approx(100 * wanted["aAcc"].item())


def authors(manifest: dict, head: tuple[str, ...], norms: str, model: SemanticSegmentor) -> dict:
    """A segmentation checkpoint as the authors' code saves it.

    It has their backbone's names without its head, norms on the outputs, and mmsegmentation's
    names for the rest.
    """
    own = {name: torch.from_numpy(value) for name, value in fill.state_dict(manifest).items()}
    # No output depends on counters and buffers.
    own |= {name: torch.tensor(0) for name in manifest["not_filled"]}
    state = {f"backbone.{name}": value for name, value in own.items() if not name.startswith(head)}
    for name, value in model.state_dict().items():
        if name.startswith("backbone.norms."):
            _, _, index, kind = name.split(".")
            state[norms.format(index) + kind] = torch.rand_like(value)
        elif not name.startswith("backbone."):
            state[name] = value.clone()
    return state


@pytest.mark.parametrize(
    ("name", "head", "norms", "eps"),
    [
        ("rala_vit_tiny", ("proj.", "norm.", "head."), "backbone.extra_norms.{}.norm.", 1e-6),
        ("agent_swin_tiny", ("norm.", "head."), "backbone.norm{}.", 1e-5),
        ("agent_pvt_tiny", ("norm.", "head.", "cls_token"), "", None),
    ],
)
def test_authors_checkpoints_load(tmp_path, name, head, norms, eps):
    options = {
        "backbone": {"model_name": name, "output_norm_eps": eps},
        "neck": {"type": "FPN", "out_channels": 16},
        "decode_head": {"type": "FPNHead", "channels": 16},
    }
    manifest = json.loads((REFERENCE / f"{name}.json").read_text())
    state = authors(manifest, head, norms, segmentor(**options))
    torch.save({"state_dict": state, "meta": {"epoch": 1}}, tmp_path / "authors.pth")
    model = segmentor(**options, checkpoint=tmp_path / "authors.pth").eval()
    own = model.state_dict()
    for i in range(4 if eps else 0):
        for kind in ("weight", "bias"):
            wanted = state[norms.format(i) + kind]
            assert own[f"backbone.norms.{i}.{kind}"].equal(wanted)
    # The reference has the maps before those norms.
    model.backbone.norms = torch.nn.ModuleList([torch.nn.Identity()] * 4)
    case = next(iter(manifest["cases"]))
    outputs = load_file(REFERENCE / f"{name}.safetensors")
    with torch.no_grad():
        maps = model.backbone(torch.from_numpy(fill.image(manifest, case)))
    for i, found in enumerate(maps):
        prefix = f"{case}.features.{i}"
        for kind, mean in (("channel", found.mean((2, 3))), ("spatial", found.mean(1))):
            wanted = outputs[f"{prefix}.{kind}_mean"].float()
            assert ((mean - wanted).norm() / wanted.norm()).item() < 1e-4
    # A neck of another width is refused, and so is another backbone.
    with pytest.raises(CheckpointError, match=r"authors\.pth.*neck\.lateral_convs\.0"):
        segmentor(
            **options | {"neck": {"type": "FPN", "out_channels": 8}},
            checkpoint=tmp_path / "authors.pth",
        )
    with pytest.raises(CheckpointError, match="not of rala_vit_nano"):
        segmentor(
            **options | {"backbone": {"model_name": "rala_vit_nano", "output_norm_eps": eps}},
            checkpoint=tmp_path / "authors.pth",
        )


def test_encoders_of_segmentation_models_pytorch():
    smp = pytest.importorskip("segmentation_models_pytorch", reason="it is not installed")
    tiny = {"embed_dim": 32, "num_heads": 2}
    images = torch.randn(1, 3, 96, 64)
    model = smp.DPT("tu-agent_deit_tiny", encoder_weights=None, classes=3, **tiny).eval()
    assert model(images).shape == (1, 3, 96, 64)
    model = smp.Unet("tu-rala_vit_nano", encoder_weights=None, classes=3).eval()
    assert model(images).shape == (1, 3, 96, 64)
