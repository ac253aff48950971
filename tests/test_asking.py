"""Whom a pool asks, where it waits, and what it watches: decisions without a pool, a clock or a network."""

from __future__ import annotations

import random

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpupool_sync import asking
from gpupool_sync.asking import Rivals, Tickets, Watched, attempts, ordered, promising
from gpupool_sync.models import EndpointView, GPURequest

REQUEST = GPURequest()


@attrs.frozen
class Candidate:
    """What `asking` needs to know of an endpoint."""

    view: EndpointView
    free: tuple[int, ...]
    share: float = 1.0


def candidate(name, free=1, share=1.0, age=0.0):
    return Candidate(EndpointView(name, 8, free, age=age), tuple(range(free)), share)


class InNameOrder:
    """A strategy that remembers what it is told."""

    def __init__(self):
        self.told = []
        self.asked = []

    def order(self, endpoints, request):
        self.asked.append([view.endpoint_id for view in endpoints])
        return sorted(endpoints, key=lambda view: view.endpoint_id)

    def feedback(self, endpoint_id, granted):
        self.told.append((endpoint_id, granted))


def names(candidates):
    return [each.view.endpoint_id for each in candidates]


def test_only_those_with_enough_free_cards_are_asked():
    """Three GPUs of one host are not asked of a host with two free ones."""
    seen = [candidate("b", 3), candidate("a", 2), candidate("c", 8)]

    assert names(ordered(seen, GPURequest(count=3), InNameOrder(), random.random)) == ["b", "c"]
    assert ordered([candidate("a", 0)], REQUEST, InNameOrder(), random.random) == []


def test_an_endpoint_whose_last_poll_failed_comes_last():
    """Chance never lets it be among the first."""
    seen = [candidate("a", share=0.0), candidate("b"), candidate("c")]

    for draw in (0.0, 0.5, 0.999):
        assert names(ordered(seen, REQUEST, InNameOrder(), lambda draw=draw: draw)) == ["b", "c", "a"]


def test_a_recovered_endpoint_gets_its_share_and_no_more():
    """At a tenth of its share it is considered once in ten times."""
    seen = [candidate("a", share=0.1), candidate("b")]

    assert names(ordered(seen, REQUEST, InNameOrder(), lambda: 0.05)) == ["a", "b"]
    assert names(ordered(seen, REQUEST, InNameOrder(), lambda: 0.15)) == ["b", "a"]
    assert names(ordered(seen[:1], REQUEST, InNameOrder(), lambda: 0.99)) == ["a"], "there is no other"


def test_a_refusal_is_told_to_the_strategy_before_the_next_is_chosen():
    """Each endpoint is asked once, until one grants."""
    strategy = InNameOrder()
    asking = attempts([candidate("c"), candidate("a"), candidate("b")], REQUEST, strategy, random.random)

    assert next(asking).view.endpoint_id == "a"
    assert asking.send(False).view.endpoint_id == "b"
    assert strategy.told == [("a", False)]
    with pytest.raises(StopIteration):
        asking.send(True)
    assert strategy.told == [("a", False), ("b", True)]
    assert [len(views) for views in strategy.asked] == [3, 2]


def test_nobody_is_left_after_everybody_refused():
    """The caller waits then."""
    asking = attempts([candidate("a")], REQUEST, InNameOrder(), random.random)
    next(asking)

    with pytest.raises(StopIteration):
        asking.send(False)


def test_rivals_are_counted_for_a_while_and_then_forgotten():
    """Ten cards a second for long are ten a second; a minute of silence makes that next to none."""
    rivals = Rivals()
    assert rivals.per_second(5.0) == 0.0
    for second in range(100):
        rivals.took(10, float(second))

    assert 9.0 < rivals.per_second(99.5) < 11.0
    assert rivals.per_second(159.0) < 0.1


def test_a_waiter_with_few_arbiters_waits_at_all_of_them():
    """Nothing is left to chance where it costs little."""
    tickets = Tickets()

    assert sorted(tickets.round(["a", "b", "c"], {}, [], 0.0)) == ["a", "b", "c"]


