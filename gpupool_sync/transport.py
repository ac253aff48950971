"""How one statistics server is asked: HTTP/1.1 over `requests`, bounded in time and in memory.

`requests` bounds each wait, not the answer: a server that sends a byte now and then holds it for ever.  Here an
exchange has one deadline, which every step shares: connecting, the TLS handshake, sending, reading, and the retries
between them.  The sockets see to it: before each operation they ask the exchange of their thread for the time that is
left.  The one step that no deadline reaches is the name lookup of the system (``getaddrinfo``), which cannot be
interrupted; an address instead of a name avoids it.

Every error of a library or a server becomes ours here, once.
"""

from __future__ import annotations

import contextlib
import email.utils

# These, and netrc, only to have them: requests and http.client import them in their first exchange, on a thread of
# ours. A fork at that instant would leave the child a half imported module, which it waits for for ever.
import encodings.ascii
import encodings.idna  # noqa: F401
import enum
import errno
import functools
import http.client
import importlib.metadata
import io
import logging
import math
import netrc  # noqa: F401
import os
import queue
import re
import socket
import ssl
import sys
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit

import attrs
import requests
import urllib3.exceptions
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.util.connection import allowed_gai_family
from urllib3.util.retry import Retry

from gpupool_sync import wire
from gpupool_sync.errors import BadAnswer, EndpointUnavailable, GPUPoolError, unpin

if TYPE_CHECKING:
    from gpupool_sync.clock import Deadline
    from gpupool_sync.config import Endpoint

    _SocketBase = socket.socket
else:
    _SocketBase = object

#: An answer may have so many bytes, before and after decompression. 10,000 GPUs need a third of it.
MAX_BODY_BYTES = 4 * 1024 * 1024
#: What a server may send for one answer in all, with headers and chunk framing. Bounds what http.client reads at a
#: stretch on a server's word, such as a chunk of size -1.
MAX_WIRE_BYTES = MAX_BODY_BYTES + 1024 * 1024
#: Retry-After is believed up to so many seconds.
MAX_RETRY_AFTER = 300.0

#: A request of `Turn.SOON` waits for its turn under `max_rate` so many seconds at most.
SOON = 1.0

#: Idle connections kept; more callers at once than that get one each, which is closed afterwards.
_POOL_SIZE = 32
_CHUNK_BYTES = 64 * 1024
#: Paths are few and known; the bound is for those that carry an id.
_KEPT_REQUESTS = 32
#: ``settimeout`` refuses durations that do not fit its C type.
_LONGEST_WAIT = 1e6


@attrs.frozen
class Answer:
    """What the server said, whatever the status: a redirect or an error is an answer too."""

    status: int
    #: Keys in any case.  The values are the server's words: escape them before they reach a screen.
    headers: Mapping[str, str]
    body: bytes = attrs.field(repr=False)  # decompressed
    elapsed: float  # seconds from the first attempt to the last byte


def retry_after(answer: Answer) -> float | None:
    """Seconds that the server asks to be left alone, at most `MAX_RETRY_AFTER`; None if it asks nothing sensible."""
    text = answer.headers.get("Retry-After", "").strip()
    # float() alone would also take "nan", "1_0" and digits of other scripts.
    if re.fullmatch(r"[0-9]+(\.[0-9]*)?", text):
        return min(float(text), MAX_RETRY_AFTER)
    then = _http_date(text)
    if then is None:
        return None
    # By the server's own clock, where it tells it: ours may differ by minutes.
    now = _http_date(answer.headers.get("Date", ""))
    return min(max(0.0, then - (time.time() if now is None else now)), MAX_RETRY_AFTER)


def _http_date(text: str) -> float | None:
    try:
        parts = email.utils.parsedate_tz(text[:100])
        return None if parts is None else float(email.utils.mktime_tz(parts))
    except (ValueError, OverflowError, TypeError, IndexError):
        return None


class Turn(enum.Enum):
    """When a request is sent, as far as `max_rate` has a say in it."""

    WAIT = "in its turn, if that comes before the deadline"
    SOON = "in its turn, if that comes within `SOON` seconds and before the deadline"
    NOW = "at once; it is counted, so the others come later"
    TAKEN = "at once; `Transport.await_turn` has taken its turn"


class NoTurn(EndpointUnavailable):
    """The server was not asked, as `max_rate` allows that only in `retry_after` seconds: it need not be sick."""


