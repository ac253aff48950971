"""The front of the server: prepared answers go out without any framework, all else goes to FastAPI.

FastAPI takes longer to import than everything else together, and per request several times what sending prepared
bytes takes.  So it is made when somebody first asks for what only it has: the documentation, or a path that does not
exist.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, Protocol

from gpupool_sync.server.pages import PATHS, Answer, Header, Pages

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Leases(Protocol):
    """The lease API; `server.leases` has it."""

    def knows(self, path: str) -> bool: ...
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...


class Metrics(Protocol):
    """``/metrics``; `server.metrics` has it."""

    async def answer(self, headers: Iterable[Header]) -> Answer: ...


METRICS_PATH = "/metrics"
#: Paths that are counted by their name, as those of the leases are; all others are one, as anybody can invent some.
COUNTED = frozenset((*PATHS, METRICS_PATH, "/docs", "/openapi.json"))


class Front:
    """
    The ASGI application that is served.

    *rest* makes the application for all that is neither in *pages* nor in *leases*.
    """

    def __init__(self, pages: Pages, rest: Callable[[], App], leases: Leases | None = None) -> None:
        self._pages = pages
        self._leases = leases
        self._make_rest = rest
        self._rest: asyncio.Task[App] | None = None
        #: Answers by path and status; added to on the event loop's thread only.
        self.requests: dict[tuple[str, int], int] = {}
        #: Who answers `METRICS_PATH`; None: there are none.
        self.metrics: Metrics | None = None

    def _count(self, path: str, status: int) -> None:
        known = path in COUNTED or (self._leases is not None and self._leases.knows(path))
        key = (path if known else "other", status)
        self.requests[key] = self.requests.get(key, 0) + 1

    def _counted(self, path: str, send: Send) -> Send:
        """*send* for those who answer by themselves."""

        async def count_and_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._count(path, message["status"])
            await send(message)

        return count_and_send

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"]
            if scope["method"] in ("GET", "HEAD"):
                answer = self._pages.answer(path, scope["headers"])
                if answer is None and path == METRICS_PATH and self.metrics is not None:
                    answer = await self.metrics.answer(scope["headers"])
                if answer is not None:
                    self._count(path, answer.status)
                    await send_answer(send, answer, head=scope["method"] == "HEAD")
                    return
            send = self._counted(path, send)
        if self._leases is not None and scope["type"] == "http" and self._leases.knows(scope["path"]):
            await self._leases(scope, receive, send)
            return
        if self._rest is None or (self._rest.done() and self._rest.exception() is not None):
            # On a thread: meanwhile the pages go out.
            self._rest = asyncio.ensure_future(asyncio.to_thread(self._make_rest))
        # Shielded: a client that goes away must not take it from the others.
        app = await asyncio.shield(self._rest)
        await app(scope, receive, send)


async def send_answer(send: Send, answer: Answer, *, head: bool = False) -> None:
    await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
    await send({"type": "http.response.body", "body": b"" if head else answer.body})
