"""
A program that waits for a GPU, for tests of what it shows meanwhile.

``waiting_program.py MODE [OPTIONS]``: the GPU comes free when a line arrives on standard input; OPTIONS (JSON) go to
the pool.  In mode "script" the program itself waits, in mode "thread" two of its threads do, in mode "library" a module
that it imports, in mode "child" a process that it forks.  In mode "short" the wait is over long before it is to be
shown, and what was imported by the end is printed; in the others it is shown after a moment.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys
import threading
import types

from cards import HERE, Cards
from gpupool_sync import GPUPool, acquiring, devices, waiting
from gpupool_sync.leases.memory import MemoryStore


def get(source: GPUPool) -> None:
    with source.gpu(timeout=100):
        pass


def library() -> types.FunctionType:
    """`get` as if it stood in a module of somebody else."""
    return types.FunctionType(get.__code__, {**globals(), "__name__": "somebody_elses.training"})


def main() -> None:
    mode = sys.argv[1]
    options = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
    devices.open_reader = lambda: Cards(1)  # type: ignore[assignment]
    devices.host_identity = lambda: HERE  # type: ignore[assignment]
    acquiring.SHOW_AFTER = 100.0 if mode == "short" else 0.3
    waiting.RECHECK = 0.1
    gpus = GPUPool(lease_store=MemoryStore(), poll_interval=0.2, name="here", **options)
    held = gpus.acquire(note="[red]busy[/red]\x1b[2J")

    def release() -> None:
        os.read(0, 1)  # not sys.stdin, which a forked child closes: it would wait for this thread for ever
        held.release()

    threading.Thread(target=release, daemon=True).start()
    print("waits", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        if mode == "thread":
            threads = [threading.Thread(target=get, args=(gpus,)) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        elif mode == "library":
            library()(gpus)
        elif mode == "child":
            # Its arbiter is a book of its own, so it has to hold the card itself to wait for it.
            process = multiprocessing.get_context("fork").Process(target=child, args=(gpus,))
            process.start()
            process.join()
        else:
            get(gpus)
        print("granted", flush=True)
    if mode == "short":
        print([name for name in ("rich", "IPython", "gpupool_sync.progress") if name in sys.modules])
    gpus.close()
    print("over", flush=True)


def child(gpus: GPUPool) -> None:
    mine = gpus.acquire()
    threading.Timer(1.0, mine.release).start()
    get(gpus)


if __name__ == "__main__":
    main()
