"""Feed-forward networks of tokens that convolve their hidden width, built as timm's MLPs are."""

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from .activations import kernel_activation
from .context import Context
from .layers import ActDepthwise, DepthwiseConv2d, ResidualDepthwise


class ConvMlp(nn.Module):
    """Feed-forward network with a depthwise 3 x 3 convolution on its hidden width.

    u = act(fc1(x)), u <- u + depthwise(u), fc2(u). It is built as timm's MLPs are.

    Args:
        in_features: channels of the tokens.
        hidden_features: channels between the linear layers.
        out_features: channels of the result, or None for as many as the tokens have.
        act_layer: a callable that makes the activation.
    """

    convolution: ClassVar[type[ActDepthwise]] = ResidualDepthwise

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        act_layer: Callable[..., nn.Module] = nn.GELU,
    ) -> None:
        super().__init__()
        act = act_layer()
        activation = kernel_activation(act)
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act if activation is None else None
        self.depthwise = self.convolution(hidden_features, 3, activation)
        self.fc2 = nn.Linear(hidden_features, out_features or in_features)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, H * W, C) to (B, H * W, C), tokens of the map of `context`."""
        x = self.fc1(x)
        if self.act is not None:
            x = self.act(x)
        x = self.depthwise(context.as_map(x, "mlp_layer ConvMlp"))
        return self.fc2(x.flatten(1, 2))


class ActDepthwiseMlp(ConvMlp):
    """`ConvMlp` without its residual sum: fc2(depthwise(act(fc1(x))))."""

    convolution = ActDepthwise


class DepthwiseMlp(nn.Module):
    """PVTv2's feed-forward network, fc2(act(depthwise(fc1(x)))), with a 3 x 3 convolution.

    It is built as timm's MLPs are.

    Args:
        in_features, hidden_features, act_layer: as in `ConvMlp`.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        act_layer: Callable[..., nn.Module] = nn.GELU,
    ) -> None:
        super().__init__()
        act = act_layer()
        activation = kernel_activation(act)
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.depthwise = DepthwiseConv2d(hidden_features, 3, activation=activation)
        self.act = act if activation is None else None
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, H * W, C) to (B, H * W, C), tokens of the map of `context`."""
        x = context.as_map(self.fc1(x), "mlp_layer DepthwiseMlp").permute(0, 3, 1, 2)
        x = self.depthwise(x).permute(0, 2, 3, 1).flatten(1, 2)
        return self.fc2(x if self.act is None else self.act(x))
