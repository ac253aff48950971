"""The pool over cards that the test invents: acquiring, waiting, refusing, counting."""

from __future__ import annotations

import copy
import gc
import json
import multiprocessing
import os
import pickle
import threading
import time
import warnings

import pytest
import responses

from cards import Cards, local_pool
from gpupool_sync import (
    AcquireTimeout,
    ConfigError,
    Endpoint,
    ExclusivityWarning,
    GPUPool,
    LeaseLost,
    NoSuchGPU,
    PoolClosed,
    TooManyWaiting,
    devices,
)
from gpupool_sync.arbiters import make_store
from gpupool_sync.errors import GPUPoolError
from gpupool_sync.leases import tickets
from gpupool_sync.leases.host import HostStore
from gpupool_sync.leases.memory import MemoryStore
from gpupool_sync.models import ComputeProcess, GPUFault
from helpers import HoldLog, eventually, run_threads


@pytest.fixture
def cards():
    return Cards(2)


@pytest.fixture
def pool(monkeypatch, cards):
    with local_pool(monkeypatch, cards) as pool:
        yield pool


def in_thread(fn):
    """Run *fn* in a thread; returns the thread and the list its result or error goes to."""
    results: list[object] = []

    def run():
        try:
            results.append(fn())
        except BaseException as exc:
            results.append(exc)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, results


def waiting(pool, number):
    eventually(lambda: pool.stats()["waiting"] == number, message=f"{number} waiters")


# -- the plain way ---------------------------------------------------------------------------------------------


def test_a_gpu_is_ours_for_the_block(pool):
    """Within the block nobody else gets the GPU; after it anybody may."""
    with pool.gpu() as gpu:
        assert [info.cards for info in pool._state.engine.arbiter.leases()] == [(gpu.uuid,)]
        assert (gpu.released, gpu.lost) == (False, False)
        gpu.check()
    assert pool._state.engine.arbiter.leases() == []
    assert gpu.released
    with pytest.raises(LeaseLost, match="released before"):
        gpu.check()


def test_acquire_and_release(pool):
    """Without a block: acquire, release, and a second release does nothing."""
    first = pool.acquire()
    second = pool.acquire()
    assert {first.local_gpu_id, second.local_gpu_id} == {0, 1}
    first.release()
    first.release()
    pool.release(second)

    assert pool.stats()["held"] == 0
    assert pool.stats()["releases"] == 2


def test_a_handle_is_a_context_manager_too(pool):
    """``with pool.acquire() as gpu`` releases as well."""
    with pool.acquire() as gpu:
        pass
    assert gpu.released


def test_the_pool_opens_at_first_use(monkeypatch, cards):
    """No thread and no reading before somebody asks."""
    pool = local_pool(monkeypatch, cards)
    assert cards.reads == 0
    try:
        with pool.gpu():
            pass
    finally:
        pool.close()


def test_several_gpus_come_and_go_together(pool):
    """``pool.gpus(2)`` has one lease for both, and gives both back."""
    with pool.gpus(2) as gpus:
        assert [gpu.local_gpu_id for gpu in gpus] == [0, 1]
        assert (len(gpus), gpus[1].fencing_token) == (2, gpus.fencing_token)
        assert len(pool._state.engine.arbiter.leases()) == 1
        with pytest.raises(AcquireTimeout):
            pool.acquire(timeout=0)
    with pool.gpus(1) as gpus:
        assert len(gpus) == 1


def test_handles_describe_themselves(pool):
    """A handle tells where its GPU is and among whom it is exclusive."""
    with pool.gpu(note="n") as gpu:
        assert (gpu.host, gpu.is_local, gpu.scope, gpu.name) == ("here", True, "process", "NVIDIA A100")
        assert gpu.global_gpu_id == f"{gpu.endpoint_id}:{gpu.local_gpu_id}"
        assert "held" in repr(gpu)
    assert "released" in repr(gpu)


