"""The classifier, its metric and its optimiser groups."""

import math

import mmengine
import numpy as np
import pytest
import timm
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

from linsight.backbones.checkpoint import CheckpointError
from linsight.data.loading import DataError
from linsight.heads.backbone import create_backbone
from linsight.heads.classification import ImageClassifier
from linsight.heads.classification_metric import Accuracy


def classifier(**kwargs) -> ImageClassifier:
    kwargs = {"backbone": {"model_name": "test_vit"}, "num_classes": 7, **kwargs}
    return ImageClassifier(**kwargs)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(4, 3, 160, 160, generator=generator),
        torch.randint(7, (4,), generator=generator),
    )


class TestImageClassifier:
    def test_modes(self, batch):
        model = classifier().eval()
        logits = model(*batch)
        assert logits.shape == (4, 7)
        scores = torch.stack([output["scores"] for output in model(*batch, mode="predict")])
        torch.testing.assert_close(scores, logits.softmax(1))
        loss = model(*batch, mode="loss")["loss"]
        torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, batch[1]))
        with pytest.raises(ValueError, match="'los'"):
            model(*batch, mode="los")

    def test_loss_is_chosen_as_timms_script_does(self, batch):
        smoothed = classifier(label_smoothing=0.1).eval()
        expected = timm.loss.LabelSmoothingCrossEntropy(0.1)(smoothed(batch[0]), batch[1])
        torch.testing.assert_close(smoothed(*batch, mode="loss")["loss"], expected)
        mixed = classifier(mixup={"mixup_alpha": 0.8})
        assert isinstance(mixed.loss, timm.loss.SoftTargetCrossEntropy)
        named = classifier(loss={"type": "BinaryCrossEntropy", "smoothing": 0.1})
        assert isinstance(named.loss, timm.loss.BinaryCrossEntropy)

    def test_smoothing_reaches_a_loss_of_ones_own(self):
        smoothed = classifier(loss={"type": "BinaryCrossEntropy"}, label_smoothing=0.2)
        assert smoothed.loss.smoothing == 0.2
        for loss in (
            {"type": "BinaryCrossEntropy", "smoothing": 0.1},
            {"type": "SoftTargetCrossEntropy"},
        ):
            with pytest.raises(ValueError, match=r"leave out model\.label_smoothing"):
                classifier(loss=loss, label_smoothing=0.2)

    def test_mixup_is_timms(self, batch):
        settings = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}
        model = classifier(mixup=settings, label_smoothing=0.1).eval()
        np.random.seed(3)  # noqa: NPY002
        loss = model(batch[0].clone(), batch[1], mode="loss")["loss"]
        np.random.seed(3)  # noqa: NPY002
        mixup = timm.data.Mixup(**settings, label_smoothing=0.1, num_classes=7)
        images, targets = mixup(batch[0].clone(), batch[1])
        expected = -(targets * model(images).log_softmax(1)).sum(1).mean()
        torch.testing.assert_close(loss, expected)

    @pytest.mark.parametrize("label", [-1, 7])
    def test_a_label_of_no_class(self, batch, label):
        """A streamed data set, which does not know the classes, may give such a label."""
        images, labels = batch
        labels[2] = label
        preprocess = classifier().data_preprocessor
        for data in ([images, labels], {"inputs": images, "labels": labels}):
            with pytest.raises(DataError, match=rf"label {label}, .* 7 classes: labels are 0 to 6"):
                preprocess(data, True)
        labels[2] = 6
        assert torch.equal(preprocess([images, labels])[1], labels)

    def test_mixup_of_an_odd_batch_says_what_to_set(self, batch):
        model = classifier(mixup={"mixup_alpha": 0.8})
        with pytest.raises(ValueError, match="drop_last"):
            model(batch[0][:3], batch[1][:3], mode="loss")

    def test_unknown_model_and_argument_have_the_nearest_names(self):
        with pytest.raises(ValueError, match="rala_vit_tiny"):
            classifier(backbone={"model_name": "rala_vit_tniy"})
        with pytest.raises(ValueError, match=r"'drop_pth_rate'.*drop_path_rate"):
            classifier(backbone={"model_name": "test_vit", "drop_pth_rate": 0.1})

    def test_weights_out_of_reach_say_where_they_are(self, monkeypatch):
        def unreachable(*args, **kwargs):
            raise OSError("no route to host")

        monkeypatch.setattr("timm.create_model", unreachable)
        monkeypatch.setattr("linsight.heads.published.answers", lambda address: True)
        where = r"no route to host.*https://huggingface.co/aldjalkdf/RAVLT.*backbone.checkpoint"
        with pytest.raises(CheckpointError, match=where):
            create_backbone("rala_vit_tiny", pretrained=True)

    def test_mmengine_does_not_initialise_it_again(self):
        model = classifier()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        model.init_weights()
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class TestAccuracy:
    def test_against_the_formula(self):
        generator = torch.Generator().manual_seed(0)
        scores = torch.randn(50, 9, generator=generator)
        labels = torch.randint(9, (50,), generator=generator)
        metric = Accuracy()
        for part in (slice(0, 20), slice(20, 50)):
            metric.process((None, labels[part]), [{"scores": s} for s in scores[part]])
        result = metric.evaluate(50)
        rank = (scores > scores.gather(1, labels[:, None])).sum(1)
        assert result["accuracy/top1"] == pytest.approx(100 * (rank < 1).float().mean().item())
        assert result["accuracy/top5"] == pytest.approx(100 * (rank < 5).float().mean().item())

    def test_top5_needs_more_than_five_classes(self):
        metric = Accuracy()
        metric.process((None, torch.zeros(2, dtype=torch.long)), [{"scores": torch.eye(5)[0]}] * 2)
        assert metric.evaluate(2) == {"accuracy/top1": 100.0}


