"""`GPUPool`: choosing, waiting, counting.

The way of an `acquire`: copy the snapshots under the table's lock; filter them; let the strategy order the endpoints;
claim at the arbiter; on refusal go on with the rest; then wait with a ticket.  Nothing that blocks happens under a
lock, and the arbiter alone decides.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import itertools
import logging
import os
import sys
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, Union, overload

import attrs

from gpupool_sync import config
from gpupool_sync.bystanders import Bystanders, Claimed
from gpupool_sync.choosing import Limits, Screened, is_empty, room_mb, screen, usable
from gpupool_sync.clock import Deadline, boottime
from gpupool_sync.counting import Counters, summary
from gpupool_sync.errors import (
    AcquireTimeout,
    ConfigError,
    ExclusivityWarning,
    GPUPoolError,
    LeaseLost,
    LeaseStoreError,
    NoSuchGPU,
    PoolClosed,
)
from gpupool_sync.handle import GPU, GPUs, Grant, Tie, _Handle, bound_to, forget_mask
from gpupool_sync.leases.base import Claim, Granted, Holder, LeaseInfo, LeaseStore, NotAsked, Queued, Share, Wanted
from gpupool_sync.leases.shared import CLOSED
from gpupool_sync.models import Card, EndpointView, GPUFault, GPURequest, LeaseOffer, Reason, Snapshot
from gpupool_sync.strategies import make_strategy
from gpupool_sync.table import Table
from gpupool_sync.waiting import Waiter, WaitingRoom, listener

if TYPE_CHECKING:
    from gpupool_sync.discovery import Found, Watch
    from gpupool_sync.endpoint import PolledEndpoint
    from gpupool_sync.executor import GPUExecutor
    from gpupool_sync.gpuqueue import GPUQueue
    from gpupool_sync.inherited import Inherited, Recipe
    from gpupool_sync.keeper import Keeper
    from gpupool_sync.monitor import Monitor
    from gpupool_sync.progress import Progress
    from gpupool_sync.status import Explanation, LeasesStatus, LeaseStatus, MachineInfo, Status

logger = logging.getLogger(__name__)

#: Lines that an error explains itself with; `explain` has them all.
EXPLAINED_CARDS = 20
#: Seconds of waiting after which a pool whose endpoints are all down says so once.
LONG_WAIT = 10.0
#: Seconds of waiting after which it is shown, where the setting `progress` lets it.
SHOW_AFTER = 2.0
#: Seconds between attempts to tell an arbiter of a release that it did not hear.
RETRY_RELEASE = 5.0
#: The longest ttl there is, seconds.
MAX_TTL = 300.0
#: Screened snapshots that are remembered, per endpoint, for requests that come again.
REMEMBERED_REQUESTS = 8
#: With more endpoints than these, what was seen of them is remembered for SIGHT_TIME seconds.
MANY_ENDPOINTS = 16
SIGHT_TIME = 0.05
#: After so many changes that nobody looked at, it is forgotten.
MOST_TOUCHED = 64

_DEFAULT_REQUEST = GPURequest()
_NOTHING = (None,) * 8
_H = TypeVar("_H", GPU, GPUs)
#: One name, or several.
Names = Union[str, Sequence[str], None]  # noqa: UP007 - an alias that runs on Python 3.10


class _Engine:
    """What an open pool runs; replaced as a whole, so that no thread sees half of it."""

    __slots__ = (
        "arbiter",
        "endpoints",
        "first",
        "found",
        "inherited",
        "keeper",
        "monitor",
        "recipes",
        "retired",
        "servers",
        "unsubscribe",
        "watches",
    )

    def __init__(
        self,
        endpoints: Mapping[str, PolledEndpoint],
        monitor: Monitor,
        arbiter: LeaseStore,
        keeper: Keeper,
        inherited: Inherited | None,
        watches: Mapping[str, Watch],
    ) -> None:
        self.endpoints = endpoints  # by id, in the order of the settings; replaced, never changed
        #: Where endpoints are found, by id of the source.
        self.watches = watches
        #: What was found, by endpoint id: the source and the endpoint. Replaced, never changed.
        self.found: Mapping[str, tuple[str, config.Endpoint]] = {}
        #: Arbiters of endpoints that were removed while leases there went on.
        self.retired: list[LeaseStore] = []
        self.monitor = monitor
        self.keeper = keeper
        #: Who arbitrates what no server of ours does.
        self.arbiter = arbiter
        #: Servers that arbitrate their own cards, by endpoint id; replaced, never changed.
        self.servers: Mapping[str, LeaseStore] = {}
        #: By `id` of an arbiter: what another process of ours makes it of.
        self.recipes: dict[int, Recipe] = {}
        #: The lease of the process that started this one; then nothing but its cards is offered.
        self.inherited = inherited
        #: Done when every endpoint has answered or failed once; None when nobody need wait for that any more.
        self.first: tuple[Any, ...] | None = None
        self.unsubscribe: list[Callable[[], None]] = []

    def store_of(self, endpoint_id: str) -> LeaseStore:
        """Who arbitrates the cards of the endpoint."""
        return self.servers.get(endpoint_id, self.arbiter)


class _Seen:
    """One endpoint that may grant now, seen through one request."""

    __slots__ = ("endpoint", "free", "settled", "snapshot", "store", "view", "wanted")

    def __init__(
        self,
        endpoint: PolledEndpoint,
        store: LeaseStore,
        snapshot: Snapshot,
        free: Sequence[Card],
        wanted: Sequence[Card],
        load: float,
    ) -> None:
        self.endpoint = endpoint
        #: Who arbitrates its cards. Not looked up again by its id, which may soon be that of another endpoint.
        self.store = store
        self.snapshot = snapshot
        self.free = free  # would do, and not leased as far as is known
        self.wanted = wanted  # would do, leased or not: what a ticket names
        self.settled = not endpoint.sick and endpoint.reintroduced() >= 1.0
        #: What the strategy sees of it.
        self.view = EndpointView(
            endpoint.id,
            len(snapshot.cards),
            len(free),
            load / len(free) if free else 0.0,
            is_local=snapshot.is_local,
        )


class _Sight:
    """
    What one request saw of many endpoints, remembered for a moment.

    It is as good as the readings, which are seconds old; only the arbiter decides.  What this pool itself changes by a
    claim or a release is looked at again.
    """

    __slots__ = ("at", "endpoints", "seen", "touched")

    def __init__(self, at: float, endpoints: object, seen: dict[str, _Seen]) -> None:
        self.at = at
        self.endpoints = endpoints  # of the engine, at that time
        self.seen = seen
        #: Endpoints to look at again. A list, as appending is atomic.
        self.touched: list[str] = []


class _Acquiring(Generic[_H]):
    """
    ``with pool.gpu() as gpu``.

    While the block runs, the interpreter holds this object; when it is collected, the block is over, however it
    ended.  So a weak reference to it, made before the claim, finds every lease that an interrupt left behind.
    """

    __slots__ = ("__weakref__", "_cancelled", "_count", "_grant", "_note", "_on_lost", "_pool", "_request", "_timeout")

    def __init__(
        self,
        pool: GPUPool,
        request: GPURequest,
        count: int | None,
        timeout: float | None,
        note: str | None,
        on_lost: Callable[[Any], object] | None,
    ) -> None:
        self._pool = pool
        self._request = request
        self._count = count
        self._timeout = timeout
        self._note = note
        self._on_lost = on_lost
        self._grant: Grant | None = None
        self._cancelled = False

    def __enter__(self) -> _H:
        if self._grant is not None and not self._grant.released:
            raise GPUPoolError("this pool.gpu() is in use already; call pool.gpu() once for each with block")
        grant = self._grant = self._pool._new_grant(self._note, self._on_lost)
        grant.cancelled = self._cancelled
        self._pool._watch(self, grant)
        try:
            self._pool._obtain(grant, self._request, Deadline.after(self._timeout))
            return self._pool._handle(Tie(grant), self._count)  # type: ignore[no-any-return]
        except BaseException:
            self._pool._give_up(grant)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._grant is not None:
            self._pool._release(self._grant)

    def cancel(self) -> None:
        """From another thread: end the wait in `__enter__` with `PoolClosed`, unless it has been granted by now."""
        self._cancelled = True  # before the look: `__enter__` may just be making its grant
        grant = self._grant
        if grant is not None:
            grant.cancelled = True
            self._pool._waiting.hint([grant.id])

    def __repr__(self) -> str:
        return f"<{_HOW_TO}>"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what interpreters and libraries look for by themselves
            raise AttributeError(name)
        raise AttributeError(f"{_HOW_TO}; this has no {name} yet")


_HOW_TO = "use `with pool.gpu() as gpu:`, or `gpu = pool.acquire()`"


class GPUPool:
    """
    The GPUs of many machines, one at a time for each caller.

    Every argument has an environment variable (``docs/configuration.md``); an argument wins, then the variable, then
    the default.  Nothing happens before the first use: no thread, no connection.

    Args:
        endpoints: URLs or `Endpoint` objects, or one comma-separated string; default `GPU_SERVICE_ENDPOINTS`, else
            this machine's own GPUs.  ``file:/path`` and ``dns+http://name:port`` are where endpoints are found.
        strategy: ``"availability"`` (default), ``"round_robin"``, ``"weighted"`` or an object with `order`.
        strategy_options: of the strategy, such as ``{"spread": False}``: the highest share of free cards, literally.
        lease_store: who arbitrates; ``"host:"`` (default: kernel locks, among all processes and users of this
            machine), ``"host:/directory"``, ``"memory:"`` (this process only) or a `LeaseStore`.
        memory_threshold: percent; at or above it a reading vetoes its GPU (default 80).
        utilization_threshold: percent; likewise (default 90).
        poll_interval: seconds between polls of an endpoint (default 5).
        health_check_interval: longest seconds between probes of an endpoint that is down (default 30).
        max_stats_age: seconds; readings older than this are not granted from (default 3 × *poll_interval* +
            *endpoint_timeout*).
        endpoint_timeout: seconds for one exchange with an endpoint, retries included (default 10).
        endpoint_max_retries: retries of an exchange that failed before an answer began (default 3).
        breaker_failures: failed polls in a row that open an endpoint's breaker (default 5).
        ttl: seconds that a lease at a remote arbiter lives without renewal (default 60, at most 300).
        max_waiting: callers that may wait at the same time; default any number.
        name: shown to others as the holder.
        progress: whether a wait of more than 2 s is shown: one line on the terminal, a table in a notebook, and a line
            a minute if standard error is neither.  Default: in notebooks and on terminals, and only where the program
            itself (``__main__``) waits, not a module that it imports.
        on_lost: called as ``on_lost(gpu)`` when a lease is lost.

    Raises:
        ConfigError: a value cannot be used; the message names it and what is allowed.
    """

    def __init__(
        self,
        endpoints: Any = None,
        *,
        strategy: Any = None,
        strategy_options: Mapping[str, Any] | None = None,
        lease_store: Any = None,
        memory_threshold: float | None = None,
        utilization_threshold: float | None = None,
        poll_interval: float | None = None,
        health_check_interval: float | None = None,
        max_stats_age: float | None = None,
        endpoint_timeout: float | None = None,
        endpoint_max_retries: int | None = None,
        breaker_failures: int | None = None,
        ttl: float | None = None,
        max_waiting: int | None = None,
        name: str | None = None,
        on_lost: Callable[[Any], object] | None = None,
        progress: bool | None = None,
    ) -> None:
        given = {
            "strategy": strategy,
            "strategy_options": strategy_options,
            "lease_store": lease_store,
            "memory_threshold": memory_threshold,
            "utilization_threshold": utilization_threshold,
            "poll_interval": poll_interval,
            "health_check_interval": health_check_interval,
            "max_stats_age": max_stats_age,
            "endpoint_timeout": endpoint_timeout,
            "endpoint_max_retries": endpoint_max_retries,
            "breaker_failures": breaker_failures,
            "ttl": ttl,
            "max_waiting": max_waiting,
            "name": name,
            "progress": progress,
        }
        if on_lost is not None and not callable(on_lost):
            raise ConfigError(f"on_lost={on_lost!r}: a function that takes the lost GPU is allowed")
        settings = config.resolve(endpoints, **{key: value for key, value in given.items() if value is not None})
        self._setup(settings, on_lost)

    def _setup(self, settings: config.Settings, on_lost: Callable[[Any], object] | None) -> None:
        self._settings = settings
        self._on_lost = on_lost
        self._strategy = make_strategy(settings.strategy, settings.strategy_options)
        self._limits = Limits(settings.memory_threshold, settings.utilization_threshold)
        self._endpoint_configs: tuple[config.Endpoint, ...] = settings.endpoints
        # This machine's own cards, read without a server: what there is when no endpoint is configured.
        self._reads_devices = not settings.endpoints and not settings.sources
        self._drained: frozenset[str] = frozenset()  # ids of the endpoints that the user drains
        self._told_of: set[str] = set()  # what a warning was given of, once
        self._inherited = False  # came here by fork or in a pickle
        #: Called with an endpoint's id and whether it answered, after each poll, on its thread; must be quick.
        self._watchers: tuple[Callable[[str, bool], None], ...] = ()
        self._warned_of_scope = False
        self._fresh_state()
        self._me = weakref.ref(self)
        _pools.add(self)

    def _fresh_state(self) -> None:
        """Everything that does not survive a fork."""
        # Guards opening, closing and changes of the endpoints. Held while threads are started, never during I/O.
        # Not taken by an acquire once the pool is open.
        self._lifecycle = threading.RLock()
        self._engine: _Engine | None = None
        self._closed = False
        self._table = Table()
        self._waiting = WaitingRoom(self._settings.max_waiting)
        self._counters = Counters()
        self._bystanders = Bystanders()
        # By lease id: every claim that may be granted. Single dict operations only, which are atomic.
        self._grants: dict[str, Grant] = {}
        # Weak references to what keeps each claim's caller able to release it, and those of them that died.
        self._watched: dict[object, Grant] = {}
        self._dropped: deque[Any] = deque()
        self._leaving: deque[Grant] = deque()  # released while a child of popen() still ran
        self._unheard: deque[Grant] = deque()  # released, but the arbiter could not be told
        self._unheard_at = 0.0
        self._screens: dict[tuple[str, GPURequest], tuple[Snapshot, Screened]] = {}
        self._sights: dict[GPURequest, _Sight] = {}
        # Endpoints whose cards are in this machine; those that are said to be, before they have answered.
        self._local_ids = frozenset(each.id for each in self._endpoint_configs if each.local)
        # Guards _local_ids, which several workers change.
        self._local_lock = threading.Lock()
        self._last_free: dict[str, frozenset[str]] = {}
        self._executors: weakref.WeakSet[GPUExecutor] = weakref.WeakSet()
        # Made here and not at the first claim: two threads would make two, and each claim must repeat its own. A forked
        # child asks nobody anew who it is: the C library's locks may be those of its parent's threads.
        before: Holder | None = getattr(self, "_holder", None)
        self._holder = (
            self._make_holder() if before is None else attrs.evolve(before, id=os.urandom(8).hex(), pid=os.getpid())
        )

    # -- life --------------------------------------------------------------------------------------------------

    def open(self, wait: bool = False, timeout: float | None = None) -> None:
        """
        Start polling. The first use opens the pool too; a closed pool opens again only by this call.

        Args:
            wait: return only when every endpoint has answered or failed once.
            timeout: seconds to wait at most; None: as long as a poll may take.
        """
        if self._closed and self._engine is not None:
            self.close()  # was interrupted
        with self._lifecycle, _opening:
            self._closed = False
            engine = self._engine or self._start_locked()
        if wait:
            self._first_reading(engine, Deadline.after(timeout), stragglers=False)

    def _opened(self) -> _Engine:
        engine = self._engine
        if engine is not None and not self._closed:
            return engine
        with self._lifecycle, _opening:
            if self._closed:
                raise PoolClosed("this pool is closed; pool.open() opens it again")
            return self._engine or self._start_locked()

    def _start_locked(self) -> _Engine:
        # Imported here: they bring requests, pybreaker and logging along, which a script that only imports us, or
        # a parent that only forks, should not pay for.
        from gpupool_sync.endpoint import PolledEndpoint, make_endpoint, make_local_endpoint
        from gpupool_sync.keeper import Keeper
        from gpupool_sync.monitor import Monitor

        settings = self._settings
        inherited = self._inherited_lease()
        arbiter: LeaseStore
        if inherited is not None:
            arbiter = inherited.store()
            made = [PolledEndpoint(inherited.endpoint_id, inherited.url, inherited, settings, local=True)]
        else:
            arbiter = self._make_store()
            made = [make_local_endpoint(settings)] if self._reads_devices else []
            made += [make_endpoint(each, settings) for each in self._endpoint_configs]
        for each in made:
            each.drained = each.id in self._drained
        watches = {}
        if inherited is None and settings.sources:
            from gpupool_sync.discovery import Watch

            watches = {source.spec: Watch(source, settings) for source in settings.sources}
        me = weakref.ref(self)

        # The threads must not keep a forgotten pool alive, so they see it through a weak reference.
        def on_snapshot(snapshot: Snapshot) -> None:
            pool = me()
            if pool is not None:
                pool._on_snapshot(snapshot)

        def on_found(found: Found) -> None:
            pool = me()
            if pool is not None:
                pool._on_found(found)

        def on_failure(endpoint: PolledEndpoint | Watch) -> None:
            pool = me()
            if pool is not None:
                pool._last_free.pop(endpoint.id, None)
                pool._touch(endpoint.id)
                pool._tell_watchers(endpoint.id, False)

        def on_lost(lease_id: str) -> None:
            pool = me()
            if pool is not None:
                pool._lease_lost(lease_id)

        def housekeeping() -> bool:
            pool = me()
            if pool is None:
                return False
            pool._tidy()
            return True

        monitor = Monitor(
            [*made, *watches.values()],
            on_snapshot=on_snapshot,
            on_found=on_found,
            on_failure=on_failure,
            housekeeping=housekeeping,
            name=self._thread_name(),
        )
        engine = _Engine(
            {endpoint.id: endpoint for endpoint in made}, monitor, arbiter, Keeper(on_lost), inherited, watches
        )
        engine.unsubscribe.append(arbiter.subscribe(self._waiting.hint))
        engine.first = tuple(monitor.poll_soon([*engine.endpoints, *watches]))
        _register_exit_hook()
        self._engine = engine
        monitor.start()
        logger.info(
            "pool %s opened: %d endpoints, leases by %s (scope: %s)",
            settings.name or "",
            len(made),
            arbiter.description,
            arbiter.scope,
        )
        return engine

    def _inherited_lease(self) -> Inherited | None:
        """
        What `gpu.run` or `gpu.popen` started this process on.

        A store object is an arbiter that this very program brought along: nothing that it can have by inheritance.
        """
        asked = self._settings.lease_store
        if not os.environ.get("GPU_POOL_INHERITED") or (asked is not None and not isinstance(asked, str)):
            return None
        from gpupool_sync.inherited import inherited

        return inherited()

    def _recipe(self, store: LeaseStore) -> Recipe:
        """What another process makes the arbiter of, to renew a lease there; has credentials in it."""
        engine = self._engine
        if engine is not None and id(store) in engine.recipes:
            return engine.recipes[id(store)]
        asked = self._settings.lease_store
        if isinstance(asked, str) and engine is not None and store is engine.arbiter:
            from gpupool_sync.leases.redis import redis_store

            return redis_store, (asked,)
        return copy.copy, (store,)  # one of the user's own, which pickles or does not

    def _thread_name(self) -> str:
        # Numbered: a monitor knows its workers by their names, and pools may share theirs.
        name = self._settings.name
        return f"gpupool-{f'{name}-' if name else ''}{next(_numbers)}"

    def _make_store(self) -> LeaseStore:
        asked = self._settings.lease_store
        if asked is not None and not isinstance(asked, str):
            return asked  # type: ignore[no-any-return]
        if asked is None:
            return self._default_store()
        kind, _, directory = asked.partition(":")
        if kind == "memory":
            from gpupool_sync.leases.memory import shared_store

            if self._inherited:
                warnings.warn(
                    "leases of 'memory:' exclude within one process: this one and the process that the pool came from "
                    "do not see each other's; lease_store='host:' excludes all of this machine's",
                    ExclusivityWarning,
                    stacklevel=_user_stacklevel(),
                )
            return shared_store()
        if kind == "host":
            from gpupool_sync.leases.host import host_store

            return host_store(directory or None)
        from gpupool_sync.leases.redis import redis_store

        return redis_store(asked)

    def _default_store(self) -> LeaseStore:
        """The kernel locks of this host."""
        try:
            from gpupool_sync.leases.host import host_store
        except ConfigError:  # no such locks on this platform
            from gpupool_sync.leases.memory import shared_store

            warnings.warn(
                "this platform has no file locks for all its users, so leases exclude only within this process; "
                "lease_store='memory:' says that this is meant",
                ExclusivityWarning,
                stacklevel=_user_stacklevel(),
            )
            return shared_store()
        return host_store()

    def _adopt_server(self, engine: _Engine, endpoint: PolledEndpoint, snapshot: Snapshot) -> bool:
        """
        Let a server of ours arbitrate its own cards, unless the user chose an arbiter for everything.

        This machine's own cards stay with the kernel locks that its server uses too, if it is the same directory: a
        process in a container mostly sees another one by that path, and asks the server.

        False: the endpoint was removed meanwhile, and nothing may be granted from the snapshot.
        """
        offer = snapshot.sample.leases
        if offer is None or endpoint.server is not None or self._settings.lease_store is not None:
            return True
        if engine.inherited is not None:
            return True
        if snapshot.is_local and _has_locks_of(engine.arbiter, offer):
            return True
        with self._lifecycle, _opening:
            mine = next((each for each in self._configs(engine) if each.id == endpoint.id), None)
            if mine is None or engine.endpoints.get(endpoint.id) is not endpoint or engine is not self._engine:
                return False
            from gpupool_sync.leases.http import HTTPStore

            # What can be pickled, and no credentials of others.
            settings = attrs.evolve(
                self._settings, endpoints=(), sources=(), strategy="availability", strategy_options=None
            )
            store = HTTPStore(mine, settings)
            engine.recipes[id(store)] = HTTPStore, (mine, settings)
            engine.unsubscribe.append(store.subscribe(self._waiting.hint))
            engine.servers = {**engine.servers, endpoint.id: store}
            endpoint.server = store
        logger.info("leases on %s: %s (scope: %s)", endpoint.id, store.description, store.scope)
        return True

    def _warn_of_scope(self, engine: _Engine) -> None:
        """Once: cards of other machines that are guarded among fewer than everybody who can reach them."""
        snapshots, _ = self._table.view()
        if self._settings.lease_store is not None or self._warned_of_scope:
            return
        private = getattr(engine.arbiter, "private", None)
        if private is not None and not os.environ.get("GPU_POOL_LOCK_DIR"):
            mine = [each for each in snapshots.values() if each.is_local and each.endpoint_id not in engine.servers]
            if mine:
                self._warned_of_scope = True
                warnings.warn(
                    f"leases on {mine[0].endpoint_id} exclude only who sees the same lock directory: {private}; mount "
                    "the host's there if others use these GPUs; GPU_POOL_LOCK_DIR or lease_store='host:' says that "
                    "this is meant",
                    ExclusivityWarning,
                    stacklevel=_user_stacklevel(),
                )
                return
        narrow = [
            each.id
            for each in self._configs(engine)
            if each.id in snapshots
            and not each.is_loopback
            and not snapshots[each.id].is_local
            and engine.store_of(each.id).scope != "everybody"
        ]
        if narrow:
            self._warned_of_scope = True
            warnings.warn(
                f"leases on {', '.join(narrow[:5])}{' …' if len(narrow) > 5 else ''} exclude among the processes and "
                "users of this machine, not those of other machines that use the same servers; lease_store='redis://…' "
                "or servers of ours (gpupool-sync serve) exclude everybody; lease_store='host:' says that this is "
                "meant",
                ExclusivityWarning,
                stacklevel=_user_stacklevel(),
            )

    def _look_for_losses(self) -> None:
        """Leases without a ttl do not pass by the keeper: has one been revoked, or its lock been taken away?"""
        lost = [
            grant.id
            for grant in list(self._grants.values())
            if grant.lease is not None and grant.lease.ttl is None and not grant.told and grant.why_lost() is not None
        ]
        if lost:
            # A thread of its own: on_lost is the user's, and may take as long as it likes.
            threading.Thread(target=self._leases_lost, args=(lost,), name="gpupool-lost", daemon=True).start()

    def _leases_lost(self, lease_ids: Sequence[str]) -> None:
        for lease_id in lease_ids:
            self._lease_lost(lease_id)

    def _lease_lost(self, lease_id: str) -> None:
        """Tell it: on the keeper's thread, or one of its own."""
        grant = self._grants.get(lease_id)
        if grant is None or grant.released or grant.lease is None or grant.told:
            return
        grant.told = True
        why = grant.why_lost() or "its arbiter took it back"
        grant.lost = why
        if grant.bequest is not None:
            grant.bequest.lose(why)
        names = ", ".join(card.global_gpu_id for card in grant.cards)
        logger.warning("the lease on %s is lost: %s", names, why)
        try:
            if grant.on_lost is not None:
                tie = Tie(grant)
                grant.on_lost(GPU(self, tie, grant.cards[0]) if len(grant.cards) == 1 else GPUs(self, tie))
        finally:
            if grant.store is not None and grant.store.why_gone(grant.id) is not None:
                # Revoked: its holder was told, so now it lets go. (One that expired its arbiter has freed.) The card
                # stays closed until it is seen empty.
                self._release(grant)

    def close(self, timeout: float = 5.0) -> None:
        """
        Release everything, send the waiters away with `PoolClosed`, and stop the threads. Idempotent.

        Args:
            timeout: seconds to wait for the threads; one that does not stop is logged and left behind.
        """
        with self._lifecycle:
            self._closed = True
            engine = self._engine
        for executor in list(self._executors):
            executor.pool_closed()
        self._waiting.wake_all()
        self.release_all()
        self._release_when_children_end()
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
        for store in (*engine.servers.values(), *engine.retired):
            store.close()
        for endpoint in engine.endpoints.values():
            endpoint.close()
        with self._lifecycle:
            if self._engine is engine:
                self._engine = None
                self._local_ids = frozenset(each.id for each in self._endpoint_configs if each.local)
                self._table = Table()
                self._screens.clear()
                self._last_free.clear()

    def _release_when_children_end(self) -> None:
        """Leases of commands that still run: nobody but a thread of their own will look after them."""
        grants = list(self._leaving)
        if not grants:
            return

        def wait() -> None:
            for grant in grants:
                for child in list(grant.children):
                    child.wait()
                self._release(grant)

        threading.Thread(target=wait, name="gpupool-children", daemon=True).start()
        self._leaving.clear()

    def __enter__(self) -> GPUPool:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        # Settings only (credentials included): threads, leases and connections belong to this process.
        return _rebuild, (
            type(self),
            self._settings,
            self._endpoint_configs,
            self._reads_devices,
            self._on_lost,
            self._drained,
        )

    def __repr__(self) -> str:
        names = [*(["this machine"] if self._reads_devices else []), *(each.id for each in self._endpoint_configs[:5])]
        names += [source.spec for source in self._settings.sources]
        if self._engine is not None and self._engine.inherited is not None:
            names = [f"what this process has from process {self._engine.inherited.pid}"]
        where = ", ".join(names) or "no endpoints"
        more = f" and {len(self._endpoint_configs) - 5} more" if len(self._endpoint_configs) > 5 else ""
        state = "closed" if self._closed else "open" if self._engine is not None else "not opened yet"
        return f"<GPUPool of {where}{more}, {state}, {sum(1 for g in self._grants.values() if g.lease)} leases held>"

    def _repr_html_(self) -> str:
        from gpupool_sync.display import pool_html

        # Showing a pool neither opens it nor asks a server: status() does.
        engine = self._engine
        return pool_html(self, None if engine is None or self._closed else self._status(engine))

    def _after_fork_in_child(self) -> None:
        # The parent's leases are forgotten, not released; its threads and connections are its own. The child opens
        # its own at first use. A pool that the parent closed stays closed.
        closed, engine = self._closed, self._engine
        self._inherited = True
        self._fresh_state()
        self._closed = closed
        # A copy has the settings and a lock of its own: another thread may have held the old one at the fork.
        self._strategy = copy.copy(self._strategy)
        store = self._settings.lease_store
        if store is not None and not isinstance(store, str):
            store.forget_after_fork()
        if engine is not None:
            for endpoint in engine.endpoints.values():
                endpoint.forget_after_fork()
            for server in (*engine.servers.values(), *engine.retired):
                server.forget_after_fork()

    # -- the endpoints -----------------------------------------------------------------------------------------

    def add_endpoint(self, endpoint: Any, **options: Any) -> str:
        """
        Add an endpoint at run time; returns its id.

        Args:
            endpoint: a URL (with the options of `Endpoint`) or an `Endpoint`.

        Raises:
            ConfigError: not a URL, or an endpoint of that id or URL is there already.
        """
        from gpupool_sync.endpoint import local_endpoint_id, make_endpoint

        if isinstance(endpoint, config.Endpoint):
            if options:
                raise ConfigError(f"{', '.join(options)}: the options belong into the Endpoint that was given")
            new = endpoint
        else:
            new = config.Endpoint(endpoint, **options)
        with self._lifecycle:
            engine = self._engine
            taken = {each.id: each.url for each in self._configs(engine)}
            if self._reads_devices:
                taken[local_endpoint_id()] = "local:"
            for old_id, old_url in taken.items():
                if new.id == old_id or new.url == old_url:
                    raise ConfigError(f"endpoint {new.id}: the pool has {old_id} already; give another name or URL")
            self._endpoint_configs = (*self._endpoint_configs, new)
            self._drained -= {new.id}
            if engine is not None and engine.inherited is None:
                made = make_endpoint(new, self._settings)
                engine.endpoints = {**engine.endpoints, made.id: made}
                engine.monitor.add(made)
        return new.id

    def drain_endpoint(self, endpoint_id: str) -> None:
        """
        Grant nothing new at the endpoint; leases there go on, and it is still polled.

        Raises:
            ConfigError: no endpoint has that id.
        """
        with self._lifecycle:
            self._endpoint(endpoint_id).drained = True
            self._drained |= {endpoint_id}
        self._sights.clear()

    def remove_endpoint(self, endpoint_id: str) -> None:
        """
        Forget the endpoint; leases there go on until they are released.

        Raises:
            ConfigError: no endpoint has that id.
        """
        with self._lifecycle:
            endpoint = self._endpoint(endpoint_id)
            self._endpoint_configs = tuple(each for each in self._endpoint_configs if each.id != endpoint_id)
            if endpoint.url == "local:":
                self._reads_devices = False
            self._drained -= {endpoint_id}
            if self._engine is not None:
                self._take_out_locked(self._engine, endpoint)
        endpoint.abort()
        endpoint.close()
        self._tell_watchers(endpoint_id, True)  # nobody need wait for it any more

    def _take_out_locked(self, engine: _Engine, endpoint: PolledEndpoint) -> None:
        engine.endpoints = {k: v for k, v in engine.endpoints.items() if k != endpoint.id}
        engine.monitor.remove(endpoint.id)
        server = engine.servers.get(endpoint.id)
        if server is not None:
            # Leases there go on. Another endpoint of this name is another server.
            engine.retired.append(server)
            engine.servers = {k: v for k, v in engine.servers.items() if k != endpoint.id}
        self._table.forget(endpoint.id)
        with self._local_lock:
            self._local_ids -= {endpoint.id}
        self._last_free.pop(endpoint.id, None)

    def _configs(self, engine: _Engine | None) -> list[config.Endpoint]:
        """What is configured, and what was found."""
        found = engine.found.values() if engine is not None else ()
        return [*self._endpoint_configs, *(endpoint for _, endpoint in found)]

    def _on_found(self, found: Found) -> None:
        """A source was looked at (on a worker thread)."""
        gone: list[PolledEndpoint] = []
        with self._lifecycle:
            engine = self._engine
            if engine is None or self._closed or found.source not in engine.watches:
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
                    self._take_out_locked(engine, endpoint)
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
            self._add_found_locked(engine, found.source, new)
        for endpoint in gone:
            endpoint.abort()
            endpoint.close()

    def _add_found_locked(self, engine: _Engine, source: str, endpoints: Sequence[config.Endpoint]) -> None:
        from gpupool_sync.endpoint import local_endpoint_id, make_endpoint

        taken = {each.id: each for each in self._configs(engine)}
        urls = {each.url: each for each in taken.values()}
        added = {}
        for each in endpoints:
            other = taken.get(each.id) or urls.get(each.url)
            if other is not None or (self._reads_devices and each.id == local_endpoint_id()):
                if other != each and f"{source} {each.id}" not in self._told_of:
                    self._told_of.add(f"{source} {each.id}")
                    logger.warning(
                        "%s lists endpoint %s (%s), whose id or URL the pool has already", source, each.id, each.url
                    )
                continue
            made = added[each.id] = make_endpoint(each, self._settings)
            made.drained = each.id in self._drained
        if not added:
            return
        engine.found = {**engine.found, **{each.id: (source, each) for each in endpoints if each.id in added}}
        engine.endpoints = {**engine.endpoints, **added}
        for made in added.values():
            engine.monitor.add(made)
        if engine.first is not None:
            # Who waits for the first reading waits for these as well.
            engine.first = (*engine.first, *engine.monitor.poll_soon(added))
        logger.info("%s lists %d more endpoints", source, len(added))

    def _let_leave(self, engine: _Engine) -> None:
        """Take out what no source lists any more, once nobody holds anything there; never waits."""
        if not self._lifecycle.acquire(blocking=False):
            return  # next time
        try:
            held = {
                grant.snapshot.endpoint_id
                for grant in list(self._grants.values())
                if grant.snapshot is not None and grant.lease is not None
            }
            gone = [each for each in engine.endpoints.values() if each.leaving and each.id not in held]
            for endpoint in gone:
                self._take_out_locked(engine, endpoint)
                engine.found = {k: v for k, v in engine.found.items() if k != endpoint.id}
                logger.info("endpoint %s is gone", endpoint.id)
            asked = {id(store) for grant in list(self._grants.values()) for store in grant.asked}
            idle = [each for each in engine.retired if id(each) not in asked]
            for store in idle:
                engine.retired.remove(store)
                engine.recipes.pop(id(store), None)
        finally:
            self._lifecycle.release()
        for endpoint in gone:
            endpoint.abort()
            endpoint.close()
        for store in idle:
            store.close()

    def _endpoint(self, endpoint_id: str) -> PolledEndpoint:
        endpoints = self._opened().endpoints
        if endpoint_id not in endpoints:
            raise ConfigError(f"endpoint_id={endpoint_id!r}: the pool has {', '.join(endpoints) or 'none'}")
        return endpoints[endpoint_id]

    def refresh(self, timeout: float | None = None, *, endpoint: str | None = None) -> bool:
        """
        Read every endpoint once more, now; whether all of them answered or failed within *timeout* seconds.

        Calls at the same time are coalesced into at most two polls of each endpoint.

        Args:
            endpoint: only the endpoint of this id, also while its breaker is open.

        Raises:
            ConfigError: no endpoint has that id.
        """
        engine = self._opened()
        from gpupool_sync.monitor import wait_for

        wanted = engine.endpoints if endpoint is None else [self._endpoint(endpoint).id]
        futures = engine.monitor.poll_soon(wanted)
        return wait_for(futures, Deadline.after(timeout))

    def _first_reading(self, engine: _Engine, deadline: Deadline, *, stragglers: bool = True) -> None:
        if engine.first is None:
            return
        from gpupool_sync.monitor import wait_for

        table = self._table
        enough = (lambda: bool(table.view()[0])) if stragglers else None
        while (first := engine.first) is not None:
            # No poll takes longer than its timeout, but for a little scheduling.
            longest = Deadline.after(self._settings.endpoint_timeout + 1.0)
            mine = Deadline.after(deadline.within(self._settings.endpoint_timeout + 1.0))
            complete = wait_for(first, mine, enough=enough)
            if complete and engine.first is not first:
                continue  # a source has listed more of them
            if complete or table.view()[0] or longest.passed():
                engine.first = None
            return

    def _on_snapshot(self, snapshot: Snapshot) -> None:
        """A poll arrived (on a worker thread)."""
        engine = self._engine
        endpoint = engine.endpoints.get(snapshot.endpoint_id) if engine is not None else None
        if engine is None or endpoint is None or endpoint.serial != snapshot.serial:
            return
        # Before the table knows the cards: nothing may be granted by another arbiter than theirs.
        if not self._adopt_server(engine, endpoint, snapshot):
            return
        before = self._table.update(snapshot)
        if engine.endpoints.get(snapshot.endpoint_id) is not endpoint:
            self._table.forget(snapshot.endpoint_id)  # was taken out in between; a new one of its name polls soon
            return
        self._tell_watchers(snapshot.endpoint_id, True)
        for problem in snapshot.sample.problems:
            if before is None or problem not in before.sample.problems:
                logger.warning("endpoint %s: %s", snapshot.endpoint_id, problem)
        if snapshot.is_local != (snapshot.endpoint_id in self._local_ids):
            change = {snapshot.endpoint_id}
            with self._local_lock:
                self._local_ids = self._local_ids | change if snapshot.is_local else self._local_ids - change
        if snapshot.is_local and engine.inherited is None:
            self._bystanders.look(snapshot.cards, partial(self._claimed, engine.store_of(snapshot.endpoint_id)))
        if not len(self._waiting):
            self._last_free.pop(snapshot.endpoint_id, None)
            return
        # Tickets name cards that their owners knew. When cards come into view that no ticket can know of, as many of
        # the oldest waiters as could use them look again; the rest would only look in vain.
        store = engine.store_of(snapshot.endpoint_id)
        closed = store.closed()
        free = frozenset(
            card.key
            for card in self._screened(snapshot, _DEFAULT_REQUEST).eligible
            if not store.is_held(card.key) and not (closed and card.key in closed)
        )
        new = free - self._last_free.get(snapshot.endpoint_id, frozenset())
        if closed:  # what this reading says of them is what their claims lacked
            new |= {card.key for card in snapshot.cards if card.key in closed and is_empty(card.reading)}
        self._last_free[snapshot.endpoint_id] = free
        if new:
            self._waiting.wake_oldest(2 * len(new))

    def _claimed(self, store: LeaseStore, key: str) -> Claimed:
        grants = [grant for grant in list(self._grants.values()) if grant.lease is not None and not grant.released]
        mine = [grant for grant in grants if any(card.key == key for card in grant.cards)]
        holders = [info.holder for info in store.holders_of(key)]
        return Claimed(
            ours=bool(mine),
            shared=any(grant.lease is not None and grant.lease.share is not None for grant in mine),
            pids=frozenset(holder.pid for holder in holders if holder.host == self._holder.host),
        )

    def _tell_watchers(self, endpoint_id: str, answered: bool) -> None:
        for watcher in self._watchers:
            watcher(endpoint_id, answered)

    def _tidy(self) -> None:
        """What nobody waits for; on the monitor's thread, at least once a second."""
        self._collect_dropped()
        engine = self._engine
        if engine is not None:
            engine.keeper.ensure_running()
            if engine.retired or (engine.found and any(each.leaving for each in engine.endpoints.values())):
                self._let_leave(engine)
        self._look_for_losses()
        for _ in range(len(self._leaving)):
            self._release(self._leaving.popleft())
        if self._unheard and time.monotonic() >= self._unheard_at:
            self._unheard_at = time.monotonic() + RETRY_RELEASE
            for _ in range(len(self._unheard)):
                grant = self._unheard.popleft()
                try:
                    self._release_at_stores(grant)
                except LeaseStoreError:
                    if time.monotonic() - grant.begun_at < 10 * MAX_TTL:
                        self._unheard.append(grant)

    # -- acquiring ---------------------------------------------------------------------------------------------

    def gpu(
        self,
        timeout: float | None = None,
        *,
        local: bool | None = None,
        endpoint: Names = None,
        model: str | None = None,
        uuid: Names = None,
        exclude: Names = None,
        min_free_memory_mb: float | None = None,
        max_utilization_percent: float | None = None,
        memory_mb: float | None = None,
        max_holders: int | None = None,
        busy_ok: bool = False,
        note: str | None = None,
        on_lost: Callable[[Any], object] | None = None,
    ) -> _Acquiring[GPU]:
        """
        ``with pool.gpu() as gpu:`` a whole GPU, or a share of one, for the block.

        Arguments and errors are those of `acquire`.
        """
        asked = _request(
            None,
            local,
            endpoint,
            model,
            uuid,
            exclude,
            min_free_memory_mb,
            max_utilization_percent,
            memory_mb,
            max_holders,
            busy_ok,
        )
        return _Acquiring(self, asked, None, _timeout(timeout), note, on_lost)

    def gpus(
        self,
        count: int,
        timeout: float | None = None,
        *,
        local: bool | None = None,
        endpoint: Names = None,
        model: str | None = None,
        uuid: Names = None,
        exclude: Names = None,
        min_free_memory_mb: float | None = None,
        max_utilization_percent: float | None = None,
        memory_mb: float | None = None,
        max_holders: int | None = None,
        busy_ok: bool = False,
        note: str | None = None,
        on_lost: Callable[[Any], object] | None = None,
    ) -> _Acquiring[GPUs]:
        """
        ``with pool.gpus(4) as gpus:`` *count* GPUs of one host, all or nothing, under one lease.

        Arguments and errors are those of `acquire`.
        """
        asked = _request(
            count,
            local,
            endpoint,
            model,
            uuid,
            exclude,
            min_free_memory_mb,
            max_utilization_percent,
            memory_mb,
            max_holders,
            busy_ok,
        )
        return _Acquiring(self, asked, count, _timeout(timeout), note, on_lost)

    @overload
    def acquire(
        self,
        timeout: float | None = None,
        count: None = None,
        *,
        local: bool | None = ...,
        endpoint: Names = ...,
        model: str | None = ...,
        uuid: Names = ...,
        exclude: Names = ...,
        min_free_memory_mb: float | None = ...,
        max_utilization_percent: float | None = ...,
        memory_mb: float | None = ...,
        max_holders: int | None = ...,
        busy_ok: bool = ...,
        note: str | None = ...,
        on_lost: Callable[[Any], object] | None = ...,
    ) -> GPU: ...

    @overload
    def acquire(
        self,
        timeout: float | None = None,
        *,
        count: int,
        local: bool | None = ...,
        endpoint: Names = ...,
        model: str | None = ...,
        uuid: Names = ...,
        exclude: Names = ...,
        min_free_memory_mb: float | None = ...,
        max_utilization_percent: float | None = ...,
        memory_mb: float | None = ...,
        max_holders: int | None = ...,
        busy_ok: bool = ...,
        note: str | None = ...,
        on_lost: Callable[[Any], object] | None = ...,
    ) -> GPUs: ...

    def acquire(
        self,
        timeout: float | None = None,
        count: int | None = None,
        *,
        local: bool | None = None,
        endpoint: Names = None,
        model: str | None = None,
        uuid: Names = None,
        exclude: Names = None,
        min_free_memory_mb: float | None = None,
        max_utilization_percent: float | None = None,
        memory_mb: float | None = None,
        max_holders: int | None = None,
        busy_ok: bool = False,
        note: str | None = None,
        on_lost: Callable[[Any], object] | None = None,
    ) -> GPU | GPUs:
        """
        Wait for a GPU (or *count* of one host) that nobody else has, and return the handle; `release` gives it back.

        Args:
            timeout: seconds; None waits for ever, 0 takes a first reading if there is none, tries once, and does
                not wait.
            count: return a `GPUs` of so many, granted together; default one `GPU`.
            note: shown to others beside the lease.
            on_lost: called with the handle if the lease is lost; default that of the pool.
            local: True: only this machine's; False: any; None (default): this machine's if the pool has some.
            endpoint: only these endpoint ids (one, or several).
            model: only GPUs whose name contains this, in any case.
            uuid: only this GPU (or these); a beginning is enough, as for CUDA.
            exclude: not these global ids, UUIDs or endpoint ids.
            min_free_memory_mb: MiB that the reading must show as free.
            max_utilization_percent: percent that the reading must not exceed.
            memory_mb: share a GPU with others: so many MiB of it.
            max_holders: share a GPU with others: one of so many places.
            busy_ok: take a whole GPU although a process outside the pool computes on it.

        Raises:
            AcquireTimeout: none became free in time; the message says why, card by card.
            NoSuchGPU: every endpoint has answered, and no card of theirs could ever satisfy the request.
            TooManyWaiting: `max_waiting` callers wait already.
            PoolClosed: the pool is, or was meanwhile, closed.
            ConfigError: an argument cannot be used.
        """
        asked = _request(
            count,
            local,
            endpoint,
            model,
            uuid,
            exclude,
            min_free_memory_mb,
            max_utilization_percent,
            memory_mb,
            max_holders,
            busy_ok,
        )
        deadline = Deadline.after(_timeout(timeout))
        tie = Tie(self._new_grant(note, on_lost))
        grant = tie.grant
        self._watch(tie, grant)
        try:
            self._obtain(grant, asked, deadline)
            grant.place = _caller()
            handle: GPU | GPUs = self._handle(tie, count)
            # From here on a handle that is collected was the caller's to keep: nothing between this line and the
            # caller's assignment lets an interrupt in.
            grant.delivered = True
            return handle
        except BaseException:
            self._give_up(grant)
            raise

    # -- worker processes --------------------------------------------------------------------------------------

    def executor(
        self,
        max_workers: int | None = None,
        *,
        mp_context: str = "spawn",
        initializer: Callable[..., object] | None = None,
        initargs: Sequence[Any] = (),
        max_tasks_per_child: int | None = None,
        idle_timeout: float | None = 300.0,
        **request: Any,
    ) -> GPUExecutor:
        """
        A `concurrent.futures.Executor` whose every worker process owns one GPU, from before its first import.

        Args:
            max_workers: worker processes, and so GPUs, at most; default as many as there are, as tasks need them.
            mp_context: how workers come into being; only ``"spawn"``, as CUDA does not survive a fork.
            initializer: called as ``initializer(*initargs)`` once in each worker; if it raises, all tasks fail.
            max_tasks_per_child: tasks after which a worker ends and its GPU is given back.
            idle_timeout: seconds without a task after which a worker ends and its GPU is given back; None: never.
            request: as in `acquire`.

        Raises:
            ConfigError: an argument cannot be used.
        """
        from gpupool_sync.executor import GPUExecutor

        self.open()
        executor = GPUExecutor(
            self,
            max_workers,
            mp_context=mp_context,
            initializer=initializer,
            initargs=initargs,
            max_tasks_per_child=max_tasks_per_child,
            idle_timeout=idle_timeout,
            **{"on_lost": self._on_lost, **request},
        )
        self._executors.add(executor)
        return executor

    def map(
        self, fn: Callable[[Any], Any], items: Iterable[Any], *, progress: bool = True, **options: Any
    ) -> list[Any]:
        """
        ``[fn(item) for item in items]``, each in a worker process that has a GPU of its own.

        Args:
            progress: show a bar, if standard error is a terminal.
            options: as in `executor`.

        Raises:
            Exception: what *fn* raised first, in the order of the items; tasks that have not begun are cancelled.
        """
        from gpupool_sync.executor import run_map

        with self.executor(**options) as executor:
            return list(run_map(executor, fn, items, progress=progress))

    def as_queue(self, numbers: int | Iterable[int] | None = None, **request: Any) -> GPUQueue:
        """
        A queue of this machine's GPU numbers, for scripts that pass one to their worker processes.

        ``get()`` acquires, ``put()`` releases; it can be passed to other processes.  Where the pool has only simulated
        GPUs it hands out the numbers of those, to try things out.

        Args:
            numbers: how many GPUs, counted from number 0, or their numbers; default all.
            request: as in `acquire`, without *timeout* and *local*.

        Raises:
            ConfigError: an argument cannot be used.
        """
        from gpupool_sync.gpuqueue import GPUQueue

        return GPUQueue(self, numbers, **request)

    def numbered_cards(self) -> tuple[bool, Mapping[str, Sequence[Card]]]:
        """
        The cards whose numbers mean something to this process, by endpoint id, and whether they are real.

        This machine's; where there are none, the simulated ones. Waits for the first reading.
        """
        engine = self._opened()
        self._first_reading(engine, Deadline.after(None), stragglers=False)
        known = self._table.view()[0]
        snapshots = [known[each] for each in engine.endpoints if each in known and known[each].cards]
        mine = {each.endpoint_id: each.cards for each in snapshots if each.is_local}
        if mine or self._local_ids:
            return True, mine
        invented = [each for each in snapshots if each.sample.host is not None and each.sample.host.simulated]
        return not invented, {each.endpoint_id: each.cards for each in invented}

    def cards_known(self) -> int:
        """How many cards the last readings tell of, without looking again; of this machine's, if it has some."""
        snapshots, duplicates = self._table.view()
        keys = [
            card.key
            for snapshot in snapshots.values()
            if snapshot.is_local or not self._local_ids
            for card in snapshot.cards
        ]
        return len(set(keys)) if duplicates else len(keys)

    def machines(self, timeout: float | None = None) -> dict[str, MachineInfo | None]:
        """
        Which machine each endpoint is, as its last reading tells; None: it has not answered yet.

        Opens the pool if need be and waits for its first reading, *timeout* seconds at most.
        """
        from urllib.parse import urlsplit

        from gpupool_sync.status import MachineInfo

        engine = self._opened()
        self._first_reading(engine, Deadline.after(_timeout(timeout)))
        snapshots, _ = self._table.view()
        found: dict[str, MachineInfo | None] = {}
        for endpoint in engine.endpoints.values():
            snapshot = snapshots.get(endpoint.id)
            if snapshot is None:
                found[endpoint.id] = None
                continue
            host = snapshot.sample.host
            name = host.name if host is not None else urlsplit(endpoint.url).hostname or endpoint.id
            found[endpoint.id] = MachineInfo(name, snapshot.is_local or (host is not None and host.simulated))
        return found

    def _handle(self, tie: Tie, count: int | None) -> Any:
        return GPU(self, tie, tie.grant.cards[0]) if count is None else GPUs(self, tie)

    def _new_grant(self, note: str | None, on_lost: Callable[[Any], object] | None) -> Grant:
        grant = Grant(os.urandom(16).hex(), note)
        grant.on_lost = on_lost or self._on_lost
        grant.owner = self._me
        return grant

    def _watch(self, anchor: object, grant: Grant) -> None:
        """
        Learn of the death of *anchor*, through a callback that runs no Python and takes no lock.

        Must come before the claim: an interrupt after the claim then finds the reference in place.
        """
        reference = weakref.ref(anchor, self._dropped.append)
        grant.tie_ref = reference
        self._watched[reference] = grant

    def _collect_dropped(self) -> None:
        while self._dropped:
            try:
                reference = self._dropped[0]
            except IndexError:  # another thread was faster
                return
            # Looked at first and taken out last: an interrupt in between only makes it happen again.
            grant = self._watched.get(reference)
            if grant is not None and not grant.released:
                self._collect(grant)
            self._watched.pop(reference, None)
            with contextlib.suppress(ValueError):
                self._dropped.remove(reference)

    def _collect(self, grant: Grant) -> None:
        """A claim that nobody can use or release any more."""
        if grant.lease is None or not grant.delivered:
            # Not _give_up for a lease: a child of popen() may still run.
            self._give_up(grant) if grant.lease is None else self._release(grant)
            return
        self._counters.add("forgotten")
        grant.forgotten = True
        names = ", ".join(card.global_gpu_id for card in grant.cards)
        text = (
            f"the handle of {names}, acquired at {grant.place}, is gone without release(); the GPU stays leased "
            "until pool.release_all(), pool.close() or the end of the process"
        )
        logger.warning("%s", text)
        file, _, line = grant.place.rpartition(":")
        try:
            warnings.warn_explicit(text, ResourceWarning, file, int(line))
        except ResourceWarning:  # made an error: on this thread nobody could handle it
            return

    def _obtain(self, grant: Grant, request: GPURequest, deadline: Deadline) -> None:
        """Fill *grant*, or raise."""
        no_wait = deadline.passed()
        grant.asked_at = time.monotonic()
        engine = self._opened()
        if engine.inherited is not None:
            engine.inherited.check()
        engine.monitor.ensure_running()
        if self._dropped:
            self._collect_dropped()
        # Before the claim, so that close() and release_all() find whatever the claim leads to.
        self._grants[grant.id] = _all_grants[grant.id] = grant
        if engine.first is not None:
            # A deadline that had passed from the beginning (timeout=0) means not to wait for others; without a
            # reading nothing could be tried even once.
            self._first_reading(engine, Deadline(None) if no_wait else deadline)
        if not self._warned_of_scope:
            self._warn_of_scope(engine)
        if self._reads_devices and self._stands_in():
            # Whatever was asked for, this machine has nothing but its CPU, and the user said that it will do.
            request = GPURequest(count=request.count)
        bound = bound_to()
        if bound and self._local_ids and request.local is not False and not request.uuid:
            # CUDA of this process will never see another card: one that it cannot use is of no use to it.
            request = attrs.evolve(request, uuid=bound)
        if request.exclude:
            self._warn_of_unknown(engine, request.exclude)
        self._counters.add("requests")
        many = len(engine.endpoints) > MANY_ENDPOINTS
        seen = self._glance(engine, request) if many else self._look(engine, request)
        claims = self._claim_free(engine, grant, request, seen)
        queued = False
        if grant.lease is None:
            claims += self._wait_for(engine, grant, request, deadline)
            queued = True
        if self._closed:
            # close() released what it saw; this claim may have been granted after that.
            raise PoolClosed("the pool was closed meanwhile")
        if engine.inherited is not None:
            engine.inherited.check()  # what it was taken from may have ended in between
        grant.begun_at = time.monotonic()
        assert grant.snapshot is not None
        self._counters.granted(
            grant.snapshot.endpoint_id,
            grant.begun_at - grant.asked_at,
            claims,
            queued,
            grant.choice,
            self._strategy.ideal_shares,
        )
        grant.choice = ()  # a lease may be held for days

    def _stands_in(self) -> bool:
        """Whether this machine's "cards" are places on its CPU (`GPU_POOL_PASSTHROUGH`)."""
        snapshots, _ = self._table.view()
        hosts = (snapshot.sample.host for snapshot in snapshots.values())
        return any(host is not None and host.passthrough for host in hosts)

    def _wait_for(self, engine: _Engine, grant: Grant, request: GPURequest, deadline: Deadline) -> int:
        """Wait with a ticket until granted; returns how many claims that took."""
        self._require_possible(engine, request)
        claims = 0
        if deadline.passed():
            # One real attempt, also at cards that are said to be held: their holder may have died without a word.
            claims += self._claim_all(engine, grant, request, self._look(engine, request), queue=False)
            if grant.lease is None:
                raise self._timed_out(grant, request)
            return claims
        told = False
        progress: Progress | None = None
        waiter = Waiter(grant.id)
        self._waiting.join(waiter)
        try:
            while True:
                if self._closed:
                    raise PoolClosed("the pool was closed while this call waited")
                if grant.cancelled:
                    raise PoolClosed("this call was cancelled while it waited")
                if engine.inherited is not None:
                    engine.inherited.check()
                seen = self._look(engine, request)
                grant.position = None
                claims += self._claim_all(engine, grant, request, seen, queue=True)
                if grant.lease is not None:
                    return claims
                sleep = self._waiting.recheck()
                if self._settings.progress is not False:
                    waited = time.monotonic() - grant.asked_at
                    if waited < SHOW_AFTER:
                        sleep = min(sleep, SHOW_AFTER - waited)
                    else:
                        # Made first and told then: what an interrupt leaves on the screen is removed below.
                        progress = progress or self._make_progress()
                        self._tell_progress(progress, grant, request)
                woken = waiter.wait(deadline.within(sleep))
                if not woken:
                    engine.monitor.ensure_running()
                    if not told and time.monotonic() - grant.asked_at > LONG_WAIT:
                        told = True
                        self._tell_long_wait(engine, request)
                    # Nothing was given to us that we would have to hand on: tickets are withdrawn, and whoever is
                    # next in line is told.
                    if deadline.passed():
                        raise self._timed_out(grant, request)
                    self._require_possible(engine, request)
        finally:
            self._waiting.leave(waiter)
            if progress is not None:
                progress.close()

    def _make_progress(self) -> Progress:
        with _opening:  # it imports
            from gpupool_sync.progress import Progress

            return Progress(self._settings.progress, inherited=self._inherited)

    def _tell_progress(self, progress: Progress, grant: Grant, request: GPURequest) -> None:
        def explain() -> Explanation:
            explanation = self._explain_to_waiter(request)
            # As in `_timed_out`: an arbiter that cannot be used is not among the cards' reasons.
            hints = [*grant.problems.values(), *([explanation.hint] if explanation.hint else [])]
            return attrs.evolve(explanation, hint="; ".join(hints) or None)

        place = None if grant.position is None else grant.position + 1
        progress.tell(time.monotonic() - grant.asked_at, place, explain)

    def _explain_to_waiter(self, request: GPURequest) -> Explanation:
        """As `_explain`, less the caller itself among those who wait."""
        explanation = self._explain(request)
        return attrs.evolve(explanation, waiting=max(0, explanation.waiting - 1))

    def _tell_long_wait(self, engine: _Engine, request: GPURequest) -> None:
        """Waiting for GPUs that are in use is normal; waiting for servers none of which answers deserves a word."""
        if not any(endpoint.numbers().healthy for endpoint in engine.endpoints.values()):
            lines = "; ".join(f"{name} {text}" for name, text in list(self._explain(request).endpoints.items())[:5])
            logger.warning(
                "still waiting for %s, and no endpoint answers: %s", describe(request), lines or "none is left"
            )

    def _timed_out(self, grant: Grant, request: GPURequest) -> AcquireTimeout:
        self._counters.add("timeouts")
        waited = time.monotonic() - grant.asked_at
        explanation = self._explain_to_waiter(request)
        # An arbiter that cannot be used is not among the cards' reasons: they may well be free.
        lines = "\n".join("  " + line for line in [*grant.problems.values(), *explanation.lines(EXPLAINED_CARDS)])
        error = AcquireTimeout(
            f"{explanation.request}: none could be had within {waited:.1f} s:\n{lines}{_why_bound(request)}"
        )
        error.explanation = explanation
        return error

    def _require_possible(self, engine: _Engine, request: GPURequest) -> None:
        snapshots, _ = self._table.view()
        if any(endpoint_id not in snapshots for endpoint_id in engine.endpoints):
            return  # somebody has not answered yet: who knows
        if not all(watch.known for watch in engine.watches.values()):
            return  # where the endpoints are is not known yet, or not at the moment
        local_only = request.local is None and bool(self._local_ids)
        most = 0
        for endpoint_id in engine.endpoints:
            snapshot = snapshots[endpoint_id]
            # A card that cannot be read at the moment may come back.
            if any(_may_matter(fault, endpoint_id, request) for fault in snapshot.sample.faults):
                return
            if not local_only or snapshot.is_local:
                most = max(most, self._screened(snapshot, request).possible)
        if most >= request.count:
            return
        explanation = self._explain(request)
        lines = "\n".join("  " + line for line in explanation.lines(EXPLAINED_CARDS))
        where = "".join(
            f"\n  this machine: {each.description}; to use other machines set GPU_SERVICE_ENDPOINTS"
            for each in engine.endpoints.values()
            if each.url == "local:"
        )
        if engine.inherited is not None:
            where = f"\n  {engine.inherited.advice()}"
        text = f"no GPU of this pool can ever satisfy {explanation.request}:\n{lines}{where}{_why_bound(request)}"
        raise NoSuchGPU(text.rstrip())

    # -- looking and claiming ----------------------------------------------------------------------------------

    def _screened(self, snapshot: Snapshot, request: GPURequest) -> Screened:
        key = (snapshot.endpoint_id, request)
        known = self._screens.get(key)
        if known is not None and known[0] is snapshot:
            return known[1]
        if len(self._screens) > REMEMBERED_REQUESTS * (8 + len(self._endpoint_configs)):
            self._screens.clear()
        screened = screen(snapshot, request, self._limits)
        if self._engine is not None and self._engine.inherited is not None:
            # The cards are ours already: no reading speaks against them.
            own = tuple(card for card, _ in screened.vetoed)
            screened = Screened((*screened.eligible, *own), (), screened.unwanted)
        self._screens[key] = (snapshot, screened)
        return screened

    def _unusable(self, endpoint: PolledEndpoint, snapshot: Snapshot | None, now: float) -> Reason | None:
        """Why nothing may be granted at the endpoint at all."""
        if endpoint.draining:
            return Reason("draining", "is being drained")
        if endpoint.open:
            return Reason("endpoint-down", f"is down (breaker {endpoint.numbers().breaker}): {_error_of(endpoint)}")
        if snapshot is None:
            return Reason("no-reading", f"has not answered yet: {_error_of(endpoint)}")
        age = snapshot.age(now)
        if age > self._settings.max_stats_age:
            return Reason("stale", f"its readings are {age:.1f} s old: {_error_of(endpoint)}")
        return None

    def _look(
        self, engine: _Engine, request: GPURequest, endpoints: Iterable[PolledEndpoint] | None = None
    ) -> list[_Seen]:
        """The endpoints that may grant now, with their cards for the request."""
        snapshots, duplicates = self._table.view()
        oldest = boottime() - self._settings.max_stats_age
        local_only = request.local is None and bool(self._local_ids)
        taken: set[str] = set()
        seen: list[_Seen] = []
        shared = request.shared
        for endpoint in engine.endpoints.values() if endpoints is None else endpoints:
            snapshot = snapshots.get(endpoint.id)
            if snapshot is None or endpoint.draining or endpoint.open or snapshot.sample.taken_at < oldest:
                continue
            if snapshot.serial != endpoint.serial or (local_only and not snapshot.is_local):
                continue
            store = endpoint.server or engine.arbiter
            closed = store.closed()
            screened = self._screened(snapshot, request)
            if not (shared or closed or duplicates or screened.vetoed):  # mostly
                is_held = store.is_held
                free = [card for card in screened.eligible if not is_held(card.key)]
                if len(screened.eligible) >= request.count:
                    whole = len(free) == len(screened.eligible)
                    load = screened.load if whole else sum([card.reading.load for card in free])
                    seen.append(_Seen(endpoint, store, snapshot, free, screened.eligible, load))
                continue
            free, wanted = [], []
            for card, reason, held in usable(
                screened,
                snapshot,
                is_held=store.is_held,
                released_at=store.released_at,
                shared=shared,
            ):
                if reason is not None:
                    continue
                if duplicates and card.key in duplicates:
                    if card.key in taken:
                        continue  # another URL of the same host has offered it
                    taken.add(card.key)
                wanted.append(card)
                if closed and card.key in closed and not is_empty(card.reading):
                    continue
                if _shareable(store, card, request) if shared else not held:
                    free.append(card)
            if len(wanted) >= request.count:
                seen.append(_Seen(endpoint, store, snapshot, free, wanted, sum([card.reading.load for card in free])))
        return seen

    def _glance(self, engine: _Engine, request: GPURequest) -> list[_Seen]:
        """`_look`, for many endpoints and a first try: mostly what was seen a moment ago."""
        now = boottime()
        sight = self._sights.get(request)
        if sight is None or now - sight.at > SIGHT_TIME or sight.endpoints is not engine.endpoints:
            if self._table.view()[1]:  # the same card at two endpoints: only a look at all of them offers it once
                return self._look(engine, request)
            if len(self._sights) > REMEMBERED_REQUESTS:
                self._sights.clear()
            # Timed before the look: what happens meanwhile is seen or made up for soon.
            sight = _Sight(now, engine.endpoints, {each.endpoint.id: each for each in self._look(engine, request)})
            self._sights[request] = sight
            return list(sight.seen.values())
        while sight.touched:
            try:
                touched = sight.touched.pop()
            except IndexError:  # another thread was faster
                break
            endpoint = engine.endpoints.get(touched)
            again = [] if endpoint is None else self._look(engine, request, (endpoint,))
            if again:
                sight.seen[touched] = again[0]
            else:
                sight.seen.pop(touched, None)
        return list(sight.seen.values())

    def _touch(self, endpoint_id: str) -> None:
        """What was seen there has changed by our own doing."""
        for request, sight in list(self._sights.items()):
            if len(sight.touched) < MOST_TOUCHED:
                sight.touched.append(endpoint_id)
            else:  # nobody asks like that any more
                self._sights.pop(request, None)

    def _ordered(self, seen: Sequence[_Seen], request: GPURequest, grant: Grant) -> list[_Seen]:
        """The endpoints that have enough free cards, as the strategy would try them; the grant notes the choice."""
        count = request.count
        ready = [each for each in seen if len(each.free) >= count]
        if len(ready) < 2:
            # Also a single endpoint is a decision that the strategy counts.
            return ready if not ready else self._by_strategy(ready, request, grant)
        first = [each for each in ready if each.settled]
        if len(first) == len(ready):
            return self._by_strategy(first, request, grant)
        later: list[_Seen] = []
        for each in ready:
            if each.settled:
                continue
            # An endpoint whose last poll failed comes last; one that has just recovered gets a growing share.
            share = each.endpoint.reintroduced()
            sits_out = each.endpoint.sick or (share < 1.0 and _random() >= share)
            (later if sits_out else first).append(each)
        if not first:
            first, later = later, []
        return self._by_strategy(first, request, grant) + later

    def _by_strategy(self, seen: Sequence[_Seen], request: GPURequest, grant: Grant) -> list[_Seen]:
        views = [each.view for each in seen]
        ordered = self._strategy.order(views, request)
        if len(seen) == 1:
            return list(seen)
        if not grant.choice:
            # The first one counts: what a refusal leaves to choose from is not what the strategy would want.
            grant.choice = views
        by_id = {each.endpoint.id: each for each in seen}
        return [by_id[view.endpoint_id] for view in ordered]

    def _claim_free(self, engine: _Engine, grant: Grant, request: GPURequest, seen: Sequence[_Seen]) -> int:
        """Claim without waiting, endpoint by endpoint; returns how many claims that took."""
        claims = 0
        left = list(seen)
        grant.choice = ()
        while True:
            # Ordered again after a refusal: strategies learn from it (a crowd is at the best endpoint).
            order = self._ordered(left, request, grant)
            if not order:
                return claims
            first = order[0]
            claims += 1
            granted = self._claim(first.store, grant, request, [(first, first.free)], queue=False)
            self._strategy.feedback(first.endpoint.id, granted)
            if granted:
                return claims
            self._counters.add("refused")
            self._touch(first.endpoint.id)
            left.remove(first)

    def _claim_all(
        self, engine: _Engine, grant: Grant, request: GPURequest, seen: Sequence[_Seen], *, queue: bool
    ) -> int:
        """
        Claim at every arbiter, held cards included; returns how many claims that took.

        With *queue*, a ticket for all of them is left at each.
        """
        grant.choice = ()
        order = self._ordered(seen, request, grant)
        chosen = set(map(id, order))
        offers = [(each, [*each.free, *_others(each)]) for each in order]
        offers += [(each, list(each.wanted)) for each in seen if id(each) not in chosen]
        by_store: dict[int, tuple[LeaseStore, list[tuple[_Seen, list[Card]]]]] = {}
        for each, cards in offers:
            by_store.setdefault(id(each.store), (each.store, []))[1].append((each, cards))
        for number, (store, mine) in enumerate(by_store.values(), 1):
            if queue and store.needs_listener:
                listener(store).listen_for(self._waiting)
            if self._claim(store, grant, request, mine, queue=queue, reserve=number == 1):
                assert grant.snapshot is not None
                self._strategy.feedback(grant.snapshot.endpoint_id, True)
                return number
        return len(by_store)

    def _claim(
        self,
        store: LeaseStore,
        grant: Grant,
        request: GPURequest,
        offers: Sequence[tuple[_Seen, Sequence[Card]]],
        *,
        queue: bool,
        reserve: bool = True,
    ) -> bool:
        anew = store not in grant.asked
        if anew:
            grant.asked.append(store)
        claim = Claim(
            id=grant.id,
            holder=self._holder,
            groups=_groups(store, offers, request),
            count=request.count,
            share=_share(request) if request.shared else None,
            ttl=self._settings.ttl,
            waited=time.monotonic() - grant.asked_at,
            queue=queue,
            reserve=reserve,
            note=grant.note,
            emptied=_emptied(store, offers),
        )
        sent_at = boottime()
        try:
            outcome = store.claim(claim)
        except LeaseStoreError as exc:
            # Fail closed: an arbiter that cannot be asked grants nothing. The others still may.
            self._counters.add("store_errors")
            if anew and isinstance(exc, NotAsked):
                grant.asked.remove(store)
            # Waiters come here each second; that the server wants patience was told with its answer.
            level = logging.INFO if isinstance(exc, NotAsked) else logging.WARNING
            logger.log(level, "no lease from %s: %s", store.description, exc)
            grant.problems[id(store)] = f"no lease from {store.description}: {exc}"
            return False
        except LeaseLost:
            # Only release_all() or close() can have released an id that no caller has yet.
            raise PoolClosed("the pool's leases were all released while this call waited") from None
        grant.problems.pop(id(store), None)
        if not isinstance(outcome, Granted):
            if isinstance(outcome, Queued) and (grant.position is None or outcome.position < grant.position):
                grant.position = outcome.position
            self._look_whether_empty(store, offers)
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
        self._touch(grant.snapshot.endpoint_id)
        engine = self._engine
        if lease.ttl is not None and engine is not None:
            # The arbiter may have granted it at an earlier try whose answer was lost.
            engine.keeper.add(grant.id, store, lease.ttl, min(sent_at, lease.granted_at))
            grant.good_until = partial(engine.keeper.good_until, grant.id)
        for other in grant.asked:
            if other is not store:
                try:
                    other.withdraw([grant.id])
                except LeaseStoreError as exc:  # the ticket ends by itself, as we do not speak for it any more
                    logger.info("a ticket at %s was not withdrawn: %s", other.description, exc)
        return True

    def _look_whether_empty(self, store: LeaseStore, offers: Sequence[tuple[_Seen, Sequence[Card]]]) -> None:
        """A closed card opens with a reading that shows it empty: let one come soon."""
        closed, engine = store.closed(), self._engine
        if closed and engine is not None:
            for each, cards in offers:
                if any(card.key in closed for card in cards):
                    engine.monitor.nudge(each.endpoint.id)

    def _make_holder(self) -> Holder:
        import getpass
        import socket

        try:
            user = getpass.getuser()
        except (KeyError, OSError):  # no entry for the uid: containers
            user = str(os.getuid()) if hasattr(os, "getuid") else "?"
        return Holder(
            id=os.urandom(8).hex(), name=self._settings.name, user=user, host=socket.gethostname(), pid=os.getpid()
        )

    # -- releasing ---------------------------------------------------------------------------------------------

    def release(self, gpu: Any) -> None:
        """
        Give back what `acquire` returned. Idempotent; in a forked child the parent's leases are left alone.

        Raises:
            ConfigError: not a handle of this pool.
        """
        if not isinstance(gpu, _Handle) or gpu._pool is not self:
            raise ConfigError(f"release({gpu!r}): only what this pool's acquire() returned can be released here")
        # From now on a handle that is collected is one whose release was interrupted.
        gpu._tie.grant.delivered = False
        self._release(gpu._tie.grant)

    def release_all(self) -> None:
        """
        Give back every lease of this pool in this process, those of forgotten handles included.

        Also those of pools of this process that are gone themselves, such as one whose notebook cell was run again.
        """
        orphans = [grant for grant in list(_all_grants.values()) if grant.owner() is None]
        for grant in [*self._grants.values(), *orphans]:
            # Claims that are under way are not ours to end; after close() they end themselves.
            if grant.lease is not None:
                self._release(grant)

    def _release(self, grant: Grant) -> None:
        if grant.released or grant.pid != os.getpid():
            return
        bequest = grant.bequest
        handed_over = False
        if any(child.running() for child in list(grant.children)):
            if bequest is None or not bequest.kept:
                # Freeing a card in use is worse than keeping it; the monitor's thread looks again.
                if grant not in self._leaving:
                    self._leaving.append(grant)
                return
            handed_over = True  # the process that renews for the command gives it back
        engine = self._engine
        if engine is not None and grant.lease is not None and grant.lease.ttl is not None:
            grant.why_lost()  # lost is final: looked at once more before the keeper forgets it
            engine.keeper.remove(grant.id)
        # Idempotent at the store, so an interrupt before the next line only makes it happen again.
        try:
            if not handed_over:
                self._release_at_stores(grant)
        except LeaseStoreError as exc:
            # The caller has done its part. Nobody renews the lease any more, so it ends with its ttl at the latest;
            # until then it is tried again.
            logger.warning(
                "the release of %s did not arrive yet: %s", ", ".join(c.global_gpu_id for c in grant.cards), exc
            )
            if not grant.released:
                self._unheard.append(grant)
        grant.released = True
        if bequest is not None:
            bequest.let_go() if handed_over else bequest.end()
        self._forget(grant)
        if grant.lease is not None:
            self._counters.released(time.monotonic() - grant.begun_at)
            forget_mask(grant)
            if engine is not None and grant.snapshot is not None:
                self._touch(grant.snapshot.endpoint_id)
                engine.monitor.nudge(grant.snapshot.endpoint_id)

    def _give_up(self, grant: Grant) -> None:
        """Undo a claim whose caller will never have it."""
        if grant.pid == os.getpid():
            try:
                self._release_at_stores(grant)
            except LeaseStoreError as exc:
                logger.info("a claim that was given up could not be withdrawn yet: %s", exc)
                self._unheard.append(grant)
            grant.released = True
        self._forget(grant)

    @staticmethod
    def _release_at_stores(grant: Grant) -> None:
        failed: LeaseStoreError | None = None
        for store in grant.asked:
            try:
                store.release([grant.id])
            except LeaseStoreError as exc:  # the others are told all the same
                failed = exc
        if failed is not None:
            raise failed

    def _forget(self, grant: Grant) -> None:
        self._grants.pop(grant.id, None)
        _all_grants.pop(grant.id, None)
        self._watched.pop(grant.tie_ref, None)

    # -- looking at it -----------------------------------------------------------------------------------------

    def explain(
        self,
        count: int | None = None,
        *,
        local: bool | None = None,
        endpoint: Names = None,
        model: str | None = None,
        uuid: Names = None,
        exclude: Names = None,
        min_free_memory_mb: float | None = None,
        max_utilization_percent: float | None = None,
        memory_mb: float | None = None,
        max_holders: int | None = None,
        busy_ok: bool = False,
    ) -> Explanation:
        """
        Why a request like this is, or is not, granted now: a verdict for each card.

        The arguments are those of `acquire`.
        """
        asked = _request(
            count,
            local,
            endpoint,
            model,
            uuid,
            exclude,
            min_free_memory_mb,
            max_utilization_percent,
            memory_mb,
            max_holders,
            busy_ok,
        )
        engine = self._opened()
        self._first_reading(engine, Deadline.after(None))
        self._refresh_known(engine)
        return self._explain(asked)

    def _explain(self, request: GPURequest) -> Explanation:
        from gpupool_sync.status import CardVerdict, Explanation

        engine = self._engine
        endpoints = engine.endpoints if engine is not None else {}
        snapshots, duplicates = self._table.view()
        now = boottime()
        local_only = request.local is None and bool(self._local_ids)
        silent: dict[str, str] = {}
        verdicts: list[CardVerdict] = []
        taken: set[str] = set()
        free = elsewhere = 0
        free_at: dict[str, int] = {}
        for endpoint in endpoints.values():
            snapshot = snapshots.get(endpoint.id)
            unusable = self._unusable(endpoint, snapshot, now)
            if unusable is not None:
                silent[endpoint.id] = unusable.text
            if snapshot is None:
                continue
            assert engine is not None
            for card, reason in self._verdicts(engine, snapshot, request):
                if unusable is not None and reason is None:
                    reason = unusable
                elif reason is None and card.key in duplicates and card.key in taken:
                    reason = Reason("duplicate", "offered by another endpoint of the same host")
                elif reason is None and local_only and not snapshot.is_local:
                    reason = Reason("not-local", "free, but in another machine; local=False asks for it too")
                    elsewhere += 1
                if card.key in duplicates:
                    taken.add(card.key)
                free += reason is None
                free_at[endpoint.id] = free_at.get(endpoint.id, 0) + (reason is None)
                verdicts.append(
                    CardVerdict(
                        global_gpu_id=card.global_gpu_id,
                        name=card.reading.name,
                        uuid=card.reading.uuid,
                        code=reason.code if reason is not None else "free",
                        text=reason.text if reason is not None else "free",
                    )
                )
            verdicts += [
                CardVerdict(
                    global_gpu_id=f"{endpoint.id}:{'?' if fault.local_gpu_id is None else fault.local_gpu_id}",
                    name=fault.name or "unknown",
                    uuid=fault.uuid,
                    code="fault",
                    text=fault.reason,
                )
                for fault in snapshot.sample.faults
            ]
        if engine is not None:
            silent.update((watch.id, watch.why) for watch in engine.watches.values() if watch.why is not None)
        hint = None
        unknown = self._unknown(engine, request.exclude) if engine is not None and request.exclude else []
        if unknown:
            hint = f"exclude: this pool has no {', '.join(unknown)}"
        elif request.endpoint and not any(name in endpoints or "://" in name for name in request.endpoint):
            hint = f"this pool has no endpoint {', '.join(request.endpoint)}; it has {', '.join(endpoints) or 'none'}"
        elif request.count > 1:
            best, most = max(free_at.items(), key=lambda item: item[1], default=("none", 0))
            if most < request.count:
                hint = f"{request.count} of one host are needed; the most that are free on one are {most} ({best})"
        return Explanation(
            hint=hint,
            request=describe(request),
            cards=verdicts,
            endpoints=silent,
            free=free,
            elsewhere=elsewhere,
            waiting=len(self._waiting),
        )

    def _unknown(self, engine: _Engine, names: Sequence[str]) -> list[str]:
        """Names that no endpoint and no card has; empty as long as some endpoint has not answered."""
        snapshots, _ = self._table.view()
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

    def _warn_of_unknown(self, engine: _Engine, names: Sequence[str]) -> None:
        """Once: an exclusion that excludes nothing is most likely mistyped."""
        unknown = [name for name in self._unknown(engine, names) if f"exclude {name}" not in self._told_of]
        if unknown:
            self._told_of.update(f"exclude {name}" for name in unknown)
            warnings.warn(
                f"exclude: this pool has no {', '.join(unknown)}, so nothing is excluded by that; it has the endpoints "
                f"{', '.join(list(engine.endpoints)[:5]) or '(none)'}",
                UserWarning,
                stacklevel=_user_stacklevel(),
            )

    def _verdicts(
        self, engine: _Engine, snapshot: Snapshot, request: GPURequest
    ) -> Iterable[tuple[Card, Reason | None]]:
        """Each card of the snapshot with the reason against it, in the order of the cards."""
        store = engine.store_of(snapshot.endpoint_id)
        closed = store.closed()
        screened = self._screened(snapshot, request)
        reasons: dict[str, Reason | None] = {card.key: reason for card, reason in screened.unwanted}
        for card, reason, held in usable(
            screened, snapshot, is_held=store.is_held, released_at=store.released_at, shared=request.shared
        ):
            if request.shared:
                if reason is None and not _shareable(store, card, request):
                    reason = _held_by(store, card) if held else _no_room(store, card)
            elif held:
                reason = _held_by(store, card)
            if reason is None and closed and card.key in closed and not is_empty(card.reading):
                reason = CLOSED
            reasons[card.key] = reason
        return [(card, reasons.get(card.key)) for card in snapshot.cards]

    def _refresh_known(self, engine: _Engine) -> None:
        """Ask the arbiters of other machines who holds what, for displays; who does not answer is left out."""
        for store in {id(each): each for each in (engine.arbiter, *engine.servers.values())}.values():
            if store.scope == "everybody":
                try:
                    store.leases()
                except LeaseStoreError as exc:
                    logger.info("%s does not tell its leases: %s", store.description, exc)

    @staticmethod
    def _holders(store: LeaseStore, key: str) -> Sequence[LeaseInfo]:
        """Who has the card, for displays: of shares in kernel locks, `holders_of` knows the last one only."""
        holders = store.holders_of(key)
        if store.scope == "everybody" or not any(info.share is not None for info in holders):
            return holders
        try:
            return [info for info in store.leases() if key in info.cards] or holders
        except LeaseStoreError:
            return holders

    def status(self) -> Status:
        """
        The pool at this moment: totals, endpoints, cards, who holds what.

        Opens the pool if need be and waits for its first reading.
        """
        engine = self._opened()
        self._collect_dropped()
        self._first_reading(engine, Deadline.after(None))
        self._refresh_known(engine)
        return self._status(engine)

    def _status(self, engine: _Engine) -> Status:
        """What is known without asking anybody."""
        from gpupool_sync.status import CardStatus, EndpointStatus, SourceStatus, Status, WorkerInfo

        snapshots, duplicates = self._table.view()
        now = boottime()
        utc = datetime.datetime.now(datetime.timezone.utc)
        endpoints: list[EndpointStatus] = []
        gpus: list[CardStatus] = []
        assignments: dict[str, list[WorkerInfo]] = {}
        taken: set[str] = set()
        total = available = healthy = 0
        for endpoint in engine.endpoints.values():
            snapshot = snapshots.get(endpoint.id)
            unusable = self._unusable(endpoint, snapshot, now)
            numbers = endpoint.numbers()
            store = engine.store_of(endpoint.id)
            if unusable is None and not numbers.healthy:
                # It may still be granted from, as a last resort; but what does not answer is not told to be available.
                unusable = Reason("endpoint-down", f"did not answer the last time: {_error_of(endpoint)}")
            in_service = unusable is None or (unusable.code == "draining" and numbers.healthy)
            free = 0
            for card, reason in self._verdicts(engine, snapshot, _DEFAULT_REQUEST) if snapshot is not None else ():
                if duplicates and card.key in duplicates:
                    if card.key in taken:
                        continue  # listed, and counted, at another endpoint of the same host
                    if in_service:
                        taken.add(card.key)
                holders = self._holders(store, card.key)
                reading = card.reading
                reason = reason or unusable
                free += reason is None
                total += in_service
                gpus.append(
                    CardStatus(
                        global_gpu_id=card.global_gpu_id,
                        endpoint_id=endpoint.id,
                        local_gpu_id=reading.local_gpu_id,
                        name=reading.name,
                        memory_usage_percent=reading.memory_usage_percent,
                        utilization_percent=reading.utilization_percent,
                        is_available=reason is None,
                        uuid=reading.uuid,
                        memory_total_mb=reading.memory_total_mb,
                        memory_used_mb=reading.memory_used_mb,
                        temperature_c=reading.temperature_c,
                        power_draw_w=reading.power_draw_w,
                        holders=[str(info.holder) for info in holders],
                        held_for=holders[0].since if holders else None,
                        note=holders[0].note if holders else None,
                        why_not=reason.text if reason is not None else None,
                    )
                )
                if holders:
                    assignments[card.global_gpu_id] = [
                        WorkerInfo(str(info.holder), utc - datetime.timedelta(seconds=info.since), info.note)
                        for info in holders
                    ]
            available += free
            healthy += numbers.healthy
            endpoints.append(
                EndpointStatus(
                    endpoint_id=endpoint.id,
                    url=endpoint.url,
                    is_healthy=numbers.healthy,
                    last_seen=numbers.last_seen,
                    total_gpus=len(snapshot.cards) if snapshot is not None else 0,
                    available_gpus=free,
                    response_time_ms=numbers.response_time_ms,
                    breaker=numbers.breaker,
                    consecutive_failures=numbers.consecutive_failures,
                    last_error=numbers.last_error,
                    age=snapshot.age(now) if snapshot is not None else None,
                    stale=unusable is not None and unusable.code == "stale",
                    success_rate=numbers.success_rate,
                    is_local=snapshot is not None and snapshot.is_local,
                    draining=endpoint.draining,
                    arbiter=store.description,
                    scope=store.scope,
                    problems=[
                        *(snapshot.sample.problems if snapshot is not None else ()),
                        *(_fault_line(endpoint.id, fault) for fault in (snapshot.sample.faults if snapshot else ())),
                    ],
                    origin=self._origin(engine, endpoint),
                    availability=numbers.availability,
                    breaker_changes=numbers.breaker_changes,
                    response_p50_ms=numbers.response_p50_ms,
                    response_p95_ms=numbers.response_p95_ms,
                )
            )
        return Status(
            total_endpoints=len(endpoints),
            healthy_endpoints=healthy,
            total_gpus=total,
            available_gpus=available,
            active_workers=sum(len(workers) for workers in assignments.values()),
            blocked_workers=self._number_waiting(engine),
            endpoints=endpoints,
            gpu_assignments=assignments,
            name=self._settings.name,
            strategy=self._strategy.name,
            gpus=gpus,
            open=not self._closed,
            sources=[SourceStatus(watch.id, len(watch.endpoints), watch.why) for watch in engine.watches.values()],
            taken_at=utc,
        )

    def _origin(self, engine: _Engine, endpoint: PolledEndpoint) -> str:
        """What named the endpoint."""
        if endpoint.url == "local:":
            return "this machine"
        if endpoint.id in engine.found:
            return engine.found[endpoint.id][0]
        if engine.inherited is not None:
            return "inherited"
        if any(each.id == endpoint.id for each in self._settings.endpoints):
            return self._settings.endpoints_from or ""
        return "add_endpoint"

    def leases(self) -> LeasesStatus:
        """
        Every lease and every waiting claim that the arbiters of this pool know, whoever's they are.

        Asks the arbiters; one that does not answer is among the result's `problems`.
        """
        from gpupool_sync.status import LeasesStatus, TicketStatus

        engine = self._opened()
        self._first_reading(engine, Deadline.after(None))
        names = self._names_of_cards()
        leases: list[LeaseStatus] = []
        queue: list[TicketStatus] = []
        problems: list[str] = []
        stores = self._stores_of(engine)
        for store in stores:
            try:
                leases += [self._lease_status(store, info, names) for info in store.leases()]
                queue += [
                    TicketStatus(
                        position=info.position,
                        holder=str(info.holder),
                        waited=info.waited,
                        wants=f"{info.count} of {len(info.cards)} GPUs"
                        + (f", {info.share}" if info.share is not None else ""),
                        note=info.note,
                        arbiter=store.description,
                    )
                    for info in store.queue()
                ]
            except LeaseStoreError as exc:
                problems.append(f"{store.description}: {exc}")
        return LeasesStatus(leases, queue, sorted({store.scope for store in stores}), problems)

    def _names_of_cards(self) -> dict[str, str]:
        snapshots, _ = self._table.view()
        return {card.key: card.global_gpu_id for snapshot in snapshots.values() for card in snapshot.cards}

    @staticmethod
    def _stores_of(engine: _Engine) -> list[LeaseStore]:
        return list({id(each): each for each in map(engine.store_of, engine.endpoints)}.values())

    def _lease_status(self, store: LeaseStore, info: LeaseInfo, names: Mapping[str, str]) -> LeaseStatus:
        from gpupool_sync.status import LeaseStatus

        return LeaseStatus(
            gpus=[names.get(key, key) for key in info.cards],
            holder=str(info.holder),
            since=info.since,
            expires_in=info.expires_in,
            share=None if info.share is None else str(info.share),
            token=info.token,
            note=info.note,
            arbiter=store.description,
            own=(info.holder.user, info.holder.host) == (self._holder.user, self._holder.host),
        )

    def revoke(self, gpu: str, *, token: int | None = None, force: bool = False) -> list[LeaseStatus]:
        """
        Take a GPU away from whoever holds it, in whatever process; returns the leases that were revoked.

        Its holder is told (`gpu.lost`, `on_lost`) and lets go of it.  Nobody is granted the GPU before that, or, if
        the holder does not react, before its process ends or the lease's ttl is over; then not before a reading shows
        it empty, or a minute has passed.

        Args:
            gpu: global id, such as ``server1:0``, or UUID.
            token: only the lease with this fencing token, as `leases` tells it.
            force: also leases of other users, and of other machines.

        Raises:
            NoSuchGPU: nobody holds such a GPU.
            GPUPoolError: it is somebody else's, and *force* was not given.
            LeaseStoreError: its arbiter cannot be asked.
        """
        engine = self._opened()
        self._first_reading(engine, Deadline.after(None))
        names = self._names_of_cards()
        found = [
            (store, info, self._lease_status(store, info, names))
            for store in self._stores_of(engine)
            for info in store.leases()
            if any(gpu in (key, names.get(key)) for key in info.cards) and token in (None, info.token)
        ]
        if not found:
            raise NoSuchGPU(f"nobody holds {gpu}; pool.leases() and `gpupool-sync leases` list what is held")
        others = [status.holder for _, _, status in found if not status.own]
        if others and not force:
            raise GPUPoolError(f"{gpu} is held by {', '.join(others)}; force=True (--force) takes it away all the same")
        revoked = []
        for store, info, status in found:
            ended = [store.revoke(key, info.token, str(self._holder)) for key in info.cards]
            if any(ended):
                logger.warning("the lease of %s on %s is revoked", status.holder, ", ".join(status.gpus))
                revoked.append(status)
        return revoked

    def _number_waiting(self, engine: _Engine) -> int:
        """Who waits at the arbiter of this machine, whatever process they are of; elsewhere only our own are known."""
        if engine.arbiter.scope == "everybody" or engine.servers:
            return len(self._waiting)
        try:
            # While no endpoint can be granted from, ours have no tickets.
            return max(len(engine.arbiter.queue()), len(self._waiting))
        except LeaseStoreError:
            return len(self._waiting)

    def stats(self) -> dict[str, Any]:
        """
        Counters since the beginning (or the last `pop_stats`) and gauges of this moment, as plain JSON-able types.

        ``docs/statistics.md`` says what each means and what its growth tells.
        """
        return self._stats()

    def pop_stats(self) -> dict[str, Any]:
        """The same as `stats`, and start the counters again."""
        return self._stats(reset=True)

    def _stats(self, *, reset: bool = False, all_time: bool = False) -> dict[str, Any]:
        """With *all_time*, sums since the beginning that no `pop_stats` sets back, and histograms; never blocks."""
        result = self._counters.read(has_ideal=self._strategy.has_ideal, reset=reset, all_time=all_time)
        engine = self._engine
        snapshots, _ = self._table.view()
        now = boottime()
        result["waiting"] = len(self._waiting)
        result["waiting_most"] = self._waiting.most
        result["held"] = sum(1 for grant in list(self._grants.values()) if grant.lease is not None)
        result["oldest_age"] = max((snapshot.age(now) for snapshot in snapshots.values()), default=None)
        result["strategy"] = {"name": self._strategy.name, **self._strategy.stats()}
        result["threads"] = engine.monitor.threads() + engine.keeper.threads() if engine is not None else 0
        result.update(
            engine.monitor.stats(reset=reset, all_time=all_time)
            if engine is not None
            else {"polls": 0, "poll_seconds": 0.0, "poll": summary(())}
        )
        result["endpoints"] = {
            endpoint.id: endpoint.stats(reset=reset, all_time=all_time)
            for endpoint in (engine.endpoints.values() if engine is not None else ())
        }
        return result


