from __future__ import annotations

import contextlib
import email.utils
import gzip
import json
import logging
import os
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import responses

import servers
from gpupool_sync import transport as transport_module
from gpupool_sync.clock import Deadline
from gpupool_sync.config import Endpoint
from gpupool_sync.errors import BadAnswer, EndpointUnavailable, GPUPoolError
from gpupool_sync.transport import MAX_BODY_BYTES, Answer, Transport, retry_after
from helpers import MARGIN, connections_to, eventually, run_threads
from servers import Authority, Connection, Server, answer, chunked, head

#: Seconds that a hostile exchange may take.
TIMEOUT = 1.0
#: Seconds for exchanges that are expected to succeed, or to fail by themselves: never reached.
AMPLE = 90.0

fork_is_meant = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@contextlib.contextmanager
def opened(url: str, *, max_retries: int = 3, **options: Any) -> Iterator[Transport]:
    transport = Transport(Endpoint(url, name="s", **options), max_retries=max_retries)
    try:
        yield transport
    finally:
        transport.close()


def get(transport: Transport, timeout: float = AMPLE) -> Answer:
    return transport.get("/gpu/summary", Deadline.after(timeout))


def failure(transport: Transport, timeout: float = AMPLE) -> GPUPoolError:
    """The error of a GET, which must end in time."""
    begin = time.monotonic()
    with pytest.raises(GPUPoolError) as caught:
        get(transport, timeout)
    assert time.monotonic() - begin < timeout + 1.0 + MARGIN
    return caught.value


