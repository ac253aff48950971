"""What every lease store promises (`leases/base.py`), for each store there is."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import attrs
import pytest

from gpupool_sync.clock import boottime
from gpupool_sync.config import Endpoint, Settings
from gpupool_sync.errors import LeaseLost, LeaseStoreError
from gpupool_sync.leases.base import CLOSED_TIME, Claim, Granted, Holder, LeaseStore, Queued, Refused, Share, Wanted
from gpupool_sync.leases.host import HostStore
from gpupool_sync.leases.http import HTTPStore
from gpupool_sync.leases.memory import MemoryStore
from gpupool_sync.leases.tickets import ANSWER_TIME, MAX_FORWARD, RESERVE_TIME
from helpers import HoldLog, run_threads
from lease_server import server_of_leases

_numbers = itertools.count()


class Clock:
    """The store's clock, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.running = 0.0

    def __call__(self) -> float:
        return self.now + (boottime() - self.running if self.running else 0.0)

    def run(self) -> None:
        """Go on by itself from here."""
        self.running = boottime()

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


class Listening(HTTPStore):
    """Takes its hints after every call, as its listener would a moment later."""

    def claim(self, claim):
        outcome = super().claim(claim)
        self.listen(0.0)
        return outcome

    def release(self, ids):
        super().release(ids)
        self.listen(0.0)

    withdraw = release


@pytest.fixture(params=["memory", "host", "http"])
def store(request, clock, tmp_path) -> Iterator[LeaseStore]:
    if request.param == "http":
        with server_of_leases(tmp_path / "locks", clock=clock, ticket_ttl=3600.0) as url:
            made = Listening(Endpoint(url), Settings(endpoint_timeout=60.0), clock=clock)
            yield made
            made.close()
        return
    made = MemoryStore(clock=clock) if request.param == "memory" else HostStore(str(tmp_path / "locks"), clock=clock)
    yield made
    made.close()


def holder(name="a"):
    return Holder(id=f"holder-{name}", name=name, user="user", host="host", pid=1)


def claim(*cards, who="a", count=1, share=None, queue=False, waited=0.0, id=None, groups=None, room=None, **more):
    wanted = groups if groups is not None else [cards]
    return Claim(
        id=id or f"id-{next(_numbers)}",
        holder=holder(who),
        groups=tuple(tuple(Wanted(card, room) for card in group) for group in wanted),
        count=count,
        share=share,
        waited=waited,
        queue=queue,
        **more,
    )


def granted(outcome) -> tuple[str, ...]:
    assert isinstance(outcome, Granted), outcome
    return outcome.lease.cards


class Hints:
    """What the store hinted, in order."""

    def __init__(self, store) -> None:
        self.ids: list[str] = []
        self.unsubscribe = store.subscribe(self.ids.extend)

    def take(self) -> list[str]:
        ids, self.ids[:] = list(self.ids), []
        return ids


# -- atomic ----------------------------------------------------------------------------------------------------


def test_a_held_card_is_refused_with_its_holder(store):
    """Who asks for a card that somebody has is told who has it."""
    store.claim(claim("gpu", who="alice"))
    outcome = store.claim(claim("gpu", who="bob"))

    assert isinstance(outcome, Refused)
    assert outcome.reasons["gpu"].code == "held"
    assert "alice" in outcome.reasons["gpu"].text


def test_the_first_free_card_of_the_preference_list_is_granted(store):
    """The order of the wish is respected."""
    store.claim(claim("b"))
    assert granted(store.claim(claim("b", "c", "a"))) == ("c",)


def test_several_cards_are_granted_all_or_nothing(store):
    """Two of three free cards do not serve a wish for three."""
    store.claim(claim("b"))

    assert isinstance(store.claim(claim("a", "b", "c", count=3)), Refused)
    assert granted(store.claim(claim("a", "b", "c", count=2))) == ("a", "c")


def test_several_cards_come_from_one_group(store):
    """Cards of two hosts are never mixed in one lease."""
    store.claim(claim("a1"))
    groups = [("a1", "a2"), ("b1", "b2")]

    assert granted(store.claim(claim(groups=groups, count=2))) == ("b1", "b2")


