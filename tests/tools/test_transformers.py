"""Exported folders in Hugging Face's transformers, after `import linsight`."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import linsight
from linsight.tools.export import write_safetensors

from ..backbones.conftest import lively

transformers = pytest.importorskip("transformers", minversion="5")

MODELS = {
    "rala_vit_nano": {"img_size": 64},
    "agent_deit_tiny": {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 96},
    "flatten_swin_tiny": {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2)},
}


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory):
    """A model of three classes, and the folder that it was exported to."""
    folder = tmp_path_factory.mktemp("exports") / request.param
    model = lively(timm.create_model(request.param, num_classes=3, **MODELS[request.param])).eval()
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": ["cat", "dog", "eel"]}
    write_safetensors(model, folder)
    return model, folder


def test_a_classifier(exported):
    model, folder = exported
    theirs = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    assert theirs.config.id2label == {0: "cat", 1: "dog", 2: "eel"}
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(theirs(images).logits, model(images))


def test_a_picture_through_a_pipeline(exported):
    _, folder = exported
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8))
    scores = linsight.load(folder).predict(picture).scores
    found = transformers.pipeline("image-classification", model=str(folder))(picture)
    assert [each["label"] for each in found] == [
        ("cat", "dog", "eel")[i] for i in scores.argsort()[::-1]
    ]
    np.testing.assert_allclose([each["score"] for each in found], sorted(scores)[::-1], rtol=1e-4)


def test_a_backbone(exported):
    model, folder = exported
    levels = (0, 1) if "deit" in folder.name else (1, 2, 3)
    place = f"local-dir:{folder}"
    theirs = transformers.TimmBackbone.from_pretrained(place, out_indices=levels).eval()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        maps = theirs(images).feature_maps
        wanted = model.forward_intermediates(images, list(levels), intermediates_only=True)
    assert theirs.channels == [x.shape[1] for x in wanted]
    for got, want in zip(maps, wanted, strict=True):
        assert torch.equal(got, want)
    # docs/export.md says so; once it takes folders, this is the better line.
    with pytest.raises(ValueError, match="Repo id must be in the form"):
        transformers.AutoBackbone.from_pretrained(str(folder))


def test_classes_are_stated_once(exported):
    """transformers passes their number by itself; a second one is a TypeError."""
    content = json.loads((exported[1] / "config.json").read_text())
    assert content["num_classes"] == 3
    assert "num_classes" not in content["model_args"]


def test_the_example_of_the_docs(exported, tmp_path, monkeypatch):
    if exported[1].name != "rala_vit_nano":
        pytest.skip("the example has four stages")
    (tmp_path / "exports").mkdir()
    (tmp_path / "exports" / "digits").symlink_to(exported[1])
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    (example,) = re.findall(r"```python\n(import linsight\nfrom tr.*?)```", text, re.DOTALL)
    scope = {}
    exec(example, scope)
    maps = scope["backbone"](torch.zeros(1, 3, 64, 64)).feature_maps
    assert [x.shape[2] for x in maps] == [8, 4, 2]
