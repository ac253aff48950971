"""What a pool tells about itself: status, verdicts, leases, counters.

Made of what is known, but where an arbiter is asked who holds what.  The values are those of the module `status`, which
is imported when somebody asks.
"""

from __future__ import annotations

import datetime
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from gpupool_sync.choosing import Obstacle
from gpupool_sync.clock import boottime
from gpupool_sync.counting import summary
from gpupool_sync.errors import GPUPoolError, LeaseStoreError, NoSuchGPU
from gpupool_sync.leases.base import LeaseInfo, LeaseStore, TicketInfo
from gpupool_sync.leases.shared import CLOSED
from gpupool_sync.looking import error_of, judged, room_of, screened_for, unknown_names, why_unusable
from gpupool_sync.models import DEFAULT_REQUEST, Card, GPURequest, Reason, Snapshot
from gpupool_sync.starting import start
from gpupool_sync.state import Engine, PoolState, all_grants

if TYPE_CHECKING:
    from gpupool_sync.endpoint import PolledEndpoint
    from gpupool_sync.status import Explanation, LeasesStatus, LeaseStatus, MachineInfo, Status

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Arbiters that are asked at the same time.
MAX_AT_ONCE = 32


def explain(state: PoolState, request: GPURequest) -> Explanation:
    """Why a request like this is, or is not, granted now, by what is known without asking anybody."""
    from gpupool_sync.status import CardVerdict, Explanation

    engine = state.engine
    endpoints = engine.endpoints if engine is not None else {}
    snapshots, duplicates = state.table.view()
    now = boottime()
    local_only = request.local is None and bool(state.local_ids)
    silent: dict[str, str] = {}
    verdicts: list[CardVerdict] = []
    taken: set[str] = set()
    free = elsewhere = 0
    free_at: dict[str, int] = {}
    for endpoint in endpoints.values():
        snapshot = snapshots.get(endpoint.id)
        unusable = why_unusable(state, endpoint, snapshot, now)
        if unusable is not None:
            silent[endpoint.id] = unusable.text
        if snapshot is None:
            continue
        assert engine is not None
        for card, reason in _verdicts(state, engine, snapshot, request):
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
    unknown = unknown_names(state, engine, request.exclude) if engine is not None and request.exclude else []
    if unknown:
        hint = f"exclude: this pool has no {', '.join(unknown)}"
    elif request.endpoint and not any(name in endpoints or "://" in name for name in request.endpoint):
        hint = f"this pool has no endpoint {', '.join(request.endpoint)}; it has {', '.join(endpoints) or 'none'}"
    elif request.count > 1:
        best, most = max(free_at.items(), key=lambda item: item[1], default=("none", 0))
        if most < request.count:
            hint = f"{request.count} of one host are needed; the most that are free on one are {most} ({best})"
    outage = state.outages.text
    return Explanation(
        hint="; ".join(filter(None, (outage, hint))) or None,
        request=describe(request),
        cards=verdicts,
        endpoints=silent,
        free=free,
        elsewhere=elsewhere,
        waiting=len(state.waiting),
    )


def _verdicts(
    state: PoolState, engine: Engine, snapshot: Snapshot, request: GPURequest
) -> Iterable[tuple[Card, Reason | None]]:
    """Each card of the snapshot with the reason against it, in the order of the cards."""
    store = engine.store_of(snapshot.endpoint_id)
    screened = screened_for(state, snapshot, request)
    reasons: dict[str, Reason | None] = {card.key: reason for card, reason in screened.unwanted}
    for card, veto, obstacle in judged(store, snapshot, screened, request):
        reasons[card.key] = veto if obstacle is None else _in_words(obstacle, store, card)
    return [(card, reasons.get(card.key)) for card in snapshot.cards]


def _in_words(obstacle: Obstacle, store: LeaseStore, card: Card) -> Reason:
    if obstacle == "closed":
        return CLOSED
    return _held_by(store, card) if obstacle == "held" else _no_room(store, card)


