"""Models on a CPU beside the authors' RAVLT in plain PyTorch: `python authors_on_cpu.py SIDE`.

`RAVLT` is the authors' model as their code has it: maps (B, C, H, W), 1 x 1 convolutions for linear
layers, an attention map in memory. It has random weights, which `rala_vit_small` loads, and both
must give the same logits. Printed is the processor time of one image in milliseconds, on one
thread, the least of several turns that the models take one after the other; page faults count.
"""

import sys
import time
from functools import partial

import timm
import torch
import torch.nn.functional as F
from timm.utils import reparameterize_model
from torch import Tensor, nn

import linsight  # noqa: F401
from linsight.backbones.skeletons.ravlt import checkpoint_filter_fn
from linsight.kernels import force

WIDTHS, DEPTHS, HEADS = (64, 128, 320, 512), (3, 5, 9, 3), (1, 2, 5, 8)


class ChannelNorm(nn.Module):
    """Layer normalisation of a map (B, C, H, W) over C."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


class Rotary(nn.Module):
    """Sines and cosines (N, d) of the pixels' rows and columns."""

    def __init__(self, width: int) -> None:
        super().__init__()
        angle = 1 / 10000 ** torch.linspace(0, 1, width // 4)
        self.register_buffer("angle", angle.repeat_interleave(2))

    def forward(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        rows = torch.arange(height)[:, None, None] * self.angle
        columns = torch.arange(width)[None, :, None] * self.angle
        parts = rows.expand(-1, width, -1), columns.expand(height, -1, -1)
        angles = torch.cat(parts, -1).flatten(0, 1)
        return angles.sin(), angles.cos()


def turn(x: Tensor, sine: Tensor, cosine: Tensor) -> Tensor:
    """Pairs of neighbouring channels, rotated."""
    other = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return x * cosine + other * sine


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, linear: bool) -> None:
        super().__init__()
        self.heads, self.linear = heads, linear
        self.qkvo = nn.Conv2d(width, 4 * width, 1)
        self.lepe = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, sine: Tensor, cosine: Tensor) -> Tensor:
        q, k, v, gate = self.qkvo(x).chunk(4, 1)
        local = self.lepe(v)
        q, k, v = (t.flatten(2).unflatten(1, (self.heads, -1)).transpose(2, 3) for t in (q, k, v))
        rotate = partial(turn, sine=sine, cosine=cosine)
        scale, tokens = q.shape[-1] ** -0.5, q.shape[2]
        if self.linear:
            q, k = F.elu(q) + 1, F.elu(k) + 1
            scores = scale * q.mean(2, keepdim=True) @ k.transpose(2, 3)
            k = tokens * scores.softmax(-1).transpose(2, 3) * k
            inverse = 1 / (q @ k.mean(2, keepdim=True).transpose(2, 3) + 1e-6)
            root = tokens**-0.5
            state = (rotate(k) * root).transpose(2, 3) @ (v * root)
            y = rotate(q) @ state * inverse
        else:
            y = (scale * rotate(q) @ rotate(k).transpose(2, 3)).softmax(-1) @ v
        y = y.transpose(2, 3).reshape(x.shape)
        return self.proj((y + local) * gate)


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = int(3.5 * width)
        self.fc1 = nn.Conv2d(width, hidden, 1)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc1(x))
        return self.fc2(x + self.dwconv(x))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, linear: bool) -> None:
        super().__init__()
        self.pos = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm1, self.norm2 = ChannelNorm(width), ChannelNorm(width)
        self.attn, self.ffn = Attention(width, heads, linear), FeedForward(width)
        self.gamma_1 = nn.Parameter(torch.ones(1, width, 1, 1))
        self.gamma_2 = nn.Parameter(torch.ones(1, width, 1, 1))

    def forward(self, x: Tensor, sine: Tensor, cosine: Tensor) -> Tensor:
        x = x + self.pos(x)
        x = x + self.gamma_1 * self.attn(self.norm1(x), sine, cosine)
        return x + self.gamma_2 * self.ffn(self.norm2(x))


class Downsample(nn.Module):
    def __init__(self, width: int, wider: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(width, wider, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(wider)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x))


class Layer(nn.Module):
    def __init__(self, stage: int) -> None:
        super().__init__()
        width, heads = WIDTHS[stage], HEADS[stage]
        self.RoPE = Rotary(width // heads)
        self.blocks = nn.ModuleList(Block(width, heads, stage < 2) for _ in range(DEPTHS[stage]))
        if stage < 3:
            self.downsample = Downsample(width, WIDTHS[stage + 1])

    def forward(self, x: Tensor) -> Tensor:
        tables = self.RoPE(*x.shape[2:])
        for block in self.blocks:
            x = block(x, *tables)
        return self.downsample(x) if hasattr(self, "downsample") else x


class Stem(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        plan = [(3, width // 2, 2), *[(width // 2, width // 2, 1)] * 2, (width // 2, width, 2)]
        for before, after, stride in plan:
            convolution = nn.Conv2d(before, after, 3, stride=stride, padding=1)
            layers += [convolution, nn.BatchNorm2d(after), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class RAVLT(nn.Module):
    """The authors' RAVLT-S."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = Stem(WIDTHS[0])
        self.layers = nn.Sequential(*(Layer(stage) for stage in range(4)))
        self.proj = nn.Conv2d(WIDTHS[3], 1024, 1)
        self.norm = nn.BatchNorm2d(1024)
        self.head = nn.Conv2d(1024, 1000, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.proj(self.layers(self.patch_embed(x)))))
        return self.head(x.mean((2, 3), keepdim=True)).flatten(1)


@torch.inference_mode()
def main(side: int, turns: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.randn(1, 3, side, side)
    authors = RAVLT().eval()
    ours = timm.create_model("rala_vit_small").eval()
    ours.load_state_dict(checkpoint_filter_fn(authors.state_dict(), ours))
    size = {} if side == 224 else {"img_size": side}
    peers = ("softmax_swin_tiny", "swin_tiny_patch4_window7_224")
    models = {
        "the authors' mathematics": authors,
        "rala_vit_small": reparameterize_model(ours),
        **{name: reparameterize_model(timm.create_model(name, **size).eval()) for name in peers},
    }
    torch.testing.assert_close(
        models["rala_vit_small"](images), authors(images), rtol=1e-3, atol=1e-4
    )
    best: dict[str, float] = {}

    def take(name: str, model: nn.Module) -> None:
        start = time.process_time()
        model(images)
        elapsed = time.process_time() - start
        best[name] = min(elapsed, best.get(name, elapsed))

    for _ in range(turns):
        for name, model in models.items():
            take(name, model)
        with force("reference"):
            take("rala_vit_small without oneDNN's products", models["rala_vit_small"])
    for name, seconds in best.items():
        print(f"{name}: {1000 * seconds:.1f} ms")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 8)
