"""Weights out of an ONNX file of transformers' DINOv2, and into a model of this library."""

import pytest
import timm
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from linsight.tools.onnx_weights import app

pytest.importorskip("onnx")
transformers = pytest.importorskip("transformers")
TINY = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    config = transformers.Dinov2Config(image_size=56, patch_size=14, **TINY)
    model = transformers.Dinov2Model(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def ours(file):
    return timm.create_model(
        "softmax_dinov2_small",
        img_size=56,
        embed_dim=24,
        depth=2,
        num_heads=2,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(file)},
    ).eval()


def check(theirs, file):
    x = torch.randn(2, 3, 56, 56)
    with torch.inference_mode():
        wanted = theirs(x).last_hidden_state
        torch.testing.assert_close(ours(file).forward_features(x), wanted, rtol=1e-4, atol=1e-4)


def test_transformers_own_file(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "encoder.layer.0.attention.attention.query.weight" in names
    check(theirs, tmp_path / "model.safetensors")


def test_an_onnx_file(theirs, tmp_path):
    file, out = tmp_path / "dinov2.onnx", tmp_path / "dinov2.safetensors"
    torch.onnx.export(theirs, (torch.randn(1, 3, 56, 56),), file, dynamo=False, opset_version=17)
    done = CliRunner().invoke(app, [str(file), str(out)])
    assert done.exit_code == 0, done.output
    assert "tensors" in done.output
    check(theirs, out)
    done = CliRunner().invoke(app, [str(tmp_path / "none.onnx"), str(out)])
    assert done.exit_code == 1
    assert done.output.startswith("error: ")
    assert load_file(out)
