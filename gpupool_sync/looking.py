"""What a pool sees of its endpoints through a request: by the last readings, and by what is known of leases.

Nobody is asked and nothing blocks.  What is seen may have changed since; the arbiter alone decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from gpupool_sync.choosing import Obstacle, Screened, room_mb, screen, usable, was_leased
from gpupool_sync.clock import boottime
from gpupool_sync.leases.base import LeaseStore
from gpupool_sync.models import Card, EndpointView, GPURequest, Reason, Snapshot
from gpupool_sync.state import Engine, PoolState

if TYPE_CHECKING:
    from gpupool_sync.endpoint import PolledEndpoint

#: Screened snapshots that are remembered, per endpoint, for requests that come again.
REMEMBERED_REQUESTS = 8
#: With more endpoints than these, what was seen of them is remembered for SIGHT_TIME seconds.
MANY_ENDPOINTS = 16
SIGHT_TIME = 0.05


class Seen:
    """One endpoint that may grant now, seen through one request."""

    __slots__ = ("endpoint", "free", "share", "snapshot", "store", "view", "wanted")

    def __init__(
        self,
        endpoint: PolledEndpoint,
        store: LeaseStore,
        snapshot: Snapshot,
        free: Sequence[Card],
        wanted: Sequence[Card],
        load: float,
        age: float,
        rivals_per_second: float,
    ) -> None:
        self.endpoint = endpoint
        #: Who arbitrates its cards. Not looked up again by its id, which may soon be that of another endpoint.
        self.store = store
        self.snapshot = snapshot
        self.free = free  # would do, and not leased as far as is known
        self.wanted = wanted  # would do, leased or not: what a ticket names
        self.share = 0.0 if endpoint.sick else endpoint.reintroduced()
        #: What the strategy sees of it.
        self.view = EndpointView(
            endpoint.id,
            len(snapshot.cards),
            len(free),
            load / len(free) if free else 0.0,
            is_local=snapshot.is_local,
            age=age,
            rivals_per_second=rivals_per_second,
        )


class Sight:
    """
    What one request saw of many endpoints, remembered for a moment.

    It is as good as the readings, which are seconds old; only the arbiter decides.  What this pool itself changes by a
    claim or a release is looked at again.
    """

    __slots__ = ("at", "endpoints", "seen", "touched")

    def __init__(self, at: float, endpoints: object, seen: dict[str, Seen]) -> None:
        self.at = at
        self.endpoints = endpoints  # of the engine, at that time
        self.seen = seen
        #: Endpoints to look at again. A list, as appending is atomic.
        self.touched: list[str] = []


def look(
    state: PoolState,
    engine: Engine,
    request: GPURequest,
    endpoints: Iterable[PolledEndpoint] | None = None,
    *,
    leases: bool = True,
) -> list[Seen]:
    """
    The endpoints that may grant now, with their cards for the request.

    *leases*: whether it matters which of the cards are leased as far as is known, or all may be called free.
    """
    snapshots, duplicates = state.table.view()
    now = boottime()
    rivals = state.rivals.per_second(now)
    oldest = now - state.settings.max_stats_age
    local_only = request.local is None and bool(state.local_ids)
    taken: set[str] = set()
    seen: list[Seen] = []
    shared = request.shared
    for endpoint in engine.endpoints.values() if endpoints is None else endpoints:
        snapshot = snapshots.get(endpoint.id)
        if snapshot is None or endpoint.draining or endpoint.open or snapshot.sample.taken_at < oldest:
            continue
        if snapshot.serial != endpoint.serial or (local_only and not snapshot.is_local):
            continue
        store = endpoint.server or engine.arbiter
        closed = store.closed()
        screened = screened_for(state, snapshot, request)
        if not (shared or closed or duplicates or screened.vetoed):  # mostly
            free = screened.eligible
            if leases:
                is_held, released_at, taken_at = store.is_held, store.released_at, snapshot.sample.taken_at
                free = tuple(
                    [card for card in free if not (is_held(card.key) or was_leased(card, taken_at, released_at))]
                )
            if len(screened.eligible) >= request.count:
                whole = len(free) == len(screened.eligible)
                load = screened.load if whole else sum([card.reading.load for card in free])
                seen.append(Seen(endpoint, store, snapshot, free, screened.eligible, load, snapshot.age(now), rivals))
            continue
        unleased: list[Card] = []
        wanted: list[Card] = []
        for card, veto, obstacle in judged(store, snapshot, screened, request):
            if veto is not None:
                continue
            if duplicates and card.key in duplicates:
                if card.key in taken:
                    continue  # another URL of the same host has offered it
                taken.add(card.key)
            wanted.append(card)
            if obstacle is None:
                unleased.append(card)
        if len(wanted) >= request.count:
            load = sum([card.reading.load for card in unleased])
            seen.append(Seen(endpoint, store, snapshot, unleased, wanted, load, snapshot.age(now), rivals))
    return seen


def judged(
    store: LeaseStore, snapshot: Snapshot, screened: Screened, request: GPURequest
) -> Iterator[tuple[Card, Reason | None, Obstacle | None]]:
    """Each possible card, as `usable` tells, by what is known of its arbiter's leases."""
    return usable(
        screened,
        snapshot,
        is_held=store.is_held,
        released_at=store.released_at,
        closed=store.closed,
        fits=partial(_shareable, store, request) if request.shared else None,
    )


