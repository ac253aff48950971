"""What is counted: sums and windows, durations, uptime, and how near the grants come to the strategy's ideal."""

from __future__ import annotations

import json
import logging
import re
import threading
from pathlib import Path

import pytest

from cards import reading
from gpupool_sync import Endpoint, GPUPool, reporting
from gpupool_sync import endpoint as endpoints
from gpupool_sync.clock import boottime
from gpupool_sync.counting import (
    JUDGED_ENDPOINTS,
    KEPT_DURATIONS,
    USE_BOUNDS,
    Counters,
    Durations,
    Uptime,
    effectiveness,
    summary,
)
from gpupool_sync.errors import EndpointUnavailable
from gpupool_sync.leases.memory import MemoryStore
from gpupool_sync.models import EndpointView, GPURequest, Sample
from gpupool_sync.strategies import STRATEGIES, CountingStrategy, make_strategy
from helpers import eventually, run_threads

ROOT = Path(__file__).resolve().parent.parent
REQUEST = GPURequest()


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def views(**free):
    return [EndpointView(name, total_gpus=8, free_gpus=number) for name, number in free.items()]


def even(choice):
    return {view.endpoint_id: 1.0 / len(choice) for view in choice}


def grant(counters, endpoint_id, choice=(), ideal=even, waited=0.0, queued=False):
    counters.granted(endpoint_id, waited, 1, queued, choice, ideal)


# -- sums and windows ------------------------------------------------------------------------------------------


def test_a_window_begins_anew_and_the_sums_do_not():
    """Who pops gets what happened since the last pop; who wants all that ever was still gets it."""
    counters = Counters()
    counters.add("requests", 2)
    grant(counters, "a", waited=0.5)
    first = counters.read(reset=True)
    counters.add("requests")
    grant(counters, "b")
    counters.released(1.0)
    second = counters.read()

    assert (first["requests"], first["grants"], first["grants_by_endpoint"]) == (2, 1, {"a": 1})
    assert (second["requests"], second["grants"], second["grants_by_endpoint"]) == (1, 1, {"b": 1})
    assert (first["wait"]["max"], second["wait"]["max"], second["wait"]["count"]) == (0.5, 0.0, 1)
    everything = counters.read(all_time=True)
    assert (everything["requests"], everything["grants"], everything["releases"]) == (3, 2, 1)
    assert everything["grants_by_endpoint"] == {"a": 1, "b": 1}
    assert everything["wait"]["buckets"]["+Inf"] == 2
    assert everything["seconds"] > second["seconds"]


def test_nothing_is_lost_between_pops():
    """Of many threads that count while others pop, each event is in exactly one window."""
    counters = Counters()
    stop = threading.Event()
    windows = []

    def work(number):
        if number == 0:
            while not stop.is_set():
                windows.append(counters.read(reset=True))
            return
        for _ in range(300):
            counters.add("requests")
            grant(counters, f"e{number % 3}", views(e0=1, e1=1, e2=1))
            counters.released(0.1)
        if number == 1:
            stop.set()

    run_threads(5, work)
    windows.append(counters.read(reset=True))

    for name in ("requests", "grants", "releases", "claims"):
        assert sum(window[name] for window in windows) == 1200
    assert sum(sum(window["grants_by_endpoint"].values()) for window in windows) == 1200
    assert counters.read(all_time=True)["hold"]["buckets"]["+Inf"] == 1200


