custom_imports = dict(imports=["linsight.data.classification", "linsight.heads"])
default_scope = "mmengine"
# Scripts of OpenMMLab build this runner. linsight's commands always use it.
runner_type = "SafeRunner"

default_hooks = dict(
    logger=dict(type="LoggerHook", interval=100),
    checkpoint=dict(
        type="SafeCheckpointHook", interval=1, max_keep_ckpts=2, save_best="accuracy/top1"
    ),
    epoch_seed=dict(type="EpochSeedHook"),
    checked_load=dict(type="CheckedLoadHook"),
    resume_validation=dict(type="ResumeValidationHook"),
    data_check=dict(type="DataCheckHook"),
    progress_bar=dict(type="ProgressBarHook"),
    learning_curve=dict(type="LearningCurveHook"),
    predictions=dict(type="ClassesFigureHook"),
    class_report=dict(type="ClassReportHook"),
)

env_cfg = dict(cudnn_benchmark=True)
randomness = dict(seed=0)
log_level = "INFO"
load_from = None
resume = False
