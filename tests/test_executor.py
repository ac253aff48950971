"""Executors, whose workers own a GPU each: real processes over real servers with simulated cards."""

from __future__ import annotations

import concurrent.futures
import itertools
import multiprocessing.connection
import os
import pickle
import signal
import subprocess
import sys
import threading
from concurrent.futures import CancelledError
from pathlib import Path

import psutil
import pytest

import executor_jobs as jobs
from gpupool_sync import ConfigError, GPUPool, GPUPoolError, NoSuchGPU, PoolClosed
from gpupool_sync import executor as executor_module
from gpupool_sync.executor import WorkerDied, WorkersBroken
from gpupool_sync.testing import FakeFleet
from helpers import eventually, run_threads
from test_cli_run import PATH, terminal  # noqa: F401 - a fixture

pytestmark = [pytest.mark.real, pytest.mark.timeout(120)]

#: Seconds; bounds a hang.
LONG = 60

linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc; terminals as Linux has them")


@pytest.fixture(scope="module")
def fleet():
    with FakeFleet([2, 1]) as fleet:
        yield fleet


@pytest.fixture
def pool(fleet):
    with GPUPool(fleet.urls) as pool:
        pool.open(wait=True)
        yield pool
        eventually(lambda: pool.stats()["held"] == 0, LONG)


@pytest.fixture
def one(pool):
    with pool.executor(max_workers=1) as executor:
        yield executor


@pytest.fixture(scope="module")
def shared():
    """An executor for tests that leave its worker as it is; a GPU and a worker for all of them."""
    with FakeFleet([1]) as fleet, GPUPool(fleet.urls) as pool, pool.executor(idle_timeout=None) as executor:
        executor.submit(jobs.what_i_see).result(LONG)
        yield executor


@pytest.fixture
def short(fleet):
    """A pool that hears of a revocation soon."""
    with GPUPool(fleet.urls, ttl=6.0) as pool:
        pool.open(wait=True)
        yield pool


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


# -- workers and their GPUs --------------------------------------------------------------------------------------


def test_each_worker_has_a_gpu_of_its_own(pool, tmp_path):
    """As many processes as GPUs, each masked to another one; all of them come back."""
    go, here = tmp_path / "go", [tmp_path / f"task-{n}" for n in range(3)]
    with pool.executor() as executor:
        futures = [executor.submit(jobs.tell_and_wait, each, go) for each in here]
        pids = {jobs.told(each) for each in here}
        assert {pid for _, pid in executor.workers} == pids
        assert len({gpu for gpu, _ in executor.workers}) == len(pids) == 3
        go.touch()
        seen = {future.result(LONG) for future in futures}
    assert seen == {gpu.uuid for gpu in pool.status().gpus}
    assert pool.stats()["held"] == 0


def test_gpus_that_come_later_get_workers_too(fleet, tmp_path):
    """All tasks are submitted, all workers run long ones, and then another server comes."""
    go, here = tmp_path / "go", [tmp_path / f"task-{n}" for n in range(3)]
    with GPUPool(fleet.urls[:1]) as pool:
        pool.open(wait=True)
        with pool.executor() as executor:
            futures = [executor.submit(jobs.tell_and_wait, each, go) for each in here]
            pids = {jobs.told(each) for each in here[:2]}
            pool.add_endpoint(fleet.urls[1])
            assert jobs.told(here[2]) not in pids
            go.touch()
            assert {future.result(LONG) for future in futures} == {gpu.uuid for gpu in pool.status().gpus}


