"""The proxy that breaks connections for the soak: each fault, seen from both ends of real connections."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import eventually, run_threads

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the benchmarks are in the checkout only", allow_module_level=True)
sys.path.insert(0, str(ROOT))  # pytest itself only finds what lies in tests/

from benchmarks._proxy import BUFFER, FaultProxy  # noqa: E402

pytestmark = pytest.mark.checkout

#: Seconds after which something that ought to arrive is missing; never waited for in full where all is well.
AMPLE = 20.0


class Target:
    """A listener whose accepted connections the test reads and writes itself."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(AMPLE)
        self.port = self.listener.getsockname()[1]

    def accept(self) -> socket.socket:
        sock, _ = self.listener.accept()
        sock.settimeout(AMPLE)
        return sock

    def waiting(self) -> bool:
        """Whether somebody has connected who was not accepted yet."""
        self.listener.settimeout(0.0)
        try:
            self.listener.accept()[0].close()
        except BlockingIOError:
            return False
        finally:
            self.listener.settimeout(AMPLE)
        return True


@pytest.fixture
def target() -> Iterator[Target]:
    made = Target()
    yield made
    made.listener.close()


@pytest.fixture
def proxy(target: Target) -> Iterator[FaultProxy]:
    with FaultProxy("127.0.0.1", target.port) as made:
        yield made


@pytest.fixture
def ends(request: pytest.FixtureRequest, target: Target, proxy: FaultProxy) -> Iterator[Ends]:
    with Ends(target, proxy) as made:
        yield made


class Ends:
    """The client's and the target's end of one connection through the proxy."""

    def __init__(self, target: Target, proxy: FaultProxy) -> None:
        self.client = socket.create_connection(("127.0.0.1", proxy.port), AMPLE)
        self.target = target.accept()
        self.say("up", b"hello")  # it stands, all the way

    def __enter__(self) -> Ends:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.target.close()

    def send(self, direction: str, data: bytes) -> None:
        (self.client if direction == "up" else self.target).sendall(data)

    def arrives(self, direction: str, data: bytes) -> None:
        assert receive(self.target if direction == "up" else self.client, len(data)) == data

    def say(self, direction: str, data: bytes) -> None:
        self.send(direction, data)
        self.arrives(direction, data)


def receive(sock: socket.socket, size: int) -> bytes:
    """So many bytes, or what comes until the end."""
    data = b""
    while len(data) < size and (more := sock.recv(size - len(data))):
        data += more
    return data


def silent(sock: socket.socket) -> bool:
    """Whether there is nothing to read, not even an end, and nothing comes for a moment."""
    sock.settimeout(0.1)
    try:
        sock.recv(1)
    except TimeoutError:
        return True
    finally:
        sock.settimeout(AMPLE)
    return False


def test_it_forwards(proxy, target, ends):
    """Both ways, several connections, also an end that only one side has come to."""
    ends.say("up", b"question")
    ends.say("down", b"answer")
    with Ends(target, proxy) as others:
        assert proxy.connections() == 2
        others.client.shutdown(socket.SHUT_WR)
        assert others.target.recv(1) == b""
        others.say("down", b"and yet an answer")
        others.target.close()
        assert others.client.recv(1) == b""
    eventually(lambda: proxy.connections() == 1)
    ends.say("down", b"still there")
    assert proxy.url == f"http://127.0.0.1:{proxy.port}"


def test_a_large_amount_passes_unchanged(ends):
    """More than is kept at a time, against a reader that starts late."""
    data = bytes(range(256)) * 20_000
    sender = threading.Thread(target=ends.client.sendall, args=(data,), daemon=True)
    sender.start()
    got = receive(ends.target, len(data))
    sender.join(AMPLE)
    assert got == data


def test_a_cut_resets_all_and_new_ones_are_accepted(proxy, target, ends):
    """Both ends hear of it; who connects afterwards is served."""
    with Ends(target, proxy) as others:
        proxy.cut()
        for sock in (ends.client, ends.target, others.client, others.target):
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
        assert proxy.connections() == 0
    with Ends(target, proxy) as new:
        new.say("down", b"answer")


def test_refused_connections(proxy, target, ends):
    """New ones are refused, on the same port accepted again; those that there are stay. Saying it twice is fine."""
    proxy.refuse()
    proxy.refuse(True)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", proxy.port), AMPLE)
    ends.say("down", b"answer")
    proxy.refuse(False)
    proxy.refuse(False)
    with Ends(target, proxy) as new:
        new.say("up", b"question")


def test_a_black_hole_keeps_everything_until_it_ends(proxy, target, ends):
    """Connections stay, nothing arrives; when it is over everything does, also of those who came or left meanwhile."""
    with Ends(target, proxy) as leaving:
        proxy.blackhole()
        ends.send("up", b"question")
        ends.send("down", b"answer")
        leaving.send("up", b"last words")
        leaving.client.close()
        with socket.create_connection(("127.0.0.1", proxy.port), AMPLE) as new:
            new.sendall(b"new")
            for sock in (ends.client, ends.target, leaving.target, new):
                assert silent(sock)
            assert not target.waiting()
            proxy.blackhole(False)
            ends.arrives("up", b"question")
            ends.arrives("down", b"answer")
            leaving.arrives("up", b"last words")
            assert leaving.target.recv(1) == b""
            with target.accept() as accepted:
                assert receive(accepted, 3) == b"new"


