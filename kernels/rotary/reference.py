"""The reference of `apply_rotary`, in plain PyTorch."""

import torch
from torch import Tensor


def apply_rotary(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """The rotation, pair by pair; see the public function."""
    rows, columns = rotary
    height, width = rows.shape[1], columns.shape[1]
    rows = rows[:, :, None].expand(-1, -1, width, -1)
    columns = columns[:, None].expand(-1, height, -1, -1)
    # (2, N, 1, D / 2): one angle per token and channel pair, the same for every head.
    cosine, sine = torch.cat((rows, columns), dim=-1).flatten(1, 2)[:, :, None]
    pairs = x.to(rows.dtype).unflatten(-1, (-1, 2))
    if not torch.compiler.is_compiling():
        # One pass where real numbers take seven. Compilers and ONNX have no complex numbers.
        pairs = pairs.contiguous()
        if pairs.storage_offset() % 2:  # A complex number begins at an even place.
            pairs = pairs.clone()
        turned = torch.view_as_complex(pairs) * torch.complex(cosine, sine)
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)
    a, b = pairs.unbind(-1)
    turned = torch.stack((a * cosine - b * sine, b * cosine + a * sine), dim=-1)
    return turned.flatten(-2).to(x.dtype)
