"""linsight: vision backbones with linear attention.

Importing the package registers every model in timm::

    import timm, linsight
    model = timm.create_model("rala_vit_small")
"""

from . import backbones as backbones

__version__ = "0.1.0.dev0"
