"""Models under torch.compile and torch.export, and as ONNX; TorchScript is not supported."""

import pytest
import timm
import torch
from torch._dynamo.testing import CompileCounter
from torch.export import Dim

from .conftest import lively

SIZES = [(2, 64, 64), (1, 33, 96), (3, 97, 131)]
# Sides are above 32 pixels, which leave one row that torch.export would take for a constant.
SIDES = {"min": 33, "max": 4096}
DYNAMIC = ({0: Dim("batch", min=1, max=1024), 2: Dim("height", **SIDES), 3: Dim("width", **SIDES)},)


@pytest.fixture(scope="module")
def nano():
    """Blocks of both mixers, and two in a row, the second of which adds what the first defers."""
    return lively(timm.create_model("rala_vit_nano", num_classes=10, depths=(2, 0, 1, 0)))


def relative(got, wanted):
    return ((got - wanted).norm() / wanted.norm()).item()


def test_one_graph_at_any_size(nano):
    """The model is traced once, as one graph, in which the sizes are dynamic."""
    counter = CompileCounter()
    compiled = torch.compile(nano, fullgraph=True, backend=counter, dynamic=True)
    with torch.inference_mode():
        for _, height, width in reversed(SIZES):  # equal sides would be taken for one
            x = torch.randn(2, 3, height, width)
            assert relative(compiled(x), nano(x)) < 1e-5
    assert counter.frame_count == 1


def test_compile():
    """Stem and first stage are compiled to machine code, at one size, because that takes long."""
    stage = timm.create_model("rala_vit_nano", features_only=True, out_indices=(0,)).eval()
    x = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        (got,), (wanted,) = torch.compile(stage, fullgraph=True)(x), stage(x)
    assert relative(got, wanted) < 1e-5


@pytest.mark.slow
def test_onnx(nano, tmp_path):
    """The bare model, as a program of one's own exports it; the command's files have tests of
    their own."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    path = str(tmp_path / "nano.onnx")
    example = (torch.randn(2, 3, 64, 96),)
    torch.onnx.export(nano, example, dynamo=True, dynamic_shapes=DYNAMIC, verbose=False).save(path)
    session = onnxruntime.InferenceSession(path)
    for batch, height, width in SIZES:
        x = torch.randn(batch, 3, height, width)
        got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        with torch.inference_mode():
            assert relative(torch.from_numpy(got), nano(x)) < 1e-4


def test_dilated_convolutions_at_any_size():
    """Eager, a dilated convolution is one of the map's parts, whose number depends on the size."""
    model = lively(timm.create_model("van_b0", depths=(1, 0, 0, 0), num_classes=10))
    program = torch.export.export(model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=DYNAMIC)
    with torch.no_grad():
        for size in SIZES:
            x = torch.randn(size[0], 3, *size[1:])
            assert relative(program.module()(x), model(x)) < 1e-5


def test_a_window_for_each_image_in_batches_of_any_length():
    """Of InLine, whose weights have the batch where others have the channels."""
    options = {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 64, "num_classes": 10}
    model = lively(timm.create_model("inline_deit_tiny", **options))
    x = torch.randn(2, 3, 64, 64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("batch", min=1, max=64)},))
    with torch.no_grad():
        for batch in (1, 3, 32):
            x = torch.randn(batch, 3, 64, 64)
            assert relative(program.module()(x), model(x)) < 1e-5
