"""How a GPU is acquired: look, let the strategy order what would do, claim, and wait with a ticket.

Take the table's snapshots; filter them; let the strategy order the endpoints; claim at the arbiter; on
refusal go on with the rest; then wait.  Nothing that blocks happens under a lock, and the arbiter alone decides.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from random import SystemRandom
from typing import TYPE_CHECKING, Any

import attrs

from gpupool_sync.arbiters import warn_of_scope
from gpupool_sync.asking import Tickets, attempts, ordered, promising
from gpupool_sync.callers import user_stacklevel
from gpupool_sync.choosing import is_empty
from gpupool_sync.clock import Deadline, boottime
from gpupool_sync.engine import first_reading, opened
from gpupool_sync.errors import AcquireTimeout, LeaseLost, LeaseStoreError, NoSuchGPU, PoolClosed
from gpupool_sync.handle import Grant, bound_to
from gpupool_sync.holding import collect_dropped, withdraw
from gpupool_sync.importing import importing
from gpupool_sync.leases.base import Claim, Granted, LeaseStore, NotAsked, Queued, Share, Wanted
from gpupool_sync.leases.tickets import ANSWER_TIME
from gpupool_sync.looking import MANY_ENDPOINTS, Seen, glance, look, room_of, screened_for, unknown_names
from gpupool_sync.models import Card, EndpointView, GPUFault, GPURequest
from gpupool_sync.reporting import describe, explain
from gpupool_sync.state import Engine, PoolState, all_grants
from gpupool_sync.waiting import RECHECK, Waiter, listener

if TYPE_CHECKING:
    from gpupool_sync.progress import Progress
    from gpupool_sync.status import Explanation
    from gpupool_sync.strategies import CountingStrategy

logger = logging.getLogger(__name__)

#: Lines that an error explains itself with; `explain` has them all.
EXPLAINED_CARDS = 20
#: Seconds of waiting after which a pool whose endpoints are all down says so once.
LONG_WAIT = 10.0
#: Seconds of waiting after which it is shown, where the setting `progress` lets it.
SHOW_AFTER = 2.0


def obtain(state: PoolState, grant: Grant, request: GPURequest, deadline: Deadline) -> None:
    """Fill *grant*, or raise."""
    no_wait = deadline.passed()
    grant.asked_at = time.monotonic()
    engine = opened(state)
    if engine.inherited is not None:
        engine.inherited.check()
    engine.monitor.ensure_running()
    if state.dropped:
        collect_dropped(state)
    # Before the claim, so that close() and release_all() find whatever the claim leads to.
    state.grants[grant.id] = all_grants[grant.id] = grant
    if engine.first is not None:
        # A deadline that had passed from the beginning (timeout=0) means not to wait for others; without a
        # reading nothing could be tried even once.
        first_reading(state, engine, Deadline(None) if no_wait else deadline)
    if not state.warned_of_scope:
        warn_of_scope(state, engine)
    if state.reads_devices and _stands_in(state):
        # Whatever was asked for, this machine has nothing but its CPU, and the user said that it will do.
        request = GPURequest(count=request.count)
    bound = bound_to()
    if bound and state.local_ids and request.local is not False and not request.uuid:
        # CUDA of this process will never see another card: one that it cannot use is of no use to it.
        request = attrs.evolve(request, uuid=bound)
    if request.exclude:
        _warn_of_unknown(state, engine, request.exclude)
    state.counters.add("requests")
    if request.endpoint and (new := engine.want(request.endpoint)):
        _read(state, engine, new, deadline)
    claims = 0
    # Where somebody waits already, a claim without a ticket would be refused: the first one leaves it. With many
    # endpoints a claim for all of their cards costs more than that; and where not everybody may wait, who need not must
    # not be turned away.
    at_once = no_wait or engine.servers or len(engine.endpoints) > MANY_ENDPOINTS or not engine.arbiter.crowded()
    if at_once or state.settings.max_waiting is not None:
        claims = _claim_free(state, engine, grant, request, glance(state, engine, request))
    queued = False
    if grant.lease is None:
        claims += _wait_for(state, engine, grant, request, deadline)
        queued = True
    if state.closed:
        # close() released what it saw; this claim may have been granted after that.
        raise PoolClosed("the pool was closed meanwhile")
    if engine.inherited is not None:
        engine.inherited.check()  # what it was taken from may have ended in between
    grant.begun_at = time.monotonic()
    assert grant.snapshot is not None
    if not len(state.waiting):
        engine.narrow(grant.snapshot.endpoint_id)
    state.counters.granted(
        grant.snapshot.endpoint_id,
        grant.begun_at - grant.asked_at,
        claims,
        queued,
        grant.choice,
        state.strategy.ideal_shares,
    )
    grant.choice = ()  # a lease may be held for days


def _stands_in(state: PoolState) -> bool:
    """Whether this machine's "cards" are places on its CPU (`GPU_POOL_PASSTHROUGH`)."""
    snapshots, _ = state.table.view()
    for snapshot in snapshots.values():
        host = snapshot.sample.host
        if host is not None and host.passthrough:
            return True
    return False


