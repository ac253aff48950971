"""
``python -m benchmarks.soak``: long, seeded chaos among processes that share cards, and a judge that knows no pools.

Workers (`benchmarks._soak_worker`) acquire, hold, release and fork; meanwhile they are killed, stopped, continued and
interrupted, the arbiter is killed, frozen and restarted, and their connections to it (`benchmarks._proxy`) are cut,
truncated, or lead nowhere for a while.  What the workers say they held and what was done to them is judged afterwards
by
`judge`: overlaps, fencing tokens, leaks, starvation, order, leases that were lost for nothing, errors that nobody
should see, and the time from the death of a holder until its card is held again.  The exit status is 0 only if all is
well.
"""

from __future__ import annotations

import argparse
import bisect
import collections
import contextlib
import errno
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs

from benchmarks._harness import clean_environment, say
from benchmarks._proxy import Direction, FaultProxy
from gpupool_sync.testing import FakeFleet

ROOT = Path(__file__).resolve().parent.parent
STORES = ("host", "server", "redis")

#: Seconds of a ttl in the soak; the least that holders elsewhere may be cut off.
TTL = 3.0
#: A lease that was renewed just in time when its holder was stopped is good for so long, at least.
GOOD_AFTER_STOP = (0.8 - 1.0 / 3.0) * TTL
#: Seconds from the death of a holder until a waiter has its card, over the ttl where there is one (p99).
TAKEOVER = 1.5
#: Seconds by which somebody must have asked later, to count as served out of order.
LATER = 2.0
#: Seconds between the grants of two waiters that may be noted in the other order.
BLUR = 0.1
#: Seconds that a live worker waits at most, apart from outages of the arbiter; also what makes it a starved one.
PATIENCE = 15.0
#: Seconds after an outage in which waiters find their way back.
RECOVERY = 3.0
#: Seconds from one outage of the arbiter to the next, at least.
OUTAGES = 10.0
#: Seconds that a restart of the arbiter may take on a machine that has far too much to do; it counts as outage.
PATIENT = 300.0
#: What makes it unreachable: each kind has its turn.
OUTAGES_OF = ("kill arbiter", "freeze arbiter", "one-way", "blackhole")
#: The one more where its files have a disk of their own.
DISK_FULL = "disk full"
#: Bytes of such a disk: room for the log of a Redis that is rewritten now and then.
DISK = 256 * 1024 * 1024
#: Set where the process has a mount namespace of its own: its mounts go when it goes, however it ends.
UNSHARED = "SOAK_UNSHARED"
#: Seconds that an `acquire` of a worker waits at most.
ACQUIRE = 20.0
#: Seconds after which a forked child has ended, one way or another.
CHILD_LIFE = 30.0
#: Seconds that a forked child whose parent is killed just then may take until its first note.
BIRTH = 2.0
#: Waits of forked children that are too few to say anything about all of them.
FEW_CHILDREN = 5
#: What stands above each stack that `faulthandler` writes.
STACKS = "(most recent call first)"
#: How a wait may end without a card and without anybody having done wrong.
EXPECTED = ("served", "timeout", "interrupted", "gone", "lost before it began")


# -- what the log says -----------------------------------------------------------------------------------------


@attrs.frozen
class Span:
    """A piece of time."""

    begin: float
    end: float

    def meets(self, begin: float, end: float) -> bool:
        """Whether it has an instant in common with this one."""
        return self.begin <= end and begin <= self.end


@attrs.frozen
class Hold:
    """Somebody certainly held a card from *begin* to *end*."""

    key: str
    who: str
    token: int
    asked: float
    begin: float
    end: float
    #: How many may share the card with this kind of hold.
    places: int = 1
    #: When its holder was killed, if that ended it; where forked children keep its card as long as they live, when the
    #: last of them ended.
    killed: float | None = None
    #: When its holder saw that it was lost.
    lost: float | None = None


@attrs.frozen
class Ask:
    """Somebody waited from *begin* to *end* for *count* cards, or for a share."""

    who: str
    begin: float
    end: float
    count: int = 1
    places: int = 1
    #: "served", else why it ended.
    outcome: str = "served"

    @property
    def plain(self) -> bool:
        """Whether it is for one whole card, as most are: only these are compared with one another."""
        return self.count == 1 and self.places == 1


@attrs.frozen
class Worker:
    """The life of one: from its pool's opening to its end, stops, what it got."""

    who: str
    ready: float
    gone: float
    stops: tuple[Span, ...] = ()
    got: int = 0
    #: What its pool still held when it ended by itself.
    left: int = 0
    #: Files of cards that it had open between two rounds.
    leaked: tuple[str, ...] = ()
    #: Forked from another worker; it asks once.
    child: bool = False

    def stopped_within(self, begin: float, end: float) -> bool:
        return any(stop.meets(begin, end) for stop in self.stops)

    def running(self) -> float:
        return self.gone - self.ready - sum(stop.end - stop.begin for stop in self.stops)


@attrs.frozen
class History:
    """All that happened, from the log of the workers and the notes of who tormented them."""

    holds: Sequence[Hold]
    asks: Sequence[Ask]
    workers: Sequence[Worker]
    #: When the arbiter could not be reached.
    outages: Sequence[Span] = ()
    end: float = 0.0
    #: Whether a stopped holder loses its lease.
    ttl: bool = False
    #: What the workers themselves found wrong, in words.
    wrong: Sequence[str] = ()

    def disturbed(self, begin: float, end: float) -> bool:
        """Whether the arbiter was away in this time, or the waiters were still finding their way back to it."""
        return any(outage.meets(begin - RECOVERY, end) for outage in self.outages)


