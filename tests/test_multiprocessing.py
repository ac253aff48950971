"""The pool in other people's processes: pools of workers, forks at any instant, odd endings."""

from __future__ import annotations

import code
import contextlib
import json
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

import process_jobs as jobs
from cards import Cards, local_pool
from gpupool_sync import AcquireTimeout, Endpoint, GPUPool, PoolClosed, importing
from gpupool_sync.leases.base import Queued, Refused, Share
from gpupool_sync.leases.host import HostStore, host_store
from gpupool_sync.leases.http import HTTPStore
from gpupool_sync.leases.memory import MemoryStore
from gpupool_sync.testing import FakeFleet
from helpers import HoldLog, eventually
from process_jobs import Stepped, uuid_of
from test_leases_contract import claim, granted

HERE = Path(__file__).parent
#: For scripts: what is imported here, they find too.
PATH = os.pathsep.join([str(HERE), str(HERE.parent)])
METHODS = ("fork", "spawn", "forkserver")
#: Instants, drawn by chance, at which each kind of work is forked into; a sweep over all of them found nothing more.
INSTANTS = 12

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(sys.platform != "linux", reason="fork and the kernel locks of Linux"),
    # Since Python 3.12 a fork of a process with threads warns. That the pool survives it is what is tested here.
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _no_children_left():
    yield
    for child in multiprocessing.active_children():
        child.kill()
        child.join(20)


@pytest.fixture
def name(request):
    """Of this test's pools: leases of other tests in the same directory are not ours."""
    return f"{request.node.name}-{os.urandom(3).hex()}"


@pytest.fixture
def pool(monkeypatch, name):
    """Over three invented cards of this machine, with the kernel's locks."""
    with local_pool(monkeypatch, Cards(3), lease_store=None, name=name) as made:
        made.open(wait=True)
        yield made


@pytest.fixture
def log(tmp_path):
    return HoldLog(tmp_path / "holds")


def context_of(method):
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["process_jobs"])
    return context


def nothing_left(pool, name, number=3):
    """No lease of the test is left, and all cards can be had."""
    store = host_store()
    eventually(
        lambda: not [info for info in store.leases() if info.holder.name == name],
        message=lambda: f"leases left: {store.leases()}",
    )
    pool.acquire(count=number, timeout=20).release()


def judged(log, at_least):
    assert len(log.holds()) >= at_least
    assert log.overlaps() == []
    assert log.token_regressions() == []


def victim_of(log):
    """The process that holds a card until it is killed."""

    def look():
        found = [hold for hold in log.holds() if hold.who.startswith("victim")]
        return found[-1] if found else None

    hold = eventually(look, 30, "the victim holds a card")
    return int(hold.who.split()[1]), hold.key


# -- start methods and executors -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_processes_of_every_start_method(pool, log, name, method):
    """Workers share the cards with their parent and with one that is killed with a card; nothing is held twice."""
    context = context_of(method)
    with pool.gpu(timeout=20) as mine, log.holding(mine.uuid, mine.fencing_token):
        victim = context.Process(target=jobs.hold_for_ever, args=(pool, log, 3))
        victim.start()
        pid, key = victim_of(log)
        assert pid == victim.pid
        assert key != mine.uuid
        workers = [context.Process(target=jobs.take_turns, args=(pool, log, 3, 8)) for _ in range(3)]
        for worker in workers:
            worker.start()
        # One card is left for three, until another comes back from the dead.
        eventually(lambda: len(log.holds()) >= 4, 30, "somebody has had the third card")
        victim.kill()
        for worker in (*workers, victim):
            worker.join(40)
        assert [worker.exitcode for worker in workers] == [0, 0, 0]
        assert victim.exitcode == -signal.SIGKILL
        mine.check()
    judged(log, 26)
    nothing_left(pool, name)