def in_background(work: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as exc:
            errors.append(exc)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, errors


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


# -- decent servers -------------------------------------------------------------------------------------------------


def test_a_get_returns_what_the_server_said():
    """
    Status, headers (in any case), body and duration arrive as the server meant them.
    """
    with Server(answer(b'{"a": 1}', headers={"X-Thing": "7"})) as server, opened(server.url) as transport:
        result = get(transport)

        assert (result.status, result.body, result.headers["x-thing"]) == (200, b'{"a": 1}', "7")
        assert 0 < result.elapsed < AMPLE
        (request,) = server.requests
        assert (request.method, request.path) == ("GET", "/gpu/summary")
        assert request.headers["user-agent"].startswith("gpupool-sync")


def test_a_post_sends_json():
    """
    What is posted arrives as one JSON object, and the next post carries only its own.
    """
    with Server(answer()) as server, opened(server.url) as transport:
        transport.post("/v1/leases", {"id": "a", "ttl": 1.5, "note": "x" * 100}, Deadline.after(AMPLE))
        transport.post("/v1/leases", {"id": "ü"}, Deadline.after(AMPLE))

        first, second = server.requests
        assert (first.method, first.path) == ("POST", "/v1/leases")
        assert first.json() == {"id": "a", "ttl": 1.5, "note": "x" * 100}
        assert second.json() == {"id": "ü"}
        assert second.headers["content-type"] == "application/json"


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
def test_a_hundred_gets_use_one_connection(authority, tls):
    """
    Connections are kept: a hundred polls cost one TCP (and TLS) handshake.
    """
    context = authority.context() if tls else None
    with Server(answer(), tls=context) as server, opened(server.url, verify=authority.ca_path) as transport:
        for _ in range(100):
            assert get(transport).status == 200

        assert (server.connections, len(server.requests)) == (1, 100)


def test_threads_ask_at_the_same_time():
    """
    Callers do not queue for a connection: a long poll holds up nobody.
    """
    with Server(servers.answer_when_released()) as server, opened(server.url) as transport:
        releaser, errors = in_background(lambda: (eventually(lambda: len(server.requests) == 8), server.release()))
        results = run_threads(8, lambda number: get(transport))
        releaser.join(AMPLE)

        assert not errors
        assert server.connections == 8
        assert {200} == {result.status for result in results}


@pytest.mark.parametrize("status", [204, 301, 302, 307, 404, 409, 429, 500, 503])
def test_every_status_is_an_answer(status):
    """
    Errors and redirects are returned, not followed, slept on or repeated; the caller judges them.
    """
    headers = {"Location": "http://192.0.2.1/", "Retry-After": "86400"}
    with Server(answer(b"", status=status, headers=headers)) as server, opened(server.url) as transport:
        assert status == get(transport).status
        assert len(server.requests) == 1


def test_cookies_are_not_kept():
    """
    A server cannot make its clients carry anything to the next request.
    """
    with Server(answer(headers={"Set-Cookie": "a=b"})) as server, opened(server.url) as transport:
        get(transport)
        get(transport)

        assert all("cookie" not in request.headers for request in server.requests)


@pytest.mark.parametrize(
    ("encoding", "packed"),
    [
        ("gzip", gzip.compress(b'{"a": 1}', mtime=0)),
        ("X-GZIP", gzip.compress(b'{"a": 1}', mtime=0)),
        ("deflate", zlib.compress(b'{"a": 1}')),
        ("deflate", zlib.compress(b'{"a": 1}')[2:-4]),
        ("identity", b'{"a": 1}'),
    ],
)
def test_a_compressed_answer_is_read(encoding, packed):
    """
    A server that compresses without being asked is understood.
    """
    with (
        Server(answer(packed, headers={"Content-Encoding": encoding})) as server,
        opened(server.url) as transport,
    ):
        assert get(transport).body == b'{"a": 1}'
        assert server.requests[0].headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("framing", ["chunked", "until the end"])
def test_a_body_without_a_length_is_read(framing):
    """
    Chunked bodies and those that end with the connection are complete.
    """
    data = (
        head(headers={"Transfer-Encoding": "chunked"}) + chunked(b"ab", b"c")
        if framing == "chunked"
        else head() + b"abc"
    )
    with Server(servers.raw(data)) as server, opened(server.url) as transport:
        assert get(transport).body == b"abc"


def test_the_largest_allowed_answer_is_read():
    """
    The cap is on what is larger than it, not on what is as large.
    """
    with Server(answer(bytes(MAX_BODY_BYTES))) as server, opened(server.url) as transport:
        assert len(get(transport).body) == MAX_BODY_BYTES


@responses.activate
def test_a_users_own_test_can_replace_the_network():
    """
    The usual way to fake servers for `requests` works with the pool too.
    """
    responses.add(responses.GET, "http://gpu-server/gpu/summary", json={"gpu_count": 0}, status=200)
    with opened("http://gpu-server") as transport:
        result = get(transport)

        assert (result.status, json.loads(result.body)) == (200, {"gpu_count": 0})


@responses.activate
def test_an_error_of_requests_becomes_ours():
    """
    Whatever `requests` raises, a user sees one error with the endpoint's id.
    """
    responses.add(responses.GET, "http://gpu-server/gpu/summary", body=ValueError("of some library"))
    with opened("http://gpu-server") as transport:
        error = failure(transport)

        assert isinstance(error, EndpointUnavailable)
        assert str(error) == "s: asking it failed: ValueError"


# -- hostile servers ------------------------------------------------------------------------------------------------

CHUNKED = head(headers={"Transfer-Encoding": "chunked"})

HOSTILE: dict[str, tuple[servers.Script, type[GPUPoolError], str]] = {
    "hangs": (servers.hang(), EndpointUnavailable, "no complete answer within 1.00 s"),
    "hangs after the request": (
        servers.hang_after_request(),
        EndpointUnavailable,
        "no complete answer within 1.00 s",
    ),
    "hangs in the head": (servers.hang_after_request(b"HTTP/1.1 20"), EndpointUnavailable, "no complete answer"),
    "hangs in the body": (
        servers.hang_after_request(head(length=9) + b"x"),
        EndpointUnavailable,
        "no complete answer",
    ),
    "hangs without a length": (
        servers.hang_after_request(head() + b"x"),
        EndpointUnavailable,
        "no complete answer",
    ),
    "hangs in a chunk": (servers.hang_after_request(CHUNKED + b"5\r\nx"), EndpointUnavailable, "no complete answer"),
    "drips the body": (servers.drip_body(), EndpointUnavailable, "no complete answer"),
    "drips the head": (servers.drip_head(), EndpointUnavailable, "no complete answer"),
    "drips 1xx": (servers.endless_1xx(every=0.02), EndpointUnavailable, "no complete answer"),
    # The deadline or the cap, whichever comes first.
    "endless 1xx": (servers.endless_1xx(), GPUPoolError, ""),
    "103 without end": (servers.endless_1xx(103), BadAnswer, "status 103"),
    "switches protocols": (servers.raw(head(101)), BadAnswer, "status 101"),
    "endless body": (servers.endless_body(), BadAnswer, "larger than 4 MiB"),
    "endless chunks": (servers.endless_chunks(), BadAnswer, "larger than 4 MiB"),
    "endless chunk size": (servers.endless_chunk_line(), BadAnswer, "endless line"),
    "endless trailers": (servers.endless_trailers(), BadAnswer, "larger than 4 MiB"),
    "chunk of size -1": (servers.negative_chunk(), BadAnswer, "larger than 4 MiB"),
    "endless headers": (servers.endless_headers(), BadAnswer, "more than 100 headers"),
    "endless header": (servers.endless_header_line(), BadAnswer, "endless line"),
    "announces too much": (servers.raw(head(length=5 << 20)), BadAnswer, "announced an answer of 5 MiB"),
    "announces the absurd": (servers.raw(head(length=10**30)), BadAnswer, "announced an answer of more than 1 TiB"),
    "gzip bomb": (servers.gzip_bomb(64 << 20), BadAnswer, "larger than 4 MiB when decompressed"),
    "unknown encoding": (answer(headers={"Content-Encoding": "br\x1b[31m"}), BadAnswer, r"br\x1b[31m"),
    "two encodings": (answer(headers={"Content-Encoding": "gzip, gzip"}), BadAnswer, "gzip, gzip"),
    "not gzip": (answer(headers={"Content-Encoding": "gzip"}), BadAnswer, "says that it is gzip"),
    "half a gzip": (
        answer(gzip.compress(b"{}" * 99, mtime=0)[:-9], headers={"Content-Encoding": "gzip"}),
        BadAnswer,
        "says that it is gzip",
    ),
    "a row of gzips": (
        answer(gzip.compress(b"", mtime=0) * 9, headers={"Content-Encoding": "gzip"}),
        BadAnswer,
        "says that it is gzip",
    ),
    "cut off": (servers.cut_off(), EndpointUnavailable, "broke off after 5 of 10 bytes"),
    "cut off in a chunk": (servers.raw(CHUNKED + b"5\r\nab"), EndpointUnavailable, "broke off"),
    "cut off between chunks": (servers.raw(CHUNKED + chunked(b"ab", end=b"")), EndpointUnavailable, "broke off"),
    "chunk garbage": (servers.raw(CHUNKED + b"zz\r\nab\r\n0\r\n\r\n"), EndpointUnavailable, "broke off"),
    "reset in the body": (
        servers.reset_after_request(head(length=9) + b"x"),
        EndpointUnavailable,
        "broke off after",
    ),
    "two lengths": (servers.raw(head(length=2, headers={"Content-Length": 3}) + b"{}"), BadAnswer, "contradictory"),
    "closes at once": (servers.close_at_once(), EndpointUnavailable, "closed the connection without an answer"),
    "closes after the request": (
        servers.close_after_request(),
        EndpointUnavailable,
        "closed the connection without an answer",
    ),
    "resets": (servers.reset_after_request(), EndpointUnavailable, "closed the connection without an answer"),
    "closes in the status line": (servers.raw(b"HTTP/1.1 2"), GPUPoolError, ""),
    "speaks ssh": (servers.raw(b"SSH-2.0-\x1b[31m\xff\r\n"), BadAnswer, r"SSH-2.0-\x1b[31m"),
    "speaks http/3": (servers.raw(b"HTTP/3.0 200 OK\r\n\r\n"), BadAnswer, "HTTP/1.1"),
    "a status of four digits": (servers.raw(b"HTTP/1.1 2000 OK\r\n\r\n"), BadAnswer, "HTTP/1.1"),
    "a megabyte without a line": (servers.raw(b"x" * (1 << 20)), BadAnswer, "endless line"),
}


def time_for(name: str) -> float:
    """A short deadline for what never ends by itself, a long one for what must not need it."""
    return TIMEOUT if name.startswith(("hangs", "drips", "endless 1xx")) else AMPLE


def decent_at_first(script: servers.Script) -> servers.Script:
    """One answer, and then *script* on the same connection."""

    def both(connection: Connection) -> None:
        connection.request()
        connection.send(head(length=2) + b"{}")
        script(connection)

    return both


@pytest.mark.parametrize("kept", [False, True], ids=["new", "kept"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_server_costs_one_clear_error(name, kept, recwarn, caplog):
    """
    Whatever a server does, on a new connection or on one that is kept, the exchange ends by its deadline, in bounded
    memory, with one error of ours that is fit for a screen, and leaves no descriptor and no line in the log behind.
    """
    script, kind, message = HOSTILE[name]
    with Server(*([decent_at_first(script)] if kept else []), script) as server, opened(server.url) as transport:
        before = descriptors()
        if kept:
            assert get(transport).body == b"{}"
        tracemalloc.start()
        try:
            error = failure(transport, time_for(name))
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        transport.close()

        assert isinstance(error, kind)
        assert isinstance(error, (EndpointUnavailable, BadAnswer))
        assert message in str(error)
        assert str(error).isprintable()
        assert len(str(error)) < 200
        assert error.__cause__ is not None or isinstance(error, BadAnswer)
        assert peak_bytes < 32 << 20
        # The server's side of the connection closes when its script notices.
        eventually(lambda: descriptors() <= before)
    assert not recwarn.list
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_reset_before_the_handshake_leaves_no_descriptor(authority, monkeypatch):
    """
    A server that hangs up before TLS begins; Python itself forgets to close the socket that it has just made.
    """

    def hang_up(connection: Connection) -> None:
        connection.wait_for_release()
        connection.reset()

    connect = transport_module._connected
    with (
        Server(servers.before_tls(hang_up), tls=authority.context()) as server,
        opened(server.url, verify=authority.ca_path, max_retries=0) as transport,
    ):

        def connected_and_reset(connection: Any) -> Any:
            sock = connect(connection)
            server.release()
            eventually(lambda: not connections_to(server.port))
            return sock

        monkeypatch.setattr(transport_module, "_connected", connected_and_reset)
        before = descriptors()
        error = failure(transport)
        assert isinstance(error, EndpointUnavailable)
        # While the error is kept, and with it the frames in its traceback.
        assert descriptors() <= before


@pytest.mark.parametrize("kept", [False, True], ids=["new", "kept"])
@pytest.mark.parametrize("name", ["endless body", "103 without end", "announces too much", "cut off", "hangs"])
def test_a_refused_answer_does_not_spoil_the_next(name, kept):
    """
    The rest of a bad answer is never taken for the beginning of the next one.
    """
    script, _, _ = HOSTILE[name]
    script = decent_at_first(script) if kept else script
    with Server(script, answer(b"good")) as server, opened(server.url, max_retries=0) as transport:
        if kept:
            get(transport)
        failure(transport, time_for(name))

        assert get(transport).body == b"good"
        assert server.connections == 2


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
def test_what_follows_an_answer_is_not_the_next_one(authority, tls):
    """In the same TLS record as the end of a body it does not show that something is left to be read."""

    def script(connection: Connection) -> None:
        connection.request()
        connection.send(head(length=2) + b"{")
        connection.pause(0.1)
        connection.send(b"}" + head(length=6) + b"forged")
        connection.request()
        connection.send(head(length=4) + b"late")

    context = authority.context() if tls else None
    with (
        Server(decent_at_first(script), answer(b"good"), tls=context) as server,
        opened(server.url, verify=authority.ca_path) as transport,
    ):
        assert [get(transport).body for _ in range(3)] == [b"{}", b"{}", b"good"]


@pytest.mark.parametrize("body", [None, {"ids": ["a"]}], ids=["GET", "POST"])
@pytest.mark.parametrize("credentials", [{}, {"token": "t"}, {"headers": (("X-Content-Length", "0"),)}], ids=str)
def test_over_a_kept_connection_the_same_is_asked(body, credentials):
    """
    The first request, which makes the connection, and those that follow on it differ in nothing, bodies apart.
    """
    with Server(answer()) as server, opened(server.url, **credentials) as transport:
        for number in range(3):
            if body is None:
                transport.get("/gpu/summary", Deadline.after(AMPLE))
            else:
                transport.post("/v1/leases/release", {**body, "more": "x" * number}, Deadline.after(AMPLE))
        assert server.connections == 1
        first, *others = server.requests
        for other in others:
            assert (other.method, other.path) == (first.method, first.path)
            assert list(other.headers) == list(first.headers)
            for name in first.headers:
                assert name == "content-length" or other.headers[name] == first.headers[name]
        assert [request.json() for request in server.requests if request.body] == (
            [{**body, "more": "x" * number} for number in range(3)] if body else []
        )


def test_a_deadline_that_has_passed_asks_nobody():
    """
    With no time left nothing is sent.
    """
    with Server(answer()) as server, opened(server.url) as transport:
        assert "no time was left" in str(failure(transport, 0.0))
        assert server.connections == 0


def test_a_request_that_nobody_reads_ends_by_the_deadline():
    """
    Sending is bounded too: a server that does not read cannot hold a large request.
    """

    def never_read(connection: Connection) -> None:
        connection.pause(60)

    with Server(never_read) as server, opened(server.url) as transport:
        begin = time.monotonic()
        with pytest.raises(EndpointUnavailable, match="no complete answer"):
            transport.post("/v1/leases", {"note": "x" * (16 << 20)}, Deadline.after(4.0))
        assert time.monotonic() - begin < 4.0 + 1.0 + MARGIN


# -- servers that are not there, and retries ------------------------------------------------------------------------


def test_a_closed_port_fails_at_once():
    """
    Nobody waits for a server that is not running, in spite of the retries.
    """
    with servers.refusing() as url, opened(url) as transport:
        begin = time.monotonic()
        error = failure(transport)
        assert time.monotonic() - begin < 1.0 + MARGIN < AMPLE

        assert str(error) == "s: the server refused the connection"
        assert isinstance(error.__cause__, Exception)


def test_a_kept_connection_that_hangs():
    """
    A server that stops answering between two polls is said to be silent, not unreachable.
    """

    def once(connection: Connection) -> None:
        connection.request()
        connection.send(head(length=2) + b"{}")
        connection.hang()

    with Server(once) as server, opened(server.url) as transport:
        assert get(transport).status == 200
        assert str(failure(transport, TIMEOUT)) == "s: no complete answer within 1.00 s"
        assert server.connections == 1


def test_a_host_that_swallows_packets_ends_by_the_deadline():
    """
    Connecting is part of the exchange and shares its deadline.
    """
    with servers.swallowing() as url, opened(url) as transport:
        assert str(failure(transport, TIMEOUT)) == "s: no connection within 1.00 s"


def test_a_name_that_does_not_exist():
    """
    A mistyped host name is named as such.
    """
    with opened("http://no-such-host.invalid") as transport:
        assert "cannot be resolved" in str(failure(transport))


def test_the_second_address_of_a_name_is_tried(monkeypatch):
    """
    A first address that swallows packets leaves time for the second.
    """
    with servers.swallowing() as dead, Server(answer()) as server, opened("http://two-addresses") as transport:
        ports = (int(dead.rpartition(":")[2]), server.port)
        found = [(2, 1, 6, "", ("127.0.0.1", port)) for port in ports]
        monkeypatch.setattr("socket.getaddrinfo", lambda *args: found)

        assert get(transport, 2.0).status == 200


def test_ipv6():
    """
    A server may be named by its IPv6 address.
    """
    try:
        server = Server(answer(), host="::1")
        server.__enter__()
    except OSError:
        pytest.skip("no IPv6 on this host")
    with contextlib.closing(server), opened(server.url) as transport:
        assert get(transport).status == 200


@pytest.mark.parametrize("script", [servers.close_at_once(), servers.close_after_request()])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_connection_that_ends_without_an_answer_is_retried(script, method):
    """
    A server that restarts between two polls costs nobody an error.
    """
    with Server(script, script, answer()) as server, opened(server.url) as transport:
        if method == "GET":
            result = get(transport)
        else:
            result = transport.post("/v1/leases", {"id": "a"}, Deadline.after(AMPLE))
            assert server.requests[-1].json() == {"id": "a"}

        assert result.status == 200
        assert server.connections == 3


def test_a_stale_connection_is_replaced():
    """
    A kept connection that the server has closed meanwhile goes unnoticed.
    """
    with Server(answer(times=1)) as server, opened(server.url) as transport:
        for _ in range(3):
            assert get(transport).status == 200
        assert server.connections == 3


def test_retries_can_be_turned_off():
    """
    ``endpoint_max_retries=0`` means one attempt.
    """
    with Server(servers.close_after_request()) as server, opened(server.url, max_retries=0) as transport:
        failure(transport)
        assert server.connections == 1


@pytest.mark.parametrize("name", ["cut off", "chunk garbage", "reset in the body", "speaks ssh", "not gzip"])
def test_what_began_to_be_answered_is_not_repeated(name):
    """
    Only what failed before an answer began is tried again.
    """
    script, _, _ = HOSTILE[name]
    with Server(script) as server, opened(server.url) as transport:
        failure(transport)
        assert server.connections == 1


def test_retries_share_the_deadline():
    """
    A thousand retries do not outlast the deadline.
    """
    with Server(servers.close_after_request()) as server, opened(server.url, max_retries=1000) as transport:
        failure(transport, TIMEOUT)
        assert server.connections > 1


# -- aborting, closing, forking -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
@pytest.mark.parametrize(
    "script",
    [servers.hang_after_request(), servers.hang_after_request(head() + b"part of a body"), servers.drip_body()],
)
def test_abort_ends_exchanges_at_once(authority, script, tls):
    """
    Closing a pool does not wait for servers that hang; half an answer is never taken for a whole one.
    """
    context = authority.context() if tls else None
    with Server(script, tls=context) as server, opened(server.url, verify=authority.ca_path) as transport:
        thread, errors = in_background(lambda: get(transport, 300.0))
        eventually(lambda: server.requests)
        transport.abort()
        thread.join(AMPLE)

        assert not thread.is_alive()
        (error,) = errors
        assert isinstance(error, EndpointUnavailable)
        assert "connections were closed" in str(error)
        assert "connections are closed" in str(failure(transport))
        assert server.connections == 1


def test_abort_ends_a_handshake(authority):
    """
    A server that hangs in the TLS handshake does not hold up closing either.
    """
    script = servers.before_tls(servers.hang())
    with Server(script, tls=authority.context()) as server, opened(server.url) as transport:
        thread, errors = in_background(lambda: get(transport, 300.0))
        eventually(lambda: server.connections)
        transport.abort()
        thread.join(AMPLE)

        assert not thread.is_alive()
        assert isinstance(errors[0], EndpointUnavailable)


def test_abort_ends_connecting():
    """
    Nor does a host that swallows packets.
    """
    with servers.swallowing() as url, opened(url) as transport:
        thread, errors = in_background(lambda: get(transport, 300.0))
        eventually(lambda: any(exchange.sock for exchange in list(transport._exchanges)))
        transport.abort()
        thread.join(AMPLE)

        assert not thread.is_alive()
        assert isinstance(errors[0], EndpointUnavailable)


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
def test_close_frees_every_descriptor(authority, tls):
    """
    After `close` the process has as many descriptors as before; closing again is harmless, asking again is refused.
    """
    context = authority.context() if tls else None
    with Server(answer(times=1), tls=context) as server, opened(server.url, verify=authority.ca_path) as transport:
        before = descriptors()
        run_threads(8, lambda number: get(transport))
        transport.close()
        transport.close()

        eventually(lambda: descriptors() <= before)
        assert "not asked" in str(failure(transport))


def test_closing_an_unused_transport():
    """
    A pool that never asked anybody can be closed.
    """
    with opened("http://gpu-server") as transport:
        transport.close()
        transport.forget_after_fork()
        assert "not asked" in str(failure(transport))


@fork_is_meant
@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
def test_a_forked_child_has_connections_of_its_own(authority, tls):
    """
    After a fork both processes go on: the child connects anew, the parent keeps its connection, nobody reads the
    other's answers.
    """
    context = authority.context() if tls else None
    with Server(answer(), tls=context) as server, opened(server.url, verify=authority.ca_path) as transport:
        get(transport)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                # As if another thread had held them at the fork.
                transport._lock.acquire()
                transport._link.adapter._pool.pool.mutex.acquire()
                kept = connections_to(server.port)
                transport.forget_after_fork()
                if (kept, connections_to(server.port)) == (1, 0) and get(transport).status == 200:
                    transport.close()
                    status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)

        assert os.waitstatus_to_exitcode(status) == 0
        assert get(transport).status == 200
        assert (server.connections, len(server.requests)) == (2, 3)


# -- who is asking --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"token": "secret"}, "Bearer secret"),
        ({"auth": ("user", "secret")}, "Basic dXNlcjpzZWNyZXQ="),
        ({"auth": ("üser", "secret")}, "Basic w7xzZXI6c2VjcmV0"),
        ({"headers": {"Authorization": "Custom secret"}}, "Custom secret"),
        ({}, "Basic bmV0cmM6ZmlsZQ=="),
    ],
)
def test_credentials(options, expected, tmp_path, monkeypatch):
    """
    Each way of logging in reaches the server with every request; ``~/.netrc`` counts only without any of them.
    """
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login netrc password file\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    with Server(answer()) as server, opened(server.url, **options) as transport:
        get(transport)
        transport.post("/v1/leases", {}, Deadline.after(AMPLE))

        assert [expected, expected] == [request.headers["authorization"] for request in server.requests]


