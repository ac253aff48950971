"""The queue of GPU numbers: in threads, in processes of every kind, and where numbers mean nothing."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import queue as standard
import signal
import sys
from concurrent.futures import ProcessPoolExecutor

import attrs
import pytest

import process_jobs as jobs
from cards import Cards, local_pool
from gpupool_sync import ConfigError, Endpoint, GPUPool, NoSuchGPU
from gpupool_sync.testing import FakeFleet
from helpers import HoldLog, eventually, run_threads

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="fork and the kernel locks of Linux"),
    # Since Python 3.12 a fork of a process with threads warns. That the queue survives it is what is tested here.
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]

NUMBER = 3


@pytest.fixture
def pool(monkeypatch):
    """Over three invented cards of this machine, with the kernel's locks."""
    with local_pool(monkeypatch, Cards(NUMBER), lease_store=None) as made:
        made.open(wait=True)
        yield made


@pytest.fixture
def log(tmp_path):
    return HoldLog(tmp_path / "holds")


def victim_of(log):
    hold = eventually(lambda: next((each for each in log.holds() if each.who.startswith("victim")), None), 30)
    return int(hold.who.split()[1]), int(hold.key)


# -- one process -------------------------------------------------------------------------------------------------


def test_numbers_are_leased(pool):
    """Each number once, until it is put back; others of the pool see that it is held."""
    queue = pool.as_queue()
    numbers = {queue.get(timeout=20) for _ in range(NUMBER)}
    assert numbers == {0, 1, 2}
    assert queue.empty()
    with pytest.raises(standard.Empty, match="none could be had"):
        queue.get_nowait()
    with pytest.raises(standard.Empty):
        queue.get(timeout=0.05)
    assert {holder for gpu in pool.status().gpus for holder in gpu.holders}
    queue.put(1)
    assert queue.qsize() == 1
    assert not queue.full()
    assert queue.get(timeout=20) == 1
    for number in numbers:
        queue.put_nowait(number)
    assert pool.stats()["held"] == 0


def test_a_script_that_fills_its_queue_first(pool, caplog):
    """What was not got is not put: it adds no GPU, and gives nobody's away."""
    caplog.set_level(logging.INFO)
    queue = pool.as_queue(2)
    for number in range(2):
        queue.put(number)
    assert sorted(queue.get(timeout=20) for _ in range(2)) == [0, 1]
    queue.put(2)
    with pytest.raises(standard.Empty):
        queue.get(block=False)
    assert "GPU 2 was put into the queue, but was not got from it here" in caplog.text


@pytest.mark.parametrize(("numbers", "expected"), [(2, {0, 1}), ([0, 2], {0, 2}), ((1,), {1}), (8, {0, 1, 2})])
def test_some_of_the_numbers(pool, numbers, expected):
    """A count from 0, or the numbers themselves; never another."""
    queue = pool.as_queue(numbers)
    assert {queue.get(timeout=20) for _ in expected} == expected
    with pytest.raises(standard.Empty):
        queue.get_nowait()


def test_mig_instances_have_no_number(monkeypatch):
    """A script that masks itself by one would find no GPU at all."""
    cards = Cards(2)
    cards.set(1, uuid="MIG-41b35e14-77e5-5b29-bd82-a3d2b0c5bd1f", local_gpu_id=1100)
    with local_pool(monkeypatch, cards) as pool:
        queue = pool.as_queue()
        assert queue.get(timeout=20) == 0
        with pytest.raises(standard.Empty):
            queue.get_nowait()
        with pytest.raises(NoSuchGPU):
            pool.as_queue([1100]).get(timeout=20)


def test_a_number_that_is_not_there(pool):
    """Said at once, not waited for."""
    with pytest.raises(NoSuchGPU):
        pool.as_queue([7]).get(timeout=20)


@pytest.mark.parametrize("numbers", [0, -1, True, [], [-1], ["0"], 1.5, [True]], ids=str)
def test_bad_numbers(pool, numbers):
    """Refused before anything is leased."""
    with pytest.raises(ConfigError, match="as_queue"):
        pool.as_queue(numbers)


def test_bad_requests(pool):
    """Likewise."""
    for request in ({"timeout": 3}, {"local": False}, {"uuid": 3}):
        with pytest.raises(ConfigError, match=next(iter(request))):
            pool.as_queue(**request)


def test_threads_take_turns(pool, log):
    """Nothing is held twice."""
    queue = pool.as_queue()

    def use(_):
        for _ in range(10):
            number = queue.get(timeout=30)
            with log.holding(str(number)):
                pass
            queue.put(number)

    run_threads(8, use)
    assert len(log.holds()) == 80
    assert log.overlaps() == []
    assert pool.stats()["held"] == 0


def test_cuda_counts_as_nvidia_smi_does(pool, monkeypatch, caplog):
    """Or a number would name another card where they differ; who asked for another order is told."""
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    queue = pool.as_queue()
    queue.get(timeout=20)
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    queue.get(timeout=20)
    assert "FASTEST_FIRST: CUDA may take another GPU" in caplog.text


