"""The base of skeletons with stages: timm's interface, over maps (B, H, W, C)."""

from abc import abstractmethod
from typing import Any

from timm.models._features import feature_take_indices
from torch import Tensor, nn


class HierarchicalVisionTransformer(nn.Module):
    """A stem, stages that take and give channels-last maps, a norm and a head.

    Subclasses set `num_classes`, `in_chans`, `num_features`, `head_hidden_size`, `feature_info`,
    `stages` (each with a flag `grad_checkpointing`), `norm` and `head` (with `fc` and
    `reset(num_classes, pool_type)`), and write `forward_stem` and `group_matcher`; one whose
    last stage gives tokens with a class token in front writes `to_map` as well.
    """

    output_fmt = "NHWC"

    @abstractmethod
    def forward_stem(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to the map that the first stage takes."""

    @abstractmethod
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for timm's layer decay."""

    def to_map(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """The map (B, H, W, C) in what a stage gives, of size (H, W): all of it."""
        return x

    def no_weight_decay(self) -> set[str]:
        """Names beyond vectors and biases that weight decay leaves out: what mixers ask for."""
        return {
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
        self.head.reset(num_classes, global_pool)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Final features and the outputs of the stages in `indices`.

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
                reduction = self.feature_info[i]["reduction"]
                y = self.to_map(y, tuple(-(-side // reduction) for side in pixels))
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
        """Unpooled, normed features (B, ceil(H / 32), ceil(W / 32), num_features)."""
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