def _wait_for(state: PoolState, engine: Engine, grant: Grant, request: GPURequest, deadline: Deadline) -> int:
    """Wait with a ticket until granted; returns how many claims that took."""
    _require_possible(state, engine, request)
    claims = 0
    if deadline.passed():
        if not engine.watched.complete:
            engine.widen()  # for the next one: this one does not wait
        # One real attempt, also at cards that are said to be held: their holder may have died without a word.
        claims += _claim_all(state, engine, grant, request, look(state, engine, request))
        if grant.lease is None:
            raise _timed_out(state, grant, request)
        return claims
    told = False
    shown = state.settings.progress is not False
    progress: Progress | None = None
    waiter = Waiter(grant.id)
    tickets = Tickets()
    last = _Last()
    widen_at = 0.0  # time.monotonic()
    failures = 0  # claims in a row that did not arrive
    state.waiting.join(waiter)
    try:
        while True:
            _may_go_on(state, engine, grant)
            last.looks(state)
            # Among several endpoints the strategy chooses by what is free. At the only one its arbiter has the say.
            seen = look(state, engine, request, leases=len(engine.endpoints) > 1)
            if not engine.watched.complete and time.monotonic() >= widen_at:
                # Everybody who is watched has refused; or has nothing that would do, which more readings tell at once.
                new = engine.widen(everywhere=not seen)
                widen_at = time.monotonic() + (0.0 if not seen else state.settings.poll_interval)
                if not seen:
                    _read(state, engine, new, deadline)
                    _require_possible(state, engine, request)
                    seen = look(state, engine, request)
            if waiter.hints and not engine.watched.complete:
                seen = _see_hinting(state, engine, request, waiter, seen, deadline)
            claims += _claim_all(state, engine, grant, request, seen, waiter, tickets, last, deadline)
            if grant.lease is not None:
                return claims
            if waiter.id != grant.id:
                state.waiting.rename(waiter, grant.id)
                tickets = Tickets()  # those of the former id were withdrawn
            failures = failures + 1 if grant.problems else 0
            sleep = min(state.waiting.recheck(failures), tickets.pause())
            if shown:
                waited = time.monotonic() - grant.asked_at
                if waited < SHOW_AFTER:
                    sleep = min(sleep, SHOW_AFTER - waited)
                else:
                    # Made first and told then: what an interrupt leaves on the screen is removed below.
                    progress = progress or _make_progress(state)
                    if progress is None:
                        shown = False  # the wait goes on without
                    else:
                        _tell_progress(state, progress, grant, request)
            woken = _sleep(state, waiter, last.store, deadline.within(sleep))
            if woken and last.store is not None and last.holds(state):
                _may_go_on(state, engine, grant)
                claims += 1
                if _claim(state, last.store, grant, request, last.offers, queue=True):
                    assert grant.snapshot is not None
                    state.strategy.feedback(grant.snapshot.endpoint_id, True)
                    return claims
            if not woken:
                engine.monitor.ensure_running()
                if not told and time.monotonic() - grant.asked_at > LONG_WAIT:
                    told = True
                    _tell_long_wait(state, engine, request)
                # Nothing was given to us that we would have to hand on: tickets are withdrawn, and whoever is
                # next in line is told.
                if deadline.passed():
                    raise _timed_out(state, grant, request)
                _require_possible(state, engine, request)
    finally:
        state.waiting.leave(waiter)
        if progress is not None:
            progress.close()


