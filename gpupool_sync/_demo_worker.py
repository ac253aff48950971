"""One worker of the demonstration: ``python -m gpupool_sync._demo_worker``, a process with a pool of its own.

It reads JSON lines from standard input: its settings, then its jobs, then ``null``, at which it ends.  What it does it
writes to standard output, one JSON line a note, each in one `write`: it may be killed at any instant, and what it noted
by then was true.  When its input ends without ``null``, its parent is gone, and it goes too.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
import warnings
from typing import Any

#: Seconds between two looks at a lease that is held.
LOOK = 0.05


def main() -> None:
    for name in list(os.environ):
        if name.startswith(("GPU_", "CUDA_")):
            del os.environ[name]  # nobody's settings change what a stranger sees
    settings = json.loads(sys.stdin.readline())
    from gpupool_sync.config import Endpoint
    from gpupool_sync.pool import GPUPool

    # What there is to say is in the notes.
    warnings.simplefilter("ignore")
    endpoints = [Endpoint(url, name=name) for name, url in settings["endpoints"].items()]
    pool = GPUPool(endpoints, name=settings["name"], **settings["options"])
    pool.open(wait=True)
    jobs: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    threads = [
        threading.Thread(target=work, args=(pool, jobs, settings["patience"]), name=f"gpupool-demo-{number}")
        for number in range(settings["threads"])
    ]
    for thread in threads:
        thread.daemon = True
        thread.start()
    note("ready")
    for line in sys.stdin:
        job = json.loads(line)
        if job is None:
            break
        jobs.put(job)
    else:
        os._exit(1)
    for _ in threads:
        jobs.put(None)
    for thread in threads:
        thread.join()
    pool.close()


def work(pool: Any, jobs: queue.SimpleQueue[dict[str, Any] | None], patience: float) -> None:
    """Run jobs on one GPU each until there are no more."""
    while (job := jobs.get()) is not None:
        number = job["job"]
        asked_at = time.monotonic()
        try:
            with pool.gpu(timeout=patience, note=f"job {number}") as gpu:
                begun_at = time.monotonic()
                note(
                    "begin",
                    job=number,
                    key=gpu.uuid or gpu.global_gpu_id,
                    gpu=gpu.global_gpu_id,
                    endpoint=gpu.endpoint_id,
                    at=begun_at,
                )
                good = hold(gpu, begun_at + job["seconds"])
                note("end", job=number, at=time.monotonic() if good is None else good)
        except Exception as exc:
            note("failed", job=number, why=f"{type(exc).__name__}: {str(exc).partition(chr(10))[0]}")
        else:
            note("done" if good is None else "lost", job=number, waited=begun_at - asked_at)


def hold(gpu: Any, until: float) -> float | None:
    """Compute until then; None, or the last instant at which the lease was still ours, if it is lost."""
    good = time.monotonic()
    while (now := time.monotonic()) < until:
        if gpu.lost:
            return good
        good = now
        time.sleep(min(LOOK, until - now))
    return None


def note(what: str, **more: Any) -> None:
    os.write(sys.stdout.fileno(), (json.dumps({"note": what, **more}) + "\n").encode())


if __name__ == "__main__":
    main()
