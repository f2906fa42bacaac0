"""Losses from a config: lists where they take tensors."""

import pytest
import torch
import torch.nn.functional as F

import linsight.heads  # noqa: F401  registers the losses
from linsight.heads.losses import build_loss

LOGITS, LABELS = torch.tensor([[1.0, 0, 2], [0, 1, 0]]), torch.tensor([0, 2])
WEIGHT = [1.0, 2.0, 5.0]


@pytest.mark.parametrize("kind", ["CrossEntropyLoss", "torch.nn.CrossEntropyLoss"])
def test_weights_of_classes(kind):
    loss = build_loss({"type": kind, "weight": WEIGHT}, 3)
    wanted = F.cross_entropy(LOGITS, LABELS, torch.tensor(WEIGHT))
    torch.testing.assert_close(loss(LOGITS, LABELS), wanted)
    # A checkpoint of a training without them fits as well.
    assert loss.state_dict() == {}


def test_weights_of_positive_examples():
    loss = build_loss({"type": "torch.nn.BCEWithLogitsLoss", "pos_weight": WEIGHT}, 3)
    targets = F.one_hot(LABELS, 3).float()
    wanted = F.binary_cross_entropy_with_logits(LOGITS, targets, pos_weight=torch.tensor(WEIGHT))
    torch.testing.assert_close(loss(LOGITS, targets), wanted)


def test_a_list_of_another_length_is_named():
    with pytest.raises(ValueError, match="weight of 2 numbers, and there are 3 classes"):
        build_loss({"type": "CrossEntropyLoss", "weight": [1.0, 2.0]}, 3)
    with pytest.raises(ValueError, match="class_weight of 4 numbers, and there are 3 classes"):
        build_loss({"type": "PixelCrossEntropy", "class_weight": [1.0] * 4}, 3)


@pytest.mark.parametrize("value", [2.0, "balanced", {"cat": 2.0}, [], [1.0, -1.0, 1.0]])
def test_what_is_no_list_of_weights_is_named(value):
    with pytest.raises(ValueError, match=r"CrossEntropyLoss has weight = .*: give "):
        build_loss({"type": "CrossEntropyLoss", "weight": value}, 3)