def refresh_known(engine: Engine) -> None:
    """Ask the arbiters of other machines who holds what, for displays; who does not answer is left out."""
    stores = {id(each): each for each in (engine.arbiter, *engine.servers.values()) if each.scope == "everybody"}

    def ask(store: LeaseStore) -> None:
        try:
            store.leases()
        except LeaseStoreError as exc:
            logger.info("%s does not tell its leases: %s", store.description, exc)

    _ask_all(ask, list(stores.values()))


def _ask_all(ask: Callable[[LeaseStore], T], stores: Sequence[LeaseStore]) -> list[T]:
    """
    What *ask* returns for each of them, in their order.  They are asked at the same time.

    One after the other, each that hangs would take its `endpoint_timeout`: in an outage, when people want to know.
    """
    left = deque(range(len(stores)))
    answers: dict[int, T] = {}
    failures: list[BaseException] = []

    def work() -> None:
        while True:
            try:
                number = left.popleft()
            except IndexError:
                return
            try:
                answers[number] = ask(stores[number])
            except Exception as exc:
                failures.append(exc)
                return

    threads = []
    try:
        for _ in range(min(len(stores), MAX_AT_ONCE) - 1):
            thread = threading.Thread(target=work, name="gpupool-ask", daemon=True)
            try:
                start(thread)
            except RuntimeError:  # no thread to be had: those that there are do it
                break
            threads.append(thread)
        work()
        for thread in threads:
            thread.join()
    finally:
        left.clear()  # after Ctrl-C nobody wants to know the rest
    if failures:
        raise failures.pop()
    return [answers[number] for number in range(len(stores))]


def _holders(store: LeaseStore, key: str) -> Sequence[LeaseInfo]:
    """Who has the card, for displays: of shares in kernel locks, `holders_of` knows the last one only."""
    holders = store.holders_of(key)
    if store.scope == "everybody" or not any(info.share is not None for info in holders):
        return holders
    try:
        return [info for info in store.leases() if key in info.cards] or holders
    except LeaseStoreError:
        return holders


def status(state: PoolState, engine: Engine) -> Status:
    """The pool at this moment, by what is known without asking anybody."""
    from gpupool_sync.status import CardStatus, EndpointStatus, SourceStatus, Status, WorkerInfo

    snapshots, duplicates = state.table.view()
    now = boottime()
    utc = datetime.datetime.now(datetime.timezone.utc)
    endpoints: list[EndpointStatus] = []
    gpus: list[CardStatus] = []
    assignments: dict[str, list[WorkerInfo]] = {}
    taken: set[str] = set()
    total = available = healthy = 0
    for endpoint in engine.endpoints.values():
        snapshot = snapshots.get(endpoint.id)
        unusable = why_unusable(state, endpoint, snapshot, now)
        numbers = endpoint.numbers()
        store = engine.store_of(endpoint.id)
        if unusable is None and not numbers.healthy:
            # It may still be granted from, as a last resort; but what does not answer is not told to be available.
            unusable = Reason("endpoint-down", f"did not answer the last time: {error_of(endpoint)}")
        in_service = unusable is None or (unusable.code == "draining" and numbers.healthy)
        free = 0
        for card, reason in _verdicts(state, engine, snapshot, DEFAULT_REQUEST) if snapshot is not None else ():
            if duplicates and card.key in duplicates:
                if card.key in taken:
                    continue  # listed, and counted, at another endpoint of the same host
                if in_service:
                    taken.add(card.key)
            holders = _holders(store, card.key)
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
                origin=_origin(state, engine, endpoint),
                availability=numbers.availability,
                breaker_changes=numbers.breaker_changes,
                response_p50_ms=numbers.response_p50_ms,
                response_p95_ms=numbers.response_p95_ms,
                watched=engine.is_watched(endpoint.id),
            )
        )
    return Status(
        total_endpoints=len(endpoints),
        healthy_endpoints=healthy,
        total_gpus=total,
        available_gpus=available,
        active_workers=sum(len(workers) for workers in assignments.values()),
        blocked_workers=_number_waiting(state, engine),
        endpoints=endpoints,
        gpu_assignments=assignments,
        name=state.settings.name,
        strategy=state.strategy.name,
        gpus=gpus,
        open=not state.closed,
        sources=[SourceStatus(watch.id, len(watch.endpoints), watch.why) for watch in engine.watches.values()],
        hint=state.outages.text,
        taken_at=utc,
    )


