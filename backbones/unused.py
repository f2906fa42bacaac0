"""Parameters of the authors' models that no output depends on.

They are in the authors' files and in their counts of parameters, and so in the models of the zoo.
"""

from torch import Tensor


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
