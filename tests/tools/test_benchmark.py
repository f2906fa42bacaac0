"""`linsight benchmark` on the CPU, with cases of seconds; speed itself is not tested."""

import csv
import re
import sys
import threading
import types

import pytest
import torch
from typer.testing import CliRunner

from linsight.kernels.linear_attention import linear_attention
from linsight.kernels.runtime import dispatch
from linsight.tools import benchmark, benchmark_cases, main
from linsight.tools import benchmark_measure as measure
from linsight.tools.benchmark_timing import copies, copy_bandwidth, quantiles, take_turn

from ..backbones.graph_stand import Stand, install

CPU = torch.device("cpu")


def run(tmp_path, *words, device="cpu"):
    options = ["--seconds", "0.001", "--device", device, "--out", str(tmp_path)]
    return CliRunner().invoke(main.app, ["benchmark", *words, *options])


def rows(tmp_path):
    with open(tmp_path / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_operators(tmp_path):
    names = ("rala_attention", "depthwise_5x5")
    result = run(tmp_path, "operators", *names, "--resolutions", "36")
    assert result.exit_code == 0, result.output
    got = rows(tmp_path)
    shapes = {"2 x 9 x 9 x 64", "2 x 4 x 4 x 128"}
    phases = {"forward", "forward+backward", "backward"}
    wanted = {("rala_attention", ""), ("depthwise_5x5", ""), ("sdpa", "rala_attention")}
    wanted |= {("reference", name) for name in names}
    assert {(row["name"], row["peer_of"]) for row in got} == wanted
    assert {row["shape"] for row in got} == shapes
    assert {row["phase"] for row in got} == phases
    assert len(got) == len(wanted) * len(shapes) * len(phases)
    for row in got:
        assert row["check"] == "ok"
        assert float(row["p50_ms"])
        share = float(row["floor_us"]) / 1e3 / float(row["p50_ms"])
        assert float(row["fraction"]) == pytest.approx(share, rel=1e-4)
        assert row["torch"] == torch.__version__
        assert "CPU" in row["device"]
        assert row["peak_mib"] == row["images_per_second"] == ""
        if row["phase"] != "backward":
            assert float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
    assert (tmp_path / "operators.png").stat().st_size > 10_000
    assert not (tmp_path / "models.png").exists()


def test_flash_bidirectional_is_a_peer_if_it_is_installed(tmp_path, monkeypatch):
    """Here a function in its place, which takes and returns what its kernels do."""
    calls = []

    def attend(query, key, value):
        calls.append(query.shape)
        weights = query @ key.transpose(2, 3)
        return weights @ value / (weights.sum(-1, keepdim=True) + 1e-6 * key.shape[2])

    words = ("operators", "linear_attention", "--resolutions", "24")
    assert run(tmp_path, *words).exit_code == 0
    assert {row["name"] for row in rows(tmp_path)} == {"linear_attention", "reference"}
    names = ("flash_bla", "flash_bla.ops", "flash_bla.ops.linear_attn")
    for name in (*names, f"{names[-1]}.fused"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[f"{names[-1]}.fused"].linear_attention = attend
    monkeypatch.setattr(benchmark_cases, "has_flash_bidirectional", lambda: True)
    assert run(tmp_path / "beside", *words).exit_code == 0
    got = [row for row in rows(tmp_path / "beside") if row["name"] == "flash_bla"]
    assert {(row["peer_of"], row["check"]) for row in got} == {("linear_attention", "ok")}
    assert set(calls) == {(2, 1, 36, 64), (2, 2, 9, 64)}


def test_byte_floors():
    """They are docs/performance.md's: MB per tensor times passes, over 3.02 TB/s."""
    cases = {
        (case.name, case.shape): case
        for resolution, batch in ((224, 64), (1024, 1))
        for case in benchmark_cases.operators(resolution, batch)
        if not case.peer_of
    }
    for name, shape, forward, both in (
        ("rala_attention", "64 x 56 x 56 x 64", 42.5, 119),
        ("rala_attention", "64 x 28 x 28 x 128", 21.3, 60),
        ("rala_attention", "1 x 256 x 256 x 64", 13.9, 39),
        ("depthwise_5x5", "64 x 56 x 56 x 64", 17, 42.5),
        ("depthwise_3x3_gelu_residual", "64 x 56 x 56 x 224", 59.5, 149),
    ):
        moved = cases[name, shape].moved
        assert 2 * moved[0] / 3.02e6 == pytest.approx(forward, rel=0.02)
        assert 2 * sum(moved) / 3.02e6 == pytest.approx(both, rel=0.02)


def test_every_operator_and_mixer_is_right(tmp_path):
    """A batch of 4 holds two images twice."""
    for what in ("operators", "mixers"):
        words = ("--resolutions", "24", "--batch", "4", "--phases", "inference")
        result = run(tmp_path, what, *words)
        assert result.exit_code == 0, result.output
    assert {row["check"] for row in rows(tmp_path)} == {"ok"}
    kinds = [row["kind"] for row in rows(tmp_path)]
    assert kinds == sorted(kinds, reverse=True)  # The second run's rows follow the first's.


def test_models(tmp_path):
    names = ("rala_vit_nano", "test_convnext")
    result = run(tmp_path, "models", *names, "--resolutions", "32,64")
    assert result.exit_code == 0, result.output
    got = rows(tmp_path)
    assert [(row["name"], row["phase"], row["resolution"]) for row in got] == [
        (name, phase, size)
        for phase in ("inference", "training")
        for name in names
        for size in ("32", "64")
    ]
    for row in got:
        assert row["check"] == "ok"
        assert row["peer_of"] == ("" if row["name"] == "rala_vit_nano" else "linsight")
        rate = 1e3 * int(row["batch"]) / float(row["p50_ms"])
        assert float(row["images_per_second"]) == pytest.approx(rate, rel=1e-4)
        assert float(row["first_call_s"]) > 0
        assert row["floor_us"] == ""
    assert (tmp_path / "models.png").stat().st_size > 10_000


def test_a_model_with_another_mixer(tmp_path):
    words = ("--resolutions", "32", "--phases", "inference", "--mixer")
    result = run(tmp_path, "models", "rala_vit_nano", "test_convnext", *words, "rala")
    assert result.exit_code == 0, result.output
    names = [row["name"] for row in rows(tmp_path)]
    assert names == ["rala_vit_nano mixer=rala", "test_convnext"]
    result = run(tmp_path, "models", "rala_vit_nano", *words, "ralla")
    assert result.exit_code == 2
    assert "got 'ralla'" in result.output


def test_latency_is_of_one_image_on_a_gpu_too():
    device = torch.device("cuda")
    setting = benchmark.Setting(device, "bfloat16", [], [], [(224, 224), (512, 512)], None, 0.001)
    assert list(setting.batches("latency")) == [(224, 1), (512, 1)]
    assert list(setting.batches("inference")) == [(224, 256), (512, 48)]


def test_latency(tmp_path):
    """Of one image, whatever the batch of other phases; operators have none."""
    words = ("--resolutions", "32", "--phases", "latency,inference", "--batch", "3")
    result = run(tmp_path, "models", "rala_vit_nano", *words)
    assert result.exit_code == 0, result.output
    got = rows(tmp_path)
    assert [(row["phase"], row["batch"]) for row in got] == [("latency", "1"), ("inference", "3")]
    for row in got:
        assert row["check"] == "ok"
        rate = 1e3 * int(row["batch"]) / float(row["p50_ms"])
        assert float(row["images_per_second"]) == pytest.approx(rate, rel=1e-4)
    result = run(tmp_path, "operators", "rala_attention", "--phases", "latency")
    assert result.exit_code == 2
    assert "nothing to measure is called rala_attention" in " ".join(result.output.split())


def test_a_call_that_is_awaited_is_timed_by_the_clock(monkeypatch):
    """Also on a GPU, where events time all other calls."""
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    gpu, calls = torch.device("cuda", 0), []
    low, middle, high = quantiles(lambda: calls.append(len(waits)), gpu, 1e-4, wait=True)
    assert 0 < low <= middle <= high
    # Before each call but the first it has been waited for the one before.
    assert calls == [0, *range(1, 2 * len(calls) - 2, 2)]


def model(mode, phase, name="test_convnext"):
    case = benchmark_cases.model(name, 32, 2)
    return measure.Model(case, torch.float32, CPU, mode, 1e-3, phase)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in replays on the CPU")
@pytest.mark.parametrize("phase", ["inference", "latency", "training"])
def test_what_is_checked_and_timed_is_replayed(monkeypatch, phase):
    install(monkeypatch)
    subject = model("captured", phase)
    # The first call prepares, and the second records; training has a graph for each direction.
    passes = 2 if phase == "training" else 1
    assert (Stand.recorded, Stand.replayed) == (passes, 2 * passes)
    values = subject.measure()
    assert values["check"] == "ok"
    assert values["p50_ms"] > 0
    assert Stand.recorded == passes
    assert Stand.replayed >= 7 * passes


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in replays on the CPU")
def test_a_model_that_runs_without_graphs_has_no_times(monkeypatch):
    install(monkeypatch)
    monkeypatch.setattr(Stand, "fails", "no such luck")
    subject = model("captured", "inference")
    with pytest.raises(RuntimeError, match="no graph: CUDA could not record it: no such luck"):
        subject.measure()


@pytest.mark.parametrize(("mode", "option"), [("compile", None), ("reduce-overhead",) * 2])
def test_modes_of_compilation(monkeypatch, mode, option):
    options, calls = [], []

    def compile(module, **given):
        options.append(given)
        return lambda images: calls.append(0) or module(images)

    monkeypatch.setattr(torch, "compile", compile)
    model(mode, "inference")
    assert options == [{"dynamic": False, "mode": option}]
    # PyTorch records its graphs in the second call.
    assert len(calls) == (3 if option else 1)


@pytest.fixture
def wrong(monkeypatch):
    """Kernels that are wrong where the reference is right."""

    def attention(*tensors, **options):
        y = linear_attention(*tensors, **options)
        return y if dispatch._choice == "reference" else y * 1.001

    monkeypatch.setattr(benchmark_cases, "linear_attention", attention)


@pytest.mark.usefixtures("wrong")
def test_a_wrong_operator_is_not_timed(tmp_path):
    result = run(tmp_path, "operators", "mala_attention", "--resolutions", "16")
    assert result.exit_code == 0, result.output
    for row in rows(tmp_path):
        if row["name"] == "mala_attention":
            assert row["check"].startswith("failed: result is off by 1.0e-03")
            assert row["p50_ms"] == row["fraction"] == ""
        else:
            assert row["check"] == "ok"
            assert row["p50_ms"]
    assert "failed: result is off" in result.output


def test_a_wrong_gradient_is_found():
    exact = [torch.ones(2, 3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)]
    eager = [x.float() + 1e-4 for x in exact]
    measure.check([eager[0].repeat(4, 1), eager[1]], eager, exact, torch.float32)
    measure.check([eager[0], exact[1].float() + 2.9e-4], eager, exact, torch.float32)
    with pytest.raises(measure.Disagreement, match="gradient 1"):
        measure.check([eager[0], exact[1].float() + 3.1e-4], eager, exact, torch.float32)
    bad = torch.cat((eager[0].repeat(3, 1), eager[0] + 2e-4))  # the last of four repetitions
    with pytest.raises(measure.Disagreement, match="result"):
        measure.check([bad, eager[1]], eager, exact, torch.float32)
    with pytest.raises(measure.Disagreement, match="result"):
        measure.check([eager[0] * float("nan"), eager[1]], eager, exact, torch.float32)


def test_a_fault_ends_a_case_and_not_the_run(tmp_path, monkeypatch):
    build = measure.Model.measure

    def scarce(model, graph):
        if model.case.resolution == 64:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if model.case.resolution == 96:
            raise RuntimeError("no such luck\nand a long story")
        return build(model, graph)

    monkeypatch.setattr(measure.Model, "measure", scarce)
    words = ("rala_vit_nano", "--resolutions", "32,64,96,128", "--phases", "inference")
    result = run(tmp_path, "models", *words)
    assert result.exit_code == 0, result.output
    assert [row["check"] for row in rows(tmp_path)] == [
        "ok",
        "out of memory",
        "error: RuntimeError: no such luck",
        "ok",
    ]
    assert [bool(row["p50_ms"]) for row in rows(tmp_path)] == [True, False, False, True]


def test_a_reference_that_does_not_fit_is_said_so():
    def exact():
        raise torch.OutOfMemoryError

    ours = [torch.ones(2, 3)]
    assert measure.check_if_exact_fits(ours, exact, torch.float32).startswith("unchecked")
    with pytest.raises(measure.Disagreement, match="not finite"):
        measure.check_if_exact_fits([ours[0] / 0], exact, torch.float32)


def test_an_interrupted_run_keeps_its_rows(tmp_path, monkeypatch):
    build = measure.Model.measure

    def interrupted(model, graph):
        if model.case.resolution == 64:
            raise KeyboardInterrupt
        return build(model, graph)

    monkeypatch.setattr(measure.Model, "measure", interrupted)
    words = ("models", "rala_vit_nano", "--resolutions", "32,64", "--phases", "inference")
    assert run(tmp_path, *words).exit_code != 0
    assert [row["resolution"] for row in rows(tmp_path)] == ["32"]
    assert (tmp_path / "models.png").exists()
    monkeypatch.setattr(measure.Model, "measure", build)
    assert run(tmp_path, *words).exit_code == 0
    assert [row["resolution"] for row in rows(tmp_path)] == ["32", "32", "64"]
    assert [path.name for path in tmp_path.glob("*.csv*")] == ["results.csv"]


def test_draw_again(tmp_path):
    words = ("models", "rala_vit_nano", "--resolutions", "32", "--phases", "inference")
    run(tmp_path / "a", *words)
    result = run(tmp_path / "b", "draw", str(tmp_path / "a" / "results.csv"))
    assert result.exit_code == 0, result.output
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["models.png"]


def test_files_of_earlier_versions_are_drawn(tmp_path):
    """They lack the machine codes' column; phases that have no figure are left out."""
    words = ("models", "rala_vit_nano", "--resolutions", "32", "--phases")
    run(tmp_path / "a", *words, "inference")
    run(tmp_path / "b", *words, "latency")
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["results.csv"]
    old = tmp_path / "old.csv"
    with open(old, "w", newline="") as file:
        [row] = rows(tmp_path / "a")
        del row["compiled"]
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerow(row)
    new = tmp_path / "b" / "results.csv"
    result = run(tmp_path / "c", "draw", str(old), str(new))
    assert result.exit_code == 0, result.output
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["models.png"]
    old.rename(tmp_path / "a" / "results.csv")
    assert run(tmp_path / "a", *words, "latency").exit_code == 0
    assert [(row["phase"], row["compiled"]) for row in rows(tmp_path / "a")] == [
        ("inference", ""),
        ("latency", ""),
    ]


def test_a_file_of_a_later_version_is_left_alone(tmp_path):
    words = ("models", "rala_vit_nano", "--resolutions", "32", "--phases", "latency")
    run(tmp_path, *words)
    file = tmp_path / "results.csv"
    head, *rest = file.read_text().splitlines()
    file.write_text("\n".join([f"{head},joules", *(f"{line},1" for line in rest), ""]))
    before = file.read_bytes()
    result = run(tmp_path, *words)
    assert result.exit_code == 2
    assert "joules" in result.output
    assert file.read_bytes() == before


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    result = run(tmp_path / "file", "models", "rala_vit_nano", "--resolutions", "32")
    assert result.exit_code == 2
    assert "File exists" in " ".join(result.output.replace("│", "").split())


def test_the_newest_row_of_a_measurement_is_drawn():
    figures = pytest.importorskip("linsight.tools.benchmark_figures")
    row = dict.fromkeys((*figures.KEY, "device", "dtype"), "x") | {"p50_ms": "1"}
    again = row | {"p50_ms": "2"}
    failed = row | {"p50_ms": ""}
    other = row | {"kind": "y"}
    elsewhere = row | {"device": "y"}
    assert figures.newest([elsewhere, row, again, failed, other], "x") == [again]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("models", "no_such_model"), "no_such_model"),
        (("operators", "no_such_operator"), "no_such_operator"),
        (("all", "rala_attention"), "operators"),
        (("--modes", "graph"), "GPU"),
        (("--modes", "captured"), "GPU"),
        (("models", "--modes", "eager,reduce-overhead"), "GPU"),
        (("models", "--phases", "multi-scale"), "detectors"),
        (("segmentors", "--phases", "multi-scale"), "detectors"),
        (("cold", "no_such_model"), "no_such_model"),
        (("cold", "--modes", "onnxruntime"), "models"),
        (("--modes", "onnxruntime", "--phases", "training"), "inference"),
        (("--modes", "egaer"), "egaer"),
        (("--resolutions", "224 512"), "224,512"),
        (("models", "--resolutions", "64x96"), "64x96"),
        (("segmentors", "rala_vit_nano_digits"), "ImageClassifier"),
        (("segmentors", "upernet_rala_vit_smal_160k_ade20k"), "upernet_rala_vit_small"),
        (("draw", "no/such.csv"), "no/such.csv"),
    ],
)
def test_mistakes_are_named(tmp_path, words, message):
    result = run(tmp_path, *words)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "results.csv").exists()