def test_custom_headers():
    """
    A header that a gateway asks for is sent with every request.
    """
    with Server(answer()) as server, opened(server.url, headers={"X-Api-Key": "k"}) as transport:
        get(transport)
        transport.post("/v1/leases", {}, Deadline.after(AMPLE))

        assert [request.headers["x-api-key"] for request in server.requests] == ["k", "k"]


def test_errors_tell_no_secrets():
    """
    Neither the token nor a custom header is in an error, or in anything it is chained to.
    """
    with (
        Server(servers.close_after_request()) as server,
        opened(server.url, token="geheim", headers={"X-Api-Key": "geheim"}) as transport,
    ):
        error: BaseException | None = failure(transport)
        while error is not None:
            assert "geheim" not in f"{error!s} {error!r}"
            error = error.__cause__ or error.__context__


# -- TLS ------------------------------------------------------------------------------------------------------------


def test_an_unknown_certificate_is_refused(authority):
    """
    TLS is verified by default, and the error says how to trust an own CA; it is not tried again.
    """
    with Server(answer(), tls=authority.context()) as server, opened(server.url) as transport:
        error = failure(transport)

        assert "certificate of the server was not accepted" in str(error)
        assert "Endpoint(verify='/path/ca.pem')" in str(error)
        assert server.connections == 1
        assert not server.requests