@pytest.mark.parametrize("what", ["_Worker", "start"])
def test_a_worker_that_cannot_be_started_is_tried_again(pool, tmp_path, monkeypatch, caplog, what):
    """What went wrong may be over in a moment, and the tasks run for hours; it is told once."""
    made = getattr(executor_module, what)
    tries = itertools.count(1)

    def third_fails(*args):
        number = next(tries)
        if 3 <= number <= 5:
            raise RuntimeError(f"no more for now, says try {number}")
        return made(*args)

    monkeypatch.setattr(executor_module, what, third_fails)
    monkeypatch.setattr(executor_module, "SLOT_RETRY", 0.0)
    go, here = tmp_path / "go", [tmp_path / f"task-{n}" for n in range(3)]
    with pool.executor() as executor:
        futures = [executor.submit(jobs.tell_and_wait, each, go) for each in here]
        assert len({jobs.told(each) for each in here}) == 3
        go.touch()
        assert len({future.result(LONG) for future in futures}) == 3
    assert next(tries) > 6
    assert caplog.text.count("no more for now") == (what == "_Worker")


def test_a_gpu_that_comes_free_after_the_timeout_gets_a_worker(pool, fleet, tmp_path, monkeypatch):
    """The request has a timeout, after which the other workers do all of it; but not for ever."""
    monkeypatch.setattr(executor_module, "SLOT_RETRY", 0.0)
    go, here = tmp_path / "go", [tmp_path / f"task-{n}" for n in range(2)]
    with GPUPool(fleet.urls) as others:
        taken = [others.acquire(timeout=20) for _ in range(2)]
        with pool.executor(timeout=0.2) as executor:
            futures = [executor.submit(jobs.tell_and_wait, each, go) for each in here]
            jobs.told(here[0])
            eventually(lambda: pool.stats()["timeouts"] >= 2, LONG)
            taken[0].release()
            assert jobs.told(here[1]) != jobs.told(here[0])
            go.touch()
            assert {future.result(LONG) for future in futures} == {gpu.uuid for gpu in pool.status().gpus} - {
                taken[1].uuid
            }
        taken[1].release()