def test_threads_racing_for_cards_never_hold_one_twice(store):
    """Of many threads that claim and release at the same time, no two ever hold one card."""
    log = HoldLog()

    def work(number):
        served = 0
        for _ in range(200):
            wish = claim("a", "b", "c", who=str(number))
            outcome = store.claim(wish)
            if isinstance(outcome, Granted):
                with log.holding(outcome.lease.cards[0], outcome.lease.token):
                    served += 1
                store.release([wish.id])
        return served

    served = run_threads(8, work)

    assert sum(served) == len(log.holds()) > 0
    assert log.overlaps() == []
    assert log.token_regressions() == []
    assert store.leases() == []


# -- taking away -----------------------------------------------------------------------------------------------


def test_a_revoked_lease_keeps_its_card_until_its_holder_lets_go(store, clock):
    """Its holder is told; nobody is granted the card while that one may still compute on it."""
    wish = claim("a", who="alice")
    lease = store.claim(wish).lease
    assert store.why_gone(wish.id) is None

    assert store.revoke("a", lease.token, "bob") is True
    assert store.renew([wish.id]) == {wish.id: False}
    assert store.why_gone(wish.id) == "it was revoked by bob"
    with pytest.raises(LeaseLost):
        store.claim(wish)
    assert isinstance(store.claim(claim("a", who="carol")), Refused)
    clock.advance(0.1)
    store.release([wish.id])
    refused = store.claim(claim("a", who="carol"))

    assert isinstance(refused, Refused)
    assert refused.reasons["a"].code == "closed"
    assert set(store.closed()) == {"a"}
    assert store.leases() == []


def revoked_and_let_go(store, *keys, count=1):
    wish = claim(*keys, count=count)
    lease = store.claim(wish).lease
    assert store.revoke(lease.cards[-1], lease.token, "bob") is True
    store.release([wish.id])
    return lease


def test_a_closed_card_opens_when_a_later_reading_shows_it_empty(store, clock):
    """A reading from before the end says nothing of what its last holder left behind."""
    before = revoked_and_let_go(store, "a")
    clock.advance(5.0)

    assert isinstance(store.claim(claim("a", emptied={"a": 5.1})), Refused)
    assert isinstance(store.claim(claim("a", emptied={"b": 1.0})), Refused)
    assert store.claim(claim("a", emptied={"a": 4.9})).lease.token > before.token
    assert list(store.closed()) == []


def test_it_is_known_since_when_a_card_is_closed(store, clock):
    """Or since when it was heard of: whoever looks again does not make it later, or no reading ever came after it."""
    revoked_and_let_go(store, "a")
    store.leases()
    (at,) = store.closed().values()
    assert at == clock()
    clock.advance(5.0)
    store.leases()

    assert store.closed() == {"a": at}


def test_a_closed_card_opens_after_a_while(store, clock):
    """Where nobody tells what is on a card, time has to do."""
    revoked_and_let_go(store, "a", "b", count=2)
    clock.advance(CLOSED_TIME - 0.1)
    assert isinstance(store.claim(claim("a", "b")), Refused)
    clock.advance(0.1)

    assert granted(store.claim(claim("a", "b", count=2))) == ("a", "b")
    assert list(store.closed()) == []


@pytest.mark.parametrize("share", [None, Share(places=2)], ids=["whole", "share"])
def test_what_a_dead_holder_left_on_its_card(store, clock, tmp_path, share):
    """A reading that speaks against the card shows the job of nobody who holds it: it counts, from the grant on."""
    if not isinstance(store, (HostStore, HTTPStore)):
        return  # holders of this store die with it, or their leases end by a ttl
    for age, answer in ((5.1, Granted), (4.9, Refused)):
        dead = HostStore(str(tmp_path / "locks"), clock=clock)
        dead.claim(claim("a", who="dead"))
        clock.advance(5.0)
        for held in dead._held.values():
            for file in held.files:
                file.close()  # the lock goes, the record stays: as when its process is killed
        asked = claim("a", who="b", share=share, busy={"a": age})
        outcome = store.claim(asked)
        assert isinstance(outcome, answer)
        store.release([asked.id])
    assert outcome.reasons["a"].code == "in-use"
    # Whoever looked before that one was found to be dead is not late with what it saw.
    assert isinstance(store.claim(claim("a", who="c", share=share, busy={"a": 4.9})), Refused)
    granted(store.claim(claim("a", who="b")))