def test_a_certificate_for_another_name_is_refused(authority):
    """
    A valid certificate of somebody else does not do.
    """
    tls = authority.context("other.example.org")
    with Server(answer(), tls=tls) as server, opened(server.url, verify=authority.ca_path) as transport:
        assert "not valid for '127.0.0.1'" in str(failure(transport))


def test_an_expired_certificate_is_refused(authority):
    """
    The error says that the certificate has expired, and does not send the user looking for a CA.
    """
    begin, end = (datetime(year, 1, 1, tzinfo=timezone.utc) for year in (2020, 2021))
    tls = authority.context(not_before=begin, not_after=end)
    with Server(answer(), tls=tls) as server, opened(server.url, verify=authority.ca_path) as transport:
        error = failure(transport)

        assert "has expired" in str(error)
        assert "Endpoint(verify" not in str(error)


def test_verification_can_be_turned_off(authority, recwarn):
    """
    ``Endpoint(verify=False)`` is obeyed, without a warning at each connection.
    """
    with Server(answer(times=1), tls=authority.context()) as server, opened(server.url, verify=False) as transport:
        assert get(transport).status == 200
        assert get(transport).status == 200
    assert not recwarn.list


def test_the_environment_names_the_ca(authority, monkeypatch):
    """
    REQUESTS_CA_BUNDLE is honoured, read once at opening.
    """
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", authority.ca_path)
    with Server(answer(times=1), tls=authority.context()) as server, opened(server.url) as transport:
        assert get(transport).status == 200
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nonexistent")
        assert get(transport).status == 200