@pytest.mark.parametrize("where", ["notify", "start_slots"])
def test_an_interrupt_while_a_task_is_submitted_is_not_lost(one, tmp_path, monkeypatch, where):
    """Nobody has the future then, so nobody shall begin the task."""
    begun, go = tmp_path / "task", tmp_path / "go"
    first = one.submit(jobs.tell_and_wait, begun, go)
    jobs.told(begun)

    def interrupted():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(one._crew._changed if where == "notify" else one._crew, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            one.submit(jobs.tell, tmp_path / "second", "")
    go.touch()
    first.result(LONG)
    one.submit(jobs.what_i_see).result(LONG)
    assert not (tmp_path / "second").exists()


def test_an_answer_for_which_there_is_no_memory(pool, monkeypatch, caplog):
    """Whoever waits for it is told, and another worker takes the place of the one that is still sending it."""
    with pool.executor(max_workers=1) as executor:
        pid = executor.submit(os.getpid).result(LONG)
        receive, calls = executor_module._Worker.receive, itertools.count()

        def no_memory(worker):
            if next(calls) == 1:  # the first one said that the task has begun
                assert multiprocessing.connection.wait([worker._results], LONG)
                raise MemoryError
            return receive(worker)

        monkeypatch.setattr(executor_module._Worker, "receive", no_memory)
        with pytest.raises(GPUPoolError, match=r"the result of bytes could not be received: MemoryError"):
            executor.submit(bytes, 8 << 20).result(LONG)
        assert executor.submit(os.getpid).result(LONG) != pid
    assert "does not end" not in caplog.text  # and is waited for


@linux
def test_a_worker_is_masked_before_it_imports_anything(pool, monkeypatch):
    """Also where we are masked ourselves: to its own GPU, not to ours."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "ours")
    with pool.executor(max_workers=1) as executor:
        mask, order = executor.submit(jobs.mask_at_import).result(LONG)
        pid = executor.submit(os.getpid).result(LONG)
        began_with = dict(
            item.split("=", 1) for item in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in item
        )
    assert mask in {gpu.uuid for gpu in pool.status().gpus}
    assert order == "PCI_BUS_ID"
    assert began_with["CUDA_VISIBLE_DEVICES"] == mask


def test_one_task_after_the_other_needs_one_gpu(pool):
    """Who submits the next task when a result is there, also from a callback, keeps nobody from the other GPUs."""
    seen, done = [], threading.Event()
    with pool.executor() as executor:

        def next_one(future):
            seen.append(future.result())
            if len(seen) == 10:
                done.set()
            else:
                executor.submit(jobs.what_i_see).add_done_callback(next_one)

        executor.submit(jobs.what_i_see).add_done_callback(next_one)
        assert done.wait(LONG)
        seen += [executor.submit(jobs.what_i_see).result(LONG) for _ in range(10)]
        assert len(executor.workers) == 1
        assert repr(executor) == f"<GPUExecutor with workers on {executor.workers[0][0]}>"
    assert len(set(seen)) == 1


def test_tasks_from_several_threads(shared):
    """Each gets its own result."""
    assert run_threads(8, lambda n: shared.submit(divide_by_two, n).result(LONG), LONG) == [n / 2 for n in range(8)]


def divide_by_two(n):
    return n / 2


def test_a_worker_gives_its_gpu_back_after_so_many_tasks(pool):
    """Another process does the next; the last one's GPU is free without any shutdown."""
    with pool.executor(max_workers=1, max_tasks_per_child=2) as executor:
        pids = [executor.submit(jobs.what_i_see).result(LONG)[0] for _ in range(4)]
        assert pids[0] == pids[1] != pids[2] == pids[3]
        eventually(lambda: pool.stats()["held"] == 0, LONG)


def test_an_idle_gpu_is_given_back(pool):
    """Others may use it; the next task gets another worker."""
    with pool.executor(max_workers=1, idle_timeout=0.2) as executor:
        first = executor.submit(jobs.what_i_see).result(LONG)
        eventually(lambda: pool.stats()["held"] == 0, LONG)
        assert executor.workers == []
        assert executor.submit(jobs.what_i_see).result(LONG)[0] != first[0]


def test_a_forgotten_executor_gives_its_gpus_back(pool):
    """A notebook cell that makes an executor is run again: what is queued is done, then the GPU is free."""
    executor = pool.executor(max_workers=1, idle_timeout=None)
    futures = [executor.submit(jobs.what_i_see) for _ in range(2)]
    del executor
    assert futures[1].result(LONG)
    eventually(lambda: pool.stats()["held"] == 0, LONG)


# -- workers that die --------------------------------------------------------------------------------------------


def test_a_dead_worker_costs_its_task_alone(one, pool):
    """Its future says which process died how; another worker takes its place, and no GPU is lost."""
    before = one.submit(jobs.what_i_see).result(LONG)
    with pytest.raises(WorkerDied, match=r"signal 9 while it ran die"):
        one.submit(jobs.die).result(LONG)
    after = one.submit(jobs.what_i_see).result(LONG)
    assert before[0] != after[0]


def test_a_worker_that_dies_without_a_task_costs_none(one, pool):
    """The kernel's out-of-memory killer takes an idle one: the next task is done, by another."""
    pid = one.submit(jobs.what_i_see).result(LONG)[0]
    os.kill(pid, signal.SIGKILL)
    assert one.submit(jobs.what_i_see).result(LONG)[0] != pid


def test_an_idle_worker_that_dies_gives_its_gpu_back(one, pool):
    """Also if no task comes that would find out."""
    os.kill(one.submit(jobs.what_i_see).result(LONG)[0], signal.SIGKILL)
    eventually(lambda: pool.stats()["held"] == 0, LONG)


def test_a_child_of_a_dead_worker_does_not_keep_it_alive(one, tmp_path):
    """A data loader that the task has forked has the worker's pipes; it ends with the worker, as the GPU does not."""
    with pytest.raises(WorkerDied, match="signal 9"):
        one.submit(jobs.leave_a_child_and_die, tmp_path / "child").result(LONG)
    eventually(lambda: gone(jobs.told(tmp_path / "child")), LONG)


@pytest.mark.parametrize("fork", [True, False])
def test_what_a_task_leaves_running_ends_with_its_worker(pool, tmp_path, fork):
    """It might compute on the GPU, which is somebody else's after that."""
    with pool.executor(max_workers=1) as executor:
        child = executor.submit(jobs.leave_a_child, tmp_path / "child", fork=fork).result(LONG)
        assert not gone(child)
        executor_module.END_TIME, before = 1.0, executor_module.END_TIME  # a forked one keeps the worker waiting
        try:
            executor.shutdown()
        finally:
            executor_module.END_TIME = before
    eventually(lambda: gone(child), LONG)


def test_a_worker_that_does_not_end_is_killed(pool, monkeypatch, caplog):
    """A thread of the task's keeps the process alive: its GPU comes back all the same."""
    monkeypatch.setattr(executor_module, "END_TIME", 0.5)
    with pool.executor(max_workers=1) as executor:
        pid = executor.submit(jobs.never_end).result(LONG)
    assert gone(pid)
    assert "does not end and is killed" in caplog.text


def test_a_lost_lease_ends_the_worker(short, tmp_path):
    """Nobody else may compute there: the task fails and says why, the next one is done elsewhere, on_lost is called."""
    lost = []
    with short.executor(max_workers=1, on_lost=lambda gpu: lost.append(gpu.global_gpu_id)) as executor:
        future = executor.submit(jobs.tell_and_sleep, tmp_path / "task")
        pid = jobs.told(tmp_path / "task")
        [(gpu, worker)] = executor.workers
        assert worker == pid
        assert short.revoke(gpu)
        with pytest.raises(
            WorkerDied, match=r"because the lease on .* is lost: .*revoked.* while it ran tell_and_sleep"
        ):
            future.result(LONG)
        assert gone(pid)
        assert executor.submit(jobs.what_i_see).result(LONG)[0] != pid
    assert lost == [gpu]


def test_a_lost_lease_of_an_idle_worker_costs_no_task(short):
    """It is ended, and another one is there for the next task."""
    with short.executor(max_workers=1) as executor:
        pid = executor.submit(jobs.what_i_see).result(LONG)[0]
        assert short.revoke(executor.workers[0][0])
        eventually(lambda: gone(pid), LONG)
        assert executor.submit(jobs.what_i_see).result(LONG)[0] != pid


# -- starting ----------------------------------------------------------------------------------------------------


def test_an_initializer_runs_once_in_each_worker(pool):
    """Before its first task."""
    with pool.executor(max_workers=1, initializer=jobs.remember, initargs=(7,)) as executor:
        assert executor.submit(jobs.recall).result(LONG) == 7


def test_an_initializer_that_fails_breaks_the_executor(pool):
    """Every task says so, with the worker's traceback; no worker is started for each of them."""
    with pool.executor(max_workers=1, initializer=jobs.fail, initargs=("no model",)) as executor:
        futures = [executor.submit(jobs.what_i_see) for _ in range(3)]
        for future in futures:
            with pytest.raises(WorkersBroken, match="ValueError: no model") as caught:
                future.result(LONG)
            assert "in fail" in str(caught.value.__cause__.__cause__)
        with pytest.raises(WorkersBroken):
            executor.submit(jobs.what_i_see)


def test_a_worker_that_dies_at_its_start_is_replaced(pool, tmp_path):
    """Once is an accident and costs no task."""
    with pool.executor(max_workers=1, initializer=jobs.die_once, initargs=(tmp_path / "once",)) as executor:
        assert executor.submit(jobs.what_i_see).result(LONG)


def test_workers_that_all_die_at_their_start_break_the_executor(pool):
    """Nothing starts processes without end."""
    with (
        pool.executor(max_workers=1, initializer=jobs.die) as executor,
        pytest.raises(WorkersBroken, match="signal 9 before it was ready"),
    ):
        executor.submit(jobs.what_i_see).result(LONG)


def test_a_request_that_no_gpu_can_satisfy_fails_the_tasks(pool):
    """Nothing waits for ever."""
    with pool.executor(model="Z1") as executor, pytest.raises(NoSuchGPU):
        executor.submit(jobs.what_i_see).result(LONG)


def test_a_worker_that_gets_no_gpu_leaves_the_tasks_to_the_others(pool, fleet, tmp_path):
    """The request has a timeout, and one GPU of three is free: that one does it all."""
    with GPUPool(fleet.urls) as others:
        taken = [others.acquire(timeout=20) for _ in range(2)]
        with pool.executor(max_workers=3, timeout=2.0) as executor:
            futures = [executor.submit(jobs.wait_for, tmp_path / "go") for _ in range(6)]
            eventually(lambda: pool.stats()["timeouts"] == 2, LONG)
            (tmp_path / "go").touch()
            assert len({future.result(LONG) for future in futures}) == 1
        for gpu in taken:
            gpu.release()


@pytest.mark.parametrize(
    "options",
    [{"max_workers": 0}, {"max_workers": True}, {"mp_context": "fork"}, {"idle_timeout": -1}, {"uuid": 3}],
    ids=str,
)
def test_bad_arguments(pool, options):
    """Refused before anything starts."""
    with pytest.raises(ConfigError, match=next(iter(options))):
        pool.executor(**options)


# -- tasks and results -------------------------------------------------------------------------------------------


def test_what_a_task_raises_arrives_with_its_traceback(shared):
    """The exception itself, and where it came from as its cause."""
    with pytest.raises(ZeroDivisionError) as caught:
        shared.submit(jobs.divide, 1, 0).result(LONG)
    assert "in divide" in str(caught.value.__cause__)


def test_an_exception_that_cannot_be_unpickled(shared):
    """Its name and its traceback arrive."""
    with pytest.raises(GPUPoolError, match="Rude: 1") as caught:
        shared.submit(jobs.be_rude).result(LONG)
    assert "in be_rude" in str(caught.value.__cause__)


def test_a_result_that_cannot_be_unpickled(shared):
    """Costs its task; the worker lives on."""
    pid = shared.submit(jobs.what_i_see).result(LONG)[0]
    with pytest.raises(GPUPoolError, match=r"result of not_again cannot be unpickled: ValueError\('not here'\)"):
        shared.submit(jobs.not_again).result(LONG)
    assert shared.submit(jobs.what_i_see).result(LONG)[0] == pid


def test_large_results_and_tasks(shared):
    """More than fits into a pipe, both ways."""
    assert len(shared.submit(jobs.large, 64).result(LONG)) == 64 << 20
    assert shared.submit(len, b"x" * (16 << 20)).result(LONG) == 16 << 20


def test_what_cannot_be_pickled_is_said_at_once(shared, monkeypatch):
    """Before it is queued; the executor itself, too."""
    # As in a script; what has no file is taken for a notebook, whose functions cloudpickle carries.
    monkeypatch.setattr(sys.modules["__main__"], "__file__", __file__, raising=False)
    with pytest.raises(GPUPoolError, match="must pickle"):
        shared.submit(lambda: None)
    with pytest.raises(GPUPoolError, match=r"must pickle: an executor belongs to its process"):
        shared.submit(print, shared)
    with pytest.raises(TypeError, match="belongs to its process"):
        pickle.dumps(shared)


def test_what_a_task_prints_is_seen_when_it_is_done(one, capfd, monkeypatch):
    """Though the worker's output is no terminal, and it lives on."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    one.submit(jobs.say, "hello from a worker").result(LONG)
    assert "hello from a worker" in capfd.readouterr().out


def test_a_task_can_use_the_pool_on_its_own_gpu(one, fleet, monkeypatch):
    """`GPUPool` in a worker offers its GPU and no other, so a nested executor does not wait for ever."""
    monkeypatch.setenv("GPU_SERVICE_ENDPOINTS", ",".join(fleet.urls))
    mask = one.submit(jobs.what_i_see).result(LONG)[1]
    assert {seen for _, seen in one.submit(jobs.nested).result(LONG)} == {mask}


def test_map_keeps_the_order(pool):
    """Results come in the order of the items, from the GPUs' processes."""
    seen = pool.map(jobs.what_i_see, range(5), progress=False)
    assert len(seen) == 5
    assert os.getpid() not in {pid for pid, _ in seen}


@linux
def test_map_shows_a_bar_on_a_terminal(fleet, terminal, tmp_path, monkeypatch):  # noqa: F811
    """How many of how many; nothing of it stays. With `progress=False` there is none."""
    monkeypatch.setenv("PYTHONPATH", PATH)
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom gpupool_sync import GPUPool\nfrom executor_jobs import wait_for\nfrom pathlib import Path\n"
        "if __name__ == '__main__':\n"
        f"    with GPUPool({fleet.urls!r}) as pool:\n"
        f"        first, later = Path({str(tmp_path)!r}) / 'first', Path({str(tmp_path)!r}) / 'later'\n"
        "        pool.map(wait_for, [first, later], max_workers=1, progress=True)\n"
        "        print('quiet from here', flush=True)\n"
        "        pool.map(wait_for, [first, later], max_workers=1, progress=False)\n"
        "        print('done')\n"
    )
    it = terminal(sys.executable, str(script))
    it.see(b"wait_for")
    (tmp_path / "first").touch()
    it.see(b"50%")
    (tmp_path / "later").touch()
    it.see(b"done")
    assert it.wait() == 0
    assert b"wait_for" not in it.text.partition(b"quiet from here")[2]
    assert it.text.count(b"\x1b[?25l") == it.text.count(b"\x1b[?25h"), "the cursor is shown again"


