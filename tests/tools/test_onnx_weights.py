"""Weights out of transformers' DINOv2, also in an ONNX file, and DINOv3, into models of this
library."""

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
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


def ours(file, name="softmax_dinov2_small"):
    return timm.create_model(
        name,
        img_size=56,
        embed_dim=24,
        depth=2,
        num_heads=2,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(file)},
    ).eval()


def check(theirs, file, *name, size=(56, 56)):
    x = torch.randn(2, 3, *size)
    with torch.inference_mode():
        wanted = theirs(x).last_hidden_state
        got = ours(file, *name).forward_features(x)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_transformers_own_file(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "encoder.layer.0.attention.attention.query.weight" in names
    check(theirs, tmp_path / "model.safetensors")


@pytest.mark.parametrize(("name", "act"), [("small", "gelu"), ("small_plus", "silu")])
def test_transformers_own_file_of_dinov3(name, act, tmp_path):
    torch.manual_seed(0)
    own = {"intermediate_size": 96, "num_register_tokens": 4, "hidden_act": act}
    config = transformers.DINOv3ViTConfig(use_gated_mlp="plus" in name, **own, **TINY)
    theirs = transformers.DINOv3ViTModel(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert "layer.0.attention.k_proj.weight" in state  # as in the files on the hub
    check(theirs, tmp_path / "model.safetensors", f"softmax_dinov3_{name}", size=(48, 80))
    save_file(theirs.state_dict(), tmp_path / "modules.safetensors")
    check(theirs, tmp_path / "modules.safetensors", f"softmax_dinov3_{name}", size=(48, 80))


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
    for content in (b"none", b""):
        (tmp_path / "none.onnx").write_bytes(content)
        done = CliRunner().invoke(app, [str(tmp_path / "none.onnx"), str(out)])
        assert done.exit_code == 1
        assert "is not an ONNX file" in done.output