class Pace:
    """
    Whose turn it is under the `max_rate` of one endpoint, shared by all connections to it.

    Args:
        rate: requests per second.
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._next = 0.0  # time.monotonic() from which the next request is allowed
        self.forget_after_fork()

    def forget_after_fork(self) -> None:
        """In a forked child: a new lock; what the parent sent a moment ago counts here too."""
        # Guards _next: arithmetic only.
        self._lock = threading.Lock()

    def take(self, latest: float) -> tuple[float, bool]:
        """The instant of the next turn, and whether it was taken: not if it comes after *latest*."""
        with self._lock:
            turn = max(time.monotonic(), self._next)
            if turn > latest:
                return turn, False
            self._next = turn + 1.0 / self.rate
            return turn, True

    def count(self) -> None:
        """A request is sent without a turn: those to come wait longer, so that the rate holds in the long run."""
        with self._lock:
            self._next = max(time.monotonic(), self._next) + 1.0 / self.rate


def pace_of(endpoint: Endpoint) -> Pace | None:
    """A new pace for *endpoint*; None if it has no `max_rate`."""
    return None if endpoint.max_rate is None else Pace(endpoint.max_rate)


class Transport:
    """
    The connections to one endpoint; any number of threads may ask at once.

    Transports to the same endpoint share a *pace*; without one, `max_rate` holds for this one alone.

    `get` and `post` return whatever the server answered, or raise one of ours:

    Raises:
        EndpointUnavailable: no complete answer arrived within the deadline, or the transport was closed.
        NoTurn: its turn under `max_rate` comes too late.
        BadAnswer: what arrived is no HTTP, or too large.

    Cookies are not kept and redirects are not followed.  With ``verify=False`` certificates are not looked at, without
    further warning.
    """

    def __init__(self, endpoint: Endpoint, *, max_retries: int = 3, pace: Pace | None = None) -> None:
        self._endpoint = endpoint
        self._max_retries = max_retries
        self._pace = pace_of(endpoint) if pace is None else pace
        self._refusing = False
        self._start_afresh()

    def _start_afresh(self) -> None:
        # Guards _link, _exchanges, and the change of _refusing to True.  Innermost: held for assignments
        # and set operations only, never while connecting, reading files, waiting, or closing.
        self._lock = threading.Lock()
        self._link: _Link | None = None
        self._exchanges: set[_Exchange] = set()
        # Set when exchanges are to end; waits that are not on a socket wait on this.
        self._stopped = threading.Event()
        # Every socket made, so that a forked child finds the parent's.  Iterated only there, where one thread is left.
        self._sockets: weakref.WeakSet[_Bounded] = weakref.WeakSet()

    def await_turn(self, deadline: Deadline) -> None:
        """
        Take the next turn under `max_rate` and wait for it: the request that follows is of `Turn.TAKEN`.

        Raises:
            NoTurn: it comes after the deadline, and was not taken.
            EndpointUnavailable: the transport was closed meanwhile.
        """
        try:
            self._wait_for_turn(deadline, Turn.WAIT)
        except ConnectionAbortedError as exc:
            raise self._unavailable("given up, its connections were closed") from exc

    def get(self, path: str, deadline: Deadline, turn: Turn = Turn.WAIT) -> Answer:
        """Ask for *path* (``/gpu/summary``)."""
        return self._exchange("GET", path, None, deadline, turn)

    def post(self, path: str, payload: Mapping[str, object], deadline: Deadline, turn: Turn = Turn.WAIT) -> Answer:
        """
        Send *payload* as JSON to *path*.

        It is repeated like a GET when the connection ends without an answer, so the request must be idempotent.
        """
        body = wire.dump(payload)
        return self._exchange("POST", path, body, deadline, turn)

    def pause(self, seconds: float) -> None:
        """Wait so long, or until the transport is closed."""
        self._stopped.wait(seconds)

    def abort(self) -> None:
        """From any thread: exchanges under way fail at once with `EndpointUnavailable`, new ones are refused."""
        with self._lock:
            self._refusing = True
            exchanges = list(self._exchanges)
        self._stopped.set()
        for exchange in exchanges:
            exchange.abort()

    def close(self) -> None:
        """End exchanges under way, close the connections and refuse new ones; idempotent."""
        self.abort()
        with self._lock:
            link, self._link = self._link, None
        if link is not None:
            link.close()

    def forget_after_fork(self) -> None:
        """In a forked child: let go of the parent's connections without a word on them, and start afresh."""
        # No lock of before the fork may be touched: the thread that held it does not exist here.
        for sock in list(self._sockets):
            # Closing our copy of the descriptor leaves the parent's connection as it is; shutdown would end it.
            descriptor = sock.detach()
            if descriptor >= 0:
                os.close(descriptor)
        if self._link is not None:
            self._link.forget()
        if self._pace is not None:
            self._pace.forget_after_fork()
        _current.exchange = None
        self._start_afresh()
        if self._refusing:
            self._stopped.set()

    # -- one exchange ------------------------------------------------------------------------------------------

    def _exchange(self, method: str, path: str, body: bytes | None, deadline: Deadline, turn: Turn) -> Answer:
        exchange = _Exchange(self, deadline, turn)
        with self._lock:
            refused = self._refusing
            if not refused:
                self._exchanges.add(exchange)
        if refused:
            raise self._unavailable("not asked, its connections are closed")
        link: _Link | None = None
        response: requests.Response | None = None
        complete = False
        try:
            _current.exchange = exchange
            if deadline.passed():
                raise self._unavailable("not asked, no time was left for it")
            self._wait_for_turn(deadline, turn)
            link = self._opened()
            url = self._endpoint.url + path
            begin = time.monotonic()
            found = self._on_kept(link, method, url, body, exchange)
            if isinstance(found, tuple):
                return Answer(*found, time.monotonic() - begin)
            timeout = deadline.within(_LONGEST_WAIT) or sys.float_info.min
            response = link.send(link.request(method, url, body), timeout, found)
            raw = response.raw
            read = functools.partial(raw.read, decode_content=False)
            content = self._read(response.status_code, response.headers, raw.length_remaining, read, exchange)
            elapsed = time.monotonic() - begin
            # Ended by abort(), a body without a length looks complete.
            if exchange.aborted:
                raise ConnectionAbortedError
            complete = True
            return Answer(response.status_code, response.headers, content, elapsed)
        except GPUPoolError:
            raise
        except Exception as exc:
            unpin(exc)
            raise self._translated(exc, exchange, link) from exc
        finally:
            if response is not None and not complete:
                # What is left of this answer must not become the beginning of the next.
                response.close()
            _current.exchange = None
            with self._lock:
                self._exchanges.discard(exchange)

    def _opened(self) -> _Link:
        link = self._link
        if link is not None:
            return link
        # Outside the lock, it reads files.  Two threads may both do it; the second one's is thrown away.
        fresh = _Link.open(self._endpoint, self._max_retries)
        with self._lock:
            if self._link is None and not self._refusing:
                self._link = fresh
            link = self._link
        if link is not fresh:
            fresh.close()
        if link is None:
            raise self._unavailable("not asked, its connections are closed")
        return link

    def _wait_for_turn(self, deadline: Deadline, turn: Turn) -> None:
        pace = self._pace
        if pace is None or turn is Turn.TAKEN:
            return
        if turn is Turn.NOW:
            pace.count()
            return
        latest = math.inf if deadline.at is None else deadline.at
        if turn is Turn.SOON:
            latest = min(latest, time.monotonic() + SOON)
        at, taken = pace.take(latest)
        wait = at - time.monotonic()
        if not taken:
            message = f"not asked, max_rate={pace.rate:g} allows the next request only in {wait:.2f} s"
            raise NoTurn(self._endpoint.id, message, max(0.0, wait))
        self._pause(wait)

    def _pause(self, seconds: float) -> None:
        if seconds > 0 and self._stopped.wait(min(seconds, _LONGEST_WAIT)):
            raise ConnectionAbortedError

    def _on_kept(
        self, link: _Link, method: str, url: str, body: bytes | None, exchange: _Exchange
    ) -> tuple[int, Mapping[str, str], bytes] | Retry | None:
        """
        Status, headers and body over a kept connection: the short way, half of what the layers above it cost.

        None: there is no such connection.  It may have ended while nobody looked; then what is left of the retries.
        """
        kept = link.kept()
        if kept is None:
            return None
        pool, connection = kept
        response: http.client.HTTPResponse | None = None
        complete = False
        try:
            try:
                connection.sock.sendall(link.rendered(method, url, body))
                begun = connection.sock.recv(_CHUNK_BYTES)
                plain = _plain_head(begun)
                if plain is None:
                    resumed: Any = _Resumed(begun, connection.sock)
                    response = http.client.HTTPResponse(resumed, method=method)
                    response.begin()
            except (OSError, http.client.HTTPException) as exc:
                # As urllib3 does it, which also says whether it is to be tried again.
                # Without its frames, of which this is one: what is left of the retries remembers it.
                error = urllib3.exceptions.ProtocolError("Connection aborted.", exc.with_traceback(None))
                retries = link.adapter.max_retries.increment(method, url, error=error, _pool=pool)
                retries.sleep()
                return retries
            if plain is not None:
                content = self._rest_of(begun, plain, connection.sock, exchange)
                # What is more than it says must not become the beginning of the next answer.
                complete = len(content) == plain.length
                return plain.status, plain.headers, content[: plain.length]
            assert response is not None
            headers = urllib3.HTTPHeaderDict(response.msg.items())
            if len(set(re.split(r"\s*,\s*", headers.get("Content-Length", "")))) > 1:
                raise urllib3.exceptions.InvalidHeader("several lengths")
            content = self._read(response.status, headers, response.length, response.read, exchange)
            # Ended by abort(), a body without a length looks complete.
            if exchange.aborted:
                raise ConnectionAbortedError
            complete = not response.will_close
            return response.status, headers, content
        finally:
            if not complete:
                if response is not None:
                    response.close()  # it has the descriptor open too
                connection.close()
            pool._put_conn(connection)

    def _rest_of(self, begun: bytes, plain: _PlainHead, sock: socket.socket, exchange: _Exchange) -> bytes:
        """The body, of which *begun* has the head and a part; and what came with the end of it."""
        exchange.announced = plain.length
        content = begun[plain.end :]
        if len(content) < plain.length:
            pieces, size = [content], len(content)
            while size < plain.length:
                exchange.read = size
                # Never less than a TLS record: what is left of one does not show when the connection is used next.
                piece = sock.recv(_CHUNK_BYTES)
                if not piece:
                    raise http.client.IncompleteRead(b"", plain.length - size)
                pieces.append(piece)
                size += len(piece)
            content = b"".join(pieces)
        # Ended by abort(), it may be what was on its way.
        if exchange.aborted:
            raise ConnectionAbortedError
        return content

    def _read(
        self,
        status: int,
        headers: Mapping[str, str],
        announced: int | None,
        read: Callable[[int], bytes],
        exchange: _Exchange,
    ) -> bytes:
        """The whole body, decompressed, never more of it in memory than allowed."""
        if status < 200:
            # http.client takes 103 for the answer; the real one would arrive as the answer to the next request.
            raise self._bad(f"answered with status {status}, which announces another answer")
        exchange.announced = announced
        if announced is not None and announced > MAX_BODY_BYTES:
            raise self._bad(f"announced an answer of {_mib(announced)}, allowed are {_mib(MAX_BODY_BYTES)}")
        pieces: list[bytes] = []
        size = 0
        while piece := read(_CHUNK_BYTES):
            size += len(piece)
            exchange.read = size
            if size > MAX_BODY_BYTES:
                raise self._bad(f"its answer is larger than {_mib(MAX_BODY_BYTES)}")
            pieces.append(piece)
        if announced is not None and size < announced:
            raise http.client.IncompleteRead(b"", announced - size)
        body = b"".join(pieces)
        encoding = headers.get("Content-Encoding", "").strip().lower()
        if not body or encoding in ("", "identity"):
            return body
        # Asked for identity, some servers and proxies compress all the same.
        if encoding not in ("gzip", "x-gzip", "deflate"):
            raise self._bad(f"its answer is encoded as {_plain(encoding)}, which was not asked for")
        try:
            return _inflated(body, encoding)
        except _TooLarge as exc:
            raise self._bad(f"its answer is larger than {_mib(MAX_BODY_BYTES)} when decompressed") from exc
        except zlib.error as exc:
            raise self._bad(f"its answer says that it is {encoding}, but it is not") from exc

    # -- errors ------------------------------------------------------------------------------------------------

    def _unavailable(self, message: str) -> EndpointUnavailable:
        return EndpointUnavailable(self._endpoint.id, message)

    def _bad(self, message: str) -> BadAnswer:
        return BadAnswer(self._endpoint.id, message)

    def _translated(self, exc: Exception, exchange: _Exchange, link: _Link | None) -> GPUPoolError:
        """What *exc* means to a user; no secrets, and nothing of the server's that is not escaped."""
        causes = list(_causes(exc))
        if exchange.aborted or self._stopped.is_set():
            return self._unavailable("given up, its connections were closed")
        if link is None:
            # With the path of the file in it, which may be long, and the reason behind that.
            return self._unavailable(f"its connections cannot be set up: {_plain(str(exc), 500)}")
        via = f" through the proxy {link.proxy}" if link.proxy else ""
        # Without TLS there is no tunnel: we only ever speak with the proxy.
        past_proxy = exchange.tunnelled and self._endpoint.url.startswith("https:")
        where = f"the proxy {link.proxy}" if link.proxy and not past_proxy else "the server"
        if exchange.overlong:
            return self._bad(f"its answer{via} is larger than {_mib(MAX_BODY_BYTES)}")
        for cause in causes:
            if isinstance(cause, ssl.SSLError) and not isinstance(cause, TimeoutError):
                return self._unavailable(_tls_trouble(cause, where))
            # urllib3 looks at nothing else itself.
            if isinstance(cause, urllib3.exceptions.SSLError) and "ingerprint" in str(cause):
                return self._unavailable(
                    f"the certificate of {where} has another fingerprint than the one it should have"
                )
        for cause in causes:
            if isinstance(cause, TimeoutError):
                what = "connection" if exchange.connecting else "complete answer"
                within = "" if exchange.allowed is None else f" within {exchange.allowed:.2f} s"
                return self._unavailable(f"no {what}{within}{via}")
            if isinstance(cause, socket.gaierror):
                return self._unavailable(f"the name of {where} cannot be resolved: {_plain(_strerror(cause))}")
            if isinstance(cause, http.client.RemoteDisconnected):
                return self._unavailable(f"{where} closed the connection without an answer")
            if isinstance(cause, http.client.LineTooLong):
                return self._bad(f"its answer{via} has an endless line in its head or framing")
            if isinstance(cause, (http.client.BadStatusLine, http.client.UnknownProtocol)):
                line = str(cause.args[0]) if cause.args else ""
                return self._bad(f"does not answer{via} in HTTP/1.1: {_plain(line)}")
            if isinstance(cause, (http.client.IncompleteRead, urllib3.exceptions.DecodeError)):
                return self._unavailable(_broke_off(exchange, via))
            if isinstance(cause, urllib3.exceptions.InvalidHeader):
                return self._bad(f"its answer{via} has contradictory headers")
            if isinstance(cause, http.client.HTTPException):
                return self._bad(f"its answer{via} is not valid HTTP: {_plain(str(cause))}")
            if isinstance(cause, OSError) and not isinstance(cause, requests.RequestException):
                if exchange.received:
                    return self._unavailable(_broke_off(exchange, via))
                if isinstance(cause, ConnectionRefusedError):
                    return self._unavailable(f"{where} refused the connection")
                if not exchange.connecting and isinstance(cause, ConnectionError):
                    return self._unavailable(f"{where} closed the connection without an answer")
                return self._unavailable(f"{where} cannot be reached: {_plain(_strerror(cause))}")
        return self._unavailable(f"asking it failed: {type(causes[-1]).__name__}")


