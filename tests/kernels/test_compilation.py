"""Kernels are compiled before they are launched, in parallel, into the place where they are sought.

No GPU is needed: what a pass would launch is collected on tensors without storage.
"""

import ast
import importlib
import json
import logging
import os
import re
import subprocess
import sys
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import FunctionType, ModuleType

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn
from typer.testing import CliRunner

import linsight.backbones  # noqa: F401 -- registers the models
from linsight.backbones.initialization import shapes_only
from linsight.backbones.layers import ConvNormAct, DepthwiseConv2d, synchronize_batch_norms
from linsight.backbones.norms import LayerNorm
from linsight.kernels import force, layer_norm
from linsight.kernels.runtime import compilation, dispatch, private, rehearsal
from linsight.kernels.runtime.compilation import Variant, collect_variants, compile_pass
from linsight.kernels.runtime.dispatch import HAS_TRITON
from linsight.kernels.runtime.private import (
    get_target,
    make_target,
    pretend_target,
    settle_hash,
)
from linsight.kernels.runtime.rehearsal import Pass, change_resolution, rehearse
from linsight.tools import warm
from linsight.tools.main import app

from .conftest import INTERPRETED

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile"),
    pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed"),
]

TRAINING = Pass(
    (128, 3, 224, 224), torch.float32, True, True, torch.bfloat16, torch.device("cuda", 0)
)
INFERENCE = replace(TRAINING, training=False, gradient=False)


@pytest.fixture
def hopper():
    """An H100 that is not there."""
    with pretend_target(make_target("sm_90")):
        yield


def collect(model: nn.Module, how: Pass) -> set[Variant]:
    variants: list[Variant] = []
    with collect_variants(variants.append):
        rehearse(model, how)
    assert len(set(variants)) == len(variants)
    return set(variants)


def make_model(name: str) -> nn.Module:
    with shapes_only():
        return timm.create_model(name)


def test_a_process_that_compiles_imports_the_kernels_alone():
    statements = (
        "import importlib; from linsight.kernels.runtime import compiler; "
        "importlib.import_module('linsight.kernels.linear_attention.forward'); "
        "print(sorted({'timm', 'torchvision', 'linsight.backbones'} & set(sys.modules)))"
    )
    code = compilation.write_start(statements)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# What a compiler fuses with its surroundings, and launches no kernel of ours for.
SHOWN_BY_REFERENCE = {"batch_norm", "layer_norm"}


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("name", ["rala_vit_nano", "soft_vit_nano", "agent_swin_tiny"])
def test_kernels_narrow_their_floats(name):
    """TorchInductor's programs hand a kernel its floats in 64 bits, Triton's launches in 32."""
    narrowed = 0
    for variant in collect(make_model(name), replace(TRAINING, shape=(2, 3, 224, 224))):
        kernel = getattr(importlib.import_module(variant.module), variant.kernel)
        for argument, kind in json.loads(variant.description)["signature"].items():
            if kind == "fp32" and variant.module.split(".")[-2] not in SHOWN_BY_REFERENCE:
                assert f"{argument} = single({argument})" in kernel.src, variant
                narrowed += 1
    assert narrowed


# Kernels of a training step at 224 px in bfloat16, those that another resolution and one image
# alone add, and those that inference adds.
BUDGETS = {
    "rala_vit_small": (85, 2, 6),
    "softmax_swin_tiny": (25, 4, 0),
}


@pytest.mark.parametrize(
    "name", ["rala_vit_small", pytest.param("softmax_swin_tiny", marks=pytest.mark.slow)]
)
def test_how_many_kernels_a_model_compiles(name: str, hopper: None) -> None:
    """Exact: a kernel more costs every user's first step its compilation."""
    model = make_model(name)
    first = collect(model, TRAINING)
    both = first | collect(model, change_resolution(TRAINING))
    added = both | collect(model, INFERENCE)
    found = (len(first), len(both) - len(first), len(added) - len(both))
    assert found == BUDGETS[name], Counter(variant.kernel for variant in added)
    # Whatever the resolution, nothing is left to compile.
    assert collect(model, replace(TRAINING, shape=(2, 3, 736, 1111))) <= both


def test_a_convolution_by_columns_compiles_nothing_beside_one_by_rows(hopper: None) -> None:
    how = replace(TRAINING, shape=(2, 32, 14, 13))
    rows, columns = (collect(DepthwiseConv2d(32, window), how) for window in ((1, 11), (11, 1)))
    assert columns == rows
    assert len(rows) == 4


