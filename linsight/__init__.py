"""linsight: vision backbones with linear attention.

Importing the package registers every model in timm::

    import timm, linsight
    model = timm.create_model("rala_vit_small")

It also provides mmcv's compiled operators where mmcv is installed without them, so that mmdet
works: import it before mmdet.
"""

from . import backbones as backbones
from .kernels import mmcv_operators

mmcv_operators.install()

__version__ = "0.1.0"
