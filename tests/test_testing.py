"""`FakeFleet`: real server processes, their faults, and that nothing of them stays behind."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from urllib.parse import urlsplit

import pytest

from gpupool_sync.errors import ConfigError, GPUPoolError, MissingExtra
from gpupool_sync.testing import FakeFleet, FleetError
from helpers import eventually, run_threads

pytestmark = pytest.mark.real


def connect(server, timeout: float = 60.0) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=timeout)


def ask(server, path: str = "/gpu/summary", timeout: float = 60.0):
    """One request over a connection of its own: status, headers, document."""
    with contextlib.closing(connect(server, timeout)) as connection:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.headers, json.loads(response.read())


def uuids(server) -> list[str]:
    return [gpu["uuid"] for gpu in ask(server)[2]["gpus_summary"]]


def gone(pid: int) -> bool:
    """Whether the process has ended, reaped or not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


@pytest.fixture(scope="module")
def shared():
    with FakeFleet([3, "2xA100,1xT4"], names=["one", "two"]) as fleet:
        yield fleet


@pytest.fixture
def fleet(shared):
    """Two healthy servers; whatever a test does to them is undone before the next."""
    for server in shared:
        server.heal()
    return shared


def test_a_fleet_is_a_sequence_of_servers(fleet):
    """Servers are taken by index, counted and iterated; each has a URL and its cards."""
    assert len(fleet) == 2
    assert [server.url for server in fleet] == fleet.urls
    assert fleet[-1] is fleet[1]
    assert fleet[0:1] == (fleet[0],)
    assert ask(fleet[0])[2]["gpu_count"] == 3
    names = [gpu["name"] for gpu in ask(fleet[1])[2]["gpus_summary"]]
    assert names == ["Simulated A100", "Simulated A100", "Simulated T4"]
    assert ask(fleet[1])[2]["host"]["name"] == fleet[1].name == "two"
    for server in fleet:
        assert server.alive
        assert server.url == f"http://127.0.0.1:{server.port}"
        assert server.name in repr(server)
    assert repr(fleet).startswith("<FakeFleet of 2: ")


def test_kill_and_restart(fleet):
    """A killed server refuses connections, its neighbour goes on; restarted it has the same port and cards."""
    before, url, pid = uuids(fleet[0]), fleet[0].url, fleet[0].pid
    fleet[0].kill()
    fleet[0].kill()
    assert (fleet[0].alive, fleet[0].pid) == (False, None)
    assert gone(pid)
    with pytest.raises(ConnectionRefusedError):
        ask(fleet[0])
    assert ask(fleet[1])[0] == 200
    with pytest.raises(FleetError, match="not running"):
        fleet[0].busy(0)
    for _ in range(3):
        fleet[0].restart()
        assert (uuids(fleet[0]), fleet[0].url) == (before, url)
    assert fleet[0].pid != pid


def test_heal_restarts_a_dead_server(fleet):
    """A server that died, or was killed, is there again after heal()."""
    pid = fleet[0].pid
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not fleet[0].alive)
    fleet[0].heal()
    assert ask(fleet[0])[0] == 200
    fleet[0].kill()
    fleet[0].heal()
    assert ask(fleet[0])[0] == 200


def test_slow(fleet):
    """Every answer of a slow server comes late, those of the others do not."""
    fleet[0].slow(0.5)
    begin = time.monotonic()
    assert ask(fleet[0])[0] == 200
    assert time.monotonic() - begin >= 0.5
    with pytest.raises(TimeoutError):
        ask(fleet[0], timeout=0.1)
    fleet[0].heal()
    assert ask(fleet[0])[0] == 200


@pytest.mark.parametrize("status", [429, 500, 503, 404, 200])
def test_fail(fleet, status):
    """Every answer has the status that was ordered."""
    fleet[0].fail(status, retry_after=7)
    for path in ("/gpu/summary", "/health", "/nope"):
        answered, headers, document = ask(fleet[0], path)
        assert (answered, headers["Retry-After"], document["error"]["code"]) == (status, "7", "fault")
    fleet[0].heal()
    assert ask(fleet[0])[0] == 200