def test_one_context_is_for_one_block_at_a_time(pool):
    """Entering the same ``pool.gpu()`` twice at once is an error; one after the other is fine."""
    context = pool.gpu()
    with context, pytest.raises(GPUPoolError, match="in use"):
        context.__enter__()
    with context:
        pass


def test_releasing_what_is_not_ours_is_refused(pool, monkeypatch, cards):
    """A handle of another pool, or no handle at all, is a mistake that is named."""
    with pytest.raises(ConfigError, match="only what this pool"):
        pool.release("gpu")


# -- waiting ---------------------------------------------------------------------------------------------------


def test_a_waiter_gets_the_gpu_that_is_released(pool):
    """Who waits is served as soon as somebody releases."""
    held = [pool.acquire(), pool.acquire()]
    thread, got = in_thread(lambda: pool.acquire(timeout=30))
    waiting(pool, 1)
    held[0].release()
    thread.join(30)

    assert got[0].uuid == held[0].uuid


def test_waiters_are_served_in_order(pool, monkeypatch):
    """First come, first served."""
    monkeypatch.setattr(tickets, "ANSWER_TIME", 60.0)  # nobody is passed over because the machine is busy
    held = [pool.acquire(), pool.acquire()]
    order: list[int] = []
    threads = []
    for number in range(6):

        def work(number=number):
            with pool.gpu(timeout=30):
                order.append(number)

        threads.append(in_thread(work)[0])
        waiting(pool, number + 1)
    held[0].release()
    for thread in threads:
        thread.join(30)

    assert order == list(range(6))


def test_timeout_zero_tries_once(pool):
    """``timeout=0`` does not wait, and an idle GPU is still granted."""
    a = pool.acquire(timeout=0)
    b = pool.acquire(timeout=0)
    with pytest.raises(AcquireTimeout) as info:
        pool.acquire(timeout=0)

    assert isinstance(info.value, TimeoutError)
    assert a.global_gpu_id in str(info.value)
    assert "held by" in str(info.value)
    b.release()


def test_a_timed_out_waiter_leaves_nothing_behind(pool):
    """After a timeout the next release goes to somebody else, and no ticket remains."""
    held = [pool.acquire(), pool.acquire()]
    with pytest.raises(AcquireTimeout):
        pool.acquire(timeout=0.05)

    assert pool._state.engine.arbiter.queue() == []
    held[0].release()
    assert pool.acquire(timeout=0).uuid == held[0].uuid


def test_too_many_waiters_are_turned_away(monkeypatch, cards):
    """``max_waiting`` bounds the queue; who is over it hears so at once."""
    with local_pool(monkeypatch, cards, max_waiting=1) as pool:
        held = [pool.acquire(), pool.acquire()]
        thread, got = in_thread(lambda: pool.acquire(timeout=30))
        waiting(pool, 1)
        with pytest.raises(TooManyWaiting):
            pool.acquire(timeout=30)
        held[0].release()
        thread.join(30)
        assert got[0].uuid == held[0].uuid


def test_who_need_not_wait_is_not_turned_away(monkeypatch, cards, tmp_path):
    """``max_waiting`` bounds the queue, not those who find a card free, whoever waits elsewhere."""
    with local_pool(monkeypatch, cards, max_waiting=0, lease_store=HostStore(str(tmp_path / "locks"))) as pool:
        monkeypatch.setattr(pool._state.settings.lease_store, "crowded", lambda: True)
        with pool.gpu(timeout=30), pool.gpu(timeout=30), pytest.raises(TooManyWaiting):
            pool.acquire(timeout=30)