def test_who_finds_a_dead_holder_for_somebody_else_makes_no_release_of_it(clock, tmp_path):
    """Its readings go on counting for the one who has waited longer."""
    dead, older, other = (HostStore(str(tmp_path / "locks"), clock=clock) for _ in range(3))
    dead.claim(claim("a", who="dead"))
    waits = claim("a", who="older", queue=True)
    assert isinstance(older.claim(waits), Queued)
    clock.advance(5.0)
    for held in dead._held.values():
        for file in held.files:
            file.close()
    assert isinstance(other.claim(claim("a", who="other")), Refused)
    assert older.released_at("a") == clock() - 5.0
    assert isinstance(older.claim(attrs.evolve(waits, busy={"a": 4.9})), Queued)
    granted(older.claim(attrs.evolve(waits, busy={"a": 5.1})))
    for each in (dead, older, other):
        each.close()


def test_a_held_card_is_refused_as_held_whatever_readings_say(store):
    """They show its holder's job."""
    store.claim(claim("a", who="alice"))
    outcome = store.claim(claim("a", who="bob", busy={"a": 0.1}))
    assert outcome.reasons["a"].code == "held"


def test_a_closed_card_does_not_keep_anybody_from_others(store):
    """What is free is granted; a share of a closed card is not."""
    revoked_and_let_go(store, "a")

    assert granted(store.claim(claim("a", "b"))) == ("b",)
    assert isinstance(store.claim(claim("a", share=Share(places=2))), Refused)


def test_a_waiter_gets_a_closed_card_when_it_has_seen_it_empty(store, clock):
    """It is told of the end of the lease, and keeps its place."""
    hints = Hints(store)
    wish = claim("a")
    lease = store.claim(wish).lease
    waits = claim("a", who="b", queue=True)
    later = claim("a", who="c", queue=True)
    assert [store.claim(each) for each in (waits, later)] == [Queued(0), Queued(1)]
    store.revoke("a", lease.token, "bob")
    store.release([wish.id])
    assert hints.take() == [waits.id]
    assert store.claim(waits) == Queued(0)
    assert "a" in store.closed()
    clock.advance(0.2)

    assert not isinstance(store.claim(attrs.evolve(later, emptied={"a": 0.1})), Granted)
    assert granted(store.claim(attrs.evolve(waits, emptied={"a": 0.1}))) == ("a",)


def test_a_card_that_one_has_seen_empty_is_open_for_who_waited_longer(store, clock):
    """Who keeps a card for an older ticket must not keep it for one that cannot have it."""
    hints = Hints(store)
    wish = claim("a")
    lease = store.claim(wish).lease
    waits = claim("a", who="b", queue=True)
    assert store.claim(waits) == Queued(0)
    store.revoke("a", lease.token, "bob")
    store.release([wish.id])
    assert store.claim(waits) == Queued(0)
    hints.take()
    clock.advance(0.2)

    assert isinstance(store.claim(claim("a", who="c", emptied={"a": 0.1})), Refused)
    assert hints.take() == [waits.id]
    assert list(store.closed()) == []
    assert granted(store.claim(waits)) == ("a",)


def test_who_waits_hears_of_a_card_that_another_one_saw_empty(store, clock):
    """Even of one that does not want it, or cannot take it."""
    hints = Hints(store)
    held = claim("a"), claim("b")
    tokens = [store.claim(each).lease.token for each in held]
    waits = claim("a", who="b", queue=True)
    assert store.claim(waits) == Queued(0)
    store.revoke("a", tokens[0], "bob")
    store.release([held[0].id])
    assert store.claim(waits) == Queued(0)
    hints.take()
    clock.advance(0.2)

    assert isinstance(store.claim(claim("a", "b", count=2, who="c", emptied={"a": 0.1})), Refused)
    assert hints.take() == [waits.id]
    assert granted(store.claim(waits)) == ("a",)