def test_error_body(fleet):
    """A server can report an error with status 200, as the predecessor's do."""
    fleet[0].error_body()
    status, _, document = ask(fleet[0])
    assert (status, document["gpu_count"], document["gpus"]) == (200, 0, [])
    assert "nvidia-smi failed" in document["error"]


def test_hang(fleet):
    """A hanging server accepts and never answers, also later; healed it answers new requests."""
    fleet[0].hang()
    with contextlib.closing(connect(fleet[0], timeout=0.3)) as connection:
        connection.request("GET", "/gpu/summary")
        with pytest.raises(TimeoutError):
            connection.getresponse()
        fleet[0].heal()
        assert ask(fleet[0])[0] == 200
        with pytest.raises(TimeoutError):
            connection.sock.recv(1)
    fleet[0].hang()
    fleet[0].restart()
    assert ask(fleet[0])[0] == 200


def test_freeze(fleet):
    """A frozen server still accepts, does not answer, and goes on where it was after heal()."""
    pid = fleet[0].pid
    fleet[0].freeze()
    with contextlib.closing(connect(fleet[0], timeout=0.3)) as connection:
        connection.request("GET", "/gpu/summary")
        with pytest.raises(TimeoutError):
            connection.getresponse()
    with pytest.raises(FleetError, match="frozen"):
        fleet[0].request_count()
    assert "frozen" in repr(fleet[0])
    fleet[0].heal()
    assert (ask(fleet[0])[0], fleet[0].pid) == (200, pid)
    fleet[0].freeze()
    fleet[0].kill()
    assert gone(pid)
    fleet[0].restart()
    assert ask(fleet[0])[0] == 200


def test_lose_gpu(fleet):
    """A lost card is listed as unavailable from the next request on, and comes back."""
    lost = uuids(fleet[0])[1]
    fleet[0].lose_gpu(1)
    document = ask(fleet[0])[2]
    assert [gpu["gpu_id"] for gpu in document["gpus_summary"]] == [0, 2]
    assert [gpu["uuid"] for gpu in document["gpus_unavailable"]] == [lost]
    fleet[0].heal()
    assert uuids(fleet[0])[1] == lost


def test_busy(fleet):
    """A busy card shows its load and who uses it from the next request on."""
    fleet[0].busy(0, 90)
    fleet[0].busy(1, 50, 0, process=False)
    first, second, third = ask(fleet[0])[2]["gpus_summary"]
    assert (round(first["memory_usage_percent"]), first["utilization_percent"]) == (90, 90)
    assert first["processes"][0]["user"] == "somebody"
    assert (round(second["memory_usage_percent"]), second["utilization_percent"], second["processes"]) == (50, 0, [])
    assert (third["utilization_percent"], third["processes"]) == (0, [])


def test_empty(fleet):
    """A server can have no cards at all."""
    fleet[0].empty()
    document = ask(fleet[0])[2]
    assert (document["gpu_count"], document["gpus_summary"]) == (0, [])
    fleet[0].heal()
    assert ask(fleet[0])[2]["gpu_count"] == 3


@pytest.mark.parametrize(
    "wrong",
    [
        lambda server: server.lose_gpu(3),
        lambda server: server.busy(-1),
        lambda server: server.busy(0, 101),
        lambda server: server.slow(-1),
        lambda server: server.fail(99),
    ],
)
def test_orders_that_make_no_sense(fleet, wrong):
    """An order that cannot be obeyed is an error of ours, and changes nothing."""
    with pytest.raises(GPUPoolError):
        wrong(fleet[0])
    assert ask(fleet[0])[2]["gpu_count"] == 3


def test_requests_and_connections_are_counted(fleet):
    """The server counts what reached it, so a test can prove that connections are reused."""
    server = fleet[0]
    server.restart()
    assert (server.request_count(), server.connection_count()) == (0, 0)
    with contextlib.closing(connect(server)) as connection:
        for path in ("/gpu/summary", "/gpu/summary", "/health"):
            connection.request("GET", path)
            connection.getresponse().read()
    assert (server.request_count(), server.request_count("/health"), server.request_count(None)) == (2, 1, 3)
    assert server.connection_count() == 1
    with socket.create_connection(("127.0.0.1", server.port)):
        eventually(lambda: server.connection_count() == 2)
    assert server.request_count(None) == 3


