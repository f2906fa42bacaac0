_base_ = "./default_runtime.py"

custom_imports = dict(imports=["linsight.data.segmentation", "linsight.heads"])

default_hooks = dict(
    checkpoint=dict(by_epoch=False, interval=8000, save_best="segmentation/mIoU"),
    progress_bar=dict(metrics=["segmentation/mIoU"]),
    learning_curve=dict(metrics=["segmentation/mIoU"]),
    predictions=dict(_delete_=True, type="MasksFigureHook"),
)
log_processor = dict(by_epoch=False)

val_evaluator = dict(type="MeanIoU")
test_evaluator = dict(type="MeanIoU", table=True)
val_cfg = dict()
test_cfg = dict()