def test_who_is_told_of_a_closed_card_keeps_the_free_one_it_was_told_of(store, clock):
    """A closed card is nothing that the next in line could have instead."""
    hints = Hints(store)
    held = claim("a"), claim("b")
    tokens = [store.claim(each).lease.token for each in held]
    silent, waits, later = (claim("a", "b", who=name, queue=True) for name in "bcd")
    for each in (silent, waits, later):
        store.claim(each)
    store.release([held[1].id])
    assert hints.take() == [silent.id]
    clock.advance(ANSWER_TIME)
    assert isinstance(store.claim(claim("b", who="e")), Refused)
    assert hints.take() == [waits.id]
    store.revoke("a", tokens[0], "bob")
    store.release([held[0].id])

    assert isinstance(store.claim(later), Queued)
    assert granted(store.claim(waits)) == ("b",)


def test_who_was_told_of_a_closed_card_comes_first_for_one_that_is_given_back(store):
    """Looking whether the closed one is empty is not the same as having it."""
    hints = Hints(store)
    held = claim("a"), claim("b")
    tokens = [store.claim(each).lease.token for each in held]
    waits, later = (claim("a", "b", who=name, queue=True) for name in "cd")
    for each in (waits, later):
        store.claim(each)
    store.revoke("a", tokens[0], "bob")
    store.release([held[0].id])
    assert hints.take() == [waits.id]
    store.release([held[1].id])

    assert isinstance(store.claim(later), Queued)
    assert granted(store.claim(waits)) == ("b",)


def test_only_the_lease_with_the_token_is_revoked(store):
    """Neither the next lease on the card, nor that of another card, nor one that has ended."""
    first = claim("a")
    old = store.claim(first).lease.token
    store.release([first.id])
    second, other = claim("a"), claim("b")
    token = store.claim(second).lease.token
    store.claim(other)

    wrong = [("a", old), ("b", token + 10**9), ("c", token)]
    assert [store.revoke(key, number, "bob") for key, number in wrong] == [False, False, False]
    assert store.renew([second.id, other.id]) == {second.id: True, other.id: True}
    assert store.why_gone(second.id) is None
    store.release([second.id])
    granted(store.claim(claim("a")))


def test_one_of_several_sharers_can_be_revoked(store):
    """The others stay, and so does the card for them: what is left of a share shows in the readings."""
    wishes = [claim("a", who=name, share=Share(places=2)) for name in ("alice", "carol")]
    tokens = [store.claim(wish).lease.token for wish in wishes]
    assert len(set(tokens)) == 2

    assert store.revoke("a", tokens[0], "bob") is True
    assert store.renew([wish.id for wish in wishes]) == {wishes[0].id: False, wishes[1].id: True}
    assert isinstance(store.claim(claim("a", share=Share(places=2))), Refused)
    store.release([wishes[0].id])
    granted(store.claim(claim("a", share=Share(places=2))))


# -- idempotent ------------------------------------------------------------------------------------------------


def test_repeating_a_claim_returns_the_same_lease(store):
    """A client that lost the answer asks again and gets what it has, not another card."""
    wish = claim("a", "b")
    first = store.claim(wish)

    assert store.claim(wish) == first
    assert granted(store.claim(claim("b", "a", id=wish.id))) == ("a",)
    assert len(store.leases()) == 1


@pytest.mark.parametrize("end", ["release", "withdraw"])
def test_a_claim_that_arrives_after_its_end_is_gone(store, end):
    """A delayed duplicate cannot take a card that nobody would release."""
    wish = claim("a")
    store.claim(wish)
    getattr(store, end)([wish.id])

    with pytest.raises(LeaseLost):
        store.claim(wish)
    assert store.leases() == []


def test_a_release_before_its_claim_wins(store):
    """Who gives up before the claim arrives does not get a card afterwards."""
    wish = claim("a")
    store.release([wish.id])

    with pytest.raises(LeaseLost):
        store.claim(wish)
    assert not store.is_held("a")


