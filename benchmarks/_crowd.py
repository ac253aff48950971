"""Processes that contend for the same things, turn by turn: they live from the first round to the last."""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from typing import Any

#: Seconds after which a process that does not answer is given up: a bound, no measure.
TIMEOUT = 60.0

#: What a process does again and again: wait for a thing, and hold it for the block.
Take = Callable[[], AbstractContextManager[object]]

#: Clean processes, as with "spawn", of a server that has imported all that is slow to import once for all of them.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["benchmarks._cards", "gpupool_sync.pool", "gpupool_sync.monitor"])


@contextlib.contextmanager
def crowd(number: int, make: Callable[..., Any], argument: object) -> Iterator[list[Connection]]:
    """So many processes that wait for turns of `contend`; *make* yields the `Take` of each. Ended with the block."""
    with processes(number, _live, make, argument) as pipes:
        yield pipes


@contextlib.contextmanager
def processes(number: int, target: Callable[..., object], *arguments: object) -> Iterator[list[Connection]]:
    """So many processes that run *target* with a pipe, and end at None; here when each has sent a first word."""
    pipes: list[Connection] = []
    started = []
    try:
        for _ in range(number):
            near, far = context.Pipe()
            process = context.Process(target=target, args=(far, *arguments), daemon=True)
            process.start()
            far.close()
            started.append(process)
            pipes.append(near)
        for pipe in pipes:
            answer(pipe)
        yield pipes
    finally:
        for pipe in pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in started:
            process.join(TIMEOUT / 4)
            if process.is_alive():
                print("a process of the benchmark did not stop", file=sys.stderr)
                process.kill()


def answer(pipe: Connection) -> Any:
    """
    What the process at the other end says.

    Raises:
        RuntimeError: it says nothing.
    """
    if not pipe.poll(TIMEOUT):
        raise RuntimeError("a process of the benchmark does not answer")
    return pipe.recv()


def contend(pipes: Sequence[Connection], seconds: float, hold: float) -> list[dict[str, Any]]:
    """
    Let all of a crowd take and give for *seconds*, holding for *hold* seconds each time.

    Of each process: its `waits`, for how many seconds it `held`, and its `cpu` seconds.
    """
    begin = time.monotonic() + 0.2  # all have heard of it by then
    for pipe in pipes:
        pipe.send((begin, begin + seconds, hold))
    return [answer(pipe) for pipe in pipes]


def _live(pipe: Connection, make: Callable[..., Any], argument: object) -> None:
    with make(argument) as take:
        pipe.send("ready")
        while (told := pipe.recv()) is not None:
            begin, end, hold = told
            waits: list[float] = []
            held = 0.0
            time.sleep(max(0.0, begin - time.monotonic()))
            cpu = time.process_time()
            while (asked := time.monotonic()) < end:
                with take():
                    granted = time.monotonic()
                    if hold:
                        time.sleep(hold)
                    held += max(0.0, min(time.monotonic(), end) - granted)
                waits.append(granted - asked)
            pipe.send({"waits": waits, "held": held, "cpu": time.process_time() - cpu})
