"""The strategies share out what they promise, whatever comes, goes, or refuses."""

from __future__ import annotations

import collections
import copy
import itertools
import logging
import math
import os
import pickle
import threading

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from gpupool_sync.errors import ConfigError
from gpupool_sync.models import EndpointView, GPURequest
from gpupool_sync.strategies import (
    REMEMBERED_ENDPOINTS,
    STRATEGIES,
    Availability,
    RoundRobin,
    UserStrategy,
    Weighted,
    make_strategy,
)
from helpers import run_threads

REQUEST = GPURequest()
MAKERS = [
    Availability,
    lambda: Availability(spread=False),
    RoundRobin,
    Weighted,
    lambda: make_strategy(lambda endpoints, request: reversed(endpoints)),
]

views = st.lists(
    st.tuples(st.integers(0, 16), st.integers(0, 16)), min_size=1, max_size=40
).map(lambda sizes: [view(f"e{i}", max(a, b), min(a, b)) for i, (a, b) in enumerate(sizes)])  # fmt: skip


def view(endpoint_id, total=8, free=None):
    return EndpointView(endpoint_id, total_gpus=total, free_gpus=total if free is None else free)


def firsts(strategy, endpoints, n):
    """Who was the first choice in *n* decisions, in order."""
    return [strategy.order(endpoints, REQUEST)[0].endpoint_id for _ in range(n)]


def crowded(seed=None):
    """An Availability that was just refused."""
    strategy = Availability(seed=seed)
    strategy.feedback("somewhere", granted=False)
    return strategy


# ---- all of them


@pytest.mark.parametrize("make", MAKERS)
@given(endpoints=views, refused=st.booleans())
def test_every_endpoint_is_asked_exactly_once(make, endpoints, refused):
    """
    Whatever the order is, no endpoint is left out and none is asked twice.
    """
    strategy = make()
    strategy.feedback("e0", not refused)
    for _ in range(3):
        ordered = strategy.order(endpoints, REQUEST)
        assert sorted(v.endpoint_id for v in ordered) == sorted(v.endpoint_id for v in endpoints)
        assert {id(v) for v in ordered} == {id(v) for v in endpoints}
    assert sum(strategy.decisions().values()) == 3


@pytest.mark.parametrize("make", MAKERS)
def test_no_endpoints_no_order(make):
    """
    With nothing to choose from, nothing is chosen, and no decision is counted.
    """
    strategy = make()

    assert list(strategy.order([], REQUEST)) == []
    assert strategy.stats()["decisions"] == 0


@pytest.mark.parametrize("make", MAKERS)
def test_decisions_and_outcomes_are_counted(make):
    """
    A user sees how often each endpoint was chosen, and how often it granted and refused.
    """
    strategy = make()
    chosen = collections.Counter(firsts(strategy, [view("a"), view("b", 4)], 20))
    strategy.feedback("a", True)
    strategy.feedback("a", False)
    strategy.feedback("c", True)

    assert strategy.decisions() == dict(chosen)
    stats = strategy.stats()
    assert (stats["decisions"], stats["grants"], stats["refusals"]) == (20, 2, 1)
    assert stats["endpoints"]["a"] == {"decisions": chosen["a"], "grants": 1, "refusals": 1}
    assert stats["endpoints"]["c"] == {"decisions": 0, "grants": 1, "refusals": 0}


@pytest.mark.parametrize("make", MAKERS)
def test_threads_lose_no_decision(make):
    """
    Eight threads that choose at once are all counted, and none sees a broken order.
    """
    strategy = make()
    endpoints = [view(f"e{i}", 1 + i) for i in range(7)]

    def choose(number):
        seen = collections.Counter()
        for turn in range(500):
            ordered = strategy.order(endpoints[turn % 3 :], REQUEST)
            assert len({v.endpoint_id for v in ordered}) == 7 - turn % 3
            seen[ordered[0].endpoint_id] += 1
            strategy.feedback(ordered[0].endpoint_id, granted=turn % 10 > 0)
        return seen

    total = sum(run_threads(8, choose), collections.Counter())

    assert strategy.decisions() == dict(total)
    stats = strategy.stats()
    assert (stats["decisions"], stats["grants"], stats["refusals"]) == (4000, 3600, 400)