def test_closing_sends_waiters_away(monkeypatch, cards):
    """A pool that closes does not leave anybody waiting, nor holding."""
    store = MemoryStore()
    pool = local_pool(monkeypatch, cards, lease_store=store)
    held = [pool.acquire(), pool.acquire()]
    thread, got = in_thread(lambda: pool.acquire())
    waiting(pool, 1)
    pool.close()
    thread.join(30)

    assert isinstance(got[0], PoolClosed)
    assert held[0].released
    assert (store.leases(), store.queue()) == ([], [])
    with pytest.raises(PoolClosed):
        pool.acquire()
    pool.open()
    with pool.gpu(timeout=10):
        pass
    pool.close()
    pool.close()


def test_a_waiter_notices_a_card_that_appears(pool, cards):
    """A card that was vetoed is granted to a waiter when its reading clears."""
    cards.set(0, memory_usage_percent=99.0)
    cards.set(1, utilization_percent=99.0)
    pool.refresh()
    thread, got = in_thread(lambda: pool.acquire(timeout=30))
    waiting(pool, 1)
    cards.set(1, utilization_percent=0.0)
    thread.join(30)

    assert got[0].local_gpu_id == 1


def test_many_threads_never_share_a_gpu(pool):
    """16 threads on 2 GPUs: no overlap, no leak, everybody served."""
    log = HoldLog()

    def work(number):
        for _ in range(30):
            with pool.gpu(timeout=30) as gpu, log.holding(gpu.uuid, gpu.fencing_token):
                pass

    run_threads(16, work)

    assert len(log.holds()) == 16 * 30
    assert log.overlaps() == []
    assert log.token_regressions() == []
    assert pool.stats()["held"] == 0
    assert pool._state.engine.arbiter.leases() == []


def test_two_pools_of_one_process_exclude_each_other(monkeypatch, cards):
    """``memory:`` is one book for the whole process."""
    with (
        local_pool(monkeypatch, cards, lease_store="memory:") as one,
        local_pool(monkeypatch, cards, lease_store="memory:") as two,
        one.gpus(2),
        pytest.raises(AcquireTimeout),
    ):
        two.acquire(timeout=0)


# -- refusing --------------------------------------------------------------------------------------------------


def test_no_such_gpu_fails_at_once(pool):
    """Who asks for a model that no machine has does not wait for ever."""
    with pytest.raises(NoSuchGPU, match="H200"):
        pool.acquire(model="H200")
    with pytest.raises(NoSuchGPU):
        pool.acquire(count=3)


def test_an_unreadable_card_may_come_back(pool, cards):
    """While a card is lost nobody can say that it will never do."""
    cards.faults = (GPUFault("fell off the bus", local_gpu_id=2),)
    pool.refresh()
    with pytest.raises(AcquireTimeout, match="fell off the bus"):
        pool.acquire(model="H200", timeout=0.05)


def test_a_machine_without_cards_says_what_to_do(monkeypatch):
    """On a laptop the error names the variable that leads to other machines."""
    with (
        local_pool(monkeypatch, Cards(0)) as pool,
        pytest.raises(NoSuchGPU, match="GPU_SERVICE_ENDPOINTS"),
    ):
        pool.acquire()


def test_foreign_processes_veto_and_busy_ok_overrules(pool, cards):
    """A card that somebody outside the pool uses is left alone, unless the caller says otherwise."""
    for index in range(2):
        cards.set(index, processes=(ComputeProcess(4711, "eve"),))
    pool.refresh()
    with pytest.raises(AcquireTimeout, match="process 4711 of eve"):
        pool.acquire(timeout=0)
    pool.acquire(timeout=0, busy_ok=True).release()


def test_stale_readings_are_not_granted_from(monkeypatch, cards):
    """A reading that is too old is no ground to hand out a GPU."""
    with local_pool(monkeypatch, cards, max_stats_age=5.0) as pool:
        cards.age = 60.0
        pool.refresh()
        with pytest.raises(AcquireTimeout, match="readings are 6"):
            pool.acquire(timeout=0)