class Norms(nn.Module):
    """Two kernels, one of them backward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = LayerNorm(16)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.norm(x * torch.rand_like(x))


NORMS = replace(TRAINING, shape=(2, 5, 16))


def test_rehearsal_leaves_the_model_alone(hopper: None) -> None:
    model = Norms()
    called = []
    model.register_forward_hook(lambda *args: called.append("forward"))
    model.norm.weight.register_hook(lambda gradient: called.append("backward"))
    state = torch.get_rng_state()
    variants = collect(model, NORMS)
    assert sorted(variant.kernel for variant in variants) == ["_backward", "_forward"]
    assert called == []
    assert model.calls == 0
    assert model.norm.weight.grad is None
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.is_autocast_enabled("cuda")


def test_rehearsal_asks_no_other_process(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others may compile nothing, and would take the question for that of a real pass."""

    def communicate(*args, **options) -> None:
        raise AssertionError("a rehearsal communicates")

    model = synchronize_batch_norms(
        nn.Sequential(ConvNormAct(3, 16, 3), nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16))
    )
    assert isinstance(model[2], nn.SyncBatchNorm)
    how = replace(TRAINING, shape=(2, 3, 16, 16))
    alone = collect(model, how)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for name in ("all_gather", "all_gather_into_tensor", "all_reduce"):
            monkeypatch.setattr(dist, name, communicate)
        monkeypatch.setattr(dist, "get_world_size", lambda *args: 2)
        together = collect(model, how)
    finally:
        dist.destroy_process_group()
    # The statistics are merged, and their gradients summed, in kernels of their own.
    assert alone < together


def test_backward_by_hand_is_the_engines(hopper: None) -> None:
    """The kernels of a model's backward pass are those that the engine would launch."""
    x = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(4, 4, requires_grad=True)
    hidden = (x @ weight).double()
    y = hidden.float() * hidden.sum().float() + x[:1]
    seen = {}
    for name, leaf in (("x", x), ("weight", weight)):
        node = leaf.view_as(leaf).grad_fn.next_functions[0][0]
        seen[node] = name
    original, gradients = rehearsal._add, {}

    def add(sums, index, gradient, node):
        original(sums, index, gradient, node)
        if node in seen:
            gradients[seen[node]] = sums[index]

    rehearsal._add = add
    try:
        rehearsal._run_backward(y, torch.ones_like(y))
    finally:
        rehearsal._add = original
    expected = torch.autograd.grad(y, (x, weight), torch.ones_like(y))
    torch.testing.assert_close((gradients["x"], gradients["weight"]), expected)


def test_compiled_in_parallel_as_when_launched(
    hopper: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime.jit import JITFunction

    def list_keys(folder: str) -> set[str]:
        return {path.parent.name for path in (tmp_path / folder).glob("*/*.cubin")}

    model, reports = Norms(), []
    monkeypatch.setattr(compilation, "count_workers", lambda: 2)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "parallel"))
    finish = compilation.Compiler.finish

    def watch(compiler, report):
        finish(compiler, lambda *counts: (reports.append(counts), report(*counts)))

    monkeypatch.setattr(compilation.Compiler, "finish", watch)
    missing = compile_pass(lambda: rehearse(model, NORMS), get_target())
    assert len(missing) == 2
    assert reports == [(0, 2), (1, 2), (2, 2)]
    assert len(list_keys("parallel")) == 2
    assert compile_pass(lambda: rehearse(model, NORMS), get_target()) == []

    # What launches compile: with the tensors' own addresses, through Triton's own look at them.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "serial"))

    def launch(kernel, grid):
        return lambda *args, **options: kernel.run(*args, grid=grid, warmup=True, **options)

    monkeypatch.setattr(JITFunction, "__getitem__", launch)
    monkeypatch.setattr(layer_norm, "runs_triton", lambda x: True)
    x = torch.zeros(2, 5, 16, requires_grad=True)
    y = model(x)
    y.backward(torch.zeros_like(y))
    assert list_keys("serial") == list_keys("parallel")


def test_a_kernel_that_does_not_compile(
    hopper: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "count_workers", lambda: 1)
    compiler = compilation.Compiler(get_target(), 1)
    compiler.submit(Variant("linsight.kernels.layer_norm.forward", "_forward", "{}", ""))
    with pytest.raises(RuntimeError, match="KeyError: 'name'"):
        compiler.finish(lambda done, count: None)
    compiler.close()