@pytest.mark.parametrize("direction", ["up", "down"])
def test_one_way(proxy, ends, direction):
    """The request arrives and its answer does not, or the other way round; kept is what does not."""
    other = {"up": "down", "down": "up"}[direction]
    proxy.one_way(direction)
    ends.say(direction, b"arrives")
    ends.send(other, b"late")
    assert silent(ends.client if other == "down" else ends.target)
    ends.say(direction, b"arrives as well")
    proxy.heal()
    ends.arrives(other, b"late")


def test_a_cut_while_answers_are_lost(proxy, ends):
    """What was kept is gone with its connection."""
    proxy.one_way("up")
    ends.say("up", b"question")
    ends.send("down", b"answer")
    assert silent(ends.client)
    proxy.cut()
    proxy.heal()
    with pytest.raises(ConnectionResetError):
        ends.client.recv(1)


@pytest.mark.parametrize("size", [0, 4])
def test_a_truncated_answer(proxy, target, ends, size):
    """The next answer ends early; only that one."""
    with Ends(target, proxy) as others:
        proxy.cut_after(size)
        ends.say("up", b"a request may be longer")
        ends.send("down", b"an answer of some length")
        assert receive(ends.client, 100) == b"an answer of some length"[:size]
        others.say("down", b"an answer of some length")


def test_a_truncated_answer_of_several_parts(proxy, ends):
    """The bytes are counted over all of it."""
    proxy.cut_after(6)
    ends.say("down", b"four")
    ends.send("down", b"more")
    assert receive(ends.client, 100) == b"mo"


def test_a_delay(proxy, ends):
    """Everything comes later, in its order, and at once when it is healed."""
    proxy.delay(0.05)
    begin = time.monotonic()
    ends.say("up", b"question")
    assert time.monotonic() - begin >= 0.05
    begin = time.monotonic()
    ends.say("down", b"answer")
    assert time.monotonic() - begin >= 0.05
    proxy.delay(1000.0)
    ends.send("up", b"first")
    assert silent(ends.target)
    proxy.delay(0.0)
    ends.send("up", b"second")
    assert silent(ends.target)
    proxy.heal()
    ends.arrives("up", b"firstsecond")


def test_what_is_kept_is_bounded(proxy, ends):
    """A sender whose bytes go nowhere has to stop, and nothing of them is lost."""
    proxy.blackhole()
    ends.client.setblocking(False)
    sent = 0

    def full() -> bool:
        nonlocal sent
        before = sent
        with contextlib.suppress(BlockingIOError):
            while True:
                sent += ends.client.send(b"x" * 65536)
        return sent == before  # since the last look, in which the proxy and the kernel could take some

    eventually(full, AMPLE, tick=0.2)
    (pair,) = proxy._pairs
    assert pair.up.size == BUFFER
    proxy.heal()
    assert len(receive(ends.target, sent)) == sent


def test_a_target_that_is_not_there_is_a_reset():
    """The client has been accepted by then; it learns it all the same."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with (
        FaultProxy("127.0.0.1", port) as proxy,
        pytest.raises(ConnectionResetError),
        socket.create_connection(("127.0.0.1", proxy.port), AMPLE) as client,
    ):
        client.recv(1)


def test_a_reset_is_passed_on(proxy, ends):
    """The other end is not left waiting."""
    import struct

    ends.target.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    ends.target.close()
    with pytest.raises(ConnectionResetError):
        ends.client.recv(1)
    eventually(lambda: proxy.connections() == 0)


def test_faults_from_many_threads(proxy, target):
    """Switched at random by several threads while others connect: afterwards it forwards as if nothing had been."""
    faults = [
        proxy.cut,
        proxy.refuse,
        proxy.blackhole,
        proxy.heal,
        lambda: proxy.one_way("up"),
        lambda: proxy.delay(0.001),
        lambda: proxy.cut_after(3),
        lambda: proxy.refuse(False),
    ]

    def work(number: int) -> None:
        for turn in range(20):
            faults[(3 * number + 5 * turn) % len(faults)]()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", proxy.port), AMPLE) as sock:
                sock.sendall(b"x")

    run_threads(4, work)
    proxy.heal()
    proxy.cut()
    while target.waiting():
        pass
    with Ends(target, proxy) as ends:
        ends.say("down", b"answer")


def test_the_end_of_it(target):
    """Connections end, the thread and the port too; twice is fine, and faults say that it does not run any more."""
    proxy = FaultProxy("127.0.0.1", target.port)
    with Ends(target, proxy) as ends:
        proxy.close()
        proxy.close()
        with pytest.raises(ConnectionResetError):
            ends.client.recv(1)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", proxy.port), AMPLE)
    with pytest.raises(RuntimeError, match="does not run"):
        proxy.cut()
    assert not any(thread.name == f"fault-proxy-{proxy.port}" for thread in threading.enumerate())
