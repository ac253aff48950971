"""The pool over real servers in real processes: failures, recoveries, and what they cost the others."""

from __future__ import annotations

import pickle
import sys
import threading

import pytest

from gpupool_sync import AcquireTimeout, ConfigError, Endpoint, GPUPool, NoSuchGPU, handle
from gpupool_sync.errors import LeaseStoreError
from gpupool_sync.leases.http import HTTPStore
from gpupool_sync.leases.memory import MemoryStore
from gpupool_sync.testing import FakeFleet
from helpers import HoldLog, eventually, run_threads

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def running_fleet():
    with FakeFleet([4, 2, 1], names=["alpha", "beta", "gamma"]) as fleet:
        yield fleet


@pytest.fixture
def fleet(running_fleet):
    for server in running_fleet:
        server.heal()
    return running_fleet


def make_pool(fleet, **options):
    named = [Endpoint(server.url, name=server.name) for server in fleet]
    defaults = {
        "lease_store": MemoryStore(),
        "poll_interval": 0.05,
        "health_check_interval": 0.2,
        "endpoint_timeout": 20.0,
        "breaker_failures": 2,
    }
    return GPUPool(named, **{**defaults, **options})


@pytest.fixture
def pool(fleet):
    with make_pool(fleet) as pool:
        pool.open(wait=True)
        yield pool


def endpoint(pool, name):
    return next(each for each in pool.status().endpoints if each.endpoint_id == name)


def breaker(pool, name, *states):
    eventually(
        lambda: endpoint(pool, name).breaker in states, timeout=30, message=lambda: f"{name}: {endpoint(pool, name)}"
    )


#: States in which a breaker keeps callers away; half-open it is while a probe is under way, maybe most of the time.
OPEN = ("open", "half-open")


def take_all(pool, number, **request):
    """As many GPUs as there should be, at once; returns their handles."""
    handles = [pool.acquire(timeout=20, **request) for _ in range(number)]
    with pytest.raises(AcquireTimeout):
        pool.acquire(timeout=0, **request)
    return handles


# -- three servers, one pool -----------------------------------------------------------------------------------


def test_the_gpus_of_all_servers_are_one_pool(pool):
    """Seven GPUs of three servers are granted, each once; equal local ids stay distinct."""
    handles = take_all(pool, 7)

    assert sorted(gpu.global_gpu_id for gpu in handles) == [
        "alpha:0",
        "alpha:1",
        "alpha:2",
        "alpha:3",
        "beta:0",
        "beta:1",
        "gamma:0",
    ]
    assert len({gpu.uuid for gpu in handles}) == 7
    zeros = [gpu for gpu in handles if gpu.local_gpu_id == 0]
    assert {gpu.endpoint_id for gpu in zeros} == {"alpha", "beta", "gamma"}
    zeros[1].release()
    assert pool.acquire(timeout=0).global_gpu_id == zeros[1].global_gpu_id


def test_a_lone_user_gets_the_most_available_server(pool):
    """``availability``: the highest share of free GPUs first, near ties by the number of free ones."""
    assert pool.acquire().endpoint_id == "alpha"
    assert pool.acquire().endpoint_id == "beta"  # 2 of 2 against 3 of 4 and 1 of 1


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [("round_robin", {"alpha": 20, "beta": 20, "gamma": 20}), ("weighted", {"alpha": 34, "beta": 17, "gamma": 9})],
)
def test_strategies_distribute_over_real_servers(fleet, strategy, expected):
    """Round robin is even; weighted follows the number of GPUs."""
    with make_pool(fleet, strategy=strategy) as pool:
        pool.open(wait=True)
        for _ in range(60):
            pool.acquire(timeout=20).release()
        shares = pool.stats()["grants_by_endpoint"]
    assert {name: pytest.approx(number, abs=2) for name, number in expected.items()} == shares