def test_quantiles_are_of_the_last_thousand_and_the_histogram_of_all():
    """A bad start does not show in the quantiles for ever."""
    durations = Durations(USE_BOUNDS)
    for _ in range(KEPT_DURATIONS):
        durations.add(1e9)
    for number in range(KEPT_DURATIONS):
        durations.add(number / KEPT_DURATIONS)
    told = summary(sorted(durations.recent()))

    assert told == {"count": 1000, "p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 0.999}
    histogram = durations.histogram()
    assert (histogram["buckets"]["0.5"], histogram["buckets"]["86400.0"]) == (501, 1000)  # 0.5 itself is in its bucket
    assert histogram["buckets"]["+Inf"] == 2000
    assert histogram["sum"] == pytest.approx(1e12 + 499.5)
    assert summary([]) == {"count": 0, "p50": None, "p95": None, "p99": None, "max": None}


def test_uptime_is_what_was_healthy_of_what_was_watched():
    """Watching begins with the first word; from then on each second is healthy or is not."""
    clock = Clock()
    uptime = Uptime(clock)
    clock.now += 50
    uptime.advance()
    assert (uptime.watched, uptime.healthy) == (0, 0)
    for healthy, seconds in ((False, 2), (True, 5), (True, 1), (False, 2)):
        uptime.note(healthy)
        clock.now += seconds
    uptime.advance()
    assert (uptime.watched, uptime.healthy) == (10, 6)


# -- effectiveness ---------------------------------------------------------------------------------------------


def test_effectiveness_is_the_formula():
    """1 − ½·Σ|share − ideal|, over everybody who has a share or should have one."""
    assert effectiveness({"a": 0.5, "b": 0.5}, {"b": 0.5, "a": 0.5}) == 1.0
    assert effectiveness({"a": 1.0}, {"a": 0.5, "b": 0.25, "c": 0.25}) == 0.5
    assert effectiveness({"a": 1.0}, {"b": 1.0}) == 0.0
    assert effectiveness({}, {"a": 1.0}) is effectiveness({"a": 1.0}, {}) is None


def test_the_ideal_is_that_of_each_moment():
    """Whoever was not there to choose, or was alone, is not held against the strategy."""
    counters = Counters()
    for name in "ab":
        grant(counters, name, views(a=1, b=1))
    for number in range(6):  # b is down, or all were taken and a's came free
        grant(counters, "a", views(a=1) if number % 2 else ())
    told = counters.read()
    assert told["shares"] == told["ideal_shares"] == {"a": 0.875, "b": 0.125}
    assert told["effectiveness"] == 1.0
    for _ in range(8):  # b is back, and gets nothing
        grant(counters, "a", views(a=1, b=1))
    told = counters.read()
    assert told["ideal_shares"] == {"a": 11 / 16, "b": 5 / 16}
    assert told["effectiveness"] == 1.0 - (15 / 16 - 11 / 16)
    assert counters.read(has_ideal=False)["effectiveness"] is None


def test_with_many_endpoints_not_every_grant_is_judged():
    """What a grant costs does not grow with the endpoints, and the ideal is right all the same."""
    names = [f"e{number}" for number in range(100)]
    choice = views(**dict.fromkeys(names, 1))
    asked = []

    def ideal(endpoints):
        asked.append(len(endpoints))
        return even(endpoints)

    counters = Counters()
    for number in range(1000):
        grant(counters, names[number % 100], choice, ideal)
    told = counters.read(reset=True)
    assert sum(asked) <= 1000 * JUDGED_ENDPOINTS + 100
    assert told["ideal_shares"] == {name: pytest.approx(0.01) for name in names}
    assert told["effectiveness"] == pytest.approx(1.0)
    grant(counters, "e0", choice, ideal)
    assert counters.read()["effectiveness"] == pytest.approx(0.01)  # the first of a window is judged


def test_grants_that_are_not_judged_weigh_as_much():
    """A time with many endpoints counts by its grants, not by how many of them were looked at."""
    choice = views(**{f"e{number}": 1 for number in range(100)})
    counters = Counters()
    for number in range(1000):
        grant(counters, "ab"[number % 2], views(a=1, b=1))
    for number in range(1000):
        grant(counters, f"e{number % 100}", choice)
    assert counters.read()["ideal_shares"]["a"] == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("availability", {"a": 0.75, "b": 0.25, "c": 0.0}),
        ("round_robin", {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}),
        ("weighted", {"a": 0.2, "b": 0.2, "c": 0.6}),
    ],
)
def test_the_ideal_of_each_strategy(strategy, expected):
    """By free GPUs, equal, by all GPUs; equal where there are none."""
    endpoints = [EndpointView("a", 4, 3), EndpointView("b", 4, 1), EndpointView("c", 12, 0)]
    made = make_strategy(strategy)

    assert made.has_ideal
    assert made.ideal_shares(endpoints) == pytest.approx(expected)
    nothing = [EndpointView("a", 0, 0), EndpointView("b", 0, 0)]
    assert made.ideal_shares(nothing) == {"a": 0.5, "b": 0.5}