def test_a_waiter_begins_with_a_few_tickets_and_leaves_no_more_while_others_stand_before_it():
    """Who is not next anywhere costs the servers nothing but a sign of life now and then."""
    tickets = Tickets()
    arbiters = list(range(100))
    first = tickets.round(arbiters, {}, [], 0.0)
    assert first == arbiters[: asking.FIRST_TICKETS]
    for each in first:
        tickets.left(each, 3, 0.0)

    assert tickets.position == 3
    assert tickets.round(arbiters, {}, [], 1.0) == first[:1], "who stands before it there, by now"
    assert tickets.pause() > asking.REASK
    assert tickets.round(arbiters, {}, [], asking.REASK) == first[: asking.TICKETS_PER_ROUND]


def test_who_is_next_somewhere_leaves_more_tickets():
    """No card lies idle for want of a ticket, and who has waited longest waits everywhere in the end."""
    tickets = Tickets()
    arbiters, now = list(range(100)), 0.0
    while len(tickets) < len(arbiters):
        plan = tickets.round(arbiters, {}, [], now)
        assert 0 < len(plan) <= 2 * asking.TICKETS_PER_ROUND
        for each in plan:
            tickets.left(each, 0 if each else 2, now)  # at one of them others wait
        now += tickets.pause() if len(tickets) < len(arbiters) else 0.0

    assert 10 * asking.WIDEN_EVERY <= now <= 100 * asking.WIDEN_EVERY
    assert tickets.round(arbiters, {}, [], now) == arbiters[:1]
    assert tickets.pause() > asking.REASK, "there is nobody left to ask"


def test_who_is_first_everywhere_asks_all_others_at_once():
    """Nobody else waits, so that costs little, and the one card that comes free may be anywhere."""
    tickets = Tickets()
    arbiters = list(range(100))
    sizes = []
    while len(tickets) < len(arbiters):
        plan = tickets.round(arbiters, {}, [], 0.0)
        sizes.append(len(plan))
        for each in plan:
            tickets.left(each, 0, 0.0)
        if len(tickets) < len(arbiters):
            assert tickets.pause() == 0.0

    assert sizes == [12, 12, 24, 48, 4]
    assert tickets.pause() > asking.REASK, "there is nobody left to ask"


def test_arbiters_that_cannot_be_asked_say_nothing_of_others_who_wait():
    """Where none answers, all the others are not asked in a moment."""
    tickets = Tickets()
    arbiters = list(range(100))
    for each in tickets.round(arbiters, {}, [], 0.0):
        tickets.left(each, None, 0.0, answered=False)

    assert tickets.pause() > asking.REASK
    assert len(tickets.round(arbiters, {}, [], 1.0)) == 1


def test_only_one_arbiter_holds_cards_back_for_a_waiter():
    """Two waiters that collect cards at two arbiters each could starve one another."""
    tickets = Tickets()
    first = tickets.round(list(range(100)), {7: 0.1}, [], 0.0)
    assert tickets.reserving == first[0] == 7
    tickets.round(list(range(100)), {9: 0.1}, [], 1.0)
    assert tickets.reserving == 7
    tickets.round([8, 9], {9: 0.1}, [], 2.0)
    assert tickets.reserving == 9, "the other is gone"


def test_hints_and_free_cards_go_first():
    """Where it may be our turn comes before where a card seems free, and both before new tickets."""
    tickets = Tickets()
    mine = [f"mine{number}" for number in range(asking.FIRST_TICKETS)]
    for each in mine:
        tickets.left(each, 1, 0.0)
    assert len(tickets) == len(mine)

    arbiters = [*mine, "other", "free"]
    seem_free = {"free": 0.5, mine[1]: 0.5}
    assert tickets.round(arbiters, seem_free, [mine[2], "gone"], 1.0) == [mine[2], "free", mine[1]]


