"""DINOv3: its files, and its body with rotary positions. tests/tools/test_onnx_weights.py has those
of transformers."""

import pytest
import timm
import torch

import linsight

from .conftest import lively

NANO = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}


def load(name, state, tmp_path):
    torch.save(state, tmp_path / "dinov3.pth")
    overlay = {"file": str(tmp_path / "dinov3.pth")}
    model = timm.create_model(
        name, img_size=64, pretrained=True, pretrained_cfg_overlay=overlay, **NANO
    )
    return model.eval()


def check(model, features):
    """The model's tokens at a size that is not its own are those of a function of images."""
    x = torch.randn(1, 3, 48, 80)
    with torch.inference_mode():
        torch.testing.assert_close(model.forward_features(x), features(x), rtol=1e-4, atol=1e-5)


# The authors' names of what timm's Eva calls otherwise.
AUTHORS = {
    "reg_token": "storage_tokens",
    "gamma_1": "ls1.gamma",
    "gamma_2": "ls2.gamma",
    "fc1_g": "w1",
    "fc1_x": "w2",
}


@pytest.mark.parametrize("size", ["small", "small_plus"])
def test_the_authors_own_file(size, tmp_path):
    """Its biases of keys are masked, and it has constants and what pretraining alone reads."""
    theirs = lively(timm.create_model(f"vit_{size}_patch16_dinov3_qkvb", **NANO))
    state = {}
    for name, value in theirs.state_dict().items():
        for timms, authors in AUTHORS.items():
            name = name.replace(timms, authors)
        state[name.replace("fc2", "w3") if "plus" in size else name] = value
    for i in range(2):
        attn = f"blocks.{i}.attn"
        query, value = state.pop(f"{attn}.q_bias"), state.pop(f"{attn}.v_bias")
        state[f"{attn}.qkv.bias"] = torch.cat((query, torch.full((32,), torch.nan), value))
        state[f"{attn}.qkv.bias_mask"] = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(32)
    state["mask_token"] = torch.zeros(1, 32)
    state["rope_embed.periods"] = torch.ones(4, dtype=torch.bfloat16)
    check(load(f"softmax_dinov3_{size}", state, tmp_path), theirs.forward_features)


def test_another_models_file_is_refused_in_one_line(tmp_path):
    for other, message in (
        ("softmax_dinov2_small", "unexpected .pos_embed"),
        ("vit_small_plus_patch16_dinov3", "mlp.fc1"),
        ("vit_small_patch14_dinov2", "unexpected .pos_embed"),
    ):
        state = timm.create_model(other, **NANO).state_dict()
        with pytest.raises(ValueError, match=f"not of softmax_dinov3_small.*{message}"):
            load("softmax_dinov3_small", state, tmp_path)
    state = timm.create_model("vit_small_patch16_dinov3", **NANO | {"embed_dim": 34}).state_dict()
    with pytest.raises(ValueError, match=r"cls_token is \(1, 1, 34\), the model's \(1, 1, 32\)"):
        load("softmax_dinov3_small", state, tmp_path)


def test_a_body_without_prefix_tokens():
    """Mixers that would rotate features by themselves leave it to the body; maps suffice others."""
    bare = {"class_token": False, "reg_tokens": 0}
    x = torch.randn(1, 3, 64, 48)
    for mixer in ("mala", "gated_softmax", "window", "large_kernel"):
        model = lively(timm.create_model("softmax_dinov3_small", mixer=mixer, **NANO, **bare))
        assert not getattr(getattr(model.blocks[0].mixer, "attention", None), "rotary", False)
        assert model(x).shape == (1, 32)
    unused = timm.create_model("softmax_dinov3_small", **NANO | bare | {"class_token": "unused"})
    unused(x).sum().backward()
    assert all(p.grad is not None for p in unused.parameters())


def test_impossible_positions_are_refused():
    with pytest.raises(ValueError, match="rotary positions need heads of a multiple of 4"):
        timm.create_model("softmax_dinov3_small", **NANO | {"embed_dim": 36})
    with pytest.raises(ValueError, match="rotary_temperature is 0, expected a positive number"):
        timm.create_model("softmax_dinov3_small", rotary_temperature=0, **NANO)


def test_a_student_starts_with_its_teachers_projections_and_runs_at_any_size():
    teacher = lively(timm.create_model("vit_small_patch16_dinov3", img_size=64, **NANO))
    student = linsight.linearise(teacher, "hedgehog", blocks=[1])
    ours = linsight.linearise(teacher, "softmax")
    for part in ("in_proj.weight", "out_proj.bias"):
        name = f"blocks.1.mixer.{part}"
        assert torch.equal(student.state_dict()[name], ours.state_dict()[name])
    check(ours, teacher.forward_features)
    assert student(torch.randn(2, 3, 33, 100)).shape == (2, 32)
