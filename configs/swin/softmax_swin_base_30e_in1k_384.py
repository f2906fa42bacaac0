# Swin's fine-tuning at 384 px after 300 epochs at 224 px (arXiv:2103.14030).
_base_ = "./softmax_swin_base_30e_in22k_ft_in1k_384.py"

model = dict(
    backbone=dict(
        model_name="softmax_swin_base.ms_in1k",
        img_size=384,
        mixer_options=dict(window=dict(window_size=12)),
        drop_path_rate=0.5,
    )
)
