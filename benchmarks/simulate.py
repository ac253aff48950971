"""``python -m benchmarks.simulate``: what the pool's decisions come to with 10 to 2000 servers, by discrete events.

Real: the strategies, the filter (``choosing``), whom to ask in which order and where to wait (``asking``), the
arbiters with their queues (``leases.memory`` and ``leases.tickets``, by a simulated clock).  Simulated: servers,
cards, jobs, clients, the network, polls (each client reads each server that it watches once per interval, at a phase
of its own) and failures.  Every random choice comes from the seed, so a run can be repeated to the last claim.

Load is the rate of arrivals × the mean duration ÷ the number of GPUs.  Durations are exponential.  The yardstick is one
central queue for all GPUs that knows everything and takes no time: the same jobs, first come, first served.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import heapq
import itertools
import json
import math
import multiprocessing
import random
import statistics
import sys
import time
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from gpupool_sync.asking import Rivals, Tickets, Watched, attempts, ordered, promising, watch_most
from gpupool_sync.choosing import Limits, screen, usable
from gpupool_sync.leases.base import Claim, Granted, Holder, Outcome, Queued, Wanted
from gpupool_sync.leases.http import HEARSAY_TIME, HTTPStore
from gpupool_sync.leases.memory import MemoryStore
from gpupool_sync.models import Card, EndpointView, GPUReading, GPURequest, Sample, Snapshot
from gpupool_sync.strategies import Availability
from gpupool_sync.waiting import RECHECK

LIMITS = Limits(memory_threshold=80.0, utilization_threshold=90.0)
#: As `config` and `endpoint` have them: seconds between polls, failed polls that open a breaker, seconds after which a
#: recovered server is asked like all others.
POLL_INTERVAL = 5.0
BREAKER_FAILURES = 5
REINTRODUCED = 30.0
FIRST_SHARE = 0.1
#: What is asked for: any GPU; the rarer model.
KINDS = (GPURequest(), GPURequest(model="H100"))
#: Seconds that a long poll for hints takes, if none comes.
LISTEN = HTTPStore.listen_time
#: Seconds for which requests are counted together, for the busiest moment of a server.
BIN = 5.0
#: Seconds after a recovery in which claims there are counted.
HERD_TIME = 40.0
#: Seconds in which the jobs of a backlog arrive.
BACKLOG_TIME = 5.0
#: Waits are compared with those of a central queue where its p99 is so many seconds at least.
JUDGED_WAIT = 0.1
#: Who arrived less than so many seconds before another is not said to have been overtaken by it.
SAME_TIME = 0.05


@attrs.frozen
class Scenario:
    """One run."""

    endpoints: int
    load: float = 0.95
    duration: float = 600.0  # seconds, mean of the jobs
    jobs: int = 10_000
    seed: int = 1
    #: "availability", or "strict": most available first, whatever happens, as a naive client does.
    strategy: str = "availability"
    #: Clients, each a process with a pool of its own that asks for one GPU at a time; None: 1.25 for each GPU.
    clients: int | None = None
    #: Endpoints that a client watches; None: all.
    watch: int | None = None
    #: Two models, servers of 2 to 8 GPUs, a quarter of the jobs need the rarer model.
    mixed: bool = False
    #: Polls of one client are spread over the interval; False: all at the same moment.
    spread_polls: bool = True
    #: Seconds until readings show that a GPU was leased; 0: servers tell of their leases.
    visible_after: float = 0.0
    #: Seconds that a message takes, one way, at least and on average.
    latency: float = 0.002
    #: This share of the servers fails for `outage` seconds in the middle of the run.
    failing: float = 0.0
    outage: float = 120.0
    #: So many jobs wait already when it begins.
    backlog: int = 0
    #: The waiters' tickets: "widening" as the pool does it, or at every arbiter at once.
    tickets: str = "widening"


class Server:
    """One statistics server with its GPUs, its arbiter, and what its readings showed when."""

    __slots__ = (
        "bins",
        "busy_since",
        "cards",
        "down",
        "held",
        "id",
        "keys",
        "known",
        "masks",
        "number",
        "store",
        "times",
        "used",
    )

    def __init__(self, number: int, cards: Sequence[Card], clock: Callable[[], float]) -> None:
        self.number = number
        self.id = f"server{number}"
        self.cards = tuple(cards)
        self.keys = [card.key for card in cards]
        self.store = MemoryStore(clock=clock)
        self.times: list[float] = [-math.inf]
        self.masks: list[int] = [0]  # from that time on: bit n is set while readings show card n as leased
        self.held = 0  # what is leased now
        #: By kind of request and mask: the cards that would do and are free, and those that are not.
        self.known: list[list[tuple[tuple[Card, ...], tuple[Card, ...]] | None]] = [
            [None] * (1 << len(cards)) for _ in KINDS
        ]
        self.down: list[tuple[float, float]] = []
        self.bins: dict[int, int] = {}
        self.used = 0.0  # GPU-seconds
        self.busy_since: dict[str, float] = {}

    def change(self, key: str, held: bool) -> None:
        bit = 1 << self.keys.index(key)
        self.held = self.held | bit if held else self.held & ~bit

    def show(self, key: str, held: bool, now: float) -> None:
        """From now on readings show the card as held, or not."""
        bit = 1 << self.keys.index(key)
        if held and not self.held & bit:
            return  # released before it could be seen
        self.times.append(now)
        self.masks.append(self.masks[-1] | bit if held else self.masks[-1] & ~bit)
        if len(self.times) > 4096:
            del self.times[:2048], self.masks[:2048]

    def at(self, moment: float) -> int:
        return self.masks[max(0, bisect_right(self.times, moment) - 1)]

    def filtered(self, mask: int, request: GPURequest) -> tuple[tuple[Card, ...], tuple[Card, ...]]:
        """What the pool's filter leaves of a reading: the cards that would do and are free, and those that are not."""
        held = {key for n, key in enumerate(self.keys) if mask >> n & 1}
        cards = tuple(
            attrs.evolve(
                card,
                reading=attrs.evolve(
                    card.reading,
                    memory_usage_percent=95.0 if card.key in held else 0.0,
                    utilization_percent=99.0 if card.key in held else 0.0,
                ),
            )
            for card in self.cards
        )
        sample = Sample(tuple(card.reading for card in cards), 0.0)
        snapshot = Snapshot(self.id, f"http://{self.id}", sample, cards, 0.0)
        possible = list(
            usable(
                screen(snapshot, request, LIMITS),
                snapshot,
                is_held=held.__contains__,
                released_at=lambda key: None,
                closed=dict,
                fits=None,
            )
        )
        free = tuple(card for card, veto, obstacle in possible if veto is None and obstacle is None)
        taken = tuple(card for card, veto, obstacle in possible if veto is None and obstacle is not None)
        return free, taken

    def is_down(self, moment: float) -> bool:
        return any(begin <= moment < end for begin, end in self.down)