def test_the_reading_of_the_last_job_does_not_veto_the_next(monkeypatch, cards):
    """A released card is granted at once, although its last reading shows it full."""
    monkeypatch.setattr("gpupool_sync.monitor.NUDGE_GAP", 3600.0)  # the release causes no further reading meanwhile
    with local_pool(monkeypatch, cards, poll_interval=60.0) as pool:
        gpu = pool.acquire()
        cards.set(gpu.local_gpu_id, memory_usage_percent=99.0, processes=(ComputeProcess(1),))
        pool.refresh()
        other = pool.acquire()
        gpu.release()
        assert pool.acquire(timeout=0).uuid == gpu.uuid
        other.release()


def test_readings_after_the_release_veto_again(monkeypatch, cards):
    """Memory that stays after the job keeps the card back until it falls."""
    with local_pool(monkeypatch, cards) as pool:
        with pool.gpu() as gpu:
            cards.set(gpu.local_gpu_id, memory_usage_percent=99.0)
        pool.refresh()
        verdicts = {card.global_gpu_id: card.code for card in pool.explain().cards}
        assert verdicts[gpu.global_gpu_id] == "memory"


@pytest.mark.parametrize("timeout", [-1, float("nan"), float("inf"), "5", True])
def test_a_wrong_timeout_is_refused(pool, timeout):
    """Seconds are a number of at least 0."""
    with pytest.raises(ConfigError, match="timeout"):
        pool.acquire(timeout=timeout)


def test_an_unknown_argument_is_a_type_error(pool):
    """A misspelt request does not pass silently."""
    with pytest.raises(TypeError, match="modell"):
        pool.acquire(modell="A100")


# -- sharing ---------------------------------------------------------------------------------------------------


def test_a_card_is_shared_by_memory(monkeypatch):
    """Three shares fit on a card while they sum up to less than its memory; a whole card is then not to be had."""
    with local_pool(monkeypatch, Cards(1)) as pool:
        shares = [pool.acquire(memory_mb=30_000, timeout=0) for _ in range(2)]
        with pytest.raises(AcquireTimeout):
            pool.acquire(memory_mb=30_000, timeout=0)
        with pytest.raises(AcquireTimeout):
            pool.acquire(timeout=0)
        pool.acquire(memory_mb=20_000, timeout=0)
        shares[0].release()
        pool.acquire(memory_mb=30_000, timeout=0)


def test_a_card_is_shared_by_places(monkeypatch):
    """One of two places: two holders, not three; a third waits and is served."""
    with local_pool(monkeypatch, Cards(1)) as pool:
        first = pool.acquire(max_holders=2, timeout=0)
        pool.acquire(max_holders=2, timeout=0)
        thread, got = in_thread(lambda: pool.acquire(max_holders=2, timeout=30))
        waiting(pool, 1)
        first.release()
        thread.join(30)
        assert got[0].uuid == first.uuid


def test_foreign_memory_narrows_the_room_of_shares(monkeypatch):
    """What others use on a card is not promised to its shares."""
    cards = Cards(1)
    cards.set(0, memory_used_mb=60_000.0, memory_usage_percent=73.0)
    with local_pool(monkeypatch, cards) as pool:
        with pytest.raises(AcquireTimeout, match="its memory that others leave free is 21920 MiB"):
            pool.acquire(memory_mb=30_000, timeout=0)
        pool.acquire(memory_mb=20_000, timeout=0)


# -- forgetting, forking, pickling -----------------------------------------------------------------------------


def test_a_forgotten_handle_is_kept_and_named(pool):
    """Dropping a handle does not free the card under a running job; a warning names the line."""

    def forget(warned):
        pool.acquire()
        gc.collect()
        eventually(lambda: len(warned), message="the handle is noticed")  # on a thread of the pool

    with pytest.warns(ResourceWarning, match=r"test_pool\.py:\d+") as warned:
        forget(warned)
    assert (pool.stats()["forgotten"], pool.stats()["held"]) == (1, 1)
    pool.release_all()
    assert pool.stats()["held"] == 0