def _may_go_on(state: PoolState, engine: Engine, grant: Grant) -> None:
    if state.closed:
        raise PoolClosed("the pool was closed while this call waited")
    if grant.cancelled:
        raise PoolClosed("this call was cancelled while it waited")
    if engine.inherited is not None:
        engine.inherited.check()


def _sleep(state: PoolState, waiter: Waiter, store: LeaseStore | None, seconds: float) -> bool:
    """Until woken, or so many seconds; whether it was woken. *store*: whose hints it needs, if only one's."""
    if store is not None and store.needs_listener:
        return listener(store).wait(waiter, state.waiting, seconds)
    return waiter.wait(seconds)


def _read(state: PoolState, engine: Engine, endpoint_ids: Sequence[str], deadline: Deadline) -> None:
    """Have endpoints read that were not watched so far, and wait for that as for the first reading."""
    from gpupool_sync.monitor import wait_for

    futures = engine.monitor.poll_soon(endpoint_ids)
    mine = Deadline.after(deadline.within(state.settings.endpoint_timeout + 1.0))
    wait_for(futures, mine, enough=lambda: any(future.done() for future in futures))


def _see_hinting(
    state: PoolState,
    engine: Engine,
    request: GPURequest,
    waiter: Waiter,
    seen: list[Seen],
    deadline: Deadline,
) -> list[Seen]:
    """
    *seen*, with the servers that hint at *waiter* and are not watched any more, which are read for that.

    It has its ticket there since they were. A hint that nobody answers keeps a free card from all others for a second.
    """
    there = {id(each.store) for each in seen}
    hinting = [number for number in waiter.hints if number not in there]
    if not hinting or len(hinting) < len(waiter.hints):
        return seen  # those that can be asked at once go before: their cards are kept for a second only
    new = engine.want([each.id for each in engine.endpoints.values() if id(each.server) in hinting])
    if new:
        # No longer than the hint is worth.
        _read(state, engine, new, Deadline.after(deadline.within(ANSWER_TIME)))
        seen = look(state, engine, request)
        there = {id(each.store) for each in seen}
    for number in hinting:
        if number not in there:  # it cannot be asked: not again for this hint
            waiter.hints.remove(number)
    return seen


def _make_progress(state: PoolState) -> Progress | None:
    """What shows the wait; None where that cannot be loaded, as for want of descriptors."""
    try:
        with importing():  # it imports
            from gpupool_sync.progress import Progress

            return Progress(state.settings.progress, inherited=state.inherited)
    except (OSError, ImportError) as exc:
        logger.info("this wait cannot be shown: %s", exc)
        return None


def _tell_progress(state: PoolState, progress: Progress, grant: Grant, request: GPURequest) -> None:
    def explained() -> Explanation:
        explanation = _explain_to_waiter(state, request)
        # As in `_timed_out`: an arbiter that cannot be used is not among the cards' reasons.
        hints = [*grant.problems.values(), *([explanation.hint] if explanation.hint else [])]
        return attrs.evolve(explanation, hint="; ".join(hints) or None)

    place = None if grant.position is None else grant.position + 1
    progress.tell(time.monotonic() - grant.asked_at, place, explained)


def _explain_to_waiter(state: PoolState, request: GPURequest) -> Explanation:
    """As `explain`, less the caller itself among those who wait."""
    explanation = explain(state, request)
    return attrs.evolve(explanation, waiting=max(0, explanation.waiting - 1))