class Client:
    """One process with a pool: its strategy's memory, and when it polls whom."""

    __slots__ = ("counted_at", "hearsay", "holder", "number", "phase", "phases", "strategy", "watched")

    def __init__(self, number: int, strategy: Availability, watched: Watched, phase: float) -> None:
        self.number = number
        self.strategy = strategy
        self.watched = watched
        self.phase = phase
        self.phases: dict[int, float] = {}  # by server
        self.counted_at = 0.0
        self.hearsay: dict[int, tuple[float, int]] = {}  # by server: when it was heard, who is held
        self.holder = Holder(f"client{number}", None, "user", f"host{number}", 1)


class Seen:
    """One server through the eyes of one client: what `asking` calls a candidate."""

    __slots__ = ("_view", "age", "free", "rivals", "server", "share", "taken")

    def __init__(
        self,
        server: Server,
        known: tuple[tuple[Card, ...], tuple[Card, ...]],
        share: float,
        age: float,
        rivals: float,
    ) -> None:
        self.server = server
        self.rivals = rivals
        self.free, self.taken = known
        self.share = share
        self.age = age
        self._view: EndpointView | None = None

    @property
    def view(self) -> EndpointView:
        if self._view is None:  # most are never asked for theirs
            self._view = EndpointView(
                self.server.id, len(self.server.cards), len(self.free), age=self.age, rivals_per_second=self.rivals
            )
        return self._view


class Job:
    """One wish for a GPU."""

    __slots__ = (
        "arrival",
        "claims",
        "duration",
        "granted_at",
        "held",
        "key",
        "later",
        "number",
        "passed",
        "request",
        "server",
        "tickets",
    )

    def __init__(self, number: int, arrival: float, duration: float, request: GPURequest) -> None:
        self.number = number
        self.arrival = arrival
        self.duration = duration
        self.request = request
        self.later = 0  # of the claims, those made while waiting
        self.claims = 0  # for a card that seemed free, or after a hint
        self.tickets = 0  # claims that left or renewed a ticket
        self.granted_at: float | None = None
        self.passed = 0  # who arrived before it and had to go on waiting
        self.held = math.inf, math.inf  # from when to when its GPU was leased, by the arbiter's clock
        self.server: Server | None = None
        self.key: str | None = None


class Process:
    """Something that goes on: its steps, and how to wake it early."""

    __slots__ = ("parked", "steps", "token")

    def __init__(self, steps: Steps | None = None) -> None:
        self.steps = steps
        self.token = 0  # of the next step; others are out of date
        self.parked = False  # sleeps, and may be woken


