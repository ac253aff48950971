"""multiprocessing.Pool whose every worker takes a GPU in its initializer and keeps it until it ends.

    gpupool-sync serve --simulate 4xA100 --port 8001 &    # not needed on a machine with GPUs
    export GPU_SERVICE_ENDPOINTS=http://127.0.0.1:8001
    python examples/multiprocessing_pool.py                       # fork, workers for all tasks
    python examples/multiprocessing_pool.py spawn --tasks 2       # a fresh worker after every second task

With fork, import torch in the workers and not at the top: CUDA that the parent has initialised does not work in them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time

from gpupool_sync import GPUPool


def start(pool: GPUPool) -> None:
    """Once in each worker, before its first task. What it acquires ends with the process, however that ends."""
    global gpu
    gpu = pool.acquire()
    gpu.activate()


def train(job: int) -> str:
    time.sleep(0.1)
    return f"job {job} on {gpu.global_gpu_id}, CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("method", nargs="?", default="fork", choices=["fork", "spawn", "forkserver"])
    parser.add_argument("--tasks", type=int, help="tasks after which a worker is replaced (maxtasksperchild)")
    options = parser.parse_args()
    workers = multiprocessing.get_context(options.method).Pool(
        4, initializer=start, initargs=(GPUPool(),), maxtasksperchild=options.tasks
    )
    for line in workers.imap_unordered(train, range(8), chunksize=1):
        print(line)
    # Not `with`, which kills the workers: a GPU of another machine would come back only after its lease's ttl.
    workers.close()
    workers.join()


if __name__ == "__main__":
    main()
