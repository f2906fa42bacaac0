# CSWin's recipe (arXiv:2107.00652): Swin's, with more stochastic depth.
_base_ = "./upernet_softmax_swin_tiny_160k_ade20k.py"

model = dict(backbone=dict(model_name="softmax_cswin_tiny", drop_path_rate=0.3))