def test_orders_from_many_threads(fleet):
    """Threads may give orders at the same time; each gets its own answer."""

    def order(number):
        server = fleet[number % 2]
        for _ in range(5):
            server.busy(number % 3, 10 * number)
            assert server.request_count("/never") == 0

    run_threads(8, order)


def test_names_decide_the_cards(fleet):
    """Fleets of the same names have the same cards, those without names have cards of their own."""
    with FakeFleet([3], names=["one"]) as same, FakeFleet([3]) as other:
        assert uuids(same[0]) == uuids(fleet[0])
        assert not set(uuids(other[0])) & set(uuids(fleet[0]))
        assert other[0].name != same[0].name


def test_closing_ends_every_process():
    """After the block no process is left, also of servers that hang or are frozen; closing again does nothing."""
    fleet = FakeFleet([1, 1, 1, 1])
    pids = [server.pid for server in fleet]
    fleet[0].hang()
    fleet[1].freeze()
    fleet[2].kill()
    with fleet, contextlib.closing(connect(fleet[0])) as connection:
        connection.request("GET", "/")
        begin = time.monotonic()
        fleet.close()
        assert time.monotonic() - begin < 30.0  # nobody waits for what hangs, or is frozen
    fleet.close()
    assert all(gone(pid) for pid in pids)
    assert not any(server.alive for server in fleet)


_PARENT = """
import os, sys, time
from gpupool_sync.testing import FakeFleet
fleet = FakeFleet([1, 1])
fleet[1].freeze()
if sys.argv[1] == "fork" and os.fork() == 0:
    time.sleep(60)  # holds the pipes of the servers open
    os._exit(0)
print(*(server.pid for server in fleet), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("how", ["plain", "fork"])
def test_a_killed_parent_leaves_no_server(how):
    """If the process that made the fleet is killed, its servers end by themselves, frozen ones too."""
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, how], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        line = parent.stdout.readline()
        pids = [int(pid) for pid in line.split()]
        assert len(pids) == 2
        parent.kill()
        parent.wait(60)
        eventually(lambda: all(gone(pid) for pid in pids))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
        parent.kill()
        parent.wait(60)
        parent.stdout.close()


_FORKED = """
import os
from gpupool_sync.testing import FakeFleet
with FakeFleet([1, 1]) as fleet:
    child = os.fork()
    if child == 0:
        fleet.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert [server.alive for server in fleet] == [True, True]
    print(fleet[0].request_count())
"""


def test_a_forked_child_closes_nothing():
    """A forked child that leaves the block leaves the servers to its parent."""
    done = subprocess.run([sys.executable, "-c", _FORKED], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


def test_a_server_that_does_not_start():
    """A server that cannot start is an error with its own words, and nothing of the fleet stays."""
    with pytest.raises(FleetError, match=r"did not start: simulated cards '4x'"):
        FakeFleet([1, "4x"])


def test_a_server_whose_process_breaks(monkeypatch):
    """If the process itself breaks, the error shows what it wrote."""
    monkeypatch.setattr("gpupool_sync.testing._MODULE", "gpupool_sync.no_such_module")
    with pytest.raises(FleetError, match=r"(?s)has ended; it said:.*no_such_module"):
        FakeFleet([1])


def test_a_start_that_takes_too_long():
    """The start is bounded in time."""
    with pytest.raises(FleetError, match="did not start in time"):
        FakeFleet([1], start_timeout=0.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: FakeFleet("8"),
        lambda: FakeFleet(8),
        lambda: FakeFleet([True]),
        lambda: FakeFleet([-1]),
        lambda: FakeFleet([1], names=["a", "b"]),
        lambda: FakeFleet([1, 1], names=["a", "a"]),
        lambda: FakeFleet([1], interval=0),
    ],
)
def test_fleets_that_make_no_sense(make):
    """Arguments that cannot be used are refused before anything is started."""
    with pytest.raises(ConfigError):
        make()


def test_an_empty_fleet():
    """A fleet without servers is one."""
    with FakeFleet([]) as fleet:
        assert (len(fleet), fleet.urls) == (0, [])


def test_without_the_extra(monkeypatch):
    """Without FastAPI the error has the line that installs it."""
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(MissingExtra, match=re.escape("pip install 'gpupool-sync[server]'")):
        FakeFleet([1])
