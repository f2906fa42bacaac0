"""What the Triton kernels share: elementary functions, exact products, sums of parts."""

import os

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
PTX = tl.constexpr(torch.version.cuda is not None and not INTERPRETED.value)
# float32 split into three bfloat16 for the tensor cores, 24 bits in all: as exact as "ieee",
# which does without them, spills, and outgrows the instruction cache. See docs/performance.md.
PRECISION = tl.constexpr("ieee" if INTERPRETED.value else "bf16x6")


@triton.jit
def single(x):
    """A floating-point argument of a kernel in float32; TorchInductor's programs pass float64."""
    return tl.cast(x, tl.float32)


@triton.jit
def exp2_approximate(x):
    """2^x to two roundings of float32, zero below 2^-126, at one instruction."""
    if PTX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1
        )
    else:
        return tl.exp2(x)


@triton.jit
def reciprocal_approximate(x):
    """1 / x to one rounding of float32, at one instruction."""
    if PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1
        )
    else:
        return 1.0 / x


@triton.jit
def exponential(x, EXACT: tl.constexpr):
    """exp(x), x finite. The hardware's exp2 of x log2(e) is off by |x| roundings: for float32
    inputs x is reduced to |r| <= ln(2) / 2 first, by an ln(2) in two parts."""
    if EXACT:
        # Below, where the result is zero, r would be one of rounding, and its exp2 infinite.
        whole = tl.maximum(tl.floor(x * 1.4426950408889634 + 0.5), -200.0)
        r = (x - whole * 0.693359375) + whole * 2.12194440e-4
        return tl.exp2(r * 1.4426950408889634) * tl.exp2(whole)
    else:
        return exp2_approximate(x * 1.4426950408889634)


@triton.jit
def shrinkage(lower, higher, EXACT: tl.constexpr):
    """exp(lower - higher), the factor of a running softmax's sums when its maximum rises."""
    return exponential(tl.maximum(lower - higher, -1e4), EXACT)


@triton.jit
def log2_approximate(x):
    """log2(x), x positive, to 2^-22, at one instruction."""
    if PTX:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1
        )
    else:
        return tl.log2(x)


@triton.jit
def logarithm(x, EXACT: tl.constexpr):
    """log(x), x positive; to a few roundings of float32, or to 2^-22 by the hardware's log2."""
    if EXACT or not PTX:
        return tl.log(x)
    else:
        return 0.6931471805599453 * log2_approximate(x)


@triton.jit
def normal_cdf(x, EXACT: tl.constexpr):
    if EXACT:
        return 0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476)
    else:
        # The logit is an odd polynomial, fitted so that |x| times the error is below 3e-5. It takes
        # a third of the arithmetic of erf, which would cost more than reading and writing
        # half-precision values does.
        u = tl.minimum(x * x, 49.0)
        logit = (u * 1.0142692e-3 - 0.10677576) * u - 2.3011213
        return reciprocal_approximate(1.0 + exp2_approximate(x * logit))


@triton.jit
def gelu(x, EXACT: tl.constexpr):
    return x * normal_cdf(x, EXACT)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    if ACTIVATION == "gelu":
        return gelu(x, EXACT)
    elif ACTIVATION == "relu":
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        return x


@triton.jit
def gelu_gradient(x, EXACT: tl.constexpr):
    density = tl.exp(-0.5 * x * x) if EXACT else exp2_approximate(x * x * -0.7213475204444817)
    return normal_cdf(x, EXACT) + x * 0.3989422804014327 * density


