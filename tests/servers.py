"""Servers that misbehave on purpose: real ones, on loopback, byte by byte.

A `Server` runs a *script* for each connection; the ready-made ones below are named for what they do::

    with Server(answer(b"{}")) as server:            # a decent one, keep-alive
        client.get(server.url)
        assert 1 == server.connections

    with Server(hang(), answer(b"{}")) as server:    # the first connection hangs, all later ones are answered
        ...

A script is any callable that takes a `Connection`.  Whatever it waits for ends when the server is closed.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import attrs
import trustme

#: Seconds after which a script gives up by itself, should nobody close the server.
PATIENCE = 60.0


class Gone(Exception):
    """The peer went away, or the server is being closed."""


@attrs.frozen
class Request:
    """What a client asked; names of headers are in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Connection:
    """One accepted connection, as its script sees it.  Everything that waits raises `Gone` when it is over."""

    def __init__(self, server: Server, sock: socket.socket) -> None:
        self._server = server
        self._sock = sock
        self._buffer = b""
        self._until = time.monotonic() + PATIENCE
        self._sock.settimeout(0.05)

    def request(self) -> Request:
        """The next request, once it is complete."""
        while b"\r\n\r\n" not in self._buffer:
            self._more()
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        method, path, _ = first.split(" ", 2)
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(headers.get("content-length", 0))
        while len(self._buffer) < length:
            self._more()
        body, self._buffer = self._buffer[:length], self._buffer[length:]
        request = Request(method, path, headers, body)
        self._server._requests.append(request)
        return request

    def peek_path(self) -> str:
        """The path of the next request, which stays to be read."""
        while b"\r\n" not in self._buffer:
            self._more()
        return self._buffer.split(b" ", 2)[1].decode("latin-1")

    def _more(self) -> None:
        data = self._wait_for(lambda: self._sock.recv(65536))
        if not data:
            raise Gone
        self._buffer += data

    def send(self, data: bytes) -> None:
        """Send all of it, as fast as the peer takes it."""
        sent = 0
        while sent < len(data):
            rest = memoryview(data)[sent:]
            sent += self._wait_for(functools.partial(self._sock.send, rest))

    def drip(self, data: bytes, *, size: int = 1, every: float = 0.05) -> None:
        """Send *size* bytes each *every* seconds."""
        for start in range(0, len(data), size):
            self.send(data[start : start + size])
            self.pause(every)

    def pause(self, seconds: float) -> None:
        if self._server._closing.wait(seconds):
            raise Gone

    def hang(self) -> None:
        """Say nothing until the peer goes away."""
        while True:
            self._more()

    def wait_for_release(self) -> None:
        """Hold on until the test calls `Server.release`."""
        self._wait_for(lambda: self._server.released.wait(0.05) or None)

    def reset(self) -> None:
        """End the connection with a RST."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise Gone

    def _wait_for(self, step: Callable[[], Any]) -> Any:
        while True:
            if self._server._closing.is_set() or time.monotonic() >= self._until:
                raise Gone
            try:
                result = step()
            except (TimeoutError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                continue
            except (OSError, ValueError):
                raise Gone from None
            if result is not None:
                return result


Script = Callable[[Connection], None]


class Server:
    """
    A TCP server on a loopback port of the system's choice, from ``with`` to the end of it.

    The first connection gets the first script, and so on; the last script serves all that follow.  With *tls* (see
    `Authority.context`) the connections are wrapped; one that fails to handshake is counted in `failed_handshakes`.
    """

    def __init__(
        self, *scripts: Script, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1", port: int = 0
    ) -> None:
        self._scripts = scripts
        self._tls = tls
        self._host = host
        self._port = port
        self._closing = threading.Event()
        #: Set by `release`; scripts that hold on wait for it.
        self.released = threading.Event()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._requests: list[Request] = []
        self.connections = 0
        self.failed_handshakes = 0
        #: What scripts raised that they should not have; raised again at the end of the ``with``.
        self._errors: list[BaseException] = []

    def __enter__(self) -> Server:
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        self._listener = socket.create_server((self._host, self._port), family=family, backlog=512)
        self._listener.settimeout(0.05)
        self.port: int = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, name="fault-server", daemon=True)
        self._acceptor.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if self._errors and error is None:
            raise self._errors[0]

    @property
    def url(self) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{'https' if self._tls else 'http'}://{host}:{self.port}"

    @property
    def requests(self) -> tuple[Request, ...]:
        """The requests so far, in the order in which they were complete."""
        return tuple(self._requests)

    def release(self) -> None:
        """Let scripts that wait in `Connection.wait_for_release` go on."""
        self.released.set()

    def close(self) -> None:
        """Stop listening and end all scripts; idempotent."""
        self._closing.set()
        # Wakes the threads that wait for them.
        for sock in (self._listener, *list(self._open)):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
        self._acceptor.join(10)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                sock, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            script = self._scripts[min(self.connections, len(self._scripts) - 1)]
            self.connections += 1
            thread = threading.Thread(target=self._serve, args=(sock, script), name="fault-server", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket, script: Script) -> None:
        try:
            if self._tls is not None and not getattr(script, "before_tls", False):
                sock.settimeout(PATIENCE)
                wrapped = self._tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
                sock = wrapped
                self._handshake(wrapped)
            self._open.add(sock)
            script(Connection(self, sock))
        except Gone:
            pass
        except BaseException as exc:
            self._errors.append(exc)
        finally:
            self._open.discard(sock)
            sock.close()

    def _handshake(self, sock: ssl.SSLSocket) -> None:
        sock.setblocking(False)
        while not self._closing.is_set():
            try:
                sock.do_handshake()
                return
            except ssl.SSLWantReadError:
                select.select([sock], [], [], 0.05)
            except ssl.SSLWantWriteError:
                select.select([], [sock], [], 0.05)
            except OSError:
                self.failed_handshakes += 1
                break
        raise Gone


@contextlib.contextmanager
def refusing() -> Iterator[str]:
    """The URL of a port on which nobody listens, and nobody else can while this lasts."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"


