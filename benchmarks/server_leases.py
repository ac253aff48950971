"""A lease through our server, one client: beside the leanest lease API over SQLite that one would write.

Ours is ``gpupool-sync serve`` and the pool's own client of it: kernel locks, tickets, a memory that survives a restart.
The sketch is Starlette with one SQLite transaction for each request (`_apps.sqlite_leases`), asked by
`requests.Session`.  Each server is one process on loopback with the same uvicorn.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import requests

from benchmarks._cards import lease_pairs
from benchmarks._harness import Contender, Measures, Mode, Report, Row, column, say, take_turns
from benchmarks._harness import timed as timed_here
from benchmarks._services import Service, app, our_server
from gpupool_sync import GPUPool
from gpupool_sync.config import Endpoint, Settings
from gpupool_sync.leases.http import HTTPStore

TITLE = "A lease through our server"

GPUS = 8
TTL = 60.0
TARGET = 0.7
TIMEOUT = 30.0


def run(mode: Mode) -> Report:
    """Claim and release, again and again, by one client over a kept connection."""
    say("server_leases")
    number = mode.pick(smoke=3, quick=300, full=600)
    with our_server(GPUS) as ours, app("sqlite-leases") as theirs, contextlib.ExitStack() as stack:
        store = HTTPStore(Endpoint(ours.url), Settings())
        stack.callback(store.close)
        pool = stack.enter_context(GPUPool([ours.url], name="benchmark"))
        keys = [gpu.uuid for gpu in _gpus_of(pool)]
        pairs = {
            "store": (lease_pairs(store, keys, ttl=TTL), ours),
            "pool": (_pool_pairs(pool), ours),
            "sketch": (stack.enter_context(_session(theirs)), theirs),
        }
        found = take_turns(
            [
                Contender(name, lambda each=each, server=server: _timed(lambda: each(number), server, number))
                for name, (each, server) in pairs.items()
            ],
            mode.rounds,
        )
    against = "Starlette + SQLite, requests.Session"
    rows = [
        Row(what, column(found, ours, "wall"), against, column(found, "sketch", "wall"), target=TARGET)
        for ours, what in (("store", "claim + release through the server"), ("pool", "`with pool.gpu()` of a server"))
    ]
    for measure, what in (("client", "processor time of the client"), ("server", "processor time of the server")):
        mine, theirs_ = column(found, "store", measure), column(found, "sketch", measure)
        rows.append(Row(f"claim + release through the server, {what}", mine, against, theirs_))
    return Report(rows)


def _timed(work: Callable[[], object], server: Service, number: int) -> Measures:
    before = server.cpu()
    measures = timed_here(work, number)
    return {"wall": measures["wall"], "client": measures["cpu"], "server": (server.cpu() - before) / number}


def _gpus_of(pool: GPUPool) -> list[object]:
    if not pool.refresh(TIMEOUT):
        raise RuntimeError("the server does not answer")
    return list(pool.status().gpus)


def _pool_pairs(pool: GPUPool) -> Callable[[int], None]:
    def pairs(times: int) -> None:
        for _ in range(times):
            with pool.gpu(timeout=TIMEOUT, local=False):
                pass

    return pairs


@contextlib.contextmanager
def _session(server: Service) -> Iterator[Callable[[int], None]]:
    with requests.Session() as session:

        def pairs(times: int) -> None:
            for _ in range(times):
                mine = os.urandom(16).hex()
                body = {"id": mine, "holder": "benchmark", "ttl": TTL}
                answer = session.post(f"{server.url}/leases", json=body, timeout=TIMEOUT)
                answer.raise_for_status()
                if "token" not in answer.json():
                    raise RuntimeError("the figures are worth nothing: no lease")
                session.post(f"{server.url}/leases/release", json={"id": mine}, timeout=TIMEOUT).raise_for_status()

        yield pairs
