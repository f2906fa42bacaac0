"""A classifier that learns from a teacher as well, in DeiT's soft and hard forms."""

import pytest
import torch
import torch.nn.functional as F

from linsight.heads.classification import ImageClassifier

NANO = {"img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2}
TEACHER = {"model_name": "softmax_deit_tiny", "num_classes": 5, **NANO}


def classifier(name="softmax_deit_tiny", **distillation):
    torch.manual_seed(0)
    distillation = {"teacher": TEACHER, **distillation}
    return ImageClassifier({"model_name": name, **NANO}, 5, distillation=distillation)


@pytest.mark.parametrize("name", ["softmax_deit_tiny", "softmax_deit_tiny_distilled"])
@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_the_loss(name, kind):
    model = classifier(name, kind=kind, weight=0.25, temperature=3.0)
    x, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 4])
    logits = model.backbone(x)
    first, second = logits if isinstance(logits, tuple) else (logits, logits)
    assert isinstance(logits, tuple) == name.endswith("distilled")
    wanted = model.distillation.teacher(x)
    if kind == "hard":
        taught = F.cross_entropy(second, wanted.argmax(1))
    else:
        p, q = (wanted / 3).softmax(1), (second / 3).softmax(1)
        taught = 9 * (p * (p / q).log()).sum(1).mean()
    expected = 0.75 * F.cross_entropy(first, labels) + 0.25 * taught
    loss = model(x, labels, mode="loss")["loss"]
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is None for p in model.distillation.teacher.parameters())
    assert not any("teacher" in key for key in model.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "warm"}, "distillation.kind is 'warm', expected 'soft' or 'hard'"),
        ({"weight": 2}, "distillation.weight is 2, expected 0 to 1"),
        ({"temperature": 0}, "distillation.temperature is 0, expected above 0"),
        ({"teacher": TEACHER | {"num_classes": 7}}, "the teacher has 7 classes and the model 5"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        classifier(**options)


def test_a_teacher_is_missing_or_pools_nothing():
    with pytest.raises(ValueError, match="has no teacher: give one by --teacher MODEL"):
        ImageClassifier({"model_name": "softmax_deit_tiny", **NANO}, 5, distillation={"weight": 1})
    model = classifier(teacher=TEACHER | {"global_pool": ""})
    with pytest.raises(ValueError, match=r"the teacher's logits have shape \(2, 5, 5\), and"):
        model(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]), mode="loss")
