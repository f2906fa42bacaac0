"""The two figures of `linsight benchmark`, drawn from the rows of its CSV."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

Rows = list[dict[str, str]]

# The columns that identify a measurement. Of rows that agree in all of them the newest counts.
KEY = ("kind", "name", "peer_of", "mode", "phase", "shape", "batch")
LINES = {"eager": "--", "captured": ":", "compile": "-"}
PHASES = ("inference", "training")
PANELS: tuple[tuple[str, str, Callable[[dict[str, str]], float | None]], ...] = (
    ("throughput", "images/s", lambda row: _number(row, "images_per_second")),
    (
        "time per pixel",
        "ns",
        lambda row: 1e9 / (float(row["images_per_second"]) * int(row["resolution"]) ** 2),
    ),
    (
        "memory per image",
        "MiB",
        lambda row: memory / int(row["batch"]) if (memory := _number(row, "peak_mib")) else None,
    ),
)
COLORS = {
    "linsight": "#2166ac",
    "linsight compiled": "#67a9cf",
    "reference": "0.75",
    "reference compiled": "0.45",
    "softmax": "#d95f02",
    "softmax compiled": "#fdb863",
}


def _number(row: dict[str, str], field: str) -> float | None:
    return float(row[field]) if row[field] else None


def newest(rows: Rows, *kinds: str) -> Rows:
    """The last row with a time of each measurement of these kinds.

    A figure must not mix devices or dtypes, so only rows that share those of the last row are
    returned.
    """
    rows = [row for row in rows if row["kind"] in kinds and row["p50_ms"]]
    same = [row for row in rows if all(row[k] == rows[-1][k] for k in ("device", "dtype"))]
    return list({tuple(row[k] for k in KEY): row for row in same}.values())


def draw_models(rows: Rows) -> Figure | None:
    """Throughput, time per pixel and memory of models over the resolution.

    Args:
        rows: rows of the CSV, the newest last.

    Returns:
        The figure, or None if there are no rows of models.
    """
    rows = [row for row in newest(rows, "models") if row["phase"] in PHASES]
    if not rows:
        return None
    phases = [phase for phase in PHASES if _rows_where(rows, phase=phase)]
    names = list(dict.fromkeys(row["name"] for row in rows))
    figure = Figure(figsize=(14, 4 * len(phases) + 0.6), layout="constrained")
    panels = [panel for panel in PANELS if any(panel[2](row) is not None for row in rows)]
    grid = figure.subplots(len(phases), len(panels), squeeze=False)
    for line, phase in zip(grid, phases, strict=True):
        for axes, (title, unit, value) in zip(line, panels, strict=True):
            _panel(axes, _rows_where(rows, phase=phase), names, value)
            axes.set(title=f"{phase}: {title}", ylabel=unit, xlabel="pixels per side")
    handles = {}
    for axes in grid.flat:
        handles.update(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(_title(rows))
    return figure


def _rows_where(rows: Rows, **wanted: str) -> Rows:
    return [row for row in rows if all(row[k] == v for k, v in wanted.items())]


def _panel(axes: Axes, rows: Rows, names: list[str], value: Callable) -> None:
    colors = colormaps["tab10"]
    sizes = sorted({int(row["resolution"]) for row in rows})
    for i, name in enumerate(names):
        own = not next((row["peer_of"] for row in rows if row["name"] == name), "")
        for mode, style in LINES.items():
            points = sorted(
                (int(row["resolution"]), y)
                for row in _rows_where(rows, name=name, mode=mode)
                if (y := value(row)) is not None
            )
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    style,
                    marker="o" if own else ".",
                    color=colors(i % 10),
                    linewidth=2.2 if own else 1.3,
                    label=f"{name}, {mode}",
                )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, map(str, sizes))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)


def draw_operators(rows: Rows) -> Figure | None:
    """The share of a copy's bandwidth that operators and mixers reach, as a bar chart.

    Each bar shows the fastest way of calling, a CUDA graph where one was measured.

    Args:
        rows: rows of the CSV, the newest last.

    Returns:
        The figure, or None if there are no rows of operators or mixers.
    """
    rows = newest(rows, "operators", "mixers")
    if not rows:
        return None
    phases = [p for p in ("forward", "forward+backward") if _rows_where(rows, phase=p)]
    sizes = {_place(row): (row["peer_of"] or row["name"], int(row["resolution"])) for row in rows}
    places = sorted(sizes, key=lambda place: (sizes[place], place))
    thick = 0.9 / len(COLORS)
    figure = Figure(figsize=(7 * len(phases), 0.5 * len(places) + 1.5), layout="constrained")
    panels = figure.subplots(1, len(phases), sharey=True, squeeze=False)[0]
    for axes, phase in zip(panels, phases, strict=True):
        bars = _bars(_rows_where(rows, phase=phase))
        for i, (label, color) in enumerate(COLORS.items()):
            here = {place: 100 * share for (got, place), share in bars.items() if got == label}
            heights = [places.index(place) + thick * (i - 2.5) for place in here]
            axes.barh(heights, list(here.values()), thick, color=color, label=label)
        axes.axvline(100, color="0.4", linewidth=0.8)
        axes.set(title=phase, xlabel="% of the bytes' floor")
        axes.set_xlim(0, max(105, axes.get_xlim()[1]))
        axes.set_yticks(range(len(places)), places, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.25)
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(_title(rows))
    return figure


def _place(row: dict[str, str]) -> str:
    return f"{row['peer_of'] or row['name']}  {row['shape']}"


def _bars(rows: Rows) -> dict[tuple[str, str], float]:
    """The largest fraction over all modes, by label and place."""
    bars: dict[tuple[str, str], float] = {}
    for row in rows:
        label = "linsight" if not row["peer_of"] else "softmax"
        if row["name"] == "reference":
            label = "reference"
        if row["mode"].startswith("compile"):
            label += " compiled"
        key = label, _place(row)
        bars[key] = max(bars.get(key, 0.0), float(row["fraction"]))
    return bars


def _title(rows: Rows) -> str:
    last = rows[-1]
    return f"{last['device']}, {last['dtype']}, torch {last['torch']}, {last['date'][:10]}"
