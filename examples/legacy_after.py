"""The script of legacy_before.py, changed by two lines: the import, and the one that makes the queue.

    gpupool-sync serve --simulate 4xA100 --port 8001 &    # not needed on a machine with GPUs
    export GPU_SERVICE_ENDPOINTS=http://127.0.0.1:8001
    python examples/legacy_after.py

Before, two runs of it used the same GPUs at the same time, a worker that died took its number with it, and CUDA may
have counted the GPUs in another order. Now each number is a lease: nobody else has that GPU until it is put back.
"""

from __future__ import annotations

import multiprocessing
import os
import time

from gpupool_sync import GPUPool


def start(queue):
    global gpus
    gpus = queue


def train(job):
    gpu = gpus.get()
    try:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
        time.sleep(0.1)
        return f"job {job} on GPU {gpu}"
    finally:
        gpus.put(gpu)


def main():
    queue = GPUPool().as_queue(4)
    for gpu in range(4):
        queue.put(gpu)
    with multiprocessing.Pool(4, start, (queue,), maxtasksperchild=1) as workers:
        for line in workers.imap_unordered(train, range(8)):
            print(line)


if __name__ == "__main__":
    main()