@pytest.mark.parametrize("content", [None, "not a certificate"])
def test_ca_certificates_that_cannot_be_used(authority, tmp_path, content):
    """
    A wrong path in ``verify`` is named, and concerns this endpoint alone.
    """
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)
    with Server(answer(), tls=authority.context()) as server, opened(server.url, verify=str(path)) as transport:
        error = failure(transport)

        assert isinstance(error, EndpointUnavailable)
        assert "CA certificates in" in str(error)


def test_a_client_certificate(authority):
    """
    A server that wants a client certificate gets the one of ``Endpoint(cert=…)``; without it the error asks for one.
    """
    tls = authority.context(client_certificate=True)
    with Server(answer(), tls=tls) as server:
        with opened(server.url, verify=authority.ca_path, cert=authority.client_files()) as transport:
            assert get(transport).status == 200
        with opened(server.url, verify=authority.ca_path) as transport:
            error = failure(transport)
            # Depending on who is quicker, OpenSSL tells the server's alert or only that it is gone.
            assert "Endpoint(cert=…)" in str(error) or "closed the connection" in str(error)


def test_a_client_certificate_that_cannot_be_used(authority, tmp_path):
    """
    A missing client certificate is said to be that.
    """
    with Server(answer(), tls=authority.context()) as server:
        with opened(server.url, cert=str(tmp_path / "nothing.pem")) as transport:
            assert "client certificate: No such file" in str(failure(transport))
        with opened(server.url, cert=authority.ca_path) as transport:
            assert "client certificate: " in str(failure(transport))