def understand(notes: Iterable[dict[str, Any]], events: Iterable[dict[str, Any]], *, ttl: bool, end: float) -> History:
    """
    Make a history of the notes of the workers and the events of their tormentor.

    A hold without an end counts until its holder was killed.  One whose holder may lose it while it is stopped counts
    for certain only until the last instant at which it was told to be good, or, untold, for what the ttl leaves of it
    after the stop; one that was told to be good at its end counts to its end, stops or not.  Where there is no ttl, the
    forked children of a killed holder keep its card as long as they live.
    """
    by_who: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    of_kind: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for note in notes:
        by_who[note["who"]].append(note)
        of_kind[note["note"]].append(note)
    stops: dict[str, list[Span]] = collections.defaultdict(list)
    opened: dict[str, float] = {}
    killed: dict[str, float] = {}
    outages: list[Span] = []
    down: float | None = None
    for event in events:
        kind, at = event["event"], event["at"]
        if kind == "stop":
            opened[event["who"]] = at
        elif kind == "continue":
            stops[event["who"]].append(Span(opened.pop(event["who"]), at))
        elif kind == "kill":
            killed[event["who"]] = at
            if event["who"] in opened:
                stops[event["who"]].append(Span(opened.pop(event["who"]), at))
        elif kind == "down" and down is None:
            down = at
        elif kind == "up" and down is not None:
            outages.append(Span(down, at))
            down = None
    if down is not None:
        outages.append(Span(down, end))

    # Threads of one process die and stop together; a forked child is a process of its own.
    process = {note["who"]: note.get("of", note["who"]) for note in of_kind["ready"]}
    left_at = {note["who"]: note["at"] for note in of_kind["left"]}
    children = [
        _Child(note["who"], note["parent"], note["forked"], note["at"], left_at.get(note["who"]))
        for note in of_kind["ready"]
        if "parent" in note
    ]
    wrong = [f"{note['who']}: {note['text']}" for note in of_kind["wrong"]]
    wrong += [f"{note['who']}: {note['why']}: {note.get('text', '')}" for note in of_kind["error"]]
    seen = {child.who for child in children}
    for note in of_kind["fork"]:
        # Who is killed may be so before the fork that it has just announced.
        born = note["child"] in seen or killed.get(note["who"], end) - note["at"] > BIRTH
        if born and note["child"] not in left_at:
            wrong.append(f"{note['child']}, forked at {note['at']}, did not end by itself")

    holds: list[Hold] = []
    asks: list[Ask] = []
    workers: list[Worker] = []
    for who, mine in by_who.items():
        of = process.get(who, who)
        death = killed.get(of)
        gone = left_at.get(of, end) if death is None else death
        ready, left, got = gone, 0, 0
        leaked: set[str] = set()
        ask: dict[str, Any] | None = None
        held: list[dict[str, Any]] = []
        for note in mine:
            what, at = note["note"], note["at"]
            if what == "ready":
                ready = at
            elif what == "left":
                left = note["held"]
            elif what == "leak":
                leaked.update(note["files"])
            elif what == "ask":
                ask = note
            elif what == "fail" and ask is not None:
                why = note["why"] if note["why"] in EXPECTED else f"{note['why']}: {note.get('text', '')}"
                asks.append(Ask(who, ask["at"], at, ask["count"], ask["places"], why))
                ask = None
            elif what == "begin" and ask is not None:
                asks.append(Ask(who, ask["at"], at, ask["count"], ask["places"]))
                held.append({**note, "asked": ask["at"], "places": ask["places"]})
                got += 1
                ask = None
            elif what == "end":
                held[-1]["good"] = note["good"]
                if note["lost"]:
                    held[-1]["lost"] = at
        if ask is not None:
            asks.append(Ask(who, ask["at"], max(ask["at"], gone), ask["count"], ask["places"], "gone"))
        for hold in held:
            until, death_of_it = hold.get("good"), None
            if until is None:
                until, death_of_it = max(hold["at"], gone), death
                if ttl:
                    # Also one before it began: it may have been granted before that.
                    first = [stop.begin for stop in stops[of] if stop.end >= hold["at"] - TTL][:1]
                    until = min([until, *(max(hold["at"], _good_after(begin, outages)) for begin in first)])
                elif death is not None:
                    heirs = [child for child in children if child.parent == of and child.forked <= death]
                    # What was being granted while it was forked may be the child's as well, or not.
                    until = max([until, *(heir.left or until for heir in heirs if hold["at"] <= heir.forked)])
                    death_of_it = max([death, *(heir.left or end for heir in heirs if hold["asked"] <= heir.ready)])
            holds += [
                Hold(
                    key,
                    who,
                    hold["token"],
                    hold["asked"],
                    hold["at"],
                    until,
                    hold["places"],
                    death_of_it,
                    hold.get("lost"),
                )
                for key in hold["keys"]
            ]
        child = any(child.who == who for child in children)
        workers.append(Worker(who, ready, gone, tuple(stops[of]), got, left, tuple(sorted(leaked)), child))
    holds.sort(key=lambda hold: hold.begin)
    asks.sort(key=lambda ask: ask.begin)
    return History(holds, asks, workers, outages, end, ttl, tuple(wrong))


@attrs.frozen
class _Child:
    """The life of a forked process: before the fork, its first note, its last."""

    who: str
    parent: str
    forked: float
    ready: float
    left: float | None


def _good_after(stop: float, outages: Iterable[Span]) -> float:
    """Until when a lease with a ttl is good whose holder was stopped then: it was renewed before, if it could be."""
    return stop if any(outage.meets(stop - TTL, stop) for outage in outages) else stop + GOOD_AFTER_STOP


# -- what is wrong with it -------------------------------------------------------------------------------------


def _by_key(holds: Iterable[Hold]) -> dict[str, list[Hold]]:
    found: dict[str, list[Hold]] = collections.defaultdict(list)
    for hold in sorted(holds, key=lambda hold: hold.begin):
        found[hold.key].append(hold)
    return found