@pytest.mark.parametrize(("method", "tasks"), [("fork", None), ("fork", 2), ("spawn", None), ("forkserver", 3)])
def test_a_pool_of_workers_that_keep_theirs(pool, log, name, method, tasks):
    """`multiprocessing.Pool` with an initializer: one GPU pool for each worker, a worker is killed with a card."""
    with context_of(method).Pool(
        3, initializer=jobs.start_worker, initargs=(pool, log, 3), maxtasksperchild=tasks
    ) as workers:
        pids = workers.map(jobs.one_turn, range(9), chunksize=1)
        lost = workers.apply_async(jobs.hold_in_worker)
        victim, _ = victim_of(log)
        os.kill(victim, signal.SIGKILL)
        pids += workers.map(jobs.one_turn, range(9), chunksize=1)
        # All cards at once: also that of the killed one, while the workers go on living.
        pool.acquire(count=3, timeout=20).release()
        assert not lost.ready()  # nobody tells: that is multiprocessing.Pool's way
        assert os.getpid() not in pids
        if tasks is not None:
            assert len(set(pids)) >= 18 // tasks
        workers.terminate()
        workers.join()
    judged(log, 19)
    nothing_left(pool, name)


@pytest.mark.parametrize("method", METHODS)
def test_an_executor_that_is_handed_the_pool(pool, log, name, method):
    """`ProcessPoolExecutor`: the pool goes along with each task; a killed worker breaks the executor, not the pool."""
    with ProcessPoolExecutor(2, mp_context=context_of(method)) as executor:
        with pool.gpu(timeout=20) as mine, log.holding(mine.uuid, mine.fencing_token):
            futures = [executor.submit(jobs.take_turns, pool, log, 3, 2) for _ in range(6)]
            assert os.getpid() not in {future.result(40) for future in futures}
            mine.check()
        doomed = executor.submit(jobs.hold_for_ever, pool, log, 3)
        victim, _ = victim_of(log)
        os.kill(victim, signal.SIGKILL)
        with pytest.raises(BrokenProcessPool):
            doomed.result(40)
    judged(log, 14)
    nothing_left(pool, name)


@pytest.mark.parametrize("method", METHODS)
def test_an_executor_with_an_initializer_over_a_server(log, method):
    """Leases of a server, kept by each worker's own pool: no overlap, and all are back when the workers end."""
    with FakeFleet([2]) as fleet, GPUPool([Endpoint(fleet[0].url, name="alpha")], ttl=30.0, poll_interval=0.2) as pool:
        pool.open(wait=True)
        arguments = (pool, log, 0)
        with ProcessPoolExecutor(
            3, mp_context=context_of(method), initializer=jobs.start_worker, initargs=arguments
        ) as executor:
            with pool.gpu(timeout=20) as mine, log.holding(mine.uuid, mine.fencing_token):
                assert os.getpid() not in set(executor.map(jobs.one_turn, range(12)))
                mine.check()
            list(executor.map(jobs.one_turn, range(6)))
        judged(log, 19)
        assert pool.leases().leases == []
        pool.acquire(count=2, timeout=20).release()


def test_an_error_in_a_forked_child_ends_its_lease_only(pool, name):
    """A child that dies of an exception gives its own card back, at once and by itself, and keeps its parent's."""
    with pool.gpu(timeout=20) as mine:
        child = context_of("fork").Process(target=_quiet, args=(jobs.raise_with_a_gpu, pool, 3))
        child.start()
        child.join(30)
        assert child.exitcode == 1
        mine.check()
        (left,) = [info for info in host_store().leases() if info.holder.name == name]
        assert left.cards == (mine.uuid,)
        pool.acquire(count=2, timeout=20).release()
    nothing_left(pool, name)


def _quiet(job, *arguments):
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - of this child only
    job(*arguments)