class Mine:
    """A user's strategy."""

    def __init__(self, answer):
        self.answer = answer

    def order(self, endpoints, request):
        return endpoints

    def ideal_shares(self, endpoints):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_a_strategy_of_ones_own_says_what_it_wants():
    """Any numbers in proportion will do; endpoints that it does not name should get nothing."""
    mine = make_strategy(Mine({"a": 30, "elsewhere": 5, "b": 10}))
    assert mine.has_ideal
    assert mine.ideal_shares(views(a=1, b=1, c=1)) == {"a": 0.75, "b": 0.25, "c": 0.0}


@pytest.mark.parametrize(
    "answer", [ZeroDivisionError(), None, {"a": -1}, {"a": float("nan")}, {"a": "x"}, {}, {"a": float("inf")}], ids=repr
)
def test_a_strategy_that_fails_to_say_costs_the_figure_only(answer, caplog):
    """Its fault is logged once; grants go on."""
    mine = make_strategy(Mine(answer))
    counters = Counters()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            grant(counters, "a", views(a=1, b=1), mine.ideal_shares)
    assert len(caplog.records) == 1
    told = counters.read(has_ideal=mine.has_ideal)
    assert (told["grants"], told["effectiveness"]) == (3, None)


def test_a_strategy_without_an_ideal_has_no_effectiveness():
    """A function, an object without `ideal_shares`, and a subclass that does not define them."""

    class Own(CountingStrategy):
        def order(self, endpoints, request):
            return endpoints

    for spec in (lambda endpoints, request: endpoints, Own()):
        strategy = make_strategy(spec)
        assert not strategy.has_ideal
        assert strategy.ideal_shares(views(a=1)) is None


# -- a pool ----------------------------------------------------------------------------------------------------


class Source:
    """An endpoint's cards, as the test wants them."""

    def __init__(self, name, number):
        self.cards = tuple(reading(index, uuid=f"GPU-{name}-{index:04d}") for index in range(number))
        self.error = None

    def await_turn(self, deadline):
        pass

    def fetch(self, deadline):
        if self.error is not None:
            raise EndpointUnavailable("it", self.error)
        return Sample(self.cards, boottime())

    def abort(self): ...

    def close(self): ...

    def forget_after_fork(self): ...


@pytest.fixture
def fleet(monkeypatch):
    """Sources by name, and a function that makes a pool of them."""
    sources = {"a": Source("a", 4), "b": Source("b", 2), "c": Source("c", 1)}
    pools = []

    def make_endpoint(endpoint, settings):
        return endpoints.PolledEndpoint(endpoint.id, endpoint.url, sources[endpoint.id], settings, local=False)

    monkeypatch.setattr(endpoints, "make_endpoint", make_endpoint)

    def make(**options):
        defaults = {
            "lease_store": MemoryStore(),
            "poll_interval": 0.02,
            "health_check_interval": 0.04,
            "breaker_failures": 2,
        }
        configured = [Endpoint(f"http://127.0.0.1:{9000 + number}", name=name) for number, name in enumerate(sources)]
        pool = GPUPool(configured, **{**defaults, **options})
        pools.append(pool)
        pool.open(wait=True)
        return pool

    yield sources, make
    for pool in pools:
        pool.close()


