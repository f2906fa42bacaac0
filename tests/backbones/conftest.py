"""Models whose outputs are of ordinary size, so that a comparison means something."""

import pytest
import timm
import torch
from torch import nn

import linsight  # noqa: F401


def lively(model: nn.Module) -> nn.Module:
    """The model with widely drawn parameters and statistics: initial ones give outputs near 0."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.8, 1.2)
            elif name.endswith((".alpha", ".batch_weight")):
                # Batch norms do not scale what grows from block to block.
                tensor.uniform_(0.2, 0.4)
            elif tensor.ndim >= 2 and "gamma" not in name:
                tensor.normal_(std=tensor[0].numel() ** -0.5)
            elif tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn_like(tensor))
    return model.eval()


@pytest.fixture
def nano():
    return lively(timm.create_model("rala_vit_nano", num_classes=10))