def _tell_long_wait(state: PoolState, engine: Engine, request: GPURequest) -> None:
    """Waiting for GPUs that are in use is normal; waiting for servers none of which answers deserves a word."""
    numbers = {endpoint.id: endpoint.numbers() for endpoint in list(engine.endpoints.values())}
    if any(each.healthy for each in numbers.values()):
        return
    why = explain(state, request).endpoints
    lines = "; ".join(f"{name} {why.get(name) or f'failed: {of.last_error}'}" for name, of in list(numbers.items())[:5])
    logger.warning("still waiting for %s, and no endpoint answers: %s", describe(request), lines or "there is none")


def _timed_out(state: PoolState, grant: Grant, request: GPURequest) -> AcquireTimeout:
    state.counters.add("timeouts")
    waited = time.monotonic() - grant.asked_at
    explanation = _explain_to_waiter(state, request)
    # An arbiter that cannot be used is not among the cards' reasons: they may well be free.
    lines = "\n".join("  " + line for line in [*grant.problems.values(), *explanation.lines(EXPLAINED_CARDS)])
    error = AcquireTimeout(
        f"{explanation.request}: none could be had within {waited:.1f} s:\n{lines}{_why_bound(request)}"
    )
    error.explanation = explanation
    return error


def _require_possible(state: PoolState, engine: Engine, request: GPURequest) -> None:
    snapshots, _ = state.table.view()
    if state.possible[0] is snapshots and state.possible[1] == request:
        return  # as it was a moment ago
    if any(endpoint_id not in snapshots for endpoint_id in engine.endpoints):
        return  # somebody has not answered yet: who knows
    if not all(watch.known for watch in engine.watches.values()):
        return  # where the endpoints are is not known yet, or not at the moment
    local_only = request.local is None and bool(state.local_ids)
    most = 0
    for endpoint_id in engine.endpoints:
        snapshot = snapshots[endpoint_id]
        # A card that cannot be read at the moment may come back.
        if any(_may_matter(fault, endpoint_id, request) for fault in snapshot.sample.faults):
            return
        if not local_only or snapshot.is_local:
            most = max(most, screened_for(state, snapshot, request).possible)
    if most >= request.count:
        state.possible = snapshots, request
        return
    explanation = explain(state, request)
    lines = "\n".join("  " + line for line in explanation.lines(EXPLAINED_CARDS))
    where = "".join(
        f"\n  this machine: {each.description}; to use other machines set GPU_SERVICE_ENDPOINTS"
        for each in engine.endpoints.values()
        if each.url == "local:"
    )
    if engine.inherited is not None:
        where = f"\n  {engine.inherited.advice()}"
    lines = f"\n{lines}" if lines else ""
    text = f"no GPU of this pool can ever satisfy {explanation.request}:{lines}{where}{_why_bound(request)}"
    raise NoSuchGPU(text.rstrip().rstrip(":"))


def _warn_of_unknown(state: PoolState, engine: Engine, names: Sequence[str]) -> None:
    """Once: an exclusion that excludes nothing is most likely mistyped."""
    unknown = [name for name in unknown_names(state, engine, names) if f"exclude {name}" not in state.told_of]
    if unknown:
        state.told_of.update(f"exclude {name}" for name in unknown)
        warnings.warn(
            f"exclude: this pool has no {', '.join(unknown)}, so nothing is excluded by that; it has the endpoints "
            f"{', '.join(list(engine.endpoints)[:5]) or '(none)'}",
            UserWarning,
            stacklevel=user_stacklevel(),
        )


class _Noting:
    """The strategy; the grant notes what it had to choose from."""

    __slots__ = ("_grant", "_strategy", "feedback")

    def __init__(self, strategy: CountingStrategy, grant: Grant) -> None:
        self._strategy = strategy
        self._grant = grant
        grant.choice = ()
        self.feedback = strategy.feedback

    def order(self, endpoints: Sequence[EndpointView], request: GPURequest) -> Sequence[EndpointView]:
        if len(endpoints) > 1 and not self._grant.choice:
            # The first one counts: what a refusal leaves to choose from is not what the strategy would want.
            self._grant.choice = endpoints
        return self._strategy.order(endpoints, request)


