"""linsight: vision backbones with linear attention.

Importing the package registers every model in timm, and does nothing else::

    import timm, linsight
    model = timm.create_model("rala_vit_small")
"""

from . import backbones as backbones

__version__ = "0.1.0"
