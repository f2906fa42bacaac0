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
# The number of regions, which is the batch of the mask head, changes in every iteration. cuDNN
# would search for the fastest convolution each time.
env_cfg = dict(cudnn_benchmark=False)

default_hooks = dict(
    checkpoint=dict(save_best="coco/bbox_mAP"),
    progress_bar=dict(metrics=["coco/bbox_mAP", "coco/segm_mAP"]),
    learning_curve=dict(metrics=["coco/bbox_mAP", "coco/segm_mAP"]),
    predictions=dict(type="ObjectsFigureHook"),
)
