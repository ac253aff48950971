"""The lease API over real HTTP, in this process: its clock is the test's."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from gpupool_sync.leases.host import HostStore
from gpupool_sync.server.leases import Granter, LeaseAPI
from gpupool_sync.server.run import listen, make_server
from helpers import eventually


class _Server:
    """One uvicorn on a daemon thread for the whole run; each test puts its own application behind it."""

    def __init__(self) -> None:
        self.app = None
        sockets = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"

        async def front(scope, receive, send):
            await self.app(scope, receive, send)

        server = make_server(front)
        threading.Thread(target=server.run, kwargs={"sockets": sockets}, name="test-server", daemon=True).start()
        eventually(lambda: server.started, message="the server starts")


_server: _Server | None = None


@contextlib.contextmanager
def server_of_leases(locks: Path, *, own=lambda key: True, state: str | None = None, **options) -> Iterator[str]:
    """The URL of a lease API with the locks in *locks*; `api_of` has its inside."""
    global _server
    if _server is None:
        _server = _Server()
    store_options = {"clock": options["clock"]} if "clock" in options else {}
    store = HostStore(str(locks), **store_options)
    state_path = None if state is None else os.path.join(store.path, state)
    api = LeaseAPI(Granter(store, own=own, state_path=state_path, **options), lock_dir=store.path)
    api.start()
    _server.app = api
    try:
        yield _server.url
    finally:
        _server.app = None
        api.close()


def api_now() -> LeaseAPI:
    """The one that `server_of_leases` runs now."""
    assert _server is not None
    return _server.app
