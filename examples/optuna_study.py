"""Optuna: as many trials at once as there are GPUs, each in a process of its own.

    pip install optuna
    gpupool-sync serve --simulate 4xA100 --port 8001 &    # not needed on a machine with GPUs
    export GPU_SERVICE_ENDPOINTS=http://127.0.0.1:8001
    python examples/optuna_study.py

Optuna's n_jobs are threads; each of them waits for a worker process of the executor, which has its GPU for itself.
"""

from __future__ import annotations

import os
import time

import optuna

from gpupool_sync import GPUPool


def train(learning_rate: float) -> tuple[float, str]:
    """In the worker: what comes back is the loss, and here also the GPU."""
    time.sleep(0.1)
    return (learning_rate - 0.01) ** 2, os.environ["CUDA_VISIBLE_DEVICES"]


def main() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with GPUPool() as pool, pool.executor(max_workers=4) as executor:

        def objective(trial: optuna.Trial) -> float:
            rate = trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True)
            loss, gpu = executor.submit(train, rate).result()
            trial.set_user_attr("gpu", gpu)
            return loss

        study = optuna.create_study()
        study.optimize(objective, n_trials=8, n_jobs=4)
    for trial in study.trials:
        print(f"trial {trial.number} on {trial.user_attrs['gpu']}: {trial.value:.6f}")
    print(f"best: {study.best_params}")


if __name__ == "__main__":
    main()