def _origin(state: PoolState, engine: Engine, endpoint: PolledEndpoint) -> str:
    """What named the endpoint."""
    if endpoint.url == "local:":
        return "this machine"
    if endpoint.id in engine.found:
        return engine.found[endpoint.id][0]
    if engine.inherited is not None:
        return "inherited"
    if any(each.id == endpoint.id for each in state.settings.endpoints):
        return state.settings.endpoints_from or ""
    return "add_endpoint"


def leases(state: PoolState, engine: Engine) -> LeasesStatus:
    """`GPUPool.leases`, after the first reading."""
    from gpupool_sync.status import LeasesStatus, TicketStatus

    names = _names_of_cards(state)
    leases: list[LeaseStatus] = []
    queue: list[TicketStatus] = []
    problems: list[str] = []
    stores = _stores_of(engine)

    def ask(store: LeaseStore) -> tuple[Sequence[LeaseInfo], Sequence[TicketInfo], str | None]:
        infos: Sequence[LeaseInfo] = ()
        try:
            infos = store.leases()
            return infos, store.queue(), None
        except LeaseStoreError as exc:
            return infos, (), f"{store.description}: {exc}"

    for store, (infos, tickets, problem) in zip(stores, _ask_all(ask, stores), strict=True):
        leases += [_lease_status(state, store, info, names) for info in infos]
        queue += [
            TicketStatus(
                position=info.position,
                holder=str(info.holder),
                waited=info.waited,
                wants=f"{info.count} of {len(info.cards)} GPUs" + (f", {info.share}" if info.share is not None else ""),
                note=info.note,
                arbiter=store.description,
            )
            for info in tickets
        ]
        if problem is not None:
            problems.append(problem)
    return LeasesStatus(leases, queue, sorted({store.scope for store in stores}), problems)


def _names_of_cards(state: PoolState) -> dict[str, str]:
    snapshots, _ = state.table.view()
    return {card.key: card.global_gpu_id for snapshot in snapshots.values() for card in snapshot.cards}


def _stores_of(engine: Engine) -> list[LeaseStore]:
    return list({id(each): each for each in map(engine.store_of, engine.endpoints)}.values())


def _lease_status(state: PoolState, store: LeaseStore, info: LeaseInfo, names: Mapping[str, str]) -> LeaseStatus:
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
        own=(info.holder.user, info.holder.host) == (state.holder.user, state.holder.host),
    )


