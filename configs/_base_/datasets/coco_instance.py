# COCO 2017's boxes and masks: data/coco/annotations, train2017, val2017, or
# --cfg-options data_root=...
_base_ = "mmdet::_base_/datasets/coco_instance.py"

# Workers take their seeds as they start: starting anew each epoch makes resuming exact.
train_dataloader = dict(
    num_workers=4,
    persistent_workers=False,
    worker_init_fn=dict(type="torch_worker_seed"),
    dataset=dict(type="CheckedCocoDataset"),
)
val_dataloader = dict(
    num_workers=4, persistent_workers=False, dataset=dict(type="CheckedCocoDataset")
)
test_dataloader = val_dataloader
val_evaluator = dict(type="QuietCocoMetric")
test_evaluator = val_evaluator
