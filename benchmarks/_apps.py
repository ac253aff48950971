"""What others would serve: ``python -m benchmarks._apps NAME`` tells its port and serves until SIGTERM."""

from __future__ import annotations

import json
import logging
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

from gpupool_sync import wire
from gpupool_sync.clock import boottime
from gpupool_sync.devices.simulated import SimulatedReader, parse_cards
from gpupool_sync.server.run import listen, make_server

GPUS = 8
#: Seconds that waitress lets its callers wait; they go before.
LONG = 300.0


def _summary() -> dict[str, Any]:
    """The document that our own server serves for as many cards."""
    sample = SimulatedReader(parse_cards(str(GPUS)), name="benchmark").read(10.0)
    return dict(wire.summary_document(sample, timestamp="2026-01-01T00:00:00Z"))


def starlette_bytes() -> Any:
    """A prepared body behind a route of Starlette."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    body = wire.dump(_summary())

    async def summary(request: Request) -> Response:
        return Response(body, media_type="application/json")

    return Starlette(routes=[Route("/gpu/summary", summary)])


def fastapi_dict() -> Any:
    """The readings as a dict, made into JSON for each request, as the predecessor's server does."""
    from fastapi import FastAPI

    app = FastAPI()
    document = _summary()

    @app.get("/gpu/summary")
    async def summary() -> Any:
        return document

    return app


def sqlite_leases() -> Any:
    """The leanest lease API that one would write: one table, a row for each card, one transaction for each request."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    directory = tempfile.mkdtemp(prefix="gpupool-sketch-")
    database = sqlite3.connect(f"{directory}/leases.db", isolation_level=None, check_same_thread=False)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=NORMAL")
    database.execute("CREATE TABLE cards (gpu TEXT PRIMARY KEY, id TEXT, holder TEXT, until REAL, token INTEGER)")
    database.execute("CREATE INDEX by_id ON cards (id)")
    database.executemany("INSERT INTO cards VALUES (?, NULL, NULL, 0, 0)", [(f"GPU-{n}",) for n in range(GPUS)])

    async def claim(request: Request) -> Response:
        asked = await request.json()
        now = boottime()
        database.execute("BEGIN IMMEDIATE")
        row = database.execute("SELECT gpu, token FROM cards WHERE until <= ? LIMIT 1", (now,)).fetchone()
        if row is None:
            database.execute("ROLLBACK")
            return JSONResponse({"error": "busy"}, 409)
        gpu, token = row[0], max(row[1] + 1, int(time.time() * 1000))
        database.execute(
            "UPDATE cards SET id = ?, holder = ?, until = ?, token = ? WHERE gpu = ?",
            (asked["id"], asked["holder"], now + asked["ttl"], token, gpu),
        )
        database.execute("COMMIT")
        return JSONResponse({"gpu": gpu, "token": token, "ttl": asked["ttl"]})

    async def release(request: Request) -> Response:
        asked = await request.json()
        database.execute("UPDATE cards SET id = NULL, holder = NULL, until = 0 WHERE id = ?", (asked["id"],))
        return JSONResponse({})

    return Starlette(
        routes=[Route("/leases", claim, methods=["POST"]), Route("/leases/release", release, methods=["POST"])]
    )


def serve_waiting(sock: Any, threads: int) -> None:
    """Long polls as a threaded server has them: waitress, a thread for each."""
    import waitress

    logging.disable(logging.WARNING)  # it counts aloud who waits for a thread

    lock = threading.Lock()
    waiting = 0

    def app(environ: dict[str, Any], start: Callable[..., Any]) -> list[bytes]:
        nonlocal waiting
        if environ["PATH_INFO"] == "/count":
            body = json.dumps({"waiting": waiting}).encode()
        else:
            with lock:
                waiting += 1
            environ["wsgi.input"].read()
            threading.Event().wait(LONG)
            body = b"{}"
        start("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
        return [body]

    waitress.serve(
        app,
        sockets=[sock],
        threads=threads,
        connection_limit=4096,
        channel_timeout=int(LONG),
        asyncore_use_poll=True,
    )


APPS: dict[str, Callable[[], Any]] = {
    "starlette-bytes": starlette_bytes,
    "fastapi-dict": fastapi_dict,
    "sqlite-leases": sqlite_leases,
}


def main(name: str, threads: str = "1") -> None:
    sockets = listen("127.0.0.1", 0)
    port = sockets[0].getsockname()[1]
    if name == "waitress":
        print(json.dumps({"port": port}), flush=True)
        serve_waiting(sockets[0], int(threads))
        return
    # The same uvicorn with the same settings as ours.
    server = make_server(APPS[name]())
    print(json.dumps({"port": port}), flush=True)
    server.run(sockets=sockets)


if __name__ == "__main__":
    main(*sys.argv[1:])