@pytest.mark.parametrize("make", MAKERS)
def test_memory_is_bounded_when_endpoints_come_and_go(make):
    """
    A pool whose endpoints are replaced all the time does not grow, and keeps the totals.
    """
    strategy = make()
    n = 4 * REMEMBERED_ENDPOINTS
    for i in range(n):
        strategy.order([view(f"e{i}"), view("constant", 4)], REQUEST)
        strategy.feedback(f"e{i}", granted=False)

    for memory in vars(strategy).values():
        if isinstance(memory, dict):
            assert len(memory) <= REMEMBERED_ENDPOINTS + 3
    assert strategy.stats()["decisions"] == strategy.stats()["refusals"] == n


@pytest.mark.parametrize("make", MAKERS)
def test_a_thousand_endpoints_stay_at_hand(make):
    """
    What is in sight is never forgotten, however many endpoints that is.
    """
    strategy = make()
    endpoints = [view(f"e{i}") for i in range(3 * REMEMBERED_ENDPOINTS)]
    for endpoint in endpoints:
        strategy.order(endpoints, REQUEST)
        strategy.feedback(endpoint.endpoint_id, granted=True)
        if endpoint is endpoints[20]:
            break
    for endpoint in endpoints:
        strategy.feedback(endpoint.endpoint_id, granted=True)

    assert len(strategy.stats()["endpoints"]) == len(endpoints)


@pytest.mark.parametrize("make", [Availability, RoundRobin, Weighted, lambda: Availability(False, 7)])
@pytest.mark.parametrize("clone", [copy.copy, lambda strategy: pickle.loads(pickle.dumps(strategy))])
def test_a_copy_has_the_settings_and_no_memory(make, clone):
    """
    A pool that is pickled or forked takes its strategy along, without the other process' history or lock.
    """
    strategy = make()
    firsts(strategy, [view("a")], 5)
    strategy._lock.acquire()  # as another thread may hold it at fork
    try:
        twin = clone(strategy)
    finally:
        strategy._lock.release()

    assert type(twin) is type(strategy)
    assert repr(twin) == repr(strategy)
    assert twin.stats()["decisions"] == 0


def test_scripts_that_seed_random_do_not_choose_alike(monkeypatch):
    """
    A hundred training scripts that all call random.seed(0) still spread over the servers.
    """
    import random

    endpoints = [view(f"e{i}") for i in range(50)]
    for make in (Availability, RoundRobin, Weighted):
        seen = set()
        for _ in range(20):
            random.seed(0)
            seen.add(firsts(make(), endpoints, 1)[0])
        assert len(seen) > 5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_forked_workers_do_not_choose_alike():
    """
    Forked workers of one parent draw differently.
    """
    endpoints = [view(f"e{i}") for i in range(1000)]
    seen = []
    for _ in range(4):
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            os.write(writer, firsts(Availability(), endpoints, 1)[0].encode())
            os._exit(0)
        os.waitpid(pid, 0)
        seen.append(os.read(reader, 100))
        os.close(reader)
        os.close(writer)

    assert len(set(seen)) > 1


# ---- availability


@given(endpoints=views)
def test_a_lone_user_gets_the_best(endpoints):
    """
    Whoever is never refused always gets an endpoint within 5 points of the largest free share, the fullest of
    those.
    """
    strategy = Availability()
    shares = {v.endpoint_id: v.free_gpus / v.total_gpus if v.total_gpus else 0.0 for v in endpoints}
    best = max(shares.values())
    for _ in range(5):
        first = strategy.order(endpoints, REQUEST)[0]
        strategy.feedback(first.endpoint_id, granted=True)
        near = [v for v in endpoints if shares[v.endpoint_id] >= best - 0.05 - 1e-6]
        assert first in near
        assert first.free_gpus == max(v.free_gpus for v in near)
    assert not strategy.stats()["crowded"]


