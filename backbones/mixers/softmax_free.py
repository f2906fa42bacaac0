"""Softmax-free attention through a Gaussian kernel and landmarks: SOFT and SOFT-Norm."""

import torch.nn.functional as F
from timm.layers import is_exporting
from timm.models import register_notrace_function, register_notrace_module
from torch import Tensor, nn

from ...kernels.depthwise_conv2d import depthwise_conv2d
from ...kernels.gaussian_attention import gaussian_attention
from ...kernels.landmark_kernel import landmark_kernel
from ...kernels.newton_inverse import InverseMethod, newton_inverse
from ...kernels.rotary import Rotary
from ..layers import Linear
from .place import Place

# Landmarks a side at a model's own size, unless a ratio is given: SOFT's number.
LANDMARKS = 7


@register_notrace_function
def check_map(size: tuple[int, int], ratio: int) -> None:
    """Raise ValueError for a map that holds no landmark."""
    if min(size) < ratio:
        raise ValueError(
            f"a map of {size[0]} x {size[1]} holds no landmark of {ratio} x {ratio} pixels: "
            "use larger images, or a smaller landmark_ratio"
        )


@register_notrace_function
def windows_of(x: Tensor, side: int) -> Tensor:
    """(B, H, W, heads, D) to windows (B, H // side, W // side, heads, side, side, D); rows and
    columns that are over are left off."""
    if is_exporting():  # a slice would fix the exported graph's sizes to multiples of the side
        return x.unfold(1, side, side).unfold(2, side, side).permute(0, 1, 2, 3, 5, 6, 4)
    height, width = (length // side for length in x.shape[1:3])
    x = x[:, : height * side, : width * side]
    x = x.unflatten(2, (width, side)).unflatten(1, (height, side))
    return x.permute(0, 1, 3, 5, 2, 4, 6)


@register_notrace_module
class SoftmaxFree(nn.Module):
    """out_proj(K Inv(K_l) K^T v + conv(v)), K the Gaussian kernel of queries and landmarks.

    Keys equal queries (SOFT, arXiv:2110.11945, eq. 9; SOFT-Norm, arXiv:2207.03341). A landmark
    is a strided convolution of each head's queries, normalised, through a GELU; K_l is the
    landmarks' own kernel. The convolution of the values has one k x k filter a head.

    Args:
        place: where the mixer stands.
        landmark_ratio: pixels a landmark and side, r; of H x W tokens floor(H / r) *
            floor(W / r) are landmarks. None for 7 landmarks a side at the model's image size.
        local_kernel: size k of the values' convolution, odd.
        inverse: 'regularized' (SOFT), 'normalized' (SOFT-Norm: the images of a batch depend on
            each other where the iteration does not converge) or 'unregularized' (SOFT of before
            July 2022); see `linsight.kernels.newton_inverse`.
        iterations: of Newton's method.

    Raises:
        ValueError: for a place with class tokens, which have no landmark.
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
        if place.prefix_tokens:
            raise ValueError(
                f"softmax_free cannot stand where {place.prefix_tokens} class tokens are: its "
                "landmarks and its convolution need a map; use another mixer in that stage"
            )
        self.num_heads = place.num_heads
        self.width = place.dim // place.num_heads
        self.ratio = landmark_ratio or max(1, min(place.size) // LANDMARKS)
        self.inverse = inverse
        self.iterations = iterations
        self.in_proj = Linear(place.dim, 2 * place.dim)
        self.landmark = nn.Conv2d(self.width, self.width, self.ratio, self.ratio, bias=False)
        self.landmark_norm = nn.LayerNorm(self.width)
        self.local = nn.Conv2d(
            self.num_heads, self.num_heads, local_kernel, groups=self.num_heads, bias=False
        )
        self.out_proj = Linear(place.dim, place.dim)

    def forward(
        self,
        x: Tensor,
        size: tuple[int, int],
        rotary: Rotary | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """Mix the tokens of a map.

        Args:
            x: (B, H * W, C), tokens in row-major order.
            size: (H, W), each at least the landmark ratio.
            rotary: accepted as by every mixer, and not used: distances of queries are no
                product that a rotation could act on.
            scale: a layer scale of C elements that multiplies the result, or none.

        Returns:
            (B, H * W, C).

        Raises:
            ValueError: if the map holds no landmark.
        """
        check_map(size, self.ratio)
        projection = self.in_proj(x)
        query, value = projection.unflatten(-1, (2, self.num_heads, self.width)).unbind(2)
        landmarks = self.landmarks(query.unflatten(1, size))
        inverse = newton_inverse(
            landmark_kernel(landmarks), method=self.inverse, iterations=self.iterations
        )
        filters = self.local.weight.repeat_interleave(self.width, 0)
        local = depthwise_conv2d(value.flatten(2).unflatten(1, size), filters).reshape(value.shape)
        y = gaussian_attention(query, landmarks, value, inverse, local, scale=self.width**-0.25)
        return self.out_proj(y.flatten(2), scale)

    def landmarks(self, query: Tensor) -> Tensor:
        """(B, M, heads, D) in the dtype of `query`, (B, H, W, heads, D)."""
        # Windows without overlap: the convolution is a matrix product.
        windows = windows_of(query, self.ratio).flatten(4).flatten(1, 2)
        weight = self.landmark.weight.permute(0, 2, 3, 1).flatten(1)
        marks = F.linear(windows, weight * self.width**-0.25)
        return F.gelu(self.landmark_norm(marks)).to(query.dtype)