def describe(request: GPURequest) -> str:
    """The request in words, for messages."""
    what = "one GPU" if request.count == 1 else f"{request.count} GPUs of one host"
    if request.memory_mb is not None:
        what = f"{request.memory_mb:.0f} MiB of a GPU"
    elif request.max_holders is not None:
        what = f"one of {request.max_holders} places on a GPU"
    more = [
        f"{name}={', '.join(value) if isinstance(value, tuple) else value}"
        for name, value in (
            ("local", request.local),
            ("endpoint", request.endpoint or None),
            ("model", request.model),
            ("uuid", request.uuid or None),
            ("exclude", request.exclude or None),
            ("min_free_memory_mb", request.min_free_memory_mb),
            ("max_utilization_percent", request.max_utilization_percent),
            ("busy_ok", request.busy_ok or None),
        )
        if value is not None
    ]
    return f"{what} ({', '.join(more)})" if more else what


def _request(
    count: int | None,
    local: bool | None,
    endpoint: Names,
    model: str | None,
    uuid: Names,
    exclude: Names,
    min_free_memory_mb: float | None,
    max_utilization_percent: float | None,
    memory_mb: float | None,
    max_holders: int | None,
    busy_ok: bool,
) -> GPURequest:
    given = (count, local, endpoint, model, uuid, exclude, min_free_memory_mb, max_utilization_percent)
    if busy_ok is False and memory_mb is None and max_holders is None and given == _NOTHING:
        return _DEFAULT_REQUEST  # what most callers ask for needs no checking
    return GPURequest.make(
        count=count,
        local=local,
        endpoint=endpoint,
        model=model,
        uuid=uuid,
        exclude=exclude,
        min_free_memory_mb=min_free_memory_mb,
        max_utilization_percent=max_utilization_percent,
        memory_mb=memory_mb,
        max_holders=max_holders,
        busy_ok=busy_ok,
    )


