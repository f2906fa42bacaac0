"""Time operators, mixers and models against their peers: `linsight benchmark`."""

from __future__ import annotations

import gc
import platform
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import timm
import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

import linsight
from linsight.backbones.mixers import MIXERS
from linsight.kernels import force
from linsight.tools import benchmark_cases as cases
from linsight.tools.benchmark_cases import Case
from linsight.tools.benchmark_cold import ColdStart, Order
from linsight.tools.benchmark_exported import RUNTIMES, ExportedModel, missing
from linsight.tools.benchmark_measure import Model, Network, Operator, attempt
from linsight.tools.benchmark_results import WIDTH, Results, Row, print_row, read
from linsight.tools.benchmark_timing import copy_bandwidth, release, synchronize, take_turn

What = Literal[
    "all", "mixers", "models", "operators", "detectors", "segmentors", "cold", "data", "draw"
]
Mode = Literal[
    "eager",
    "captured",
    "graph",
    "compile",
    "reduce-overhead",
    "onnxruntime",
    "openvino",
    "aoti",
]
Phase = Literal["inference", "latency", "training", "multi-scale"]
# The modes of calling a module, in the order in which they are measured: what compiles for minutes
# comes last.
CALLS = ("eager", "captured", "compile", "reduce-overhead")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
RESULTS = "results.csv"
# Default resolutions on a GPU and on a CPU.
_RESOLUTIONS = {"detectors": ("800", "96"), "cold": ("224,256", "64,96")}


@dataclass(frozen=True)
class Job:
    """One module to build, check and measure, and the rows of its measurements."""

    build: Callable[[], Operator | Network | ColdStart]
    measure: Callable[[Any, Row], dict[str, Any]]
    reference: bool
    rows: list[Row]


@dataclass(frozen=True)
class Setting:
    """Settings of all jobs."""

    device: torch.device
    dtype: str
    modes: list[str]
    phases: list[str]
    sizes: list[tuple[int, int]]
    batch: int | None
    seconds: float
    references: bool = False
    peers: tuple[str, ...] = ()
    mixer: str | None = None

    @property
    def exported(self) -> list[str]:
        """The modes that run a file."""
        return [mode for mode in self.modes if mode in RUNTIMES]

    @property
    def resolutions(self) -> list[int]:
        """Sides of square images."""
        for height, width in self.sizes:
            if height != width:
                raise typer.BadParameter(f"--resolutions {height}x{width} is for segmentors")
        return [height for height, _ in self.sizes]

    def batches(self, kind: str) -> Iterator[tuple[int, int]]:
        """Each resolution with its batch size."""
        for resolution in self.resolutions:
            if kind == "latency":
                batch = 1
            else:
                batch = self.batch or cases.default_batch(kind, resolution, self.device)
            yield resolution, batch