@triton.jit
def activation_gradient(grad, x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """The gradient in x of activate(x), from the gradient of the result."""
    if ACTIVATION == "gelu":
        return grad * gelu_gradient(x, EXACT)
    elif ACTIVATION == "relu":
        return tl.where(x > 0, grad, 0.0)
    else:
        return grad


@triton.jit
def _cut(x):
    """The upper 16 bits of float32: bfloat16 rounded towards zero, at one instruction."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def high_part(x, IEEE: tl.constexpr):
    if IEEE:
        return x.to(tl.float32)
    else:
        return _cut(x).to(tl.bfloat16)


@triton.jit
def low_part(x, IEEE: tl.constexpr):
    """The remainder of `high_part`: x = high + low to 16 bits."""
    if IEEE:
        return x
    else:
        return (x - _cut(x)).to(tl.bfloat16)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 as an operand of `dot` beside tensors of a dtype: if that is bfloat16 in it, to
    the nearest, since the result will be rounded as much; else as it is, to be split."""
    if dtype == tl.bfloat16:
        if INTERPRETED:  # which rounds towards zero
            bits = x.to(tl.int32, bitcast=True)
            bits = (bits + 32767 + ((bits >> 16) & 1)) & -65536
            x = bits.to(tl.float32, bitcast=True)
        return x.to(tl.bfloat16)
    else:
        return x


@triton.jit
def multiply(a, b, accumulator=None):
    """accumulator + a @ b without rounding the operands: products of 16-bit numbers are exact in
    float32, and products of float32 numbers do not use the tensor cores."""
    if INTERPRETED:  # it would multiply the bit patterns of bfloat16 as integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def add_product(total, factor, a, b):
    """total * factor + a @ b without rounding the operands, with one `factor` per row.

    In float32 the product of a tile is summed first, then added: equal terms, such as padding
    tokens give, drift if they are added to the total one by one (961 of them by 7e-6, where tiles
    of 64 are off by 5e-7).
    """
    if a.dtype == tl.float32:
        # A fused multiply-add: the compiler would make a sum the product's accumulator.
        return tl.fma(total, tl.broadcast_to(factor[:, None], total.shape), multiply(a, b))
    else:
        return multiply(a, b, total * factor[:, None])


@triton.jit
def dot(a, b, accumulator, IEEE: tl.constexpr):
    """accumulator + a @ b, on the tensor cores unless `IEEE`.

    One rounding to bfloat16 would be amplified where nearly equal terms are subtracted. So a
    float32 operand is split into high + low, 16 bits together, and only the product of two lows is
    left out; an operand that comes as bfloat16 is exact, or was `rounded` where that does no harm.
    """
    if IEEE or (a.dtype == tl.bfloat16 and b.dtype == tl.bfloat16):
        return multiply(a, b, accumulator)
    elif b.dtype == tl.bfloat16:
        accumulator = multiply(high_part(a, False), b, accumulator)
        return multiply(low_part(a, False), b, accumulator)
    else:
        return dot_halves(a, high_part(b, False), low_part(b, False), accumulator, False)


@triton.jit
def dot_halves(a, b_high, b_low, accumulator, IEEE: tl.constexpr):
    """`dot` with a `b` that is split already."""
    if IEEE:
        return multiply(a, b_high, accumulator)
    elif a.dtype == tl.bfloat16:
        accumulator = multiply(a, b_high, accumulator)
        return multiply(a, b_low, accumulator)
    else:
        a_high = high_part(a, False)
        accumulator = multiply(a_high, b_high, accumulator)
        accumulator = multiply(a_high, b_low, accumulator)
        return multiply(low_part(a, False), b_high, accumulator)


@triton.jit
def operand(x, IEEE: tl.constexpr):
    """A loaded tensor as an operand of `dot`: bfloat16, which is exact, or float32."""
    if IEEE or x.dtype != tl.bfloat16:
        return x.to(tl.float32)
    else:
        return x


@triton.jit
def fold(x, ROWS: tl.constexpr):
    """(T, P) to (ROWS, P), by sums over rows that one thread holds: registers, no exchange."""
    T: tl.constexpr = x.shape[0]
    return tl.sum(tl.reshape(x, (T // ROWS, ROWS, x.shape[1])), 0)


@triton.jit
def sum_rows(parts, count, stride, column, live, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sum over `count` rows, `stride` floats apart, of `column`, in a fixed order."""
    row = tl.arange(0, ROWS)[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, count, ROWS):
        at = parts + (start + row).to(tl.int64) * stride + column[None, :]
        total += tl.load(at, mask=(start + row < count) & live[None, :], other=0.0)
    return tl.sum(total, 0)
