"""Who grants leases for a card: the store that the settings name, or the card's own server."""

from __future__ import annotations

import copy
import logging
import os
import warnings
from functools import partial
from typing import TYPE_CHECKING

import attrs

from gpupool_sync.callers import user_stacklevel
from gpupool_sync.errors import ConfigError, ExclusivityWarning
from gpupool_sync.importing import importing
from gpupool_sync.leases.base import LeaseStore
from gpupool_sync.models import LeaseOffer, Snapshot
from gpupool_sync.state import Engine, PoolState

if TYPE_CHECKING:
    from gpupool_sync.endpoint import PolledEndpoint
    from gpupool_sync.inherited import Recipe

logger = logging.getLogger(__name__)


def make_store(state: PoolState) -> LeaseStore:
    """Who arbitrates what no server of ours does, by the setting `lease_store`."""
    asked = state.settings.lease_store
    if asked is not None and not isinstance(asked, str):
        return asked  # type: ignore[no-any-return]
    if asked is None:
        return _default_store()
    kind, _, directory = asked.partition(":")
    if kind == "memory":
        from gpupool_sync.leases.memory import shared_store

        if state.inherited:
            warnings.warn(
                "leases of 'memory:' exclude within one process: this one and the process that the pool came from "
                "do not see each other's; lease_store='host:' excludes all of this machine's",
                ExclusivityWarning,
                stacklevel=user_stacklevel(),
            )
        return shared_store()
    if kind == "host":
        from gpupool_sync.leases.host import host_store

        return host_store(directory or None)
    from gpupool_sync.leases.redis import redis_store

    return redis_store(asked)


def _default_store() -> LeaseStore:
    """The kernel locks of this host."""
    try:
        from gpupool_sync.leases.host import host_store
    except ConfigError:  # no such locks on this platform
        from gpupool_sync.leases.memory import shared_store

        warnings.warn(
            "this platform has no file locks for all its users, so leases exclude only within this process; "
            "lease_store='memory:' says that this is meant",
            ExclusivityWarning,
            stacklevel=user_stacklevel(),
        )
        return shared_store()
    return host_store()


def adopt_server(state: PoolState, engine: Engine, endpoint: PolledEndpoint, snapshot: Snapshot) -> bool:
    """
    Let a server of ours arbitrate its own cards, unless the user chose an arbiter for everything.

    This machine's own cards stay with the kernel locks that its server uses too, if it is the same directory: a
    process in a container mostly sees another one by that path, and asks the server.

    False: the endpoint was removed meanwhile, and nothing may be granted from the snapshot.
    """
    offer = snapshot.sample.leases
    if offer is None or endpoint.server is not None or state.settings.lease_store is not None:
        return True
    if engine.inherited is not None:
        return True
    if snapshot.is_local and _has_locks_of(engine.arbiter, offer):
        return True
    with state.lifecycle, importing():
        mine = next((each for each in state.configs(engine) if each.id == endpoint.id), None)
        if mine is None or engine.endpoints.get(endpoint.id) is not endpoint or engine is not state.engine:
            return False
        from gpupool_sync.leases.http import HTTPStore

        # What can be pickled, and no credentials of others.
        settings = attrs.evolve(
            state.settings, endpoints=(), sources=(), strategy="availability", strategy_options=None
        )
        mark = f"-{os.urandom(4).hex()}"
        store = HTTPStore(mine, settings, mark, pace=endpoint.pace)
        engine.recipes[id(store)] = HTTPStore, (mine, settings, mark)
        engine.unsubscribe.append(store.subscribe(partial(state.waiting.hint, arbiter=id(store))))
        engine.servers = {**engine.servers, endpoint.id: store}
        endpoint.server = store
    logger.info("leases on %s: %s (scope: %s)", endpoint.id, store.description, store.scope)
    return True


def heeded(endpoint: PolledEndpoint, snapshot: Snapshot) -> Snapshot:
    """
    *snapshot*, without what its server says of leases if it is not the arbiter of its cards.

    A lease that our arbiter knows nothing of is somebody's outside: what the reading says against the card counts.
    """
    if endpoint.server is not None or not any(card.reading.leased for card in snapshot.cards):
        return snapshot
    cards = tuple(attrs.evolve(card, reading=attrs.evolve(card.reading, leased=None)) for card in snapshot.cards)
    return attrs.evolve(snapshot, cards=cards)


def recipe(state: PoolState, store: LeaseStore) -> Recipe:
    """What another process makes the arbiter of, to renew a lease there; has credentials in it."""
    engine = state.engine
    if engine is not None and id(store) in engine.recipes:
        return engine.recipes[id(store)]
    asked = state.settings.lease_store
    if isinstance(asked, str) and engine is not None and store is engine.arbiter:
        from gpupool_sync.leases.redis import redis_store

        return redis_store, (asked,)
    return copy.copy, (store,)  # one of the user's own, which pickles or does not


def warn_of_scope(state: PoolState, engine: Engine) -> None:
    """Once: cards of other machines that are guarded among fewer than everybody who can reach them."""
    snapshots, _ = state.table.view()
    if state.settings.lease_store is not None or state.warned_of_scope:
        return
    private = getattr(engine.arbiter, "private", None)
    if private is not None and not os.environ.get("GPU_POOL_LOCK_DIR"):
        mine = [each for each in snapshots.values() if each.is_local and each.endpoint_id not in engine.servers]
        if mine:
            state.warned_of_scope = True
            warnings.warn(
                f"leases on {mine[0].endpoint_id} exclude only who sees the same lock directory: {private}; mount "
                "the host's there if others use these GPUs; GPU_POOL_LOCK_DIR or lease_store='host:' says that "
                "this is meant",
                ExclusivityWarning,
                stacklevel=user_stacklevel(),
            )
            return
    narrow = [
        each.id
        for each in state.configs(engine)
        if each.id in snapshots
        and not each.is_loopback
        and not snapshots[each.id].is_local
        and engine.store_of(each.id).scope != "everybody"
    ]
    if narrow:
        state.warned_of_scope = True
        warnings.warn(
            f"leases on {', '.join(narrow[:5])}{' …' if len(narrow) > 5 else ''} exclude among the processes and "
            "users of this machine, not those of other machines that use the same servers; lease_store='redis://…' "
            "or servers of ours (gpupool-sync serve) exclude everybody; lease_store='host:' says that this is "
            "meant",
            ExclusivityWarning,
            stacklevel=user_stacklevel(),
        )


def _has_locks_of(store: LeaseStore, offer: LeaseOffer) -> bool:
    """Whether *store* and a server of this machine use the same locks."""
    mine = getattr(store, "directory_id", None)
    if mine is not None and offer.lock_dir_id is not None:
        return bool(mine == offer.lock_dir_id)
    return store.description == f"host:{offer.lock_dir}" and getattr(store, "private", None) is None
