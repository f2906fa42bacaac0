"""Parameters of the authors' models that no output depends on.

They are in the authors' files and in their counts of parameters, and so in the models of the zoo.
"""

import torch
from torch import Tensor, nn


def depend_on(x: Tensor, *unused: Tensor) -> Tensor:
    """`x`, through which unused parameters get a gradient of zero.

    A distributed training waits for the gradients of all parameters.

    Args:
        x: any tensor on which the loss depends, best a small one.
        unused: parameters whose shapes broadcast to that of `x`.
    """
    for parameter in unused:
        x = x + 0 * parameter
    return x


class UnusedNorm(nn.Module):
    """The identity, with the weight and bias of a norm that the authors hold and do not use.

    Args:
        channels: C of the input (..., C).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return depend_on(x, self.weight + self.bias)

    def fuse(self) -> nn.Module:
        """The identity."""
        return nn.Identity()