def test_several_gpus_come_from_one_host(pool):
    """``pool.gpus(3)`` never mixes machines."""
    with pool.gpus(3) as gpus:
        assert {gpu.endpoint_id for gpu in gpus} == {"alpha"}
        with pool.gpus(2) as others:
            assert {gpu.endpoint_id for gpu in others} == {"beta"}
        with pytest.raises(AcquireTimeout):
            pool.acquire(count=2, endpoint="alpha", timeout=0)
    with pytest.raises(NoSuchGPU):
        pool.acquire(count=5)


def test_programs_can_be_tried_out_with_a_simulated_gpu(pool, caplog):
    """The mask is a real one; that there is nothing behind it is said once for each of them."""
    handle._warn_of_simulation.cache_clear()
    show = [sys.executable, "-c", "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"]
    with pool.gpu(endpoint="alpha") as gpu:
        assert not gpu.is_local
        assert gpu.run(show, capture_output=True, text=True).stdout.strip() == gpu.uuid
        assert gpu.env()["CUDA_VISIBLE_DEVICES"] == gpu.uuid
    said = [record.getMessage() for record in caplog.records if "simulated" in record.getMessage()]
    assert len(said) == 1
    assert gpu.global_gpu_id in said[0]


def test_requests_are_filtered_over_real_servers(pool):
    """By endpoint, exclusion and UUID."""
    with pool.gpu(endpoint="gamma") as gpu:
        assert gpu.global_gpu_id == "gamma:0"
        with pytest.raises(AcquireTimeout, match="held by"):
            pool.acquire(uuid=gpu.uuid, timeout=0)
    with pool.gpu(exclude=["alpha", "beta:0", "beta:1"]) as gpu:
        assert gpu.global_gpu_id == "gamma:0"


def test_a_card_that_becomes_busy_is_left_alone(pool, fleet):
    """A foreign job that shows in the statistics vetoes its card, and frees it when it ends."""
    fleet[2].busy(0, 95.0)
    eventually(lambda: pool.explain(endpoint="gamma").free == 0, message="the reading arrives")
    with pytest.raises(AcquireTimeout, match=r"gamma:0.*(used outside the pool|memory usage 95)"):
        pool.acquire(endpoint="gamma", timeout=0)
    thread_result: list[str] = []
    thread = threading.Thread(
        target=lambda: thread_result.append(pool.acquire(endpoint="gamma", timeout=30).global_gpu_id)
    )
    thread.start()
    fleet[2].heal()
    thread.join(30)
    assert thread_result == ["gamma:0"]


def test_connections_are_reused(fleet):
    """A hundred polls use one TCP connection, and acquires cause no requests of their own."""
    before = fleet[0].connection_count()
    polled = fleet[0].request_count()
    with make_pool([fleet[0]], poll_interval=0.01) as pool:
        pool.acquire().release()
        eventually(lambda: fleet[0].request_count() - polled >= 100, timeout=30, message="100 polls")
        assert fleet[0].connection_count() - before == 1
    with make_pool([fleet[0]], poll_interval=60.0, health_check_interval=60.0) as pool:
        pool.open(wait=True)
        polled = fleet[0].request_count(None)
        for _ in range(1000):
            pool.acquire().release()
        # Releases ask for a new reading, at most twice a second; a thousand acquires ask for none.
        assert fleet[0].request_count(None) - polled < 100


# -- one of three fails ----------------------------------------------------------------------------------------