def test_a_server_without_tls():
    """
    ``https://`` to a server that speaks plain HTTP is recognised.
    """

    def plain(connection: Connection) -> None:
        connection.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        connection.hang()

    with Server(plain) as server, opened(server.url.replace("http:", "https:")) as transport:
        assert "http:// instead of https://" in str(failure(transport))


@pytest.mark.parametrize("script", [servers.hang(), servers.close_at_once()])
def test_a_handshake_that_does_not_happen(authority, script):
    """
    The TLS handshake is part of the exchange: it ends by the deadline, or with the connection.
    """
    tls = authority.context()
    with Server(servers.before_tls(script), tls=tls) as server, opened(server.url) as transport:
        assert isinstance(failure(transport, TIMEOUT), EndpointUnavailable)


@pytest.mark.parametrize(
    "name", ["hangs after the request", "drips the body", "drips the head", "endless body", "cut off"]
)
def test_hostile_behind_tls(authority, name):
    """
    What bounds plain exchanges bounds encrypted ones.
    """
    script, kind, message = HOSTILE[name]
    with (
        Server(script, tls=authority.context()) as server,
        opened(server.url, verify=authority.ca_path) as transport,
    ):
        error = failure(transport, time_for(name))

        assert isinstance(error, kind)
        assert message in str(error)


