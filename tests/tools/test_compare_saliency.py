"""A student's tokens under the decoder of an ONNX file."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from linsight.tools.compare_saliency import app, open_decoder
from linsight.tools.linearise import write_safetensors

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


class Focus(nn.Module):
    """The tokens of a model, and a map that a linear layer makes of them."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(24, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.backbone.forward_features(x)
        return self.head(tokens[:, 1:]).sigmoid().view(1, 1, 2, 2)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The model, its ONNX file and the name of its tokens there."""
    torch.manual_seed(0)
    backbone = timm.create_model(
        "softmax_dinov2_small", img_size=28, embed_dim=24, depth=1, num_heads=2, num_classes=0
    )
    model, file = Focus(backbone).eval(), tmp_path_factory.mktemp("onnx") / "focus.onnx"
    torch.onnx.export(model, (torch.randn(1, 3, 28, 28),), file, dynamo=False, opset_version=17)
    # The map's first node cuts the tokens.
    graph = onnx.load(file).graph
    return model, file, next(n.input[0] for n in reversed(graph.node) if n.op_type == "Slice")


def test_the_map_follows_the_given_tokens(exported):
    model, file, name = exported
    decode, x = open_decoder(file, name), torch.randn(1, 3, 28, 28)
    with torch.inference_mode():
        tokens, wanted = model.backbone.forward_features(x), model(x)[0, 0].numpy()
        np.testing.assert_allclose(decode(x, None), wanted, atol=1e-5)
        np.testing.assert_allclose(decode(x, tokens), wanted, atol=1e-5)
        other = model.head(tokens[:, 1:] + 1).sigmoid().view(2, 2).numpy()
        np.testing.assert_allclose(decode(x, tokens + 1), other, atol=1e-5)
    with pytest.raises(ValueError, match="does not compute"):
        open_decoder(file, "none")


def test_the_command(exported, tmp_path):
    model, file, name = exported
    write_safetensors(model.backbone, tmp_path / "student")
    Image.new("RGB", (50, 40), (200, 30, 90)).save(tmp_path / "red.png")
    line = [file, tmp_path / "student", tmp_path / "red.png", tmp_path / "out.png"]
    done = CliRunner().invoke(app, [*map(str, line), "--size", "28", "--tokens", name])
    assert done.exit_code == 0, done.output
    assert "red.png: correlation 1.000, mean difference 0.000" in done.output
    with Image.open(tmp_path / "out.png") as drawn:
        assert drawn.width > 500