def test_map_in_chunks(shared, tmp_path):
    """Several items for each worker at a time, in order; a timeout counts from the call."""
    assert list(shared.map(divmod, range(10), range(1, 11), chunksize=4)) == [divmod(a, a + 1) for a in range(10)]
    with pytest.raises(ValueError, match="chunksize"):
        shared.map(abs, [1], chunksize=0)
    with pytest.raises(concurrent.futures.TimeoutError):
        list(shared.map(jobs.wait_for, [tmp_path / "go"], timeout=0.2, chunksize=2))
    (tmp_path / "go").touch()


def test_in_a_notebook(fleet, monkeypatch, tmp_path):
    """A main module without a file: functions and classes go by value, where cloudpickle is."""
    pytest.importorskip("cloudpickle")
    code = (
        "from gpupool_sync import GPUPool\n"
        "class Pair(tuple): pass\n"
        "def double(pair): return Pair((2 * pair[0], 2 * pair[1]))\n"
        "found = GPUPool().map(double, [Pair((1, 2))], max_workers=1, progress=False)\n"
        "print(found, type(found[0]).__name__)\n"
    )
    done = start(fleet, "-c", code).communicate(timeout=LONG)
    assert "[(2, 4)] Pair" in done[0]


def test_in_a_notebook_without_cloudpickle(shared, monkeypatch):
    """Says at once what to install."""
    monkeypatch.setattr(executor_module, "_interactive", lambda: True)
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    monkeypatch.setattr(of_the_notebook, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "of_the_notebook", of_the_notebook, raising=False)
    with pytest.raises(GPUPoolError, match="pip install cloudpickle"):
        shared.submit(of_the_notebook)