def benchmark(
    what: Annotated[What, typer.Argument(help="'draw' draws CSVs again.")] = "all",
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Models by timm's names, operators and mixers by patterns such as 'rala_*', "
            "detectors, segmentors and data by configs; the CSVs of 'draw'. Default: linsight's "
            "small models and their peers, all operators."
        ),
    ] = None,
    resolutions: Annotated[
        str | None,
        typer.Option(
            help="Pixels per side, for segmentors also HEIGHTxWIDTH. Default: 224,512,1024; on a "
            "CPU 64,128."
        ),
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(help="A backbone to put into the same config, by timm's name; repeat it."),
    ] = None,
    mixer: Annotated[
        str | None,
        typer.Option(help="Token mixer that replaces those of linsight's models."),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Images; default: by resolution, as memory allows.")
    ] = None,
    modes: Annotated[
        str | None,
        typer.Option(
            help="Of eager,graph,compile, the default on a GPU, and of models "
            "captured,reduce-overhead. On a CPU eager,compile, and of models exported "
            "onnxruntime,openvino,aoti; default eager."
        ),
    ] = None,
    phases: Annotated[
        str,
        typer.Option(
            help="Of inference,training: forward, and forward with backward; latency: one image, "
            "awaited; multi-scale: training of detectors at changing sizes."
        ),
    ] = "inference,training",
    references: Annotated[
        bool,
        typer.Option(
            "--references", help="Each model of linsight beside itself in plain PyTorch, too."
        ),
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of operators, and of models' autocast. Default: bfloat16; CPU float32."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda:1; default: a GPU if there is one.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=1e-4, help="To repeat each measurement for.")] = 0.2,
    out: Annotated[
        Path, typer.Option(help="Folder of results.csv, which grows, and of the figures.")
    ] = Path("work_dirs/benchmark"),
) -> None:
    """Check and time operators, mixers and models beside their peers."""
    console = Console()
    if not console.is_terminal:  # a log has no width of its own
        console = Console(width=WIDTH)
    names = names or []
    if what == "draw":
        draw([Path(name) for name in names] or [out / RESULTS], out, console)
        return
    if what == "data":
        _data(names, _device(device), batch, seconds, console)
        return
    if what == "all" and names:
        raise typer.BadParameter("names need 'operators', 'mixers' or 'models' before them")
    if what == "detectors" and not names:
        raise typer.BadParameter("'detectors' needs the names of configs")
    if peer and what not in ("detectors", "segmentors"):
        raise typer.BadParameter("--peer is for 'detectors' and 'segmentors'")
    if mixer and (what not in ("models", "cold") or mixer not in MIXERS):
        known = ", ".join(MIXERS)
        raise typer.BadParameter(
            f"got {mixer!r}; --mixer is for 'models' and 'cold', and one of {known}"
        )
    place = _device(device)
    gpu = place.type == "cuda"
    setting = Setting(
        place,
        _words(dtype or ("bfloat16" if gpu else "float32"), "--dtype", tuple(DTYPES))[0],
        _words(
            modes or ("eager,graph,compile" if gpu and what != "cold" else "eager"),
            "--modes",
            get_args(Mode),
        ),
        _words(phases, "--phases", get_args(Phase)),
        _sizes(resolutions or _RESOLUTIONS.get(what, ("224,512,1024", "64,128"))[not gpu]),
        batch,
        seconds,
        references,
        tuple(peer or ()),
        mixer,
    )
    if "multi-scale" in setting.phases and what != "detectors":
        raise typer.BadParameter("--phases multi-scale is for 'detectors'")
    for mode in ("graph", "captured", "reduce-overhead"):
        if mode in setting.modes and not gpu:
            raise typer.BadParameter(f"--modes {mode} needs a GPU, the device is {place}")
    if exported := setting.exported:
        if what != "models" or gpu or setting.dtype != "float32" or "inference" not in phases:
            raise typer.BadParameter(
                f"--modes {','.join(exported)} is for 'models' on a CPU, in inference and float32"
            )
        for mode in exported:
            if names_missing := missing(mode):
                raise typer.BadParameter(f"--modes {mode} needs {', '.join(names_missing)}")
    jobs = list(plan(what, names, setting))
    if not jobs:
        called = f" is called {', '.join(names)}" if names else " is there"
        raise typer.BadParameter(f"nothing to measure{called} in these modes and phases")
    if gpu:
        torch.cuda.set_device(place.index or 0)
    # Each job ends with a garbage collection, which without a freeze would walk over all objects
    # of PyTorch.
    gc.collect()
    gc.freeze()
    try:
        run(jobs, setting, out / RESULTS, console)
    finally:
        gc.unfreeze()
        if (out / RESULTS).exists():
            draw([out / RESULTS], out, console)


