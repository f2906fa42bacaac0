"""The figures of each class: what is counted, and that a test writes them."""

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from sklearn.metrics import confusion_matrix, precision_score, recall_score

from linsight.heads.class_report import ClassReportHook
from linsight.heads.classification_metric import Accuracy


@pytest.mark.parametrize("most_classes", [100, 2])
def test_figures_are_sklearns(tmp_path: Path, most_classes: int) -> None:
    torch.manual_seed(0)
    scores, labels = torch.rand(40, 4), torch.randint(3, (40,))
    evaluator = Evaluator(Accuracy(topk=(1, 2)))
    dataset = SimpleNamespace(metainfo={"classes": ["a", "b", "c", "d"]})
    evaluator.dataset_meta = dataset.metainfo
    evaluator.process([{"scores": row} for row in scores], (torch.empty(40), labels))
    metrics = evaluator.evaluate(40)
    guesses = scores.argmax(1)
    assert metrics["accuracy/top1"] == pytest.approx(100 * (guesses == labels).double().mean())
    runner = SimpleNamespace(
        test_evaluator=evaluator,
        test_dataloader=SimpleNamespace(dataset=dataset),
        work_dir=tmp_path,
        logger=MMLogger.get_current_instance(),
    )
    ClassReportHook(most_classes).after_test_epoch(runner, metrics)
    rows = list(csv.DictReader((tmp_path / "class_report.csv").open()))
    expected = [
        f(labels, guesses, labels=range(4), average=None, zero_division=0) * 100
        for f in (recall_score, precision_score)
    ]
    matrix = confusion_matrix(labels, guesses, labels=range(4))
    for i, row in enumerate(rows):
        assert row["class"] == "abcd"[i]
        assert int(row["images"]) == matrix[i].sum()
        assert float(row["precision"]) == pytest.approx(expected[1][i], abs=0.01)
        if i < 3:
            assert float(row["accuracy"]) == pytest.approx(expected[0][i], abs=0.01)
            matrix[i, i] = -1
            assert row["mistaken_for"] == "abcd"[matrix[i].argmax()]
    # No image is of the last class.
    assert rows[3]["accuracy"] == rows[3]["mistaken_for"] == ""
    assert (tmp_path / "confusion_matrix.png").exists() == (most_classes == 100)