def _broke_off(exchange: _Exchange, via: str) -> str:
    if exchange.announced is not None:
        return f"its answer{via} broke off after {exchange.read} of {exchange.announced} bytes"
    return f"its answer{via} broke off"


class _TooLarge(Exception):
    """Decompressed, the body exceeds the cap."""


def _inflated(body: bytes, encoding: str) -> bytes:
    if encoding == "deflate":
        # By the standard a zlib stream; some servers send the bare deflate data.
        try:
            return _inflated_as(zlib.MAX_WBITS, body)
        except zlib.error:
            return _inflated_as(-zlib.MAX_WBITS, body)
    return _inflated_as(16 + zlib.MAX_WBITS, body)


def _inflated_as(window: int, body: bytes) -> bytes:
    inflater = zlib.decompressobj(window)
    result = inflater.decompress(body, MAX_BODY_BYTES + 1)
    if len(result) > MAX_BODY_BYTES:
        raise _TooLarge
    # One stream and nothing behind it: a row of tiny ones would cost time without end.
    if not inflater.eof or inflater.unused_data:
        raise zlib.error("incomplete, or something follows")
    return result


def _plain(text: str, most: int = 80) -> str:
    """Text of unknown origin, fit for a log and a screen: escaped and at most *most* characters long."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: most + 1])
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def _mib(size: int) -> str:
    return f"{size / (1 << 20):g} MiB" if size < 1 << 40 else "more than 1 TiB"


def _strerror(exc: OSError) -> str:
    return exc.strerror or str(exc) or type(exc).__name__


def _tls_trouble(exc: ssl.SSLError, where: str) -> str:
    if isinstance(exc, ssl.SSLCertVerificationError):
        message = f"the certificate of {where} was not accepted: {_plain(exc.verify_message)}"
        # OpenSSL: 18 to 21 are the ways in which nobody vouches for the certificate.
        if exc.verify_code in (18, 19, 20, 21):
            message += "; Endpoint(verify='/path/ca.pem') trusts an own CA"
        return message
    reason = exc.reason or ""
    if "CERTIFICATE_REQUIRED" in reason or "HANDSHAKE_FAILURE" in reason:
        return f"{where} refused the TLS connection ({_plain(reason)}); does it want Endpoint(cert=…)?"
    if reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "RECORD_LAYER_FAILURE"):
        return f"{where} does not speak TLS ({reason}); is its URL http:// instead of https://?"
    if isinstance(exc, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
        return f"{where} closed the connection during the TLS handshake"
    return f"TLS failed with {where}: {_plain(reason or _strerror(exc))}"


def _causes(exc: BaseException) -> Iterator[BaseException]:
    """*exc* and what it wraps, the inner ones last; not ``__context__``, which may be the caller's own trouble."""
    seen: set[int] = set()
    left: list[object] = [exc]
    while left:
        cause = left.pop(0)
        if not isinstance(cause, BaseException) or id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        left += [*cause.args, getattr(cause, "reason", None), getattr(cause, "original_error", None), cause.__cause__]