def _data(
    names: list[str], device: torch.device, batch: int | None, seconds: float, console: Console
) -> None:
    from linsight.tools.benchmark_data import measure_data
    from linsight.tools.config import ConfigError

    if not names:
        raise typer.BadParameter("'data' needs the names of configs")
    console.print(f"{_device_name(device)}, {platform.processor() or platform.machine()}")
    try:
        for name in names:
            for line in measure_data(name, device, batch, seconds):
                console.print(line)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise typer.BadParameter(f"--device {name!r}: expected such as cpu or cuda:1") from error
    if device.type not in ("cpu", "cuda"):
        raise typer.BadParameter(f"--device {name}: only cpu and cuda are timed")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise typer.BadParameter(f"--device {name}: PyTorch sees no such GPU")
    return device


def _words(text: str, option: str, known: tuple[str, ...]) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word not in known:
            raise typer.BadParameter(f"{option} {word!r}: expected {', '.join(known)}")
    return words


def _sizes(text: str) -> list[tuple[int, int]]:
    try:
        sizes = [[int(side) for side in word.split("x")] for word in text.split(",")]
    except ValueError:
        sizes = [[]]
    if any(len(size) not in (1, 2) or min(size) < 1 for size in sizes):
        raise typer.BadParameter(
            f"--resolutions {text!r}: expected numbers such as 224,512 or 1024x2048"
        )
    return [(size[0], size[-1]) for size in sizes]


def plan(what: str, names: list[str], setting: Setting) -> Iterator[Job]:
    """All jobs. Those that compile for minutes come last, and operators come after models."""
    for call in CALLS:
        if call == "compile" and what == "models":
            yield from _exported_jobs(names or list(cases.MODELS), setting)
        plain = call in ("eager", "compile")
        if what in ("all", "mixers") and plain:
            yield from _operator_jobs(cases.mixers, names, call, setting)
        if what in ("all", "models"):
            yield from _model_jobs(names or list(cases.MODELS), call, setting)
        if what in ("detectors", "segmentors") and plain and call in setting.modes:
            yield from _config_jobs(what, names, call, setting)
        if what in ("all", "operators") and plain:
            yield from _operator_jobs(cases.operators, names, call, setting)
        if what == "cold" and call in setting.modes:
            yield from _cold_jobs(names or list(cases.MODELS), call, setting)


def _operator_jobs(
    make: Callable[[int, int], Iterator[Case]], names: list[str], call: str, setting: Setting
) -> Iterator[Job]:
    modes = _modes(call, setting)
    known = {"inference": "forward", "training": "forward+backward"}
    phases = [known[phase] for phase in setting.phases if phase in known]
    for resolution, batch in setting.batches("operators"):
        for case in cases.select(make(resolution, batch), names):
            # An operator is a kernel already, so that only its reference is worth compiling.
            if call == "compile" and case.kind == "operators" and case.name != "reference":
                continue
            rows = [_row(case, mode, phase, setting) for mode in modes for phase in phases]

            def build(case: Case = case) -> Operator:
                return Operator(case, DTYPES[setting.dtype], setting.device, call, setting.seconds)

            def measure(operator: Operator, row: Row) -> dict[str, Any]:
                return operator.measure(row.phase, row.mode.endswith("graph"))

            if rows:
                yield Job(build, measure, case.reference, rows)


def _modes(call: str, setting: Setting) -> list[str]:
    """The modes of the rows of a module that is called in one way."""
    modes = [call] if call in setting.modes else []
    if "graph" in setting.modes:
        if call == "eager":
            modes.append("graph")
        elif call == "compile" and modes:
            modes.append("compile graph")
    return modes


def _check_models(names: list[str]) -> None:
    for name in names:
        if not timm.is_model(name):
            raise typer.BadParameter(f"timm has no model {name!r}")


def _model_jobs(names: list[str], call: str, setting: Setting) -> Iterator[Job]:
    _check_models(names)
    for phase in setting.phases:
        for name in names:
            for case in _models(name, phase, setting):

                def build(case: Case = case, phase: str = phase) -> Model:
                    dtype = DTYPES[setting.dtype]
                    return Model(case, dtype, setting.device, call, setting.seconds, phase)

                def measure(model: Model, row: Row) -> dict[str, Any]:
                    return model.measure(row.mode.endswith("graph"))

                if rows := [_row(case, m, phase, setting) for m in _modes(call, setting)]:
                    yield Job(build, measure, case.reference, rows)


