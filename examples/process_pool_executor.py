"""concurrent.futures.ProcessPoolExecutor: the initializer takes a GPU for each worker.

    gpupool-sync serve --simulate 4xA100 --port 8001 &    # not needed on a machine with GPUs
    export GPU_SERVICE_ENDPOINTS=http://127.0.0.1:8001
    python examples/process_pool_executor.py

Where nothing ties you to this executor, pool.executor() does the same, and survives a worker that dies.
"""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

from gpupool_sync import GPUPool


def start(pool: GPUPool) -> None:
    """Once in each worker, before its first task; the worker keeps the GPU until it ends."""
    global gpu
    gpu = pool.acquire()
    gpu.activate()


def train(job: int) -> str:
    time.sleep(0.1)
    return f"job {job} on {gpu.global_gpu_id}"


def main() -> None:
    with ProcessPoolExecutor(
        4, mp_context=multiprocessing.get_context("spawn"), initializer=start, initargs=(GPUPool(),)
    ) as executor:
        for line in executor.map(train, range(8)):
            print(line)


if __name__ == "__main__":
    main()