@given(endpoints=views)
def test_without_spreading_the_highest_share_is_first(endpoints):
    """
    With spread=False the order is by free share, the larger number first among equals, refused or not.
    """
    strategy = Availability(spread=False)
    strategy.feedback("e0", granted=False)
    keys = [
        (v.free_gpus / v.total_gpus if v.total_gpus else 0.0, v.free_gpus) for v in strategy.order(endpoints, REQUEST)
    ]
    assert keys == sorted(keys, reverse=True)


def test_who_is_alone_gets_the_best_however_old_its_readings_are():
    """
    Without rivals and without a refusal nothing is drawn.
    """
    strategy = Availability(seed=1)
    best, fresh = evolve(view("best", 8, 5), age=20.0), evolve(view("fresh", 8, 1), age=0.0)

    for _ in range(50):
        assert strategy.order([fresh, best], REQUEST)[0] == best
        strategy.feedback("best", granted=True)


def test_rivals_make_a_crowd_before_the_first_refusal():
    """
    If others may have emptied half of the best endpoint since it was read, not everybody goes there.
    """

    def first_choices(rivals_per_second):
        endpoints = [
            evolve(view(name, 8, free), age=2.0, rivals_per_second=rivals_per_second)
            for name, free in (("best", 4), ("good", 3))
        ]
        return set(firsts(Availability(seed=1), endpoints, 100))

    assert first_choices(1.0) == {"best"}
    assert first_choices(1.1) == {"best", "good"}


def test_strict_is_strict_whatever_rivals_do():
    """
    `spread=False` takes the highest share literally.
    """
    endpoints = [evolve(view(name, 8, free), age=9.0, rivals_per_second=9.0) for name, free in (("a", 4), ("b", 3))]

    assert set(firsts(Availability(spread=False), endpoints, 50)) == {"a"}


def test_in_a_crowd_fresh_readings_go_first():
    """
    A second of age is worth more than four times the free cards; what is full stays last.
    """
    endpoints = [evolve(view("old", 8, 8), age=1.0), evolve(view("new", 8, 2), age=0.0), view("full", 8, 0)]
    strategy, counts = crowded(seed=4), collections.Counter()
    for _ in range(10_000):
        ordered = [v.endpoint_id for v in strategy.order(endpoints, REQUEST)]
        assert ordered[2] == "full"
        counts[ordered[0]] += 1

    share = 2.0 / (2.0 + 8.0 * math.exp(-1.0 / Availability.FADING))
    assert abs(counts["new"] - 10_000 * share) < 5 * math.sqrt(10_000 * share * (1 - share))


def test_near_ties_go_by_count():
    """
    100 of 104 free cards are a better choice than 2 of 2, but 7 of 8 are not.
    """
    large, small, fair = view("large", 104, 100), view("small", 2, 2), view("fair", 8, 7)

    for _ in range(20):
        assert Availability().order([small, fair, large], REQUEST) == [large, small, fair]
        assert Availability(spread=False).order([fair, large, small], REQUEST) == [small, large, fair]


def test_equals_share_by_chance():
    """
    Of equally free endpoints each is the first choice about equally often, over 10,000 decisions.
    """
    counts = collections.Counter(firsts(Availability(seed=1), [view(f"e{i}") for i in range(5)], 10_000))

    assert all(abs(n - 2000) < 5 * math.sqrt(10_000 * 0.2 * 0.8) for n in counts.values())
    assert len(counts) == 5


def test_a_crowd_is_drawn_in_proportion():
    """
    After a refusal each endpoint is first in proportion to its free cards, over 10,000 decisions.
    """
    free = {"a": 8, "b": 4, "c": 2, "d": 1}
    endpoints = [view(name, 8, n) for name, n in free.items()]
    counts = collections.Counter(firsts(crowded(seed=2), endpoints, 10_000))

    for name, n in free.items():
        share = n / 15
        assert abs(counts[name] - 10_000 * share) < 5 * math.sqrt(10_000 * share * (1 - share))