class Waiter:
    """A call that waits with tickets."""

    __slots__ = ("client", "hints", "job", "process", "since", "tickets")

    def __init__(self, client: Client, job: Job, process: Process) -> None:
        self.client = client
        self.job = job
        self.process = process
        self.tickets = Tickets()
        self.since: dict[int, float] = {}  # by server: since when there is a ticket
        self.hints: list[int] = []


#: A process sleeps so many seconds; as a negative number it may be woken before.
Steps = Generator[float, None, Any]


class World:
    """The simulated fleet and its clients."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.now = 0.0
        self.random = random.Random(scenario.seed)
        self._events: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._order = itertools.count()
        self.servers = [self._server(number) for number in range(scenario.endpoints)]
        self.gpus = sum(len(server.cards) for server in self.servers)
        self.jobs = self._arrivals()
        self.end = self.jobs[-1].arrival if self.jobs else 0.0
        self.clients: list[Client] = []
        self.idle: list[Client] = []
        self.most_clients = scenario.clients or math.ceil(1.25 * self.gpus)
        self.unserved: list[int] = []  # numbers of the jobs that have arrived and have no GPU, sorted
        self.waiters: dict[str, Waiter] = {}  # by id of the claim
        self.rivals = Rivals()
        self.most_waiting = 0
        self.polls = 0.0
        self.listens = [0.0] * scenario.endpoints
        self.crowd_at: dict[int, list[float]] = {}  # claims at servers that fail, for herds
        self.turned_away = 0
        if scenario.failing:
            failing = self.random.sample(self.servers, max(1, round(scenario.failing * len(self.servers))))
            begin = 0.4 * self.end
            for server in failing:
                server.down.append((begin, begin + scenario.outage))
                self.crowd_at[server.number] = []
        self._fill()

    # -- making it -------------------------------------------------------------------------------------------

    def _server(self, number: int) -> Server:
        size, model = 8, "NVIDIA A100"
        if self.scenario.mixed:
            size = self.random.choice((2, 4, 4, 8, 8, 8))
            model = self.random.choice(("NVIDIA A100", "NVIDIA A100", "NVIDIA H100"))
        cards = [
            Card(f"GPU-{number}-{n}", f"server{number}", GPUReading(n, model, f"GPU-{number}-{n}", 80_000.0))
            for n in range(size)
        ]
        server = Server(number, cards, lambda: self.now)
        server.store.subscribe(lambda ids: self._hinted(server, ids))
        return server

    def _arrivals(self) -> list[Job]:
        scenario, rng = self.scenario, random.Random(f"{self.scenario.seed} arrivals")
        rate = scenario.load * self.gpus / scenario.duration
        moments = list(itertools.accumulate(rng.expovariate(1.0) for _ in range(scenario.jobs)))
        # Scaled, so that the load is what the scenario says and not what chance makes of so few jobs.
        scale = scenario.jobs / rate / moments[-1]
        moments = [BACKLOG_TIME * rng.random() for _ in range(scenario.backlog)] + [scale * m for m in moments]
        durations = [rng.expovariate(1.0) for _ in moments]
        scale = scenario.duration * len(durations) / sum(durations)
        jobs = []
        for number, (moment, duration) in enumerate(zip(sorted(moments), durations, strict=True)):
            rare = scenario.mixed and rng.random() < 0.25
            jobs.append(Job(number, moment, scale * duration, KINDS[1] if rare else KINDS[0]))
        return jobs

    def _fill(self) -> None:
        """Begin as it is after a long time: that share of the GPUs is in use, at random."""
        everything = [(server, key) for server in self.servers for key in server.keys]
        self.random.shuffle(everything)
        self.filled: list[float] = []
        for number in range(round(min(1.0, self.scenario.load) * self.gpus)):
            server, key = everything[number]
            claim = Claim(f"before{number}", Holder("before", None, "user", "host", 1), ((Wanted(key),),))
            assert isinstance(server.store.claim(claim), Granted)
            duration = self.random.expovariate(1.0 / self.scenario.duration)
            self.filled.append(duration)
            server.busy_since[key] = 0.0
            server.change(key, True)
            server.show(key, True, 0.0)
            self.at(duration, self._release, server, key, claim.id, None)

    def _client(self) -> Client | None:
        if self.idle:
            # Any of them: a script that has just ended is no likelier to go on than another.
            number = int(self.random.random() * len(self.idle))
            self.idle[number], self.idle[-1] = self.idle[-1], self.idle[number]
            return self.idle.pop()
        if len(self.clients) >= self.most_clients:
            return None
        number = len(self.clients)
        scenario = self.scenario
        strategy = Availability(spread=scenario.strategy != "strict", seed=hash((scenario.seed, number)))
        watched = Watched(
            range(scenario.endpoints), scenario.watch or scenario.endpoints, random.Random(f"{scenario.seed} {number}")
        )
        client = Client(number, strategy, watched, self.random.random() * POLL_INTERVAL)
        self.clients.append(client)
        return client

    # -- events ----------------------------------------------------------------------------------------------

    def at(self, moment: float, call: Callable[..., object], *arguments: Any) -> None:
        heapq.heappush(self._events, (moment, next(self._order), call, arguments))

    def step(self, process: Process, token: int) -> None:
        """Go on with a process until it sleeps again."""
        if token != process.token:
            return
        assert process.steps is not None
        process.token += 1
        process.parked = False
        pause = next(process.steps, None)
        if pause is not None:
            process.parked = pause < 0
            self.at(self.now + abs(pause), self.step, process, process.token)

    def wake(self, process: Process) -> None:
        if process.parked:
            process.parked = False
            process.token += 1
            self.at(self.now, self.step, process, process.token)

    def run(self) -> None:
        for job in self.jobs:
            self.at(job.arrival, self._arrive, job)
        while self._events:
            moment, _, call, arguments = heapq.heappop(self._events)
            if moment > self.end:
                self.now = self.end
                return
            self.now = moment
            call(*arguments)

    def _delay(self) -> float:
        return self.scenario.latency * (0.5 + self.random.expovariate(2.0))

    def count(self, server: Server) -> None:
        index = int(self.now / BIN)
        server.bins[index] = server.bins.get(index, 0) + 1

    # -- looking ---------------------------------------------------------------------------------------------

    def phase(self, client: Client, server: Server) -> float:
        """When in the interval this client polls this server: anything that is spread evenly."""
        if not self.scenario.spread_polls:
            return client.phase
        return client.phase + (client.number * 0.754877666 + server.number * 0.618033989) % 1.0 * POLL_INTERVAL

    def last_poll(self, client: Client, server: Server, now: float) -> float:
        return now - (now - self.phase(client, server)) % POLL_INTERVAL

    def look(self, client: Client, request: GPURequest) -> list[Seen]:
        """What `GPUPool._look` does, for a client whose readings are as old as its last polls."""
        now, hearsay, kind = self.now, client.hearsay, KINDS.index(request)
        phases = client.phases
        rivals = self.rivals.per_second(now) * len(client.watched) / len(self.servers)
        seen = []
        for number in client.watched:
            server = self.servers[number]
            phase = phases.get(number)
            if phase is None:
                phase = phases[number] = self.phase(client, server)
            polled = now - (now - phase) % POLL_INTERVAL
            share = 1.0
            if server.down:
                share, usable_now = self._health(server, client, polled)
                if not usable_now:
                    continue
                while server.is_down(polled):
                    polled -= POLL_INTERVAL
            mask = server.masks[-1] if server.times[-1] <= polled else server.at(polled)
            if hearsay and number in hearsay:
                heard_at, heard = hearsay[number]
                if now - heard_at < HEARSAY_TIME:
                    mask |= heard
                else:
                    del hearsay[number]
            known = server.known[kind][mask]
            if known is None:
                known = server.known[kind][mask] = server.filtered(mask, request)
            if known[0] or known[1]:
                seen.append(Seen(server, known, share, now - polled, rivals))
        return seen

    def _health(self, server: Server, client: Client, polled: float) -> tuple[float, bool]:
        """The share of decisions that a server which fails gets, and whether it is asked at all."""
        begin, end = server.down[0]
        if polled < begin:
            return 1.0, True
        if polled < end:
            return 0.0, polled - begin < (BREAKER_FAILURES - 1) * POLL_INTERVAL
        if end - begin < BREAKER_FAILURES * POLL_INTERVAL:
            return 1.0, True
        # The open breaker's probes come at periods up to REINTRODUCED: it is found to be back at some time within one.
        back = end + REINTRODUCED * ((client.number * 0.618033989 + server.number * 0.754877666) % 1.0)
        if self.now < back:
            return 0.0, False
        return min(1.0, FIRST_SHARE + (1 - FIRST_SHARE) * (self.now - back) / REINTRODUCED), True

    # -- acquiring -------------------------------------------------------------------------------------------

    def _arrive(self, job: Job) -> None:
        client = self._client()
        if client is None:
            self.turned_away += 1  # more jobs than clients: nobody there to ask
            job.number = -1
            return
        insort(self.unserved, job.number)
        process = Process()
        process.steps = self._acquire(client, job, process)
        self.step(process, 0)

    def _acquire(self, client: Client, job: Job, process: Process) -> Steps:
        """What `GPUPool._obtain` does."""
        chance = self.random.random
        asking = attempts(self.look(client, job.request), job.request, client.strategy, chance)
        each = next(asking, None)
        while each is not None:
            job.claims += 1
            outcome = yield from self._claim(client, job, each, queue=False)
            if isinstance(outcome, Granted):
                self._granted(client, job, each.server, outcome)
            try:
                each = asking.send(isinstance(outcome, Granted))
            except StopIteration:
                each = None
        if job.granted_at is None:
            waiter = self.waiters[str(job.number)] = Waiter(client, job, process)
            self.most_waiting = max(self.most_waiting, len(self.waiters))
            yield from self._wait_for(waiter)

    def _wait_for(self, waiter: Waiter) -> Steps:
        """What `GPUPool._wait_for` does."""
        client, job, chance = waiter.client, waiter.job, self.random.random
        widened_at = -math.inf
        while True:
            if self.now - widened_at >= POLL_INTERVAL:
                self._count_polls(client)
                client.watched.widen()
                widened_at = self.now
            if waiter.hints and (new := client.watched.want(waiter.hints)):
                self._count_polls(client)
                for number in new:
                    self.count(self.servers[number])
                yield self._delay() + self._delay()
            seen = self.look(client, job.request)
            order = ordered(seen, job.request, client.strategy, chance)
            free_at = promising(order, self.now - job.arrival, lambda each: each.server.number)
            rest = list({each.server.number for each in seen}.difference(free_at))
            self.random.shuffle(rest)
            by_number = {each.server.number: each for each in seen}
            hints, waiter.hints = waiter.hints, []
            if self.scenario.tickets == "everywhere":
                plan: Sequence[Any] = [*free_at, *rest]
            else:
                plan = waiter.tickets.round([*free_at, *rest], free_at, hints, self.now)
            for number in plan:
                if number in hints or by_number[number].free:
                    job.claims += 1
                    job.later += 1
                else:
                    job.tickets += 1
                waiter.since.setdefault(number, self.now)
                outcome = yield from self._claim(client, job, by_number[number], queue=True)
                if isinstance(outcome, Granted):
                    client.strategy.feedback(f"server{number}", True)
                    self._granted(client, job, self.servers[number], outcome)
                    self._leave(waiter, number)
                    return
                if number in free_at:
                    client.strategy.feedback(f"server{number}", False)
                waiter.tickets.left(number, outcome.position if isinstance(outcome, Queued) else None, self.now)
            if not waiter.hints:
                yield -min(RECHECK, waiter.tickets.pause())

    def _claim(self, client: Client, job: Job, seen: Seen, *, queue: bool) -> Generator[float, None, Outcome | None]:
        """One exchange with an arbiter; None: it cannot be reached."""
        server = seen.server
        claim = Claim(
            id=str(job.number),
            holder=client.holder,
            groups=(tuple([Wanted(card.key) for card in (*seen.free, *seen.taken)]),),
            waited=self.now - job.arrival,
            queue=queue,
        )
        yield self._delay()
        self.count(server)
        if server.number in self.crowd_at:
            self.crowd_at[server.number].append(self.now)
        if server.is_down(self.now):
            yield self._delay()
            return None
        outcome = server.store.claim(claim)
        held = server.held
        if isinstance(outcome, Granted):
            # The holder's job begins when it hears of it, which the arbiter does not wait for.
            key = outcome.lease.cards[0]
            assert not held >> server.keys.index(key) & 1, "granted twice"
            server.busy_since[key] = self.now
            server.change(key, True)
            self.at(
                self.now + self.scenario.visible_after, server.show, key, True, self.now + self.scenario.visible_after
            )
            job.held = self.now, math.inf
            # Who watches everything sees it when it polls that server next.
            self.at(self.now + POLL_INTERVAL * self.random.random(), self._seen_taken)
            self.at(self.now + 2 * self.scenario.latency + job.duration, self._release, server, key, claim.id, client)
        yield self._delay()
        if not isinstance(outcome, Granted):
            client.hearsay[server.number] = self.now, held
        return outcome

    def _seen_taken(self) -> None:
        self.rivals.took(1, self.now)

    def _granted(self, client: Client, job: Job, server: Server, outcome: Granted) -> None:
        job.granted_at = self.now
        job.server = server
        job.key = outcome.lease.cards[0]
        position = bisect_left(self.unserved, job.number)
        job.passed = sum(1 for n in self.unserved[:position] if self.jobs[n].arrival < job.arrival - SAME_TIME)
        del self.unserved[position]
        self._count_polls(client)
        client.watched.narrow()

    def _leave(self, waiter: Waiter, granted_by: int) -> None:
        """As `telling.Teller` does: its tickets elsewhere are withdrawn all at once, and it does not wait for that."""
        self.waiters.pop(str(waiter.job.number), None)
        for number, since in waiter.since.items():
            self.listens[number] += (self.now - since) / LISTEN
            if number != granted_by:
                self.at(self.now + self._delay(), self._withdraw, self.servers[number], str(waiter.job.number))

    def _withdraw(self, server: Server, claim_id: str) -> None:
        self.count(server)
        server.store.withdraw([claim_id])

    def _hinted(self, server: Server, ids: Iterable[str]) -> None:
        for claim_id in ids:
            if claim_id in self.waiters:
                self.count(server)
                self.at(self.now + self._delay(), self._hear, claim_id, server.number)

    def _hear(self, claim_id: str, number: int) -> None:
        waiter = self.waiters.get(claim_id)
        if waiter is not None:
            waiter.hints.append(number)
            self.wake(waiter.process)

    def _release(self, server: Server, key: str, claim_id: str, client: Client | None) -> None:
        if server.is_down(self.now):  # as the pool: again after a while
            self.at(self.now + 5.0, self._release, server, key, claim_id, client)
            return
        self.count(server)
        server.used += self.now - server.busy_since.pop(key)
        server.change(key, False)
        server.show(key, False, self.now)
        server.store.release([claim_id])
        if client is not None:
            job = self.jobs[int(claim_id)]
            job.held = job.held[0], self.now
            self.idle.append(client)
        if not len(server.store._queue) and self.waiters:
            # No ticket names it: who waits sees it at its next poll.
            for waiter in itertools.islice(self.waiters.values(), 64):
                if server.number in waiter.client.watched:
                    seen_at = self.last_poll(waiter.client, server, self.now) + POLL_INTERVAL + self._delay()
                    self.at(seen_at, self._notice, str(waiter.job.number), server)

    def _notice(self, claim_id: str, server: Server) -> None:
        waiter = self.waiters.get(claim_id)
        if waiter is not None and server.held + 1 != 1 << len(server.cards):
            self.wake(waiter.process)

    def _count_polls(self, client: Client) -> None:
        """Sum up the polls of a client since it was last counted."""
        self.polls += len(client.watched) * (self.now - client.counted_at) / POLL_INTERVAL
        client.counted_at = self.now


# -- the yardstick, and what is reported ---------------------------------------------------------------------------


def central_queue(world: World) -> list[float]:
    """Seconds that each job would wait in one queue for all GPUs; empty with two models, where no such queue is."""
    pools: dict[str, list[float]] = {}
    for server in world.servers:
        pools.setdefault(server.cards[0].reading.name, []).extend([0.0] * len(server.cards))
    if len(pools) > 1:
        return []
    (free_at,) = pools.values()
    for number, duration in enumerate(world.filled):
        free_at[number] = duration
    heapq.heapify(free_at)
    waits = []
    for job in world.jobs:
        if job.number < 0:  # turned away
            waits.append(0.0)
            continue
        begin = max(job.arrival, free_at[0])
        heapq.heapreplace(free_at, begin + job.duration)
        waits.append(begin - job.arrival)
    return waits


def percentile(values: Sequence[float], percent: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * percent / 100.0))] if values else 0.0


def simulate(scenario: Scenario) -> dict[str, Any]:
    """Run it; what came of it, as plain values."""
    world = World(scenario)
    collects = gc.isenabled()
    gc.disable()  # what is made here lives long, and looking for cycles in it takes half the time
    try:
        world.run()
        return report(world)
    finally:
        if collects:
            gc.enable()


def report(world: World) -> dict[str, Any]:
    scenario = world.scenario
    for client in world.clients:
        world._count_polls(client)
    for waiter in world.waiters.values():
        for number, since in waiter.since.items():
            world.listens[number] += (world.now - since) / LISTEN
    for server in world.servers:
        server.used += sum(world.now - since for since in server.busy_since.values())
    begin = int(0.2 * len(world.jobs))
    counted = [job for job in world.jobs[begin:] if job.number >= 0]
    served = [job for job in counted if job.granted_at is not None]
    # Who still waits has waited so long at least.
    waits = [(world.now if job.granted_at is None else job.granted_at) - job.arrival for job in counted]
    ideal = central_queue(world)[begin:]
    # Who still waits at the end counts up to the end here too.
    ideal = [
        min(wait, world.now - job.arrival)
        for wait, job in zip(ideal, world.jobs[begin:], strict=False)
        if job.number >= 0
    ]
    shares = [server.used / len(server.cards) for server in world.servers]
    busiest = max((count for server in world.servers for count in server.bins.values()), default=0) / BIN
    seconds = max(world.now, 1e-9)
    # Those that never asked for anything in the time that was simulated, holding a GPU or not, poll as well.
    silent = max(0, (scenario.clients or 0) - len(world.clients))
    watched = min(scenario.watch or scenario.endpoints, scenario.endpoints)
    mean_polls = (world.polls / seconds + silent * watched / POLL_INTERVAL) / len(world.servers)
    members = [0] * len(world.servers)
    for client in world.clients:
        for number in client.watched:
            members[number] += 1
    if watched < scenario.endpoints:
        chance = random.Random(f"{scenario.seed} silent")
        for _ in range(silent):
            for number in chance.sample(range(scenario.endpoints), watched):
                members[number] += 1
    crowd = max(members) / (sum(members) / len(members)) if sum(members) else 1.0
    events = [sum(server.bins.values()) / seconds for server in world.servers]
    requests = [e + listens / seconds for e, listens in zip(events, world.listens, strict=True)]
    result: dict[str, Any] = {
        **attrs.asdict(scenario),
        "gpus": world.gpus,
        "clients_used": len(world.clients),
        "arrived": sum(1 for job in world.jobs if job.number >= 0),
        "granted": sum(1 for job in world.jobs if job.granted_at is not None),
        "unserved": len(world.unserved),
        "turned_away": world.turned_away,
        "claims_per_grant": sum(job.claims for job in counted) / max(1, len(served)),
        "first_claims_per_grant": sum(job.claims - job.later for job in counted) / max(1, len(served)),
        "tickets_per_grant": sum(job.tickets for job in counted) / max(1, len(served)),
        "most_waiting": world.most_waiting,
        "wait_p50": percentile(waits, 50),
        "wait_p99": percentile(waits, 99),
        "ideal_p50": percentile(ideal, 50),
        "ideal_p99": percentile(ideal, 99),
        "balance": sum(shares) ** 2 / (len(shares) * sum(x * x for x in shares)),
        "overtaking": sum(1 for job in served if job.passed) / max(1, len(served)),
        "passed_mean": sum(job.passed for job in served) / max(1, len(served)),
        "requests_mean": mean_polls + sum(requests) / len(requests),
        "requests_max": mean_polls * crowd + max(max(requests), busiest),
        "polls_mean": mean_polls,
        "simulated_seconds": world.now,
    }
    if result["ideal_p99"] >= JUDGED_WAIT:
        result["p99_ratio"] = result["wait_p99"] / result["ideal_p99"]
    if world.crowd_at:
        result["herd"] = herd(world)
    return result


def herd(world: World) -> float:
    """Claims at servers in the first `HERD_TIME` seconds after their recovery, by what servers get on average."""
    usual = sum(job.claims + job.tickets for job in world.jobs) / world.now / len(world.servers)
    rush = sum(
        1
        for number, moments in world.crowd_at.items()
        for moment in moments
        if 0.0 <= moment - world.servers[number].down[0][1] < HERD_TIME
    )
    return rush / HERD_TIME / len(world.crowd_at) / usual


# -- what is run -----------------------------------------------------------------------------------------------------


def scenarios(mode: str) -> dict[str, list[Scenario]]:
    """What is simulated, by section of the report."""
    full = mode == "full"
    seeds = {"smoke": (1,), "quick": (1,), "full": (1, 2, 3)}[mode]
    #: Of what has targets.
    more = {"smoke": (1,), "quick": (1,), "full": (1, 2, 3, 4, 5)}[mode]
    jobs = {"smoke": 60, "quick": 1500, "full": 4000}[mode]
    sizes = {"smoke": (2,), "quick": (5, 50), "full": (5, 10, 50, 125)}[mode]
    crowd = {"smoke": 3, "quick": 125, "full": 125}[mode]
    largest = {"smoke": 4, "quick": 1000, "full": 2000}[mode]
    result: dict[str, list[Scenario]] = {}
    result["strategies"] = [
        Scenario(crowd, duration=duration, jobs=jobs, seed=seed, strategy=strategy, spread_polls=strategy != "strict")
        for strategy in ("availability", "strict")
        for duration in (600.0, 60.0, 10.0)
        for seed in (more if strategy == "availability" else seeds)
    ]
    result["waiting"] = [
        Scenario(size, load=0.95, duration=duration, jobs=jobs, seed=seed)
        for size in sizes
        for duration in ((600.0, 60.0, 10.0) if full else (60.0,))
        for seed in more
    ]
    result["load"] = [
        Scenario(min(crowd, 50), load=load, duration=60.0, jobs=jobs // 2, seed=seed)
        for load in ((0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1) if full else (0.5, 0.8, 1.1))
        for seed in seeds
    ]
    result["mixed"] = [
        Scenario(min(crowd, 50), duration=60.0, jobs=jobs // 2, seed=seed, mixed=True, load=0.9) for seed in seeds
    ]
    result["recovery"] = [
        Scenario(
            min(crowd, 50), load=0.8, duration=60.0, jobs=jobs, seed=seed, failing=0.1, outage=120.0, strategy=strategy
        )
        for strategy in ("availability", "strict")
        for seed in seeds
    ]
    result["late readings"] = [
        Scenario(crowd, duration=duration, jobs=jobs // 2, seed=seed, visible_after=30.0)
        for duration in ((600.0, 60.0) if full else (600.0,))
        for seed in seeds[:1]
    ]
    result["largest"] = [
        Scenario(
            largest,
            load=load,
            duration=600.0,
            jobs=jobs // 2,
            backlog=backlog,
            clients=10 * largest,
            watch=watch_most(None, max(501, largest)),
        )
        for load, backlog in ((0.95, 0), (1.1, largest // 2 if full else largest // 4))
    ]
    return result


COLUMNS = {
    "claims_per_grant": "claims per grant",
    "tickets_per_grant": "tickets per grant",
    "wait_p50": "wait p50, s",
    "wait_p99": "wait p99, s",
    "ideal_p99": "central p99, s",
    "p99_ratio": "p99 ÷ central",
    "balance": "balance",
    "overtaking": "overtook, %",
    "passed_mean": "overtaken, mean",
    "requests_max": "requests/s, busiest",
    "herd": "herd",
}


def label(row: Mapping[str, Any]) -> str:
    """The scenario of a row in words."""
    words = [f"{row['endpoints']} servers, {row['gpus']} GPUs, {100 * row['load']:.0f} %, {row['duration']:.0f} s"]
    words += [row["strategy"]] if row["strategy"] != "availability" else []
    words += [name for name in ("mixed",) if row[name]]
    words += [f"{100 * row['failing']:.0f} % fail for {row['outage']:.0f} s"] if row["failing"] else []
    words += [f"visible after {row['visible_after']:.0f} s"] if row["visible_after"] else []
    words += [f"watching {row['watch']}"] if row["watch"] else []
    words += [f"{row['clients']} clients"] if row["clients"] else []
    words += [f"{row['backlog']} waiting at the start"] if row["backlog"] else []
    return ", ".join(words)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of one section as Markdown; of several seeds the median, and the range where it says more."""
    columns = [name for name in COLUMNS if any(name in row for row in rows)]
    lines = ["| " + " | ".join(["scenario", *(COLUMNS[name] for name in columns)]) + " |"]
    lines.append("| --- |" + " ---: |" * len(columns))
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(label(row), []).append(row)
    for words, group in groups.items():
        cells = [_cell(name, [row[name] for row in group if name in row]) for name in columns]
        lines.append("| " + " | ".join([words, *cells]) + " |")
    return "\n".join(lines)