# -- answers as nearly all are ----------------------------------------------------------------------------------------

#: The head of an answer of which nothing needs to be thought about: http.client takes 30 µs for it, half of a poll.
_PLAIN_HEAD = re.compile(rb"HTTP/1\.1 ([2-5][0-9][0-9]) [ -~]*\r\n((?:[!#-'*+.0-9A-Z^-z|~-]+:[\t -~]*\r\n)+)\r\n")
_PLAIN_LENGTH = re.compile(r"[0-9]{1,9}")
#: What says more of the body than its length.
_NOT_PLAIN = frozenset({"transfer-encoding", "content-encoding", "upgrade", "trailer"})


class _Headers(dict[str, str]):
    """Headers by their names in small letters, asked for in any."""

    def __getitem__(self, name: str) -> str:
        return super().__getitem__(name.lower())

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(name.lower(), default)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and super().__contains__(name.lower())


class _PlainHead:
    """Status and headers; where the body begins, and how long it is."""

    __slots__ = ("end", "headers", "length", "status")

    def __init__(self, status: int, headers: _Headers, length: int, end: int) -> None:
        self.status = status
        self.headers = headers
        self.length = length
        self.end = end


def _plain_head(begun: bytes) -> _PlainHead | None:
    """
    The head, if *begun* has all of it, and it tells the length of a body, on a connection that is kept.

    None: http.client knows what it means, and says what is wrong with it.
    """
    found = _PLAIN_HEAD.match(begun)
    if found is None:
        return None
    headers = _Headers()
    for line in found[2].decode("ascii").split("\r\n")[:-1]:
        name, _, value = line.partition(":")
        name = name.lower()
        if name in _NOT_PLAIN or name in headers:
            return None
        headers[name] = value.lstrip(" \t")
    status, length = int(found[1]), headers.get("content-length", "")
    if status in (http.client.NO_CONTENT, http.client.NOT_MODIFIED) or not _PLAIN_LENGTH.fullmatch(length):
        return None
    if "close" in headers.get("connection", "").lower():
        return None
    plain = _PlainHead(status, headers, int(length), found.end())
    return None if plain.length > MAX_BODY_BYTES else plain


