"""Interpolation by products is PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

from linsight.backbones.mixers.agent import resize_map
from linsight.backbones.mixers.positioned import resize_positions
from linsight.backbones.resampling import resampling
from linsight.backbones.skeletons.base import add_positions


@pytest.mark.parametrize(
    ("mode", "antialias"), [("linear", False), ("bicubic", False), ("bicubic", True)]
)
@pytest.mark.parametrize("lengths", [(14, 4), (14, 20), (7, 7), (1, 5), (5, 1)])
def test_it_is_pytorchs(lengths, mode, antialias):
    length, target = lengths
    x = torch.randn(1, 3, length, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if mode == "linear":
        wanted = F.interpolate(x, target, mode=mode)[0]
    else:
        wanted = F.interpolate(x[None], (3, target), mode=mode, antialias=antialias)[0, 0]
    weights = resampling(length, target, mode, antialias, x.dtype, x.device)
    assert torch.allclose(x[0] @ weights.T, wanted, atol=1e-12)


class Tables(torch.nn.Module):
    """Position embeddings, positions of keys and tables of agents."""

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        shapes = (1, 1 + 49, 4), (1, 49, 4), (7, 7, 4), (2, 7, 7)
        self.tables = [torch.randn(shape, generator=draw) for shape in shapes]

    def forward(self, x):
        first, second, keys, agents = self.tables
        size = x.shape[1:3]
        tokens = x.flatten(1, 2)
        return {
            "bicubic": add_positions(
                F.pad(tokens, (0, 0, 1, 0)), first, size, (7, 7), 1, "bicubic"
            ),
            "bilinear": add_positions(tokens, second, size, (7, 7), 0, "bilinear"),
            "keys": resize_positions(keys, size),
            "agents": resize_map(agents, size),
        }


def test_an_exported_graph_interpolates_by_products():
    """For CoreML and TensorRT, which have no bicubic interpolation, and OpenVINO, whose differs."""
    model, x = Tables(), torch.zeros(1, 5, 9, 4)
    program = torch.export.export(model, (x,))
    names = {str(node.target) for node in program.graph.nodes}
    assert not [name for name in names if "upsample" in name or "interpolate" in name]
    wanted, found = model(x), program.module()(x)
    for name, table in wanted.items():
        assert torch.allclose(found[name], table, atol=1e-5), name
