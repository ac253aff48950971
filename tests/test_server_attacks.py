"""A real server and clients that want to harm it: it goes on answering others, and holds little for them."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import resource
import select
import socket
import struct
import time
from collections.abc import Iterator, Sequence

import pytest

from attacked import Victim, victim
from helpers import eventually

pytestmark = pytest.mark.real

#: Seconds that a request may take in these servers, and an idle connection be idle.
SHORT = 1.0
#: Bytes by which a server may have grown after it was attacked.
GROWTH = 48 << 20


@pytest.fixture(scope="module")
def server() -> Iterator[Victim]:
    with victim(REQUEST_TIME=SHORT, KEEP_ALIVE=4 * SHORT, ANSWER_TIME=8 * SHORT, _LAST_WORD=SHORT) as made:
        yield made


@pytest.fixture
def descriptors() -> Iterator[None]:
    """Enough of them for this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 6000:
        pytest.skip(f"needs 6000 descriptors, {hard} are allowed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 6000), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def ended(connections: Sequence[socket.socket]) -> bool:
    """Whether the server has hung up on all of them."""
    for each in connections:
        each.setblocking(False)
        try:
            while each.recv(65536):
                pass
        except BlockingIOError:
            return False
        except OSError:
            pass
    return True


POST = b"POST /v1/leases HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n"


#: How a request begins, and what it goes on with.
DRIPS = {
    "first line": (b"", b"G"),
    "header": (b"GET /health HTTP/1.1\r\nX: ", b"x"),
    "headers": (b"GET /health HTTP/1.1\r\n", b"X: y\r\n"),
    "body": (POST, b" "),
    "chunks": (POST.replace(b"Content-Length: 100000", b"Transfer-Encoding: chunked"), b"1\r\n \r\n"),
    # The answer is there at once, the body goes on.
    "body of a GET": (POST.replace(b"POST /v1/leases", b"GET /health"), b" "),
}


def test_slow_clients_are_hung_up_on(server):
    """A request that arrives byte by byte has so much time and no more, however busily it drips."""
    connections = {(name, number): server.connect() for name in DRIPS for number in range(10)}
    alive = set(connections)
    try:
        for (name, _), connection in connections.items():
            connection.sendall(DRIPS[name][0])

        def drip() -> bool:
            for which in list(alive):
                try:
                    connections[which].sendall(DRIPS[which[0]][1])
                except OSError:
                    alive.discard(which)
            return not alive

        eventually(drip, 50.0, lambda: f"the server hangs up: {sorted(alive)}", tick=0.1)
        assert server.healthy()
    finally:
        for connection in connections.values():
            connection.close()


def test_connections_that_say_nothing_are_hung_up_on(server):
    """Half-open ones, whose peer has gone without a word, are among them."""
    connections = [server.connect() for _ in range(50)]
    try:
        eventually(lambda: server.sockets() >= 50, message="it has accepted them")
        assert server.healthy()
        eventually(lambda: ended(connections), 60.0, "the server hangs up", tick=0.1)
    finally:
        for each in connections:
            each.close()


def test_answers_that_nobody_reads_are_given_up():
    """Who asks and asks and takes no answer is hung up on, and what is kept for it is bounded."""
    request = b"GET /gpu/summary HTTP/1.1\r\nHost: x\r\n\r\n" * 50
    with victim(cards=1000, KEEP_ALIVE=2 * SHORT, ANSWER_TIME=2 * SHORT, _LAST_WORD=SHORT) as server:
        before = server.process.memory_info().rss
        alive = [server.connect() for _ in range(10)]
        connections = list(alive)
        try:
            for each in connections:
                each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                each.setblocking(False)

            def ask_on() -> bool:
                for each in list(alive):
                    try:
                        each.send(request)
                    except BlockingIOError:
                        pass
                    except OSError:
                        alive.remove(each)
                return not alive

            eventually(ask_on, 50.0, "the server hangs up", tick=0.1)
            assert server.healthy()
            assert server.process.memory_info().rss < before + GROWTH
        finally:
            for each in connections:
                each.close()


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /" + b"x" * (1 << 20) + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"x" * (1 << 20) + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * (1 << 18) + b"\r\n",
        POST.replace(b"100000", b"1000000000000") + b" " * (1 << 20),
        POST.replace(b"Content-Length: 100000", b"Transfer-Encoding: chunked") + b"100000\r\n" + b" " * (2 << 20),
        b"\x16\x03\x01" + b"\0" * 1000,
        b"\r\n" * (1 << 18),
    ],
    ids=["path", "header", "headers", "announced body", "chunked body", "TLS", "empty lines"],
)
def test_oversized_requests_are_refused(server, request_):
    """Whatever is too large ends with an error or with the connection, and is not kept."""
    before = server.process.memory_info().rss
    for _ in range(5):
        with server.connect() as connection:
            answer = b""
            with contextlib.suppress(OSError):
                connection.sendall(request_)
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
                answer = connection.recv(100)
            assert answer == b"" or answer.split()[1] in (b"400", b"413", b"414", b"431")
    assert server.healthy()
    assert server.process.memory_info().rss < before + GROWTH


