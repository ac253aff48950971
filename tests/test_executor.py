"""Executors, whose workers own a GPU each: real processes over real servers with simulated cards."""

from __future__ import annotations

import os
import signal

import pytest

from gpupool_sync import ConfigError, GPUPool, GPUPoolError, NoSuchGPU
from gpupool_sync.executor import WorkerDied
from gpupool_sync.testing import FakeFleet
from helpers import eventually

pytestmark = [pytest.mark.real, pytest.mark.timeout(120)]


def what_i_see(_=None):
    return os.getpid(), os.environ["CUDA_VISIBLE_DEVICES"]


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def divide(a, b):
    return a / b


def wait_for(path):
    eventually(path.exists)
    return os.environ["CUDA_VISIBLE_DEVICES"]


@pytest.fixture(scope="module")
def fleet():
    with FakeFleet([2, 1]) as fleet:
        yield fleet


@pytest.fixture
def pool(fleet):
    with GPUPool(fleet.urls) as pool:
        pool.open(wait=True)
        yield pool


def test_each_worker_has_a_gpu_of_its_own(pool, tmp_path):
    """As many processes as GPUs, each masked to another one; all of them come back."""
    go = tmp_path / "go"
    with pool.executor() as executor:
        futures = [executor.submit(wait_for, go) for _ in range(6)]
        eventually(lambda: len(executor.workers) == 3)
        ids = [gpu for gpu, _ in executor.workers]
        assert len(set(ids)) == 3
        assert len({pid for _, pid in executor.workers}) == 3
        go.touch()
        seen = [future.result(60) for future in futures]
    assert set(seen) <= {gpu.uuid for gpu in pool.status().gpus}
    assert len(set(seen)) == 3
    assert pool.stats()["held"] == 0


def test_a_dead_worker_costs_its_task_alone(pool):
    """Its future says which process died how; another worker takes its place, and no GPU is lost."""
    with pool.executor(max_workers=1) as executor:
        before = executor.submit(what_i_see).result(60)
        with pytest.raises(WorkerDied, match=r"signal 9 while it ran die"):
            executor.submit(die).result(60)
        after = executor.submit(what_i_see).result(60)
    assert before[0] != after[0]
    assert pool.stats()["held"] == 0


def test_what_a_task_raises_arrives_with_its_traceback(pool):
    """The exception itself, and where it came from as its cause."""
    with pool.executor(max_workers=1) as executor, pytest.raises(ZeroDivisionError) as caught:
        executor.submit(divide, 1, 0).result(60)
    assert "in divide" in str(caught.value.__cause__)


def test_map_keeps_the_order(pool):
    """Results come in the order of the items, from the GPUs' processes."""
    seen = pool.map(what_i_see, range(5), progress=False)
    assert len(seen) == 5
    assert os.getpid() not in {pid for pid, _ in seen}


def test_what_cannot_be_pickled_is_said_at_once(pool):
    """Before it is queued."""
    with pool.executor(max_workers=1) as executor, pytest.raises(GPUPoolError, match="must pickle"):
        executor.submit(lambda: None)


def test_a_request_that_no_gpu_can_satisfy_fails_the_tasks(pool):
    """Nothing waits for ever."""
    with pool.executor(model="Z1") as executor, pytest.raises(NoSuchGPU):
        executor.submit(what_i_see).result(60)


@pytest.mark.parametrize("options", [{"max_workers": 0}, {"max_workers": True}, {"mp_context": "fork"}], ids=str)
def test_bad_arguments(pool, options):
    """Refused before anything starts."""
    with pytest.raises(ConfigError, match=next(iter(options))):
        pool.executor(**options)