def test_releasing_twice_frees_nothing_of_somebody_else(store):
    """A second release does not free the card of the next holder."""
    first, second = claim("a"), claim("a", who="b")
    store.claim(first)
    store.release([first.id])
    store.claim(second)
    store.release([first.id])

    assert store.is_held("a")


@pytest.mark.parametrize(
    "other", [{"count": 2}, {"who": "b"}, {"share": Share(places=2)}], ids=["count", "holder", "share"]
)
@pytest.mark.parametrize("queued", [False, True])
def test_the_same_id_with_another_body_is_an_error(store, other, queued):
    """A collision of ids is found, not granted."""
    if queued:
        store.claim(claim("a", "b", who="z", count=2))
    store.claim(claim("a", "b", id="same", queue=queued))

    with pytest.raises(LeaseStoreError):
        store.claim(claim("a", "b", id="same", **other))


def test_ids_are_not_displayed(store):
    """The id is the capability to release, so no repr and no list shows it."""
    wish = claim("a", id="secret-id")
    outcome = store.claim(wish)

    assert "secret-id" not in f"{wish!r} {outcome!r} {store.leases()!r} {store.queue()!r}"


# -- tokens ----------------------------------------------------------------------------------------------------


def test_tokens_grow(store):
    """A later holder of a card has a larger token."""
    tokens = []
    for _ in range(5):
        wish = claim("a")
        tokens.append(store.claim(wish).lease.token)
        store.release([wish.id])

    assert tokens == sorted(set(tokens))


# -- looking ---------------------------------------------------------------------------------------------------


def test_leases_tell_who_holds_what_since_when(store, clock):
    """Everybody can see who has a card, for how long, and why."""
    store.claim(claim("a", who="alice", note="training"))
    clock.advance(7.0)
    (info,) = store.leases()

    assert (info.cards, info.holder.name, info.note, info.since) == (("a",), "alice", "training", 7.0)
    assert store.holders_of("a") == (info,)
    assert store.holders_of("b") == ()


def test_the_time_of_the_last_release_is_known(store, clock):
    """A reading from before the release can be told from one after it."""
    wish = claim("a")
    assert store.released_at("a") is None
    store.claim(wish)
    clock.advance(3.0)
    store.release([wish.id])

    assert store.released_at("a") == clock()


def test_renewing_tells_which_leases_are_gone(store):
    """A holder finds out which of its leases it has no more."""
    wish = claim("a")
    store.claim(wish)

    assert store.renew([wish.id, "unknown"]) == {wish.id: True, "unknown": False}


# -- shares ----------------------------------------------------------------------------------------------------


def test_shares_by_memory_fit_while_the_sum_does(store):
    """Shares of one card never sum up to more than its room."""
    for _ in range(2):
        granted(store.claim(claim("a", share=Share(memory_mb=4000.0), room=10_000.0)))

    assert isinstance(store.claim(claim("a", share=Share(memory_mb=4000.0), room=10_000.0)), Refused)
    granted(store.claim(claim("a", share=Share(memory_mb=2000.0), room=10_000.0)))


def test_a_share_larger_than_the_room_is_refused_on_an_idle_card(store):
    """Also the first share must fit."""
    assert isinstance(store.claim(claim("a", share=Share(memory_mb=4000.0), room=3000.0)), Refused)
    assert isinstance(store.claim(claim("a", share=Share(memory_mb=4000.0))), Refused)


def test_places_are_counted(store):
    """One of two places is granted twice, not three times."""
    share = Share(places=2)
    granted(store.claim(claim("a", share=share)))
    granted(store.claim(claim("a", share=share)))

    assert isinstance(store.claim(claim("a", share=share)), Refused)


def test_the_narrowest_wish_for_places_counts(store):
    """Who agreed to two holders is not joined by a third who would accept four."""
    granted(store.claim(claim("a", share=Share(places=2))))
    granted(store.claim(claim("a", share=Share(places=4))))

    assert isinstance(store.claim(claim("a", share=Share(places=4))), Refused)


@pytest.mark.parametrize(
    "shares",
    list(itertools.permutations([None, Share(places=4), Share(memory_mb=10.0)], 2)),
    ids=str,
)
def test_a_card_has_one_mode_at_a_time(store, shares):
    """Whole, by memory, by places: modes do not mix on a card."""
    first, second = shares
    granted(store.claim(claim("a", share=first, room=1000.0)))

    assert isinstance(store.claim(claim("a", share=second, room=1000.0)), Refused)