def of_the_notebook():
    pass


# -- ending ------------------------------------------------------------------------------------------------------


def test_a_cancelled_task_is_not_waited_for(one, tmp_path):
    """`concurrent.futures.wait` hears of it at once, and the worker never does."""
    running = one.submit(jobs.tell_and_wait, tmp_path / "task", tmp_path / "go")
    queued = one.submit(jobs.tell, tmp_path / "never", 1)
    jobs.told(tmp_path / "task")
    assert queued.cancel()
    assert concurrent.futures.wait([queued], timeout=LONG).done == {queued}
    assert not running.cancel()
    (tmp_path / "go").touch()
    running.result(LONG)
    assert not (tmp_path / "never").exists()


def test_shutdown_that_cancels(pool, tmp_path):
    """What runs is done, the rest is cancelled; a callback may use the executor meanwhile."""
    executor = pool.executor(max_workers=1)
    running = executor.submit(jobs.tell_and_wait, tmp_path / "task", tmp_path / "go")
    queued = [executor.submit(jobs.what_i_see) for _ in range(3)]
    refused = []

    def submit_more(_):
        try:
            executor.submit(jobs.what_i_see)
        except RuntimeError as exc:
            refused.append(exc)

    for future in queued:
        future.add_done_callback(submit_more)
    jobs.told(tmp_path / "task")
    executor.shutdown(wait=False, cancel_futures=True)
    assert all(future.cancelled() for future in queued)
    assert len(refused) == 3
    assert not running.done()
    (tmp_path / "go").touch()
    executor.shutdown()
    assert running.result(0)


