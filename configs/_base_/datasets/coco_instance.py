# Boxes and masks of COCO 2017 from annotations/, train2017/ and val2017/ in data/coco, or
# --cfg-options data_root=...
_base_ = "mmdet::_base_/datasets/coco_instance.py"

# Workers get their seeds when they start. Starting them in each epoch makes resuming exact.
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
