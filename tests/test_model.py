"""Random histories of polls, claims, releases, losses and waits, judged by a model that is too simple to be wrong.

The model knows who holds what, who waits since when, and nothing of how the arbiters do it.  Three arbiters run the
same histories: one process, two processes of one host, and a server beside a process of its host.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

import attrs
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cards import reading
from gpupool_sync.choosing import Limits, is_empty, screen, usable
from gpupool_sync.errors import LeaseLost, LeaseStoreError
from gpupool_sync.leases.base import CLOSED_TIME, Claim, Granted, Holder, Lease, Queued, Refused, Share, Wanted
from gpupool_sync.leases.host import HostStore
from gpupool_sync.leases.memory import MemoryStore
from gpupool_sync.leases.tickets import ANSWER_TIME, MAX_FORWARD
from gpupool_sync.models import Card, GPURequest, Sample, Snapshot
from gpupool_sync.server.leases import Granter
from gpupool_sync.table import Table

CARDS = {"one": ("a", "b"), "two": ("c", "a")}  # both servers list the card a
ROOM = 100.0  # MiB that shares of a card may sum up to
TTL = 30.0  # seconds, of leases that have one
MAX_AGE = 65.0  # seconds
LIMITS = Limits(memory_threshold=80.0, utilization_threshold=90.0)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Served:
    """A server's leases, as its clients see them."""

    def __init__(self, directory: str, clock: Clock) -> None:
        self.host = HostStore(directory, clock=clock)
        self.granter = Granter(self.host, own=lambda key: True, ticket_ttl=1e9, clock=clock)
        self.revoke, self.release, self.withdraw = self.granter.revoke, self.granter.release, self.granter.release
        self.leases, self.close = self.granter.leases, self.granter.close

    def __getattr__(self, name: str) -> object:
        return getattr(self.host, name)

    def claim(self, claim: Claim):
        return self.granter.claim(claim)[0]

    def renew(self, ids):
        return dict(zip(ids, self.granter.renew(ids)[0], strict=True))


@attrs.define
class Held:
    lease: Lease
    claim: Claim
    store: int
    deadline: float | None
    revoked: bool = False


@attrs.define
class Waiting:
    claim: Claim
    store: int
    first_place: float
    place: float
    number: int
    hinted_at: float | None = None
    #: Since the hint somebody who was not told of a card has taken one, or has come to stand before this one.
    passed_by: bool = False

    @property
    def order(self) -> tuple[float, int]:
        return self.place, self.number

    def ready(self, now: float) -> bool:
        return self.hinted_at is None or now - self.hinted_at < ANSWER_TIME


#: What stands on each card that may be had: nothing, or shares; None is the whole card.
Cards = Mapping[str, tuple["Share | None", ...]]


def fits(on_card: Sequence[Share | None], share: Share | None) -> bool:
    shares = [*on_card, share]
    if None in shares:
        return len(shares) == 1
    if all(each.places is not None for each in shares):
        return len(shares) <= min(each.places for each in shares)
    return all(each.memory_mb is not None for each in shares) and sum(each.memory_mb for each in shares) <= ROOM


def with_more(cards: Cards, keys: Iterable[str], share: Share | None) -> Cards:
    return {**cards, **{key: (*cards[key], share) for key in keys}}


def choices(claim: Claim, cards: Cards) -> list[tuple[str, ...]]:
    """All that the claim may take."""
    return [
        picked
        for group in claim.groups
        for picked in combinations([w.key for w in group if fits(cards.get(w.key, (None,)), claim.share)], claim.count)
    ]


def leave(older: Sequence[Claim], cards: Cards, taken: Iterable[str], share: Share | None) -> bool:
    """
    Whether those who wait, the oldest first, may leave what was *taken* of the cards.

    Each chooses among what those before it leave, and takes something if there is anything for it. One such choice is
    asked for, not a certain one, as the arbiter cannot know which it will be: who was told of a card is about to take
    that one, until it comes and takes what it likes best. Nor need the choice be such that most are served: a card is
    the oldest one's who wants it, even if the next one could use no other.

    What the first wish for several cards holds back while it collects them is not asked for: others were told of these
    cards before it came, and it may go silent; test_leases_contract.py has the rule.
    """
    if not all(fits(cards.get(key, (None,)), share) for key in taken):
        return False
    if not older:
        return True
    claim, *others = older
    mine = choices(claim, cards)
    if not mine:
        return leave(others, cards, taken, share)
    return any(leave(others, with_more(cards, picked, claim.share), taken, share) for picked in mine)


