"""
A TCP proxy that breaks connections on purpose, for the soak and its tests: one thread, loopback only.

What is kept is bounded: where a side takes nothing, the other one is not read any more, as with a real network.
"""

from __future__ import annotations

import collections
import contextlib
import queue
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Literal

#: Bytes that are kept for each direction of a connection, at most; beside them the kernel has its own.
BUFFER = 64 * 1024
#: Seconds that a fault may take until it has happened: a bound for a hang.
PATIENCE = 10.0

Direction = Literal["up", "down"]


class _Flow:
    """One direction of a pair: what has arrived and is to be forwarded, in order."""

    __slots__ = ("done", "due", "ended", "name", "parts", "size", "until_cut")

    def __init__(self, name: Direction) -> None:
        self.name = name
        self.parts: collections.deque[tuple[float, bytes]] = collections.deque()  # when it may go on, what
        self.size = 0
        self.due = 0.0  # of the last part: none overtakes another
        self.ended = False  # its source says no more
        self.done = False  # and its sink was told
        self.until_cut: int | None = None  # bytes that still pass

    def add(self, data: bytes, due: float) -> None:
        self.due = max(self.due, due)
        self.parts.append((self.due, data))
        self.size += len(data)

    def take(self, sent: int) -> None:
        """The first *sent* bytes of the first part are forwarded."""
        self.size -= sent
        due, data = self.parts.popleft()
        if sent < len(data):
            self.parts.appendleft((due, data[sent:]))


class _Pair:
    """A client's connection and ours to the target."""

    __slots__ = ("client", "connected", "down", "masks", "target", "up")

    def __init__(self, client: socket.socket) -> None:
        self.client = client
        self.target: socket.socket | None = None
        self.connected = False
        self.up = _Flow("up")
        self.down = _Flow("down")
        self.masks: dict[socket.socket, int] = {}  # what the selector waits for