def test_a_block_that_was_never_left_properly_is_cleaned_up(pool):
    """If the context manager dies (an interrupt fell between its lines), the card comes back."""
    context = pool.gpu()
    context.__enter__()
    assert pool.stats()["held"] == 1
    del context
    gc.collect()

    eventually(lambda: pool.stats()["held"] == 0, message="the lease is released")


def test_a_forgotten_pool_stops_its_threads(monkeypatch, cards):
    """A notebook that makes a pool again and again does not pile up threads."""
    pool = local_pool(monkeypatch, cards)
    pool.gpu(timeout=10).__enter__()
    del pool
    gc.collect()

    eventually(
        lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("gpupool")],
        message="the threads end",
    )


def _in_child(connection, pool, gpu):
    try:
        before = pool.stats()["held"]
        gpu.release()
        with pool.gpu(timeout=20) as mine:
            connection.send((before, mine.global_gpu_id))
    except BaseException as exc:
        connection.send(repr(exc))
    finally:
        pool.close()
        connection.close()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_starts_anew(pool):
    """The child has no lease of its parent, releases none of them, and works at once with its own."""
    with pool.gpu() as gpu:
        here, there = multiprocessing.Pipe()
        child = multiprocessing.get_context("fork").Process(target=_in_child, args=(there, pool, gpu))
        child.start()
        there.close()
        assert here.poll(30)
        held, got = here.recv()
        child.join(30)
        here.close()
        assert held == 0
        assert got.startswith(gpu.endpoint_id)
        assert pool.stats()["held"] == 1
        gpu.check()


def test_a_pool_pickles_as_its_settings(monkeypatch):
    """A spawned process gets a pool of the same settings and none of the leases."""
    pool = GPUPool("http://a:1,http://b:2", strategy="weighted", lease_store="memory:", name="n", memory_threshold=70)
    copied = pickle.loads(pickle.dumps(pool))

    assert copied._state.settings == pool._state.settings
    assert copied is not pool
    assert "not opened" in repr(copy.copy(pool))


# -- looking ---------------------------------------------------------------------------------------------------


def test_status_counts_and_names(pool):
    """The status has the specification's fields, and who holds what."""
    with pool.gpu(note="train") as gpu:
        status = pool.status()
    assert (status.total_gpus, status.available_gpus, status.active_workers) == (2, 1, 1)
    assert (status.total_endpoints, status.healthy_endpoints, status.blocked_workers) == (1, 1, 0)
    assert list(status.gpu_assignments) == [gpu.global_gpu_id]
    assert status.gpu_assignments[gpu.global_gpu_id][0].note == "train"
    held = next(card for card in status.gpus if not card.is_available)
    assert str(os.getpid()) in held.holders[0]
    endpoint = status.endpoints[0]
    assert (endpoint.is_healthy, endpoint.arbiter, endpoint.scope) == (True, "memory:", "process")
    json.dumps(status.to_dict(), allow_nan=False)


def test_explain_gives_each_card_a_verdict(pool, cards):
    """Why am I waiting: every card answers."""
    cards.set(1, memory_usage_percent=85.0)
    pool.refresh()
    with pool.gpu(note="mine"):
        explanation = pool.explain()
    assert [card.code for card in explanation.cards] == ["held", "memory"]
    assert "note: mine" in explanation.cards[0].text
    assert explanation.free == 0
    assert "0 of 2 GPUs are free" in str(explanation)
    assert pool.explain(model="T4").cards[0].code == "filter:model"


def test_stats_count_and_can_be_popped(pool):
    """Counters start again after ``pop_stats``; gauges stay."""
    with pool.gpu(), pool.gpu(), pytest.raises(AcquireTimeout):
        pool.acquire(timeout=0)
    stats = pool.pop_stats()
    assert (stats["requests"], stats["grants"], stats["releases"], stats["timeouts"]) == (3, 2, 2, 1)
    assert stats["wait"]["count"] == stats["hold"]["count"] == 2
    assert stats["wait"]["p50"] <= stats["wait"]["max"]
    assert pool.stats()["grants"] == 0
    json.dumps(stats, allow_nan=False)