# -- proxies and rates ----------------------------------------------------------------------------------------------


def test_a_proxy_of_the_environment_is_used(monkeypatch):
    """
    HTTP_PROXY is honoured, read once at opening; its password reaches the proxy and no error.
    """
    with Server(answer(), servers.close_at_once()) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.replace("://", "://user:geheim@"))
        with opened("http://gpu-server") as transport:
            assert get(transport).status == 200
            monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
            assert get(transport).status == 200

        assert [request.path for request in proxy.requests] == ["http://gpu-server/gpu/summary"] * 2
        assert proxy.requests[0].headers["proxy-authorization"] == "Basic dXNlcjpnZWhlaW0="


def test_no_proxy_is_obeyed(monkeypatch):
    """
    What NO_PROXY lists, loopback for example, is reached directly.
    """
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    with Server(answer()) as server, opened(server.url) as transport:
        assert get(transport).status == 200


def test_a_proxy_that_is_not_there(monkeypatch):
    """
    The error blames the proxy, not the server, and does not show its password.
    """
    with servers.refusing() as url:
        monkeypatch.setenv("http_proxy", url.replace("://", "://user:geheim@"))
        with opened("http://gpu-server") as transport:
            error = failure(transport)

            assert f"the proxy {url.removeprefix('http://')} refused the connection" in str(error)
            assert "geheim" not in str(error)


def test_tls_through_a_proxy(authority, monkeypatch):
    """
    HTTPS goes through the proxy in a tunnel that is kept, and is verified end to end.
    """
    with Server(answer(), tls=authority.context()) as server, Server(servers.tunnel()) as proxy:
        monkeypatch.setenv("https_proxy", proxy.url)
        with opened(server.url, verify=authority.ca_path) as transport:
            assert get(transport).status == 200
            assert get(transport).status == 200

        assert (proxy.connections, server.connections) == (1, 1)
        assert proxy.requests[0].method == "CONNECT"


@pytest.mark.parametrize(
    "script",
    [
        servers.hang(),
        servers.drip_head(),
        servers.endless_headers(),
        servers.close_at_once(),
        servers.raw(head(407)),
        servers.hang_after_request(head()),
    ],
)
def test_a_hostile_proxy(script, monkeypatch):
    """
    A proxy has no more time than a server.
    """
    with Server(script) as proxy:
        monkeypatch.setenv("https_proxy", proxy.url)
        with opened("https://gpu-server") as transport:
            assert "proxy" in str(failure(transport, TIMEOUT))


def test_a_proxy_of_an_unknown_kind(monkeypatch):
    """
    A SOCKS proxy, whose sockets would not keep the deadline, is refused with the way around it.
    """
    monkeypatch.setenv("all_proxy", "socks5h://127.0.0.1:1080")
    with opened("http://gpu-server") as transport:
        assert "NO_PROXY" in str(failure(transport))


def test_max_rate_spaces_requests():
    """
    ``Endpoint(max_rate=20)`` sends no two requests within a twentieth of a second, from however many threads.
    """
    arrivals: list[float] = []

    def note(request: servers.Request) -> bytes:
        arrivals.append(time.monotonic())
        return b"{}"

    with Server(answer(note)) as server, opened(server.url, max_rate=20) as transport:
        begin = time.monotonic()
        run_threads(5, lambda number: get(transport))

        # The fifth is sent four spaces after the first.
        assert max(arrivals) - begin >= 0.2


def test_max_rate_fits_in_the_deadline_or_fails():
    """
    A request whose turn comes too late is refused at once, with the reason, and takes nobody else's turn.
    """
    with Server(answer()) as server, opened(server.url, max_rate=0.01) as transport:
        assert get(transport).status == 200
        assert "max_rate=0.01" in str(failure(transport, 1.0))
        assert "max_rate=0.01" in str(failure(transport, 1.0))
        assert len(server.requests) == 1


def test_abort_ends_the_wait_for_a_turn():
    """
    Nobody waits for a turn at a pool that is closed.
    """
    with Server(answer()) as server, opened(server.url, max_rate=0.01) as transport:
        get(transport)
        thread, errors = in_background(lambda: get(transport, 300.0))
        eventually(lambda: transport._exchanges)
        transport.abort()
        thread.join(AMPLE)

        assert not thread.is_alive()
        assert isinstance(errors[0], EndpointUnavailable)


# -- Retry-After ----------------------------------------------------------------------------------------------------


def told(text: str, **others: str) -> float | None:
    return retry_after(Answer(429, {"Retry-After": text, **others}, b"", 0.1))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0.0),
        (" 7 ", 7.0),
        ("1.5", 1.5),
        ("86400", 300.0),
        ("9" * 5000, 300.0),
        ("-1", None),
        ("nan", None),
        ("inf", None),
        ("1e9", None),
        ("٣", None),
        ("soon", None),
        ("", None),
        ("Wed, 99 Foo 2026 99:99:99 GMT", None),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 300.0),
    ],
)
def test_retry_after(text, expected):
    """
    What a server asks for is honoured up to five minutes; nonsense is no request at all.
    """
    assert expected == told(text)


def test_retry_after_as_a_date_goes_by_the_servers_clock():
    """
    A server whose clock is a day off still gets the minute that it asks for.
    """
    yesterday = time.time() - 86400
    dates = [email.utils.formatdate(yesterday + offset, usegmt=True) for offset in (0, 60)]

    assert told(dates[1], Date=dates[0]) == 60.0


