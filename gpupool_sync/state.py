"""What a pool is made of while it lives: `PoolState`, and in it the `Engine` that an open one runs.

The modules above are functions on it: who arbitrates, which endpoints there are, what is held, what is seen, what is
told, how a GPU is acquired.  Nothing here chooses, asks or waits.
"""

from __future__ import annotations

import copy
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import attrs

from gpupool_sync import config
from gpupool_sync.asking import Rivals, Watched
from gpupool_sync.bystanders import Bystanders
from gpupool_sync.choosing import Limits, Screened
from gpupool_sync.counting import Counters
from gpupool_sync.handle import Grant, Owner
from gpupool_sync.leases.base import Holder, LeaseStore
from gpupool_sync.leases.shared import user_name
from gpupool_sync.models import GPURequest, Snapshot
from gpupool_sync.outage import Outages
from gpupool_sync.strategies import make_strategy
from gpupool_sync.table import Table
from gpupool_sync.telling import Teller
from gpupool_sync.waiting import WaitingRoom

if TYPE_CHECKING:
    from gpupool_sync.discovery import Watch
    from gpupool_sync.endpoint import PolledEndpoint
    from gpupool_sync.executor import GPUExecutor
    from gpupool_sync.inherited import Inherited, Recipe
    from gpupool_sync.keeper import Keeper
    from gpupool_sync.looking import Sight
    from gpupool_sync.monitor import Monitor

#: After so many changes that nobody looked at, what was seen is forgotten.
MOST_TOUCHED = 64

# By lease id: the claims of all pools of this process, so that those of a pool that is gone can still be released.
# Single dict operations only, which are atomic.
all_grants: dict[str, Grant] = {}


def held_here() -> list[Grant]:
    """Every lease that a pool of this process holds, the oldest first."""
    held = [grant for grant in list(all_grants.values()) if grant.lease is not None and not grant.released]
    return sorted(held, key=lambda grant: grant.begun_at)


class Engine:
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
        "watch_lock",
        "watched",
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
        watched: Watched[str],
    ) -> None:
        self.endpoints = endpoints  # by id, in the order of the settings; replaced, never changed
        #: Ids of the endpoints that are polled at present.
        self.watched = watched
        # Guards watched. Held for dictionary work and for commands to the monitor, which are one atomic call.
        self.watch_lock = threading.Lock()
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

    def is_watched(self, endpoint_id: str) -> bool:
        """Whether the endpoint is polled at present."""
        return endpoint_id in self.watched

    def widen(self, *, everywhere: bool = False) -> list[str]:
        """Poll more endpoints, as `Watched.widen`; who is new."""
        with self.watch_lock:
            come, gone = self.watched.widen(everywhere=everywhere)
            self.monitor.watch(come, gone)
        return come

    def want(self, names: Collection[str]) -> list[str]:
        """Poll the endpoints of these ids or URLs, whatever else is polled; who is new."""
        if self.watched.complete:
            return []
        ids = [each.id for each in self.endpoints.values() if each.id in names or each.url in names]
        with self.watch_lock:
            come = self.watched.want(ids)
            self.monitor.watch(come)
        return come

    def narrow(self, keep: str) -> None:
        """Poll no more endpoints than was asked for, *keep* among them."""
        if len(self.watched) > self.watched.most:
            with self.watch_lock:
                self.monitor.watch((), self.watched.narrow(keep))

    def replace_dead(self, endpoint_id: str) -> None:
        """The endpoint's breaker is open: poll another one instead, if there is one."""
        if not self.watched.complete:
            with self.watch_lock:
                new = self.watched.replace(endpoint_id)
                if new is not None:
                    self.monitor.watch([new], [endpoint_id])

    def store_of(self, endpoint_id: str) -> LeaseStore:
        """Who arbitrates the cards of the endpoint."""
        return self.servers.get(endpoint_id, self.arbiter)


