"""What the benchmarks share: rounds in which the contenders take turns, medians with their spread, tables."""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType

import attrs
from rich.console import Console
from rich.table import Table
from rich.text import Text

#: What one turn of a contender measured, by name of the measure.
Measures = Mapping[str, float]


@attrs.frozen
class Mode:
    """How long to measure; *smoke* only shows that everything runs, its figures mean nothing."""

    name: str
    rounds: int

    @property
    def smoke(self) -> bool:
        return self.name == "smoke"

    @property
    def full(self) -> bool:
        return self.name == "full"

    def pick(self, *, smoke: int, quick: int, full: int) -> int:
        """A number that depends on the mode."""
        return {"smoke": smoke, "quick": quick, "full": full}[self.name]


MODES = {mode.name: mode for mode in (Mode("smoke", 1), Mode("quick", 7), Mode("full", 15))}


@attrs.frozen
class Contender:
    """Somebody who takes part: *turn* does the work once and tells what it cost."""

    name: str
    turn: Callable[[], Measures]


@attrs.frozen
class Row:
    """One line of a table: two contenders by one measure, round by round, so that a ratio is of one round."""

    what: str
    ours: Sequence[float]
    against: str = ""
    theirs: Sequence[float] = ()
    #: "s": seconds, printed in a unit that suits; else printed behind the number.
    unit: str = "s"
    #: Largest ratio (without *theirs*: largest value) that is aimed at; with *at_least* the smallest.
    target: float | None = None
    at_least: bool = False

    @property
    def ratios(self) -> list[float]:
        if not self.theirs:
            return []
        return [mine / other for mine, other in zip(self.ours, self.theirs, strict=True) if other > 0]

    @property
    def ratio(self) -> float | None:
        return statistics.median(self.ratios) if self.ratios else None

    @property
    def verdict(self) -> str:
        if self.target is None:
            return ""
        reached = self.ratio if self.theirs else statistics.median(self.ours)
        limit = f"{self.target:.3g}" if self.theirs else quantity(self.target, self.unit)
        met = reached is not None and (reached >= self.target if self.at_least else reached <= self.target)
        return f"{'≥' if self.at_least else '≤'} {limit}: {'met' if met else 'missed'}"

    def cells(self) -> list[str]:
        """As they are printed: what, against, ours, theirs, ratio, spread, target."""
        spread = span(self.ratios, number) if self.theirs else span(self.ours, lambda v: quantity(v, self.unit))
        return [
            self.what,
            self.against or "—",
            quantity(statistics.median(self.ours), self.unit),
            quantity(statistics.median(self.theirs), self.unit) if self.theirs else "—",
            number(self.ratio) if self.ratio is not None else "—",
            spread,
            self.verdict,
        ]


HEADINGS = ("what", "against", "ours", "theirs", "ratio", "spread (min–max)", "target")


@attrs.frozen
class Report:
    """What one benchmark found."""

    rows: Sequence[Row]
    #: What a reader must know to read the rows: what was left out, what else was seen.
    notes: Sequence[str] = ()


def take_turns(contenders: Sequence[Contender], rounds: int, *, warm: bool = True) -> dict[str, list[Measures]]:
    """
    Let the contenders take turns, *rounds* times; their measures by name, in the order of the rounds.

    Each round begins with another contender, so that nobody always comes first, or always behind the same one.
    With *warm* one round more is made, and thrown away: it makes connections, threads and caches.
    """
    if warm:
        for contender in contenders:
            contender.turn()
    found: dict[str, list[Measures]] = {contender.name: [] for contender in contenders}
    for turn in range(rounds):
        first = turn % len(contenders)
        for contender in (*contenders[first:], *contenders[:first]):
            gc.collect()  # nobody pays for what another one left behind
            found[contender.name].append(contender.turn())
    return found


def column(found: Mapping[str, Sequence[Measures]], name: str, measure: str) -> list[float]:
    """One measure of one contender, round by round."""
    return [measures[measure] for measures in found[name]]


def timed(work: Callable[[], object], units: int = 1) -> Measures:
    """Wall-clock and processor seconds of this process (all its threads) for *work*, per unit of it."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return {"wall": (time.perf_counter() - wall) / units, "cpu": (time.process_time() - cpu) / units}


# -- peers and surroundings ------------------------------------------------------------------------------------


def peer(name: str) -> ModuleType | None:
    """A package of the extra ``bench``; None where it is not installed, and then the others go on without it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def missing(name: str, extra: str = "bench") -> str:
    """The note about a peer that is not there."""
    return f"{name} is not installed and was left out: pip install 'gpupool-sync[{extra}]'"