class TestOptimizer:
    def build(self, model, **optimizer):
        cfg = {
            "type": "OptimWrapper",
            "constructor": "TimmOptimWrapperConstructor",
            "optimizer": {"opt": "adamw", "lr": 1e-3, "weight_decay": 0.05, **optimizer},
        }
        return build_optim_wrapper(model, mmengine.ConfigDict(cfg)).optimizer

    def names(self, model, groups):
        by_id = {id(p): n for n, p in model.named_parameters()}
        return {by_id[id(p)] for group in groups for p in group["params"]}

    def test_no_weight_decay(self):
        model = classifier()
        optimizer = self.build(model)
        free = self.names(model, [g for g in optimizer.param_groups if g["weight_decay"] == 0])
        listed = model.backbone.no_weight_decay()
        assert listed
        expected = {
            name
            for name, p in model.named_parameters()
            if p.ndim <= 1 or name.endswith(".bias") or name.removeprefix("backbone.") in listed
        }
        assert free == expected
        decaying = self.names(model, [g for g in optimizer.param_groups if g["weight_decay"]])
        assert decaying == set(dict(model.named_parameters())) - expected

    def test_layer_scale_of_the_paper_decays(self):
        model = classifier(backbone={"model_name": "rala_vit_nano"})
        optimizer = self.build(model)
        decaying = self.names(model, [g for g in optimizer.param_groups if g["weight_decay"]])
        ranks = {name: p.ndim for name, p in model.named_parameters()}
        assert decaying == {
            n for n, ndim in ranks.items() if ndim > 1 and not n.endswith(".bias")
        } - {f"backbone.{n}" for n in model.backbone.no_weight_decay()}

    def test_layer_decay(self):
        model = classifier()
        optimizer = self.build(model, layer_decay=0.5)
        rates = {
            name: group["lr"]
            for group in optimizer.param_groups
            for name in self.names(model, [group])
        }
        assert rates["backbone.head.weight"] == pytest.approx(1e-3)
        depths = len(model.backbone.blocks)
        for block in range(depths):
            rate = rates[f"backbone.blocks.{block}.attn.qkv.weight"]
            assert rate == pytest.approx(1e-3 * 0.5 ** (depths - block))
        assert min(rates.values()) == rates["backbone.patch_embed.proj.weight"]

    def test_mmengines_own_still_work(self):
        cfg = mmengine.ConfigDict(
            type="OptimWrapper",
            optimizer={"type": "SGD", "lr": 0.1, "weight_decay": 0.1},
            paramwise_cfg={"norm_decay_mult": 0.0},
        )
        assert isinstance(build_optim_wrapper(classifier(), cfg).optimizer, torch.optim.SGD)

    def test_paramwise_cfg_is_refused(self):
        cfg = mmengine.ConfigDict(
            constructor="TimmOptimWrapperConstructor",
            optimizer={"opt": "adamw"},
            paramwise_cfg={},
        )
        with pytest.raises(ValueError, match="layer_decay"):
            build_optim_wrapper(classifier(), cfg)


def test_schedule_moves_in_each_iteration_from_1e_6_over_1e_3_to_1e_5():
    from mmengine.optim import OptimWrapper
    from mmengine.registry import PARAM_SCHEDULERS

    from linsight.tools.config import load_config

    cfg = load_config("rala_vit_tiny_300e_in1k")
    lr = cfg.optim_wrapper.optimizer.lr
    assert lr == 5e-4 * cfg.auto_scale_lr.base_batch_size / 512
    length = 4
    wrapper = OptimWrapper(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr))
    schedulers = []
    for scheduler in cfg.param_scheduler:
        scheduler = {**scheduler, "epoch_length": length, "optimizer": wrapper}
        built = PARAM_SCHEDULERS.get(scheduler.pop("type"))
        scheduler.pop("convert_to_iter_based")
        schedulers.append(built.build_iter_from_epoch(**scheduler))
    rates = []
    for _ in range(300 * length):
        rates.append(wrapper.get_lr()["lr"][0])
        for scheduler in schedulers:
            scheduler.step()
    assert rates[0] == pytest.approx(1e-6)
    warm = 5 * length
    for step in range(warm):
        assert rates[step] == pytest.approx(1e-6 + (lr - 1e-6) * step / (warm - 1), rel=1e-3)
    for step in (warm, warm + 7, 700, 1100):
        share = (step - warm) / (295 * length)
        cosine = 1e-5 + (lr - 1e-5) * (1 + math.cos(math.pi * share)) / 2
        assert rates[step] == pytest.approx(cosine, rel=2e-2)
    assert wrapper.get_lr()["lr"][0] == pytest.approx(1e-5, rel=1e-2)


def test_images_are_erased_after_they_were_mixed():
    """A box of zeros shows the order: Mixup of erased images would leave half of the other one."""
    classifier = ImageClassifier(
        {"model_name": "rala_vit_nano"},
        num_classes=2,
        mixup={"mixup_alpha": 1.0, "cutmix_alpha": 0.0, "prob": 1.0},
        erasing={"probability": 1.0, "mode": "const"},
    )
    seen = []
    classifier.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    inputs = torch.rand(4, 3, 32, 32) + 1
    classifier(inputs, torch.tensor([0, 1, 0, 1]), mode="loss")
    erased = (seen[0] == 0).all(1)
    assert erased.any(2).any(1).all()
    assert ((seen[0] >= 1).all(1) | erased).all()
