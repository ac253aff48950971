"""Bounds what clients can make the server hold: connections, requests that do not end, answers that nobody takes.

uvicorn bounds one request's head and closes connections that are idle after an answer.  What it lets wait for ever is
here: a connection that never asks, a request that arrives byte by byte, an answer that is not read.  And where all
connections that there may be are taken, the one that has waited longest makes room, so that ``/health`` goes on
answering whoever else holds connections open.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
from typing import Any

from gpupool_sync.leases.documents import MAX_WAIT

logger = logging.getLogger(__name__)

#: Connections at the same time, if the process may have so many descriptors.
MAX_CONNECTIONS = 8192
#: Connections that are accepted at a stretch, before anybody can make room for them; twice as many are open then.
ACCEPTED_AT_ONCE = 128
#: Descriptors that are kept for those, and for locks, state files and the reading of cards.
OTHER_DESCRIPTORS = 512
#: Bytes of a request's first line and headers.
MAX_HEAD = 64 * 1024
#: Seconds in which a request has to be complete once it has begun.
REQUEST_TIME = 20.0
#: Seconds in which an answer has to be made. Long polls take `MAX_WAIT` at most.
ANSWER_TIME = MAX_WAIT + 35.0
#: Seconds that a connection may be idle.  Longer than pools let pass between two polls by default: a server that
#: closes first makes a client's next request fail.
KEEP_ALIVE = 75.0
#: Seconds that a connection which is being closed politely has to take its last answer.
_LAST_WORD = 5.0
#: Seconds between two looks at who is late.
_TICK = 1.0


def allowed_connections() -> int:
    """How many connections this process may hold, after it has been allowed all the descriptors that it may have."""
    wanted = MAX_CONNECTIONS + OTHER_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        # Where it is not allowed, what there is has to do.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return min(MAX_CONNECTIONS, max(soft // 4, soft - OTHER_DESCRIPTORS))


class _Quiet:
    """
    A transport that takes no more once it is being closed.

    An answer may be on its way when its connection is given up; uvloop raises then, and uvicorn would log each.
    """

    __slots__ = ("_transport", "_write", "is_closing")

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._write = transport.write
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:
        if not self.is_closing():
            self._write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Connections:
    """
    The connections of one server.

    Everything here is touched on the event loop's thread only, so there is no lock.
    """

    def __init__(self, most: int = MAX_CONNECTIONS) -> None:
        self.most = most
        # When each will be too late, on the loop's clock. Those of the second kind can make room, the first one first.
        self._answering: dict[Any, float] = {}
        self._waiting: dict[Any, float] = {}
        self._ticking = False
        self._told = False

    def __len__(self) -> int:
        return len(self._answering) + len(self._waiting)

    def add(self, connection: Any) -> bool:
        """Whether there is room for *connection*, perhaps by closing another one."""
        if len(self) >= self.most:
            if not self._told:
                self._told = True
                logger.warning("%d connections are open: idle ones are closed from now on", self.most)
            if not self._waiting:
                return False
            longest = next(iter(self._waiting))
            self.discard(longest)
            longest.transport.abort()
        loop = asyncio.get_running_loop()
        self.waits(connection, loop.time() + KEEP_ALIVE + _LAST_WORD)
        if not self._ticking:
            self._ticking = True
            loop.call_later(_TICK, self._tick)
        return True

    def waits(self, connection: Any, until: float) -> None:
        """*connection* has to ask, or to go on asking, *until* then (the loop's time)."""
        self.discard(connection)
        self._waiting[connection] = until

    def answers(self, connection: Any, until: float) -> None:
        """*connection* has asked, and it is our turn: *until* then."""
        self._waiting.pop(connection, None)
        self._answering[connection] = until

    def discard(self, connection: Any) -> None:
        self._waiting.pop(connection, None)
        self._answering.pop(connection, None)

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        for group in (self._waiting, self._answering):
            for connection in [connection for connection, until in group.items() if until <= now]:
                # Not closed: that would wait until the peer has taken what it does not take.
                self.discard(connection)
                connection.transport.abort()
        self._ticking = len(self) > 0
        if self._ticking:
            loop.call_later(_TICK, self._tick)

    def bound(self, protocol: type[Any]) -> type[Any]:
        """*protocol*, one of uvicorn's for HTTP, so that its connections are among these."""
        connections = self

        class Bounded(protocol):  # type: ignore[misc]
            _asking = False  # a request has begun and is not complete
            _head = 0  # bytes of it so far

            def connection_made(self, transport: Any) -> None:
                super().connection_made(_Quiet(transport))
                if not connections.add(self):
                    transport.abort()

            def connection_lost(self, exc: Exception | None) -> None:
                connections.discard(self)
                super().connection_lost(exc)

            def data_received(self, data: bytes) -> None:
                if self.transport.is_closing():
                    return
                begins = not self._asking and not self._under_way()
                if begins:
                    self._asking, self._head = True, 0
                super().data_received(data)
                if self._asking and not self.transport.is_closing():
                    self._look(len(data))
                    if begins and self._asking:  # not all of it came at once
                        connections.waits(self, self.loop.time() + REQUEST_TIME)

            def _under_way(self) -> bool:
                return self.cycle is not None and not self.cycle.response_complete

            def _look(self, more: int) -> None:
                if not self._under_way():
                    self._head += more
                    if self._head > 2 * MAX_HEAD:  # h11 has a bound of its own, httptools has not
                        self.transport.abort()
                elif not self.cycle.more_body:
                    self._asking = False
                    connections.answers(self, self.loop.time() + ANSWER_TIME)

            def on_response_complete(self) -> None:
                self._asking = False
                if not self.transport.is_closing():
                    connections.waits(self, self.loop.time() + KEEP_ALIVE + _LAST_WORD)
                super().on_response_complete()
                if self._under_way() and not self.transport.is_closing():
                    # The next request had come already.
                    self._asking, self._head = True, 0
                    self._look(0)

        return Bounded