def test_a_reading_from_before_a_refusal_is_no_reason_to_ask_again():
    """The card that it shows is kept for somebody else: once is enough, until a newer reading comes."""
    tickets = Tickets()
    arbiters = list(range(asking.FIRST_TICKETS + 3))
    for each in tickets.round(arbiters, {0: 0.2, 1: 0.3}, [], 10.0):
        tickets.left(each, 1, 10.0)

    assert tickets.round(arbiters, {0: 0.5 + 0.2, 1: 0.5 + 0.3}, [], 10.5) == [0], "who stands before it there, by now"
    assert tickets.round(arbiters, {0: 0.7, 1: 0.1}, [], 10.5)[0] == 1


def test_a_claim_that_did_not_arrive_is_no_refusal():
    """A connection that was cut once must not cost a free card: that reading is as good as before."""
    tickets = Tickets()
    arbiters = list(range(asking.FIRST_TICKETS + 3))
    for each in tickets.round(arbiters, {0: 0.2}, [], 10.0):
        tickets.left(each, None if each == 0 else 1, 10.0, answered=each != 0)

    assert tickets.round(arbiters, {0: 0.3}, [], 10.1) == [0]


def test_of_several_endpoints_of_one_arbiter_the_newest_reading_counts():
    """What an older one shows was there at the last try."""
    order = [candidate(name, age=age) for name, age in (("a", 3.0), ("b", 1.0), ("c", 9.0), ("d", 4.0))]
    of = {"a": "redis", "b": "redis", "c": "other", "d": "server"}

    assert promising(order, 5.0, lambda each: of[each.view.endpoint_id]) == {"redis": 1.0, "server": 4.0}


def test_a_small_pool_watches_everything():
    """Whatever is asked of it."""
    watched = Watched("abc", 5, random.Random(1))

    assert list(watched) == ["a", "b", "c"]
    assert watched.widen() == ([], [])
    assert watched.narrow() == []
    assert watched.replace("a") is None


def test_processes_watch_different_endpoints():
    """Or the servers of one subset would have all the load."""
    subsets = {frozenset(Watched(range(1000), 10, random.Random(seed))) for seed in range(20)}

    assert len(subsets) == 20
    assert {len(subset) for subset in subsets} == {10}


def test_a_refused_subset_is_widened_until_every_endpoint_had_its_turn():
    """One free card among a hundred endpoints is found, without watching more than twice the subset at a time."""
    watched = Watched(range(100), 10, random.Random(1))
    had = set(watched)
    for _ in range(9):
        watched.widen()
        assert len(watched) == 20
        had.update(watched)

    assert had == set(range(100))
    watched.narrow()
    assert len(watched) == 10


def test_what_is_found_nowhere_is_looked_for_everywhere():
    """Doubling, so that a thousand endpoints take a few rounds."""
    watched = Watched(range(1000), 10, random.Random(1))
    rounds = 0
    while len(watched) < 1000:
        come, gone = watched.widen(everywhere=True)
        assert come
        assert not gone
        rounds += 1

    assert rounds == 7


@given(
    st.lists(st.sampled_from(["widen", "everywhere", "narrow", "replace", "add", "remove"]), max_size=30), st.randoms()
)
def test_no_endpoint_is_lost_whatever_happens(steps, chance):
    """Each one is watched or waits for its turn; what a step reports is what it changed."""
    watched = Watched(range(20), 4, random.Random(1))
    there, number = set(range(20)), 20
    for step in steps:
        before = set(watched)
        come, gone = [], []
        if step == "replace" and before:
            old = chance.choice(sorted(before))
            new = watched.replace(old)
            come, gone = ([new], [old]) if new is not None else ([], [])
        elif step == "narrow":
            gone = watched.narrow()
        elif step == "add":
            come = [number] if watched.add(number) else []
            there.add(number)
            number += 1
        elif step == "remove" and there:
            old = chance.choice(sorted(there))
            there.discard(old)
            come = watched.remove(old)
            gone = [old] if old in before else []
        elif step in ("widen", "everywhere"):
            come, gone = watched.widen(everywhere=step == "everywhere")
        assert set(watched) == (before | set(come)) - set(gone)
        assert set(watched) <= there
        assert len(watched) >= min(len(there), 4)
    while len(watched) < len(there):
        assert watched.widen(everywhere=True)[0]
    assert set(watched) == there