def _claim_free(state: PoolState, engine: Engine, grant: Grant, request: GPURequest, seen: Sequence[Seen]) -> int:
    """Claim without waiting, endpoint by endpoint; returns how many claims that took."""
    claims = 0
    asking = attempts(seen, request, _Noting(state.strategy, grant), _random)
    each = next(asking, None)
    while each is not None:
        claims += 1
        # What is known of others' leases there may be out of date: what seems held may have come free.
        cards = [*each.free, *_others(each)] if each.store.scope == "everybody" else each.free
        granted = _claim(state, each.store, grant, request, [(each, cards)], queue=False)
        if not granted:
            state.counters.add("refused")
            state.touch(each.endpoint.id)
        try:
            each = asking.send(granted)
        except StopIteration:
            return claims
    return claims


def _claim_all(
    state: PoolState,
    engine: Engine,
    grant: Grant,
    request: GPURequest,
    seen: Sequence[Seen],
    waiter: Waiter | None = None,
    tickets: Tickets | None = None,
    last: _Last | None = None,
    deadline: Deadline | None = None,
) -> int:
    """
    Claim at every arbiter, held cards included; returns how many claims that took.

    With *tickets*, at those whose turn it is, and a ticket is left there for all of their cards; *last* notes them.
    Before the *deadline*, but at one in any case.
    """
    order = ordered(seen, request, _Noting(state.strategy, grant), _random)
    chosen = set(map(id, order))
    rest = [each for each in seen if id(each) not in chosen]
    stores = {id(each.store): each.store for each in (*order, *rest)}
    offers: dict[int, list[tuple[Seen, list[Card]]]] = {number: [] for number in stores}
    for each in order:
        offers[id(each.store)].append((each, [*each.free, *_others(each)]))
    for each in rest:
        offers[id(each.store)].append((each, list(each.wanted)))
    plan: list[Any] = list(stores)
    hints: list[int] = []
    if tickets is not None and waiter is not None and len(stores) > 1:
        while waiter.hints:
            hints.append(waiter.hints.pop())
        # Those of this machine cost next to nothing, and must be looked at: the kernel frees a card without a word.
        local = [number for number, store in stores.items() if store.scope != "everybody"]
        newer = promising(order, time.monotonic() - grant.asked_at, lambda each: id(each.store))
        # Whoever waits for any of many begins somewhere else. Where cards seem free by older readings is as good as any
        # other place: the first tries have found these readings out of date.
        _shuffle(plan)
        plan = tickets.round(plan, newer, [*hints, *local], time.monotonic())
    claims = 0
    for number in plan:
        if claims and deadline is not None and deadline.passed():
            break
        store = stores[number]
        if tickets is not None and store.needs_listener and (len(stores) > 1 or listener(store).ears is None):
            listener(store).listen_for(state.waiting)
        claims += 1
        grant.position = None
        reserve = number == (plan[0] if tickets is None or len(stores) == 1 else tickets.reserving)
        granted = _claim(state, store, grant, request, offers[number], queue=tickets is not None, reserve=reserve)
        if granted:
            assert grant.snapshot is not None
            state.strategy.feedback(grant.snapshot.endpoint_id, True)
            return claims
        if tickets is not None:
            answered = number not in grant.problems
            tickets.left(number, grant.position, time.monotonic(), answered=answered)
            if not answered and waiter is not None and number in hints:
                waiter.hints.append(number)  # it may still be our turn
    grant.position = None if tickets is None else tickets.position
    if last is not None and len(stores) == 1:
        ((number, store),) = stores.items()
        last.store, last.offers = store, offers[number]
    return claims