class PoolState:
    """
    Everything that one `GPUPool` knows; the pool has it as ``_state``, and nobody else keeps it.

    It is the same object for as long as the pool lives: a forked child fills it anew.  Threads see it through a weak
    reference, so that a forgotten pool takes it along.

    Args:
        owner: a weak reference to the pool: what handles refer to, and what tells whether the pool is gone.
        at_opening: called at each opening of the pool, when all that it needs has been imported.
    """

    __slots__ = (
        "__weakref__",
        "at_opening",
        "bystanders",
        "closed",
        "counters",
        "drained",
        "dropped",
        "endpoint_configs",
        "engine",
        "executors",
        "grants",
        "holder",
        "inherited",
        "last_free",
        "leaving",
        "lifecycle",
        "limits",
        "local_ids",
        "local_lock",
        "on_lost",
        "outages",
        "owner",
        "possible",
        "reads_devices",
        "rivals",
        "rivals_lock",
        "screens",
        "settings",
        "sights",
        "strategy",
        "table",
        "teller",
        "told_of",
        "waiting",
        "warned_of_scope",
        "watched",
        "watchers",
    )

    def __init__(
        self,
        settings: config.Settings,
        on_lost: Callable[[Any], object] | None,
        owner: Callable[[], Owner | None],
        at_opening: Callable[[], object],
    ) -> None:
        self.settings = settings
        self.on_lost = on_lost
        self.owner = owner
        self.at_opening = at_opening
        self.strategy = make_strategy(settings.strategy, settings.strategy_options)
        self.limits = Limits(settings.memory_threshold, settings.utilization_threshold)
        #: What is configured, and was added at run time; what was found is the engine's.
        self.endpoint_configs: tuple[config.Endpoint, ...] = settings.endpoints
        #: This machine's own cards, read without a server: what there is when no endpoint is configured.
        self.reads_devices = not settings.endpoints and not settings.sources
        self.drained: frozenset[str] = frozenset()  # ids of the endpoints that the user drains
        self.told_of: set[str] = set()  # what a warning was given of, once
        self.inherited = False  # came here by fork or in a pickle
        #: Called with an endpoint's id and whether it answered, after each poll, on its thread; must be quick.
        self.watchers: tuple[Callable[[str, bool], None], ...] = ()
        self.warned_of_scope = False
        #: Made here and not at the first claim: two threads would make two, and each claim must repeat its own.
        self.holder = _make_holder(settings.name)
        self._fill()

    def _fill(self) -> None:
        """Everything that does not survive a fork."""
        #: Guards opening, closing and changes of the endpoints. Held while threads are started, never during I/O.
        #: Not taken by an acquire once the pool is open.
        self.lifecycle = threading.RLock()
        self.engine: Engine | None = None
        self.closed = False
        self.table = Table()
        self.waiting = WaitingRoom(self.settings.max_waiting)
        self.counters = Counters()
        self.bystanders = Bystanders()
        #: By lease id: every claim that may be granted. Single dict operations only, which are atomic.
        self.grants: dict[str, Grant] = {}
        #: Weak references to what keeps each claim's caller able to release it, and those of them that died.
        self.watched: dict[object, Grant] = {}
        self.dropped: deque[Any] = deque()
        self.leaving: deque[Grant] = deque()  # released while a child of popen() still ran
        #: Tells arbiters of what has ended, where its caller does not wait for that.
        self.teller = Teller()
        #: What each endpoint's last snapshot is to requests that come again.
        self.screens: dict[tuple[str, GPURequest], tuple[Snapshot, Screened]] = {}
        #: By which snapshots which request can be satisfied, at some time; replaced as a whole.
        self.possible: tuple[object, GPURequest | None] = None, None
        #: What was seen of many endpoints a moment ago.
        self.sights: dict[GPURequest, Sight] = {}
        #: Endpoints whose cards are in this machine; those that are said to be, before they have answered.
        self.local_ids = self.said_to_be_local()
        # Guards local_ids, which several workers change.
        self.local_lock = threading.Lock()
        #: What others take, as the readings show it.
        self.rivals = Rivals()
        # Guards changes of rivals, which several workers make; reading needs no lock.
        self.rivals_lock = threading.Lock()
        #: Whether most endpoints vanished at once. Polls of one interval may show what happened at one moment.
        self.outages = Outages(self.settings.poll_interval + self.settings.endpoint_timeout)
        #: By endpoint id, while somebody waits: the cards that were free at its last poll.
        self.last_free: dict[str, frozenset[str]] = {}
        self.executors: weakref.WeakSet[GPUExecutor] = weakref.WeakSet()

    def after_fork_in_child(self) -> None:
        """
        Start anew in a forked child.

        The parent's leases are forgotten, not released; its threads and connections are its own. The child opens its
        own at first use. A pool that the parent closed stays closed.
        """
        closed, engine = self.closed, self.engine
        self.inherited = True
        self._fill()
        # Asks nobody anew who it is: the C library's locks may be those of its parent's threads.
        self.holder = attrs.evolve(self.holder, id=os.urandom(8).hex(), pid=os.getpid())
        self.closed = closed
        # A copy has the settings and a lock of its own: another thread may have held the old one at the fork.
        self.strategy = copy.copy(self.strategy)
        store = self.settings.lease_store
        if store is not None and not isinstance(store, str):
            store.forget_after_fork()
        if engine is not None:
            for endpoint in engine.endpoints.values():
                endpoint.forget_after_fork()
            for server in (*engine.servers.values(), *engine.retired):
                server.forget_after_fork()

    def said_to_be_local(self) -> frozenset[str]:
        """Ids of the endpoints that are configured as in this machine."""
        return frozenset(each.id for each in self.endpoint_configs if each.local)

    def configs(self, engine: Engine | None) -> list[config.Endpoint]:
        """What is configured, and what was found."""
        found = engine.found.values() if engine is not None else ()
        return [*self.endpoint_configs, *(endpoint for _, endpoint in found)]

    def touch(self, endpoint_id: str) -> None:
        """What was seen there has changed by our own doing."""
        for request, sight in list(self.sights.items()):
            if len(sight.touched) < MOST_TOUCHED:
                sight.touched.append(endpoint_id)
            else:  # nobody asks like that any more
                self.sights.pop(request, None)

    def tell_watchers(self, endpoint_id: str, answered: bool) -> None:
        """Whether the endpoint answered, to whoever wants to know."""
        for watcher in self.watchers:
            watcher(endpoint_id, answered)


def _make_holder(name: str | None) -> Holder:
    import socket

    return Holder(id=os.urandom(8).hex(), name=name, user=user_name(), host=socket.gethostname(), pid=os.getpid())
