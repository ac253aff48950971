"""joblib: each task takes a GPU for as long as it runs.

    pip install joblib
    gpupool-sync serve --simulate 4xA100 --port 8001 &    # not needed on a machine with GPUs
    export GPU_SERVICE_ENDPOINTS=http://127.0.0.1:8001
    python examples/joblib_parallel.py

joblib's workers live on and have no initializer. Once CUDA is initialised in one of them it is bound to that GPU, for
which the pool then waits, even while another is free.
"""

from __future__ import annotations

import time

from joblib import Parallel, delayed

from gpupool_sync import GPUPool


def train(pool: GPUPool, job: int) -> str:
    with pool.gpu() as gpu:
        gpu.activate()  # before CUDA is initialised: import torch below this line
        time.sleep(0.1)
        return f"job {job} on {gpu.global_gpu_id}"


def main() -> None:
    pool = GPUPool()  # goes to the workers as its settings
    for line in Parallel(n_jobs=4)(delayed(train)(pool, job) for job in range(8)):
        print(line)


if __name__ == "__main__":
    main()
