"""What several tests need: waiting for a condition, threads that start together, a log of who held what."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import attrs
import pytest

T = TypeVar("T")

#: Seconds that a busy machine may add to a deadline; bounds a hang, measures nothing.  On one that has nothing else to
#: do, GPUPOOL_TEST_MARGIN=0 holds the deadlines of hostile exchanges to the second that is promised.
MARGIN = float(os.environ.get("GPUPOOL_TEST_MARGIN") or 60.0)


def eventually(
    predicate: Callable[[], T],
    timeout: float = 30.0,
    message: str | Callable[[], object] = "the condition did not come true",
    tick: float = 0.005,
) -> T:
    """
    Return what *predicate* returns as soon as it is true; fail the test if it is not within *timeout*
    seconds.

    The timeout bounds a hang, it does not measure speed: leave it large.
    """
    deadline = time.monotonic() + timeout
    pause = threading.Event()
    while True:
        last_chance = time.monotonic() >= deadline  # before the look: a slow machine still gets one after the end
        value = predicate()
        if value:
            return value
        if last_chance:
            text = message() if callable(message) else message
            pytest.fail(f"{text} (waited {timeout:g} s; last value: {value!r})")
        pause.wait(tick)


def run_threads(n: int, fn: Callable[[int], T], timeout: float = 150.0) -> list[T]:
    """
    Run ``fn(0)`` to ``fn(n - 1)`` in threads that start at the same moment; return their results in that
    order.

    The first error (of the lowest number) is raised here; a thread that does not end fails the test and shows
    where it stands.
    """
    start = threading.Barrier(n)
    results: list[Any] = [None] * n
    errors: dict[int, BaseException] = {}

    def run(number: int) -> None:
        try:
            start.wait(timeout)
            results[number] = fn(number)
        except BaseException as exc:
            errors[number] = exc

    # Daemons, so that one that is stuck fails this test and not the whole run.
    threads = [threading.Thread(target=run, args=(i,), name=f"test-{i}", daemon=True) for i in range(n)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if errors:
        raise errors[min(errors)]
    stuck = [thread for thread in threads if thread.is_alive()]
    if stuck:
        frames = sys._current_frames()
        stacks = [
            f"{thread.name}:\n{''.join(traceback.format_stack(frames[thread.ident]))}"
            for thread in stuck[:4]
            if thread.ident in frames
        ]
        pytest.fail(f"{len(stuck)} of {n} threads did not end within {timeout:g} s\n" + "\n".join(stacks))
    return results


def connections_to(*ports: int) -> int:
    """How many descriptors of this process are the client's end of a connection to one of the IPv4 ports."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile, or not connected
            if stat.S_ISSOCK(os.stat(int(name)).st_mode):
                with socket.socket(fileno=os.dup(int(name))) as sock:
                    found += sock.family == socket.AF_INET and sock.getpeername()[1] in ports
    return found


def resolve_to(monkeypatch: pytest.MonkeyPatch, servers: Mapping[str, str]) -> None:
    """Connections to these host names go to the loopback servers of these URLs, whatever port they name."""
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        if host not in servers:
            return real(host, port, *args, **kwargs)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", int(servers[host].rpartition(":")[2])))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def environment_after(script: str) -> dict[str, str]:
    """The ``GPU_`` variables that a shell script exports."""
    out = subprocess.run(["sh", "-euc", f"{script}\nenv -0"], capture_output=True, check=True, env={}, timeout=30)
    items = (item.partition("=") for item in out.stdout.decode().split("\0"))
    return {name: value for name, _, value in items if name.startswith("GPU_")}


@attrs.frozen
class Hold:
    """Somebody used a card from `begin` to `end` (``time.monotonic``); `end` is None if it was not told."""

    key: str
    begin: float
    end: float | None
    token: int | None = None
    who: str = ""


class HoldLog:
    """
    Who used which card when, written by the users themselves and judged afterwards.

    It knows nothing of pools and leases, so it can contradict them.  With a *path* it is shared between
    processes: it pickles as the path, each note is one atomic append, and all of them have the same
    ``time.monotonic`` (Linux).  Begin is noted after the card was granted and end before it is released, so
    an overlap found is a true one.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self._path = None if path is None else Path(path)
        # Unpickled for each task of a process, two of them may have one address after another.
        self._mine = os.urandom(4).hex()
        self._numbers = itertools.count()
        # Guards _notes, where there is no file.
        self._lock = threading.Lock()
        self._notes: list[dict[str, Any]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        if self._path is None:
            raise TypeError("a HoldLog without a path cannot be shared between processes")
        return (HoldLog, (str(self._path),))

    def _note(self, **note: Any) -> None:
        if self._path is None:
            with self._lock:
                self._notes.append(note)
            return
        line = (json.dumps(note) + "\n").encode()
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)

    def add(self, key: str, begin: float, end: float | None, token: int | None = None, who: str = "") -> None:
        """Note a whole hold at once."""
        name = self.begin(key, token, who, at=begin)
        if end is not None:
            self.end(name, at=end)

    def begin(self, key: str, token: int | None = None, who: str = "", at: float | None = None) -> str:
        """Note that the card is used from now on; the result names the hold for `end`."""
        name = f"{os.getpid()}-{self._mine}-{next(self._numbers)}"
        who = who or f"{os.getpid()}/{threading.current_thread().name}"
        self._note(hold=name, key=key, token=token, who=who, begin=time.monotonic() if at is None else at)
        return name

    def end(self, name: str, at: float | None = None) -> None:
        """Note that the hold is over."""
        self._note(hold=name, end=time.monotonic() if at is None else at)

    @contextlib.contextmanager
    def holding(self, key: str, token: int | None = None, who: str = "") -> Iterator[None]:
        """Note the hold around a block."""
        name = self.begin(key, token, who)
        try:
            yield
        finally:
            self.end(name)

    def holds(self) -> list[Hold]:
        """Every hold noted so far, in order of beginning."""
        if self._path is None:
            with self._lock:
                notes = list(self._notes)
        else:
            text = self._path.read_text() if self._path.exists() else ""
            notes = [json.loads(line) for line in text.splitlines()]
        ends = {note["hold"]: note["end"] for note in notes if "end" in note}
        holds = [
            Hold(note["key"], note["begin"], ends.get(note["hold"]), note["token"], note["who"])
            for note in notes
            if "begin" in note
        ]
        return sorted(holds, key=lambda hold: hold.begin)

    def _by_key(self) -> dict[str, list[Hold]]:
        by_key: dict[str, list[Hold]] = {}
        for hold in self.holds():
            by_key.setdefault(hold.key, []).append(hold)
        return by_key

    def overlaps(self) -> list[tuple[Hold, Hold]]:
        """
        Pairs that used one card at the same time; empty if there was no double hold.

        A hold without an end (its process was killed) counts for the instant of its beginning only.
        """
        found = []
        for holds in self._by_key().values():
            longest: Hold | None = None
            for hold in holds:
                if longest is not None and longest.end is not None and hold.begin < longest.end:
                    found.append((longest, hold))
                end = hold.begin if hold.end is None else hold.end
                if longest is None or longest.end is None or end > longest.end:
                    longest = hold
        return found

    def token_regressions(self) -> list[tuple[Hold, Hold]]:
        """Pairs of holds of one card whose later one has a fencing token that is not larger."""
        found = []
        for holds in self._by_key().values():
            largest: Hold | None = None
            for hold in holds:
                if hold.token is None:
                    continue
                if largest is not None and largest.token is not None and hold.token <= largest.token:
                    found.append((largest, hold))
                else:
                    largest = hold
        return found
