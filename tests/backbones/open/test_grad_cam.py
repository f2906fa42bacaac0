"""Maps of what a class depends on (Grad-CAM)."""

from functools import partial

import pytest
from torch import Tensor, nn

from linsight.backbones.blocks import PostNormBlock
from linsight.backbones.skeletons.care import CareBlock
from linsight.backbones.skeletons.van import VANBlock

from ..conftest import lively
from .models import FAMILIES, PARTS, create, images, quick


def as_map(tokens: Tensor, prefix: int, height: int, width: int) -> Tensor:
    """Tokens (B, P + H * W, C) or a map (B, H, W, C) as (B, C, H, W), which Grad-CAM draws."""
    if tokens.ndim == 3:
        tokens = tokens[:, prefix:].unflatten(1, (height, width))
    return tokens.permute(0, 3, 1, 2)


def grad_cam_target(model: nn.Module, where: str) -> nn.Module:
    last = model.stages[-2] if hasattr(model, "stages") else model.blocks
    if where == "stage":
        return last if hasattr(model, "stages") else last[-2]
    block = (last.blocks if hasattr(model, "stages") else last)[-1]
    # The norms of a post-norm block give the residual sum besides, which is no map to draw, and
    # those of CARE's and VAN's blocks give channels first.
    others = (PostNormBlock, CareBlock, VANBlock)
    return block.mlp if isinstance(block, others) else block.norm1


@pytest.mark.parametrize("where", ["stage", "layer"])
@pytest.mark.parametrize("name", quick(FAMILIES, PARTS))
def test_grad_cam_draws(name, where):
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, x = lively(create(name)), images().float()
    # The last stage but one has a map of more than a few pixels; the plain ViT has one stride.
    stride = 16 if hasattr(model, "stages") else model.feature_info[0]["reduction"]
    height, width = (-(-side // stride) for side in x.shape[2:])
    prefix = 0 if hasattr(model, "stages") else model.num_prefix_tokens
    cam = GradCAM(
        model,
        [grad_cam_target(model, where)],
        reshape_transform=partial(as_map, prefix=prefix, height=height, width=width),
    )
    # A map whose weights are all negative is drawn as zeros, so each class is drawn once.
    classes = [ClassifierOutputTarget(label) for label in range(10)]
    drawn = cam(input_tensor=x[:1].expand(10, -1, -1, -1), targets=classes)
    assert drawn.shape == (10, *x.shape[2:])
    assert (drawn.std((1, 2)) > 0.01).sum() >= 3