class _Resumed(io.RawIOBase):
    """A socket as http.client wants it, of whose answer a part has been read."""

    def __init__(self, begun: bytes, sock: socket.socket) -> None:
        self._begun = begun
        self._sock = sock

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._begun:
            return self._sock.recv_into(buffer)
        number = min(len(buffer), len(self._begun))
        buffer[:number] = self._begun[:number]
        self._begun = self._begun[number:]
        return number


# -- what bounds an exchange: the exchange itself, sockets, retries ------------------------------------------------


class _Exchange:
    """One request and its answer.  It belongs to the thread that makes it; only `abort` is called by others."""

    __slots__ = (
        "aborted",
        "allowed",
        "announced",
        "connecting",
        "deadline",
        "overlong",
        "read",
        "received",
        "sock",
        "transport",
        "tunnelled",
        "turn",
    )

    def __init__(self, transport: Transport, deadline: Deadline, turn: Turn) -> None:
        self.transport = transport
        self.deadline = deadline
        self.turn = turn
        self.allowed = deadline.remaining()
        self.sock: _Bounded | None = None  # the one in use
        self.aborted = False
        # As they are on a kept connection.
        self.connecting = False
        self.tunnelled = True  # past the proxy, if there is one: what follows is with the server itself
        self.received = 0  # bytes since the last connection was made
        self.overlong = False
        self.announced: int | None = None  # bytes of the body, by Content-Length
        self.read = 0  # bytes of the body, so far

    def arm(self, sock: _Bounded) -> None:
        """Give *sock* the time that is left for its next operation."""
        # In this order: abort() sets the flag and then shuts down `sock`, so that one of the two catches us.
        self.sock = sock
        if self.aborted:
            raise ConnectionAbortedError(errno.ECONNABORTED, "given up")
        at = self.deadline.at
        if at is None:
            sock.settimeout(None)
            return
        left = at - time.monotonic()
        if left <= 0:
            # settimeout(0) would mean "do not wait", not "too late".
            raise TimeoutError("the deadline has passed")
        sock.settimeout(min(left, _LONGEST_WAIT))

    def took(self, count: int) -> None:
        self.received += count
        if self.received > MAX_WIRE_BYTES:
            self.overlong = True
            raise OSError(errno.EMSGSIZE, "the answer is too large")

    def abort(self) -> None:
        self.aborted = True
        sock = self.sock
        if sock is not None:
            # Wakes the thread that waits for it.  Of the base class: SSLSocket.shutdown takes away the TLS state under
            # a reader, who would then read ciphertext.
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def may_retry(self, error: Exception) -> bool:
        """Whether *error* came before an answer began, and trying again can help."""
        if self.aborted or self.received or self.deadline.passed():
            return False
        for cause in _causes(error):
            # The system's resolver has its own retries, and each of ours may take it long.
            if isinstance(cause, (TimeoutError, socket.gaierror)):
                return False
            if isinstance(cause, ssl.SSLError):
                # Otherwise than by its end, a kept TLS connection gone stale does not show itself.
                return isinstance(cause, (ssl.SSLEOFError, ssl.SSLZeroReturnError))
        retried = (
            urllib3.exceptions.NewConnectionError,
            urllib3.exceptions.ProtocolError,
            urllib3.exceptions.ProxyError,
        )
        return isinstance(error, retried)


class _Current(threading.local):
    exchange: _Exchange | None = None
    wrapping: _TLSSocket | None = None  # made of a plain socket, not returned by `ssl` yet


_current = _Current()


class _Bounded(_SocketBase):
    """A socket whose operations end with the exchange of the thread that calls them."""

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        exchange = _current.exchange
        if exchange is None:
            return super().recv_into(*args, **kwargs)
        exchange.arm(self)
        count = super().recv_into(*args, **kwargs)
        exchange.took(count)
        return count

    def recv(self, *args: Any, **kwargs: Any) -> bytes:
        exchange = _current.exchange
        if exchange is None:
            return super().recv(*args, **kwargs)
        exchange.arm(self)
        data = super().recv(*args, **kwargs)
        exchange.took(len(data))
        return data

    def send(self, *args: Any, **kwargs: Any) -> int:
        if (exchange := _current.exchange) is not None:
            exchange.arm(self)
        return super().send(*args, **kwargs)

    def sendall(self, *args: Any, **kwargs: Any) -> None:
        if (exchange := _current.exchange) is not None:
            exchange.arm(self)
        super().sendall(*args, **kwargs)


class _Socket(_Bounded, socket.socket):
    """A plain one."""