@contextlib.contextmanager
def swallowing() -> Iterator[str]:
    """The URL of a port that never completes a connection: its queue is full, as if packets were lost."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


# -- scripts --------------------------------------------------------------------------------------------------------


def head(status: int = 200, headers: Mapping[str, object] | None = None, *, length: int | None = None) -> bytes:
    """Status line and headers, with the empty line behind them."""
    lines = [f"HTTP/1.1 {status} Whatever"]
    if length is not None:
        lines.append(f"Content-Length: {length}")
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def answer(
    body: bytes | Callable[[Request], bytes] = b"{}",
    status: int = 200,
    headers: Mapping[str, object] | None = None,
    *,
    times: int | None = None,
) -> Script:
    """Decent HTTP with keep-alive; after *times* answers the connection is closed without notice."""

    def script(connection: Connection) -> None:
        answered = 0
        while times is None or answered < times:
            request = connection.request()
            content = body(request) if callable(body) else body
            connection.send(head(status, headers, length=len(content)) + content)
            answered += 1

    return script


def raw(data: bytes, *, then_hang: bool = False) -> Script:
    """Read a request, send exactly *data*, and close or say no more."""

    def script(connection: Connection) -> None:
        connection.request()
        connection.send(data)
        if then_hang:
            connection.hang()

    return script


def hang() -> Script:
    """Accept, and never say a word."""
    return lambda connection: connection.hang()


def hang_after_request(data: bytes = b"") -> Script:
    """Read a request, send *data*, and never say another word."""
    return raw(data, then_hang=True)


def answer_when_released(body: bytes = b"{}") -> Script:
    """Answer each request only once the test has called `Server.release`."""

    def script(connection: Connection) -> None:
        while True:
            connection.request()
            connection.wait_for_release()
            connection.send(head(length=len(body)) + body)

    return script


def close_at_once() -> Script:
    """Close before reading anything."""
    return lambda connection: None


def close_after_request() -> Script:
    """Read a request and close without an answer."""
    return raw(b"")


def reset_after_request(data: bytes = b"") -> Script:
    """Read a request, send *data*, and reset the connection."""

    def script(connection: Connection) -> None:
        connection.request()
        connection.send(data)
        connection.reset()

    return script


def drip_body(size: int = 1, every: float = 0.02) -> Script:
    """A body that keeps arriving, a little at a time, for ever."""

    def script(connection: Connection) -> None:
        connection.request()
        connection.send(head(length=1_000_000))
        connection.drip(b"x" * 1_000_000, size=size, every=every)

    return script


def drip_head(every: float = 0.02) -> Script:
    """A status line and headers that keep arriving, byte by byte."""

    def script(connection: Connection) -> None:
        connection.request()
        connection.drip(head(headers={"X-Slow": "x" * 50_000}), every=every)

    return script


def endless(start: bytes, piece: bytes) -> Script:
    """*start*, and then *piece* again and again, as fast as it is taken."""

    def script(connection: Connection) -> None:
        connection.request()
        connection.send(start)
        while True:
            connection.send(piece)

    return script


def endless_body() -> Script:
    """A body without a length and without an end."""
    return endless(head(), b"x" * 65536)


def endless_chunks(size: bytes = b"10000") -> Script:
    """A chunked body without an end."""
    return endless(head(headers={"Transfer-Encoding": "chunked"}), size + b"\r\n" + b"x" * 65536 + b"\r\n")


def endless_chunk_line() -> Script:
    """A chunk whose size has more digits than one can wait for."""
    return endless(head(headers={"Transfer-Encoding": "chunked"}), b"0" * 65536)


def endless_trailers() -> Script:
    """A chunked body that is complete but for the headers behind it, which do not end."""
    return endless(head(headers={"Transfer-Encoding": "chunked"}) + b"2\r\n{}\r\n0\r\n", b"X-More: 1\r\n" * 1000)


def negative_chunk() -> Script:
    """A chunk of size -1, which Python's reader takes for "all there is"."""
    return endless(head(headers={"Transfer-Encoding": "chunked"}) + b"-1\r\n", b"x" * 65536)


