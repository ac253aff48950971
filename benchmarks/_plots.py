"""The plots of ``docs/scale.md``, of what ``python -m benchmarks.simulate --json`` wrote."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

DIRECTORY = Path(__file__).resolve().parent.parent / "docs"
COLOURS = {"availability": "#1f77b4", "strict": "#d62728"}

Rows = Sequence[Mapping[str, Any]]


def draw(results: Mapping[str, Rows], directory: Path = DIRECTORY) -> list[Path]:
    """Write the plots; their paths."""
    made = []
    for name, plot in (("claims", _claims), ("waits", _waits), ("load", _load)):
        figure, axes = pyplot.subplots(figsize=(6.4, 3.4))
        plot(axes, results)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=7, loc="lower left" if name == "waits" else "best")
        figure.tight_layout()
        path = directory / f"scale-{name}.png"
        figure.savefig(path, dpi=90)
        pyplot.close(figure)
        made.append(path)
    return made


def _medians(rows: Rows, key: Callable[[Mapping[str, Any]], Any], value: str) -> dict[Any, float]:
    found: dict[Any, list[float]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row[value])
    return {at: statistics.median(values) for at, values in sorted(found.items())}


def _claims(axes: Any, results: Mapping[str, Rows]) -> None:
    for strategy in ("strict", "availability"):
        rows = [row for row in results["strategies"] if row["strategy"] == strategy]
        told = _medians(rows, lambda row: row["duration"], "claims_per_grant")
        name = "most available first, always" if strategy == "strict" else "availability"
        axes.plot(list(told), list(told.values()), "o-", color=COLOURS[strategy], label=name)
    axes.plot([10, 60, 600], [2.5, 1.5, 1.1], "k_", markersize=14, label="target")
    axes.set(
        xscale="log",
        xticks=[10, 60, 600],
        xlabel="mean duration of a job, s",
        ylabel="claims per grant",
        ylim=(0, None),
    )
    axes.set_xticklabels(["10", "60", "600"])
    axes.set_title(f"{results['strategies'][0]['gpus']} GPUs, 95 % load, readings up to 5 s old", fontsize=10)


def _waits(axes: Any, results: Mapping[str, Rows]) -> None:
    for duration in sorted({row["duration"] for row in results["waiting"]}):
        rows = [row for row in results["waiting"] if row["duration"] == duration]
        ours = _medians(rows, lambda row: row["endpoints"], "wait_p99")
        ideal = _medians(rows, lambda row: row["endpoints"], "ideal_p99")
        (line,) = axes.plot(list(ours), list(ours.values()), "o-", label=f"jobs of {duration:.0f} s")
        axes.plot(list(ideal), list(ideal.values()), "x--", color=line.get_color(), label="the same, one central queue")
    axes.set(xscale="log", yscale="log", xlabel="servers of 8 GPUs", ylabel="wait, p99, s")
    sizes = sorted({row["endpoints"] for row in results["waiting"]})
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_title("95 % load", fontsize=10)


def _load(axes: Any, results: Mapping[str, Rows]) -> None:
    rows = results["load"]
    for value, style, name in (("wait_p99", "o-", "p99"), ("ideal_p99", "x--", "p99, one central queue")):
        told = _medians(rows, lambda row: 100 * row["load"], value)
        axes.plot(list(told), [max(0.001, each) for each in told.values()], style, label=name)
    axes.set(yscale="log", xlabel="load, %", ylabel="wait, s")
    axes.set_title(f"{rows[0]['gpus']} GPUs, jobs of {rows[0]['duration']:.0f} s", fontsize=10)
