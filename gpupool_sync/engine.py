"""The life of an open pool: what is started at the first use, what its polls bring, what is stopped at the end."""

from __future__ import annotations

import itertools
import logging
import os
import weakref
from functools import partial
from random import SystemRandom
from typing import TYPE_CHECKING

from gpupool_sync.arbiters import adopt_server, heeded, make_store
from gpupool_sync.asking import Watched, watch_most
from gpupool_sync.bystanders import Claimed
from gpupool_sync.choosing import Screened, is_empty
from gpupool_sync.clock import Deadline, boottime
from gpupool_sync.errors import PoolClosed
from gpupool_sync.holding import (
    collect_dropped,
    finish_interrupted,
    lease_lost,
    look_for_losses,
    release,
    release_all,
    release_when_children_end,
)
from gpupool_sync.importing import importing
from gpupool_sync.leases.base import LeaseStore
from gpupool_sync.looking import screened_for
from gpupool_sync.membership import let_leave, note_reach, take_over
from gpupool_sync.models import DEFAULT_REQUEST, Snapshot
from gpupool_sync.outage import Outages
from gpupool_sync.state import Engine, PoolState
from gpupool_sync.table import Table

if TYPE_CHECKING:
    from gpupool_sync.discovery import Found, Watch
    from gpupool_sync.endpoint import PolledEndpoint
    from gpupool_sync.inherited import Inherited

logger = logging.getLogger(__name__)

#: Seconds that `close` waits until arbiters were told which tickets are not wanted any more.
TELL_TIME = 1.0

_numbers = itertools.count(1)


def opened(state: PoolState) -> Engine:
    """
    What the pool runs; the first use starts it.

    Raises:
        PoolClosed: it was closed, and not opened again.
    """
    engine = state.engine
    if engine is not None and not state.closed:
        return engine
    with state.lifecycle, importing():
        if state.closed:
            raise PoolClosed("this pool is closed; pool.open() opens it again")
        return state.engine or _start_locked(state)


def _start_locked(state: PoolState) -> Engine:
    # Imported here: they bring requests, pybreaker and logging along, which a script that only imports us, or
    # a parent that only forks, should not pay for. With what errors are explained by: when it is needed, there may be
    # no descriptors left to read a module with.
    import gpupool_sync.status  # noqa: F401
    from gpupool_sync.endpoint import PolledEndpoint, make_endpoint, make_local_endpoint
    from gpupool_sync.keeper import Keeper
    from gpupool_sync.monitor import Monitor

    settings = state.settings
    inherited = _inherited_lease(state)
    arbiter: LeaseStore
    if inherited is not None:
        arbiter = inherited.store()
        made = [PolledEndpoint(inherited.endpoint_id, inherited.url, inherited, settings, local=True)]
    else:
        arbiter = make_store(state)
        made = [make_local_endpoint(settings)] if state.reads_devices else []
        made += [make_endpoint(each, settings) for each in state.endpoint_configs]
    for each in made:
        each.drained = each.id in state.drained
    watches = {}
    if inherited is None and settings.sources:
        from gpupool_sync.discovery import Watch

        watches = {source.spec: Watch(source, settings) for source in settings.sources}
    # The threads must not keep a forgotten pool alive, so they see its state, which the pool alone keeps, through a
    # weak reference.
    me = weakref.ref(state)

    def on_snapshot(snapshot: Snapshot) -> None:
        state = me()
        if state is not None:
            arrived(state, snapshot)

    def on_found(found: Found) -> None:
        state = me()
        if state is not None:
            take_over(state, found)

    def on_failure(endpoint: PolledEndpoint | Watch) -> None:
        state = me()
        if state is not None:
            note_reach(state, endpoint)
            state.last_free.pop(endpoint.id, None)
            state.touch(endpoint.id)
            state.tell_watchers(endpoint.id, False)
            engine = state.engine
            if engine is not None and endpoint.id in engine.endpoints and engine.endpoints[endpoint.id].open:
                engine.replace_dead(endpoint.id)

    def on_lost(lease_id: str) -> None:
        state = me()
        if state is not None:
            lease_lost(state, lease_id)

    def housekeeping() -> bool:
        state = me()
        if state is None:
            return False
        tidy(state)
        return True

    always = [each.id for each in made if each.url == "local:" or each.id in state.local_ids]
    watched = Watched([each.id for each in made], watch_most(settings.watch, len(made)), SystemRandom(), always)
    monitor = Monitor(
        [*made, *watches.values()],
        on_snapshot=on_snapshot,
        on_found=on_found,
        on_failure=on_failure,
        housekeeping=housekeeping,
        name=_thread_name(state),
        unwatched=frozenset(each.id for each in made if each.id not in watched),
    )
    by_id = {endpoint.id: endpoint for endpoint in made}
    engine = Engine(by_id, monitor, arbiter, Keeper(on_lost), inherited, watches, watched)
    engine.unsubscribe.append(arbiter.subscribe(partial(state.waiting.hint, arbiter=id(arbiter))))
    engine.first = tuple(monitor.poll_soon([*watched, *watches]))
    state.at_opening()
    state.engine = engine
    monitor.start()
    logger.info(
        "pool %s opened: %d endpoints, leases by %s (scope: %s)",
        settings.name or "",
        len(made),
        arbiter.description,
        arbiter.scope,
    )
    return engine