def test_thousands_of_idle_connections(descriptors):
    """Where all connections are taken, the one that has waited longest makes room: others are answered."""
    with victim(MAX_CONNECTIONS=1500) as server:
        before = server.process.memory_info().rss
        connections: list[socket.socket] = []
        try:
            for number in range(2000):
                connections.append(server.connect())
                if number % 3 == 0:
                    connections[-1].sendall(b"GET / HTTP/1.1\r\n")
                if number % 250 == 0:
                    assert server.healthy()
            eventually(lambda: server.sockets() <= 1500, message="the server has hung up on some")
            assert server.healthy()
            assert server.post("/v1/leases/renew", {"ids": ["a"]})[0] == 200
            assert server.process.memory_info().rss < before + GROWTH
            assert server.process.num_threads() < 20
        finally:
            for each in connections:
                each.close()
        eventually(lambda: server.sockets() <= 1, message="all are gone")


def test_few_descriptors_are_enough():
    """With a low limit of open files there are fewer connections, and nobody is left without an answer."""
    with victim(limit=512) as server:
        connections = [server.connect() for _ in range(600)]
        try:
            assert server.healthy()
            eventually(lambda: server.sockets() <= 128, message="the server has hung up on some")
            assert server.healthy()
        finally:
            for each in connections:
                each.close()
        assert server.healthy()


def claim(number: int, *cards: str) -> dict:
    return {
        "id": f"id-{number}",
        "holder": {"id": f"holder-{number}", "user": "u", "host": "h", "pid": 1},
        "cards": [{"key": key} for key in cards],
        "ttl": 60,
        "queue": True,
    }


def begin_wait(connection: http.client.HTTPConnection, number: int) -> None:
    """Ask for a long poll of the holder of claim *number*; its answer is left to come."""
    document = json.dumps({"holder": f"holder-{number}", "timeout": 25})
    connection.request("POST", "/v1/wait", document, {"Content-Type": "application/json"})


def long_polls(server: Victim) -> int:
    """Those that are under way in the server."""
    metrics = server.get("/metrics")[1].decode()
    return int(float(re.search(r"^\S*long_polls (\S+)$", metrics, re.MULTILINE)[1]))


def test_a_thousand_waiters_that_vanish(descriptors):
    """Nothing is left of them: no place in the queue, no connection, no thread; whoever waits behind is served."""
    waiters = 1000
    with victim() as server:
        cards = [gpu["uuid"] for gpu in json.loads(server.get("/gpu/summary")[1])["gpus_summary"]]
        for number, card in enumerate(cards):
            assert server.post("/v1/leases", {**claim(number, card), "ttl": 300})[0] == 200
        before, rss = server.holds(), server.process.memory_info().rss
        connections: list[http.client.HTTPConnection] = []

        def wait_on() -> None:
            """As their clients would: whose long poll was answered on a slow machine begins the next one."""
            poll = select.poll()
            for connection in connections:
                poll.register(connection.sock, select.POLLIN)
            answered = {descriptor for descriptor, _ in poll.poll(0)}
            for number, connection in enumerate(connections):
                if connection.sock.fileno() in answered:
                    answer = connection.getresponse()
                    assert (answer.status, json.loads(answer.read())) == (200, {"hints": []})
                    begin_wait(connection, 100 + number)

        try:
            for number in range(100, 100 + waiters):
                connection = http.client.HTTPConnection(*server.address, timeout=60)
                body = json.dumps(claim(number, *cards))
                connection.request("POST", "/v1/leases", body, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                assert (answer.status, answer.read()[:1]) == (202, b"{")
                connections.append(connection)
                begin_wait(connection, number)
                if number % 20 == 0:
                    wait_on()

            def all_wait() -> bool:
                wait_on()
                return long_polls(server) == waiters

            eventually(all_wait, 60.0, lambda: f"all of them wait, not {long_polls(server)}", tick=0.1)
            assert len(json.loads(server.get("/v1/queue")[1])["queue"]) == waiters
            assert server.healthy()
            assert server.holds()[1] <= before[1] + 4
        finally:
            for number, connection in enumerate(connections):
                if number % 2:  # these go by RST, the others by FIN
                    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.close()

        def gone() -> bool:
            queue = json.loads(server.get("/v1/queue")[1])["queue"]
            fds, threads = server.holds()
            polls = long_polls(server)
            return not queue and not polls and fds <= before[0] + 4 and threads <= before[1] + 4

        eventually(gone, 60.0, lambda: f"nothing is left of them: {server.holds()} after {before}", tick=0.2)
        assert server.process.memory_info().rss < rss + GROWTH
        assert server.post("/v1/leases/release", {"ids": ["id-0"]})[0] == 200
        status, lease = server.post("/v1/leases", claim(5000, *cards))
        assert (status, lease.get("cards")) == (200, cards[:1])


def test_long_polls_leave_room_for_others():
    """Who only waits takes half of the connections at most."""
    with victim(MAX_CONNECTIONS=40) as server:
        polls = []
        try:
            statuses = []
            for number in range(30):
                connection = http.client.HTTPConnection(*server.address, timeout=30)
                polls.append(connection)
                connection.request(
                    "POST",
                    "/v1/wait",
                    json.dumps({"holder": f"h-{number}", "timeout": 20}),
                    {"Content-Type": "application/json"},
                )
                if number >= 20:
                    answer = connection.getresponse()
                    answer.read()
                    statuses.append((answer.status, answer.headers["Retry-After"]))
            assert statuses == [(503, "1")] * 10
            idle = [server.connect() for _ in range(60)]
            assert server.healthy()
            # Who waits was not hung up on.
            time.sleep(0.2)
            for connection in polls[:20]:
                connection.sock.setblocking(False)
                with pytest.raises(BlockingIOError):
                    connection.sock.recv(1)
            for each in idle:
                each.close()
        finally:
            for connection in polls:
                connection.close()