def glance(state: PoolState, engine: Engine, request: GPURequest) -> list[Seen]:
    """`look`, for a first try: with many endpoints, mostly what was seen a moment ago."""
    if len(engine.endpoints) <= MANY_ENDPOINTS:
        return look(state, engine, request)
    now = boottime()
    sight = state.sights.get(request)
    if sight is None or now - sight.at > SIGHT_TIME or sight.endpoints is not engine.endpoints:
        if state.table.view()[1]:  # the same card at two endpoints: only a look at all of them offers it once
            return look(state, engine, request)
        if len(state.sights) > REMEMBERED_REQUESTS:
            state.sights.clear()
        # Timed before the look: what happens meanwhile is seen or made up for soon.
        sight = Sight(now, engine.endpoints, {each.endpoint.id: each for each in look(state, engine, request)})
        state.sights[request] = sight
        return list(sight.seen.values())
    while sight.touched:
        try:
            touched = sight.touched.pop()
        except IndexError:  # another thread was faster
            break
        endpoint = engine.endpoints.get(touched)
        again = [] if endpoint is None else look(state, engine, request, (endpoint,))
        if again:
            sight.seen[touched] = again[0]
        else:
            sight.seen.pop(touched, None)
    return list(sight.seen.values())


def screened_for(state: PoolState, snapshot: Snapshot, request: GPURequest) -> Screened:
    """The snapshot seen through the request, remembered for requests that come again."""
    key = (snapshot.endpoint_id, request)
    known = state.screens.get(key)
    if known is not None and known[0] is snapshot:
        return known[1]
    if len(state.screens) > REMEMBERED_REQUESTS * (8 + len(state.endpoint_configs)):
        state.screens.clear()
    screened = screen(snapshot, request, state.limits)
    if state.engine is not None and state.engine.inherited is not None:
        # The cards are ours already: no reading speaks against them.
        own = tuple(card for card, _ in screened.vetoed)
        screened = Screened((*screened.eligible, *own), (), screened.unwanted)
    state.screens[key] = (snapshot, screened)
    return screened


def why_unusable(state: PoolState, endpoint: PolledEndpoint, snapshot: Snapshot | None, now: float) -> Reason | None:
    """Why nothing may be granted at the endpoint at all."""
    if endpoint.draining:
        return Reason("draining", "is being drained")
    if endpoint.open:
        return Reason("endpoint-down", f"is down (breaker {endpoint.numbers().breaker}): {error_of(endpoint)}")
    if snapshot is None and state.engine is not None and not state.engine.is_watched(endpoint.id):
        return Reason("not-watched", "is not watched at present and was not read yet (the setting watch)")
    if snapshot is None:
        return Reason("no-reading", f"has not answered yet: {error_of(endpoint)}")
    age = snapshot.age(now)
    if age > state.settings.max_stats_age:
        if snapshot.repeated and not endpoint.sick:
            return Reason("stale", f"its server repeats a reading of {age:.0f} s ago")
        return Reason("stale", f"its readings are {age:.1f} s old: {error_of(endpoint)}")
    return None


def unknown_names(state: PoolState, engine: Engine, names: Sequence[str]) -> list[str]:
    """Names that no endpoint and no card has; empty as long as some endpoint has not answered."""
    snapshots, _ = state.table.view()
    if any(each not in snapshots for each in engine.endpoints) or not all(
        watch.known for watch in engine.watches.values()
    ):
        return []
    known = set(engine.endpoints)
    uuids = []
    for snapshot in snapshots.values():
        known.update(card.global_gpu_id for card in snapshot.cards)
        uuids += [card.reading.uuid for card in snapshot.cards if card.reading.uuid is not None]
        for fault in snapshot.sample.faults:
            known.add(f"{snapshot.endpoint_id}:{fault.local_gpu_id}")
            uuids += [fault.uuid] if fault.uuid is not None else []
    return [name for name in names if name not in known and not any(uuid.startswith(name) for uuid in uuids)]


def room_of(store: LeaseStore, card: Card) -> float | None:
    """MiB that all shares of the card may sum up to; None where its memory is unknown."""
    leased = sum(info.share.memory_mb or 0.0 for info in store.holders_of(card.key) if info.share is not None)
    return room_mb(card.reading, leased)


def _shareable(store: LeaseStore, request: GPURequest, card: Card) -> bool:
    """Whether a share may still fit beside those that are leased, as far as is known here."""
    shares = [info.share for info in store.holders_of(card.key)]
    if request.max_holders is not None:
        return all(s is not None and s.places is not None and len(shares) < s.places for s in shares) and (
            len(shares) < request.max_holders
        )
    assert request.memory_mb is not None
    if any(s is None or s.memory_mb is None for s in shares):
        return False
    room = room_of(store, card)
    return room is not None and request.memory_mb + sum(s.memory_mb or 0.0 for s in shares if s) <= room


def error_of(endpoint: PolledEndpoint) -> str:
    """What went wrong there last, in words."""
    return endpoint.numbers().last_error or "no error so far"