def _cold_jobs(names: list[str], call: str, setting: Setting) -> Iterator[Job]:
    _check_models(names)
    for phase in setting.phases:
        # A new resolution is to differ in nothing else, so the batch is the first one's.
        _, batch = next(setting.batches(phase))
        for name in names:
            how = setting.dtype, str(setting.device), call, phase
            order = Order(name, setting.mixer, setting.resolutions, batch, *how)

            def measure(start: ColdStart, row: Row) -> dict[str, Any]:
                return start.measure(row.resolution)

            rows = [_row(case, call, phase, setting) for case in order.cases()]
            yield Job(lambda order=order: ColdStart(order), measure, False, rows)


def _exported_jobs(names: list[str], setting: Setting) -> Iterator[Job]:
    for name in names:
        for resolution, batch in setting.batches("inference"):
            for mode in setting.exported:
                case = cases.model(name, resolution, batch, setting.mixer)

                def build(case: Case = case, mode: str = mode) -> Model:
                    how = torch.float32, setting.device, mode, setting.seconds, "inference"
                    return ExportedModel(case, *how)

                row = _row(case, mode, "inference", setting)
                yield Job(build, lambda model, row: model.measure(), False, [row])


def _models(name: str, phase: str, setting: Setting) -> Iterator[Case]:
    for resolution, batch in setting.batches(phase):
        case = cases.model(name, resolution, batch, setting.mixer)
        yield case
        if setting.references and not case.peer_of:
            yield replace(case, name=f"{name} reference", peer_of=name, reference=True)


def _config_jobs(what: str, names: list[str], call: str, setting: Setting) -> Iterator[Job]:
    from linsight.tools.config import ConfigError

    try:
        if what == "detectors":
            from linsight.tools import benchmark_detectors as dense

            usual: tuple[type[Network], Callable] = dense.Detector, dense.cases
            special = {"multi-scale": (dense.MultiScaleDetector, dense.multi_scale_cases)}
        else:
            from linsight.tools import benchmark_segmentors as dense

            usual, special = (dense.Segmentor, dense.cases), {}
    except ModuleNotFoundError as error:
        extra = {"detectors": "det", "segmentors": "train"}[what]
        raise typer.BadParameter(
            f"{what} need {error.name}: pip install 'linsight[{extra}]'"
        ) from None
    sizes = cast(tuple[Any, ...], setting.sizes if what == "segmentors" else setting.resolutions)
    for phase in setting.phases:
        network, make = special.get(phase, usual)
        batch = 1 if phase == "latency" else setting.batch or 2
        if call == "compile" and phase == "multi-scale":
            continue  # one program per size would be compiled
        for name in names:
            for size in sizes:
                try:
                    found = list(make(name, list(setting.peers), size, batch))
                except ConfigError as error:
                    raise typer.BadParameter(str(error)) from None
                for case in found:

                    def build(
                        case: Case = case, phase: str = phase, network: type[Network] = network
                    ) -> Network:
                        dtype = DTYPES[setting.dtype]
                        return network(case, dtype, setting.device, call, setting.seconds, phase)

                    row = _row(case, call, phase, setting)
                    yield Job(build, lambda network, row: network.measure(), False, [row])


def _row(case: Case, mode: str, phase: str, setting: Setting) -> Row:
    known = {
        field: getattr(case, field)
        for field in ("kind", "name", "peer_of", "resolution", "shape", "batch")
    }
    return Row(**known, mode=mode, phase=phase, dtype=setting.dtype)