class FaultProxy:
    """
    Forwards TCP connections from a free loopback port to a target, and breaks them when told to.

    It runs from its making until `close`, or the end of the ``with`` block.  Every fault may be switched by any
    thread at any time, and has happened when the call returns.  Faults add up; `heal` ends all of them.
    """

    def __init__(self, target_host: str, target_port: int) -> None:
        self._target = (target_host, target_port)
        # Bound, but never listening: the port stays ours while connections are refused.
        self._place = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._place.bind(("127.0.0.1", 0))
        self.port: int = self._place.getsockname()[1]
        # Everything below belongs to the thread; others put what is to be done into the queue, and wake it.
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_read, selectors.EVENT_READ, None)
        self._listener: socket.socket | None = None
        self._pairs: set[_Pair] = set()
        self._forwards: dict[str, bool] = {"up": True, "down": True}
        self._delay = 0.0
        self._cut_after: int | None = None
        self._closing = False
        self._listen()
        self._thread = threading.Thread(target=self._run, name=f"fault-proxy-{self.port}", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """For clients that speak HTTP."""
        return f"http://127.0.0.1:{self.port}"

    # -- faults ------------------------------------------------------------------------------------------------

    def cut(self) -> None:
        """Reset all connections of this moment; new ones are accepted."""
        self._order(self._cut)

    def refuse(self, on: bool = True) -> None:
        """Accept no new connections; those that there are stay."""
        self._order(self._unlisten if on else self._listen)

    def blackhole(self, on: bool = True) -> None:
        """Connections stay, and nothing is forwarded; what arrives is kept, and forwarded when this ends."""
        self._order(lambda: self._forward(up=not on, down=not on))

    def one_way(self, direction: Direction) -> None:
        """
        Forward in one direction only: with "up" a request arrives, and its answer does not.

        What arrives in the other direction is kept, and forwarded when this ends.
        """
        self._order(lambda: self._forward(up=direction == "up", down=direction == "down"))

    def cut_after(self, n_bytes: int) -> None:
        """The next answer ends after so many bytes, and its connection with it; once."""

        def order() -> None:
            self._cut_after = n_bytes

        self._order(order)

    def delay(self, seconds: float) -> None:
        """What arrives from now on is forwarded so many seconds later, in each direction."""

        def order() -> None:
            self._delay = seconds

        self._order(order)

    def heal(self) -> None:
        """End all faults; what was kept is forwarded now."""

        def order() -> None:
            self._delay, self._cut_after = 0.0, None
            for pair in self._pairs:
                for flow in (pair.up, pair.down):
                    flow.due, flow.until_cut = 0.0, None
                    flow.parts = collections.deque((0.0, data) for _, data in flow.parts)
            self._listen()
            self._forward(up=True, down=True)

        self._order(order)

    def connections(self) -> int:
        """How many clients are connected."""
        found: list[int] = []
        self._order(lambda: found.append(len(self._pairs)))
        return found[0]

    def close(self) -> None:
        """End it, and every connection; idempotent."""

        def order() -> None:
            self._closing = True

        if self._thread.is_alive():
            with contextlib.suppress(RuntimeError):
                self._order(order)
            self._thread.join(PATIENCE)
        for sock in (self._place, self._wake_read, self._wake_write):
            sock.close()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _order(self, work: Callable[[], None]) -> None:
        done = threading.Event()
        errors: list[Exception] = []

        def order() -> None:
            try:
                work()
            except Exception as exc:  # the caller's to know; the connections go on
                errors.append(exc)
            finally:
                done.set()

        self._orders.put(order)
        with contextlib.suppress(OSError):  # it has enough to wake up for, or has ended
            self._wake_write.send(b"!")
        deadline = time.monotonic() + PATIENCE
        while not done.wait(0.1):
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError(f"the proxy on port {self.port} does not run")
        if errors:
            raise errors[0]

    # -- on the thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closing:
                for key, mask in self._selector.select(self._pause()):
                    if key.fileobj is self._wake_read:
                        self._obey()
                    elif key.data is None:
                        self._accept()
                    elif key.data in self._pairs:  # not ended by what came before it
                        self._serve(key.data, key.fileobj, mask)
                self._forward_due()
        finally:
            self._cut()
            self._unlisten()
            self._selector.close()
            # Whoever still waits for an order is let go.
            while not self._orders.empty():
                self._orders.get()()

    def _obey(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_read.recv(4096)
        while True:
            try:
                order = self._orders.get_nowait()
            except queue.Empty:
                return
            order()

    def _pause(self) -> float | None:
        """Seconds until something that was delayed is due."""
        dues = [
            flow.parts[0][0]
            for pair in self._pairs
            for flow in (pair.up, pair.down)
            if flow.parts and self._forwards[flow.name] and flow.parts[0][0] > 0.0
        ]
        now = time.monotonic()
        later = [due - now for due in dues if due > now]
        return min(later, default=None)

    def _forward_due(self) -> None:
        """Some parts may have come due since the selector was told what to wait for."""
        if self._delay or any(flow.due for pair in self._pairs for flow in (pair.up, pair.down)):
            for pair in list(self._pairs):
                self._watch(pair)

    def _listen(self) -> None:
        if self._listener is None:
            self._listener = socket.create_server(("127.0.0.1", self.port), backlog=128)
            self._listener.setblocking(False)
            self._selector.register(self._listener, selectors.EVENT_READ, None)

    def _unlisten(self) -> None:
        if self._listener is not None:
            self._accept()  # who was connected before stays so
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None

    def _accept(self) -> None:
        while self._listener is not None:
            try:
                client, _ = self._listener.accept()
            except OSError:  # nobody there, or gone again
                return
            client.setblocking(False)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pair = _Pair(client)
            self._pairs.add(pair)
            self._connect(pair)

    def _connect(self, pair: _Pair) -> None:
        """Unless nothing gets there."""
        if pair.target is None and self._forwards["up"]:
            pair.target = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            pair.target.setblocking(False)
            pair.target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pair.target.connect_ex(self._target)
        self._watch(pair)

    def _forward(self, *, up: bool, down: bool) -> None:
        self._forwards = {"up": up, "down": down}
        for pair in list(self._pairs):
            self._connect(pair)

    def _cut(self) -> None:
        if self._listener is not None:
            self._accept()  # the kernel may have connected some that we have not seen yet
        for pair in list(self._pairs):
            self._end(pair, reset=True)

    def _end(self, pair: _Pair, *, reset: bool) -> None:
        self._pairs.discard(pair)
        for sock in (pair.client, pair.target):
            if sock is None:
                continue
            if sock in pair.masks:
                self._selector.unregister(sock)
            if reset:
                # An abort: the peer gets a reset, at once.
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
        pair.masks.clear()

    def _watch(self, pair: _Pair) -> None:
        """Tell the selector what to wait for: only what can go on now, as it would return again and again."""
        for sock, source, sink in ((pair.client, pair.up, pair.down), (pair.target, pair.down, pair.up)):
            if sock is None:
                continue
            mask = 0
            if sock is pair.target and not pair.connected:
                mask = selectors.EVENT_WRITE
            else:
                if not source.ended and source.size < BUFFER:
                    mask |= selectors.EVENT_READ
                if self._ready(sink):
                    mask |= selectors.EVENT_WRITE
            if mask == pair.masks.get(sock, 0):
                continue
            if sock not in pair.masks:
                self._selector.register(sock, mask, pair)
            elif mask:
                self._selector.modify(sock, mask, pair)
            else:
                self._selector.unregister(sock)
            if mask:
                pair.masks[sock] = mask
            else:
                del pair.masks[sock]

    def _ready(self, flow: _Flow) -> bool:
        """Whether there is something to forward now: bytes, or their end."""
        if not self._forwards[flow.name]:
            return False
        if flow.parts:
            return flow.parts[0][0] <= time.monotonic()
        return flow.ended and not flow.done

    def _serve(self, pair: _Pair, sock: object, mask: int) -> None:
        try:
            if sock is pair.target and not pair.connected:
                error = pair.target.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if error:
                    raise OSError(error, "no connection to the target")
                pair.connected = True
            elif sock is pair.client:
                self._transfer(pair, mask, pair.client, pair.up, pair.down)
            else:
                assert pair.target is not None
                self._transfer(pair, mask, pair.target, pair.down, pair.up)
        except BlockingIOError:
            pass
        except OSError:
            # What it said before it broke is known to the other side in a real network too, if there is time for it.
            self._end(pair, reset=True)
            return
        if pair in self._pairs:
            if pair.up.done and pair.down.done:
                self._end(pair, reset=False)
            else:
                self._watch(pair)

    def _transfer(self, pair: _Pair, mask: int, sock: socket.socket, source: _Flow, sink: _Flow) -> None:
        if mask & selectors.EVENT_READ:
            self._receive(pair, sock, source)
        if mask & selectors.EVENT_WRITE and pair in self._pairs and self._ready(sink):
            self._send(pair, sock, sink)

    def _receive(self, pair: _Pair, sock: socket.socket, flow: _Flow) -> None:
        try:
            data = sock.recv(max(1, BUFFER - flow.size))
        except ConnectionError:
            if not flow.size and self._forwards[flow.name]:
                raise
            data = b""  # what it said before is still on its way
        if data:
            flow.add(data, time.monotonic() + self._delay if self._delay else 0.0)
            if flow.name == "down" and self._cut_after is not None:
                flow.until_cut, self._cut_after = self._cut_after, None
        else:
            flow.ended = True

    def _send(self, pair: _Pair, sock: socket.socket, flow: _Flow) -> None:
        if not flow.parts:
            flow.done = True
            sock.shutdown(socket.SHUT_WR)
            return
        data = flow.parts[0][1]
        if flow.until_cut is not None:
            data = data[: flow.until_cut]
        sent = sock.send(data) if data else 0
        if flow.until_cut is not None:
            flow.until_cut -= sent
            if flow.until_cut == 0:
                self._end(pair, reset=False)
                return
        flow.take(sent)