def _why_bound(request: GPURequest) -> str:
    if not request.uuid or request.uuid != bound_to():
        return ""
    return (
        "\n  CUDA is initialised in this process and bound to the GPU that it had before, so only that one was asked "
        "for; a process for each GPU is free of that: pool.executor(), or multiprocessing.Pool(maxtasksperchild=1)"
    )


def _timeout(value: float | None, name: str = "timeout") -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= sys.float_info.max:
        raise ConfigError(f"{name}={value!r}: seconds of at least 0 are allowed, or None to wait for ever")
    return float(value)


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
    store: LeaseStore, offers: Sequence[tuple[_Seen, Sequence[Card]]], request: GPURequest
) -> tuple[tuple[Wanted, ...], ...]:
    """The cards of the offers, as a claim names them."""
    if request.memory_mb is None:
        return tuple([tuple([_plainly(card.key) for card in cards]) for _, cards in offers])
    return tuple([tuple([Wanted(card.key, _room(store, card)) for card in cards]) for _, cards in offers])


#: Of a whole card, or of a place, nothing but the key is told.
_plainly = lru_cache(65536)(Wanted)


def _emptied(store: LeaseStore, offers: Sequence[tuple[_Seen, Sequence[Card]]]) -> Mapping[str, float]:
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


def _room(store: LeaseStore, card: Card) -> float | None:
    leased = sum(info.share.memory_mb or 0.0 for info in store.holders_of(card.key) if info.share is not None)
    return room_mb(card.reading, leased)


