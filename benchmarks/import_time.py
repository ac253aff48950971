"""``from gpupool_sync import GPUPool`` beside ``import requests``: fresh interpreters, byte code cached, bare one off.

The pool imports its heavy parts (requests among them) at first use; this is what a script, or a worker process of a
pool, pays that only imports it.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import gpupool_sync
from benchmarks._harness import Contender, Measures, Mode, Report, Row, column, say, take_turns

TITLE = "Importing it"

TARGET = 0.8
#: Seconds after which an interpreter is killed: a bound, no measure.
TIMEOUT = 60.0

PROGRAMS = {
    "bare": "pass",
    "ours": "from gpupool_sync import GPUPool",
    "requests": "import requests",
}


def run(mode: Mode) -> Report:
    """Each turn is the median of several interpreters."""
    say("import_time")
    with tempfile.TemporaryDirectory() as directory:
        surroundings = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        # Byte code in a place of our own, which the round for warming up fills; wherever PYTHONDONTWRITEBYTECODE is
        # set, every import would compile. The path, because an editable install is found by a hook that costs more.
        surroundings |= {
            "PYTHONPYCACHEPREFIX": directory,
            "PYTHONPATH": str(Path(gpupool_sync.__file__).resolve().parent.parent),
        }
        starts = mode.pick(smoke=1, quick=5, full=7)
        contenders = [
            Contender(name, _turn(program, directory, surroundings, starts)) for name, program in PROGRAMS.items()
        ]
        found = take_turns(contenders, mode.rounds)
    rows = []
    for measure, what in (("wall", "time"), ("cpu", "processor time")):
        bare = column(found, "bare", measure)
        ours, theirs = (
            # In smoke mode noise may make a difference negative.
            [max(1e-9, value - base) for value, base in zip(column(found, name, measure), bare, strict=True)]
            for name in ("ours", "requests")
        )
        rows.append(
            Row(f"import, {what}", ours, "import requests", theirs, target=TARGET if measure == "wall" else None)
        )
    return Report(rows)


def _turn(program: str, directory: str, surroundings: dict[str, str], starts: int) -> Callable[[], Measures]:
    def start() -> tuple[float, float]:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        begin = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-c", program], cwd=directory, env=surroundings)
        watch = threading.Timer(TIMEOUT, process.kill)
        watch.daemon = True
        watch.start()
        # Not wait(timeout=…): that looks again after pauses which double, and the time would come out in their steps.
        status = process.wait()
        wall = time.perf_counter() - begin
        watch.cancel()
        if status:
            raise RuntimeError(f"{program!r} ended with {status}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def turn() -> Measures:
        walls, cpus = zip(*(start() for _ in range(starts)), strict=True)
        return {"wall": statistics.median(walls), "cpu": statistics.median(cpus)}

    return turn