def test_a_compiler_that_crashes(
    hopper: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "crash.py").write_text("import os\nos.abort()\n")
    monkeypatch.syspath_prepend(tmp_path)
    compiler = compilation.Compiler(get_target(), 1)
    compiler.submit(Variant("crash", "_forward", "{}", ""))
    with pytest.raises(RuntimeError, match="0 of 1 kernels were compiled"):
        compiler.finish(lambda done, count: None)
    compiler.close()


def test_a_failure_leaves_the_launch_to_triton(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(compilation, "describe", fail)
    compilation.expect_pass(lambda: None)
    with caplog.at_level(logging.INFO, "linsight"):
        compilation.prepare_launch(None, (), {})
        compilation.prepare_launch(None, (), {})
    assert [record.getMessage() for record in caplog.records] == [
        "kernels are compiled one by one, when they are launched: no space left"
    ]


def test_a_pass_is_compiled_at_its_first_miss(
    hopper: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the thread that launches has set, hooks on saved tensors for one."""
    from linsight.kernels.layer_norm.forward import _forward
    from linsight.kernels.layer_norm.plan import plan

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    submitted, saved = [], []
    monkeypatch.setattr(compilation, "Compiler", lambda *args: FakeCompiler(submitted))
    how = plan(torch.Size((2, 5, 16)), torch.device("cpu"), 1e-5, False, False).forward
    x = torch.zeros(2, 5, 16)
    vectors = [x[0, 0]] * 4
    arguments = (_forward, (x, x, *vectors, x, x, 16, *how.sizes), how.constants)
    model = Norms()
    with (
        torch.no_grad(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        compilation.prepare_launch(*arguments)
        assert submitted == []  # no pass was announced
        compilation.expect_pass(lambda: rehearse(model, NORMS))
        compilation.prepare_launch(*arguments)
        compilation.prepare_launch(*arguments)
    assert sorted(variant.kernel for variant in submitted) == ["_backward", "_forward"]
    assert saved == []


def test_a_called_function_has_its_hash_before_its_caller() -> None:
    """In Triton 3.6 the caller's hash, a part of the key on disk, depends on it."""
    settled = []

    class Function:
        def __init__(self, line: str) -> None:
            self.line, self.hash = line, None
            self.fn = FunctionType(compile(line, "", "exec"), scope)

        def parse(self) -> ast.Module:
            return ast.parse(self.line)

        @property
        def cache_key(self) -> str:
            settled.append(self)
            self.hash = "settled"
            return self.hash

    scope: dict = {"mathematics": ModuleType("mathematics"), "constant": 3}
    lowest = scope["lowest"] = Function("constant")
    low = scope["mathematics"].low = Function("lowest(lowest.low)")
    high = scope["high"] = Function("mathematics.low(high, lowest)")
    settle_hash(high)
    settle_hash(high)
    assert settled == [lowest, low, high]
    settle_hash(lambda: None)  # of the interpreter


class FakeCompiler:
    """Compiles nothing."""

    def __init__(self, submitted: list) -> None:
        self.submit = submitted.append

    def finish(self, report) -> None:
        report(0, 0)

    def close(self) -> None: ...


def test_warm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compilation, "count_workers", lambda: 1)
    command = ["warm", "softmax_deit_tiny", "--arch", "sm_90", "--eval", "--resolutions", "32"]
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 0, run.output
    assert "layer_norm.forward._forward: 2" in run.output
    compiled = len(list(tmp_path.glob("*/*.cubin")))
    assert f"{compiled} kernels compiled in" in run.output
    assert compiled > 0
    run = CliRunner().invoke(app, command)
    assert "0 kernels compiled in" in run.output.splitlines()[-1]


def test_warm_knows_the_sums_of_recorded_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stages, which PyTorch's own sums stand in for where no pass is recorded."""

    def collect_pass(rehearse_all, target) -> list[Variant]:
        variants: list[Variant] = []
        with collect_variants(variants.append):
            rehearse_all()
        return variants

    monkeypatch.setattr(warm, "compile_pass", collect_pass)
    options = ({}, [(224, 224)], (True, False), "bfloat16", 8, "sm_90")
    found = warm.compile_model("softmax_swin_tiny", *options)
    assert [v.kernel for v in found].count("_sum_columns") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arch", "h100"], "arch is 'h100', expected one such as 'sm_90'"),
        (["--arch", "sm_90", "--resolutions", "big"], "resolution is 'big'"),
        (["--arch", "sm_90", "--dtype", "int8"], "dtype is 'int8'"),
    ],
)
def test_warm_names_a_wrong_option(options: list[str], message: str) -> None:
    run = CliRunner().invoke(app, ["warm", "softmax_deit_tiny", *options])
    assert run.exit_code == 1
    assert message in run.stderr