@pytest.mark.parametrize("device", ["cpuu", "cuda:99", "meta"])
def test_devices_that_cannot_be_timed(tmp_path, device):
    result = run(tmp_path, "operators", device=device)
    assert result.exit_code == 2
    assert device in result.output


def test_exported_models(tmp_path):
    """Beside eager PyTorch, each checked before it is timed."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    words = ("test_resnet", "--modes", "eager,onnxruntime", "--resolutions", "32")
    result = run(tmp_path, "models", *words, "--phases", "inference")
    assert result.exit_code == 0, result.output
    got = rows(tmp_path)
    assert [row["mode"] for row in got] == ["eager", "onnxruntime"]
    for row in got:
        assert row["check"] == "ok"
        assert float(row["p50_ms"]) > 0


def test_segmentors(tmp_path):
    """A segmentor on its own backbone and on one of timm, at a size that is not square."""
    words = ("segformer_rala_vit_nano_digits", "--peer", "resnet10t", "--resolutions", "32x64")
    result = run(tmp_path, "segmentors", *words)
    assert result.exit_code == 0, result.output
    got = rows(tmp_path)
    assert {row["check"] for row in got} == {"ok"}
    names = [f"Segformer {name}" for name in ("rala_vit_nano", "resnet10t")]
    assert [(row["phase"], row["name"], row["peer_of"]) for row in got] == [
        (phase, name, "" if name == names[0] else names[0])
        for phase in ("inference", "training")
        for name in names
    ]
    assert {row["shape"] for row in got} == {"2 x 32 x 64"}
    assert all(float(row["images_per_second"]) > 0 for row in got)


def test_default_batches_shrink_with_the_resolution():
    gpu = torch.device("cuda")
    sizes = (224, 512, 1024, 2048, 4096)
    batches = [benchmark_cases.default_batch("inference", size, gpu) for size in sizes]
    assert batches == [256, 48, 12, 1, 1]


def test_compilation_comes_last():
    modes = ["reduce-overhead", "eager", "graph", "compile", "captured"]
    phases = ["inference", "latency", "training"]
    setting = benchmark.Setting(CPU, "float32", modes, phases, [(32, 32)], None, 0.001)
    order = [row.mode for job in benchmark.plan("all", [], setting) for row in job.rows]
    compiled = [mode.startswith(("compile", "reduce")) for mode in order]
    assert compiled == sorted(compiled)
    assert set(order) == {*modes, "compile graph"}


def test_one_benchmark_measures_at_a_time():
    device, order = torch.device("cpu"), []
    inside, done = threading.Event(), threading.Event()

    def measure():
        inside.wait()
        with take_turn(device, alone=True):
            order.append("measured")
        done.set()

    thread = threading.Thread(target=measure)
    thread.start()
    with take_turn(device, alone=False), take_turn(device, alone=False):
        inside.set()
        assert not done.wait(0.3)
        order.append("built")
    thread.join()
    assert order == ["built", "measured"]


def test_times_of_the_clock():
    calls = []
    low, middle, high = quantiles(lambda: calls.append(0), CPU, 1e-4)
    assert 0 < low <= middle <= high
    assert len(calls) >= 3
    assert copies(1000, CPU) == 1
    assert copy_bandwidth(CPU, 1e-3) > 1e7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tmp_path):
    """Every mode runs for an operator and for a model."""
    modes = ("--modes", "eager,captured,graph,compile,reduce-overhead")
    phases = ("--phases", "inference,latency,training")
    for words in (("operators", "rala_*"), ("mixers", "mala"), ("models", "rala_vit_nano")):
        result = run(tmp_path, *words, "--resolutions", "64", *modes, *phases, device="cuda")
        assert result.exit_code == 0, result.output
    got = rows(tmp_path)
    assert {row["check"] for row in got} == {"ok"}
    assert {row["mode"] for row in got} == {*modes[1].split(","), "compile graph"}
    assert all(float(row["peak_mib"]) > 0 for row in got if row["phase"] != "backward")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cold_start_on_a_gpu(tmp_path):
    """A new resolution compiles less than the first, and a network of timm nothing."""
    words = ("rala_vit_nano", "test_convnext", "--resolutions", "64,96", "--phases", "training")
    result = run(tmp_path, "cold", *words, "--modes", "eager,captured", device="cuda")
    assert result.exit_code == 0, result.output
    got = rows(tmp_path)
    assert {row["check"] for row in got} == {"ok"}
    for first, second in (got[:2], got[4:6]):
        assert int(first["compiled"]) > int(second["compiled"])
    assert {row["compiled"] for row in got if row["peer_of"]} == {"0"}


def test_data(tiny, tmp_path):
    result = run(tmp_path, "data", str(tiny), "--batch", "2")
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert re.search(r"in the workers: [\d,]+ images/s per core", text)
    assert re.search(r"on the device: [\d,]+ images/s per core .* of 2 then takes [\d.]+ ms", text)


def test_data_of_a_config_without_files(tmp_path):
    result = run(tmp_path, "data", "rala_vit_nano_digits")
    assert result.exit_code == 2
    assert "DigitClassification" in result.output
