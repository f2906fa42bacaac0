"""The digit data sets under mmengine's registry.

In a config: ``custom_imports = dict(imports=["linsight.datasets.digits_mmengine"])``, then
``dataset=dict(type="DigitClassification", split="train", transform=...)``.
"""

from mmengine.registry import DATASETS

from .digits import DigitClassification, DigitSegmentation

for dataset in (DigitClassification, DigitSegmentation):
    DATASETS.register_module(module=dataset)