class _TLSSocket(_Bounded, ssl.SSLSocket):
    """One that `ssl` makes of a plain one, taking over its descriptor."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _TLSSocket:
        made = super().__new__(cls, *args, **kwargs)
        _current.wrapping = made
        return made

    def do_handshake(self, block: bool = False) -> None:
        if (exchange := _current.exchange) is not None:
            exchange.arm(self)
            exchange.transport._sockets.add(self)
            # What a proxy said on the way here is not the answer.
            exchange.received = 0
            exchange.tunnelled = True
        super().do_handshake(block)


class _TLSContext(ssl.SSLContext):
    """
    Shared by connections and threads, so never changed once it is made.

    urllib3 sets the ALPN protocols before each handshake, always the same; while another thread handshakes, OpenSSL
    would free the list that it reads.
    """

    sslsocket_class = _TLSSocket
    _settled = False

    def settle(self) -> None:
        super().set_alpn_protocols(["http/1.1"])
        self._settled = True

    def wrap_socket(self, *args: Any, **kwargs: Any) -> ssl.SSLSocket:
        try:
            return super().wrap_socket(*args, **kwargs)
        except BaseException:
            # The plain socket has given its descriptor away by then, and what has it `ssl` closes only where the
            # handshake fails: not where the peer was gone before it (CPython 3.11).
            if _current.wrapping is not None:
                _current.wrapping.close()
            raise
        finally:
            _current.wrapping = None

    def set_alpn_protocols(self, alpn_protocols: Any) -> None:
        if not self._settled:
            super().set_alpn_protocols(alpn_protocols)


def _connected(connection: HTTPConnection) -> socket.socket:
    """urllib3's ``create_connection``, with the addresses of a name sharing one deadline."""
    exchange = _current.exchange
    assert exchange is not None
    exchange.connecting, exchange.tunnelled = True, False
    exchange.received = 0
    host = connection._dns_host.strip("[]")  # host would lose the trailing dot of a complete name
    try:
        found = socket.getaddrinfo(host, connection.port, allowed_gai_family(), socket.SOCK_STREAM)
    except socket.gaierror as exc:
        raise urllib3.exceptions.NameResolutionError(connection.host, connection, exc) from exc
    except UnicodeError as exc:
        raise urllib3.exceptions.LocationParseError(host) from exc
    failure: OSError | None = None
    for untried, (family, kind, protocol, _, address) in zip(range(len(found), 0, -1), found, strict=True):
        sock: _Socket | None = None
        try:
            sock = _Socket(family, kind, protocol)
            exchange.transport._sockets.add(sock)
            for option in connection.socket_options or ():
                sock.setsockopt(*option)
            if connection.source_address:
                sock.bind(connection.source_address)
            exchange.arm(sock)
            left = sock.gettimeout()
            if left is not None:
                # A first address that swallows packets must leave time for the next.
                sock.settimeout(left / untried)
            sock.connect(address)
            exchange.connecting = False
            return sock
        except OSError as exc:
            failure = exc
            if sock is not None:
                sock.close()
        except BaseException:
            if sock is not None:
                sock.close()
            raise
    try:
        if isinstance(failure, TimeoutError):
            raise urllib3.exceptions.ConnectTimeoutError(connection, "timed out") from failure
        reason = "no address" if failure is None else _strerror(failure)
        raise urllib3.exceptions.NewConnectionError(connection, reason) from failure
    finally:
        failure = None  # it refers to this frame


class _Connection(HTTPConnection):
    # The hook by which urllib3's own SOCKS connections come about.
    def _new_conn(self) -> socket.socket:
        return _connected(self)


class _TLSConnection(HTTPSConnection):
    def _new_conn(self) -> socket.socket:
        return _connected(self)

    def _tunnel(self) -> None:
        sock: Any = self.sock
        try:
            super()._tunnel()
        except BaseException:
            # Old versions leave a reader open, and with it the descriptor.
            descriptor = sock.detach()
            if descriptor >= 0:
                os.close(descriptor)
            raise

    def connect(self) -> None:
        super().connect()
        if self.ssl_context is not None and self.ssl_context.verify_mode is ssl.CERT_NONE:
            # Endpoint(verify=False) said so; urllib3 would warn at each connection.
            self.is_verified = True


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _TLSPool(HTTPSConnectionPool):
    ConnectionCls = _TLSConnection


_POOLS: dict[str, type[HTTPConnectionPool]] = {"http": _Pool, "https": _TLSPool}


class _Retry(Retry):
    """
    urllib3's, restricted to what failed before an answer began and fits in the deadline.

    It has no state of its own: urllib3 makes a new one for each attempt, with its own parameters only.
    """

    def increment(
        self,
        method: str | None = None,
        url: str | None = None,
        response: Any = None,
        error: Exception | None = None,
        _pool: Any = None,
        _stacktrace: Any = None,
    ) -> _Retry:
        exchange = _current.exchange
        if error is not None:
            unpin(error, above=1)  # of an attempt that is made again nobody else sees the error
        if error is None or exchange is None or not exchange.may_retry(error):
            raise urllib3.exceptions.MaxRetryError(_pool, url or "", error) from error
        following = super().increment(method, url, response, error, _pool, _stacktrace)
        left = exchange.deadline.remaining()
        if left is not None and following.get_backoff_time() >= left:
            raise urllib3.exceptions.MaxRetryError(_pool, url or "", error) from error
        return following

    def sleep(self, response: Any = None) -> None:
        exchange = _current.exchange
        if exchange is not None:
            exchange.transport._pause(self.get_backoff_time())
            # The turn was for the first attempt.
            again = Turn.WAIT if exchange.turn is Turn.TAKEN else exchange.turn
            exchange.transport._wait_for_turn(exchange.deadline, again)


