"""A server that misbehaves on request, for `gpupool_sync.testing`."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from typing import Any

import attrs

from gpupool_sync import wire
from gpupool_sync.server.asgi import App, Message, Receive, Scope, Send, send_answer
from gpupool_sync.server.pages import Answer
from gpupool_sync.server.sampler import make_page


@attrs.frozen
class Fault:
    """What every request meets; the fields add up."""

    delay: float = 0.0  # seconds before the answer
    hang: bool = False
    status: int | None = None
    retry_after: float | None = None  # seconds, sent with `status`
    error: str | None = None  # the text of a 200 that reports an error


class Faults:
    """
    Wraps the server's application: counts, and misbehaves as `fault` says.

    `fault` may be replaced from any thread; requests under way keep the one that they met.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self.fault = Fault()
        # Guards the counters, which the control thread reads.
        self._lock = threading.Lock()
        self._requests: Counter[str] = Counter()
        self._connections = 0

    def counts(self) -> dict[str, Any]:
        with self._lock:
            return {"requests": dict(self._requests), "connections": self._connections}

    def connected(self) -> None:
        with self._lock:
            self._connections += 1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._lock:
            self._requests[scope["path"]] += 1
        fault = self.fault
        if fault.delay:
            await asyncio.sleep(fault.delay)
        if fault.hang:
            await _wait_for_the_end(receive)
        elif fault.status is not None:
            page = make_page(wire.error_document("fault", f"status {fault.status}, as ordered"))
            extra = [] if fault.retry_after is None else [(b"retry-after", b"%d" % round(fault.retry_after))]
            await send_answer(send, Answer(fault.status, [*page.headers, *extra], page.body))
        elif fault.error is not None:
            page = make_page(wire.failure_document(fault.error, None))
            await send_answer(send, Answer(200, [*page.headers], page.body))
        else:
            await self._app(scope, receive, send)

    def count_connections(self, protocol: type[Any]) -> type[Any]:
        """*protocol*, a server protocol of asyncio, so that each connection is counted, also one without requests."""
        connected = self.connected

        class Counted(protocol):  # type: ignore[misc]
            def connection_made(self, transport: Any) -> None:
                connected()
                super().connection_made(transport)

        return Counted


async def _wait_for_the_end(receive: Receive) -> None:
    """Until the client goes away; it gets nothing."""
    message: Message = {"type": ""}
    while message["type"] != "http.disconnect":
        message = await receive()