def test_a_crowd_is_drawn_in_proportion_to_the_last_place():
    """
    The rest of the order is a fair draw too: who is refused first does not meet everybody else at the second
    best.
    """
    endpoints = [view("a", 8, 6), view("b", 8, 3), view("c", 8, 1), view("full", 8, 0)]
    strategy, counts = crowded(seed=3), collections.Counter()
    for _ in range(10_000):
        ordered = [v.endpoint_id for v in strategy.order(endpoints, REQUEST)]
        assert ordered[3] == "full"
        counts[tuple(ordered[:3])] += 1

    for a, b, c in itertools.permutations(endpoints[:3]):
        share = a.free_gpus / 10 * b.free_gpus / (10 - a.free_gpus)
        expected = 10_000 * share
        seen = counts[a.endpoint_id, b.endpoint_id, c.endpoint_id]
        assert abs(seen - expected) < 5 * math.sqrt(expected * (1 - share))


def test_a_crowd_is_forgotten_after_grants_in_a_row():
    """
    A user who was refused once by accident gets the best endpoint again after a few grants.
    """
    strategy, endpoints = crowded(), [view("best"), view("other", 8, 4)]
    for _ in range(Availability.CALM):
        assert strategy.stats()["crowded"]
        strategy.feedback("best", granted=True)

    assert not strategy.stats()["crowded"]
    assert set(firsts(strategy, endpoints, 50)) == {"best"}


def test_a_refusal_in_between_starts_the_count_again():
    """
    As long as refusals keep coming, the pool keeps spreading.
    """
    strategy = crowded()
    for _ in range(5):
        for _ in range(Availability.CALM - 1):
            strategy.feedback("a", granted=True)
        assert strategy.stats()["crowded"]
        strategy.feedback("a", granted=False)
    assert strategy.stats()["crowded"]


def test_a_crowd_that_stays_is_remembered_longer():
    """
    In a lasting crowd best-first is tried more and more rarely; after a long calm a refusal costs little
    again.
    """
    strategy = Availability()

    def grants_until_calm():
        strategy.feedback("a", granted=False)
        grants = 0
        while strategy.stats()["crowded"]:
            strategy.feedback("a", granted=True)
            grants += 1
        return grants

    lengths = [grants_until_calm() for _ in range(8)]
    assert lengths == [8, 16, 32, 64, 128, 256, 256, 256]

    for _ in range(256):
        strategy.feedback("a", granted=True)
    assert grants_until_calm() == 8


def test_a_seed_repeats_the_choices():
    """
    Two runs with the same seed choose alike, so that an experiment can be repeated.
    """
    endpoints = [view(f"e{i}") for i in range(9)]
    for make in (Availability, RoundRobin, Weighted):
        assert firsts(make(seed=5), endpoints, 100) == firsts(make(seed=5), endpoints, 100)


# ---- round robin


def test_round_robin_is_even_over_10000_decisions():
    """
    After any number of decisions no endpoint was chosen more than once more often than another.
    """
    strategy, endpoints = RoundRobin(), [view(f"e{i}", 1 + i) for i in range(7)]
    counts = collections.Counter({v.endpoint_id: 0 for v in endpoints})
    for turn in range(10_000):
        counts[strategy.order(endpoints, REQUEST)[0].endpoint_id] += 1
        if turn % 100 < 8:
            assert max(counts.values()) - min(counts.values()) <= 1
    assert max(counts.values()) - min(counts.values()) <= 1


@given(data=st.data(), n=st.integers(1, 10))
def test_round_robin_has_no_bursts_whatever_comes_and_goes(data, n):
    """
    An endpoint that stays in sight is never passed over twice for one that was chosen more recently.
    """
    strategy, endpoints = RoundRobin(), [view(f"e{i}") for i in range(n)]
    last = {}
    for turn in range(60):
        present = data.draw(st.lists(st.sampled_from(endpoints), min_size=1, unique=True))
        ordered = [v.endpoint_id for v in strategy.order(present, REQUEST)]
        ages = [last.get(name, -1) for name in ordered]
        assert ages == sorted(ages)
        last[ordered[0]] = turn