def overlaps(history: History) -> list[tuple[Hold, Hold]]:
    """Pairs that held one card at the same time, other than as so many places of it."""
    found = []
    for holds in _by_key(history.holds).values():
        active: list[Hold] = []
        for hold in holds:
            active = [other for other in active if other.end > hold.begin]
            rivals = [other for other in active if other.places == 1 or hold.places != other.places]
            if active and (rivals or len(active) >= hold.places):
                found.append(((rivals or active)[0], hold))
            active.append(hold)
    return found


def token_regressions(history: History) -> list[tuple[Hold, Hold]]:
    """Pairs of one card whose later hold has a fencing token that is not larger."""
    found = []
    for holds in _by_key(history.holds).values():
        largest: Hold | None = None  # of the whole holds so far
        shares: list[Hold] = []  # since then
        for hold in holds:
            # Two sharers may note their grants in either order; between whole holds there is only one order.
            before = [other for other in shares if hold.places == 1 or other.end <= hold.asked]
            if largest is not None:
                before.append(largest)
            worst = max(before, key=lambda other: other.token, default=None)
            if worst is not None and hold.token <= worst.token:
                found.append((worst, hold))
            elif hold.places == 1:
                largest, shares = hold, []
            else:
                shares.append(hold)
    return found


def starved(history: History) -> list[str]:
    """Who lived long enough and got nothing, and who waited for longer than anybody has to."""
    away = sum(outage.end - outage.begin + RECOVERY for outage in history.outages)
    found = [
        f"{worker.who} got nothing in {worker.running():.1f} s"
        for worker in history.workers
        if not worker.got and worker.running() - away > PATIENCE
    ]
    workers = {worker.who: worker for worker in history.workers}
    for ask in history.asks:
        if ask.end - ask.begin > PATIENCE and (who := workers.get(ask.who)) is not None:
            waited = _undisturbed(history, who, ask)
            if waited > PATIENCE:
                found.append(f"{ask.who} waited {waited:.1f} s ({ask.outcome})")
    return found


def _undisturbed(history: History, worker: Worker, ask: Ask) -> float:
    """Seconds that somebody waited while it ran and the arbiter was there."""
    away = [*worker.stops, *(Span(outage.begin, outage.end + RECOVERY) for outage in history.outages)]
    return ask.end - ask.begin - _covered(ask.begin, ask.end, away)


@attrs.frozen
class Inversion:
    """*later* was served while *earlier*, who had asked long before and was awake, still waited."""

    earlier: Ask
    later: Ask
    #: The arbiter was away in between: clients come back to it one by one.
    disturbed: bool

    def __str__(self) -> str:
        return (
            f"{self.later.who} asked {self.later.begin - self.earlier.begin:.2f} s after {self.earlier.who} and was"
            f" served {self.earlier.end - self.later.end:.2f} s before it ({self.earlier.outcome}), at {self.later.end}"
        )


def inversions(history: History) -> list[Inversion]:
    """Waiters for one whole card that were passed over, though they were never stopped; one for each of them."""
    workers = {worker.who: worker for worker in history.workers}
    asks = sorted((ask for ask in history.asks if ask.plain), key=lambda ask: ask.begin)
    begins = [ask.begin for ask in asks]
    found = []
    for earlier in asks:
        if earlier.end - earlier.begin <= LATER + BLUR:
            continue
        for later in asks[bisect.bisect_right(begins, earlier.begin + LATER) :]:
            if later.begin >= earlier.end:
                break
            if later.outcome != "served" or later.end >= earlier.end - BLUR:
                continue
            who = workers.get(earlier.who)
            if who is not None and who.stopped_within(earlier.begin, later.end):
                continue
            found.append(Inversion(earlier, later, history.disturbed(earlier.begin, later.end)))
            break
    return found


def lost_for_nothing(history: History) -> list[Hold]:
    """Holds that were lost though their holder ran and the arbiter was there: cut connections are no reason."""
    workers = {worker.who: worker for worker in history.workers}
    found = []
    for hold in history.holds:
        # Renewed for the last time, it may have been, up to a ttl before.
        if hold.lost is None or history.disturbed(hold.begin - TTL, hold.lost):
            continue
        who = workers.get(hold.who)
        if who is None or not who.stopped_within(hold.begin - TTL, hold.lost):
            found.append(hold)
    return found


def errors(history: History) -> list[str]:
    """Waits that ended with an error though the arbiter was there."""
    return [
        f"{ask.who}, which asked at {ask.begin}: {ask.outcome}"
        for ask in history.asks
        if ask.outcome not in EXPECTED and not history.disturbed(ask.begin, ask.end)
    ]


def children_served(history: History) -> tuple[int, int]:
    """Waits of forked children that the arbiter could serve, and how many of them were served."""
    forked = {worker.who for worker in history.workers if worker.child}
    asks = [ask for ask in history.asks if ask.who in forked and not history.disturbed(ask.begin, ask.end)]
    return len(asks), sum(ask.outcome == "served" for ask in asks)


@attrs.frozen
class Takeover:
    """A holder died, and its card was held again after so many seconds in which somebody waited."""

    hold: Hold
    seconds: float
    #: False: nobody got it until the end.
    taken: bool = True
    #: Somebody waited for several cards meanwhile, for whom a free one may be kept.
    reserved: bool = False

    def __str__(self) -> str:
        what = "was held again" if self.taken else "was still not held"
        hold = self.hold
        return f"{hold.key}, whose holder {hold.who} died at {hold.killed}, {what} {self.seconds:.2f} s later"


