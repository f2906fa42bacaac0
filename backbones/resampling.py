"""Interpolation as a product with a matrix, which every runtime of exported graphs computes."""

import torch
from torch import Tensor

# Half the width of each kernel, in samples.
_SUPPORT = {"linear": 1, "bicubic": 2}


def resampling(
    length: int, target: int, mode: str, antialias: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Weights (target, length) by which `F.interpolate` makes `target` values of `length`.

    `F.interpolate` itself becomes an operator that runtimes lack (TensorRT and CoreML have no
    bicubic one) or compute differently (OpenVINO that with antialiasing).

    Args:
        length: how many values there are, a plain number.
        target: how many there shall be; in an exported graph it may depend on the images' size.
        mode: "linear" or "bicubic", in one dimension.
        antialias: as in `F.interpolate`.
        dtype: of the weights.
        device: of the weights.
    """
    support = _SUPPORT[mode]
    scale = length / torch.full((1,), target, dtype=dtype, device=device)
    centre = (torch.arange(target, device=device).to(dtype)[:, None] + 0.5) * scale - 0.5
    if antialias:
        place = torch.arange(length, device=device).to(dtype)
        weights = _kernel((place - centre) / scale.clamp(min=1), mode, -0.5)
        return weights / weights.sum(1, keepdim=True)
    # Values beyond the ends are those at the ends.
    place = torch.arange(-support, length + support, device=device)
    ends = place.clamp(0, length - 1)[:, None] == torch.arange(length, device=device)
    return _kernel(place.to(dtype) - centre, mode, -0.75) @ ends.to(dtype)


def _kernel(x: Tensor, mode: str, slope: float) -> Tensor:
    """The share of a sample at a distance; `slope` is that of the cubic kernel at 1."""
    x = x.abs()
    if mode == "linear":
        return (1 - x).clamp(min=0)
    x = x.clamp(max=2)  # where it has fallen to zero
    near = ((slope + 2) * x - (slope + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * slope
    return torch.where(x < 1, near, far)