def clean_environment() -> None:
    """Forget settings of whoever starts this: they would change what is measured, and proxies whom we ask."""
    for key in list(os.environ):
        if key.startswith(("GPU_", "CUDA_")) or key.lower().endswith("_proxy"):
            del os.environ[key]


def parent_of_locks() -> str | None:
    """
    Where the files of locks go, ours and those of peers: on a tmpfs, as ``/run/lock`` is where there is systemd.

    None: there is none here, so the usual directory for temporary files.
    """
    with contextlib.suppress(OSError), open("/proc/mounts") as mounts:
        for line in mounts:
            _, where, kind, *_ = line.split()
            if where in ("/run/lock", "/dev/shm") and kind == "tmpfs" and os.access(where, os.W_OK):
                return where
    return None


def room_for_files(number: int) -> bool:
    """Let this process, and the children it starts from now on, open *number* files; whether that is allowed."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= number:
        return True
    if hard != resource.RLIM_INFINITY and hard < number:
        return False
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
    return True


def cores() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine(packages: Sequence[str]) -> str:
    """What the figures were measured on, without a name or a date."""
    release = ".".join(platform.release().split(".")[:2])
    versions = []
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return f"{cores()} cores, {platform.system()} {release}, {python}; {', '.join(versions)}"


def say(text: str) -> None:
    """Progress, beside the result."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def patched(owner: object, name: str, value: object) -> Iterator[None]:
    """Replace an attribute for the block."""
    before = getattr(owner, name, None)
    there = hasattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if there:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


# -- printing --------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Three significant digits."""
    if value == 0 or not abs(value) < float("inf"):
        return f"{value:g}"
    digits = 2
    size = abs(value)
    while size >= 10 and digits:
        size /= 10
        digits -= 1
    while 0 < size < 0.995 and digits < 6:
        size *= 10
        digits += 1
    return f"{value:.{digits}f}"


def quantity(value: float, unit: str) -> str:
    """A number with its unit; seconds in the one that suits."""
    if unit != "s":
        return f"{number(value)} {unit}".strip()
    for size, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(value) >= 0.9995 * size:
            return f"{number(value / size)} {name}"
    return f"{number(value * 1e9)} ns"


def span(values: Sequence[float], show: Callable[[float], str]) -> str:
    """The smallest and the largest."""
    if not values:
        return "—"
    if len(values) == 1:
        return "one round"
    return f"{show(min(values))}–{show(max(values))}"


def print_report(title: str, report: Report) -> None:
    """The table on standard output."""
    table = Table(title=title, title_justify="left", title_style="bold")
    with_target = any(row.verdict for row in report.rows)
    headings = HEADINGS if with_target else HEADINGS[:-1]
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if 2 <= index <= 5 else "left", overflow="fold")
    for row in report.rows:
        style = "red" if "missed" in row.verdict else ""
        table.add_row(*row.cells()[: len(headings)], style=style)
    # Without a terminal rich assumes 80 columns, which would fold every cell.
    console = Console() if sys.stdout.isatty() else Console(width=150)
    console.print(table)
    for note in report.notes:
        console.print(Text("  " + note))
    console.print()


def markdown(report: Report) -> str:
    """The table for ``docs/performance.md``."""
    with_target = any(row.verdict for row in report.rows)
    headings = HEADINGS if with_target else HEADINGS[:-1]
    aligned = ["---:" if 2 <= index <= 5 else "---" for index in range(len(headings))]
    lines = [_line(headings), _line(aligned)]
    lines += [_line(row.cells()[: len(headings)]) for row in report.rows]
    if report.notes:
        lines += ["", *(f"* {note}" for note in report.notes)]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def between_marks(text: str, name: str, content: str) -> str:
    """
    *text* with what stands between the marks of *name* replaced.

    Raises:
        ValueError: the marks are missing; nothing is guessed about where the figures belong.
    """
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    head, found_begin, rest = text.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"the marks {begin} and {end} are missing")
    return f"{head}{begin}\n{content}\n{end}{tail}"