def test_concurrent_refreshes_are_coalesced(monkeypatch):
    """A hundred refreshes at once cost at most two polls."""
    entered, leave = threading.Semaphore(0), threading.Event()

    class Slow(Cards):
        def read(self, timeout):
            entered.release()
            leave.wait(20)
            return super().read(timeout)

    cards = Slow(1)
    with local_pool(monkeypatch, cards, poll_interval=60.0) as pool:
        assert entered.acquire(timeout=20)  # the first poll is under way
        threads = [in_thread(lambda: pool.refresh(30)) for _ in range(100)]
        (entry,) = pool._state.engine.monitor._entries.values()
        eventually(lambda: len(entry.next_round) == 100, message="all of them wait")
        leave.set()
        for thread, results in threads:
            thread.join(30)
            assert results == [True]
        assert cards.reads <= 3  # the first one, and at most two for all the refreshes


def test_the_default_arbiter_is_the_host(monkeypatch, cards):
    """This machine's own cards are guarded among all its processes and users, without any set-up or warning."""
    monkeypatch.setattr(devices, "open_reader", lambda: cards)
    with GPUPool() as pool, pool.gpu() as gpu:
        assert gpu.scope == "host"
        assert pool.status().endpoints[0].arbiter == f"host:{os.environ['GPU_POOL_LOCK_DIR']}"


@pytest.fixture
def statistics_server():
    """A statistics server on another machine; nothing leaves this one."""
    card = {"gpu_id": 0, "name": "A100", "uuid": "GPU-far", "memory_usage_percent": 0, "utilization_percent": 0}
    with responses.RequestsMock(assert_all_requests_are_fired=False) as mock:
        mock.get("http://gpu1:8000/gpu/summary", json={"gpu_count": 1, "gpus_summary": [card]})
        yield "http://gpu1:8000"


def test_remote_cards_guarded_on_this_machine_only_warn(statistics_server):
    """Leases that exclude less than one may think say so, once, at the caller's line."""
    with GPUPool(statistics_server) as pool:
        with pytest.warns(ExclusivityWarning, match="gpu1-8000 exclude among the processes") as caught:
            pool.acquire(timeout=20).release()
        assert caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pool.acquire(timeout=20).release()