def test_shutdown_that_does_not_wait(pool, tmp_path):
    """Returns at once, takes no more; what is queued is done all the same, and the GPU comes back."""
    executor = pool.executor(max_workers=1)
    futures = [executor.submit(jobs.wait_for, tmp_path / "go") for _ in range(2)]
    executor.shutdown(wait=False)
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(jobs.what_i_see)
    assert not futures[0].done()
    (tmp_path / "go").touch()
    assert [future.result(LONG) for future in futures]


def test_shutdown_waits_for_no_gpu_that_nobody_needs(pool, fleet, tmp_path):
    """One worker has done it all; the others, which still wait for GPUs of somebody else, are sent home."""
    with GPUPool(fleet.urls) as others:
        taken = [others.acquire(timeout=20) for _ in range(2)]
        with pool.executor(max_workers=3) as executor:
            futures = [executor.submit(jobs.wait_for, tmp_path / "go") for _ in range(3)]
            eventually(lambda: pool.stats()["waiting"] == 2, LONG)
            executor.shutdown(wait=False)
            (tmp_path / "go").touch()
        assert all(future.done() for future in futures)
        assert all(not gpu.released for gpu in taken)
        for gpu in taken:
            gpu.release()


def test_a_gpu_that_comes_too_late_is_given_back(pool, fleet):
    """The tasks were done by then: no worker is started on it."""
    with GPUPool(fleet.urls) as others:
        taken = [others.acquire(timeout=20) for _ in range(2)]
        with pool.executor(max_workers=3) as executor:
            assert len(list(executor.map(jobs.what_i_see, range(3)))) == 3
            eventually(lambda: pool.stats()["waiting"] == 2, LONG)
            for gpu in taken:
                gpu.release()
            eventually(lambda: pool.stats()["releases"] == 2, LONG)
            assert len(executor.workers) == pool.stats()["held"] == 1


