"""Token mixers, skeletons and the models made of them, registered in timm."""

from . import zoo as zoo
from .registry import ZOO

__all__ = ["ZOO"]