@pytest.mark.parametrize(
    ("strategy", "ideal"),
    [("round_robin", {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}), ("weighted", {"a": 4 / 7, "b": 2 / 7, "c": 1 / 7})],
)
def test_effectiveness_of_strategies_that_take_turns(fleet, strategy, ideal):
    """Whoever distributes as it should has about 1, also when one user takes and returns."""
    _, make = fleet
    pool = make(strategy=strategy)
    for _ in range(70):
        pool.acquire(timeout=20).release()
    stats = pool.stats()

    assert stats["ideal_shares"] == pytest.approx(ideal)
    assert stats["shares"] == pytest.approx(ideal, abs=0.05)
    assert stats["effectiveness"] > 0.95


def test_effectiveness_of_availability(fleet):
    """Grants that are kept follow what is free; one user who takes and returns is always at the best server."""
    _, make = fleet
    pool = make(strategy="availability")
    handles = [pool.acquire(timeout=20) for _ in range(7)]
    stats = pool.pop_stats()
    assert stats["shares"] == pytest.approx({"a": 4 / 7, "b": 2 / 7, "c": 1 / 7})
    assert stats["effectiveness"] > 0.85
    for gpu in handles:
        gpu.release()
    for _ in range(20):
        pool.acquire(timeout=20).release()
    stats = pool.stats()
    assert stats["shares"] == {"a": 1.0}
    assert stats["effectiveness"] == pytest.approx(4 / 7)


def test_effectiveness_of_a_strategy_of_ones_own(fleet):
    """One that does the opposite of what it wants has none."""
    _, make = fleet

    class Contrary(Mine):
        def order(self, endpoints, request):
            return sorted(endpoints, key=lambda view: view.endpoint_id != "c")

    pool = make(strategy=Contrary({"a": 1}))
    for _ in range(5):
        pool.acquire(timeout=20).release()
    stats = pool.stats()
    assert (stats["shares"], stats["ideal_shares"], stats["effectiveness"]) == ({"c": 1.0}, {"a": 1.0}, 0.0)
    silent = make(strategy=lambda endpoints, request: endpoints, lease_store=MemoryStore())
    silent.acquire(timeout=20).release()
    assert (silent.stats()["ideal_shares"], silent.stats()["effectiveness"]) == ({}, None)


def test_an_endpoint_that_is_down_is_not_missed(fleet):
    """While one is away the others' shares are the ideal ones."""
    sources, make = fleet
    pool = make(strategy="round_robin")
    sources["a"].error = "away"
    eventually(lambda: pool.stats()["endpoints"]["a"]["breaker"] == "open")
    pool.pop_stats()
    for _ in range(20):
        pool.acquire(timeout=20).release()
    stats = pool.stats()
    assert stats["ideal_shares"] == pytest.approx({"b": 0.5, "c": 0.5})
    assert stats["effectiveness"] == pytest.approx(1.0)


def test_availability_and_breaker_changes_of_an_endpoint_that_fails_and_recovers(fleet):
    """It loses availability and its breaker changes; the others do not notice; a pop starts both anew."""
    sources, make = fleet
    pool = make()

    def one(name="a"):
        return pool.stats()["endpoints"][name]

    assert one()["availability"] in (None, 1.0)
    sources["a"].error = "away"
    eventually(lambda: one()["breaker"] != "closed" and one()["failures"] > 3)
    down = one()
    assert not down["healthy"]
    assert down["success_rate"] < 1.0
    assert down["healthy_seconds"] < down["watched_seconds"]
    # closed, open, half-open for a probe, open …
    assert down["breaker_changes"] >= 2
    eventually(lambda: one()["availability"] < down["availability"])
    sources["a"].error = None
    eventually(lambda: one()["breaker"] == "closed")
    up = pool.pop_stats()["endpoints"]
    assert up["a"]["breaker_changes"] >= 3
    assert 0.0 < up["a"]["availability"] < 1.0
    assert up["a"]["availability"] == up["a"]["healthy_seconds"] / up["a"]["watched_seconds"]
    assert (up["b"]["availability"], up["b"]["breaker_changes"], up["b"]["failures"]) == (1.0, 0, 0)
    eventually(lambda: one()["successes"] > 1)
    assert (one()["breaker_changes"], one()["success_rate"]) == (0, 1.0)
    assert one()["availability"] == pytest.approx(1.0)
    # What looks at health does not depend on who pops.
    status = next(each for each in pool.status().endpoints if each.endpoint_id == "a")
    assert status.breaker_changes >= 3
    assert status.availability < 1.0