def test_cancelled_tasks_wait_for_no_gpu(pool, fleet):
    """All GPUs are somebody else's, the tasks are cancelled: the block ends."""
    with GPUPool(fleet.urls) as others:
        taken = [others.acquire(timeout=20) for _ in range(3)]
        with pool.executor() as executor:
            futures = [executor.submit(jobs.what_i_see) for _ in range(3)]
            eventually(lambda: pool.stats()["waiting"] == 3, LONG)
            for future in futures:
                future.cancel()
        for gpu in taken:
            gpu.release()


def test_an_error_in_the_block_waits_for_the_tasks(pool, tmp_path):
    """As with the executors of the standard library."""
    futures = []
    with pytest.raises(ZeroDivisionError), pool.executor(max_workers=1) as executor:
        futures.append(executor.submit(jobs.what_i_see)) or jobs.divide(1, 0)
    assert futures[0].result(0)


def test_workers_can_be_terminated(pool, tmp_path):
    """What runs fails at once, what is queued is cancelled."""
    executor = pool.executor(max_workers=1)
    running = executor.submit(jobs.tell_and_sleep, tmp_path / "task")
    queued = executor.submit(jobs.what_i_see)
    pid = jobs.told(tmp_path / "task")
    executor.terminate_workers()
    assert gone(pid)
    with pytest.raises(WorkerDied, match=r"by terminate_workers\(\)"):
        running.result(0)
    with pytest.raises(CancelledError):
        queued.result(0)
    assert pool.stats()["held"] == 0