def test_round_robin_after_a_return():
    """
    An endpoint that was down for long takes its turn when it is back, and does not catch up.
    """
    strategy, three = RoundRobin(), [view("a"), view("b"), view("c")]
    firsts(strategy, three, 9)
    assert sorted(firsts(strategy, three[:2], 100)) == ["a"] * 50 + ["b"] * 50

    after = firsts(strategy, three, 30)
    assert after[0] == "c"
    assert collections.Counter(after) == {"a": 10, "b": 10, "c": 10}


def test_round_robin_in_threads_is_as_even_as_in_one():
    """
    Eight threads that ask at once get different endpoints, not all the same one.
    """
    strategy, endpoints = RoundRobin(), [view(f"e{i}") for i in range(5)]
    run_threads(8, lambda number: firsts(strategy, endpoints, 250))

    assert set(strategy.decisions().values()) == {400}


# ---- weighted


def windows_are_even(chosen, weights):
    period = sum(weights.values()) // math.gcd(*weights.values())
    unit = math.gcd(*weights.values())
    counts = collections.Counter(chosen[:period])
    for i in range(period, len(chosen)):
        for name, weight in weights.items():
            assert abs(counts[name] - weight // unit) <= 1, (i, name, counts, weights)
        counts[chosen[i]] += 1
        counts[chosen[i - period]] -= 1


@given(sizes=st.lists(st.integers(1, 16), min_size=1, max_size=12), seed=st.integers(0, 2**32))
def test_weighted_is_smooth(sizes, seed):
    """
    In any window of one full round each endpoint is chosen as often as its GPUs say, give or take one.
    """
    weights = {f"e{i}": size for i, size in enumerate(sizes)}
    period = sum(sizes) // math.gcd(*sizes)
    chosen = firsts(Weighted(seed=seed), [view(*item) for item in weights.items()], 2 * period + 20)

    windows_are_even(chosen, weights)


def test_weighted_keeps_proportion_over_10000_decisions():
    """
    Servers of 8, 4, 2 and 1 GPUs are chosen 8 : 4 : 2 : 1, within two decisions of 10,000.
    """
    weights = {"a": 8, "b": 4, "c": 2, "d": 1}
    chosen = firsts(Weighted(), [view(*item) for item in weights.items()], 10_000)

    windows_are_even(chosen, weights)
    counts = collections.Counter(chosen)
    for name, weight in weights.items():
        assert abs(counts[name] - 10_000 * weight / 15) <= 2


def test_weighted_spaces_a_large_server_out():
    """
    A server of 5 among two of 1 is not asked five times in a row.
    """
    chosen = firsts(Weighted(), [view("a", 5), view("b", 1), view("c", 1)], 700)[7:]
    longest = max(len(list(run)) for name, run in itertools.groupby(chosen) if name == "a")

    assert longest <= 4


def test_weighted_begins_in_proportion():
    """
    Scripts that each choose once are spread in proportion; they do not all begin at the largest server.
    """
    endpoints = [view("a", 6), view("b", 3), view("c", 1)]
    counts = collections.Counter(firsts(Weighted(seed=i), endpoints, 1)[0] for i in range(2000))

    for name, share in (("a", 0.6), ("b", 0.3), ("c", 0.1)):
        assert abs(counts[name] - 2000 * share) < 5 * math.sqrt(2000 * share * (1 - share))


def test_weighted_after_a_return():
    """
    A server that was away comes back to its share at once: no burst to make up for its absence, no penalty.
    """
    strategy = Weighted()
    weights = {"a": 8, "b": 4, "c": 2}
    endpoints = [view(*item) for item in weights.items()]
    firsts(strategy, endpoints, 50)
    without = collections.Counter(firsts(strategy, endpoints[1:], 300))
    assert abs(without["b"] - 200) <= 2

    for n in (7, 14, 70, 140):
        back = copy.deepcopy(strategy)
        back._owed, back._decisions = dict(strategy._owed), strategy._decisions
        counts = collections.Counter(firsts(back, endpoints, n))
        for name, weight in weights.items():
            assert abs(counts[name] - n * weight / 14) <= 2.5


@given(data=st.data(), sizes=st.lists(st.integers(1, 16), min_size=2, max_size=8))
def test_weighted_has_no_bursts_whatever_comes_and_goes(data, sizes):
    """
    However the set changed before, from then on nobody gets more than a few decisions beyond its share.
    """
    strategy = Weighted()
    endpoints = [view(f"e{i}", size) for i, size in enumerate(sizes)]
    for present in data.draw(st.lists(st.lists(st.sampled_from(endpoints), min_size=1, unique=True), max_size=80)):
        strategy.order(present, REQUEST)

    counts = collections.Counter()
    for n in range(1, 60):
        counts[strategy.order(endpoints, REQUEST)[0].endpoint_id] += 1
        for endpoint in endpoints:
            assert counts[endpoint.endpoint_id] <= n * endpoint.total_gpus / sum(sizes) + 4


def test_weighted_shares_out_what_takes_turns_in_being_full():
    """
    Servers that are out of sight half of the time, because they are full, keep their proportion in the other
    half.
    """
    strategy, a, b, c = Weighted(), view("a", 8), view("b", 4), view("c", 6)
    counts = collections.Counter()
    for _ in range(600):
        counts[strategy.order([a, b], REQUEST)[0].endpoint_id] += 1
        counts[strategy.order([c], REQUEST)[0].endpoint_id] += 1

    assert abs(counts["a"] - 400) <= 2
    assert abs(counts["b"] - 200) <= 2


def test_weighted_without_known_sizes():
    """
    Endpoints whose size nobody knows are chosen evenly instead of not at all.
    """
    counts = collections.Counter(firsts(Weighted(), [view("a", 0), view("b", 0)], 100))

    assert counts == {"a": 50, "b": 50}


# ---- by name, and of the user's own


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("availability", Availability),
        ("round_robin", RoundRobin),
        ("Round-Robin", RoundRobin),
        (" WEIGHTED ", Weighted),
    ],
)
def test_a_strategy_by_name(spec, expected):
    """
    The built-in strategies have names, and a dash or a capital letter does no harm.
    """
    strategy = make_strategy(spec)

    assert type(strategy) is expected
    assert STRATEGIES[strategy.name] is expected


