"""Each leaf module has an effect: where one gives NaN, the output is NaN."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..conftest import lively
from .models import PARTS, create, leaves, one_image, put, two_blocks


class Poison(nn.Module):
    """A module that stands for the given one, and whose outputs are all NaN.

    Attributes of the given module that are no tensors can be read, because a model may ask for the
    width of a layer. Its weights cannot: code that reads them computes past the module.
    """

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in self.part._parameters or name in self.part._buffers:
                raise
            return getattr(self.part, name)

    def forward(self, *args, **kwargs):
        return torch.utils._pytree.tree_map_only(
            Tensor, lambda x: torch.full_like(x, torch.nan), self.part(*args, **kwargs)
        )


@pytest.mark.parametrize("name", PARTS)
@torch.inference_mode()
def test_a_poisoned_leaf_module_poisons_the_output(name):
    # Pooled over its map, a model's output depends on the last block's convolutions of the map,
    # which the class token, read by default, does not see. Distilled models read tokens only.
    pool = {} if name.endswith("_distilled") else {"global_pool": "avg"}
    model, x = lively(create(name, **two_blocks(name, 1), **pool)), one_image().float()
    clean, failures = [], {}
    for leaf, part in leaves(model).items():
        put(model, leaf, Poison(part))
        try:
            # PyTorch's fused attention on a CPU gives zeros for NaN queries if keys are few.
            with sdpa_kernel(SDPBackend.MATH):
                if not model(x).isnan().all():
                    clean.append(leaf)
        except AttributeError as error:
            failures[leaf] = str(error)
        put(model, leaf, part)
    assert (clean, failures) == ([], {})