class _Last:
    """
    What a waiter asked for last, where all of its cards have one arbiter.

    A hint mostly comes while no reading has: then the same claim, repeated, is all that is left to do.
    """

    __slots__ = ("_at", "_table", "offers", "store")

    def __init__(self) -> None:
        self.store: LeaseStore | None = None
        self.offers: Sequence[tuple[Seen, Sequence[Card]]] = ()
        self._table: object = None
        self._at = 0.0

    def looks(self, state: PoolState) -> None:
        """From here on, until a reading comes, *offers* are what is seen."""
        self.store = None
        self._table = state.table.view()[0]
        self._at = time.monotonic()

    def holds(self, state: PoolState) -> bool:
        """Whether it would be the same now."""
        return (
            self.store is not None
            and state.table.view()[0] is self._table
            and time.monotonic() - self._at < RECHECK
            and not any(each.endpoint.draining or each.endpoint.open for each, _ in self.offers)
        )


def _begin_anew(state: PoolState, grant: Grant) -> None:
    """
    Go on under another id: the lease of this one was granted and has ended, but its grant was never heard of.

    That is what becomes of a claim whose answer is lost, when nobody can be asked again for as long as the ttl.
    """
    before = grant.id
    withdraw(state, grant.asked, before)  # elsewhere it may still have a ticket
    grant.asked.clear()
    after = os.urandom(16).hex()
    state.grants[after] = all_grants[after] = grant
    grant.id = after
    state.grants.pop(before, None)
    all_grants.pop(before, None)
    logger.info("a lease ended before its grant was heard of; asking anew")


def _claim(
    state: PoolState,
    store: LeaseStore,
    grant: Grant,
    request: GPURequest,
    offers: Sequence[tuple[Seen, Sequence[Card]]],
    *,
    queue: bool,
    reserve: bool = True,
) -> bool:
    anew = store not in grant.asked
    if anew:
        grant.asked.append(store)
    claim = Claim(
        id=grant.id,
        holder=state.holder,
        groups=_groups(store, offers, request),
        count=request.count,
        share=_share(request) if request.shared else None,
        ttl=state.settings.ttl,
        waited=time.monotonic() - grant.asked_at,
        queue=queue,
        reserve=reserve,
        note=grant.note,
        emptied=_emptied(store, offers),
        busy=_busy(state, request, offers),
    )
    sent_at = boottime()
    try:
        outcome = store.claim(claim)
    except LeaseStoreError as exc:
        # Fail closed: an arbiter that cannot be asked grants nothing. The others still may.
        state.counters.add("store_errors")
        if anew and isinstance(exc, NotAsked):
            grant.asked.remove(store)
        # Waiters come here each second: once is enough; that the server wants patience was told with its answer.
        told = isinstance(exc, NotAsked) or id(store) in grant.problems
        level = logging.INFO if told else logging.WARNING
        logger.log(level, "no lease from %s: %s", store.description, exc)
        grant.problems[id(store)] = f"no lease from {store.description}: {exc}"
        return False
    except LeaseLost:
        if state.closed:
            raise PoolClosed("the pool was closed while this call waited") from None
        _begin_anew(state, grant)
        return False
    grant.problems.pop(id(store), None)
    if not isinstance(outcome, Granted):
        if isinstance(outcome, Queued) and (grant.position is None or outcome.position < grant.position):
            grant.position = outcome.position
        _look_whether_empty(state, store, offers, claim.busy)
        return False
    lease = outcome.lease
    for each, cards in offers:
        if found := _named(cards, lease.cards):
            grant.cards = found
            grant.snapshot = each.snapshot
            break
    else:
        # A repeated claim may return a lease on cards that dropped out of view since.
        raise LeaseStoreError(f"{store.description} granted cards that were not asked for")
    grant.store = store
    grant.lease = lease
    state.touch(grant.snapshot.endpoint_id)
    engine = state.engine
    if lease.ttl is not None and engine is not None:
        # The arbiter may have granted it at an earlier try whose answer was lost.
        engine.keeper.add(grant.id, store, lease.ttl, min(sent_at, lease.granted_at))
        grant.good_until = partial(engine.keeper.good_until, grant.id)
    if len(grant.asked) > 1:
        withdraw(state, [other for other in grant.asked if other is not store], grant.id)
        # Last: after an interrupt before this, the release tells everybody.
        grant.asked = [store]
    return True