@pytest.mark.parametrize("spec", ["", "random", None, 7, object(), RoundRobin, ["availability"]])
def test_what_is_no_strategy_is_refused(spec):
    """
    A wrong strategy fails at once and says what is allowed, instead of falling back silently.
    """
    with pytest.raises(ConfigError, match=r"strategy=.*(availability, round_robin, weighted|RoundRobin\(\))"):
        make_strategy(spec)


def test_an_instance_is_taken_as_it_is():
    """
    A strategy made by the user keeps its settings, and hears nothing twice.
    """
    strategy = Availability(spread=False)

    assert make_strategy(strategy) is strategy
    wrapped = make_strategy(lambda endpoints, request: endpoints)
    assert make_strategy(wrapped) is wrapped


def test_a_function_is_a_strategy():
    """
    A plain function that sorts endpoints will do.
    """

    def by_name(endpoints, request):
        return sorted(endpoints, key=lambda v: v.endpoint_id, reverse=True)

    strategy = make_strategy(by_name)
    a, b = view("a"), view("b")

    assert strategy.order([a, b], REQUEST) == [b, a]
    strategy.feedback("b", True)
    assert strategy.name == "by_name"
    assert strategy.stats()["endpoints"] == {"b": {"decisions": 1, "grants": 1, "refusals": 0}}


class Heard:
    """A strategy with feedback, and a name of its own."""

    name = "heard"

    def __init__(self):
        self.seen = []

    def order(self, endpoints, request):
        self.seen.append(request)
        return endpoints

    def feedback(self, endpoint_id, granted):
        self.seen.append((endpoint_id, granted))