def run(jobs: list[Job], setting: Setting, path: Path, console: Console) -> None:
    """Measure all jobs; print each row, and write it to the CSV, as soon as it is measured."""
    with take_turn(setting.device, alone=True):
        bandwidth = copy_bandwidth(setting.device, setting.seconds)
    console.print(f"{_device_name(setting.device)}: copies at {bandwidth / 1e12:.3f} TB/s")
    results = Results(path)
    before = len(results.rows)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
        console=console,
        # Cases differ much, so the speed is estimated over the whole run.
        speed_estimate_period=1e9,
    )
    origin = _origin(setting.device)
    print_row(console, None)
    with progress:
        task = progress.add_task("", total=sum(len(job.rows) for job in jobs))
        for job in jobs:
            first = job.rows[0]
            progress.update(task, description=f"{first.name} {first.mode} {first.resolution}")
            for row in results_of(job, bandwidth, setting):
                row = replace(row, **origin, date=_now())
                results.add(row)
                print_row(progress.console, row)
            progress.advance(task, len(job.rows))
            # After a fault that leaves the device unusable every further case would fail.
            synchronize(setting.device)
    if faults := sum(row["check"] != "ok" for row in results.rows[before:]):
        console.print(f"{faults} of {len(results.rows) - before} rows are not as they should be")
    console.print(f"Results: {path}")


def results_of(job: Job, bandwidth: float, setting: Setting) -> Iterator[Row]:
    """The rows of a job with times, or with the reason why there are none."""
    release()
    medians: dict[tuple[str, str], float] = {}
    # What compiles for minutes leaves the device to others.
    compiles = job.rows[0].mode.startswith(("compile", "reduce-overhead"))
    with force("reference") if job.reference else nullcontext():
        with nullcontext() if compiles else take_turn(setting.device, alone=False):
            subject, fault = attempt(job.build)
        for row in job.rows:
            values, reason = None, fault
            if not fault:
                with take_turn(setting.device, alone=True):
                    values, reason = attempt(lambda row=row: job.measure(subject, row))
            if values is None:
                yield replace(row, check=reason)
                continue
            row = replace(row, **values)
            medians[row.mode, row.phase] = cast(float, row.p50_ms)
            yield _compare_with_floor(row, subject.case, bandwidth, setting)
            whole = medians.get((row.mode, "forward+backward"), 0.0)
            half = medians.get((row.mode, "forward"))
            if half and whole > half:
                empty = dict.fromkeys(("p20_ms", "p80_ms", "peak_mib"))
                rest = replace(row, phase="backward", p50_ms=whole - half, **empty)
                yield _compare_with_floor(rest, subject.case, bandwidth, setting)


def _compare_with_floor(row: Row, case: Case, bandwidth: float, setting: Setting) -> Row:
    if case.moved is None:
        return row
    forward, backward = case.moved
    elements = {"forward": forward, "backward": backward}.get(row.phase, forward + backward)
    floor = 1e6 * elements * DTYPES[setting.dtype].itemsize / bandwidth
    return replace(row, floor_us=floor, fraction=floor / (1e3 * cast(float, row.p50_ms)))


def draw(paths: list[Path], folder: Path, console: Console) -> None:
    """Draw figures from the newest row of each measurement in the CSVs."""
    rows = [row for path in paths for row in read(path)]
    try:
        from linsight.tools.benchmark_figures import draw_models, draw_operators
    except ModuleNotFoundError as error:
        console.print(f"No figures: they need {error.name}, pip install 'linsight\\[train]'")
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name, function in (("models", draw_models), ("operators", draw_operators)):
        if (figure := function(rows)) is not None:
            figure.savefig(folder / f"{name}.png", dpi=150)
            console.print(f"Figure: {folder / name}.png")


def _origin(device: torch.device) -> dict[str, str]:
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = ""
    return {
        "device": _device_name(device),
        "torch": torch.__version__,
        "triton": triton,
        "timm": timm.__version__,
        "linsight": linsight.__version__,
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


if __name__ == "__main__":
    typer.run(benchmark)
