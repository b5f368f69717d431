"""The results as one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas

from benchmarks.report import Figure, figures

__all__ = ["draw"]

_OURS: Final = "gpuremote"
_BLUES: Final = ("#1f6fb4", "#6aa9d8", "#b3d3ec")
_GREYS: Final = ("#6f6f6f", "#a8a8a8", "#d6d6d6")

_Series = Sequence[tuple[str, str, str]]
_PANELS: Final[tuple[tuple[str, str, _Series], ...]] = (
    (
        "Round trip of 8 B",
        "µs, less is better",
        [
            ("both on one core", "round_trip/8B/one", "us"),
            ("on two cores", "round_trip/8B/two", "us"),
        ],
    ),
    (
        "10,000 small ops or messages, then one answer",
        "µs per op, less is better",
        [
            ("until all are issued", "ops/64B/two", "issue_us_per_op"),
            ("until the answer", "ops/64B/two", "total_us_per_op"),
        ],
    ),
    (
        "Throughput of large arrays",
        "GB/s, more is better",
        [
            ("put of {text}", "put/{size}", "gb_per_s"),
            ("get of {text}", "get/{size}", "gb_per_s"),
        ],
    ),
    (
        "CPU time per GB",
        "seconds on the side named, less is better",
        [
            ("put of {text}, client", "put/{size}", "client_cpu_s_per_gb"),
            ("put of {text}, peer", "put/{size}", "peer_cpu_s_per_gb"),
        ],
    ),
)


def draw(results: Mapping[str, Any], paths: Sequence[Path]) -> None:
    """Write the picture to each of ``paths``, in the format of its suffix."""
    found = figures(results)
    titles = {contender["name"]: contender["title"] for contender in results["contenders"]}
    size = next(
        (s for s in ("256MiB", "64MiB", "8MiB") if any(w == f"put/{s}" for w, _, _ in found)),
        "1MiB",
    )
    # The same results give the same bytes, so that a repository sees what changed.
    with mpl.rc_context({"svg.hashsalt": "gpuremote", "svg.fonttype": "none"}):
        canvas = Canvas(figsize=(12, 8.5), layout="constrained")
        FigureCanvasAgg(canvas)
        for axes, (title, unit, series) in zip(canvas.subplots(2, 2).flat, _PANELS, strict=True):
            named = [
                tuple(part.format(size=size, text=size.replace("MiB", " MiB")) for part in one)
                for one in series
            ]
            _panel(axes, title, unit, named, titles, found)  # type: ignore[arg-type]
        canvas.suptitle(_caption(results), fontsize=9, color="#444444")
        for path in paths:
            metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
            canvas.savefig(path, dpi=110, metadata=metadata)


def _panel(
    axes: Axes,
    title: str,
    unit: str,
    series: _Series,
    titles: Mapping[str, str],
    found: Mapping[tuple[str, str, str], Figure],
) -> None:
    names: list[str] = [
        name
        for name in reversed(list(titles))
        # A copy inside one process makes no round trip that the others could be held against.
        if any((workload, name, metric) in found for _, workload, metric in series)
        and not (name == "memcpy" and "us" in series[0][2])
    ]
    height = 0.8 / len(series)
    for index, (label, workload, metric) in enumerate(series):
        for row, name in enumerate(names):
            figure = found.get((workload, name, metric))
            if figure is None:
                continue
            middle = row + 0.4 - height * (index + 0.5)
            colours = _BLUES if name.startswith(_OURS) else _GREYS
            axes.barh(middle, figure.median, height * 0.92, color=colours[index])
            axes.plot([figure.low, figure.high], [middle, middle], color="#222222", linewidth=0.8)
        # For the legend only: one colour stands for the series of both kinds.
        axes.barh(0, 0, color=_GREYS[index], label=label)
    axes.set_yticks(range(len(names)), [titles[name] for name in names], fontsize=8)
    axes.set_title(title, fontsize=10, loc="left", fontweight="bold")
    axes.set_xlabel(unit, fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlim(0, _reach(names, series, found))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.11))


def _reach(
    names: Sequence[str], series: _Series, found: Mapping[tuple[str, str, str], Figure]
) -> float:
    """Room for every median; a single slow round may run out of the picture."""
    medians = [
        found[workload, name, metric].median
        for name in names
        for _, workload, metric in series
        if (workload, name, metric) in found
    ]
    return 1.25 * max(medians, default=1.0) or 1.0


def _caption(results: Mapping[str, Any]) -> str:
    machine = results["machine"]
    return (
        f"medians of {results['rounds']} interleaved rounds, lines: lowest to highest round; "
        f"two processes on {machine['cpus']} × {machine['processor']}, {machine['kernel']}, "
        f"{machine['python']}"
    )