@pytest.mark.parametrize("meant", ["host:", "memory:"])
def test_a_scope_that_is_asked_for_is_no_surprise(statistics_server, meant):
    """Who names the arbiter has been warned."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with GPUPool(statistics_server, lease_store=meant) as pool:
            pool.acquire(timeout=20).release()


def test_errors_of_reading_are_told(monkeypatch, cards):
    """A driver that breaks does not break the pool; the error says what it said."""
    cards.error = RuntimeError("driver gone")
    with local_pool(monkeypatch, cards, breaker_failures=2) as pool:
        with pytest.raises(AcquireTimeout, match="driver gone"):
            pool.acquire(timeout=0.3)
        eventually(lambda: pool.status().endpoints[0].breaker == "open", message="the breaker opens")
        cards.error = None
        pool.acquire(timeout=20).release()
        assert pool.status().endpoints[0].breaker == "closed"


def test_a_dead_monitor_is_restarted(pool, monkeypatch):
    """Should the scheduling thread die, the next acquire starts another one."""
    monitor = pool._state.engine.monitor
    monkeypatch.setattr("threading.excepthook", lambda args: None)

    def die():
        raise SystemExit

    monitor._commands.put(die)
    monitor._thread.join(20)
    pool.acquire(timeout=20).release()
    assert monitor.restarts == 1
    assert pool.refresh(20)


def test_waiting_costs_no_more_than_the_deadline(pool):
    """A timeout is one deadline for all steps together."""
    held = [pool.acquire(), pool.acquire()]
    begin = time.monotonic()
    with pytest.raises(AcquireTimeout):
        pool.acquire(timeout=0.2)
    assert 0.2 <= time.monotonic() - begin < 20
    assert held


# -- accidents -------------------------------------------------------------------------------------------------


def test_first_use_by_many_threads_starts_one_monitor(monkeypatch, cards):
    """However many threads ask first, one thread keeps the schedule."""
    for _ in range(20):
        pool = local_pool(monkeypatch, cards)
        run_threads(8, lambda _, pool=pool: pool.acquire(timeout=20).release())
        monitor = pool._state.engine.monitor
        names = [thread.name for thread in threading.enumerate()]
        assert names.count(f"{monitor._name}-monitor") == 1
        assert monitor.restarts == 0
        pool.close()


def test_two_open_pools_do_not_wait_for_each_other(monkeypatch, cards):
    """Closing a pool joins its own threads only."""
    # One poll each: a second one may find the worker of the first not idle yet, and have another one started.
    with local_pool(monkeypatch, cards, poll_interval=60.0) as one:
        one.open(wait=True)
        two = local_pool(monkeypatch, cards, poll_interval=60.0)
        two.open(wait=True)
        assert one.stats()["threads"] == two.stats()["threads"] == 2
        assert two._state.engine.monitor.stop(20)
        two.close()
        assert one.refresh(20)


def test_a_thread_that_cannot_be_started_delays_and_does_not_end_polling(monkeypatch, cards):
    """A limit on threads is not the end of the interpreter."""
    start = threading.Thread.start
    refused = []

    def limited(thread):
        if "poll" in thread.name and not refused:
            refused.append(thread.name)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with local_pool(monkeypatch, cards) as pool:
        pool.acquire(timeout=20).release()
    assert refused


def test_a_close_that_was_interrupted_is_finished_by_the_next(monkeypatch, cards):
    """Ctrl-C during close() leaves nothing for ever: the second close() does the rest."""
    store = MemoryStore()
    pool = local_pool(monkeypatch, cards, lease_store=store)
    gpu = pool.acquire()

    def interrupted(ids):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "release", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.close()
    pool.close()
    assert gpu.released
    assert store.leases() == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("gpupool-")]


def test_an_interrupted_release_is_finished_later(pool, monkeypatch):
    """Ctrl-C within release() and a dropped handle: the card comes back by itself."""
    gpu = pool.acquire()
    store = pool._state.engine.arbiter
    with monkeypatch.context() as patch:
        patch.setattr(store, "release", lambda ids: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            gpu.release()
    del gpu
    gc.collect()
    eventually(lambda: not store.leases(), message="the lease is released")
    assert pool.stats()["forgotten"] == 0


def test_a_run_again_cells_leases_can_be_released(monkeypatch, cards):
    """Handles and pool are gone, the leases are not: any later pool can release them, and says whose they are."""
    store = MemoryStore()

    def cell():
        pool = local_pool(monkeypatch, cards, lease_store=store)
        pool.acquire(count=2)

    cell()
    gc.collect()
    with local_pool(monkeypatch, cards, lease_store=store) as pool:
        with pytest.raises(AcquireTimeout, match="this process"):
            pool.acquire(timeout=0)
        pool.release_all()
        pool.acquire(timeout=0).release()


def _with_own_store(connection, pool):
    with pool.gpu(timeout=20) as gpu:
        connection.send(gpu.local_gpu_id)
    pool.close()
    connection.close()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_forgets_the_leases_of_a_store_object_too(pool):
    """A store that the user made is as new in the child as everything else."""
    with pool.gpus(2):
        here, there = multiprocessing.Pipe()
        child = multiprocessing.get_context("fork").Process(target=_with_own_store, args=(there, pool))
        child.start()
        there.close()
        assert here.poll(30)
        assert here.recv() == 0
        child.join(30)
        here.close()


def test_a_memory_pool_in_another_process_warns(monkeypatch):
    """memory: does not reach across processes; a pool that came from another one says so."""
    pool = pickle.loads(pickle.dumps(GPUPool(lease_store="memory:")))
    with pytest.warns(ExclusivityWarning, match="do not see each other"):
        make_store(pool._state)


def test_local_cards_stay_when_endpoints_come_and_go(monkeypatch, cards):
    """Adding a server to a pool of this machine's cards keeps these, also over close() and open()."""
    with local_pool(monkeypatch, cards) as pool:
        pool.open(wait=True)
        (here,) = pool._state.engine.endpoints
        with pytest.raises(ConfigError, match=here):
            pool.add_endpoint("http://127.0.0.1:9", name=here)
        pool.add_endpoint("http://127.0.0.1:9", name="far")
        pool.close()
        pool.open()
        assert list(pool._state.engine.endpoints) == [here, "far"]
        pool.remove_endpoint("far")
        pool.remove_endpoint(here)
        with pytest.raises(NoSuchGPU):
            pool.acquire()
        with pytest.raises(ConfigError, match="belong into the Endpoint"):
            pool.add_endpoint(Endpoint("http://127.0.0.1:9"), token="t")