def test_no_retry_after():
    """
    Most answers ask for nothing.
    """
    assert retry_after(Answer(200, {}, b"", 0.1)) is None


def test_the_body_is_not_in_the_repr():
    """
    An answer that is logged does not pour megabytes, or control characters, over the screen.
    """
    assert "secret" not in repr(Answer(200, {}, b"secret", 0.1))


def test_a_replaced_ca_file_is_read_again(authority, tmp_path):
    """
    A pool that is opened after the CA file was replaced trusts the new one.
    """
    path = tmp_path / "ca.pem"
    path.write_text(Path(Authority(tmp_path).ca_path).read_text())
    with Server(answer(), tls=authority.context()) as server:
        with opened(server.url, verify=str(path)) as transport:
            failure(transport)
        path.unlink()
        path.write_text(Path(authority.ca_path).read_text())
        with opened(server.url, verify=str(path)) as transport:
            assert get(transport).status == 200


# -- answers of which nothing needs to be thought about ----------------------------------------------------------------

_OK = b"HTTP/1.1 200 OK\r\n"
_TWO = b"Content-Length: 2\r\n"
#: What a server sends on a kept connection, in pieces that arrive one after the other; whether it is plain.
PLAIN_OR_NOT = {
    "as ours": ([_OK + _TWO + b"Content-Type: application/json\r\n\r\n{}"], True),
    "no spaces": ([_OK + b"content-length:2\r\nX:\t a \t\r\n\r\n{}"], True),
    "kept": ([_OK + _TWO + b"Connection: Keep-Alive\r\nKeep-Alive: timeout=5\r\n\r\n{}"], True),
    "an error": ([b"HTTP/1.1 503 Try later\r\nRetry-After: 7\r\n" + _TWO + b"\r\n{}"], True),
    "no body": ([_OK + b"Content-Length: 0\r\n\r\n"], True),
    "body apart": ([_OK + _TWO + b"\r\n", b"{", b"}"], True),
    "head in pieces": ([_OK + b"Content-", b"Length: 2\r\n\r\n{}"], False),
    "to be closed": ([_OK + _TWO + b"Connection: close\r\n\r\n{}"], False),
    "chunked": ([_OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"], False),
    "compressed": ([_OK + b"Content-Encoding: gzip\r\n" + _TWO + b"\r\n{}"], False),
    "two lengths": ([_OK + _TWO + b"Content-Length: 3\r\n\r\n{} "], False),
    "a length twice": ([_OK + _TWO + _TWO + b"\r\n{}"], False),
    "a list of lengths": ([_OK + b"Content-Length: 2, 3\r\n\r\n{} "], False),
    "a signed length": ([_OK + b"Content-Length: +2\r\n\r\n{}"], False),
    "a folded header": ([_OK + b"X: a\r\n b\r\n" + _TWO + b"\r\n{}"], False),
    "a name with a space": ([_OK + b"X : a\r\n" + _TWO + b"\r\n{}"], False),
    "latin-1": ([_OK + b"X: caf\xe9\r\n" + _TWO + b"\r\n{}"], False),
    "bare line feeds": ([b"HTTP/1.1 200 OK\nContent-Length: 2\n\n{}"], False),
    "no reason": ([b"HTTP/1.1 200\r\n" + _TWO + b"\r\n{}"], False),
    "HTTP/1.0": ([b"HTTP/1.0 200 OK\r\n" + _TWO + b"\r\n{}"], False),
    "nothing follows": ([b"HTTP/1.1 204 Gone\r\n" + _TWO + b"\r\n"], False),
    "too much": ([_OK + _TWO + b"\r\n{}{}"], True),
    "too large": ([_OK + b"Content-Length: 999999999\r\n\r\n{}"], False),
    "too short": ([_OK + b"Content-Length: 3\r\n\r\n{}"], True),
    "no length": ([_OK + b"X: a\r\n\r\n{}"], False),
    "not HTTP": ([b"SSH-2.0-OpenSSH_9.6\r\n"], False),
}


@pytest.mark.parametrize("name", PLAIN_OR_NOT)
def test_the_short_way_reads_what_http_client_reads(name, monkeypatch):
    """Answers without a peculiarity are read here; what is told of all of them is what http.client tells."""
    pieces, plain = PLAIN_OR_NOT[name]

    def script(connection: Connection) -> None:
        connection.request()
        for piece in pieces:
            connection.send(piece)
            if len(pieces) > 1:
                connection.pause(0.05)

    def told() -> object:
        with Server(decent_at_first(script), answer(b"[]")) as server, opened(server.url) as transport:
            assert get(transport).body == b"{}"
            try:
                found = get(transport)
            except GPUPoolError as error:
                return type(error), str(error).replace(server.url, "")
            assert get(transport).body == b"[]"  # what was left over spoils nothing
            return found.status, {name.lower(): found.headers[name.upper()] for name in found.headers}, found.body

    read = transport_module._plain_head
    seen: list[bool] = []

    def noting(begun):
        found = read(begun)
        seen.append(found is not None)
        return found

    monkeypatch.setattr(transport_module, "_plain_head", noting)
    by_us = told()
    monkeypatch.setattr(transport_module, "_plain_head", lambda begun: None)
    assert by_us == told()
    assert seen[0] is plain
