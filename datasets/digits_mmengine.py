"""The segmentation of digit scenes under mmengine's registry.

In a config: ``custom_imports = dict(imports=["linsight.datasets.digits_mmengine"])``, then
``dataset=dict(type="DigitSegmentation", split="train")``.
"""

from mmengine.registry import DATASETS

from .digits import DigitSegmentation

DATASETS.register_module(module=DigitSegmentation)
