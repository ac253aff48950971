"""``python -m benchmarks``: run them, print the tables, on request write them into ``docs/performance.md``."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._harness import MODES, Report, between_marks, clean_environment, machine, markdown, print_report, say

#: Modules of this package with a `TITLE` and a `run(mode)`, in the order of the tables.
NAMES = ("sweep", "endpoints", "inprocess", "handover", "fairness", "import_time")
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
PACKAGES = ("requests", "urllib3", "aiohttp", "psycopg-pool", "sqlalchemy", "attrs")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quick", dest="mode", action="store_const", const="quick", help="a few minutes (default)")
    how.add_argument("--full", dest="mode", action="store_const", const="full", help="more rounds: some ten minutes")
    how.add_argument("--smoke", dest="mode", action="store_const", const="smoke", help="only show that they run")
    parser.add_argument("--only", action="append", choices=NAMES, help="this one (may be repeated)")
    parser.add_argument("--markdown", action="store_true", help=f"also write the tables into docs/{DOCUMENT.name}")
    options = parser.parse_args(arguments)
    mode = MODES[options.mode or "quick"]
    if options.markdown and mode.smoke:
        parser.error("--smoke measures nothing that a document should say")

    clean_environment()
    begin = time.monotonic()
    told = machine(PACKAGES)
    print(told, end="\n\n")
    for name in options.only or NAMES:
        module: Any = importlib.import_module(f"benchmarks.{name}")
        report: Report = module.run(mode)
        print_report(f"{module.TITLE} ({name})", report)
        if options.markdown:
            # Each at once, so that an interrupt loses one and not all.
            content = f"{mode.name.capitalize()} run, {mode.rounds} rounds unless said otherwise.\n\n{markdown(report)}"
            text = between_marks(DOCUMENT.read_text(), name, content)
            DOCUMENT.write_text(between_marks(text, "machine", f"Measured with {told}."))
    say(f"{time.monotonic() - begin:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