# -- pickles ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["new", "open", "holding", "closed"])
def test_a_pool_in_any_state_pickles_as_its_settings(monkeypatch, name, tmp_path, state):
    """Whatever the pool is doing, the copy is a pool that was not opened yet, with the same settings and `on_lost`."""
    store = f"host:{tmp_path / 'locks'}"
    pool = local_pool(
        monkeypatch, Cards(2), lease_store=store, name=name, on_lost=jobs.note_lost, strategy="round_robin"
    )
    held = None
    if state != "new":
        pool.open(wait=True)
    if state in ("holding", "closed"):
        held = pool.acquire(timeout=20)
    if state == "closed":
        pool.close()
    copy = pickle.loads(pickle.dumps(pool))
    assert copy._state.settings == pool._state.settings
    assert copy._state.settings.lease_store == store
    assert jobs.describe(copy)["held"] == 0
    assert "not opened yet, 0 leases" in repr(copy)
    assert copy._state.on_lost is jobs.note_lost
    assert copy._state.strategy is not pool._state.strategy
    with copy, copy.gpu(timeout=20) as gpu:
        if state == "holding":
            assert gpu.uuid != held.uuid
            with pytest.raises(AcquireTimeout, match="held by"):
                copy.acquire(uuid=held.uuid, timeout=0)
            held.check()
    pool.close()


def test_a_pool_that_is_sent_tells_what_it_is(pool, name):
    """A real other process gets the settings, the function that `on_lost` names, and no lease."""
    pool.add_endpoint("http://127.0.0.1:9", name="far")
    sent = pickle.loads(pickle.dumps(pool))
    assert list(sent._state.endpoint_configs) == list(pool._state.endpoint_configs)
    with (
        GPUPool(name=name, on_lost=jobs.note_lost) as other,
        other.gpu(timeout=20),
        ProcessPoolExecutor(1, mp_context=context_of("spawn")) as executor,
    ):
        told = executor.submit(jobs.describe, other).result(40)
    assert told["held"] == 0
    assert told["on_lost"] == "note_lost"
    assert "not opened yet" in told["repr"]


def test_what_belongs_to_a_process_does_not_pickle(pool):
    """Handles stay; an executor that is handed one says why, and what to pass instead."""
    with (
        pool.gpu(timeout=20) as gpu,
        ProcessPoolExecutor(1, mp_context=context_of("fork")) as executor,
        pytest.raises(TypeError, match=r"belongs to its process .* pass the pool, or gpu\.env\(\)"),
    ):
        executor.submit(repr, gpu).result(40)
    with pool.gpus(2, timeout=20) as gpus, pytest.raises(TypeError, match="belongs to its process"):
        pickle.dumps(gpus)
    context = pool.gpu(timeout=20)
    with context, pytest.raises(TypeError):
        pickle.dumps(context)
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(GPUPool(on_lost=lambda gpu: None))
    with pytest.raises(TypeError):  # a book of this process: "memory:" as a string says so in another process
        pickle.dumps(GPUPool(lease_store=MemoryStore()))


# -- forks at any instant --------------------------------------------------------------------------------------


@contextlib.contextmanager
def forked(work):
    """A forked child that runs *work*, tells its result, and then lives on until the block ends."""
    told_by, tell = os.pipe()
    stay, ended = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            jobs.die_when_stuck()
            os.close(ended)
            os.close(told_by)
            try:
                result = work()
            except BaseException as exc:
                result = f"{type(exc).__name__}: {exc}"
            os.write(tell, json.dumps(result).encode() + b"\n")
            os.close(tell)
            os.read(stay, 1)
        os._exit(0)
    os.close(stay)
    os.close(tell)

    def result():
        with open(told_by, closefd=False) as file:
            line = file.readline()
        assert line, "the child lives, and does not hang"
        return json.loads(line)

    try:
        yield result
    finally:
        os.close(ended)
        os.close(told_by)
        os.waitpid(child, 0)