def test_an_object_hears_request_and_feedback():
    """
    A user's object sees the request, and hears what came of its choices.
    """
    mine = Heard()
    strategy = make_strategy(mine)
    strategy.order([view("a")], REQUEST)
    strategy.feedback("a", False)

    assert isinstance(strategy, UserStrategy)
    assert strategy.name == "heard"
    assert mine.seen == [REQUEST, ("a", False)]
    assert "Heard" in repr(strategy)
    assert pickle.loads(pickle.dumps(strategy)).name == "heard"


class OnlyOrder:
    def order(self, endpoints, request):
        return list(endpoints)[:1]


def test_feedback_and_name_are_optional():
    """
    A user's object needs the one method.
    """
    strategy = make_strategy(OnlyOrder())
    strategy.feedback("a", True)

    assert strategy.name == "OnlyOrder"
    assert [v.endpoint_id for v in strategy.order([view("a"), view("b")], REQUEST)] == ["a", "b"]


A, B, C = view("a"), view("b"), view("c")


def endless(endpoints, request):
    while True:
        yield endpoints[-1]


def breaks_midway(endpoints, request):
    yield endpoints[-1]
    raise RuntimeError("midway")


def empties(endpoints, request):
    endpoints.clear()
    return endpoints


@pytest.mark.parametrize(
    ("function", "expected", "logged"),
    [
        (lambda e, r: [], [A, B, C], False),
        (lambda e, r: [e[2]], [C, A, B], False),
        (lambda e, r: (e[1], e[1], e[1]), [B, A, C], True),
        (lambda e, r: [view("ghost"), e[2], e[0]], [C, A, B], True),
        (lambda e, r: ["b", None, 7, [], e[1]], [B, A, C], True),
        (lambda e, r: [view("b", 99)], [B, A, C], False),
        (lambda e, r: None, [A, B, C], True),
        (lambda e, r: 1 / 0, [A, B, C], True),
        (lambda e: e, [A, B, C], True),
        (endless, [C, A, B], True),
        (breaks_midway, [A, B, C], True),
        (empties, [A, B, C], False),
    ],
)
def test_a_buggy_strategy_starves_nobody(function, expected, logged, caplog):
    """
    Whatever a user's strategy returns or raises, every endpoint is still asked, once, and the log says it
    once.
    """
    strategy = make_strategy(function)
    with caplog.at_level(logging.WARNING, "gpupool_sync.strategies"):
        for _ in range(3):
            given_views = [A, B, C]
            ordered = strategy.order(given_views, REQUEST)
            assert ordered == expected
            assert all(any(v is g for g in given_views) for v in ordered)
            assert given_views == [A, B, C]

    assert len(caplog.records) == logged


def test_feedback_that_fails_is_logged_once(caplog):
    """
    A user's feedback that raises harms no acquire.
    """

    class Fails(OnlyOrder):
        def feedback(self, endpoint_id, granted):
            raise RuntimeError("no ears")

    strategy = make_strategy(Fails())
    with caplog.at_level(logging.WARNING, "gpupool_sync.strategies"):
        for _ in range(3):
            strategy.feedback("a", True)

    assert len(caplog.records) == 1
    assert strategy.stats()["grants"] == 3


def test_ctrl_c_in_a_users_strategy_is_not_swallowed():
    """
    Ctrl-C while a user's strategy runs still ends the program.
    """

    def interrupted(endpoints, request):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_strategy(interrupted).order([A], REQUEST)


def test_a_users_strategy_may_block_without_blocking_others():
    """
    A slow strategy of the user's runs in several threads at once: no lock of ours is held around it.
    """
    together = threading.Barrier(4)

    def meet(endpoints, request):
        together.wait(10)
        return endpoints

    strategy = make_strategy(meet)

    assert run_threads(4, lambda number: strategy.order([A, B], REQUEST)) == [[A, B]] * 4
