"""Softmax-free attention through a Gaussian kernel and landmarks: SOFT and SOFT-Norm."""

import torch
import torch.nn.functional as F
from timm.layers import is_exporting
from timm.models import register_notrace_function
from torch import Tensor, nn

from ...kernels.depthwise_conv2d import depthwise_conv2d
from ...kernels.gaussian_attention import gaussian_attention
from ...kernels.landmark_kernel import landmark_kernel
from ...kernels.newton_inverse import InverseMethod, newton_inverse
from ..context import Context, Place
from .base import TokenMixer, register_mixer
from .projected import rename_entries

# SOFT's number of landmarks per side at the model's image size, unless a ratio is given.
LANDMARKS = 7


@register_notrace_function
def check_map(size: tuple[int, int], ratio: int) -> None:
    """Raise ValueError for a map that holds no landmark."""
    if min(size) < ratio:
        raise ValueError(
            f"a map of {size[0]} x {size[1]} holds no landmark of {ratio} x {ratio} pixels: "
            "use larger images, or a smaller landmark_ratio"
        )


def split_windows(x: Tensor, side: int) -> Tensor:
    """(B, H, W, heads, D) to windows (B, H // side, W // side, heads, side, side, D).

    Rows and columns that fill no window are left off.
    """
    # A slice would specialise the exported graph to multiples of the side.
    if is_exporting():
        return x.unfold(1, side, side).unfold(2, side, side).permute(0, 1, 2, 3, 5, 6, 4)
    height, width = (length // side for length in x.shape[1:3])
    x = x[:, : height * side, : width * side]
    x = x.unflatten(2, (width, side)).unflatten(1, (height, side))
    return x.permute(0, 1, 3, 5, 2, 4, 6)


class Landmarks(nn.Module):
    """A convolution of each head's queries whose windows do not overlap, scaled by D^-0.25.

    Args:
        width: channels D of a head.
        ratio: size and stride of the windows.
    """

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.ratio = ratio
        self.scale = width**-0.25
        self.weight = nn.Conv2d(width, width, ratio, ratio, bias=False).weight
        # The weight as a matrix of scaled rows, which `fuse()` computes once.
        self.register_buffer("fused_weight", None)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, ratio={self.ratio}"

    def matrix(self) -> Tensor:
        """The weight (D, ratio * ratio * D) by which a window is multiplied."""
        if self.fused_weight is not None:
            return self.fused_weight
        return self.weight.permute(0, 2, 3, 1).flatten(1) * self.scale

    def forward(self, query: Tensor) -> Tensor:
        """(B, H, W, heads, D) to (B, M, heads, D), M landmarks in row-major order."""
        windows = split_windows(query, self.ratio).flatten(4).flatten(1, 2)
        return F.linear(windows, self.matrix())

    def fuse(self) -> nn.Module:
        """This layer, with its matrix computed once."""
        self.fused_weight = self.matrix().detach()
        return self


class HeadConv2d(nn.Module):
    """A convolution of the values with one k x k filter per head, of a map (B, H, W, C).

    Args:
        num_heads: heads.
        width: channels per head.
        kernel_size: k, odd.
    """

    def __init__(self, num_heads: int, width: int, kernel_size: int) -> None:
        super().__init__()
        self.width = width
        conv = nn.Conv2d(num_heads, num_heads, kernel_size, groups=num_heads, bias=False)
        self.weight = conv.weight
        # The filters of all channels, which `fuse()` computes once.
        self.register_buffer("fused_weight", None)

    def extra_repr(self) -> str:
        heads, _, kernel, _ = self.weight.shape
        return f"{heads}, width={self.width}, kernel_size={kernel}"

    def filters(self) -> Tensor:
        """The filters (C, 1, k, k) of all channels."""
        if self.fused_weight is not None:
            return self.fused_weight
        return self.weight.repeat_interleave(self.width, 0)

    def forward(self, value: Tensor) -> Tensor:
        return depthwise_conv2d(value, self.filters())

    def fuse(self) -> nn.Module:
        """This layer, with its filters repeated once."""
        self.fused_weight = self.filters().detach()
        return self


AUTHORS_NAMES = {"Qlandmark_op.": "landmark.", "Qnorm_act.0.": "landmark_norm.", "conv.": "local."}


@register_mixer("softmax_free")
class SoftmaxFree(TokenMixer):
    """out_proj(K Inv(K_l) K^T v + conv(v)), K the Gaussian kernel of queries and landmarks.

    Keys equal queries (SOFT, arXiv:2110.11945, eq. 9; SOFT-Norm, arXiv:2207.03341). A landmark
    is a strided convolution of each head's queries, normalised, through a GELU; K_l is the
    landmarks' own kernel. The convolution of the values has one k x k filter per head.

    The map alone has landmarks. They approximate the kernel of any two tokens, so prefix tokens,
    which the papers do not have, are queries, keys and values as all others are.

    Args:
        place: where the mixer stands.
        landmark_ratio: side r, in tokens, of the window of a landmark; a map of H x W tokens has
            floor(H / r) * floor(W / r) landmarks. None for 7 landmarks per side at the model's
            image size.
        local_kernel: size k of the values' convolution, odd.
        inverse: 'regularized' (SOFT), 'normalized' (SOFT-Norm: the images of a batch depend on
            each other where the iteration does not converge) or 'unregularized' (SOFT before
            July 2022); see `linsight.kernels.newton_inverse`.
        iterations: the number of iterations of Newton's method.
    """

    def __init__(
        self,
        place: Place,
        *,
        landmark_ratio: int | None = None,
        local_kernel: int = 3,
        inverse: InverseMethod = "regularized",
        iterations: int = 20,
    ) -> None:
        super().__init__()
        self.prefix_tokens = place.prefix_tokens
        self.num_heads = place.num_heads
        self.width = place.dim // place.num_heads
        self.chosen_ratio = landmark_ratio
        self.ratio = landmark_ratio or ratio_of(place.size)
        self.inverse: InverseMethod = inverse
        self.iterations = iterations
        self.in_proj = nn.Linear(place.dim, 2 * place.dim)
        self.landmark = Landmarks(self.width, self.ratio)
        self.landmark_norm = nn.LayerNorm(self.width)
        self.landmark_act = nn.GELU()
        self.local = HeadConv2d(self.num_heads, self.width, local_kernel)
        self.out_proj = nn.Linear(place.dim, place.dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Mix the tokens (B, P + H * W, C) of a map.

        Raises:
            ValueError: if the map holds no landmark.
        """
        size = context.size
        check_map(size, self.ratio)
        projection = self.in_proj(x)
        query, value = projection.unflatten(-1, (2, self.num_heads, self.width)).unbind(2)
        query = context.rotate(query)
        marks = self.landmark(query[:, self.prefix_tokens :].unflatten(1, size))
        landmarks = self.landmark_act(self.landmark_norm(marks)).to(query.dtype)
        inverse = newton_inverse(
            landmark_kernel(landmarks), method=self.inverse, iterations=self.iterations
        )
        image = value.flatten(2)[:, self.prefix_tokens :].unflatten(1, size)
        local = self.local(image).flatten(1, 2)
        if self.prefix_tokens:
            local = F.pad(local, (0, 0, self.prefix_tokens, 0))
        local = local.reshape(value.shape)
        y = gaussian_attention(query, landmarks, value, inverse, local, scale=self.width**-0.25)
        return self.out_proj(y.flatten(2))

    def convert_checkpoint(self, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' entries: `mha.W_q` and `mha.W_v` joined, the rest renamed."""
        entries = dict(entries)
        for kind in ("weight", "bias"):
            if f"mha.W_q.{kind}" in entries:
                parts = (entries.pop(f"mha.W_q.{kind}"), entries.pop(f"mha.W_v.{kind}"))
                entries[f"in_proj.{kind}"] = torch.cat(parts)

        entries = {
            name.replace("mha.ff.", "proj.").removeprefix("mha.attn."): value
            for name, value in entries.items()
        }
        return rename_entries(entries, AUTHORS_NAMES)

    def resize_tables(self, size: tuple[int, int]) -> dict[str, Tensor]:
        """Nothing, but the windows of the landmarks must stay as they are.

        Raises:
            ValueError: if they depend on the image size, and this one gives others.
        """
        if not self.chosen_ratio and (ratio := ratio_of(size)) != self.ratio:
            raise ValueError(
                f"a landmark of softmax_free has learned a window of {self.ratio} tokens, and the "
                f"default for a map of {size[0]} x {size[1]} is {ratio}: build the model with "
                f'mixer_options={{"softmax_free": {{"landmark_ratio": {self.ratio}}}}}'
            )
        return {}


def ratio_of(size: tuple[int, int]) -> int:
    """Side of the window of a landmark, in tokens, where a map is to have 7 of them per side."""
    return max(1, min(size) // LANDMARKS)