def test_response_times_and_polls(fleet):
    """Mean, median and p95 of the last responses; polls by number, time and quantiles."""
    _, make = fleet
    pool = make(poll_interval=3600.0, health_check_interval=3600.0)
    endpoint = pool._state.engine.endpoints["a"]
    endpoint._responses.clear()
    endpoint._responses.extend([0.001] * 90 + [0.5] * 10)
    stats = pool.stats()
    told = stats["endpoints"]["a"]
    assert told["response_time_ms"] == pytest.approx(50.9)
    assert (told["response_p50_ms"], told["response_p95_ms"]) == (pytest.approx(1.0), pytest.approx(500.0))
    eventually(lambda: pool.stats()["polls"] == 3)
    stats = pool.pop_stats()
    assert stats["poll"]["count"] == 3
    assert 0.0 < stats["poll"]["p50"] <= stats["poll"]["max"] <= stats["poll_seconds"]
    assert pool.refresh(10)
    eventually(lambda: pool.stats()["polls"] == 3)


def test_a_pool_that_is_not_open_has_statistics_too():
    """Looking opens nothing."""
    pool = GPUPool("http://127.0.0.1:9")
    stats = pool.stats()
    assert (stats["polls"], stats["threads"], stats["endpoints"], stats["effectiveness"]) == (0, 0, {}, None)
    assert pool._state.engine is None
    pool.close()


def test_all_of_it_is_json(fleet):
    """In particular no infinity and no NaN, which JSON has not."""
    _, make = fleet
    pool = make()
    pool.acquire(timeout=20).release()
    json.dumps(pool.pop_stats(), allow_nan=False)
    json.dumps(reporting.stats(pool._state, all_time=True), allow_nan=False)


def test_a_forked_copy_counts_for_itself(fleet):
    """What the child's endpoints were watched for is not what their parent watched."""
    _, make = fleet
    # One poll, or the next would begin to count in the copy.
    endpoint = make(poll_interval=3600.0, health_check_interval=3600.0)._state.engine.endpoints["a"]
    eventually(lambda: endpoint.stats()["healthy_seconds"] > 0)
    endpoint.forget_after_fork()
    assert endpoint.stats()["watched_seconds"] == 0.0
    assert endpoint.stats()["availability"] is None


# -- the documentation -----------------------------------------------------------------------------------------


def rows(text, head):
    """The names in the first column of the table whose first column is called so."""
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith(f"| {head} |"):
            break
    next(lines)
    found = []
    for line in lines:
        if not line.startswith("|"):
            break
        found.append(re.match(r"\| `([a-z0-9_]+)` \|", line)[1])
    return found


@pytest.mark.checkout
def test_the_documentation_names_what_is_counted(fleet):
    """docs/statistics.md has a row for each key, and no other."""
    text = (ROOT / "docs" / "statistics.md").read_text(encoding="utf-8")
    _, make = fleet
    stats = make().stats()

    assert sorted(rows(text, "key")) == sorted(stats)
    assert sorted(rows(text, "key of `endpoints[id]`")) == sorted(stats["endpoints"]["a"])
    for strategy in STRATEGIES:
        assert f"| `{strategy}` |" in text