FAULTS = {
    "killed": lambda server: server.kill(),
    "hanging": lambda server: server.hang(),
    "frozen": lambda server: server.freeze(),
    "status 500": lambda server: server.fail(500),
    "status 404": lambda server: server.fail(404),
    "error body": lambda server: server.error_body(),
    "slow": lambda server: server.slow(30.0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_of_three_fails_and_comes_back(fleet, fault):
    """The others are not affected, its GPUs are not granted, and after recovery they are."""
    # Only where a timeout is what fails is it short; elsewhere no poll is too slow, however busy the machine is.
    silent = fault in ("hanging", "frozen", "slow")
    with make_pool(fleet, endpoint_timeout=3.0 if silent else 20.0, max_stats_age=300.0) as pool:
        pool.open(wait=True)
        FAULTS[fault](fleet[0])
        breaker(pool, "alpha", *OPEN)
        assert {gpu.endpoint_id for gpu in take_all(pool, 3)} == {"beta", "gamma"}
        status = pool.status()
        assert (status.healthy_endpoints, status.total_gpus) == (2, 3)
        down = endpoint(pool, "alpha")
        assert (down.is_healthy, down.available_gpus, down.total_gpus) == (False, 0, 4)
        assert down.last_error
        eventually(lambda: endpoint(pool, "beta").consecutive_failures == 0, message="beta is well")
        fleet[0].heal()
        breaker(pool, "alpha", "closed")
        back = [pool.acquire(timeout=20) for _ in range(4)]
        assert {gpu.endpoint_id for gpu in back} == {"alpha"}
        assert pool.status().total_gpus == 7


LOOKS = {
    "status": lambda pool: pool.status().total_gpus == 7,
    "explain": lambda pool: len(pool.explain().cards) == 7,
    "leases": lambda pool: len(pool.leases().problems) == 1,
}


@pytest.mark.parametrize("look", LOOKS)
def test_servers_that_hang_are_asked_for_their_leases_at_the_same_time(fleet, monkeypatch, look):
    """Each answers when all have been asked: one after the other nobody would. One of them fails, and is left out."""
    with make_pool(fleet, lease_store=None) as pool:
        pool.open(wait=True)
        asked = threading.Barrier(3)
        alpha = pool._state.engine.servers["alpha"]

        def leases(store):
            asked.wait(20.0)
            if store is alpha:
                raise LeaseStoreError("it hangs")
            return ()

        monkeypatch.setattr(HTTPStore, "leases", leases)
        assert LOOKS[look](pool)


def test_an_error_of_ours_among_many_servers_is_raised(fleet, monkeypatch):
    """It is no answer that can be left out."""
    with make_pool(fleet, lease_store=None) as pool:
        pool.open(wait=True)
        monkeypatch.setattr(HTTPStore, "leases", lambda store: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pool.status()


def test_without_threads_servers_are_asked_one_after_the_other(fleet, monkeypatch):
    """Where the system starts no more threads, the caller's own does it."""

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    with make_pool(fleet, lease_store=None) as pool, pool.gpu(timeout=20) as gpu:
        monkeypatch.setattr("gpupool_sync.reporting.start", refuse)
        assert [lease.gpus for lease in pool.leases().leases] == [[gpu.global_gpu_id]]


def test_a_server_without_cards_is_healthy_and_empty(pool, fleet):
    """An empty server is no failure; it just has nothing to give."""
    fleet[0].empty()
    eventually(lambda: endpoint(pool, "alpha").total_gpus == 0, message="the cards are gone")
    assert endpoint(pool, "alpha").is_healthy
    assert {gpu.endpoint_id for gpu in take_all(pool, 3)} == {"beta", "gamma"}


def test_a_lost_card_costs_its_card_only(pool, fleet):
    """One GPU that falls off the bus is named; the others of its host are granted."""
    fleet[0].lose_gpu(1)
    eventually(lambda: endpoint(pool, "alpha").total_gpus == 3, message="the card is reported as lost")
    handles = take_all(pool, 6)
    assert "alpha:1" not in {gpu.global_gpu_id for gpu in handles}
    assert any(card.global_gpu_id == "alpha:1" and card.code == "fault" for card in pool.explain().cards)


def test_too_many_requests_pause_the_polls(fleet):
    """429 with Retry-After moves the next poll away and does not open the breaker."""
    with make_pool(fleet, breaker_failures=1, max_stats_age=60) as pool:
        pool.open(wait=True)
        fleet[0].fail(429, retry_after=30)
        eventually(lambda: endpoint(pool, "alpha").consecutive_failures == 1, message="429 is noticed")
        polled = fleet[0].request_count()
        eventually(lambda: pool.stats()["endpoints"]["beta"]["successes"] > 20, message="time passes")
        assert fleet[0].request_count() == polled
        assert endpoint(pool, "alpha").breaker == "closed"


def test_a_flapping_server_neither_leaks_nor_blocks(pool, fleet):
    """A server that fails and recovers again and again: every job runs, no card is held twice."""
    log = HoldLog()
    stop = threading.Event()

    def flap():
        while not stop.wait(0.05):
            fleet[0].fail(500)
            if stop.wait(0.05):
                break
            fleet[0].heal()

    flapper = threading.Thread(target=flap)
    flapper.start()
    try:

        def work(number):
            for _ in range(40):
                with pool.gpu(timeout=30) as gpu, log.holding(gpu.uuid, gpu.fencing_token):
                    pass

        run_threads(10, work)
    finally:
        stop.set()
        flapper.join()
    assert len(log.holds()) == 400
    assert log.overlaps() == []
    assert log.token_regressions() == []
    assert pool.stats()["held"] == 0


def test_held_gpus_survive_their_servers_failure(pool, fleet):
    """A statistics server that dies takes no lease away from anybody."""
    with pool.gpu(endpoint="gamma") as gpu:
        fleet[2].kill()
        breaker(pool, "gamma", *OPEN)
        gpu.check()
        fleet[2].restart()
        breaker(pool, "gamma", "closed")
        with pytest.raises(AcquireTimeout, match="held by"):
            pool.acquire(endpoint="gamma", timeout=0)


def test_a_restarted_server_has_the_same_cards(pool, fleet):
    """The UUIDs do not depend on the process."""
    before = {card.uuid for card in pool.status().gpus}
    fleet[0].kill()
    breaker(pool, "alpha", *OPEN)
    fleet[0].restart()
    breaker(pool, "alpha", "closed")
    eventually(lambda: pool.status().total_gpus == 7)
    assert {card.uuid for card in pool.status().gpus} == before


# -- all of them fail ------------------------------------------------------------------------------------------


def test_when_all_are_down_waiters_wait_and_are_served_after_recovery(pool, fleet):
    """Nobody gets an error because of an outage; everybody is served when it is over."""
    for server in fleet:
        server.kill()
    for name in ("alpha", "beta", "gamma"):
        breaker(pool, name, *OPEN)
    with pytest.raises(AcquireTimeout, match="refused the connection"):
        pool.acquire(timeout=0)
    got: list[str] = []
    threads = [
        threading.Thread(target=lambda: got.append(pool.acquire(timeout=50).global_gpu_id), daemon=True)
        for _ in range(7)
    ]
    for thread in threads:
        thread.start()
    eventually(lambda: pool.stats()["waiting"] == 7)
    for server in fleet:
        server.restart()
    for thread in threads:
        thread.join(50)
    assert len(set(got)) == 7


def test_servers_that_start_after_the_pool_are_found(fleet):
    """The order of starting does not matter."""
    for server in fleet:
        server.kill()
    with make_pool(fleet) as pool:
        thread_result: list[str] = []
        thread = threading.Thread(target=lambda: thread_result.append(pool.acquire(timeout=50).endpoint_id))
        thread.start()
        eventually(lambda: pool.stats()["waiting"] == 1)
        fleet[1].restart()
        thread.join(50)
    assert thread_result == ["beta"]


def test_a_hung_server_delays_nobody_at_the_beginning(fleet):
    """The first acquire is served by the servers that answer, while one does not."""
    fleet[0].hang()
    with make_pool(fleet, endpoint_timeout=30.0) as pool:
        assert pool.acquire(timeout=20).endpoint_id == "beta"


def test_timeout_zero_takes_a_first_reading(fleet):
    """A fresh pool does not answer "none" before it has looked."""
    with make_pool(fleet) as pool:
        pool.acquire(timeout=0)


# -- changing the endpoints ------------------------------------------------------------------------------------


def test_endpoints_come_and_go_at_run_time(fleet):
    """Added, drained, removed: without a restart, and leases go on."""
    with make_pool(fleet[:1]) as pool:
        pool.open(wait=True)
        mine = take_all(pool, 4)
        assert pool.add_endpoint(fleet[2].url, name="gamma") == "gamma"
        gamma = pool.acquire(timeout=20)
        assert gamma.endpoint_id == "gamma"
        with pytest.raises(ConfigError, match="gamma"):
            pool.add_endpoint(fleet[2].url, name="other")

        pool.drain_endpoint("gamma")
        gamma.release()
        with pytest.raises(AcquireTimeout, match="drained"):
            pool.acquire(timeout=0)
        pool.remove_endpoint("gamma")
        assert [each.endpoint_id for each in pool.status().endpoints] == ["alpha"]
        with pytest.raises(ConfigError, match="gamma"):
            pool.remove_endpoint("gamma")

        pool.remove_endpoint("alpha")
        mine[0].check()
        mine[0].release()


def test_a_pool_over_two_urls_of_one_host_counts_each_card_once(fleet):
    """Several URLs of one host are merged by UUID."""
    port = fleet[1].url.rpartition(":")[2]
    urls = [Endpoint(f"http://127.0.0.1:{port}", name="one"), Endpoint(f"http://localhost:{port}", name="two")]
    with GPUPool(urls, lease_store=MemoryStore(), poll_interval=0.05) as pool:
        pool.open(wait=True)
        take_all(pool, 2)
        assert pool.status().total_gpus == 2


def test_polls_stop_and_descriptors_close_with_the_pool(fleet):
    """After ``close()`` the server sees no more requests."""
    pool = make_pool(fleet)
    pool.open(wait=True)
    threads = threading.active_count()
    pool.close()
    assert threading.active_count() < threads
    seen = fleet[0].request_count()
    with make_pool(fleet[1:]) as other:
        eventually(lambda: other.stats()["polls"] > 20)
    assert fleet[0].request_count() == seen


def test_closing_does_not_wait_for_a_hung_server(fleet):
    """A poll that hangs is aborted by ``close()``; nothing is left behind."""
    fleet[0].hang()
    pool = make_pool(fleet, endpoint_timeout=300.0)
    pool.acquire(timeout=20)
    pool.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("gpupool")]


def test_an_endpoint_that_is_no_gpu_server_is_told_so(fleet):
    """A URL that leads to something else is named in the error, with what it answered."""
    # The application for paths that are none of a pool's is made at the first such request.
    with (
        GPUPool(
            [Endpoint(f"{fleet[0].url}/nowhere", name="wrong")],
            lease_store=MemoryStore(),
            poll_interval=0.05,
            endpoint_timeout=60.0,
        ) as pool,
        pytest.raises(AcquireTimeout, match=r"wrong.*404"),
    ):
        pool.acquire(timeout=0)


# -- endpoints that are said to be in this machine ---------------------------------------------------------------


@pytest.mark.parametrize("where", ["here", "in a copy"])
def test_an_endpoint_of_this_machine_that_is_added_later_counts_before_it_answers(fleet, where, tmp_path):
    """Else the first request would get the GPU of another machine, which this process cannot use."""
    with make_pool(fleet, lease_store=f"host:{tmp_path}") as pool:
        pool.open(wait=True)
        pool.add_endpoint("http://127.0.0.1:9", name="own", local=True)
        asked = pool if where == "here" else pickle.loads(pickle.dumps(pool))
        with asked:
            asked.open(wait=True)
            with pytest.raises(AcquireTimeout, match="free, but in another machine"):
                asked.acquire(timeout=0)
            asked.acquire(timeout=20, local=False).release()


def test_an_endpoint_of_this_machine_that_was_removed_does_not_count_in_a_copy(fleet, tmp_path):
    """Else its GPUs, which the pool does not have any more, would be all that the copy may have."""
    own = Endpoint("http://127.0.0.1:9", name="own", local=True)
    options = {"lease_store": f"host:{tmp_path}", "endpoint_timeout": 20.0}
    with GPUPool([own, Endpoint(fleet[0].url, name="alpha")], **options) as pool:
        pool.remove_endpoint("own")
        pool.acquire(timeout=20).release()
        with pickle.loads(pickle.dumps(pool)) as copy:
            copy.acquire(timeout=20).release()