def revoke(state: PoolState, engine: Engine, gpu: str, *, token: int | None, force: bool) -> list[LeaseStatus]:
    """`GPUPool.revoke`, after the first reading."""
    names = _names_of_cards(state)
    found = [
        (store, info, _lease_status(state, store, info, names))
        for store in _stores_of(engine)
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
        ended = [store.revoke(key, info.token, str(state.holder)) for key in info.cards]
        if any(ended):
            logger.warning("the lease of %s on %s is revoked", status.holder, ", ".join(status.gpus))
            revoked.append(status)
    return revoked


def _number_waiting(state: PoolState, engine: Engine) -> int:
    """Who waits at the arbiter of this machine, whatever process they are of; elsewhere only our own are known."""
    if engine.arbiter.scope == "everybody" or engine.servers:
        return len(state.waiting)
    try:
        # While no endpoint can be granted from, ours have no tickets.
        return max(len(engine.arbiter.queue()), len(state.waiting))
    except LeaseStoreError:
        return len(state.waiting)


def stats(state: PoolState, *, reset: bool = False, all_time: bool = False) -> dict[str, Any]:
    """With *all_time*, sums since the beginning that no `pop_stats` sets back, and histograms; never blocks."""
    result = state.counters.read(has_ideal=state.strategy.has_ideal, reset=reset, all_time=all_time)
    engine = state.engine
    snapshots, _ = state.table.view()
    now = boottime()
    result["waiting"] = len(state.waiting)
    result["waiting_most"] = state.waiting.most
    result["held"] = sum(1 for grant in list(state.grants.values()) if grant.lease is not None)
    result["oldest_age"] = max(
        (each.age(now) for each in snapshots.values() if engine is None or engine.is_watched(each.endpoint_id)),
        default=None,
    )
    result["strategy"] = {"name": state.strategy.name, **state.strategy.stats()}
    threads = engine.monitor.threads() + engine.keeper.threads() if engine is not None else 0
    result["threads"] = threads + state.teller.threads()
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


def numbered_cards(state: PoolState, engine: Engine) -> tuple[bool, Mapping[str, Sequence[Card]]]:
    """`GPUPool.numbered_cards`, after the first reading."""
    known = state.table.view()[0]
    snapshots = [known[each] for each in engine.endpoints if each in known and known[each].cards]
    mine = {each.endpoint_id: each.cards for each in snapshots if each.is_local}
    if mine or state.local_ids:
        return True, mine
    invented = [each for each in snapshots if each.sample.host is not None and each.sample.host.simulated]
    return not invented, {each.endpoint_id: each.cards for each in invented}


def cards_known(state: PoolState) -> int:
    """`GPUPool.cards_known`."""
    snapshots, duplicates = state.table.view()
    keys = [
        card.key
        for snapshot in snapshots.values()
        if snapshot.is_local or not state.local_ids
        for card in snapshot.cards
    ]
    return len(set(keys)) if duplicates else len(keys)


def machines(state: PoolState, engine: Engine) -> dict[str, MachineInfo | None]:
    """`GPUPool.machines`, after the first reading."""
    from urllib.parse import urlsplit

    from gpupool_sync.status import MachineInfo

    snapshots, _ = state.table.view()
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


def _held_by(store: LeaseStore, card: Card) -> Reason:
    for grant in list(all_grants.values()):
        if grant.lease is not None and card.key in grant.lease.cards and grant.store is store:
            where = f", acquired at {grant.place}" if grant.place else ""
            held = time.monotonic() - grant.begun_at
            note = f", note: {grant.note}" if grant.note else ""
            lost = "; its handle is gone, pool.release_all() frees it" if grant.forgotten else ""
            return Reason("held", f"held by {grant.lease.holder}, this process, for {held:.0f} s{where}{note}{lost}")
    holders = store.holders_of(card.key)
    if not holders:
        # Who has it the reading does not say; or it was released between two looks.
        return Reason(
            "held", "held by somebody, as its server says" if card.reading.leased else "held until a moment ago"
        )
    first = holders[0]
    note = f", note: {first.note}" if first.note else ""
    more = f" and {len(holders) - 1} more" if len(holders) > 1 else ""
    return Reason("held", f"held by {first.holder} for {first.since:.0f} s{note}{more}")


def _no_room(store: LeaseStore, card: Card) -> Reason:
    room = room_of(store, card)
    told = "unknown" if room is None else f"{room:.0f} MiB"
    return Reason("no-room", f"its memory that others leave free is {told}")


def _fault_line(endpoint_id: str, fault: Any) -> str:
    return f"GPU {'?' if fault.local_gpu_id is None else fault.local_gpu_id} cannot be used: {fault.reason}"
