"""The table: what `mmcv._ext` offers, by mmcv's names."""

import torch

from . import boxes, carafe, convolution, deformable_attention, focal_loss, roi


def get_compiler_version() -> str:
    """What mmcv's `collect_env` prints: no compiler was needed."""
    return "none (linsight's operators)"


def get_compiling_cuda_version() -> str:
    """The CUDA version of PyTorch, whose operators run."""
    return torch.version.cuda or "not available"


OPERATORS = {
    operator.__name__: operator
    for operator in (
        get_compiler_version,
        get_compiling_cuda_version,
        boxes.bbox_overlaps,
        boxes.line_nms_forward,
        boxes.nms,
        boxes.nms_match,
        boxes.softnms,
        carafe.carafe_backward,
        carafe.carafe_forward,
        carafe.carafe_naive_backward,
        carafe.carafe_naive_forward,
        convolution.deform_conv_backward_input,
        convolution.deform_conv_backward_parameters,
        convolution.deform_conv_forward,
        convolution.masked_col2im_forward,
        convolution.masked_im2col_forward,
        convolution.modulated_deform_conv_backward,
        convolution.modulated_deform_conv_forward,
        deformable_attention.ms_deform_attn_backward,
        deformable_attention.ms_deform_attn_forward,
        focal_loss.sigmoid_focal_loss_backward,
        focal_loss.sigmoid_focal_loss_forward,
        focal_loss.softmax_focal_loss_backward,
        focal_loss.softmax_focal_loss_forward,
        roi.deform_roi_pool_backward,
        roi.deform_roi_pool_forward,
        roi.roi_align_backward,
        roi.roi_align_forward,
        roi.roi_pool_backward,
        roi.roi_pool_forward,
    )
}