def _shareable(store: LeaseStore, card: Card, request: GPURequest) -> bool:
    """Whether a share may still fit beside those that are leased, as far as is known here."""
    shares = [info.share for info in store.holders_of(card.key)]
    if request.max_holders is not None:
        return all(s is not None and s.places is not None and len(shares) < s.places for s in shares) and (
            len(shares) < request.max_holders
        )
    assert request.memory_mb is not None
    if any(s is None or s.memory_mb is None for s in shares):
        return False
    room = _room(store, card)
    return room is not None and request.memory_mb + sum(s.memory_mb or 0.0 for s in shares if s) <= room


def _others(seen: _Seen) -> list[Card]:
    free = {card.key for card in seen.free}
    return [card for card in seen.wanted if card.key not in free]


def _has_locks_of(store: LeaseStore, offer: LeaseOffer) -> bool:
    """Whether *store* and a server of this machine use the same locks."""
    mine = getattr(store, "directory_id", None)
    if mine is not None and offer.lock_dir_id is not None:
        return bool(mine == offer.lock_dir_id)
    return store.description == f"host:{offer.lock_dir}" and getattr(store, "private", None) is None


def _held_by(store: LeaseStore, card: Card) -> Reason:
    for grant in list(_all_grants.values()):
        if grant.lease is not None and card.key in grant.lease.cards and grant.store is store:
            where = f", acquired at {grant.place}" if grant.place else ""
            held = time.monotonic() - grant.begun_at
            note = f", note: {grant.note}" if grant.note else ""
            lost = "; its handle is gone, pool.release_all() frees it" if grant.forgotten else ""
            return Reason("held", f"held by {grant.lease.holder}, this process, for {held:.0f} s{where}{note}{lost}")
    holders = store.holders_of(card.key)
    if not holders:  # released between two looks
        return Reason("held", "held until a moment ago")
    first = holders[0]
    note = f", note: {first.note}" if first.note else ""
    more = f" and {len(holders) - 1} more" if len(holders) > 1 else ""
    return Reason("held", f"held by {first.holder} for {first.since:.0f} s{note}{more}")