def test_too_many_on_one_host_are_explained(pool):
    """Four cards that are free but not together: the error says how many one host has."""
    with pytest.raises(NoSuchGPU, match="3 of one host are needed; the most that are free on one are 2"):
        pool.acquire(count=3)


def test_an_unknown_endpoint_is_named(pool):
    """A typo in ``endpoint=`` is answered with the names there are."""
    with pytest.raises(NoSuchGPU, match="this pool has no endpoint gpu7; it has"):
        pool.acquire(endpoint="gpu7")


def test_an_exclusion_of_nothing_is_told(pool):
    """A typo in ``exclude=`` is answered once by a warning, and by explain() each time; names that exist are not."""
    (here,) = pool._state.engine.endpoints if pool._state.engine else (pool.status().endpoints[0].endpoint_id,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for known in (f"{here}:1", "GPU-00000001", "GPU-0000000"):
            if known == "GPU-0000000":  # of both cards: excludes them, and is no typo
                assert pool.explain(exclude=known).hint is None
                continue
            with pool.gpu(exclude=known) as gpu:
                assert gpu.uuid == "GPU-00000000"
    with pytest.warns(
        UserWarning, match=f"no gpu7, server1:0, so nothing is excluded by that; it has.*{here}"
    ) as caught:
        pool.acquire(exclude=["gpu7", f"{here}:1", "server1:0"]).release()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pool.acquire(exclude=["gpu7"]).release()
    assert pool.explain(exclude=["gpu7"]).hint == "exclude: this pool has no gpu7"


def test_an_exclusion_is_not_judged_before_all_have_answered(monkeypatch, cards):
    """The name may be that of a card of a server that is down."""
    with local_pool(monkeypatch, cards) as pool:
        pool.add_endpoint("http://127.0.0.1:9", name="far")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pool.acquire(exclude="far:0").release()
        assert pool.explain(exclude="far:0").hint is None


def test_a_misspelt_argument_is_named_by_the_method(pool):
    """The error is about the method that the user called."""
    with pytest.raises(TypeError, match=r"gpu\(\).*modle"):
        pool.gpu(modle="A100")


def test_the_timeout_error_carries_its_explanation(pool):
    """What the message says is there as data too."""
    with pool.gpus(2), pytest.raises(AcquireTimeout) as info:
        pool.acquire(timeout=0)
    assert [card.code for card in info.value.explanation.cards] == ["held", "held"]
    assert "test_pool.py" not in str(info.value)  # a with block needs no place
    assert pickle.loads(pickle.dumps(info.value)).args == info.value.args