# -- the queue -------------------------------------------------------------------------------------------------


def test_a_freed_card_is_hinted_to_the_oldest_waiter_and_kept_for_it(store, clock):
    """Who waited longest gets the card, although a newcomer asks first."""
    hints = Hints(store)
    held = claim("a")
    store.claim(held)
    waits = [claim("a", who=str(n), queue=True) for n in range(3)]
    for position, wish in enumerate(waits):
        assert store.claim(wish) == Queued(position)
        clock.advance(0.1)
    store.release([held.id])

    assert hints.take() == [waits[0].id]
    refused = store.claim(claim("a", who="newcomer"))
    assert refused.reasons["a"].code == "queue"
    assert granted(store.claim(waits[0])) == ("a",)


def test_waiters_are_served_in_order(store, clock):
    """Ten waiters for one card are served in the order in which they came."""
    hints = Hints(store)
    current = claim("a")
    store.claim(current)
    waits = [claim("a", who=str(n), queue=True) for n in range(10)]
    for wish in waits:
        store.claim(wish)
        clock.advance(0.01)
    served = []
    while waits and len(served) < 10:
        store.release([current.id])
        (next_id,) = hints.take()
        current = next(wish for wish in waits if wish.id == next_id)
        granted(store.claim(current))
        served.append(current)

    assert served == waits


def test_a_waiter_that_does_not_answer_is_passed_over_until_it_speaks(store, clock):
    """A stopped waiter at the head delays the next one by a second, once."""
    hints = Hints(store)
    held = claim("a")
    store.claim(held)
    stopped, next_one = claim("a", who="s", queue=True), claim("a", who="n", queue=True)
    store.claim(stopped)
    store.claim(next_one)
    store.release([held.id])
    assert hints.take() == [stopped.id]

    assert isinstance(store.claim(next_one), Queued)
    clock.advance(ANSWER_TIME)
    granted(store.claim(next_one))

    # It is passed over at once the next time ...
    third = claim("a", who="t", queue=True)
    store.claim(third)
    hints.take()
    store.release([next_one.id])
    assert hints.take() == [third.id]
    # ... but keeps its place as soon as it speaks.
    granted(store.claim(stopped))


def test_leaving_the_queue_hints_the_next(store):
    """A waiter that gives up does not keep the card from the one behind it."""
    hints = Hints(store)
    held = claim("a")
    store.claim(held)
    first, second = claim("a", who="1", queue=True), claim("a", who="2", queue=True)
    store.claim(first)
    store.claim(second)
    store.release([held.id])
    store.withdraw([first.id])

    assert hints.take() == [first.id, second.id]
    granted(store.claim(second))


def test_waiting_elsewhere_counts(store, clock):
    """Who has waited longer at another arbiter stands before who came here first."""
    held = claim("a")
    store.claim(held)
    here, elsewhere = claim("a", who="here", queue=True), claim("a", who="elsewhere", queue=True, waited=30.0)
    store.claim(here)
    assert store.claim(elsewhere) == Queued(0)
    store.release([held.id])

    assert isinstance(store.claim(here), Queued)
    granted(store.claim(elsewhere))


def test_a_re_ask_cannot_jump_the_queue_by_more_than_a_minute(store, clock):
    """A client that tells a wrong waiting time gains a minute at most."""
    store.claim(claim("a"))
    honest = claim("a", who="honest", queue=True, waited=MAX_FORWARD + 10.0)
    store.claim(honest)
    liar = claim("a", who="liar", queue=True)
    store.claim(liar)

    assert store.claim(attrs.evolve(liar, waited=1e9)) == Queued(1)


def test_a_place_never_gets_worse(store, clock):
    """Asking again does not cost the place."""
    store.claim(claim("a"))
    first, second = claim("a", who="1", queue=True, waited=1.0), claim("a", who="2", queue=True)
    store.claim(first)
    store.claim(second)

    assert store.claim(attrs.evolve(first, waited=0.0)) == Queued(0)


