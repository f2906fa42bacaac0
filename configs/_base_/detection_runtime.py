_base_ = "default_runtime.py"

custom_imports = dict(
    imports=[
        "linsight",
        "linsight.datasets.classification",
        "linsight.datasets.coco",
        "linsight.datasets.digits_detection",
        "linsight.heads",
        "linsight.heads.coco",
        "linsight.heads.detection_figures",
        "mmdet.registry",
    ]
)
default_scope = "mmdet"

default_hooks = dict(
    checkpoint=dict(save_best="coco/bbox_mAP"),
    progress_bar=dict(metrics=["coco/bbox_mAP", "coco/segm_mAP"]),
    learning_curve=dict(metrics=["coco/bbox_mAP", "coco/segm_mAP"]),
    predictions=dict(type="ObjectsFigureHook"),
)