def _no_room(store: LeaseStore, card: Card) -> Reason:
    room = _room(store, card)
    told = "unknown" if room is None else f"{room:.0f} MiB"
    return Reason("no-room", f"its memory that others leave free is {told}")


def _error_of(endpoint: PolledEndpoint) -> str:
    return endpoint.numbers().last_error or "no error so far"


def _may_matter(fault: GPUFault, endpoint_id: str, request: GPURequest) -> bool:
    """Whether the card, once it can be read again, could satisfy the request."""
    if request.endpoint and endpoint_id not in request.endpoint:
        return False
    return not (request.model and fault.name and request.model.casefold() not in fault.name.casefold())


def _fault_line(endpoint_id: str, fault: Any) -> str:
    return f"GPU {'?' if fault.local_gpu_id is None else fault.local_gpu_id} cannot be used: {fault.reason}"


def _random() -> float:
    import random

    return random.random()  # noqa: S311 - a share of the decisions, no secret


def _package_frame(name: str) -> bool:
    return name == "gpupool_sync" or name.startswith("gpupool_sync.")


def _user_stacklevel() -> int:
    """The `stacklevel` that makes a warning point at the first caller outside this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and _package_frame(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    return level


def _caller() -> str:
    """File and line of the first caller outside this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _package_frame(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _rebuild(
    cls: type[GPUPool],
    settings: config.Settings,
    endpoints: tuple[config.Endpoint, ...],
    reads_devices: bool,
    on_lost: Callable[[Any], object] | None,
    drained: frozenset[str] = frozenset(),
) -> GPUPool:
    pool = cls.__new__(cls)
    pool._setup(settings, on_lost)
    pool._endpoint_configs = endpoints
    pool._reads_devices = reads_devices
    pool._drained = drained
    pool._inherited = True
    return pool


def held_here() -> list[Grant]:
    """Every lease that a pool of this process holds, the oldest first."""
    held = [grant for grant in list(_all_grants.values()) if grant.lease is not None and not grant.released]
    return sorted(held, key=lambda grant: grant.begun_at)


# -- all pools of this process ---------------------------------------------------------------------------------

_pools: weakref.WeakSet[GPUPool] = weakref.WeakSet()
_numbers = itertools.count(1)
# By lease id: the claims of all pools of this process, so that those of a pool that is gone can still be released.
# Single dict operations only, which are atomic.
_all_grants: dict[str, Grant] = {}
_exit_hook_registered = False


def _register_exit_hook() -> None:
    """
    Close every pool when the interpreter ends, before it joins the executors' threads.

    `concurrent.futures` joins them at exit, before `atexit` runs: a script would hang as long as a hung poll does.
    `threading`'s own hooks run earlier, the last registered first; they are private, hence the way around.
    """
    global _exit_hook_registered
    if _exit_hook_registered:
        return
    _exit_hook_registered = True
    register = getattr(threading, "_register_atexit", None)
    if register is None:  # pragma: no cover - no such interpreter so far
        import atexit

        register = atexit.register
    register(_close_all)


def _close_all() -> None:
    for pool in list(_pools):
        try:
            pool.close(timeout=1.0)
        except Exception:
            logger.exception("closing a pool at exit failed")


# Held while a pool imports what it needs; guards no data. A fork waits for it: a module that another thread is just
# importing stays half imported in the child, which would wait for it for ever. Taken after _lifecycle; reentrant, as an
# import may fork.
_opening = threading.RLock()
#: Seconds that a fork waits for imports at most.
LONGEST_IMPORT = 5.0
_forking = threading.local()  # whether this thread, which forks, has _opening


def _before_fork() -> None:
    _forking.waited = False
    _forking.waited = _opening.acquire(timeout=LONGEST_IMPORT)


def _after_fork_in_parent() -> None:
    if _forking.waited:
        _opening.release()


def _after_fork_in_child() -> None:
    global _opening
    _opening = threading.RLock()
    _all_grants.clear()
    for pool in list(_pools):
        pool._after_fork_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