def endless_headers() -> Script:
    """Headers without an end."""
    return endless(b"HTTP/1.1 200 OK\r\n", b"X-More: 1\r\n")


def endless_header_line() -> Script:
    """One header without an end."""
    return endless(b"HTTP/1.1 200 OK\r\nX-More: ", b"x" * 65536)


def endless_1xx(status: int = 100, every: float = 0.0) -> Script:
    """Interim answers without an end."""

    def script(connection: Connection) -> None:
        connection.request()
        while True:
            connection.send(head(status))
            if every:
                connection.pause(every)

    return script


def cut_off(body: bytes = b"0123456789", after: int = 5) -> Script:
    """Announce *body*, send the first *after* bytes of it, and close."""
    return raw(head(length=len(body)) + body[:after])


def chunked(*pieces: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    """*pieces* in chunked framing, without the head."""
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + end


def gzip_bomb(size: int = 200 << 20) -> Script:
    """An answer that decompresses to *size* bytes."""
    packed = gzip.compress(bytes(size), compresslevel=1)
    return answer(packed, headers={"Content-Encoding": "gzip"})


def redirect(to: str, status: int = 302) -> Script:
    """Send the client elsewhere."""
    return answer(b"", status=status, headers={"Location": to})


def tunnel() -> Script:
    """An HTTP proxy that does what CONNECT asks."""

    def script(connection: Connection) -> None:
        host, _, port = connection.request().path.rpartition(":")
        with socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE) as target:
            connection.send(b"HTTP/1.1 200 Connected\r\n\r\n")
            ways = {connection._sock: target, target: connection._sock}
            while True:
                connection.pause(0)
                for source in select.select(list(ways), [], [], 0.05)[0]:
                    try:
                        data = source.recv(65536)
                        ways[source].sendall(data)
                    except OSError:
                        raise Gone from None
                    if not data:
                        raise Gone

    return script


def before_tls(script: Script) -> Script:
    """Run *script* on the bare connection of a server that is asked for TLS."""

    def bare(connection: Connection) -> None:
        script(connection)

    bare.before_tls = True  # type: ignore[attr-defined]
    return bare


# -- certificates ---------------------------------------------------------------------------------------------------


class Authority:
    """A certificate authority that exists for a test; its files live in *directory*."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._ca = trustme.CA()
        self.ca_path = str(directory / "ca.pem")
        self._ca.cert_pem.write_to_path(self.ca_path)

    def context(self, *names: str, client_certificate: bool = False, **options: Any) -> ssl.SSLContext:
        """For `Server(tls=…)`: a certificate for *names* (default 127.0.0.1); *options* as `trustme.CA.issue_cert`."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._ca.issue_cert(*(names or ("127.0.0.1", "localhost")), **options).configure_cert(context)
        if client_certificate:
            self._ca.configure_trust(context)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def client_files(self, name: str = "client") -> tuple[str, str]:
        """The paths of a client's certificate and key."""
        issued = self._ca.issue_cert(f"{name}@example.org")
        chain, key = self._directory / f"{name}.pem", self._directory / f"{name}.key"
        chain.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(str(key))
        return str(chain), str(key)