class Histories(RuleBasedStateMachine):
    """What may happen, in any order."""

    ttl: float | None = None  # of the leases of the first store
    #: Whether hints name a card, which who was told may take at once.
    offers_cards = False

    def __init__(self) -> None:
        super().__init__()
        self.outside = sys.exc_info()[1]  # what was being handled before the history began

    def make_stores(self) -> list:
        """The arbiter as two processes see it."""
        raise NotImplementedError

    @initialize()
    def begin(self) -> None:
        self.clock = Clock()
        self.table = Table()
        self.stores = self.make_stores()
        self.said: dict[str, Snapshot] = {}
        self.held: dict[str, Held] = {}
        self.waiting: dict[str, Waiting] = {}
        self.gone: list[Claim] = []
        self.closed: dict[str, float] = {}
        self.seen_empty: set[str] = set()  # closed cards that some claim has told to be empty since
        self.tokens: dict[str, int] = {}
        self.number = 0
        self.hints: list[str] = []
        for store in dict.fromkeys(self.stores):
            store.subscribe(self.hints.extend)
        for endpoint in CARDS:
            self.poll(endpoint, set(CARDS[endpoint]), set())

    def teardown(self) -> None:
        if not hasattr(self, "stores"):
            return
        try:
            # After a failure the model knows less than the arbiter. A second error here would hide the first, and
            # shrinking would chase both.
            if sys.exc_info()[1] is self.outside:
                self.everybody_is_served_in_the_end()
        finally:
            for store in dict.fromkeys(self.stores):
                store.close()

    # -- the table ------------------------------------------------------------------------------------------------

    @rule(
        endpoint=st.sampled_from(sorted(CARDS)),
        listed=st.just(set("abc")) | st.sets(st.sampled_from("abc")),
        busy=st.just(set()) | st.sets(st.sampled_from("abc"), max_size=2),
    )
    def poll(self, endpoint: str, listed: set[str], busy: set[str]) -> None:
        readings = tuple(
            reading(n, uuid=key, memory_usage_percent=90.0 * (key in busy), memory_used_mb=70_000.0 * (key in busy))
            for n, key in enumerate(CARDS[endpoint])
            if key in listed
        )
        cards = tuple(Card(each.uuid, endpoint, each) for each in readings)
        now = self.clock.now
        snapshot = Snapshot(endpoint, f"http://{endpoint}", Sample(readings, now), cards, now)
        assert self.table.update(snapshot) is self.said.get(endpoint)
        self.said[endpoint] = snapshot

    @rule(endpoint=st.sampled_from(sorted(CARDS)))
    def endpoint_goes(self, endpoint: str) -> None:
        self.table.forget(endpoint)
        self.said.pop(endpoint, None)

    @invariant()
    def the_table_is_what_was_said_last(self) -> None:
        if not hasattr(self, "stores"):
            return
        snapshots, duplicates = self.table.view()
        assert snapshots == self.said
        keys = [card.key for snapshot in self.said.values() for card in snapshot.cards]
        assert duplicates == {key for key in keys if keys.count(key) > 1}

    def offers(self, store) -> tuple[tuple[Wanted, ...], ...]:
        """The cards that a pool would claim now, by host, the free ones first."""
        groups = []
        seen: set[str] = set()
        for snapshot in self.table.view()[0].values():
            if snapshot.age(self.clock.now) > MAX_AGE:
                continue
            usables = usable(
                screen(snapshot, GPURequest(), LIMITS),
                snapshot,
                is_held=store.is_held,
                released_at=store.released_at,
                closed=dict,
                fits=None,
            )
            found = [
                (obstacle == "held", card.key)
                for card, veto, obstacle in usables
                if veto is None and card.key not in seen
            ]
            seen |= {key for _, key in found}
            if found:
                groups.append(tuple(Wanted(key, ROOM) for _, key in sorted(found)))
        return tuple(groups)

    def emptied(self) -> dict[str, float]:
        return {
            card.key: self.clock.now - snapshot.sample.taken_at
            for snapshot in self.said.values()
            for card in snapshot.cards
            if card.key in self.closed and is_empty(card.reading)
        }

    # -- claims ---------------------------------------------------------------------------------------------------

    @rule(
        store=st.integers(0, 1),
        count=st.sampled_from([1, 1, 1, 2]),
        share=st.sampled_from([None, None, None, Share(places=2), Share(memory_mb=40.0), Share(memory_mb=60.0)]),
        queue=st.booleans(),
        waited=st.sampled_from([0.0, 0.0, 5.0, 100.0]),
        looks=st.booleans(),
    )
    def claims(self, store: int, count: int, share: Share | None, queue: bool, waited: float, looks: bool) -> None:
        groups = self.offers(self.stores[store])
        if not groups:
            return
        self.number += 1
        self.ask(
            Claim(
                id=f"id-{self.number}",
                holder=Holder(f"holder-{store}-{self.number}", None, "user", "host", 1),
                groups=groups,
                count=1 if share else count,
                share=share,
                ttl=TTL,
                waited=waited,
                queue=queue,
                emptied=self.emptied() if looks else {},
            ),
            store,
        )

    @rule(store=st.integers(0, 1), number=st.integers(2, 5))
    def many_claim(self, store: int, number: int) -> None:
        for each in range(number):
            self.claims((store + each) % 2, 1, None, True, 0.0, True)

    @precondition(lambda self: self.held and self.waiting)
    @rule(data=st.data(), store=st.integers(0, 1), seconds=st.sampled_from([0.0, 0.5, 1.0]), queue=st.booleans())
    def a_newcomer_wants_what_is_given_back(self, data, store: int, seconds: float, queue: bool) -> None:
        """Right after the release, when those who wait have hardly heard of it."""
        held = self.held[data.draw(st.sampled_from(sorted(self.held)))]
        self.stores[held.store].release([held.claim.id])
        self.ended(held, given_back=True)
        self.listen()
        self.time_passes(seconds)
        self.claims(store, 1, None, queue, 0.0, True)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), waited=st.sampled_from([0.0, 5.0, 100.0]), rewrite=st.booleans())
    def asks_again(self, data, waited: float, rewrite: bool) -> None:
        ticket = self.waiting[data.draw(st.sampled_from(sorted(self.waiting)))]
        groups = self.offers(self.stores[ticket.store]) if rewrite else ()
        claim = attrs.evolve(
            ticket.claim, groups=groups or ticket.claim.groups, waited=waited, queue=True, emptied=self.emptied()
        )
        self.ask(claim, ticket.store)

    def ask(self, claim: Claim, store: int) -> None:
        now = self.clock.now
        if isinstance(self.stores[store], Served) and not any(len(group) >= claim.count for group in claim.groups):
            # Its cards can never serve that; a ticket of before stays as it was.
            assert isinstance(self.stores[store].claim(claim), Refused)
            self.listen()
            return
        ticket = self.waiting.get(claim.id)
        told = passed_by = False
        hinted = ticket is not None and ticket.hinted_at is not None and ticket.ready(now)
        if ticket is not None:
            ticket.place = max(ticket.first_place - MAX_FORWARD, min(ticket.place, now - claim.waited))
            told = self.offers_cards and hinted and claim.count == 1 and claim.share is None
            passed_by = ticket.passed_by
            ticket.hinted_at = None
            ticket.passed_by = False
            ticket.claim = claim
        order = ticket.order if ticket is not None else (now - claim.waited, self.number)
        self.seen_empty |= {key for key, ago in claim.emptied.items() if now - ago > self.closed.get(key, now)}
        # After the line above: what this claim tells of opens a card for those before it as well.
        cards = self.cards_to_have()
        # Who was told of a card takes it, in that second, without a look at the queue: who came to stand before it is
        # not seen, nor is an older one whose card such a one has taken, before or after.
        older = [
            other.claim
            for other in sorted(self.waiting.values(), key=lambda t: t.order)
            if other.order < order and other.ready(now) and not (told and (passed_by or other.passed_by))
        ]
        outcome = self.stores[store].claim(claim)
        if isinstance(outcome, Granted):
            if not hinted:
                for other in self.waiting.values():
                    other.passed_by = other.passed_by or other.hinted_at is not None
            self.granted(claim, store, outcome.lease, older, cards)
        elif isinstance(outcome, Queued):
            assert claim.queue
            if ticket is None:
                place = now - claim.waited
                self.waiting[claim.id] = Waiting(claim, store, place, place, self.number)
            for other in self.waiting.values():
                other.passed_by = other.passed_by or (other.hinted_at is not None and order < other.order)
            assert 0 <= outcome.position < len(self.waiting)
        else:
            assert isinstance(outcome, Refused)
            assert not claim.queue
        self.listen()

    def cards_to_have(self) -> Cards:
        """The cards that are not closed, and what stands on them."""
        shut = {key for key, at in self.closed.items() if self.clock.now - at < CLOSED_TIME} - self.seen_empty
        cards: Cards = dict.fromkeys(sorted(set("abc") - shut), ())
        for held in self.held.values():
            cards = with_more(cards, [key for key in held.lease.cards if key in cards], held.lease.share)
        return cards

    def granted(self, claim: Claim, store: int, lease: Lease, older: list[Claim], cards: Cards) -> None:
        now = self.clock.now
        assert (lease.id, lease.holder, lease.share) == (claim.id, claim.holder, claim.share)
        assert len(set(lease.cards)) == claim.count
        assert any(set(lease.cards) <= {wanted.key for wanted in group} for group in claim.groups)
        for key in lease.cards:
            assert lease.token > self.tokens.get(key, 0)
            self.tokens[key] = lease.token
            closed_at = self.closed.get(key)
            if closed_at is not None:
                assert now - closed_at >= CLOSED_TIME or key in self.seen_empty
                del self.closed[key]
                self.seen_empty.discard(key)
        # Nobody who has waited longer, and is there, had only these to choose from.
        assert leave(older, cards, lease.cards, lease.share)
        self.waiting.pop(claim.id, None)
        self.held[claim.id] = Held(lease, claim, store, now + TTL if store == 0 and self.ttl else None)

    def listen(self) -> None:
        for store in dict.fromkeys(self.stores):
            store.listen(0.0)
        for claim_id in self.hints:
            ticket = self.waiting.get(claim_id)
            if ticket is not None and ticket.hinted_at is None:
                ticket.hinted_at = self.clock.now
        self.hints.clear()

    # -- repetitions ----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def repeats_a_claim(self, data) -> None:
        held = self.held[data.draw(st.sampled_from(sorted(self.held)))]
        if held.revoked:
            with pytest.raises(LeaseLost):
                self.stores[held.store].claim(held.claim)
            return
        again = self.stores[held.store].claim(held.claim)
        assert isinstance(again, Granted)
        assert (again.lease.cards, again.lease.token) == (held.lease.cards, held.lease.token)
        if held.deadline is not None:
            held.deadline = self.clock.now + TTL

    @precondition(lambda self: self.gone)
    @rule(data=st.data())
    def repeats_what_has_ended(self, data) -> None:
        claim, store = data.draw(st.sampled_from(self.gone))
        with pytest.raises(LeaseLost):
            self.stores[store].claim(claim)

    @precondition(lambda self: self.held or self.waiting)
    @rule(data=st.data())
    def takes_somebody_elses_id(self, data) -> None:
        known = {**self.held, **self.waiting}
        mine = known[data.draw(st.sampled_from(sorted(known)))]
        with pytest.raises(LeaseStoreError):
            self.stores[mine.store].claim(attrs.evolve(mine.claim, holder=Holder("thief", None, "eve", "host", 2)))

    # -- ends -----------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.held or self.waiting)
    @rule(data=st.data(), twice=st.booleans())
    def lets_go(self, data, twice: bool) -> None:
        """Of a lease or of a place in the queue."""
        known = {**self.held, **self.waiting}
        mine = known[data.draw(st.sampled_from(sorted(known)))]
        for _ in range(1 + twice):
            self.stores[mine.store].release([mine.claim.id])
        self.ended(mine, given_back=True)
        self.listen()

    def ended(self, mine: Held | Waiting, *, given_back: bool) -> None:
        self.gone.append((mine.claim, mine.store))
        self.waiting.pop(mine.claim.id, None)
        self.held.pop(mine.claim.id, None)
        if isinstance(mine, Held) and mine.claim.share is None and (mine.revoked or not given_back):
            self.closed |= dict.fromkeys(mine.lease.cards, self.clock.now)
            self.seen_empty -= set(mine.lease.cards)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), by=st.integers(0, 1))
    def is_revoked(self, data, by: int) -> None:
        held = self.held[data.draw(st.sampled_from(sorted(self.held)))]
        assert self.stores[by].revoke(held.lease.cards[0], held.lease.token, "root") is True
        assert self.stores[by].revoke(held.lease.cards[0], held.lease.token + 10**9, "root") is False
        held.revoked = True

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def renews(self, data) -> None:
        held = self.held[data.draw(st.sampled_from(sorted(self.held)))]
        told = self.stores[held.store].renew([held.claim.id, "id-of-nobody"])
        assert told == {held.claim.id: not held.revoked, "id-of-nobody": False}
        assert (self.stores[held.store].why_gone(held.claim.id) is not None) is held.revoked
        if held.deadline is not None and not held.revoked:
            held.deadline = self.clock.now + TTL

    @rule(seconds=st.sampled_from([0.5, 1.0, 3.0, 29.0, 61.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds
        self.expire()

    def expire(self) -> None:
        if self.ttl is None:
            return
        self.stores[0].granter.expire()
        for held in list(self.held.values()):
            if held.deadline is not None and held.deadline <= self.clock.now:
                self.ended(held, given_back=False)
        self.listen()

    # -- what must hold at any time -----------------------------------------------------------------------------------

    @invariant()
    def no_card_is_held_twice(self) -> None:
        if not hasattr(self, "stores"):
            return
        on_card: dict[str, list[Share | None]] = {}
        for held in self.held.values():
            for key in held.lease.cards:
                on_card.setdefault(key, []).append(held.lease.share)
        for shares in on_card.values():
            if None in shares:
                assert shares == [None]
            elif shares[0].places is not None:
                assert all(share.places is not None for share in shares)
                assert len(shares) <= min(share.places for share in shares)
            else:
                assert sum(share.memory_mb for share in shares) <= ROOM

    @invariant()
    def the_arbiter_tells_what_is(self) -> None:
        if not hasattr(self, "stores"):
            return
        told = {(info.cards, info.token, info.holder.id) for store in self.stores for info in store.leases()}
        kept = {(held.lease.cards, held.lease.token, held.lease.holder.id) for held in self.held.values()}
        if self.by_card:
            told, kept = by_card(told), by_card(kept)
        assert told == kept
        queue = [info.holder.id for info in self.stores[1].queue()]
        assert queue == [each.claim.holder.id for each in sorted(self.waiting.values(), key=lambda t: t.order)]

    #: Whether a lease of several cards is told card by card.
    by_card = False

    def everybody_is_served_in_the_end(self) -> None:
        """When all holders let go, all who wait have their turn, by asking again once a second."""
        for held in list(self.held.values()):
            self.stores[held.store].release([held.claim.id])
            self.ended(held, given_back=True)
        self.clock.now += CLOSED_TIME
        self.listen()
        for _ in range(4 * len(self.waiting)):
            self.clock.now += ANSWER_TIME
            for ticket in sorted(self.waiting.values(), key=lambda t: t.order):
                if ticket.claim.id not in self.waiting:
                    continue
                if not any(len(group) >= ticket.claim.count for group in ticket.claim.groups):
                    self.stores[ticket.store].withdraw([ticket.claim.id])
                    self.ended(ticket, given_back=True)
                    continue
                self.ask(attrs.evolve(ticket.claim, queue=True), ticket.store)
                if (held := self.held.get(ticket.claim.id)) is not None:
                    self.stores[held.store].release([held.claim.id])
                    self.ended(held, given_back=True)
        assert not self.waiting
        self.the_arbiter_tells_what_is()


def by_card(leases: set) -> set:
    return {(key, token, holder) for cards, token, holder in leases for key in cards}


class OneProcess(Histories):
    def make_stores(self) -> list:
        return [MemoryStore(clock=self.clock)] * 2


class OneHost(Histories):
    by_card = True
    offers_cards = True

    def make_stores(self) -> list:
        self.directory = tempfile.mkdtemp(prefix="gpupool-model-")
        return [HostStore(f"{self.directory}/locks", clock=self.clock) for _ in range(2)]

    def teardown(self) -> None:
        super().teardown()
        shutil.rmtree(self.directory, ignore_errors=True)


class ServerAndHost(OneHost):
    ttl = TTL

    def make_stores(self) -> list:
        self.directory = tempfile.mkdtemp(prefix="gpupool-model-")
        return [
            Served(f"{self.directory}/locks", self.clock),
            HostStore(f"{self.directory}/locks", clock=self.clock),
        ]


#: The same histories each time: whether a change may be taken must not hang on luck. The nightly profile looks for new
#: ones.
_SAME = {"derandomize": settings().max_examples <= 100, "stateful_step_count": 40}
# A history costs as much as some dozen cases of other properties.
_FEWER = settings(max_examples=max(10, settings().max_examples // 10), **_SAME)

# Left out where the wheel is tested with other versions: the histories depend on the version of hypothesis.
pytestmark = pytest.mark.checkout

TestOneProcess = OneProcess.TestCase
TestOneHost = OneHost.TestCase
TestServerAndHost = ServerAndHost.TestCase
TestOneProcess.settings = settings(**_SAME)
TestOneHost.settings = _FEWER
TestServerAndHost.settings = _FEWER