class _Quiet(logging.Filter):
    """
    Keeps urllib3's warnings about our exchanges off the user's screen: we raise what matters.

    One dead server would write three lines per poll, and some of them quote what a server sent, raw.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        return _current.exchange is None or record.levelno < logging.WARNING


for _name in ("urllib3.connection", "urllib3.connectionpool", "urllib3.response"):
    logging.getLogger(_name).addFilter(_Quiet())


# -- requests: session, adapter, credentials ------------------------------------------------------------------------


def _proxy_of(url: str, proxies: dict[str, str]) -> tuple[str, SplitResult]:
    """
    The proxy's URL (empty: there is none), as it is and in its parts.

    Raises:
        ValueError: it cannot be read; the message is for people and quotes nothing of it, as it may have a password.
    """
    prefixed: Any = requests.utils.prepend_scheme_if_needed  # which has no types
    try:
        chosen = str(requests.utils.select_proxy(url, proxies) or "")
        if chosen:
            chosen = prefixed(chosen, "http")
        parts = urlsplit(chosen)
        readable = (parts.port is None or parts.port > 0) and "@" not in parts.path + parts.query + parts.fragment
    except ValueError:
        readable = False
    if not readable:
        raise ValueError(
            "the URL of the proxy in HTTP_PROXY, HTTPS_PROXY or ALL_PROXY cannot be read; in a password '/' is written "
            "%2F, '?' %3F and '#' %23"
        )
    return chosen, parts


class _Adapter(HTTPAdapter):
    """The stock adapter with our sockets, for one server that is always reached in the same way."""

    def __init__(
        self,
        url: str,
        proxy: str,
        retries: _Retry,
        context: _TLSContext | None,
        proxy_context: _TLSContext | None,
        server_name: str | None = None,
        pin: str | None = None,
    ) -> None:
        self._url = url
        self._proxy = proxy
        self._tls: dict[str, Any] = {}
        if context is not None:
            self._tls = {"ssl_context": context, "cert_reqs": context.verify_mode}
            if server_name is not None:
                self._tls["server_hostname"] = server_name
            if pin is not None:
                # Instead of names, dates and issuers: this certificate and no other.
                self._tls["assert_fingerprint"] = pin.partition(":")[2]
        self._proxy_tls: dict[str, Any] = {} if proxy_context is None else {"proxy_ssl_context": proxy_context}
        self._pool: HTTPConnectionPool | None = None
        super().__init__(pool_connections=1, pool_maxsize=_POOL_SIZE, max_retries=retries, pool_block=False)

    def init_poolmanager(self, connections: int, maxsize: int, block: bool = False, **pool_kwargs: Any) -> None:
        super().init_poolmanager(connections, maxsize, block, **self._tls, **pool_kwargs)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def proxy_manager_for(self, proxy: str, **proxy_kwargs: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **self._tls, **self._proxy_tls, **proxy_kwargs)
        manager.pool_classes_by_scheme = _POOLS
        return manager

    def get_connection_with_tls_context(
        self, request: requests.PreparedRequest, verify: Any, proxies: Any = None, cert: Any = None
    ) -> HTTPConnectionPool:
        # Always the same one, and to find it costs as much as half the exchange.  The stock method would also put its
        # own TLS context in the place of ours, in some versions.
        return self.only_pool()

    def only_pool(self) -> HTTPConnectionPool:
        pool = self._pool
        if pool is None:
            manager = self.proxy_manager_for(self._proxy) if self._proxy else self.poolmanager
            pool = self._pool = manager.connection_from_url(self._url)
        return pool

    def kept_pool(self) -> HTTPConnectionPool | None:
        """Where kept connections to the server itself are; none before the first exchange, or with a plain proxy."""
        # Without TLS there is no tunnel: what a proxy has to be told besides, urllib3 knows.
        return None if self._proxy and self._url.startswith("http:") else self._pool

    def cert_verify(self, conn: Any, url: str, verify: Any, cert: Any) -> None:
        """Nothing: the context has the certificates; stock urllib3 would load them for each connection."""

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
        super().close()

    def forget(self) -> None:
        waiting = None if self._pool is None else self._pool.pool
        if waiting is not None:
            # Empties it and gives it new locks: urllib3's finalizer takes the old ones, which may be held for ever.
            queue.LifoQueue.__init__(waiting, waiting.maxsize)


@attrs.frozen
class _Link:
    """What is settled once, when an endpoint is first asked: session, credentials, CA certificates, proxy."""

    session: requests.Session
    adapter: _Adapter
    verified: bool
    proxies: dict[str, str]
    proxy: str  # host and port, for people; empty if there is none
    #: Prepared requests by method and URL, and what of them goes over a kept connection before and behind the length
    #: of the body.  Written without a lock: a lost entry is made again.
    _prepared: dict[tuple[str, str], requests.PreparedRequest] = attrs.Factory(dict)
    _rendered: dict[tuple[str, str], tuple[bytes, bytes]] = attrs.Factory(dict)

    @classmethod
    def open(cls, endpoint: Endpoint, max_retries: int) -> _Link:
        """
        Read certificates and environment.

        Raises:
            ValueError: CA certificates, client certificate or proxy cannot be used; the message is for people.
        """
        session = requests.Session()
        session.headers = CaseInsensitiveDict(
            {
                "User-Agent": _user_agent(),
                "Accept": "application/json",
                # A body is a few kB; what it would save, a decompression bomb costs.
                "Accept-Encoding": "identity",
                **_host_header(endpoint),
                **dict(endpoint.headers),
            }
        )
        session.auth = _credentials(endpoint)
        pin = endpoint.verify if isinstance(endpoint.verify, str) and endpoint.verify.startswith("sha256:") else None
        trusted = endpoint.verify if pin is None else False
        settings = session.merge_environment_settings(endpoint.url, {}, True, trusted, endpoint.cert)
        verify: Any = settings["verify"]
        proxies = dict(settings["proxies"])
        chosen, proxy = _proxy_of(endpoint.url, proxies)
        if proxy.scheme not in ("", "http", "https"):
            raise ValueError(f"a proxy of the kind {proxy.scheme} is not supported; NO_PROXY goes around it")
        context = _tls_context(verify, endpoint.cert) if endpoint.url.startswith("https:") else None
        # Without the client certificate, which is not meant for the proxy.
        # The proxy is somebody else: the fingerprint is not its.
        proxy_context = _tls_context(verify if pin is None else True, None) if proxy.scheme == "https" else None
        retries = _Retry(
            total=max_retries,
            allowed_methods=None,
            status_forcelist=(),
            respect_retry_after_header=False,
            backoff_factor=0.02,
            backoff_max=1.0,
        )
        adapter = _Adapter(endpoint.url, chosen, retries, context, proxy_context, endpoint.server_name, pin)
        session.mount("http://", adapter)
        session.mount("https://", adapter)
        shown = f"{proxy.hostname}:{proxy.port}" if proxy.port else proxy.hostname or ""
        return cls(session, adapter, verify is not False and pin is None, proxies, _plain(shown))

    def request(self, method: str, url: str, body: bytes | None) -> requests.PreparedRequest:
        request = self._prepared.get((method, url))
        if request is None:
            request = self.session.prepare_request(requests.Request(method, url))
            if len(self._prepared) < _KEPT_REQUESTS:
                self._prepared[method, url] = request
        if body is None:
            return request
        # A copy: other threads may be sending it.
        request = request.copy()
        request.body = body
        request.headers["Content-Length"] = str(len(body))
        request.headers["Content-Type"] = "application/json"
        return request

    def send(self, request: requests.PreparedRequest, timeout: float, retries: Retry | None) -> requests.Response:
        """The answer to *request*, whose body has not been read; with *retries*, if some were needed before."""
        if retries is None:
            return self.adapter.send(request, stream=True, timeout=timeout, verify=self.verified, proxies=self.proxies)
        found = self.adapter.only_pool().urlopen(
            request.method or "",
            self.adapter.request_url(request, self.proxies),
            body=request.body,
            headers=request.headers,
            redirect=False,
            assert_same_host=False,
            preload_content=False,
            decode_content=False,
            retries=retries,
            timeout=timeout,
        )
        return self.adapter.build_response(request, found)

    def kept(self) -> tuple[HTTPConnectionPool, HTTPConnection] | None:
        """A connection of before that is still open, taken out of its pool."""
        pool = self.adapter.kept_pool()
        idle = None if pool is None else pool.pool
        if pool is None or idle is None:
            return None
        try:
            connection = idle.get(block=False)
        except queue.Empty:
            return None
        if connection is None or not connection.is_connected:
            pool._put_conn(connection)  # opened, or opened anew, by those who know how
            return None
        return pool, connection

    def rendered(self, method: str, url: str, body: bytes | None) -> bytes:
        """What goes over a connection for a request: as urllib3 writes it, at once and only once."""
        parts = self._rendered.get((method, url))
        if parts is None:
            pool = self.adapter.only_pool()
            pieces: list[bytes] = []
            writer: Any = pool.ConnectionCls(pool.host, pool.port)
            writer.send = pieces.append  # it is never connected
            request = self.request(method, url, None if body is None else b"")
            writer.request(method, self.adapter.request_url(request, self.proxies), headers=request.headers)
            before, _, behind = b"".join(pieces).partition(b"\r\nContent-Length: 0\r\n")
            parts = before, behind
            if len(self._rendered) < _KEPT_REQUESTS:
                self._rendered[method, url] = parts
        if body is None:
            return parts[0]
        return b"%b\r\nContent-Length: %d\r\n%b%b" % (parts[0], len(body), parts[1], body)

    def close(self) -> None:
        self.session.close()

    def forget(self) -> None:
        self.adapter.forget()


def _host_header(endpoint: Endpoint) -> dict[str, str]:
    """The name that the URL has only the address of; nothing where the URL's own host is right."""
    if endpoint.server_name is None:
        return {}
    port = urlsplit(endpoint.url).port
    return {"Host": endpoint.server_name if port is None else f"{endpoint.server_name}:{port}"}