def takeovers(history: History) -> tuple[list[Takeover], int]:
    """
    How long it took until the card of each dead holder was held again, without the time in which nobody waited.

    Also the number of deaths that say nothing: nobody waited at all, or the arbiter was away.
    """
    workers = {worker.who: worker for worker in history.workers}
    by_key = _by_key(history.holds)
    found, silent = [], 0
    for hold in history.holds:
        death = hold.killed
        if death is None or hold.places != 1:
            continue
        after = [other for other in by_key[hold.key] if other.begin > death]
        until = after[0].begin if after else history.end
        meanwhile = [ask for ask in history.asks if ask.begin < until and ask.end > death]
        waited = _covered(
            death,
            until,
            [piece for ask in meanwhile if ask.plain for piece in _awake(ask, workers.get(ask.who))],
        )
        if not waited or history.disturbed(death, until):
            silent += 1
            continue
        reserved = any(ask.count > 1 for ask in meanwhile)
        found.append(Takeover(hold, waited, bool(after), reserved))
    return found, silent


def _awake(ask: Ask, worker: Worker | None) -> list[Span]:
    """The pieces of a wait in which the waiter was not stopped."""
    pieces, begin = [], ask.begin
    for stop in sorted(worker.stops if worker is not None else (), key=lambda stop: stop.begin):
        if stop.meets(begin, ask.end):
            pieces.append(Span(begin, max(begin, stop.begin)))
            begin = stop.end
    return [*pieces, Span(begin, ask.end)] if begin < ask.end else pieces


def _covered(begin: float, end: float, pieces: Iterable[Span]) -> float:
    """Seconds between *begin* and *end* that lie in any of the *pieces*."""
    covered = 0.0
    for piece in sorted(pieces, key=lambda piece: piece.begin):
        start, stop = max(begin, piece.begin), min(end, piece.end)
        if stop > start:
            covered, begin = covered + stop - start, stop
    return covered


def percentile(values: Sequence[float], share: float) -> float | None:
    """Of the sorted values, the one at this share; None if there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


@attrs.frozen
class Verdict:
    """What was found."""

    measures: dict[str, Any]
    #: What must not be, in words; empty: all is well.
    problems: tuple[str, ...]


def judge(history: History, *, cards: Sequence[str], reclaimed: Sequence[str]) -> Verdict:
    """Judge it; *reclaimed* are those of the *cards* that could be claimed again when all workers were gone."""
    doubles, backwards, hungry = overlaps(history), token_regressions(history), starved(history)
    leaked = [key for key in cards if key not in reclaimed]
    kept = [worker for worker in history.workers if worker.left or worker.leaked]
    inverted = inversions(history)
    wrong = [each for each in inverted if not each.disturbed]
    bound = TAKEOVER + (TTL if history.ttl else 0.0)
    taken, silent = takeovers(history)
    reserved = sum(each.reserved and each.seconds > bound for each in taken)
    taken = [each for each in taken if not each.reserved or each.seconds <= bound]
    p50, p99 = (percentile([each.seconds for each in taken], share) for share in (0.5, 0.99))
    waits = [ask.end - ask.begin for ask in history.asks if ask.outcome == "served"]
    lost = lost_for_nothing(history)
    failed = [*history.wrong, *errors(history)]
    forked, served = children_served(history)
    problems = [f"overlap of {first} and {second}" for first, second in doubles]
    problems += [f"token regression from {first} to {second}" for first, second in backwards]
    problems += [f"leak: {key} could not be claimed after all workers were gone" for key in leaked]
    problems += [f"leak: {worker.who} ended with {worker.left} leases out" for worker in kept if worker.left]
    problems += [
        f"leak: {worker.who} held nothing and had {', '.join(worker.leaked)} open" for worker in kept if worker.leaked
    ]
    problems += [f"starved: {told}" for told in hungry]
    problems += [f"lost for nothing: {hold}" for hold in lost]
    problems += [f"wrong: {told}" for told in failed]
    if forked >= FEW_CHILDREN and 2 * served < forked:
        problems.append(f"starved: {served} of {forked} forked children got anything")
    problems += [f"inversion: {each}" for each in wrong]
    late = sorted((each for each in taken if each.seconds > bound), key=lambda each: -each.seconds)
    if p99 is not None and p99 > bound:
        problems.append(f"late takeover: p99 {p99:.2f} s > {bound:g} s; " + "; ".join(map(str, late[:5])))
    # A p99 of many forgives some; a card that nobody got at all is never forgiven.
    problems += [f"late takeover: {each}" for each in late if not each.taken]
    if not history.holds:
        problems.append("starved: nobody got anything")
    measures = {
        "acquisitions": len(waits),
        "holds": len(history.holds),
        "workers": len(history.workers),
        "overlaps": len(doubles),
        "token_regressions": len(backwards),
        "leaks": len(leaked) + len(kept),
        "starved": len(hungry),
        "inversions": len(wrong),
        "inversions_around_outages": len(inverted) - len(wrong),
        "inversion_worst_s": _rounded(max((each.earlier.end - each.later.end for each in wrong), default=None)),
        "lost": sum(hold.lost is not None for hold in history.holds),
        "lost_for_nothing": len(lost),
        "wrong": len(failed),
        "forked_children": sum(worker.child for worker in history.workers),
        "forked_children_served": sum(worker.child and worker.got > 0 for worker in history.workers),
        "takeovers": len(taken),
        "takeovers_not_judged": silent,
        "takeovers_reserved": reserved,
        "takeover_p50_s": _rounded(p50),
        "takeover_p99_s": _rounded(p99),
        "takeover_max_s": _rounded(max((each.seconds for each in taken), default=None)),
        "takeover_bound_s": bound,
        "takeovers_over_bound": len(late),
        "wait_p50_s": _rounded(statistics.median(waits) if waits else None),
        "wait_p99_s": _rounded(percentile(waits, 0.99)),
        "wait_max_s": _rounded(max(waits, default=None)),
        "not_served": dict(
            collections.Counter(ask.outcome.split(":")[0] for ask in history.asks if ask.outcome != "served")
        ),
    }
    return Verdict(measures, tuple(problems))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


# -- the arbiters ----------------------------------------------------------------------------------------------


class Arbiter:
    """What the workers share; this one, the host's, cannot be killed: it is the kernel."""

    #: Whether it can be killed and frozen.
    mortal = False

    def __init__(self, directory: Path, cards: int, disk: Disk | None = None) -> None:
        #: Between the workers and what they need of it.
        self.proxies: list[FaultProxy] = []
        self.settings: dict[str, Any] = {}
        self._disk = disk
        self._files = directory if disk is None else disk.path
        self.environment = {"GPU_POOL_LOCK_DIR": str(self._files / "locks")}
        self.keys = [f"GPU-{0:08x}-0000-4000-8000-{index:012x}" for index in range(cards)]

    @property
    def outages(self) -> tuple[str, ...]:
        """What can make it unreachable, or unable to grant."""
        return (*(OUTAGES_OF if self.mortal else ()), *((DISK_FULL,) if self._disk is not None else ()))

    def kill(self) -> None: ...

    def restart(self) -> None: ...

    def freeze(self) -> None: ...

    def thaw(self) -> None: ...

    def fill(self) -> None:
        """Its files have no more room."""
        assert self._disk is not None
        self._disk.fill()

    def drain(self) -> None:
        """Undo `fill`."""
        assert self._disk is not None
        self._disk.drain()

    def close(self) -> None:
        for proxy in self.proxies:
            proxy.close()


