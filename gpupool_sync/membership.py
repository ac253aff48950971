"""Which endpoints a pool has: those that the user adds, drains and removes, and those that sources list."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gpupool_sync import config
from gpupool_sync.asking import watch_most
from gpupool_sync.clock import boottime
from gpupool_sync.errors import ConfigError
from gpupool_sync.state import Engine, PoolState

if TYPE_CHECKING:
    from gpupool_sync.discovery import Found, Watch
    from gpupool_sync.endpoint import PolledEndpoint

logger = logging.getLogger(__name__)


def add(state: PoolState, endpoint: Any, options: Mapping[str, Any]) -> str:
    """`GPUPool.add_endpoint`."""
    from gpupool_sync.endpoint import local_endpoint_id, make_endpoint

    if isinstance(endpoint, config.Endpoint):
        if options:
            raise ConfigError(f"{', '.join(options)}: the options belong into the Endpoint that was given")
        new = endpoint
    else:
        new = config.Endpoint(endpoint, **options)
    with state.lifecycle:
        engine = state.engine
        taken = {each.id: each.url for each in state.configs(engine)}
        if state.reads_devices:
            taken[local_endpoint_id()] = "local:"
        for old_id, old_url in taken.items():
            if new.id == old_id or new.url == old_url:
                raise ConfigError(f"endpoint {new.id}: the pool has {old_id} already; give another name or URL")
        state.endpoint_configs = (*state.endpoint_configs, new)
        if new.local:
            with state.local_lock:
                state.local_ids |= {new.id}
        state.drained -= {new.id}
        if engine is not None and engine.inherited is None:
            made = make_endpoint(new, state.settings)
            engine.endpoints = {**engine.endpoints, made.id: made}
            _watch_new(state, engine, [made])
    return new.id


def _watch_new(state: PoolState, engine: Engine, endpoints: Sequence[PolledEndpoint]) -> list[str]:
    """Take them into the schedule; who of them is polled from now on."""
    with engine.watch_lock:
        watched = engine.watched
        # Known only now how many there are: with many, it may be a subset that is watched from here on.
        watched.most = watch_most(state.settings.watch, len(engine.endpoints))
        here = [each.id for each in endpoints if watched.add(each.id, always=each.id in state.local_ids)]
        for each in endpoints:
            engine.monitor.add(each, watched=each.id in here)
        gone = watched.narrow()
        engine.monitor.watch((), gone)
    return [each for each in here if each not in gone]


def endpoint_of(engine: Engine, endpoint_id: str) -> PolledEndpoint:
    """
    The endpoint.

    Raises:
        ConfigError: no endpoint has that id.
    """
    endpoints = engine.endpoints
    if endpoint_id not in endpoints:
        raise ConfigError(f"endpoint_id={endpoint_id!r}: the pool has {', '.join(endpoints) or 'none'}")
    return endpoints[endpoint_id]


def drain_locked(state: PoolState, engine: Engine, endpoint_id: str) -> None:
    """
    Grant nothing new there. Under the lock `lifecycle`.

    Raises:
        ConfigError: no endpoint has that id.
    """
    endpoint_of(engine, endpoint_id).drained = True
    state.drained |= {endpoint_id}


def remove_locked(state: PoolState, engine: Engine, endpoint_id: str) -> PolledEndpoint:
    """
    Forget it, under the lock `lifecycle`; the caller ends its connections, without the lock.

    Raises:
        ConfigError: no endpoint has that id.
    """
    endpoint = endpoint_of(engine, endpoint_id)
    state.endpoint_configs = tuple(each for each in state.endpoint_configs if each.id != endpoint_id)
    if endpoint.url == "local:":
        state.reads_devices = False
    state.drained -= {endpoint_id}
    _take_out_locked(state, engine, endpoint)
    return endpoint


def _take_out_locked(state: PoolState, engine: Engine, endpoint: PolledEndpoint) -> None:
    engine.endpoints = {k: v for k, v in engine.endpoints.items() if k != endpoint.id}
    engine.monitor.remove(endpoint.id)
    with engine.watch_lock:
        engine.monitor.watch(engine.watched.remove(endpoint.id))
    server = engine.servers.get(endpoint.id)
    if server is not None:
        # Leases there go on. Another endpoint of this name is another server.
        engine.retired.append(server)
        engine.servers = {k: v for k, v in engine.servers.items() if k != endpoint.id}
    state.table.forget(endpoint.id)
    with state.local_lock:
        state.local_ids -= {endpoint.id}
    state.last_free.pop(endpoint.id, None)
    note_reach(state, endpoint)


def note_reach(state: PoolState, endpoint: PolledEndpoint | Watch) -> None:
    """Whether the endpoint was reached, or that the pool has it no more: says so if it is an outage, or its end."""
    engine = state.engine
    if engine is None or state.closed:
        return  # the polls that a close() ended tell nothing
    known = engine.endpoints.get(endpoint.id)
    outages = state.outages
    told = outages.note(
        endpoint.id,
        None if known is None else known.reached,
        boottime(),
        lambda: [each.id for each in engine.endpoints.values() if each.url != "local:" and engine.is_watched(each.id)],
    )
    if told is None:
        return
    if outages.text is not None:
        logger.warning(
            "%d of %d endpoints became unreachable within %g s: the likely cause is this machine's own network, "
            "not the servers; leases are kept, and what answers is granted",
            *told,
            outages.window,
        )
    else:
        logger.info("%d of %d endpoints are reachable again", told[1] - told[0], told[1])


def take_over(state: PoolState, found: Found) -> None:
    """What a source lists now, after a look at it (on a worker thread)."""
    gone: list[PolledEndpoint] = []
    with state.lifecycle:
        engine = state.engine
        if engine is None or state.closed or found.source not in engine.watches:
            return
        wanted = {each.id: each for each in found.endpoints}
        mine = {name: each for name, (source, each) in engine.found.items() if source == found.source}
        if wanted == mine and not any(each.leaving for each in engine.endpoints.values()):
            return
        for name, known in mine.items():
            endpoint = engine.endpoints.get(name)
            if endpoint is None:  # removed by the user; forgotten only when the source forgets it too
                if wanted.get(name) != known:
                    engine.found = {k: v for k, v in engine.found.items() if k != name}
            elif name in wanted and wanted[name] != known:  # another URL or other credentials
                _take_out_locked(state, engine, endpoint)
                engine.found = {k: v for k, v in engine.found.items() if k != name}
                gone.append(endpoint)
            elif endpoint.leaving != (name not in wanted):
                endpoint.leaving = name not in wanted
                logger.info(
                    "endpoint %s is %s by %s",
                    name,
                    "not listed any more" if endpoint.leaving else "listed again",
                    found.source,
                )
        new = [each for name, each in wanted.items() if name not in engine.found]
        _add_found_locked(state, engine, found.source, new)
    for endpoint in gone:
        endpoint.abort()
        endpoint.close()


def _add_found_locked(state: PoolState, engine: Engine, source: str, endpoints: Sequence[config.Endpoint]) -> None:
    from gpupool_sync.endpoint import local_endpoint_id, make_endpoint

    taken = {each.id: each for each in state.configs(engine)}
    urls = {each.url: each for each in taken.values()}
    added = {}
    for each in endpoints:
        other = taken.get(each.id) or urls.get(each.url)
        if other is not None or (state.reads_devices and each.id == local_endpoint_id()):
            if other != each and f"{source} {each.id}" not in state.told_of:
                state.told_of.add(f"{source} {each.id}")
                logger.warning(
                    "%s lists endpoint %s (%s), whose id or URL the pool has already", source, each.id, each.url
                )
            continue
        made = added[each.id] = make_endpoint(each, state.settings)
        made.drained = each.id in state.drained
    if not added:
        return
    engine.found = {**engine.found, **{each.id: (source, each) for each in endpoints if each.id in added}}
    engine.endpoints = {**engine.endpoints, **added}
    watched = _watch_new(state, engine, list(added.values()))
    if engine.first is not None:
        # Who waits for the first reading waits for these as well.
        engine.first = (*engine.first, *engine.monitor.poll_soon(watched))
    logger.info("%s lists %d more endpoints", source, len(added))


def let_leave(state: PoolState, engine: Engine) -> None:
    """Take out what no source lists any more, once nobody holds anything there; never waits."""
    if not state.lifecycle.acquire(blocking=False):
        return  # next time
    try:
        held = {
            grant.snapshot.endpoint_id
            for grant in list(state.grants.values())
            if grant.snapshot is not None and grant.lease is not None
        }
        gone = [each for each in engine.endpoints.values() if each.leaving and each.id not in held]
        for endpoint in gone:
            _take_out_locked(state, engine, endpoint)
            engine.found = {k: v for k, v in engine.found.items() if k != endpoint.id}
            logger.info("endpoint %s is gone", endpoint.id)
        asked = {id(store) for grant in list(state.grants.values()) for store in grant.asked}
        idle = [each for each in engine.retired if id(each) not in asked and not state.teller.owes(each)]
        for store in idle:
            engine.retired.remove(store)
            engine.recipes.pop(id(store), None)
    finally:
        state.lifecycle.release()
    for endpoint in gone:
        endpoint.abort()
        endpoint.close()
    for store in idle:
        store.close()