def test_warm_names_what_timm_refuses() -> None:
    arch = ["--arch", "sm_90"]
    run = CliRunner().invoke(
        app, ["warm", "swin_tiny_patch4_window7_224", "--resolutions=256", *arch]
    )
    assert (run.exit_code, run.stderr) == (
        1,
        "error: Input height (256) doesn't match model (224).\n",
    )
    run = CliRunner().invoke(app, ["warm", "local-dir:/nowhere", *arch])
    assert run.exit_code == 1
    assert "TRITON_CACHE_DIR" not in run.stderr


def test_warm_names_a_cache_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    run = CliRunner().invoke(app, ["warm", "softmax_deit_tiny", "--arch", "sm_90", "--eval"])
    assert run.exit_code == 1
    assert f"Triton's cache cannot be written: {tmp_path}/file" in run.stderr
    assert "Not a directory; set TRITON_CACHE_DIR to another folder" in run.stderr


def test_warm_says_what_the_compiler_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the compiler prints before it gives up does not mix with the processes' answers.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(private, "list_architectures", lambda number: [])
    run = CliRunner().invoke(app, ["warm", "softmax_deit_tiny", "--arch", "sm_35", "--eval"])
    assert run.exit_code == 1
    assert "Value 'sm_35' is not defined" in run.stderr


@pytest.mark.parametrize("arch", ["sm_9", "sm_35", "sm_99"])
def test_warm_knows_the_assemblers_gpus(arch: str) -> None:
    """Of some others Triton's compiler would end its process, and the answers with it."""
    run = CliRunner().invoke(app, ["warm", "softmax_deit_tiny", "--arch", arch, "--eval"])
    assert run.exit_code == 1
    assert re.search(
        rf"arch is '{arch}', and Triton's assembler knows .*sm_80, .*sm_90", run.stderr
    )


@pytest.fixture
def slim_container(monkeypatch: pytest.MonkeyPatch):
    """No C compiler on the path, and a cache of Triton's without what it has built."""

    def fail() -> None:
        raise RuntimeError("Failed to find C compiler")

    caches = (dispatch.find_lack, dispatch._warn_without_compiler)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(dispatch, "load_driver", fail)
    monkeypatch.setattr(dispatch, "_can_launch", False)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def test_without_a_compiler_the_reference_runs(slim_container: None) -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(2, 16, device="cuda")
        with pytest.warns(UserWarning, match="apt install gcc"):
            assert not dispatch.runs_triton(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not dispatch.runs_triton(x)
        with force("triton"), pytest.raises(RuntimeError, match="apt install gcc, or set CC"):
            dispatch.runs_triton(x)


def test_without_headers(slim_container: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", sys.executable)
    monkeypatch.setattr(dispatch.sysconfig, "get_paths", lambda: {"include": "/nowhere"})
    assert "apt install python3-dev" in (dispatch.find_lack() or "")


FIRST_STEP = """
import timm, torch, linsight
from triton import knobs

misses = []
knobs.compilation.listener = lambda *, src, cache_hit, **_: cache_hit or misses.append(src.name)
model = timm.create_model("rala_vit_nano").cuda().train()
for side in (64, 96):
    with torch.autocast("cuda", torch.bfloat16):
        y = model(torch.randn(2, 3, side, side, device="cuda"))
    y.float().square().mean().backward()
    print("compiled by launches:", misses)
"""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="runs the kernels")
def test_launches_find_what_was_compiled(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", FIRST_STEP],
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == "compiled by launches: []\n" * 2
    assert "compiling kernels" in run.stderr


def test_processes_that_end_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    start = "import sys; sys.stdin.readline(); raise SystemExit('out of luck')"
    monkeypatch.setattr(compilation, "write_start", lambda _: start)
    compiler = compilation.Compiler(make_target("sm_90"), 1)
    try:
        compiler.submit(Variant("module", "kernel", "{}", ""))
        with pytest.raises(RuntimeError, match="0 of 1 kernels were compiled, then out of luck"):
            compiler.finish(lambda done, count: None)
    finally:
        compiler.close()