def test_a_re_ask_does_not_take_what_is_kept_for_a_longer_wait(store):
    """Where it stands counts, and not what it says: also while the card is on its way to who is next."""
    held, first = claim("a"), claim("a", who="first", queue=True, waited=MAX_FORWARD + 10.0)
    store.claim(held)
    store.claim(first)
    store.release([held.id])
    later = claim("a", who="later", queue=True)
    store.claim(later)

    assert store.claim(attrs.evolve(later, waited=1e9)) == Queued(1)  # ten seconds behind the first
    granted(store.claim(first))


def test_a_waiter_is_not_held_up_by_one_who_wants_other_cards(store):
    """Queues for different cards do not block one another."""
    store.claim(claim("a"))
    store.claim(claim("a", who="1", queue=True))

    granted(store.claim(claim("b", who="2")))


def test_a_ticket_can_be_rewritten(store):
    """When other cards come into view, the ticket names them and keeps its place."""
    hints = Hints(store)
    held_a, held_b = claim("a"), claim("b")
    store.claim(held_a)
    store.claim(held_b)
    wish = claim("a", who="1", queue=True)
    store.claim(wish)
    store.claim(attrs.evolve(wish, groups=((Wanted("b"),),)))
    store.release([held_a.id])
    assert hints.take() == []
    store.release([held_b.id])
    assert hints.take() == [wish.id]


def test_two_freed_cards_are_hinted_to_two_waiters(store):
    """Nobody sleeps beside a free card because an older waiter has been told of another one."""
    hints = Hints(store)
    held = [claim("a"), claim("b")]
    for each in held:
        store.claim(each)
    waits = [claim("a", "b", who=str(n), queue=True) for n in range(3)]
    for wish in waits:
        store.claim(wish)
    store.release([held[0].id])
    store.release([held[1].id])

    assert hints.take() == [waits[0].id, waits[1].id]
    assert {granted(store.claim(waits[1])), granted(store.claim(waits[0]))} == {("a",), ("b",)}


def test_a_waiter_for_several_cards_collects_them(store, clock):
    """A wish for two cards is not starved by a stream of wishes for one."""
    hints = Hints(store)
    held = [claim("a"), claim("b")]
    for each in held:
        store.claim(each)
    both = claim("a", "b", who="both", count=2, queue=True)
    store.claim(both)
    single = claim("a", "b", who="single", queue=True)
    store.claim(single)
    store.release([held[0].id])

    assert hints.take() == []
    assert isinstance(store.claim(single), Queued)
    store.release([held[1].id])
    assert hints.take() == [both.id]
    assert granted(store.claim(both)) == ("a", "b")


def test_a_silent_waiter_for_several_cards_holds_nothing_back_for_long(store, clock):
    """A dead process that wanted two cards does not keep one idle for ever."""
    held = [claim("a"), claim("b")]
    for each in held:
        store.claim(each)
    store.claim(claim("a", "b", who="both", count=2, queue=True))
    single = claim("a", "b", who="single", queue=True)
    store.claim(single)
    store.release([held[0].id])
    clock.advance(RESERVE_TIME)

    granted(store.claim(single))


def test_only_the_first_waiter_for_several_cards_collects(store):
    """Two wishes for two cards do not each sit on one."""
    held = [claim("a"), claim("b"), claim("c")]
    for each in held:
        store.claim(each)
    store.claim(claim("a", "b", who="1", count=2, queue=True))
    store.claim(claim("b", "c", who="2", count=2, queue=True))
    store.release([held[2].id])

    granted(store.claim(claim("c", who="3")))


def test_a_waiter_that_may_not_reserve_holds_nothing_back(store):
    """A wish for several cards reserves at one arbiter at a time."""
    held = [claim("a"), claim("b")]
    for each in held:
        store.claim(each)
    store.claim(claim("a", "b", who="both", count=2, queue=True, reserve=False))
    store.release([held[0].id])

    granted(store.claim(claim("a", who="single")))


