"""The launch decisions of `conv2d`."""

from dataclasses import dataclass

import torch
import triton

from ..runtime.launch import Launch, cache_plan, cdiv, count_multiprocessors

WARPS = 4
# Elements of a program that adds a bias: 16 bytes per load and thread, two of them under way.
ELEMENTS = 2048
# Of a tile of an image's convolution: the most channels of the result; its elements and the most
# taps of a step, forward and of the weight's gradient, which reads image and gradient once for all
# its taps.
MOST_OUTPUTS = 128
TILE, TAPS = 4096, 16
GRADIENT_TILE, GRADIENT_TAPS = 2048, 64
FEWEST_PIXELS, MOST_PIXELS = 32, 128
# Programs per multiprocessor that sum the weight's gradient.
GRADIENT_RESIDENT = 8


@dataclass(frozen=True)
class ImagePlan:
    """The launches for an image, and the shape of the parts of the weight's gradient."""

    convolve: Launch
    weight_gradient: Launch
    parts: tuple[int, int, int]


@cache_plan
def plan(shape: torch.Size, dtype: torch.dtype, activation: str | None) -> Launch:
    """The launch for results of one shape (B, C, H, W)."""
    channels = shape[1]
    pixels = shape.numel() // channels
    padded = triton.next_power_of_2(channels)
    rows = max(1, ELEMENTS // padded)
    constants = {
        "C": channels, "P": padded, "ROWS": rows, "ACTIVATION": activation,
        "EXACT": dtype.itemsize == 4, "num_warps": WARPS,
    }  # fmt: skip
    return Launch((cdiv(pixels, rows),), (pixels,), constants)


@cache_plan
def plan_image(
    strides: tuple[int, ...],
    size: torch.Size,
    weight: torch.Size,
    stride: tuple[int, int],
    padding: tuple[int, int],
    result: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    bias: bool = False,
    activation: str | None = None,
) -> ImagePlan:
    """Plan for images of one layout.

    Args:
        strides, size: of the image, and its height and width.
        weight: the shape of the weight (O, I, h, w).
        stride, padding, activation: as in `conv2d`.
        result: (B, H', W', O).
        dtype: of the result.
        device: where the kernels run.
        bias: whether the result has a bias.
    """
    outputs, channels, kernel_height, kernel_width = weight
    taps = weight[1:].numel()
    pixels = result[0] * result[1] * result[2]
    # The tensor cores take 16 rows and columns at least.
    block = min(MOST_OUTPUTS, max(16, triton.next_power_of_2(outputs)))
    blocks = cdiv(outputs, block)
    sizes = (*strides, *size, *result[1:3], pixels, outputs)

    def make(elements: int, taps: int, most: int) -> tuple[int, dict]:
        tile = min(MOST_PIXELS, max(FEWEST_PIXELS, elements // block))
        return cdiv(pixels, tile), {
            "CHANNELS": channels, "KH": kernel_height, "KW": kernel_width,
            "SH": stride[0], "SW": stride[1], "PH": padding[0], "PW": padding[1],
            "BLOCK": block, "PIXELS": tile,
            "STEP": min(most, max(16, triton.next_power_of_2(taps))),
            "num_warps": WARPS, "num_stages": 1,
        }  # fmt: skip

    tiles, constants = make(TILE, taps, TAPS)
    constants |= {"BIAS": bias, "ACTIVATION": activation, "EXACT": dtype.itemsize == 4}
    convolve = Launch((tiles, blocks), sizes, constants)
    # One tap more gives the bias's gradient.
    tiles, constants = make(GRADIENT_TILE, taps + 1, GRADIENT_TAPS)
    steps = cdiv(taps + 1, constants["STEP"])
    wanted = GRADIENT_RESIDENT * count_multiprocessors(device) // (blocks * steps)
    programs = min(tiles, max(1, wanted))
    gradient = Launch((programs, blocks, steps), sizes, constants)
    return ImagePlan(convolve, gradient, (programs, taps + 1, outputs))