def _inherited_lease(state: PoolState) -> Inherited | None:
    """
    What `gpu.run` or `gpu.popen` started this process on.

    A store object is an arbiter that this very program brought along: nothing that it can have by inheritance.
    """
    asked = state.settings.lease_store
    if not os.environ.get("GPU_POOL_INHERITED") or (asked is not None and not isinstance(asked, str)):
        return None
    from gpupool_sync.inherited import inherited

    return inherited()


def _thread_name(state: PoolState) -> str:
    # Numbered: a monitor knows its workers by their names, and pools may share theirs.
    name = state.settings.name
    return f"gpupool-{f'{name}-' if name else ''}{next(_numbers)}"


def open_again(state: PoolState) -> Engine:
    """Open it, also after a close."""
    if state.closed and state.engine is not None:
        close(state)  # was interrupted
    with state.lifecycle, importing():
        state.closed = False
        return state.engine or _start_locked(state)


def close(state: PoolState, timeout: float = 5.0) -> None:
    """`GPUPool.close`."""
    with state.lifecycle:
        state.closed = True
        engine = state.engine
    for executor in list(state.executors):
        executor.pool_closed()
    state.waiting.wake_all()
    release_all(state)
    release_when_children_end(state)
    if engine is None:
        return
    # Each step can be repeated, and the engine is let go of last: a close() that was interrupted is finished by
    # the next one.
    for unsubscribe in engine.unsubscribe:
        unsubscribe()
    for watch in engine.watches.values():
        watch.abort()
    for endpoint in engine.endpoints.values():
        endpoint.abort()
    engine.monitor.stop(timeout)
    engine.keeper.stop(timeout)
    collect_dropped(state, wait=False)
    finish_interrupted(state, at_once=True)
    state.teller.finish(min(timeout, TELL_TIME))
    for store in (*engine.servers.values(), *engine.retired):
        store.close()
    for endpoint in engine.endpoints.values():
        endpoint.close()
    with state.lifecycle:
        if state.engine is engine:
            state.engine = None
            state.local_ids = state.said_to_be_local()
            state.table = Table()
            state.screens.clear()
            state.possible = None, None
            state.last_free.clear()
            state.outages = Outages(state.outages.window)


def first_reading(state: PoolState, engine: Engine, deadline: Deadline, *, stragglers: bool = True) -> None:
    """
    Wait until every endpoint has answered or failed once, unless that has been waited for.

    Args:
        stragglers: wait only a little longer than the first of them takes.
    """
    if engine.first is None:
        return
    from gpupool_sync.monitor import wait_for

    table = state.table
    enough = (lambda: bool(table.view()[0])) if stragglers else None
    while (first := engine.first) is not None:
        # No poll takes longer than its timeout, but for a little scheduling.
        longest = Deadline.after(state.settings.endpoint_timeout + 1.0)
        mine = Deadline.after(deadline.within(state.settings.endpoint_timeout + 1.0))
        complete = wait_for(first, mine, enough=enough)
        if complete and engine.first is not first:
            continue  # a source has listed more of them
        if complete or table.view()[0] or longest.passed():
            engine.first = None
        return


