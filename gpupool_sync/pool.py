"""`GPUPool`, as the user has it; and what becomes of all pools of this process at a fork and at the end.

What it does is in the modules below, as functions on its `PoolState`: `acquiring`, `reporting`, `engine` and under them
`looking`, `holding`, `membership`, `arbiters`.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, Union, overload

from gpupool_sync import config, membership, reporting
from gpupool_sync.acquiring import obtain
from gpupool_sync.arbiters import recipe
from gpupool_sync.callers import caller
from gpupool_sync.clock import Deadline
from gpupool_sync.engine import close, first_reading, open_again, opened
from gpupool_sync.errors import ConfigError, GPUPoolError
from gpupool_sync.handle import GPU, GPUs, Grant, Tie, _Handle
from gpupool_sync.holding import collect_dropped, give_up, new_grant, release, release_all, watch
from gpupool_sync.leases.base import LeaseStore
from gpupool_sync.models import DEFAULT_REQUEST, Card, GPURequest
from gpupool_sync.state import PoolState, all_grants

if TYPE_CHECKING:
    from gpupool_sync.executor import GPUExecutor
    from gpupool_sync.gpuqueue import GPUQueue
    from gpupool_sync.inherited import Recipe
    from gpupool_sync.status import Explanation, LeasesStatus, LeaseStatus, MachineInfo, Status

logger = logging.getLogger(__name__)

_NOTHING = (None,) * 8
_H = TypeVar("_H", GPU, GPUs)
#: One name, or several.
Names = Union[str, Sequence[str], None]  # noqa: UP007 - an alias that runs on Python 3.10


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
        state = self._pool._state
        grant = self._grant = new_grant(state, self._note, self._on_lost)
        grant.cancelled = self._cancelled
        watch(state, self, grant)
        try:
            obtain(state, grant, self._request, Deadline.after(self._timeout))
            return self._pool._handle(Tie(grant), self._count)  # type: ignore[no-any-return]
        except BaseException:
            give_up(state, grant)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._grant is not None:
            release(self._pool._state, self._grant)

    def cancel(self) -> None:
        """From another thread: end the wait in `__enter__` with `PoolClosed`, unless it has been granted by now."""
        self._cancelled = True  # before the look: `__enter__` may just be making its grant
        grant = self._grant
        if grant is not None:
            grant.cancelled = True
            self._pool._state.waiting.hint([grant.id])

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
        watch: endpoints that this process watches at most, a random subset; default all of up to 500, of more 32.
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
        watch: int | None = None,
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
            "watch": watch,
            "name": name,
            "progress": progress,
        }
        if on_lost is not None and not callable(on_lost):
            raise ConfigError(f"on_lost={on_lost!r}: a function that takes the lost GPU is allowed")
        settings = config.resolve(endpoints, **{key: value for key, value in given.items() if value is not None})
        self._setup(settings, on_lost)

    def _setup(self, settings: config.Settings, on_lost: Callable[[Any], object] | None) -> None:
        self._state = PoolState(settings, on_lost, weakref.ref(self), _register_exit_hook)
        _pools.add(self)

    # -- life --------------------------------------------------------------------------------------------------

    def open(self, wait: bool = False, timeout: float | None = None) -> None:
        """
        Start polling. The first use opens the pool too; a closed pool opens again only by this call.

        Args:
            wait: return only when every endpoint has answered or failed once.
            timeout: seconds to wait at most; None: as long as a poll may take.
        """
        engine = open_again(self._state)
        if wait:
            first_reading(self._state, engine, Deadline.after(timeout), stragglers=False)

    def _recipe(self, store: LeaseStore) -> Recipe:
        return recipe(self._state, store)

    def close(self, timeout: float = 5.0) -> None:
        """
        Release everything, send the waiters away with `PoolClosed`, and stop the threads. Idempotent.

        Args:
            timeout: seconds to wait for the threads; one that does not stop is logged and left behind.
        """
        close(self._state, timeout)

    def __enter__(self) -> GPUPool:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        # Settings only (credentials included): threads, leases and connections belong to this process.
        # Settings only (credentials included): threads, leases and connections belong to this process.
        state = self._state
        return _rebuild, (
            type(self),
            state.settings,
            state.endpoint_configs,
            state.reads_devices,
            state.on_lost,
            state.drained,
        )

    def __repr__(self) -> str:
        state = self._state
        configs, engine = state.endpoint_configs, state.engine
        names = [*(["this machine"] if state.reads_devices else []), *(each.id for each in configs[:5])]
        names += [source.spec for source in state.settings.sources]
        if engine is not None and engine.inherited is not None:
            names = [f"what this process has from process {engine.inherited.pid}"]
        where = ", ".join(names) or "no endpoints"
        more = f" and {len(configs) - 5} more" if len(configs) > 5 else ""
        life = "closed" if state.closed else "open" if engine is not None else "not opened yet"
        held = sum(1 for grant in state.grants.values() if grant.lease)
        return f"<GPUPool of {where}{more}, {life}, {held} {'lease' if held == 1 else 'leases'} held>"

    def _repr_html_(self) -> str:
        from gpupool_sync.display import pool_html

        # Showing a pool neither opens it nor asks a server: status() does.
        engine = self._state.engine
        return pool_html(self, None if engine is None or self._state.closed else reporting.status(self._state, engine))

    # -- the endpoints -----------------------------------------------------------------------------------------

    def add_endpoint(self, endpoint: Any, **options: Any) -> str:
        """
        Add an endpoint at run time; returns its id.

        Args:
            endpoint: a URL (with the options of `Endpoint`) or an `Endpoint`.

        Raises:
            ConfigError: not a URL, or an endpoint of that id or URL is there already.
        """
        return membership.add(self._state, endpoint, options)

    def drain_endpoint(self, endpoint_id: str) -> None:
        """
        Grant nothing new at the endpoint; leases there go on, and it is still polled.

        Raises:
            ConfigError: no endpoint has that id.
        """
        state = self._state
        with state.lifecycle:
            membership.drain_locked(state, opened(state), endpoint_id)
        state.sights.clear()

    def remove_endpoint(self, endpoint_id: str) -> None:
        """
        Forget the endpoint; leases there go on until they are released.

        Raises:
            ConfigError: no endpoint has that id.
        """
        state = self._state
        with state.lifecycle:
            endpoint = membership.remove_locked(state, opened(state), endpoint_id)
        endpoint.abort()
        endpoint.close()
        state.tell_watchers(endpoint_id, True)  # nobody need wait for it any more

    def refresh(self, timeout: float | None = None, *, endpoint: str | None = None) -> bool:
        """
        Read every endpoint once more, now; whether all of them answered or failed within *timeout* seconds.

        Calls at the same time are coalesced into at most two polls of each endpoint.

        Args:
            endpoint: only the endpoint of this id, also while its breaker is open.

        Raises:
            ConfigError: no endpoint has that id.
        """
        engine = opened(self._state)
        from gpupool_sync.monitor import wait_for

        wanted = engine.endpoints if endpoint is None else [membership.endpoint_of(engine, endpoint).id]
        futures = engine.monitor.poll_soon(wanted)
        return wait_for(futures, Deadline.after(timeout))

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
        state = self._state
        tie = Tie(new_grant(state, note, on_lost))
        grant = tie.grant
        watch(state, tie, grant)
        try:
            obtain(state, grant, asked, deadline)
            grant.place = caller()
            handle: GPU | GPUs = self._handle(tie, count)
            # From here on a handle that is collected was the caller's to keep: nothing between this line and the
            # caller's assignment lets an interrupt in.
            grant.delivered = True
            return handle
        except BaseException:
            give_up(state, grant)
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
            **{"on_lost": self._state.on_lost, **request},
        )
        self._state.executors.add(executor)
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
        engine = opened(self._state)
        first_reading(self._state, engine, Deadline.after(None), stragglers=False)
        return reporting.numbered_cards(self._state, engine)

    def cards_known(self) -> int:
        """How many cards the last readings tell of, without looking again; of this machine's, if it has some."""
        return reporting.cards_known(self._state)

    def machines(self, timeout: float | None = None) -> dict[str, MachineInfo | None]:
        """
        Which machine each endpoint is, as its last reading tells; None: it has not answered yet.

        Opens the pool if need be and waits for its first reading, *timeout* seconds at most.
        """
        engine = opened(self._state)
        first_reading(self._state, engine, Deadline.after(_timeout(timeout)))
        return reporting.machines(self._state, engine)

    def _handle(self, tie: Tie, count: int | None) -> Any:
        return GPU(self, tie, tie.grant.cards[0]) if count is None else GPUs(self, tie)

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
        release(self._state, gpu._tie.grant)

    def release_all(self) -> None:
        """
        Give back every lease of this pool in this process, those of forgotten handles included.

        Also those of pools of this process that are gone themselves, such as one whose notebook cell was run again.
        """
        release_all(self._state)

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
        engine = opened(self._state)
        first_reading(self._state, engine, Deadline.after(None))
        reporting.refresh_known(engine)
        return reporting.explain(self._state, asked)

    def status(self) -> Status:
        """
        The pool at this moment: totals, endpoints, cards, who holds what.

        Opens the pool if need be and waits for its first reading.
        """
        engine = opened(self._state)
        collect_dropped(self._state)
        first_reading(self._state, engine, Deadline.after(None))
        reporting.refresh_known(engine)
        return reporting.status(self._state, engine)

    def leases(self) -> LeasesStatus:
        """
        Every lease and every waiting claim that the arbiters of this pool know, whoever's they are.

        Asks the arbiters; one that does not answer is among the result's `problems`.
        """
        engine = opened(self._state)
        first_reading(self._state, engine, Deadline.after(None))
        return reporting.leases(self._state, engine)

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
        engine = opened(self._state)
        first_reading(self._state, engine, Deadline.after(None))
        return reporting.revoke(self._state, engine, gpu, token=token, force=force)

    def stats(self) -> dict[str, Any]:
        """
        Counters since the beginning (or the last `pop_stats`) and gauges of this moment, as plain JSON-able types.

        ``docs/statistics.md`` says what each means and what its growth tells.
        """
        return reporting.stats(self._state)

    def pop_stats(self) -> dict[str, Any]:
        """The same as `stats`, and start the counters again."""
        return reporting.stats(self._state, reset=True)


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
        return DEFAULT_REQUEST  # what most callers ask for needs no checking
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


def _timeout(value: float | None, name: str = "timeout") -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= sys.float_info.max:
        raise ConfigError(f"{name}={value!r}: seconds of at least 0 are allowed, or None to wait for ever")
    return float(value)


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
    state = pool._state
    state.endpoint_configs = endpoints
    state.local_ids = state.said_to_be_local()
    state.reads_devices = reads_devices
    state.drained = drained
    state.inherited = True
    return pool


# -- all pools of this process ---------------------------------------------------------------------------------

_pools: weakref.WeakSet[GPUPool] = weakref.WeakSet()
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


def _after_fork_in_child() -> None:
    all_grants.clear()
    for pool in list(_pools):
        pool._state.after_fork_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
