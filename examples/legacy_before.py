"""An old script that hands out GPU numbers by a queue: legacy_after.py has what is wrong with it, and what to change.

python examples/legacy_before.py
"""

from __future__ import annotations

import multiprocessing
import os
import time


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
    queue = multiprocessing.Manager().Queue()
    for gpu in range(4):
        queue.put(gpu)
    with multiprocessing.Pool(4, start, (queue,), maxtasksperchild=1) as workers:
        for line in workers.imap_unordered(train, range(8)):
            print(line)


if __name__ == "__main__":
    main()
