"""The operators: one folder each, with a public function, its reference and its Triton kernels.

Each is imported from its folder, ``from linsight.kernels.linear_attention import
linear_attention``. `force` decides what all of them run on.
"""

from .runtime.dispatch import force

__all__ = ["force"]
