"""The examples of docs/export.md for ExecuTorch and CoreML as written, on smaller images."""

import pytest
import timm
import torch

from linsight.tools.export import Format, write_file
from linsight.tools.export_check import relative
from linsight.tools.export_subject import batch_of, classifier_subject, photographs

from ..backbones.conftest import lively
from ..test_readme import blocks


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A block of linear attention as model.pt2."""
    options = {"num_classes": 2, "depths": (1, 0, 0, 0)}
    subject = classifier_subject(lively(timm.create_model("rala_vit_nano", **options)))
    folder = tmp_path_factory.mktemp("written")
    write_file(subject.with_size((64, 64)), folder, Format.torch)
    return subject, folder


def run_example(word: str) -> dict:
    """What the example with a word leaves."""
    (example,) = [each for each in blocks("docs/export.md", "python") if word in each]
    example = example.replace("224, 224", "64, 64")
    names = {"__name__": "__main__"}
    exec(compile(example, "docs/export.md", "exec"), names)
    return names


def test_no_constants_without_axes(written):
    """What the converters are known to refuse, looked for without them."""
    program = torch.export.load(written[1] / "model.pt2")
    filled = [n for n in program.graph.nodes if "zeros" in str(n.target) or "full" in str(n.target)]
    assert [n.name for n in filled if list(n.meta["val"].shape) == []] == []


@pytest.mark.slow
def test_executorch(written, monkeypatch):
    runtime = pytest.importorskip("executorch.runtime", reason="pip install executorch").Runtime
    subject, folder = written
    monkeypatch.chdir(folder)
    run_example("executorch")
    images = batch_of(photographs()[:1], (64, 64))
    method = runtime.get().load_program(folder / "model.pte").load_method("forward")
    (logits,) = method.execute([images])
    with torch.inference_mode():
        assert relative(logits, subject.module(images)["logits"]) < 1e-4


@pytest.mark.slow
def test_coreml(written, monkeypatch):
    """It is converted; only Apple's machines run it."""
    pytest.importorskip("coremltools", reason="pip install coremltools")
    monkeypatch.chdir(written[1])
    description = run_example("coremltools")["model"].get_spec().description
    assert [x.name for x in description.input] == ["images"]
    assert list(description.input[0].type.multiArrayType.shape) == [1, 3, 64, 64]
    assert (written[1] / "model.mlpackage").is_dir()
