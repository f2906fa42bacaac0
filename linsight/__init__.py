"""linsight: vision backbones with linear attention.

Importing the package registers every model in timm, and does nothing else::

    import timm, linsight
    model = timm.create_model("rala_vit_small")
"""

# By their full names, which type checkers find in a checkout.
from linsight.backbones.graphs import capture_inference as capture_inference
from linsight.backbones.graphs import capture_training as capture_training

from . import backbones as backbones

__version__ = "0.1.0"
