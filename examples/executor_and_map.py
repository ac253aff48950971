"""Tasks in worker processes that own a GPU each: the shortest way, and the one to take for new code.

    gpupool-sync serve --simulate 4xA100 --port 8001 &    # not needed on a machine with GPUs
    export GPU_SERVICE_ENDPOINTS=http://127.0.0.1:8001
    python examples/executor_and_map.py

Every worker is masked to its GPU before it imports anything, so a task uses "cuda:0", or whatever its library takes.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import as_completed

from gpupool_sync import GPUPool


def train(learning_rate: float) -> tuple[float, str]:
    """Stands for an hour of work: import torch here, and use torch.device("cuda:0")."""
    time.sleep(0.2)
    return learning_rate, os.environ["CUDA_VISIBLE_DEVICES"]


def main() -> None:
    rates = [0.1, 0.03, 0.01, 0.003, 0.001, 0.0003]
    with GPUPool() as pool:
        # A list of results in the order of the items; a progress bar on a terminal.
        for rate, gpu in pool.map(train, rates):
            print(f"map: {rate} on {gpu}")
        # The executor of concurrent.futures: here with at most two GPUs, and results as they come.
        with pool.executor(max_workers=2) as executor:
            for future in as_completed([executor.submit(train, rate) for rate in rates]):
                rate, gpu = future.result()
                print(f"executor: {rate} on {gpu}")


if __name__ == "__main__":
    main()
