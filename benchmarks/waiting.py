"""What a client that waits for its turn costs the server: memory of each, and threads.

1000 clients connect to a fresh server and ask to be told; when all of them wait, its memory (what it shares with
nobody) is compared with that of a server for which nobody waits.  Ours is ``gpupool-sync serve`` and ``POST /v1/wait``;
beside it waitress, a threaded server in which each request that waits has a thread: it is compared with one of a
single thread.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable

import requests

from benchmarks._harness import (
    Contender,
    Measures,
    Mode,
    Report,
    Row,
    column,
    missing,
    peer,
    room_for_files,
    say,
    take_turns,
)
from benchmarks._services import Service, app, our_server

TITLE = "Clients that wait on our server"

GPUS = 8
FEW = 10
#: Largest ratio of the memory for each.
TARGET = 1 / 20
TIMEOUT = 60.0


def run(mode: Mode) -> Report:
    """A fresh server for each turn: memory that a process has had once it keeps."""
    say("waiting")
    number = mode.pick(smoke=20, quick=1000, full=1000)
    notes = []
    if not room_for_files(2 * number + 256):
        return Report([], [f"{number} clients need more open files than `ulimit -n` allows"])
    contenders = [Contender("ours", lambda: _ours(number))]
    if peer("waitress") is None:
        notes.append(missing("waitress"))
    else:
        contenders.append(Contender("waitress", lambda: _waitress(number)))
    # Nothing to warm: every turn has a server of its own.
    found = take_turns(contenders, mode.rounds, warm=False)
    mine = column(found, "ours", "memory")
    threads = column(found, "ours", "threads")
    rows = []
    if "waitress" in found:
        theirs = column(found, "waitress", "memory")
        rows.append(Row(f"memory of each of {number} that wait", mine, "waitress", theirs, unit="kB", target=TARGET))
        theirs = column(found, "waitress", "threads")
        rows.append(Row(f"threads while {number} wait", threads, "waitress", theirs, unit=""))
    else:
        rows.append(Row(f"memory of each of {number} that wait", mine, unit="kB"))
    few = column(found, "ours", "few")
    rows.append(Row(f"threads while {number} wait", threads, f"ours while {FEW} wait", few, unit="", target=1.0))
    return Report(rows, notes)


def _ours(number: int) -> Measures:
    def waiting(url: str) -> int:
        answer = requests.get(f"{url}/metrics", timeout=TIMEOUT)
        answer.raise_for_status()
        lines = [line for line in answer.text.splitlines() if line.startswith(POLLS)]
        return int(float(lines[0].split()[-1]))

    with our_server(GPUS) as server:
        return _crowded(server, number, "/v1/wait", waiting)


#: Name of the metric that tells how many wait.
POLLS = "gpupool_server_long_polls "


def _waitress(number: int) -> Measures:
    def waiting(url: str) -> int:
        return int(requests.get(f"{url}/count", timeout=TIMEOUT).json()["waiting"])

    with app("waitress", "1") as server:
        waiting(server.url)
        empty = server.memory()
    # One thread more, for whoever asks how many wait.
    with app("waitress", str(number + 1)) as server:
        return _crowded(server, number, "/wait", waiting, empty)


def _crowded(
    server: Service, number: int, path: str, waiting: Callable[[str], int], empty: float | None = None
) -> Measures:
    waiting(server.url)  # what the first request makes does not count
    with contextlib.ExitStack() as stack:
        before = server.memory() if empty is None else empty
        _ask(server, stack, range(FEW), path)
        _until(lambda: waiting(server.url) == FEW)
        few = server.threads()
        _ask(server, stack, range(FEW, number), path)
        _until(lambda: waiting(server.url) == number)
        return {
            "memory": (server.memory() - before) / number / 1000.0,
            "threads": float(server.threads()),
            "few": float(few),
        }


def _ask(server: Service, stack: contextlib.ExitStack, numbers: range, path: str) -> None:
    for number in numbers:
        connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), TIMEOUT))
        body = json.dumps({"holder": f"holder-{number}", "timeout": 25.0}).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection.sendall(head.encode() + body)


def _until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT
    while not true():
        if time.monotonic() > end:
            raise RuntimeError("not all of them came to wait")
        time.sleep(0.05)