class Stranger:
    """A third process, with a pool of its own."""

    def __init__(self, pool, number):
        self._here, there = multiprocessing.Pipe()
        self._process = context_of("spawn").Process(target=jobs.stranger, args=(there, pool, number), daemon=True)
        self._process.start()
        there.close()

    def can_have(self, uuid, timeout=60.0, **request):
        self._here.send((uuid, timeout, request))
        assert self._here.poll(100), "the other process answers"
        return self._here.recv()

    def close(self):
        self._here.send(None)
        self._process.join(20)
        self._here.close()


class Ground:
    """A pool with one card held and one thread that waits for just that card, and a third process."""

    def __init__(self, pool, uuids, number=0):
        self.pool = pool
        self.fresh: GPUPool | None = None
        self.held_uuid, self.stepped_uuid, self.free_uuid = uuids
        self.context = pool.gpu(uuid=self.held_uuid, timeout=20)
        self.held = self.context.__enter__()
        self.got: list[object] = []
        self.waiter = threading.Thread(target=self._wait, daemon=True)
        self.waiter.start()
        self.stranger = Stranger(pool, number)
        eventually(lambda: pool.stats()["waiting"] == 1)
        eventually(lambda: len(pool.leases().queue) == 1, message="the thread has its ticket")

    def _wait(self):
        gpu = self.pool.acquire(uuid=self.held_uuid)
        self.got.append(gpu.uuid)
        gpu.release()

    def block(self):
        with self.pool.gpu(uuid=self.stepped_uuid, timeout=30):
            pass

    def share(self):
        with self.pool.gpu(uuid=self.stepped_uuid, timeout=30, max_holders=2):
            pass

    def wait(self):
        with contextlib.suppress(AcquireTimeout):
            self.pool.acquire(uuid=self.held_uuid, timeout=0.02)

    def open_and_close(self):
        self.fresh = GPUPool(poll_interval=60.0)
        with self.fresh:
            self.fresh.open(wait=True)

    def look(self):
        self.pool.leases()
        self.pool.status()
        self.pool.stats()

    def in_child(self):
        """What a forked child can do; returns what is wrong."""
        wrong = []
        stats = self.pool.stats()
        if (stats["held"], stats["waiting"], stats["grants"], stats["threads"]) != (0, 0, 0, 0):
            wrong.append(f"not a new pool: {stats}")
        self.held.release()
        self.held.__exit__(None, None, None)
        self.context.__exit__(None, None, None)
        self.pool.release_all()
        with self.pool.gpu(uuid=self.free_uuid, timeout=60) as gpu:
            if gpu.uuid != self.free_uuid or self.pool.stats()["held"] != 1:
                wrong.append("another card")
            with contextlib.suppress(AcquireTimeout):
                self.pool.acquire(uuid=self.held_uuid, timeout=0)
                wrong.append("the child got its parent's card")
        if self.fresh is not None:  # its parent was opening, using or closing it
            with contextlib.suppress(PoolClosed), self.fresh.gpu(uuid=self.free_uuid, timeout=60) as gpu:
                gpu.check()
            self.fresh.close()
        if self.pool.stats()["held"] != 0:
            wrong.append("a lease is left")
        self.pool.close()
        return wrong

    def fork_into(self, work, at, check):
        """Fork while another thread stands before the *at*-th line of *work*."""
        stepped = Stepped(work, at)
        stepped.wait()
        with forked(self.in_child) as result:
            assert result() == [], f"forked while a thread stood at {stepped.place}"
            stepped.go_on()
            if check:
                # The child lives on, with whatever it has inherited.
                for request in {"max_holders": 2}, {}:
                    got = self.stranger.can_have(self.stepped_uuid, **request)
                    assert got is True, f"forked at {stepped.place}"
                assert "held by" in str(self.stranger.can_have(self.held_uuid, 0)), f"forked at {stepped.place}"
        self.held.check()
        return stepped

    def forks(self, work, number=INSTANTS):
        whole = self.fork_into(work, 1_000_000, check=False)
        # Wherever a lock of ours is held, and some of the other instants.
        instants = {*whole.locked.values(), *random.sample(range(1, whole.lines + 1), min(number, whole.lines))}
        for at in sorted(instants):
            self.fork_into(work, at, check=True)
        assert self.pool.stats()["held"] == 1
        eventually(lambda: len(self.pool.leases().queue) == 1, message="one ticket is left, that of the waiter")

    def end(self):
        assert self.got == []
        self.held.release()
        self.waiter.join(30)
        assert self.got == [self.held_uuid]
        self.stranger.close()


