_base_ = "default_runtime.py"

custom_imports = dict(
    imports=[
        "linsight.data.classification",
        "linsight.data.coco",
        "linsight.data.digits_detection",
        "linsight.heads",
        "linsight.heads.detection",
        "linsight.heads.detection_metric",
        "linsight.heads.detection_figures",
    ]
)
default_scope = "mmdet"
# The number of regions, a batch to the mask head, is new in every iteration, and so would be
# the search for the fastest convolution.
env_cfg = dict(cudnn_benchmark=False)

default_hooks = dict(
    checkpoint=dict(save_best="coco/bbox_mAP"),
    progress_bar=dict(metrics=["coco/bbox_mAP", "coco/segm_mAP"]),
    learning_curve=dict(metrics=["coco/bbox_mAP", "coco/segm_mAP"]),
    predictions=dict(type="ObjectsFigureHook"),
)