class Disk:
    """A small file system in memory, mounted for the arbiter's files; root may do so."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        # As the directory for everybody's temporary files.
        options = f"size={DISK},mode=1777"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "soak", str(path)], check=True, timeout=20.0)
        self._filler = path / "filler"

    def fill(self) -> None:
        """Nobody can write anything new to it any more."""
        with open(self._filler, "ab") as file:
            size, piece = 0, DISK
            while piece >= 4096:
                try:
                    os.posix_fallocate(file.fileno(), size, piece)
                    size += piece
                except OSError as exc:
                    if exc.errno != errno.ENOSPC:
                        raise
                    piece //= 2

    def drain(self) -> None:
        """There is room again."""
        self._filler.unlink(missing_ok=True)

    def close(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.path)], check=True, timeout=20.0)


class _Server(Arbiter):
    """One server of ours that grants leases on simulated cards."""

    mortal = True
    _leases = True

    def __init__(self, directory: Path, cards: int, disk: Disk | None = None) -> None:
        super().__init__(directory, cards, disk)
        with _temporary_files_in(self._files if disk is not None else None):
            self._fleet = FakeFleet([cards], leases=self._leases)
        try:
            self.proxies.append(FaultProxy("127.0.0.1", self._fleet[0].port))
            self.settings = {"url": self.proxies[0].url}
            self.keys = _keys(self._fleet[0].url, cards)
        except BaseException:
            self.close()
            raise

    def kill(self) -> None:
        self.proxies[0].refuse()
        self._fleet[0].kill()

    def restart(self) -> None:
        self._fleet[0].restart(PATIENT)
        self.proxies[0].refuse(False)

    def freeze(self) -> None:
        self._fleet[0].freeze()

    def thaw(self) -> None:
        self._fleet[0].heal()

    def close(self) -> None:
        super().close()
        self._fleet.close()


class _Redis(_Server):
    """A Redis that has every write on disk before it answers, and a server for the statistics."""

    _leases = False

    def __init__(self, directory: Path, cards: int, disk: Disk | None = None) -> None:
        super().__init__(directory, cards, disk)
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        url = f"redis://127.0.0.1:{self._port}/0"
        try:
            self.proxies.append(FaultProxy("127.0.0.1", self._port))
            self.settings["redis"] = f"redis://127.0.0.1:{self.proxies[1].port}/0"
            self.restart()
            # One that has been known for a while: a new one grants nothing until it is sure to have lost nothing.
            from gpupool_sync.leases.redis import RedisStore

            known = RedisStore(url, quarantine=0.0)
            known.leases()
            known.close()
        except BaseException:
            self.close()
            raise

    def kill(self) -> None:
        if self._process is not None:
            self.proxies[1].refuse()
            self._process.kill()
            self._process.wait(10.0)
            self._process = None

    def restart(self) -> None:
        options = ["--bind", "127.0.0.1", "--dir", str(self._files), "--save", "", "--appendonly", "yes"]
        options += ["--auto-aof-rewrite-min-size", "16mb"]
        with open(self._directory / "redis.log", "ab") as log:
            self._process = subprocess.Popen(
                ["redis-server", "--port", str(self._port), *options, "--appendfsync", "always"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + 20.0
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(
                    f"redis-server did not start:\n{(self._directory / 'redis.log').read_text()[-2000:]}"
                )
            time.sleep(0.01)
        self.proxies[1].refuse(False)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port), 1.0) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")
        return False

    def freeze(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    def drain(self) -> None:
        super().drain()
        # It ends itself when it cannot write what it must have written before it answers.
        self.kill()
        self.restart()

    def close(self) -> None:
        try:
            if getattr(self, "_process", None) is not None:
                self.kill()
        finally:
            super().close()


ARBITERS: dict[str, type[Arbiter]] = {"host": Arbiter, "server": _Server, "redis": _Redis}


@contextlib.contextmanager
def _temporary_files_in(directory: Path | None) -> Iterator[None]:
    """New temporary files are made there; None: where they always are."""
    before = tempfile.tempdir
    tempfile.tempdir = before if directory is None else str(directory)
    try:
        yield
    finally:
        tempfile.tempdir = before


def _keys(url: str, number: int) -> list[str]:
    from gpupool_sync import GPUPool
    from gpupool_sync.leases.memory import MemoryStore

    with GPUPool([url], lease_store=MemoryStore()) as pool, pool.gpus(number, timeout=20.0, local=False) as gpus:
        return [str(gpu.uuid) for gpu in gpus]


# -- the torment -----------------------------------------------------------------------------------------------


@attrs.define
class _Process:
    who: str
    process: subprocess.Popen[bytes]
    errors: Path
    born: float
    stopped_until: float | None = None


class Soak:
    """One run: starts everything, torments it, ends everything."""

    def __init__(self, options: argparse.Namespace, directory: Path) -> None:
        self._options = options
        self._directory = directory
        self._random = random.Random(options.seed)
        self._events: list[dict[str, Any]] = []
        self._processes: list[_Process] = []
        self._number = 0
        self._log = directory / "log"
        self._stop = directory / "stop"
        self._problems: list[str] = []
        self._arbiter: Arbiter | None = None
        self._up_at: float | None = None  # when the arbiter is to come back
        self._come_back: Callable[[], None] = lambda: None
        self._outages: list[str] = []  # those that are next: every kind has its turn
        self.swallowed = 0  # interrupts
        self._states: dict[str, str] = {}  # the last note of each worker that is ready
        self._begun = time.monotonic() - OUTAGES / 2  # the first outage may be early
        self._read = 0  # bytes of the log

    def run(self) -> tuple[Verdict, dict[str, int], list[dict[str, Any]]]:
        """The verdict, the faults by kind, and the notes of the workers."""
        disk = Disk(self._directory / "disk") if self._options.full_disk else None
        try:
            return self._run(disk)
        finally:
            if disk is not None:
                disk.close()

    def _run(self, disk: Disk | None) -> tuple[Verdict, dict[str, int], list[dict[str, Any]]]:
        options = self._options
        self._arbiter = arbiter = ARBITERS[options.store](self._directory, options.cards, disk)
        try:
            for _ in range(options.workers):
                self._start()
            self._await_ready()
            self._torment(time.monotonic() + options.seconds)
            self._end_well()
            self._await_children()
            reclaimed = self._sweep()
        finally:
            for each in self._processes:
                with contextlib.suppress(ProcessLookupError):
                    each.process.kill()
                each.process.wait(10.0)
            arbiter.close()
        notes = read_notes(self._log)
        end = max((note["at"] for note in notes), default=0.0)
        history = understand(notes, self._events, ttl=arbiter.mortal, end=end)
        verdict = judge(history, cards=arbiter.keys, reclaimed=reclaimed)
        faults = collections.Counter(
            event.get("kind", event["event"]) for event in self._events if event["event"] not in ("continue", "up")
        )
        return attrs.evolve(verdict, problems=(*verdict.problems, *self._problems)), dict(faults), notes

    def _settings(self, **more: Any) -> str:
        assert self._arbiter is not None
        settings = {
            "store": self._options.store,
            "cards": self._options.cards,
            "ttl": TTL,
            "log": str(self._log),
            "stop": str(self._stop),
            "timeout": ACQUIRE,
            **self._arbiter.settings,
            **more,
        }
        return json.dumps(settings)

    def _environment(self) -> dict[str, str]:
        assert self._arbiter is not None
        own = {name: value for name, value in os.environ.items() if not name.startswith(("GPU_", "CUDA_"))}
        return {**own, **self._arbiter.environment, "PYTHONWARNINGS": "ignore::DeprecationWarning"}

    def _start(self) -> None:
        self._number += 1
        who = f"worker-{self._number}"
        errors = self._directory / f"{who}.err"
        settings = self._settings(who=who, seed=f"{self._options.seed}/{who}")
        with open(errors, "wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks._soak_worker", settings],
                cwd=ROOT,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self._processes.append(_Process(who, process, errors, time.monotonic()))

    def _await_ready(self) -> None:
        deadline = time.monotonic() + 30.0
        while sum(note["note"] == "ready" for note in read_notes(self._log)) < len(self._processes):
            if time.monotonic() > deadline or any(each.process.poll() is not None for each in self._processes):
                raise RuntimeError(f"the workers do not start: {self._processes[0].errors.read_text()[-3000:]}")
            time.sleep(0.05)

    def _event(self, event: str, **more: Any) -> None:
        # Noted before it is done, except what ends something: then nobody is held to less than is certain.
        self._events.append({"event": event, "at": time.monotonic(), **more})

    def _torment(self, until: float) -> None:
        chance = self._random
        assert self._arbiter is not None
        kinds = {"kill": 4, "stop": 4, "interrupt": 8}
        if self._arbiter.outages:
            kinds["outage"] = 3
        if self._arbiter.proxies:
            kinds |= {"cut connections": 6, "truncated answer": 2}
        next_fault = time.monotonic() + 0.5
        while (now := time.monotonic()) < until:
            self._keep_up(now)
            if now >= next_fault:
                next_fault = now + chance.uniform(0.05, 0.6)
                kind = chance.choices(list(kinds), list(kinds.values()))[0]
                if kind == "outage":
                    self._torment_arbiter(now, until)
                elif kind == "cut connections":
                    self._event("cut", kind=kind)
                    for proxy in self._some_proxies():
                        proxy.cut()
                elif kind == "truncated answer":
                    self._event("cut", kind=kind)
                    for proxy in self._some_proxies():
                        proxy.cut_after(chance.choice([0, 1, chance.randrange(1000)]))
                else:
                    self._torment_worker(kind, now)
            time.sleep(0.01)

    def _follow(self) -> None:
        """Read what the workers have noted since the last time."""
        with open(self._log, "rb") as file:
            file.seek(self._read)
            for line in file:
                if line.endswith(b"\n"):
                    self._read += len(line)
                    note = json.loads(line)
                    self._states[note["who"]] = note["note"]

    def _torment_worker(self, kind: str, now: float) -> None:
        self._follow()
        able = [
            each
            for each in self._processes
            if each.process.poll() is None
            and (kind == "kill" or each.stopped_until is None)
            # Who has just begun cannot be interrupted yet.
            and (kind != "interrupt" or each.who in self._states)
        ]
        if not able:
            return
        # Chance would meet more waiters than holders.
        holders = [each for each in able if self._states.get(each.who) == "begin"]
        each = self._random.choice(holders if holders and self._random.random() < 0.6 else able)
        if kind == "kill":
            self._event("kill", who=each.who)
            each.process.kill()
            each.process.wait(10.0)
            self._look_at(each)
            self._processes.remove(each)
            self._start()
        elif kind == "stop":
            self._event("stop", who=each.who)
            each.process.send_signal(signal.SIGSTOP)
            long = self._random.random() < 0.25
            each.stopped_until = now + (self._random.uniform(2.0, 6.0) if long else self._random.uniform(0.01, 1.0))
        else:
            self._event("interrupt", who=each.who)
            each.process.send_signal(signal.SIGINT)

    def _some_proxies(self) -> list[FaultProxy]:
        assert self._arbiter is not None
        proxies = self._arbiter.proxies
        return self._random.sample(proxies, self._random.randint(1, len(proxies)))

    def _torment_arbiter(self, now: float, until: float) -> None:
        """Make it unreachable for a while."""
        assert self._arbiter is not None
        # Between two of its outages there is time to live.
        last = max((event["at"] for event in self._events if event["event"] == "up"), default=self._begun)
        if self._up_at is not None or now - last < OUTAGES or until - now < 1.0:
            return
        chance = self._random
        if not self._outages:
            self._outages = chance.sample(self._arbiter.outages, len(self._arbiter.outages))
        kind = self._outages.pop()
        proxies = self._some_proxies() if self._arbiter.proxies else []
        seconds = chance.choice([0.0, chance.uniform(0.1, 1.0), chance.uniform(1.0, 5.0)])
        self._event("down", kind=kind)
        if kind == "kill arbiter":
            self._arbiter.kill()
            self._come_back = self._arbiter.restart
        elif kind == "freeze arbiter":
            self._arbiter.freeze()
            self._come_back = self._arbiter.thaw
        elif kind == DISK_FULL:
            self._arbiter.fill()
            self._come_back = self._arbiter.drain
        else:
            if kind == "one-way":
                # Mostly it is the answers that do not arrive: what was asked has been done, and nobody knows.
                seconds = chance.uniform(0.2, 1.5)
                direction: Direction = chance.choice(["up", "up", "up", "down"])
                for proxy in proxies:
                    proxy.one_way(direction)
            else:
                seconds = max(seconds, 0.1)
                for proxy in proxies:
                    proxy.blackhole()
            lossy = chance.random() < 0.5  # else what was kept arrives late

            def heal() -> None:
                for proxy in proxies:
                    if lossy:
                        proxy.cut()
                    proxy.heal()

            self._come_back = heal
        self._up_at = now + seconds

    def _keep_up(self, now: float, everything: bool = False) -> None:
        """Continue who has been stopped for long enough, bring the arbiter back, see who ended without being asked."""
        assert self._arbiter is not None
        for each in list(self._processes):
            if each.stopped_until is not None and (everything or now >= each.stopped_until):
                each.process.send_signal(signal.SIGCONT)
                each.stopped_until = None
                self._event("continue", who=each.who)
            if not everything and each.process.poll() is not None:
                self._look_at(each, asked=False)
                self._event("kill", who=each.who, kind="crash")
                self._processes.remove(each)
                self._start()
        if self._up_at is not None and (everything or now >= self._up_at):
            self._come_back()
            self._up_at = None
            self._event("up")

    def _end_well(self) -> None:
        """All go on, and end by themselves; who does not is killed, and named."""
        self._keep_up(time.monotonic(), everything=True)
        self._stop.touch()
        deadline = time.monotonic() + ACQUIRE + 20.0
        for each in self._processes:
            try:
                each.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._problems.append(f"{each.who} did not end")
                self._event("kill", who=each.who, kind="did not end")
                each.process.kill()
                each.process.wait(10.0)
            self._look_at(each)

    def _await_children(self) -> None:
        """Forked children of killed workers end by themselves; who does not is found by the judge."""
        deadline = time.monotonic() + CHILD_LIFE + 5.0
        while time.monotonic() < deadline:
            notes = read_notes(self._log)
            born = {note["who"] for note in notes if note["note"] == "ready" and "parent" in note}
            young = {
                note["child"]
                for note in notes
                if note["note"] == "fork" and time.monotonic() - note["at"] < 2.0 * BIRTH
            }
            if not (born | young) - {note["who"] for note in notes if note["note"] == "left"}:
                break
            time.sleep(0.2)
        for file in self._directory.glob("*.err"):
            told = file.read_text(errors="replace")
            if STACKS in told:  # of its alarm
                self._problems.append(f"a forked child of {file.stem} hung: {told[-3000:]}")

    def _look_at(self, each: _Process, asked: bool = True) -> None:
        """See how one ended, and what it had to say."""
        told = each.errors.read_text(errors="replace")
        # An interrupt that strikes in a finaliser is printed and forgotten by Python; what it left behind is not.
        swallowed = told.count("Exception ignored in")
        self.swallowed += swallowed
        if not asked or each.process.returncode not in (0, -signal.SIGKILL) or told.count("Traceback") > swallowed:
            self._problems.append(f"{each.who} ended with {each.process.returncode}: {told[-3000:]}")

    def _sweep(self) -> list[str]:
        """The cards that can be claimed within the bound, now that all workers are gone."""
        assert self._arbiter is not None
        timeout = TAKEOVER + (TTL if self._arbiter.mortal else 0.0)
        settings = self._settings(who="sweep", sweep=self._arbiter.keys, timeout=timeout)
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks._soak_worker", settings],
            cwd=ROOT,
            env=self._environment(),
            capture_output=True,
            text=True,
            timeout=60.0,
            check=False,
        )
        if done.returncode:
            self._problems.append(f"the sweep failed: {done.stderr[-3000:]}")
            return []
        got: list[str] = json.loads(done.stdout)
        return got


def read_notes(log: Path) -> list[dict[str, Any]]:
    """The notes of the workers, in the order in which they were written."""
    notes = []
    if log.exists():
        with open(log) as file:
            # The last line may still be half written.
            notes = [json.loads(line) for line in file if line.endswith("\n")]
    return notes


# -- the command -----------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; the exit status is 0 only if all is well."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument(
        "--store",
        choices=(*STORES, "all"),
        default="host",
        help="who arbitrates; all: one by one (default: %(default)s)",
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="of torment, each (default: %(default)g)")
    parser.add_argument("--workers", type=int, default=8, help="processes (default: %(default)s)")
    parser.add_argument("--cards", type=int, default=4, help="that they share (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="of all chance (default: told, another each time)")
    parser.add_argument("--at-once", action="store_true", help="--store all: at the same time, not one by one")
    parser.add_argument(
        "--full-disk",
        action="store_true",
        help="the arbiter's files lie on a small disk of their own, which is full now and then (root only)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table; of all stores, a list")
    parser.add_argument("--keep", metavar="DIR", help="leave the logs there; of all stores, in one folder each")
    options = parser.parse_args(arguments)
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(1_000_000)
    if options.store in ("redis", "all") and shutil.which("redis-server") is None:
        parser.error("redis-server is not installed")
    every = options.store == "all"
    if options.at_once and not every:
        parser.error("--at-once needs --store all")
    if options.full_disk and os.geteuid() != 0:
        parser.error("--full-disk mounts a file system, and only root may")
    if options.full_disk and UNSHARED not in os.environ:
        # Whatever becomes of us, no mount of ours is left behind, and nobody else sees it.
        again = [sys.executable, "-m", "benchmarks.soak", *(sys.argv[1:] if arguments is None else arguments)]
        command = ["unshare", "--mount", "--propagation", "private", "--", *again, "--seed", str(options.seed)]
        return subprocess.run(command, cwd=ROOT, env={**os.environ, UNSHARED: "1"}, check=False).returncode
    clean_environment()
    runs = [
        argparse.Namespace(
            **{
                **vars(options),
                "store": store,
                "keep": options.keep and (Path(options.keep) / store if every else Path(options.keep)),
            }
        )
        for store in (STORES if every else (options.store,))
    ]
    results = []
    for found in _at_once(runs) if options.at_once else map(_soak, runs):
        results.append(found)
        if not options.json:
            _print(found)
        elif every:
            say(f"{found['store']}: {'all is well' if found['well'] else 'problems'}")
    if options.json:
        print(json.dumps(results if every else results[0], indent=2))
    return 0 if all(found["well"] for found in results) else 1


def _at_once(runs: Sequence[argparse.Namespace]) -> list[dict[str, Any]]:
    """All these runs at the same time, each in a process of its own; what was found."""
    processes = []
    try:
        for run in runs:
            command = [sys.executable, "-m", "benchmarks.soak", "--json", "--store", run.store]
            for name in ("seconds", "workers", "cards", "seed", "keep"):
                if (value := getattr(run, name)) is not None:
                    command += [f"--{name}", str(value)]
            command += ["--full-disk"] if run.full_disk else []
            processes.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        return [_result(run, process) for run, process in zip(runs, processes, strict=True)]
    finally:
        for process in processes:
            # After an interrupt, say; what it started it ends itself.
            if process.poll() is None:
                process.terminate()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def _result(run: argparse.Namespace, process: subprocess.Popen[str]) -> dict[str, Any]:
    told, _ = process.communicate()
    try:
        found: dict[str, Any] = json.loads(told)
    except ValueError:
        problem = f"the run ended with {process.returncode} and no result"
        return {"store": run.store, "seed": run.seed, "problems": [problem], "well": False}
    return found


def _soak(options: argparse.Namespace) -> dict[str, Any]:
    """One run; what was found."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpupool-soak-") as directory:
        soak = Soak(options, Path(directory))
        try:
            verdict, faults, notes = soak.run()
        finally:
            if options.keep:
                options.keep.mkdir(parents=True, exist_ok=True)
                (options.keep / "events").write_text("\n".join(map(json.dumps, soak._events)) + "\n")
                for file in Path(directory).glob("*"):
                    if file.is_file():
                        shutil.copy(file, options.keep)
    errors = collections.Counter(note["why"] for note in notes if note["note"] == "error")
    return {
        "store": options.store,
        "seed": options.seed,
        "seconds": options.seconds,
        "workers_at_a_time": options.workers,
        "cards": options.cards,
        "wall_s": round(time.monotonic() - begin, 1),
        **verdict.measures,
        "faults": faults,
        "interrupts_swallowed_in_finalisers": soak.swallowed,
        "errors": dict(errors),
        "problems": list(verdict.problems),
        "well": not verdict.problems,
    }


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"Soak of the {found['store']} store, seed {found['seed']}", show_header=False)
    for name, value in found.items():
        if name in ("problems", "well"):
            continue
        told = (
            ", ".join(f"{kind} {number}" for kind, number in value.items()) if isinstance(value, dict) else str(value)
        )
        table.add_row(name.replace("_", " "), Text(told or "—"))
    Console().print(table)
    for problem in found["problems"]:
        print(f"✗ {problem}")
    say("all is well" if found["well"] else f"{len(found['problems'])} problems")


if __name__ == "__main__":
    # What was started ends also then.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
