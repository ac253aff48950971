"""``python -m benchmarks``: run them, print the tables, on request write them into ``docs/performance.md``."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from benchmarks._harness import (
    MODES,
    Mode,
    Report,
    Row,
    between_marks,
    clean_environment,
    machine,
    markdown,
    print_report,
    say,
)

#: Modules of this package with a `TITLE` and a `run(mode)`, in the order of the tables.
NAMES = (
    "inprocess",
    "handover",
    "host_store",
    "wakeup",
    "fairness",
    "redis_store",
    "server_leases",
    "sweep",
    "freshness",
    "endpoints",
    "serving",
    "waiting",
    "bookkeeping",
    "import_time",
)
#: The table of all rows with a target; it is written when all benchmarks ran.
TARGETS = "targets"
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
PACKAGES = (
    *("requests", "urllib3", "attrs", "uvicorn", "httptools", "uvloop", "starlette", "fastapi", "redis"),
    *("aiohttp", "psycopg-pool", "sqlalchemy", "filelock", "waitress", "ray"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quick", dest="mode", action="store_const", const="quick", help="under ten minutes (default)")
    how.add_argument("--full", dest="mode", action="store_const", const="full", help="more rounds: half an hour")
    how.add_argument("--smoke", dest="mode", action="store_const", const="smoke", help="only show that they run")
    parser.add_argument("--only", action="append", choices=NAMES, help="this one (may be repeated)")
    parser.add_argument("--rounds", type=int, help="so many rounds instead of those of the mode")
    parser.add_argument("--markdown", action="store_true", help=f"also write the tables into docs/{DOCUMENT.name}")
    options = parser.parse_args(arguments)
    mode = MODES[options.mode or "quick"]
    if options.markdown and (mode.smoke or options.rounds is not None):
        parser.error("--smoke and --rounds measure nothing that a document should say")
    if options.rounds is not None:
        mode = attrs.evolve(mode, rounds=max(1, options.rounds))

    clean_environment()
    # Endpoints that fail are what some of them are about.
    ours = logging.getLogger("gpupool_sync")
    before = ours.level
    ours.setLevel(logging.ERROR)
    try:
        return _measure(options.only or NAMES, mode, summarise=not options.only, write=options.markdown)
    finally:
        ours.setLevel(before)


def _measure(names: Sequence[str], mode: Mode, *, summarise: bool, write: bool) -> int:
    begin = time.monotonic()
    told = machine(PACKAGES)
    print(told, end="\n\n")
    aimed: list[Row] = []
    took: list[str] = []
    for name in names:
        module: Any = importlib.import_module(f"benchmarks.{name}")
        started = time.monotonic()
        report: Report = module.run(mode)
        took.append(f"{name} {time.monotonic() - started:.0f} s")
        print_report(f"{module.TITLE} ({name})", report)
        aimed += [attrs.evolve(row, what=f"{module.TITLE}: {row.what}") for row in report.rows if row.verdict]
        if write:
            # Each at once, so that an interrupt loses one and not all.
            _write(name, report, mode, told)
    if summarise:
        summary = Report(aimed)
        print_report(f"All targets ({TARGETS})", summary)
        if write:
            _write(TARGETS, summary, mode, told)
    say(f"{', '.join(took)}; {time.monotonic() - begin:.0f} s in all")
    return 0


def _write(name: str, report: Report, mode: Mode, told: str) -> None:
    content = f"{mode.name.capitalize()} run, {mode.rounds} rounds unless said otherwise.\n\n{markdown(report)}"
    text = between_marks(DOCUMENT.read_text(), name, content)
    DOCUMENT.write_text(between_marks(text, "machine", f"Measured with {told}."))


if __name__ == "__main__":
    sys.exit(main())