def _look_whether_empty(
    state: PoolState, store: LeaseStore, offers: Sequence[tuple[Seen, Sequence[Card]]], busy: Mapping[str, float]
) -> None:
    """
    Let a reading come soon where one decides.

    A closed card opens with a reading that shows it empty; so does one whose holder turned out to be dead.
    """
    closed, engine = store.closed(), state.engine
    if (closed or busy) and engine is not None:
        for each, cards in offers:
            if any(card.key in closed or (card.key in busy and not store.is_held(card.key)) for card in cards):
                engine.monitor.nudge(each.endpoint.id)


def _why_bound(request: GPURequest) -> str:
    if not request.uuid or request.uuid != bound_to():
        return ""
    return (
        "\n  CUDA is initialised in this process and bound to the GPU that it had before, so only that one was asked "
        "for; a process for each GPU is free of that: pool.executor(), or multiprocessing.Pool(maxtasksperchild=1)"
    )


def _share(request: GPURequest) -> Share:
    return Share(memory_mb=request.memory_mb, places=request.max_holders)


def _named(cards: Sequence[Card], keys: Sequence[str]) -> tuple[Card, ...]:
    """Those of the cards that have these keys, in the order of the keys; empty if the first is not among them."""
    if len(keys) == 1:
        for card in cards:
            if card.key == keys[0]:
                return (card,)
        return ()
    by_key = {card.key: card for card in cards}
    return tuple([by_key[key] for key in keys]) if keys[0] in by_key else ()


def _groups(
    store: LeaseStore, offers: Sequence[tuple[Seen, Sequence[Card]]], request: GPURequest
) -> tuple[tuple[Wanted, ...], ...]:
    """The cards of the offers, as a claim names them."""
    if request.memory_mb is None:
        return tuple([tuple([_plainly(card.key) for card in cards]) for _, cards in offers])
    return tuple([tuple([Wanted(card.key, room_of(store, card)) for card in cards]) for _, cards in offers])


#: Of a whole card, or of a place, nothing but the key is told.
_plainly = lru_cache(65536)(Wanted)


def _emptied(store: LeaseStore, offers: Sequence[tuple[Seen, Sequence[Card]]]) -> Mapping[str, float]:
    """Of the cards that their arbiter keeps closed: seconds since a reading showed them empty."""
    closed = store.closed()
    if not closed:
        return {}
    now = boottime()
    return {
        card.key: max(0.0, each.snapshot.age(now))
        for each, cards in offers
        for card in cards
        if card.key in closed and is_empty(card.reading)
    }


def _busy(state: PoolState, request: GPURequest, offers: Sequence[tuple[Seen, Sequence[Card]]]) -> Mapping[str, float]:
    """Of the cards whose reading counts only if they have no holder: seconds since that reading."""
    busy: dict[str, float] = {}
    for each, cards in offers:
        vetoed = screened_for(state, each.snapshot, request).vetoed
        if vetoed:
            age = max(0.0, each.snapshot.age(boottime()))
            against = {card.key for card, _ in vetoed}
            busy |= dict.fromkeys([card.key for card in cards if card.key in against], age)
    return busy


def _others(seen: Seen) -> list[Card]:
    if seen.free is seen.wanted:
        return []
    free = {card.key for card in seen.free}
    return [card for card in seen.wanted if card.key not in free]


def _may_matter(fault: GPUFault, endpoint_id: str, request: GPURequest) -> bool:
    """Whether the card, once it can be read again, could satisfy the request."""
    if request.endpoint and endpoint_id not in request.endpoint:
        return False
    return not (request.model and fault.name and request.model.casefold() not in fault.name.casefold())


# Not the generator of `random`, whose state programs set, and forked ones share.
_system = SystemRandom()
_random = _system.random
_shuffle: Callable[[list[Any]], None] = _system.shuffle