def arrived(state: PoolState, snapshot: Snapshot) -> None:
    """A poll arrived (on a worker thread)."""
    engine = state.engine
    endpoint = engine.endpoints.get(snapshot.endpoint_id) if engine is not None else None
    if engine is None or endpoint is None or endpoint.serial != snapshot.serial:
        return
    note_reach(state, endpoint)
    # Before the table knows the cards: nothing may be granted by another arbiter than theirs.
    if not adopt_server(state, engine, endpoint, snapshot):
        return
    snapshot = heeded(endpoint, snapshot)
    before = state.table.update(snapshot)
    if engine.endpoints.get(snapshot.endpoint_id) is not endpoint:
        state.table.forget(snapshot.endpoint_id)  # was taken out in between; a new one of its name polls soon
        return
    if before is not None:
        _count_rivals(state, engine.store_of(snapshot.endpoint_id), before, snapshot)
    state.tell_watchers(snapshot.endpoint_id, True)
    for problem in snapshot.sample.problems:
        if before is None or problem not in before.sample.problems:
            logger.warning("endpoint %s: %s", snapshot.endpoint_id, problem)
    if snapshot.is_local != (snapshot.endpoint_id in state.local_ids):
        change = {snapshot.endpoint_id}
        with state.local_lock:
            state.local_ids = state.local_ids | change if snapshot.is_local else state.local_ids - change
    if snapshot.is_local and engine.inherited is None:
        state.bystanders.look(snapshot.cards, partial(_claimed, state, engine.store_of(snapshot.endpoint_id)))
    if not len(state.waiting):
        state.last_free.pop(snapshot.endpoint_id, None)
        return
    # Tickets name cards that their owners knew. When cards come into view that no ticket can know of, as many of
    # the oldest waiters as could use them look again; the rest would only look in vain.
    store = engine.store_of(snapshot.endpoint_id)
    closed = store.closed()
    free = frozenset(
        card.key
        for card in screened_for(state, snapshot, DEFAULT_REQUEST).eligible
        if not (card.reading.leased or store.is_held(card.key) or (closed and card.key in closed))
    )
    new = free - state.last_free.get(snapshot.endpoint_id, frozenset())
    if closed:  # what this reading says of them is what their claims lacked
        new |= {card.key for card in snapshot.cards if card.key in closed and is_empty(card.reading)}
    state.last_free[snapshot.endpoint_id] = free
    if new:
        state.waiting.wake_oldest(2 * len(new))


def _count_rivals(state: PoolState, store: LeaseStore, before: Snapshot, after: Snapshot) -> None:
    """Cards that were free and are in use, and not by us: others are about."""
    free = _unleased(screened_for(state, before, DEFAULT_REQUEST))
    free -= _unleased(screened_for(state, after, DEFAULT_REQUEST))
    free.intersection_update([card.key for card in after.cards])  # not those that are gone
    for grant in list(state.grants.values()) if free else ():
        free.difference_update(card.key for card in grant.cards)
    # Nor by us when the server looked: it tells of leases that have been given back since.
    free = {key for key in free if (back := store.released_at(key)) is None or back < before.sample.taken_at}
    if free:
        with state.rivals_lock:
            state.rivals.took(len(free), boottime())


def _unleased(screened: Screened) -> set[str]:
    return {card.key for card in screened.eligible if not card.reading.leased}


def _claimed(state: PoolState, store: LeaseStore, key: str) -> Claimed:
    grants = [grant for grant in list(state.grants.values()) if grant.lease is not None and not grant.released]
    mine = [grant for grant in grants if any(card.key == key for card in grant.cards)]
    holders = [info.holder for info in store.holders_of(key)]
    return Claimed(
        ours=bool(mine),
        shared=any(grant.lease is not None and grant.lease.share is not None for grant in mine),
        pids=frozenset(holder.pid for holder in holders if holder.host == state.holder.host),
    )


def tidy(state: PoolState) -> None:
    """What nobody waits for; on the monitor's thread, at least once a second. Asks no arbiter elsewhere: polls wait."""
    collect_dropped(state, wait=False)
    finish_interrupted(state)
    engine = state.engine
    if engine is not None:
        engine.keeper.ensure_running()
        if engine.retired or (engine.found and any(each.leaving for each in engine.endpoints.values())):
            let_leave(state, engine)
    look_for_losses(state)
    for _ in range(len(state.leaving)):
        release(state, state.leaving.popleft(), wait=False)
    state.teller.repeat()
