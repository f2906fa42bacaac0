"""The base of skeletons with stages: timm's interface, over maps (B, H, W, C)."""

from collections.abc import Iterable
from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d, global_pool_nlc, resample_abs_pos_embed
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..layers import checked_pool, classifier


class TokenStage(nn.Module):
    """Downsampling, position embeddings, a class token, blocks.

    With a class token it gives tokens (B, 1 + H * W, C), without one a map (B, H, W, C).

    Args:
        downsample: from the map of the stage before to this one's.
        dim: channels C.
        size: (H, W) at the model's image size, of the position embeddings; every other size
            interpolates them bilinearly.
        blocks: called with tokens and the map's size.
        class_token: whether one is put in front.
    """

    def __init__(
        self,
        downsample: nn.Module,
        dim: int,
        size: tuple[int, int],
        blocks: Iterable[nn.Module],
        class_token: bool,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.size = size
        self.prefix_tokens = int(class_token)
        self.downsample = downsample
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if class_token else None
        tokens = self.prefix_tokens + size[0] * size[1]
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, dim))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        size = x.shape[1:3]
        x = x.flatten(1, 2)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.to(x.dtype).expand(x.shape[0], -1, -1), x), 1)
        position = resample_abs_pos_embed(
            self.pos_embed, size, self.size, self.prefix_tokens, "bilinear", antialias=False
        )
        x = x + position.to(x.dtype)
        for block in self.blocks:
            x = checkpoint(block, x, size) if self.grad_checkpointing else block(x, size)
        return x.unflatten(1, size) if self.cls_token is None else x


class Head(nn.Module):
    """Pooling, dropout and classifier, from a map (B, H, W, C) or tokens (B, 1 + N, C).

    Args:
        dim: channels C.
        num_classes: classes; 0 for no classifier.
        pool_type: timm's pooling name; of tokens, the first of which is the class token, one of
            `TOKEN_POOLS`.
        drop_rate: dropout before the classifier.
        class_token: whether it takes tokens.

    Raises:
        ValueError: if tokens have no such pooling.
    """

    def __init__(
        self, dim: int, num_classes: int, pool_type: str, drop_rate: float, class_token: bool
    ) -> None:
        super().__init__()
        self.num_features = dim
        self.class_token = class_token
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self._set_pool(pool_type)

    def _set_pool(self, pool_type: str) -> None:
        if self.class_token:
            self.pool_type = checked_pool(pool_type)
        else:
            self.global_pool = SelectAdaptivePool2d(
                pool_type=pool_type, flatten=bool(pool_type), input_fmt="NHWC"
            )

    def reset(self, num_classes: int, pool_type: str | None, like: Tensor) -> None:
        """Replace the classifier, by one like `like` in device and dtype, and the pooling if
        `pool_type` is given."""
        if pool_type is not None:
            self._set_pool(pool_type)
        self.fc = classifier(self.num_features, num_classes, like)
        self.train(self.training)  # new modules start in training mode

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.class_token:
            x = global_pool_nlc(x, self.pool_type, num_prefix_tokens=1)
        else:
            x = self.global_pool(x)
        x = self.drop(x)
        return x if pre_logits else self.fc(x)


class HierarchicalVisionTransformer(nn.Module):
    """A stem, stages that take and give channels-last maps, a norm and a head.

    Subclasses set `num_classes`, `in_chans`, `num_features`, `head_hidden_size`, `feature_info`,
    `stem` (images to the map that the first stage takes), `stages` (each with a flag
    `grad_checkpointing`; the last may give tokens with a class token in front), `norm` and `head`
    (with `fc` and `reset(num_classes, pool_type, like)`).
    """

    output_fmt = "NHWC"

    def forward_stem(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to the map (B, ceil(H / 4), ceil(W / 4), C) of the first stage."""
        return self.stem(x)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for timm's layer decay; what begins a stage is of its first block."""
        blocks = [
            (r"^stages\.(\d+)\.(?!blocks)", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^(?:norm|head\.(?:projection|norm))", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    def no_weight_decay(self) -> set[str]:
        """Names beyond vectors and biases that weight decay leaves out.

        They are the class token, and what mixers ask for; position embeddings decay.
        """
        tokens = {name for name, _ in self.named_parameters() if name.endswith("cls_token")}
        return tokens | {
            f"{name}.{parameter}"
            for name, module in self.named_modules()
            if module is not self and hasattr(module, "no_weight_decay")
            for parameter in module.no_weight_decay()
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one, and the pooling if `global_pool` is given."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, next(self.parameters()))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Final features, and as maps the outputs of the stages in `indices`.

        Args:
            x: images (B, in_chans, H, W).
            indices: which stages: the last n for an integer, all for none.
            norm: apply the final norm to the last stage's output, if that is asked for.
            stop_early: do not compute stages after the last that is asked for.
            output_fmt: 'NCHW' or 'NHWC', of the intermediates.
            intermediates_only: return the list alone.

        Raises:
            ValueError: for another `output_fmt`.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt is {output_fmt!r}, expected 'NCHW' or 'NHWC'")
        take, last = feature_take_indices(len(self.stages), indices)
        intermediates = []
        pixels = x.shape[-2:]
        x = self.forward_stem(x)
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take:
                y = self.norm(x) if norm and i == len(self.stages) - 1 else x
                if y.ndim == 3:
                    reduction = self.feature_info[i]["reduction"]
                    y = y[:, 1:].unflatten(1, tuple(-(-side // reduction) for side in pixels))
                intermediates.append(y.permute(0, 3, 1, 2) if output_fmt == "NCHW" else y)
        if intermediates_only:
            return intermediates
        return self.norm(x) if i == len(self.feature_info) - 1 else x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages (and the head) that the outputs in `indices` do not need."""
        take, last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.head = nn.Identity()
            self.num_classes = 0
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Unpooled, normed features (B, ceil(H / 32), ceil(W / 32), C), or tokens (B, 1 + N, C)."""
        x = self.forward_stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, num_classes) from features; (B, head_hidden_size) if `pre_logits`."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) from images (B, in_chans, H, W)."""
        return self.forward_head(self.forward_features(x))
