"""Agent attention's tables at any size, and with more or fewer agents than in pretraining."""

import pytest
import timm
import torch
import torch.nn.functional as F

from linsight.backbones.context import Context, Place
from linsight.backbones.mixers import build_mixer
from linsight.backbones.mixers.agent import pack_tables


def resized(x, size):
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def make(prefix_tokens=0, **options):
    torch.manual_seed(0)
    place = Place(dim=16, num_heads=2, size=(6, 4), prefix_tokens=prefix_tokens)
    mixer = build_mixer("agent", place, {"agent": options}).double()
    with torch.no_grad():
        for name, table in mixer.named_parameters():
            if name.endswith("_bias"):
                table.normal_()
    return mixer


@pytest.mark.parametrize("size", [(6, 4), (9, 11), (3, 2)])
@pytest.mark.parametrize("grid", [None, (4, 5)])
def test_biases_are_the_authors(size, grid):
    """The biases follow the authors' order.

    Rows and columns are summed at the learned size, the sums are resized as maps, and then the
    agents' axis is resized as a map.
    """
    mixer = make(agents=9, agent_grid=grid and (grid,))
    attention = mixer.attention
    got = attention.biases(size)
    for i in range(2):
        whole = resized(attention.map_bias[i].unflatten(-1, (7, 7)), size)
        cross = attention.row_bias[i][..., :, None] + attention.column_bias[i][..., None, :]
        bias = whole + resized(cross, size)
        if grid is not None:
            bias = bias.flatten(-2).transpose(1, 2).unflatten(-1, (3, 3))
            bias = resized(bias, grid).flatten(-2).transpose(1, 2)
        torch.testing.assert_close(got[i], bias.flatten(2) if grid is None else bias)


def test_class_tokens_have_their_own():
    attention = make(prefix_tokens=2, agents=4).attention
    bias = attention.biases((5, 5))
    assert bias.shape == (2, 2, 4, 27)
    assert torch.equal(bias[..., :2], attention.prefix_bias)


def test_more_agents_downstream():
    mixer = make(agents=9, agent_grid=5)
    x = torch.randn(2, 24, 16, dtype=torch.float64, requires_grad=True)
    y = mixer(x, Context((6, 4)))
    y.square().sum().backward()
    assert y.shape == x.shape
    assert all(p.grad is not None for p in mixer.parameters())


def test_the_authors_tables_are_packed():
    mixer = make(prefix_tokens=1, agents=4)
    ours = mixer.attention
    theirs = {
        "an_bias": ours.map_bias[0].unflatten(-1, (7, 7)),
        "na_bias": ours.map_bias[1].unflatten(-1, (7, 7)),
        "ah_bias": ours.row_bias[0][None, ..., None],
        "ha_bias": ours.row_bias[1].transpose(1, 2)[None, :, :, None],
        "aw_bias": ours.column_bias[0][None, :, :, None],
        "wa_bias": ours.column_bias[1].transpose(1, 2)[None, :, None],
        "ac_bias": ours.prefix_bias[0][None],
        "ca_bias": ours.prefix_bias[1].transpose(1, 2)[None],
        "proj.weight": mixer.out_proj.weight,
    }
    assert theirs["ha_bias"].shape == (1, 2, 6, 1, 4)
    assert theirs["wa_bias"].shape == (1, 2, 1, 4, 4)
    packed = pack_tables(theirs)
    assert packed.keys() == {
        "attention.map_bias",
        "attention.row_bias",
        "attention.column_bias",
        "attention.prefix_bias",
        "proj.weight",
    }
    for name in ("map_bias", "row_bias", "column_bias", "prefix_bias"):
        assert torch.equal(packed[f"attention.{name}"], getattr(ours, name))


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="agents is 48, expected a square"):
        make(agents=48)
    with pytest.raises(ValueError, match="local_kernel is 0"):
        make(local_kernel=0)


@pytest.mark.parametrize("name", ["rala_vit_nano", "soft_vit_nano", "softmax_pvt_tiny"])
def test_tables_of_another_size_are_interpolated_in_every_skeleton(name, tmp_path):
    timm_file = tmp_path / "weights.pth"
    small = timm.create_model(name, mixer="agent", img_size=64)
    torch.save(small.state_dict(), timm_file)
    overlay = {"file": str(timm_file), "num_classes": 1000}
    large = timm.create_model(
        name, mixer="agent", img_size=96, pretrained=True, pretrained_cfg_overlay=overlay
    )
    tables = {key for key in small.state_dict() if key.endswith("row_bias")}
    assert tables
    assert any(small.state_dict()[key].shape != large.state_dict()[key].shape for key in tables)
    with torch.inference_mode():
        assert large.eval()(torch.randn(1, 3, 96, 96)).isfinite().all()
