"""
Broken networks between clients, our server and Redis: real ones, in network namespaces of the tests' own.

Two client machines share the two cards of a third; the link of one of them, or of the arbiter, breaks and heals.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import HoldLog, eventually
from network import FAULTS, Network, forms, why_not
from redis_server import PROGRAM as REDIS

HERE = Path(__file__).resolve().parent

#: Seconds. A fault lasts longer than a ttl, so that holders who are cut off lose their cards to the others.
TTL = 2.0
FAULT = 1.25 * TTL
#: Seconds that an `acquire` may wait, and one exchange with a server.
TIMEOUT = 3.0
EXCHANGE = 1.0
#: Seconds by which a machine with too much to do may be late. It bounds hangs, and measures nothing.
LATE = 15.0
PATIENCE = 60.0

pytestmark = [
    pytest.mark.real,
    pytest.mark.root_only,
    pytest.mark.timeout(240),
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]


class Client:
    """A `network_worker.py` on one of the hosts."""

    def __init__(self, host, environment, **settings) -> None:
        self.host = host
        self.keep, self.want = Path(settings["keep"]), Path(settings["want"])
        self.rounds: list[dict] = []
        self.process = subprocess.Popen(
            host.command(sys.executable, "-W", "error", str(HERE / "network_worker.py"), json.dumps(settings)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._reader = threading.Thread(target=self._read, name=f"reads-{host.name}", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.rounds.append(json.loads(line))

    def count(self, what: str) -> int:
        return sum(each["what"] == what for each in list(self.rounds))

    def gets(self, number: int, why: str) -> None:
        """It is granted so many cards more, soon."""
        wanted = self.count("acquired") + number
        eventually(
            lambda: self.count("acquired") >= wanted or self.process.poll() is not None,
            PATIENCE,
            lambda: f"{self.host.name} gets cards {why}; its last rounds: {self.rounds[-5:]}",
            tick=0.02,
        )
        assert self.process.poll() is None, "the client lives"

    @contextlib.contextmanager
    def keeping(self) -> Iterator[str]:
        """It holds a card meanwhile, as long as it can; gives the card."""
        before = self.count("keeping")
        self.keep.touch()
        try:
            eventually(lambda: self.count("keeping") > before, PATIENCE, "it holds a card", tick=0.02)
            yield next(each["key"] for each in reversed(self.rounds) if each["what"] == "keeping")
        finally:
            self.keep.unlink()

    @contextlib.contextmanager
    def wanting(self, card: str) -> Iterator[None]:
        """It asks for this card alone meanwhile."""
        fresh = self.want.with_suffix(".fresh")
        fresh.write_text(card)
        fresh.replace(self.want)  # at once: it is never read half written
        try:
            yield
        finally:
            self.want.unlink()

    def end(self) -> None:
        """It ends by itself, having closed its pool."""
        self.process.stdin.close()
        try:
            assert self.process.wait(TIMEOUT + TTL + 4 * EXCHANGE + LATE) == 0
        finally:
            self.kill()
        assert self.rounds[-1]["what"] == "closed"

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10.0)
        self._reader.join(10.0)
        self.process.stdout.close()
        with contextlib.suppress(OSError):
            self.process.stdin.close()


class World:
    """Two clients, a server with two simulated cards, and a Redis if it is the arbiter."""

    def __init__(self, kind: str, directory: Path) -> None:
        self.kind = kind
        self.log = HoldLog(directory / "holds")
        self._programs: list[subprocess.Popen] = []
        self.clients: list[Client] = []
        self._ending = contextlib.ExitStack()
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("GPU_")},
            "GPU_POOL_LOCK_DIR": str(directory / "locks"),
            "GPU_SERVER_TOKENS": "ann:the-token-of-ann-is-long,bob:the-token-of-bob-is-long",
            "XDG_CONFIG_HOME": str(directory),  # nobody's own server is meant
            "TMPDIR": str(directory),  # where servers of simulated cards have their locks
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
        }
        try:
            self.network = self._ending.enter_context(Network("ann", "bob", "server", "redis"))
            self._ending.callback(self._end_programs)
            self._begin(directory)
        except BaseException:
            self.close()
            raise

    def _begin(self, directory: Path) -> None:
        server, redis = self.network["server"], self.network["redis"]
        settings = {
            "url": f"http://{server.address}:8000",
            "ttl": TTL,
            "timeout": TIMEOUT,
            "endpoint_timeout": EXCHANGE,
        }
        serve = ["-m", "gpupool_sync", "serve", "--host", "0.0.0.0", "--simulate", "2", "--interval", "0.2", "--json"]
        serve.append("--insecure")  # the network is seen by the test's own processes only
        if self.kind == "redis":
            serve.append("--no-leases")
            self._start(
                redis.command(
                    *(REDIS, "--bind", redis.address, "--protected-mode", "no", "--port", "6379"),
                    *("--save", "", "--appendonly", "no", "--dir", str(directory)),
                )
            )
            store = f"redis://{redis.address}:6379/0"
            # One that has been known for a while: a new one grants nothing until it is sure to have lost nothing.
            known = f"from gpupool_sync.leases.redis import RedisStore; RedisStore({store!r}, quarantine=0.0).leases()"
            eventually(
                lambda: (
                    not subprocess.run(
                        self.network["ann"].command(sys.executable, "-c", known),
                        env=self.environment,
                        capture_output=True,
                    ).returncode
                ),
                PATIENCE,
                "Redis answers",
                tick=0.2,
            )
            settings["store"] = store
        told = self._start(server.command(sys.executable, *serve)).stdout
        assert json.loads(told.read(1) + told.readline())["gpus"] == 2
        for name in ("ann", "bob"):
            settings |= {"name": name, "log": str(self.log._path), "keep": str(directory / f"{name}-keeps")}
            settings["options"] = {"token": f"the-token-of-{name}-is-long"}
            settings["want"] = str(directory / f"{name}-wants")
            client = Client(self.network[name], self.environment, **settings)
            self.clients.append(client)
        for client in self.clients:
            client.gets(2, "at the beginning")

    def _start(self, command) -> subprocess.Popen:
        with open(self.log._path.with_name("stderr"), "ab") as errors:
            program = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors
            )
        self._programs.append(program)
        return program

    @property
    def arbiter(self):
        return self.network["redis" if self.kind == "redis" else "server"]

    def _end_programs(self) -> None:
        for client in self.clients:
            client.kill()
        for program in self._programs:
            program.send_signal(signal.SIGKILL)
            program.wait(10.0)
            program.stdout.close()

    def close(self) -> None:
        self._ending.close()

    def judge(self, begin: float) -> None:
        """Nobody held what somebody else held, and nothing took longer than it was told to."""
        assert self.log.overlaps() == []
        assert self.log.token_regressions() == []
        bounds = {"acquired": TIMEOUT, "timeout": TIMEOUT, "lost before it began": TIMEOUT, "error": TIMEOUT}
        bounds |= {"keeping": 0.0, "released": 2 * EXCHANGE, "lost": 2 * EXCHANGE}
        for client in self.clients:
            rounds = [each for each in list(client.rounds) if each["at"] >= begin]
            assert {each["what"] for each in rounds} <= set(bounds), rounds[-10:]
            slow = [each for each in rounds if each["took"] > bounds[each["what"]] + LATE]
            assert slow == []


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> Iterator:
    """One of each kind, made when it is first wanted: the order of the tests is random."""
    made: dict[str, World] = {}

    def world(kind: str) -> World:
        if kind not in made or any(client.process.poll() is not None for client in made[kind].clients):
            if kind in made:
                made.pop(kind).close()
            made[kind] = World(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    yield world
    for each in made.values():
        each.close()


KINDS = pytest.mark.parametrize(
    "kind",
    [
        "server",
        pytest.param(
            "redis",
            marks=[
                pytest.mark.external_service,
                pytest.mark.skipif(REDIS is None, reason="redis-server is not installed"),
            ],
        ),
    ],
)
BROKEN = pytest.mark.parametrize("fault", FAULTS, ids=forms())


@contextlib.contextmanager
def broken(host, fault) -> Iterator[float]:
    """The link of *host* is broken meanwhile, for `FAULT` seconds at least; gives the instant since when it is."""
    if why := why_not(fault):
        pytest.skip(why)
    fault.begin(host)
    begin = time.monotonic()
    try:
        yield begin
        time.sleep(max(0.0, begin + FAULT - time.monotonic()))
    finally:
        fault.end(host)


@KINDS
@BROKEN
def test_a_client_with_a_broken_link(worlds, kind, fault):
    """Its cards go to the others when its leases have ended, not before; it comes back by itself."""
    world = worlds(kind)
    ann, bob = world.clients
    with (
        ann.keeping() as card,
        bob.wanting(card) if fault.cuts else contextlib.nullcontext(),
        broken(ann.host, fault) as begin,
    ):
        if fault.cuts:
            eventually(
                lambda: any(
                    each["what"] == "acquired" and each["key"] == card and each["at"] > begin
                    for each in list(bob.rounds)
                ),
                PATIENCE,
                lambda: f"the card goes to the other; the last rounds: {bob.rounds[-5:]}",
                tick=0.02,
            )
            eventually(
                lambda: any(each["what"] == "lost" and each["at"] > begin for each in list(ann.rounds)),
                PATIENCE,
                "who held it is told",
                tick=0.02,
            )
        bob.gets(3, f"while for the other {fault}")
    ann.gets(2, "again")
    bob.gets(2, "still")
    world.judge(begin)


@KINDS
@BROKEN
def test_an_arbiter_with_a_broken_link(worlds, kind, fault):
    """Nobody is granted anything that the arbiter does not know of; all come back by themselves."""
    world = worlds(kind)
    with broken(world.arbiter, fault) as begin:
        time.sleep(FAULT)
        end = time.monotonic()
    for client in world.clients:
        client.gets(2, f"again, after {fault}")
    if fault.cuts:
        # What was granted before may arrive a little later.
        assert not [
            each
            for client in world.clients
            for each in client.rounds
            if each["what"] == "acquired" and begin + FAULT / 2 < each["at"] < end
        ]
    world.judge(begin)


def test_clients_end_in_time_though_nobody_answers(tmp_path):
    """Their pools close while everything is dropped; nothing hangs."""
    fault = FAULTS[0]
    if why := why_not(fault):
        pytest.skip(why)
    with contextlib.closing(World("server", tmp_path)) as world:
        with broken(world.arbiter, fault) as begin:
            for client in world.clients:
                client.end()
        for client in world.clients:
            closed = client.rounds.pop()
            assert closed["took"] < 4 * EXCHANGE + LATE
        world.judge(begin)


# -- a client that goes without a word ---------------------------------------------------------------------------------

#: Seconds that half a request, an idle connection and a long poll last in that server: enough to open and to cut them.
LASTS = 25.0

SERVE_IMPATIENTLY = f"""
import sys
from gpupool_sync.server import connections
connections.REQUEST_TIME = connections.KEEP_ALIVE = {LASTS}
connections._LAST_WORD = 1.0
from gpupool_sync.cli import main
sys.exit(main(sys.argv[1:]))
"""


class Asker:
    """A `network_connections.py` on one of the hosts."""

    def __init__(self, program: subprocess.Popen) -> None:
        self.program = program

    def __call__(self, *order):
        self.program.stdin.write(json.dumps(order).encode() + b"\n")
        answer = self.program.stdout.readline()
        assert answer, f"{order} was not obeyed"
        return json.loads(answer)


def socket_count(process: subprocess.Popen) -> int:
    """Sockets that a process has open, of whatever kind."""
    found = 0
    for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found += os.readlink(descriptor).startswith("socket:")
    return found


def connections_in(host, *states: str) -> int:
    """Connections of a host that are in one of these states, by the names that Linux gives them there."""
    lines = Path(f"/proc/{host.pid}/net/tcp").read_text().splitlines()[1:]
    return sum(line.split()[3] in states for line in lines)


ESTABLISHED, FIN_WAIT_1, CLOSE_WAIT = "01", "04", "08"


def test_a_client_that_goes_without_a_word_keeps_nothing(tmp_path):
    """No FIN and no RST of it arrives: connections and tickets end by the server's clock, and others are answered."""
    fault = FAULTS[0]
    if why := why_not(fault):
        pytest.skip(why)
    token = "the-token-of-ann-is-long"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("GPU_")},
        "GPU_SERVER_TOKENS": f"ann:{token}",
        "XDG_CONFIG_HOME": str(tmp_path),
        "TMPDIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
    }
    with contextlib.ExitStack() as ending:
        network = ending.enter_context(Network("gone", "other", "server"))

        def start(host, *command: str) -> subprocess.Popen:
            with open(tmp_path / "stderr", "ab") as errors:
                program = subprocess.Popen(
                    network[host].command(sys.executable, *command),
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    bufsize=0,
                )
            ending.callback(program.stdout.close)
            ending.callback(program.stdin.close)
            ending.callback(program.wait, 10.0)
            ending.callback(program.kill)
            return program

        options = ["--host", "0.0.0.0", "--insecure", "--simulate", "2", "--json", "--log-level", "warning"]
        server = start("server", "-c", SERVE_IMPATIENTLY, "serve", *options)
        assert server.stdout.read(1), (tmp_path / "stderr").read_text()  # it listens from then on
        url = f"http://{network['server'].address}:8000"
        gone, other = (
            Asker(start(host, str(HERE / "network_connections.py"), url, token)) for host in ("gone", "other")
        )
        cards = [gpu["uuid"] for gpu in other("ask", "GET", "/gpu/summary")[1]["gpus_summary"]]

        def claim(name: str, *wanted: str) -> dict:
            holder = {"id": f"holder-{name}", "user": "u", "host": "h", "pid": 1}
            keys = [{"key": key} for key in wanted]
            return {"id": f"id-{name}", "holder": holder, "cards": keys, "ttl": 300, "queue": True}

        for number, card in enumerate(cards):
            assert other("ask", "POST", "/v1/leases", claim(f"other-{number}", card))[0] == 200
        # What a server opens for its first ticket stays open.
        assert other("ask", "POST", "/v1/leases", claim("first", *cards))[0] == 202
        assert other("ask", "POST", "/v1/leases/withdraw", {"ids": ["id-first"]})[0] == 200

        eventually(
            lambda: not connections_in(network["server"], ESTABLISHED, CLOSE_WAIT),
            PATIENCE,
            "the server has closed what was asked so far",
        )
        before = socket_count(server)
        opened = gone("open", 10, [claim(f"gone-{number}", *cards) for number in range(10)], LASTS)
        eventually(lambda: socket_count(server) >= before + opened, PATIENCE, "the server has them", tick=0.02)
        assert len(other("ask", "GET", "/v1/queue")[1]["queue"]) == 10
        fault.begin(network["gone"])
        gone.program.kill()
        gone.program.wait(10.0)
        # It has said farewell to each of them, which nobody has heard.
        assert connections_in(network["gone"], FIN_WAIT_1) == opened
        assert socket_count(server) >= before + opened

        def forgotten() -> bool:
            status, health = other("ask", "GET", "/health")
            assert (status, health["status"]) == (200, "healthy")
            return socket_count(server) <= before and not other("ask", "GET", "/v1/queue")[1]["queue"]

        eventually(forgotten, 90.0, lambda: f"{socket_count(server)} sockets after {before}", tick=0.1)
        assert other("ask", "POST", "/v1/leases/release", {"ids": ["id-other-0"]})[0] == 200
        status, lease = other("ask", "POST", "/v1/leases", claim("next", *cards))
        assert (status, lease["cards"]) == (200, cards[:1])
        assert "Traceback" not in (tmp_path / "stderr").read_text()


def test_nothing_is_left_behind():
    """Also if its user fails."""

    def users(namespace):
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(process / "ns/net") == namespace:
                    found.append(process.name)
        return found

    made = []

    def fail():
        with Network("one", "two") as network:
            made.extend(host.id for host in network.hosts.values())
            assert all(map(users, made))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not any(map(users, made))