@pytest.fixture
def ground(pool):
    made = Ground(pool, [uuid_of(index) for index in range(3)], 3)
    yield made
    made.end()


@pytest.mark.parametrize("kind", ["block", "share", "wait", "look", "open_and_close"])
def test_a_fork_at_any_instant(ground, kind, monkeypatch):
    """
    While one thread waits and another is anywhere inside the pool, a fork harms nobody.

    The child holds nothing, releases nothing, and has a card of its own at once; no lock that a thread of its
    parent held stays locked, in the child or by it.
    """
    # Our thread stands where others only pass by: the fork does not wait for it.
    monkeypatch.setattr(importing, "LONGEST_IMPORT", 0.01)
    ground.forks(getattr(ground, kind))


@pytest.mark.parametrize("kind", ["block", "wait"])
def test_a_fork_at_any_instant_with_leases_of_a_server(kind):
    """The same where leases have a ttl: the child neither releases nor renews what its parent has."""
    with FakeFleet([3]) as fleet:
        endpoint = Endpoint(fleet[0].url, name="alpha")
        with GPUPool([endpoint], ttl=30.0, poll_interval=0.2) as pool:
            pool.open(wait=True)
            with pool.gpus(3, timeout=20) as gpus:
                uuids = [gpu.uuid for gpu in gpus]
            ground = Ground(pool, uuids)
            ground.forks(getattr(ground, kind), 8)
            store = pool._state.engine.store_of("alpha")
            assert [info.cards for info in store.leases()] == [(ground.held_uuid,)]
            ground.end()


def test_a_forked_child_does_not_keep_its_parents_lease():
    """
    The parent's lease is renewed by the parent alone.

    As long as it does, the lease lives; when it stops, the lease ends with its ttl, although a child lives on and
    renews a lease of its own.
    """
    with (
        FakeFleet([2]) as fleet,
        GPUPool([Endpoint(fleet[0].url, name="alpha")], ttl=4.0, poll_interval=0.2) as pool,
    ):
        gpu = pool.acquire(timeout=20)
        keeper, lease = pool._state.engine.keeper, gpu._tie.grant.id
        asked: list[list[str]] = []

        def use_own():
            # Its own card for several ttls, with an eye on what it renews.
            renew = HTTPStore.renew

            def watched(store, ids):
                asked.append(list(ids))
                return renew(store, ids)

            HTTPStore.renew = watched
            with pool.gpu(timeout=60) as mine:
                eventually(lambda: len(asked) >= 6, 60, "the child renews its own lease")
                mine.check()
            pool.close()
            return sorted({each == lease for ids in asked for each in ids})

        first = keeper.good_until(lease)
        with forked(use_own) as result:
            assert result() == [False]
            assert keeper.good_until(lease) > first + 4.0, "the parent has renewed its own"
            gpu.check()
            # The parent falls silent; its child is still there.
            keeper.stop()
            store = pool._state.engine.store_of("alpha")
            eventually(lambda: store.leases() == [], 60, "the lease ends with its ttl")
            assert gpu.lost