def test_waiters_for_shares_are_served_together(store):
    """When a card comes free, as many shares as fit are hinted."""
    hints = Hints(store)
    held = claim("a")
    store.claim(held)
    share = Share(memory_mb=4000.0)
    waits = [claim("a", who=str(n), queue=True, share=share, room=10_000.0) for n in range(3)]
    for wish in waits:
        store.claim(wish)
    store.release([held.id])

    assert hints.take() == [waits[0].id, waits[1].id]


def test_what_the_first_share_leaves_is_for_the_next_in_line(store):
    """Also if it is less than the first one took: who comes later does not get it."""
    hints = Hints(store)
    held = claim("a")
    store.claim(held)
    large, small = Share(memory_mb=6000.0), Share(memory_mb=4000.0)
    waits = [claim("a", who=who, queue=True, share=share, room=10_000.0) for who, share in (("1", large), ("2", small))]
    for wish in waits:
        store.claim(wish)
    store.release([held.id])

    assert isinstance(store.claim(claim("a", who="late", share=small, room=10_000.0)), Refused)
    assert hints.take() == [each.id for each in waits]
    assert [granted(store.claim(each)) for each in waits] == [("a",), ("a",)]


@pytest.mark.parametrize("amount", [1000.0, 6000.0])
def test_a_whole_card_is_kept_from_what_fits_beside_the_first_share(store, amount):
    """Who waits for all of it stands between the share before, however large, and younger ones."""
    held = claim("a")
    store.claim(held)
    share = Share(memory_mb=amount)
    first, whole = claim("a", who="first", queue=True, share=share, room=10_000.0), claim("a", who="whole", queue=True)
    for wish in (first, whole):
        store.claim(wish)
    store.release([held.id])

    younger = claim("a", who="younger", share=Share(memory_mb=4000.0), room=10_000.0)
    assert isinstance(store.claim(younger), Refused)
    assert granted(store.claim(first)) == ("a",)
    assert isinstance(store.claim(attrs.evolve(younger, id="y2")), Refused)


def test_a_waiter_for_a_whole_card_is_not_starved_by_shares(store, clock):
    """While somebody waits for the whole card, no younger share joins those that are on it."""
    share = Share(memory_mb=1000.0)
    first = claim("a", who="share", share=share, room=10_000.0)
    store.claim(first)
    whole = claim("a", who="whole", queue=True)
    store.claim(whole)
    younger = claim("a", who="younger", share=share, room=10_000.0, queue=True)

    assert isinstance(store.claim(younger), Queued)
    store.release([first.id])
    assert granted(store.claim(whole)) == ("a",)


def test_the_queue_can_be_looked_at(store, clock):
    """Who waits for what, and how long, is no secret."""
    store.claim(claim("a"))
    store.claim(claim("a", who="first", queue=True, note="sweep"))
    clock.advance(5.0)
    (ticket,) = store.queue()

    assert (ticket.position, ticket.holder.name, ticket.cards, ticket.waited, ticket.note) == (
        0,
        "first",
        ("a",),
        5.0,
        "sweep",
    )


def test_hints_stop_after_unsubscribing(store):
    """A pool that was closed is not called any more."""
    hints = Hints(store)
    held = claim("a")
    store.claim(held)
    store.claim(claim("a", who="1", queue=True))
    hints.unsubscribe()
    store.release([held.id])

    assert hints.take() == []


def test_waiting_threads_are_all_served_and_never_overlap(store, clock):
    """Many threads that wait by hints share few cards without overlap, and all of them get their turns."""
    clock.run()
    log = HoldLog()
    wake: dict[str, threading.Event] = {}
    store.subscribe(lambda ids: [wake[id].set() for id in ids if id in wake])

    def work(number):
        for _ in range(50):
            wish = claim("a", "b", who=str(number), queue=True)
            wake[wish.id] = threading.Event()
            while not isinstance(outcome := store.claim(wish), Granted):
                wake[wish.id].wait(1.0)
                wake[wish.id].clear()
            with log.holding(outcome.lease.cards[0], outcome.lease.token):
                pass
            store.release([wish.id])
            del wake[wish.id]

    run_threads(8, work)

    assert len(log.holds()) == 8 * 50
    assert log.overlaps() == []
    assert (store.leases(), store.queue()) == ([], [])