def _credentials(endpoint: Endpoint) -> Callable[[requests.PreparedRequest], requests.PreparedRequest] | None:
    """What puts the credentials into a request; None leaves it to ``~/.netrc``."""
    if endpoint.auth is not None:
        user, password = endpoint.auth
        # As bytes: requests would encode text as latin-1, or fail to.
        return requests.auth.HTTPBasicAuth(user.encode(), password.encode())
    if endpoint.token is not None:
        return functools.partial(_with_header, value=f"Bearer {endpoint.token}")
    if any(name.lower() == "authorization" for name, _ in endpoint.headers):
        return _as_it_is
    return None


def _with_header(request: requests.PreparedRequest, value: str) -> requests.PreparedRequest:
    request.headers["Authorization"] = value
    return request


def _as_it_is(request: requests.PreparedRequest) -> requests.PreparedRequest:
    # Without any credentials of ours, requests would let ~/.netrc overwrite the header.
    return request


@functools.cache
def _user_agent() -> str:
    try:
        return f"gpupool-sync/{importlib.metadata.version('gpupool-sync')}"
    except importlib.metadata.PackageNotFoundError:
        return "gpupool-sync"


def _tls_context(verify: bool | str, cert: str | tuple[str, str] | None) -> _TLSContext:
    """
    The context for these certificates, shared by all endpoints that name the same ones.

    Raises:
        ValueError: they cannot be used.
    """
    trusted = requests.utils.DEFAULT_CA_BUNDLE_PATH if verify is True else verify
    files = (cert,) if isinstance(cert, str) else cert or ()
    if isinstance(trusted, str):
        files = (*files, trusted)
    stamps = []
    for name in files:
        try:
            found = os.stat(name)
        except OSError as exc:
            what = f"CA certificates in {name}" if name is trusted else "client certificate"
            raise ValueError(f"{what}: {_strerror(exc)}") from exc
        stamps.append((found.st_mtime_ns, found.st_ino, found.st_size))
    return _make_tls_context(trusted, cert, tuple(stamps))


@functools.lru_cache(maxsize=16)
def _make_tls_context(
    trusted: str | bool, cert: str | tuple[str, str] | None, stamps: tuple[tuple[int, ...], ...]
) -> _TLSContext:
    """Loading CA certificates takes tens of milliseconds.  *stamps* tell when files of the same name changed."""
    context = _TLSContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.hostname_checks_common_name = False
    # A certificate that the user trusts need not be its own issuer's.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    if isinstance(trusted, str):
        try:
            if os.path.isdir(trusted):
                context.load_verify_locations(capath=trusted)
            else:
                context.load_verify_locations(cafile=trusted)
        except OSError as exc:  # ssl.SSLError is one
            raise ValueError(f"CA certificates in {trusted}: {_tls_reason(exc)}") from exc
    else:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if cert is not None:
        chain, key = (cert, None) if isinstance(cert, str) else cert
        try:
            # Without a password OpenSSL would ask for one on the terminal.
            context.load_cert_chain(chain, key, password="")
        except (OSError, ValueError) as exc:
            raise ValueError(f"client certificate: {_tls_reason(exc)}") from exc
    context.settle()
    return context


def _tls_reason(exc: OSError | ValueError) -> str:
    if isinstance(exc, ssl.SSLError):
        return exc.reason or "not a certificate or key in PEM format, or the key is encrypted"
    return _strerror(exc) if isinstance(exc, OSError) else str(exc)
