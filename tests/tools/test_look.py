"""`linsight look`: attention as the model computes it, and the drawing."""

from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from typer.testing import CliRunner

from linsight.tools.export import write_safetensors
from linsight.tools.look import attend_from, colour_features, locate_class
from linsight.tools.main import app

from ..backbones.conftest import lively


def test_softmax_attends_as_its_map_says() -> None:
    from timm.layers import set_fused_attn
    from timm.utils import AttentionExtract

    torch.manual_seed(0)
    x = torch.randn(1, 3, 64, 64)
    set_fused_attn(False)
    try:
        model = lively(timm.create_model("softmax_deit_tiny", img_size=64)).eval()
    finally:
        set_fused_attn(True)
    with torch.no_grad():
        maps = AttentionExtract(model, method="hook")(x)
    (found,) = attend_from(model, x, (0.3, 0.8))
    token = 1 + 3 * 4 + 1
    expected = maps["blocks.11.mixer.attention.attn_drop"][0, :, token, 1:].mean(0)
    torch.testing.assert_close(found.weights.flatten(), expected)


@pytest.mark.parametrize("name", ["rala_vit_nano", "agent_swin_tiny", "mala_vit_tiny"])
def test_a_value_counts_as_much_as_its_weight(name: str) -> None:
    """A value moved by one moves the result by the token's weight."""
    torch.manual_seed(0)
    model = lively(timm.create_model(name, depths=(1, 1, 1, 1))).eval()
    x = torch.randn(1, 3, 64, 64)
    third = next(a for a in attend_from(model, x, (0.5, 0.5)) if a.weights.shape == (4, 4))
    mixer = model.get_submodule(third.name).mixer
    results, moved = [], [False]

    def move(module, args, projection):
        if moved[0]:
            dim = mixer.out_proj.in_features
            projection = projection.clone()
            heads = slice(2 * dim, 3 * dim, mixer.attention.head_dim)
            projection[0, 5, heads] += 1
        return projection

    def keep(module, args, y):
        results.append(y[0, 10, :: mixer.attention.head_dim])

    handles = [
        mixer.in_proj.register_forward_hook(move),
        mixer.attention.register_forward_hook(keep),
    ]
    with torch.no_grad():
        for moved[0] in (False, True):
            model(x)
    for handle in handles:
        handle.remove()
    change = (results[1] - results[0]).mean()
    torch.testing.assert_close(third.weights.flatten()[5], change, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    "name", ["softmax_deit_tiny", "softmax_pvt_tiny", "van_b0", "rala_vit_nano"]
)
def test_a_class_is_located(name: str) -> None:
    torch.manual_seed(0)
    model = lively(timm.create_model(name))
    maps = [locate_class(model, torch.randn(1, 3, 64, 64), label) for label in range(5)]
    assert any(m.max() > 0 for m in maps)
    assert all(m.ndim == 2 and m.min() >= 0 for m in maps)


def test_colours_of_few_channels() -> None:
    assert colour_features(torch.randn(2, 5, 4)).shape == (5, 4, 3)


def test_look(tmp_path: Path) -> None:
    model = lively(timm.create_model("rala_vit_nano", num_classes=3))
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": ["cat", "dog", "owl"]}
    write_safetensors(model, tmp_path / "model")
    Image.new("RGB", (300, 200), "red").save(tmp_path / "ä b.png")
    words = ["look", str(tmp_path / "ä b.png"), "--model", str(tmp_path / "model")]
    drawing = tmp_path / "new" / "look.png"
    sized = [*words, "--image-size", "64", "--label", "dog", "--out", str(drawing)]
    run = CliRunner().invoke(app, sized)
    assert run.exit_code == 0, run.output
    assert Image.open(drawing).size[0] > 500
    for option, value, said in (
        ("--label", "dgo", "--label is 'dgo', expected the name of a class or a number below 3"),
        ("--point", "2,0", "--point is '2,0', expected two shares such as 0.5,0.25"),
    ):
        run = CliRunner().invoke(app, [*words, option, value])
        assert run.exit_code == 1
        assert said in " ".join(run.output.split())