def test_a_ticket_ends_with_its_process_though_a_child_lives_on(pool, tmp_path):
    """A waiter is killed, its forked child lives: the ticket is a dead one, and who comes next has the card."""
    queue = Path(host_store().path) / "queue"

    def tickets():
        return {each.name for each in queue.iterdir() if each.name.startswith("ticket-")}

    held = pool.acquire(count=3, timeout=20)
    before = tickets()
    process = subprocess.Popen(
        [sys.executable, str(HERE / "process_jobs.py"), "orphan_of_a_waiter", "3"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": PATH},
    )
    child = None
    try:
        child = json.loads(process.stdout.readline())["child"]
        (ticket,) = tickets() - before
        process.kill()
        process.wait(20)
        assert pool.leases().queue == [], "who is dead does not wait"
        held.release()
        assert ticket not in tickets(), "its socket is nobody's any more"
        pool.acquire(count=3, timeout=20).release()
    finally:
        process.kill()
        process.wait(20)
        process.stdout.close()
        if child is not None:
            os.kill(child, signal.SIGKILL)


def test_what_another_reads_of_the_directory_hides_nothing(tmp_path):
    """
    A thread or a forked child that just lists the directory by an inherited descriptor moves its position.

    Whoever counts the shares of a card, or reads the queue, sees all of them nevertheless.
    """
    store = HostStore(str(tmp_path / "locks"))
    half = Share(places=2)
    granted(store.claim(claim("a", share=half)))
    granted(store.claim(claim("a", share=half)))
    assert isinstance(store.claim(claim("b", "a", share=Share(places=1), count=2, queue=True)), Queued)
    with os.scandir(store._directory.fd) as files, os.scandir(store._directory.queue_fd) as queue:
        next(files)
        next(queue)
        assert isinstance(store.claim(claim("a", share=half)), Refused), "two places are two"
        assert len(store.leases()) == 2
        assert len(store.queue()) == 1
    store.close()


def test_a_killed_holders_card_is_found_beside_free_ones(pool, log):
    """Who wants all three cards has them, although nobody else has noticed yet that the holder of one is dead."""
    victim = context_of("fork").Process(target=jobs.hold_for_ever, args=(pool, log, 3))
    victim.start()
    victim_of(log)
    eventually(lambda: host_store().is_held(victim_of(log)[1]), message="its record is seen")
    victim.kill()
    victim.join(20)
    pool.acquire(count=3, timeout=20).release()


# -- odd endings -----------------------------------------------------------------------------------------------


def script(name, cards=2, status=0):
    """Run a script of `process_jobs`; what it said."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(HERE / "process_jobs.py"), name, str(cards)],
        capture_output=True,
        text=True,
        timeout=150,
        env={**os.environ, "PYTHONPATH": PATH},
        check=False,
    )
    assert done.returncode == status, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def was_released(uuid):
    """Whether the last lease of the card was given back in order; else its process just died with it."""
    record = json.loads((Path(host_store().path) / f"gpu-{uuid}").read_bytes())
    return record["released_at"] is not None


def test_a_fork_waits_for_modules_that_are_being_imported():
    """A child never finds half of what an opening pool imports, in which it would be stuck for ever."""
    ((told,), stderr) = script("fork_during_first_import")
    assert told["place"].startswith("keeper.py")
    assert told["child"] == 0, stderr


def test_sys_exit_in_a_block():
    """The block ends as with any exception: the card is given back before the process ends, without a word."""
    (told,), stderr = script("exits_in_block", status=3)
    assert was_released(told["uuid"])
    assert stderr == ""


def test_sys_exit_in_a_thread():
    """It ends the thread and its block; the process goes on and holds nothing."""
    (told,), stderr = script("exits_in_thread")
    assert told == {"held": 0, "leases": 0}
    assert stderr == ""


def test_the_interpreter_ends_with_a_lease_out():
    """Nobody released it: it is given back at the end all the same."""
    (told,), stderr = script("ends_with_leases")
    assert was_released(told["uuid"])
    assert stderr == ""


@pytest.mark.parametrize("name", ["ends_with_a_waiter", "ends_with_a_daemon_waiter"])
def test_the_interpreter_ends_while_a_thread_waits(name):
    """A thread that waits for ever does not keep the process, and its ticket does not stay."""
    said, stderr = script(name, cards=1)
    assert said[0]["waiting"] == 1
    if name == "ends_with_a_waiter":
        assert said[1] == {"told": "PoolClosed"}
    assert stderr == ""
    assert was_released(said[0]["uuid"])
    assert not [info for info in host_store().queue() if info.holder.pid not in (0, os.getpid())]


def test_a_child_that_leaves_its_parents_blocks():
    """It unwinds through the parent's blocks to its own end; the parent's lease is as it was."""
    said, stderr = script("child_leaves_the_parents_block")
    assert said == [{"child": 5, "held": 1, "refused": True, "leases": 1, "uuid": said[0]["uuid"]}]
    assert was_released(said[0]["uuid"])
    assert stderr == ""


def test_a_kept_traceback_keeps_no_lease(pool):
    """A block that ended with an error has given its card back, although the error and its frames live on."""
    kept = []
    for _ in range(3):  # as often as there are cards
        try:
            with pool.gpu(timeout=0) as gpu:
                raise RuntimeError(gpu.uuid)
        except RuntimeError as exc:
            kept.append(exc)
    with pytest.raises(AcquireTimeout) as info, pool.gpus(3, timeout=20):
        pool.acquire(timeout=0.05)
    kept.append(info.value)
    assert all(exc.__traceback__ is not None for exc in kept)
    assert pool.stats()["held"] == 0
    assert pool.leases().queue == []
    pool.acquire(count=3, timeout=0).release()


def test_a_notebook_whose_cell_failed(pool, capsys, monkeypatch):
    """
    After an error in a cell `sys.last_traceback` keeps its frames.

    A block's card is free all the same; one of `acquire()` stays with its handle, which the next cell can release.
    """
    for name in ("last_type", "last_value", "last_traceback", "last_exc"):
        monkeypatch.setattr(sys, name, None, raising=False)
    notebook = code.InteractiveConsole({"pool": pool})

    def cell(source):
        notebook.runsource(source, symbol="exec")

    cell("with pool.gpu(timeout=20) as gpu:\n    1 / 0\n")
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert sys.last_traceback is not None
    assert pool.stats()["held"] == 0
    cell("mine = pool.acquire(timeout=20)\n1 / 0\n")
    assert pool.stats()["held"] == 1
    cell("mine.release()\n")
    assert pool.stats()["held"] == 0
    cell("def train():\n    gpu = pool.acquire(timeout=20)\n    1 / 0\ntrain()\n")
    assert pool.stats()["held"] == 1
    cell("pool.release_all()\n")
    assert pool.stats()["held"] == 0
    assert pool.stats()["forgotten"] == 0
    notebook.locals.clear()


def test_sys_exit_in_a_block_of_this_process(pool):
    """`SystemExit` is an exception like any other; a generator that is closed in a block, too."""
    with pytest.raises(SystemExit), pool.gpu(timeout=20):
        sys.exit(1)
    assert pool.stats()["held"] == 0

    def results():
        with pool.gpu(timeout=20) as gpu:
            while True:
                yield gpu.uuid

    left = results()
    assert next(left)
    assert pool.stats()["held"] == 1
    left.close()
    assert pool.stats()["held"] == 0


def test_closing_with_leases_out_frees_them_for_others(pool, name):
    """`close()` gives the cards back for everybody on the host; a late release of their handles is harmless."""
    one, pair = pool.acquire(timeout=20), pool.acquire(count=2, timeout=20)
    pool.close()
    other = HostStore(host_store().path)  # as another process sees it
    assert not [info for info in other.leases() if info.holder.name == name]
    other.close()
    one.release()
    pair.release()
    assert (one.released, pair.released) == (True, True)
    pool.open()
    pool.acquire(count=3, timeout=20).release()