def test_a_pool_that_is_closed_ends_its_executors(fleet, tmp_path):
    """What runs is done on the GPU that it has; what waits fails, and so does what comes."""
    with GPUPool(fleet.urls) as pool:
        executor = pool.executor(max_workers=1)
        running = executor.submit(jobs.tell_and_wait, tmp_path / "task", tmp_path / "go")
        queued = executor.submit(jobs.what_i_see)
        pid = jobs.told(tmp_path / "task")
    with pytest.raises(PoolClosed):
        queued.result(LONG)
    with pytest.raises(PoolClosed):
        executor.submit(jobs.what_i_see)
    (tmp_path / "go").touch()
    assert running.result(LONG)
    executor.shutdown()
    assert gone(pid)
    with GPUPool(fleet.urls) as pool:
        for _ in range(3):
            pool.acquire(timeout=20)


# -- scripts -----------------------------------------------------------------------------------------------------


def start(fleet, *arguments):
    """A script over the fleet, in a process group of its own, as a shell starts it."""
    here = Path(__file__).parent
    if arguments[0] != "-c":
        arguments = (str(here / "executor_jobs.py"), *map(str, arguments))
    return subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, "GPU_SERVICE_ENDPOINTS": ",".join(fleet.urls), "PYTHONPATH": str(here)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def all_free(fleet):
    with GPUPool(fleet.urls) as pool:
        for _ in range(3):
            pool.acquire(timeout=20)


def test_a_script_that_ends_has_its_tasks_done(fleet, tmp_path):
    """Without any shutdown, as with the executors of the standard library."""
    script = start(fleet, "left_alone", tmp_path)
    _, errors = script.communicate(timeout=LONG)
    assert script.returncode == 0, errors
    assert len(list(tmp_path.glob("done-*"))) == 3
    all_free(fleet)


@pytest.mark.parametrize("how", ["map", "with", "bare"])
def test_ctrl_c(fleet, tmp_path, how):
    """The running task is interrupted, once; the rest is not begun; the script ends, and the GPU is free."""
    script = start(fleet, "interrupted", tmp_path, how)
    worker = jobs.told(tmp_path / "task")
    os.killpg(script.pid, signal.SIGINT)
    _, errors = script.communicate(timeout=LONG)
    assert script.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in errors
    assert jobs.told(tmp_path / "task-interrupted") == worker
    assert gone(worker)
    assert not (tmp_path / "second").exists()
    all_free(fleet)


def test_workers_end_with_a_script_that_is_killed(fleet, tmp_path):
    """Also in the middle of a task: the GPU comes back."""
    script = start(fleet, "victim", tmp_path)
    worker = jobs.told(tmp_path / "task")
    script.kill()
    script.communicate(timeout=LONG)
    eventually(lambda: gone(worker), LONG)
    all_free(fleet)


def test_a_fork_of_the_script_does_not_hold_up_its_workers(fleet, tmp_path):
    """The child has copies of the pipes: workers end when they are told to, and the child cannot use them."""
    script = start(fleet, "forked_while_it_runs", tmp_path)
    _, errors = script.communicate(timeout=LONG)
    assert script.returncode == 0, errors
    assert jobs.told(tmp_path / "child") == 1
    assert jobs.told(tmp_path / "seconds") < executor_module.END_TIME / 2
    all_free(fleet)


def test_a_script_without_a_guard(fleet, tmp_path):
    """Its workers import it, and it says what is missing."""
    script = start(fleet, "unguarded", tmp_path)
    _, errors = script.communicate(timeout=LONG)
    assert script.returncode == 1
    assert "if __name__ == '__main__'" in errors