def _cell(name: str, values: Sequence[float]) -> str:
    if not values:
        return ""
    scale = 100.0 if name == "overtaking" else 1.0
    middle, low, high = (f"{scale * v:.3g}" for v in (statistics.median(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low}–{high})"


def run_all(mode: str, workers: int = 1, say: Callable[[str], object] = print) -> dict[str, list[dict[str, Any]]]:
    """Run every scenario of the mode; the results by section."""
    results: dict[str, list[dict[str, Any]]] = {}
    with multiprocessing.Pool(workers) if workers > 1 else contextlib.nullcontext() as pool:
        for section, wanted in scenarios(mode).items():
            results[section] = list(pool.map(simulate, wanted, 1) if pool is not None else map(simulate, wanted))
            seeds = sorted({scenario.seed for scenario in wanted})
            say(f"\n## {section} (seeds {', '.join(map(str, seeds))})\n\n{table(results[section])}")
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulate", description=__doc__)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quick", dest="mode", action="store_const", const="quick", help="under a minute (default)")
    how.add_argument("--full", dest="mode", action="store_const", const="full", help="all sizes, several seeds")
    how.add_argument("--smoke", dest="mode", action="store_const", const="smoke", help="only show that it runs")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that simulate (default 1)")
    parser.add_argument("--json", metavar="FILE", help="also write the results there")
    parser.add_argument("--one", metavar="JSON", help='one scenario, such as \'{"endpoints": 50, "load": 0.8}\'')
    parser.add_argument("--plots", metavar="FILE", help="draw docs/scale-*.png of the results in this file")
    options = parser.parse_args(arguments)
    if options.plots:
        from benchmarks import _plots

        _plots.draw(json.loads(Path(options.plots).read_text()))
        return 0
    if options.one:
        print(json.dumps(simulate(Scenario(**json.loads(options.one))), indent=1))
        return 0
    begin = time.monotonic()
    results = run_all(options.mode or "quick", options.workers)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{time.monotonic() - begin:.0f} s in all", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
