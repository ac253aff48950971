"""
A program that is interrupted (as by Ctrl-C) thousands of times while it acquires and releases; prints what leaked.

Run by `test_interrupts.py`: ``interrupted.py MODE INTERRUPTS``.  In mode "block" it uses ``with pool.gpu()``, in mode
"acquire" ``acquire()`` and ``release()``, in mode "wait" it always has to wait for a thread that holds the card, and in
mode "host" the leases are kernel locks in the directory of `GPU_POOL_LOCK_DIR`.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import random
import signal
import sys
import threading
import time

from cards import HERE, Cards
from gpupool_sync import GPUPool, devices
from gpupool_sync.leases.host import HostStore
from gpupool_sync.leases.memory import MemoryStore

#: Seconds; a busy machine gets fewer interrupts in.
LONGEST_RUN = 25.0


def card_files() -> list[str]:
    """The files of cards that this process has open to be written to: each is a lock, or may be."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if fcntl.fcntl(int(name), fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR:
                found.append(os.path.basename(os.readlink(f"/proc/self/fd/{name}")))
    return [name for name in found if name.startswith("gpu-")]


def main() -> None:
    mode, interrupts = sys.argv[1], int(sys.argv[2])
    devices.open_reader = lambda: Cards(1)  # type: ignore[assignment]
    devices.host_identity = lambda: HERE  # type: ignore[assignment]
    store = HostStore() if mode == "host" else MemoryStore()
    pool = GPUPool(lease_store=store, poll_interval=0.5)
    pool.open(wait=True)
    pool.acquire().release()
    done = threading.Event()

    def rival() -> None:
        while not done.is_set():
            try:
                with pool.gpu(timeout=5):
                    done.wait(0.0005)
            except TimeoutError:
                pass

    threads = [threading.Thread(target=rival, daemon=True)] if mode == "wait" else []
    served = hits = 0
    armed = False

    def handler(*_: object) -> None:
        # What is interrupted is the pool, not this program's own bookkeeping.
        nonlocal armed, hits
        if armed:
            armed = False
            hits += 1
            raise KeyboardInterrupt

    # A timer of the kernel and not a thread that kills: a thread would have to wait for the interpreter.
    signal.signal(signal.SIGALRM, handler)
    chance = random.Random(interrupts)
    # Seconds; a little more than an acquire and a release take.
    longest = {"wait": 0.003, "host": 0.0004}.get(mode, 0.00015)
    for thread in threads:
        thread.start()
    end = time.monotonic() + LONGEST_RUN
    while hits < interrupts and time.monotonic() < end:
        gpu = None
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.000001 + chance.random() * longest)
            armed = True
            if mode == "acquire":
                gpu = pool.acquire(timeout=5)
                pool.release(gpu)
            else:
                with pool.gpu(timeout=5):
                    served += 1
            armed = False
        except KeyboardInterrupt:
            if gpu is not None:  # it reached us, so it is ours to release
                pool.release(gpu)
        served += gpu is not None
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    done.set()
    for thread in threads:
        thread.join()
    gpu = None
    gc.collect()
    deadline = time.monotonic() + 10
    while (store.leases() or store.queue()) and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    leaked = len(store.leases()) + len(store.queue())
    while card_files() and time.monotonic() < deadline:
        threading.Event().wait(0.01)  # a poll may have one open this instant
    descriptors = card_files()
    usable = leaked == 0 and pool.acquire(timeout=10) is not None
    forgotten = pool.stats()["forgotten"]
    pool.close()
    print(
        json.dumps(
            {
                "leaked": leaked,
                "usable": usable,
                "descriptors": descriptors,
                "served": served,
                "interrupts": hits,
                "forgotten": forgotten,
                "watched": len(pool._state.watched),
            }
        )
    )


if __name__ == "__main__":
    main()
