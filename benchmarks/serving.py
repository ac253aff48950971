"""``GET /gpu/summary`` of eight cards, served: beside Starlette returning bytes, and FastAPI returning a dict.

Ours is ``gpupool-sync serve`` with all that it does besides (it reads its simulated cards each second, counts answers,
tells the age of each reading).  Every server is one process with the same uvicorn, asked over 16 kept connections by
one thread that knows just enough HTTP, so that the server is what limits the rate.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator, Sequence

from benchmarks._harness import Contender, Measures, Mode, Report, Row, column, say, take_turns
from benchmarks._services import Service, app, our_server

TITLE = "Serving the statistics"

GPUS = 8
CONNECTIONS = 16
#: Smallest ratio of the rates.
TARGETS = {"starlette-bytes": 0.9, "fastapi-dict": 3.0}
NAMES = {"starlette-bytes": "Starlette, bytes", "fastapi-dict": "FastAPI, dict"}
REQUEST = b"GET /gpu/summary HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: application/json\r\n\r\n"
TIMEOUT = 30.0


def run(mode: Mode) -> Report:
    """Requests per second, and processor time of the server for each."""
    say("serving")
    number = mode.pick(smoke=50, quick=4000, full=8000)
    with contextlib.ExitStack() as stack:
        servers = {"ours": stack.enter_context(our_server(GPUS))}
        servers |= {name: stack.enter_context(app(name)) for name in TARGETS}
        contenders = []
        for name, server in servers.items():
            connections = stack.enter_context(_connections(server))
            contenders.append(Contender(name, lambda server=server, mine=connections: _turn(server, mine, number)))
        found = take_turns(contenders, mode.rounds)
    rows = []
    for name, target in TARGETS.items():
        mine, theirs = column(found, "ours", "rate"), column(found, name, "rate")
        rows.append(Row("requests per second", mine, NAMES[name], theirs, unit="/s", target=target, at_least=True))
    for name in TARGETS:
        mine, theirs = column(found, "ours", "cpu"), column(found, name, "cpu")
        rows.append(Row("processor time of the server for each", mine, NAMES[name], theirs))
    return Report(rows)


@contextlib.contextmanager
def _connections(server: Service) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(CONNECTIONS):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), TIMEOUT))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            found.append(connection)
        yield found


def _turn(server: Service, connections: Sequence[socket.socket], number: int) -> Measures:
    # Each connection has a request under way all the time: the server never has nothing to do.
    before, begin = server.cpu(), time.perf_counter()
    for connection in connections:
        connection.sendall(REQUEST)
    rounds = max(1, number // len(connections))
    for left in range(rounds, 0, -1):
        for connection in connections:
            _read(connection)
            if left > 1:
                connection.sendall(REQUEST)
    wall = time.perf_counter() - begin
    asked = rounds * len(connections)
    # Some hundreds of milliseconds, told in steps of ten.
    return {"rate": asked / wall, "cpu": max(server.cpu() - before, 1e-9) / asked}


def _read(connection: socket.socket) -> None:
    data = connection.recv(65536)
    while (end := data.find(b"\r\n\r\n")) < 0:
        data += _more(connection)
    head = data[:end].lower()
    if not head.startswith(b"http/1.1 200 "):
        raise RuntimeError(f"the figures are worth nothing: {head[:80]!r}")
    length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
    got = len(data) - end - 4
    while got < length:
        got += len(_more(connection))


def _more(connection: socket.socket) -> bytes:
    data = connection.recv(65536)
    if not data:
        raise RuntimeError("the server closed a connection")
    return data