def test_it_stays_one_queue_when_it_is_pickled_at_home(pool):
    """So a thread that was handed a copy can put what another got."""
    queue = pool.as_queue()
    assert pickle.loads(pickle.dumps(queue)) is queue


# -- other processes ---------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_take_turns(pool, log, method):
    """As with the queue of a `multiprocessing.Manager`; what the parent has out stays the parent's."""
    context = multiprocessing.get_context(method)
    queue = pool.as_queue()
    mine = queue.get(timeout=20)
    with log.holding(str(mine)):
        workers = [
            context.Process(target=jobs.numbers_in_turn, args=(queue, log, NUMBER, 10), daemon=True) for _ in range(2)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(40)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert log.overlaps() == []
    assert len(log.holds()) == 21
    queue.put(mine)
    pool.acquire(count=NUMBER, timeout=20).release()


@pytest.mark.real
@pytest.mark.parametrize(("method", "tasks"), [("fork", None), ("fork", 1), ("spawn", 2)])
def test_in_the_initializer_of_a_pool_of_workers(pool, log, method, tasks):
    """The usual place for it, with workers that come and go."""
    queue = pool.as_queue([0])
    with multiprocessing.get_context(method).Pool(
        2, initializer=jobs.start_with_numbers, initargs=(queue, log, NUMBER), maxtasksperchild=tasks
    ) as workers:
        pids = workers.map(jobs.one_number, [3] * 4, chunksize=1)
        workers.close()
        workers.join()
    assert os.getpid() not in pids
    assert len(log.holds()) == 12
    assert log.overlaps() == []
    assert {hold.key for hold in log.holds()} == {"0"}


@pytest.mark.real
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_process_that_dies_with_a_number_gives_it_back(pool, log, method):
    """With a `Manager().Queue()` it would be gone for ever."""
    queue = pool.as_queue([1])
    worker = multiprocessing.get_context(method).Process(
        target=jobs.keep_a_number_for_ever, args=(queue, log, NUMBER), daemon=True
    )
    worker.start()
    pid, number = victim_of(log)
    with pytest.raises(standard.Empty):
        queue.get_nowait()
    os.kill(pid, signal.SIGKILL)
    worker.join(20)
    assert queue.get(timeout=20) == number == 1


@pytest.mark.real
def test_workers_that_keep_their_number_until_they_end(pool, log):
    """Without any ``put``: the next worker gets the number of the one that has ended."""
    queue = pool.as_queue([0])
    with multiprocessing.get_context("fork").Pool(
        1, initializer=jobs.keep_a_number, initargs=(queue, log, NUMBER), maxtasksperchild=1
    ) as workers:
        assert len(set(workers.map(jobs.nothing, range(3), chunksize=1))) == 3
        workers.close()
        workers.join()
    assert len(log.holds()) >= 3


@pytest.mark.real
def test_a_queue_that_comes_with_each_task_is_opened_once(pool):
    """One pool in the worker, not one for each task."""
    queue = pool.as_queue()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        futures = [executor.submit(jobs.same_queue, queue, NUMBER) for _ in range(3)]
        assert len({future.result(40) for future in futures}) == 1


# -- where numbers mean nothing ----------------------------------------------------------------------------------


@pytest.mark.real
def test_simulated_gpus_of_one_server(log):
    """To try a script out where there is no GPU."""
    with FakeFleet([2]) as fleet, GPUPool(fleet.urls) as pool:
        queue = pool.as_queue()
        assert sorted(queue.get(timeout=20) for _ in range(2)) == [0, 1]


@pytest.mark.real
def test_simulated_gpus_of_several_servers_need_a_name():
    """Their numbers are the same: which one is meant must be said, and then nothing else is handed out."""
    with (
        FakeFleet([2, 1]) as fleet,
        GPUPool([Endpoint(url, name=f"server-{n}") for n, url in enumerate(fleet.urls)]) as pool,
    ):
        with pytest.raises(ConfigError, match=r"server-0, server-1 have the same numbers.*endpoint='server-0'"):
            pool.as_queue().get(timeout=20)
        queue = pool.as_queue(endpoint="server-1")
        assert queue.get(timeout=20) == 0
        with pytest.raises(standard.Empty):
            queue.get_nowait()


@pytest.mark.real
def test_gpus_of_other_machines_have_no_number_here(monkeypatch):
    """Their numbers would be taken for this machine's."""
    with FakeFleet([1]) as fleet, GPUPool(fleet.urls) as pool:
        pool.open(wait=True)
        view = pool._state.table.view

        def as_if_real():
            snapshots, duplicates = view()
            return {
                key: attrs.evolve(
                    each, sample=attrs.evolve(each.sample, host=attrs.evolve(each.sample.host, simulated=False))
                )
                for key, each in snapshots.items()
            }, duplicates

        monkeypatch.setattr(pool._state.table, "view", as_if_real)
        with pytest.raises(NoSuchGPU):
            pool.as_queue().get(timeout=20)
