"""DeiT, and agent attention in its plain Vision Transformer."""

from dataclasses import replace

from ..registry import Family, Model, Weights, register
from ..skeletons import vit
from ..skeletons.vit import VisionTransformer
from . import papers

SOFTMAX = Family(
    skeleton=VisionTransformer,
    filter_fn=vit.checkpoint_filter_fn,
    paper=papers.DEIT,
    first_conv="patch_embed.proj",
    classifier="head",
    config={"mixer": "softmax"},
    # The last three blocks, as timm's.
    out_indices=3,
)

AGENT = replace(
    SOFTMAX,
    paper=papers.AGENT,
    config={"mixer": "agent"},
)

TINY = {"dim": 192, "num_heads": 3}
SMALL = {"dim": 384, "num_heads": 6}
BASE = {"dim": 768, "num_heads": 12}


def _deit(size: str, digest: str) -> dict[str, Weights]:
    file = f"deit_{size}_patch16_224-{digest}.pth"
    return {"fb_in1k": Weights(url=f"https://dl.fbaipublicfiles.com/deit/{file}")}


register(
    __name__,
    {
        "softmax_deit_tiny": Model(SOFTMAX, TINY, _deit("tiny", "a1311bcf"), top1=72.2),
        "softmax_deit_small": Model(SOFTMAX, SMALL, _deit("small", "cd65a155"), top1=79.9),
        "softmax_deit_base": Model(SOFTMAX, BASE, _deit("base", "b5f2ef4d"), top1=81.8),
        "agent_deit_tiny": Model(
            AGENT,
            TINY,
            {"in1k": Weights(page="https://cloud.tsinghua.edu.cn/f/57e0904221824ee7b7af/")},
            top1=74.9,
        ),
        "agent_deit_small": Model(
            AGENT,
            SMALL,
            {"in1k": Weights(page="https://cloud.tsinghua.edu.cn/f/fdd43304372541db8ea7/")},
            top1=80.5,
        ),
        "agent_deit_base": Model(
            AGENT,
            BASE
            | {
                "mixer": (("agent",) * 4 + ("softmax",) * 8,),
                "mixer_options": {"agent": {"agents": 81}},
            },
            {"in1k": Weights(page="https://cloud.tsinghua.edu.cn/f/5115f15fdd7e4ab58fbc/")},
            top1=82.0,
        ),
    },
)
