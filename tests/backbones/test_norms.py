"""Norms that training moves from layer to batch normalisation, and the root-mean-square norm."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.utils.model import reparameterize_model

from linsight.backbones.norms import ChannelAffine, PRepBN, RepBN, RMSNorm, set_training_progress

CHANNELS = 6


def norm(kind):
    torch.manual_seed(0)
    made = kind(CHANNELS).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    made.running_mean.normal_()
    made.running_var.uniform_(0.5, 2)
    return made


def test_a_root_mean_square_norm_keeps_the_dtype_under_autocast():
    torch.manual_seed(0)
    made, x = RMSNorm(CHANNELS, eps=1e-3), torch.randn(2, 5, CHANNELS)
    torch.nn.init.normal_(made.weight)
    torch.testing.assert_close(made(x), F.rms_norm(x, (CHANNELS,), made.weight, 1e-3))
    with torch.autocast("cpu", torch.bfloat16):
        assert made(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("progress", [0.0, 0.25, 1.0])
def test_training_mixes_the_two_norms(progress):
    made = norm(PRepBN)
    set_training_progress(made, progress)
    x = 3 + 2 * torch.randn(2, 5, CHANNELS, dtype=torch.float64)
    layer = F.layer_norm(x, (CHANNELS,), made.layer_weight, made.layer_bias, 1e-6)
    rows = x.flatten(0, 1)
    mean, var = made.running_mean.clone(), made.running_var.clone()
    batch = F.batch_norm(rows, mean, var, made.batch_weight, made.batch_bias, True)
    batch = batch.view_as(x) + made.alpha * x
    torch.testing.assert_close(made(x), (1 - progress) * layer + progress * batch)
    torch.testing.assert_close((made.running_mean, made.running_var), (mean, var))


def test_evaluation_is_the_batch_norm_of_any_progress():
    made = norm(PRepBN).eval()
    x = torch.randn(2, 5, CHANNELS, dtype=torch.float64)
    root = (made.running_var + 1e-5).sqrt()
    wanted = (x - made.running_mean) / root * made.batch_weight + made.batch_bias + made.alpha * x
    for progress in (0.0, 0.5):
        set_training_progress(made, progress)
        torch.testing.assert_close(made(x), wanted)
    torch.testing.assert_close(made.fuse()(x), wanted)


def test_progress_is_a_fraction():
    with pytest.raises(ValueError, match=r"progress is 1\.5"):
        set_training_progress(norm(PRepBN), 1.5)


@pytest.mark.parametrize("kind", [RepBN, PRepBN])
@pytest.mark.parametrize("progressive", [True, False])
def test_either_norm_takes_either_kind_of_file(kind, progressive):
    """Which of the two kinds the authors' released files have is not known for all of them."""
    made = norm(PRepBN)
    prefix = "norm2." if progressive else ""
    file = {
        f"{prefix}alpha": made.alpha,
        f"{prefix}bn.weight": made.batch_weight,
        f"{prefix}bn.bias": made.batch_bias,
        f"{prefix}bn.running_mean": made.running_mean,
        f"{prefix}bn.running_var": made.running_var,
        f"{prefix}bn.num_batches_tracked": torch.tensor(7),
    }
    if progressive:
        file |= {"norm1.weight": made.layer_weight, "norm1.bias": made.layer_bias}
        file |= {name: torch.tensor(0) for name in ("warm", "iter", "total_step")}
    other = kind(CHANNELS).double()
    other.load_state_dict(other.convert_checkpoint(file))
    x = torch.randn(2, 5, CHANNELS, dtype=torch.float64)
    torch.testing.assert_close(other.eval()(x), made.eval()(x))
    if kind is PRepBN:
        assert other.progress == 1


@pytest.mark.parametrize("name", ["slab_deit_tiny", "slab_pvt_tiny", "slab_swin_tiny"])
def test_all_norms_but_the_last_are_merged(name):
    model = reparameterize_model(timm.create_model(name).eval())
    left = [n for n, part in model.named_modules() if isinstance(part, (RepBN, ChannelAffine))]
    assert left == ([] if "pvt" in name else ["norm"])
