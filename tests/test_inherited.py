"""Commands that run on a lease: what they are offered, how long they have it, and what they learn of its end."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import attrs
import pytest

from cards import Cards, local_pool
from gpupool_sync import GPUPool, GPUPoolError, LeaseLost, NoSuchGPU, inherited
from gpupool_sync.leases.base import Granted
from gpupool_sync.leases.memory import MemoryStore
from gpupool_sync.testing import FakeFleet
from helpers import HoldLog, eventually, run_threads
from redis_server import RedisServer, needs_redis

HERE = Path(__file__).parent
PATH = os.pathsep.join([str(HERE), *(path for path in sys.path if path.endswith("site-packages")), str(HERE.parent)])

pytestmark = [pytest.mark.real, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

#: Seconds; of leases that have one.
TTL = 6.0


class Talk:
    """With a process that runs `inherited_worker.py`."""

    def __init__(self, mine: socket.socket) -> None:
        self._socket = mine
        self._file = mine.makefile("r")
        self.pid = 0
        self.process: subprocess.Popen | None = None

    def tell(self, command: str, **options) -> None:
        self._socket.sendall(f"{command} {json.dumps(options)}\n".encode())

    def answer(self, timeout=120.0) -> dict:
        assert select.select([self._socket], [], [], timeout)[0], "the process answers"
        line = self._file.readline()
        assert line, "the process lives"
        return json.loads(line)

    def ask(self, command: str, **options) -> dict:
        self.tell(command, **options)
        return self.answer()

    def start(self, how="popen", **options) -> Talk:
        """A process of this one, on what it has (popen) or as it is (spawn)."""
        assert self.ask(how, **options) == {"where": None}
        mine, theirs = socket.socketpair()
        child = Talk(mine)
        try:
            socket.send_fds(self._socket, [b"x"], [theirs.fileno()])
            theirs.close()
            started = self.answer()
            assert "child" in started, started
            child.pid = child.answer()["ready"]
            assert child.pid == started["child"]
        except BaseException:
            child.close()
            raise
        return child

    def quit(self) -> None:
        """End it and wait for that."""
        self.tell("quit")
        self.gone()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.gone()

    def gone(self) -> None:
        if self.process is not None:
            self.process.wait(60)
        else:
            eventually(lambda: not alive(self.pid), message=f"{self.pid} ends")

    def close(self) -> None:
        if self.pid and alive(self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        if self.process is not None:
            self.process.wait(60)
        self._file.close()
        self._socket.close()


def alive(pid: int) -> bool:
    """Whether it runs: not one that has ended and that nobody waits for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def renewing(directory: Path) -> list[int]:
    """The processes that renew for commands of this test."""
    found = []
    for entry in os.scandir("/proc"):
        with contextlib.suppress(OSError, ValueError):
            command = Path(entry.path, "cmdline").read_bytes()
            environ = Path(entry.path, "environ").read_bytes()
            if b"gpupool_sync._keep" in command and f"TMPDIR={directory}".encode() in environ.split(b"\0"):
                found.append(int(entry.name))
    return [pid for pid in found if alive(pid)]


@pytest.fixture
def temporary(tmp_path):
    """Where the processes of the test put private directories; in the end there are none, and nobody renews."""
    directory = tmp_path / "tmp"
    directory.mkdir()
    yield directory
    for pid in renewing(directory):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def left_behind(temporary) -> list[str]:
    return [name for name in os.listdir(temporary) if name.startswith("gpupool-lease-")]


@pytest.fixture
def start(temporary, tmp_path):
    """Start a process with a pool of its own."""
    made = []

    def start(**options) -> Talk:
        mine, theirs = socket.socketpair()
        process = subprocess.Popen(
            [
                sys.executable,
                "-W",
                "error",
                str(HERE / "inherited_worker.py"),
                str(theirs.fileno()),
                json.dumps(options),
            ],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            cwd="/",
            env={
                **os.environ,
                "PYTHONPATH": PATH,
                "TMPDIR": str(temporary),
                "GPU_POOL_LOCK_DIR": str(tmp_path / "locks"),
            },
        )
        theirs.close()
        talk = Talk(mine)
        talk.process = process
        made.append(talk)
        talk.pid = talk.answer()["ready"]
        return talk

    yield start
    for talk in made:
        talk.close()


@pytest.fixture
def commands():
    made = []
    yield made.append
    for talk in made:
        talk.close()


@pytest.fixture(params=["host", "server", pytest.param("redis", marks=needs_redis)])
def world(request, tmp_path):
    """What pools are made of: two cards of this machine, and an arbiter of each kind."""
    if request.param == "host":
        yield {"cards": 2}
    elif request.param == "server":
        with FakeFleet(["2xA100"]) as fleet:
            yield {"server": fleet.urls[0], "ttl": TTL}
    else:
        redis = RedisServer(tmp_path / "redis", options=("--requirepass", "se-cret"))
        redis.start("se-cret")
        try:
            yield {"cards": 2, "redis": redis.url.replace("//", "//:se-cret@"), "ttl": TTL}
        finally:
            redis.kill()


def ends(temporary) -> None:
    eventually(lambda: not left_behind(temporary), message=lambda: f"left behind: {left_behind(temporary)}")
    eventually(lambda: not renewing(temporary), message="the process that renews ends")


def test_a_command_has_the_card_of_its_lease_and_no_other(start, commands, world, temporary):
    """There a pool offers that card alone, under the parent's token and scope; nothing secret is in the environment."""
    parent = start(**world)
    had = parent.ask("acquire", timeout=60)
    commands(child := parent.start())

    got = child.ask("acquire", timeout=60)
    assert got["cards"] == had["cards"]
    assert got["names"] == had["names"]
    assert (got["token"], got["scope"]) == (had["token"], had["scope"])
    assert had["arbiter"] in got["arbiter"]
    assert child.ask("check") == {"good": True}
    assert "held by" in child.ask("acquire", timeout=0)["timeout"]

    # Nothing in the environment, on a command line or in the files is a secret.
    environ = child.ask("look")["environ"]
    assert environ["CUDA_VISIBLE_DEVICES"] == had["cards"][0]
    told = environ[inherited.VARIABLE]
    seen = [repr(environ), *(path.read_text() for path in Path(told).parent.iterdir() if path.is_file())]
    for pid in (child.pid, *renewing(temporary)):
        seen += [Path(f"/proc/{pid}/{name}").read_bytes().decode() for name in ("cmdline", "environ")]
    assert not any(secret in text for secret in (had["id"], "se-cret") for text in seen)
    assert os.stat(Path(told).parent).st_mode & 0o777 == 0o700

    child.ask("release")
    child.quit()
    parent.ask("wait")
    assert parent.ask("check") == {"good": True}, "the lease is still the parent's"
    parent.ask("release")
    ends(temporary)


def test_the_processes_of_a_command_take_turns(start, commands, temporary, tmp_path):
    """Two processes of one command never have the card at the same time, and both get it."""
    parent = start(cards=2)
    had = parent.ask("acquire", timeout=60)
    commands(child := parent.start())
    workers = [child.start("spawn") for _ in range(2)]
    for worker in workers:
        commands(worker)
        worker.tell("loop", log=str(tmp_path / "log"), rounds=40)
    assert [worker.answer()["rounds"] for worker in workers] == [40, 40]
    log = HoldLog(tmp_path / "log")
    assert {hold.key for hold in log.holds()} == set(had["cards"])
    assert len(log.holds()) == 80
    assert log.overlaps() == []


def test_what_cannot_be_had_on_the_lease_is_refused_at_once(start, commands):
    """The request would otherwise wait for its own parent."""
    parent = start(cards=2)
    had = parent.ask("acquire", timeout=60)
    commands(child := parent.start())
    for request in ({"count": 2}, {"endpoint": "elsewhere"}, {"model": "H100"}, {"exclude": had["cards"]}):
        error = child.ask("acquire", **request)["error"]
        assert error.startswith("NoSuchGPU: ")
        assert f"runs on the lease of process {parent.pid} (gpu.run or gpu.popen)" in error
        assert f"unset {inherited.VARIABLE}" in error
    # What only a reading could speak against does not wait either: the card is ours.
    got = child.ask("acquire", timeout=60, max_utilization_percent=0, min_free_memory_mb=1000)
    assert got["cards"] == had["cards"]


def test_a_command_on_one_of_several_cards_has_that_one(start, commands):
    """``gpus[1].popen`` masks to one card, and offers it alone."""
    parent = start(cards=2)
    had = parent.ask("acquire", timeout=60, count=2)
    commands(one := parent.start(only=1))
    commands(both := parent.start())
    assert one.ask("acquire", timeout=60)["cards"] == had["cards"][1:]
    assert one.ask("acquire", count=2)["error"].startswith("NoSuchGPU")
    # The lease is one: what the other command uses is taken here too.
    assert both.ask("acquire", timeout=60)["cards"] == had["cards"][:1]
    assert "timeout" in both.ask("acquire", timeout=0)


@pytest.mark.parametrize(
    ("world", "how"),
    [
        *(("host", how) for how in ("kill", "release", "close")),
        *(("server", how) for how in ("kill", "release")),
        *(pytest.param("redis", how, marks=needs_redis) for how in ("kill", "close")),
    ],
    indirect=["world"],
)
def test_the_lease_lasts_until_the_command_ends(start, commands, world, temporary, how):
    """Whatever becomes of the parent, nobody else gets the card before; then it comes free."""
    parent, other = start(**world), start(**world)
    parent.ask("acquire", timeout=60)
    had = parent.ask("acquire", timeout=60)
    parent.ask("release")  # the first of the two
    first = other.ask("acquire", timeout=60)
    assert first["cards"] != had["cards"]
    commands(child := parent.start())
    if how == "kill":
        parent.kill()
    else:
        parent.ask(how)
    if "ttl" in world:
        threading.Event().wait(1.5 * TTL)  # longer than the lease would last by itself
    assert "timeout" in other.ask("acquire", timeout=0.5)
    assert child.ask("acquire", timeout=60)["token"] == had["token"]
    assert child.ask("check") == {"good": True}
    child.kill()
    if how == "kill":
        assert other.ask("acquire", timeout=100)["cards"] == had["cards"]
    else:
        assert parent.ask("wait")["returned"] == -signal.SIGKILL
        assert other.ask("acquire", timeout=100)["cards"] == had["cards"]
        ends(temporary)
    eventually(lambda: not renewing(temporary), message="the process that renews ends")


@pytest.mark.parametrize("how", ["kill", "release"])
def test_the_lease_is_given_back_and_does_not_just_expire(start, commands, temporary, how):
    """Who renews knows when the last is gone: nobody has to wait for a ttl of minutes."""
    with FakeFleet([1]) as fleet:
        parent, other = (start(server=fleet.urls[0], ttl=300.0) for _ in range(2))
        parent.ask("acquire", timeout=60)
        commands(child := parent.start())
        parent.kill() if how == "kill" else parent.ask("release")
        assert "timeout" in other.ask("acquire", timeout=0)
        child.quit()
        assert "cards" in other.ask("acquire", timeout=100)
        ends(temporary)


def test_a_command_of_a_command_keeps_the_lease(start, commands, temporary):
    """Both processes above it are killed: the card stays taken until the last ends."""
    parent, other = start(cards=1), start(cards=1)
    had = parent.ask("acquire", timeout=60)
    commands(middle := parent.start())
    middle.ask("acquire", timeout=60)
    commands(last := middle.start())
    middle.kill()
    parent.kill()
    got = last.ask("acquire", timeout=60)
    assert (got["cards"], got["token"]) == (had["cards"], had["token"])
    assert "timeout" in other.ask("acquire", timeout=0)
    last.kill()
    assert other.ask("acquire", timeout=60)["cards"] == had["cards"]
    # What nobody could tidy up, the next one does.
    assert len(left_behind(temporary)) == 2
    commands(child := other.start())
    assert len(left_behind(temporary)) == 1
    child.quit()
    other.ask("wait")
    other.ask("release")
    ends(temporary)


@pytest.mark.parametrize("parent_lives", [True, False])
def test_a_command_learns_that_its_lease_is_lost(start, commands, temporary, tmp_path, parent_lives):
    """Revoked at the server: ``gpu.lost`` and ``on_lost`` in the command say so, and it is granted nothing more."""
    with FakeFleet([1]) as fleet:
        parent = start(server=fleet.urls[0], ttl=TTL)
        had = parent.ask("acquire", timeout=60)
        commands(child := parent.start())
        child.ask("acquire", timeout=60)
        if not parent_lives:
            parent.kill()
        with GPUPool(fleet.urls) as pool:
            pool.open(wait=True)
            store = pool._state.engine.store_of(pool.status().endpoints[0].endpoint_id)
            assert store.revoke(had["cards"][0], had["token"], "a test")
        eventually(lambda: child.ask("lost")["lost"])
        assert child.ask("check")["error"].startswith("LeaseLost: ")
        eventually(lambda: child.ask("lost")["told"], message="on_lost is called")
        assert child.ask("acquire")["error"].startswith("LeaseLost: ")


def test_a_command_judges_its_lease_by_the_clock(start, commands, temporary):
    """Who renews is stopped: nobody writes that the lease is lost, and the command knows all the same."""
    with FakeFleet([1]) as fleet:
        parent = start(server=fleet.urls[0], ttl=TTL)
        parent.ask("acquire", timeout=60)
        commands(child := parent.start())
        child.ask("acquire", timeout=60)
        assert not child.ask("lost")["lost"]
        (renews,) = renewing(temporary)
        os.kill(renews, signal.SIGSTOP)
        eventually(lambda: child.ask("lost")["lost"])
        assert "did not confirm it in time" in child.ask("check")["error"]


def test_a_variable_that_outlived_its_lease_grants_nothing(start, commands, monkeypatch, temporary):
    """A process that kept the variable is told so instead of running unlocked."""
    parent = start(cards=1)
    parent.ask("acquire", timeout=60)
    commands(child := parent.start())
    told = child.ask("look")["environ"][inherited.VARIABLE]
    monkeypatch.setenv(inherited.VARIABLE, told)
    with GPUPool() as pool:
        gpu = pool.acquire(timeout=60)
        child.quit()
        parent.ask("wait")
        gpu.check()  # the parent has it still
        parent.ask("release")
        assert gpu.lost
        with pytest.raises(LeaseLost, match=f"from process {parent.pid} .* is gone"):
            pool.acquire(timeout=60)
    monkeypatch.setattr(inherited, "_known", {})
    with pytest.raises(LeaseLost, match="is over; acquire a GPU again"):
        GPUPool().acquire(timeout=60)
    ends(temporary)


def test_a_variable_that_names_nonsense_is_refused(monkeypatch, tmp_path):
    """Fail closed, and say which variable it is."""
    path = tmp_path / "cards-0.json"
    path.write_text('{"v": 1')
    monkeypatch.setenv(inherited.VARIABLE, str(path))
    with pytest.raises(LeaseLost, match=rf"cannot be found out \({inherited.VARIABLE}="):
        GPUPool().open()


def test_a_store_of_ones_own_is_not_inherited(monkeypatch, tmp_path):
    """A program that brings an arbiter along, as tests do, means that one."""
    monkeypatch.setenv(inherited.VARIABLE, str(tmp_path / "gone"))
    with local_pool(monkeypatch, Cards(2), lease_store=MemoryStore()) as pool, pool.gpus(2) as gpus:
        assert len(gpus) == 2
    with pytest.raises(LeaseLost), local_pool(monkeypatch, Cards(2), lease_store="memory:"):
        pass


def test_nothing_is_left_of_many_commands(monkeypatch, temporary):
    """One directory for all commands of a lease, none afterwards; no descriptor is left in the parent."""
    monkeypatch.setattr(inherited.tempfile, "gettempdir", lambda: str(temporary))
    with local_pool(monkeypatch, Cards(1)) as pool:
        with pool.gpu() as gpu:
            gpu.run(["true"], check=True)
        gc.collect()  # or what others left to the collector goes in between
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            with pool.gpu() as gpu:
                for _ in range(3):
                    gpu.run(["true"], check=True)
                    with gpu.popen(["true"]) as process:
                        assert process.wait(60) == 0
                assert len(left_behind(temporary)) == 1
                assert inherited.VARIABLE not in gpu.env()
                assert len(gpu._tie.grant.children) <= 1
            assert left_behind(temporary) == []
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_command_that_does_not_start_leaves_nothing(monkeypatch, temporary):
    """The lease ends with its handle, as if nothing had been tried."""
    monkeypatch.setattr(inherited.tempfile, "gettempdir", lambda: str(temporary))
    with local_pool(monkeypatch, Cards(1)) as pool:
        with pool.gpu() as gpu:
            with pytest.raises(FileNotFoundError):
                gpu.popen(["/no/such/program"])
            with pytest.raises(FileNotFoundError):
                gpu.run(["/no/such/program"])
        assert left_behind(temporary) == []
        with pool.gpu(timeout=0):
            pass
        with pytest.raises(NoSuchGPU):
            pool.acquire(model="H100")


LOOK_AROUND = [
    sys.executable,
    "-c",
    "from gpupool_sync.inherited import inherited; print(len(inherited().descriptors()))",
]


@pytest.mark.parametrize("options", [{}, {"preexec_fn": os.getpid}, {"env": {"PYTHONPATH": PATH}}])
def test_a_command_inherits_the_lock_of_the_directory(monkeypatch, options):
    """Also where Python code runs between fork and exec, and our hooks with it."""
    with local_pool(monkeypatch, Cards(1)) as pool, pool.gpu() as gpu:
        for start in (gpu.run, gpu.popen):
            done = start(LOOK_AROUND, stdout=subprocess.PIPE, text=True, **options)
            out = done.stdout if start == gpu.run else done.communicate(timeout=60)[0]
            assert (out.strip(), done.returncode) == ("1", 0)


@pytest.mark.root_only
@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_command_of_another_user_can_read_what_it_is_told(monkeypatch):
    """``user=`` is given the private directory, not only the card."""
    with local_pool(monkeypatch, Cards(1)) as pool, pool.gpu() as gpu:
        script = f'cat "${inherited.VARIABLE}" && touch "${{{inherited.VARIABLE}%/*}}/mine"'
        done = gpu.run(["sh", "-c", script], user=65534, cwd="/", capture_output=True, check=True)
        assert json.loads(done.stdout)["token"] == gpu.fencing_token


class Expiring(MemoryStore):
    """With a ttl, and with locks in it: it does not pickle."""

    def claim(self, claim):
        outcome = super().claim(claim)
        return Granted(attrs.evolve(outcome.lease, ttl=60.0)) if isinstance(outcome, Granted) else outcome


def test_an_arbiter_that_cannot_be_passed_on_is_refused(monkeypatch, temporary):
    """Nobody could renew for the command: it does not start, and the lease is as before."""
    monkeypatch.setattr(inherited.tempfile, "gettempdir", lambda: str(temporary))
    with local_pool(monkeypatch, Cards(1), lease_store=Expiring()) as pool:
        with pool.gpu() as gpu:
            assert gpu._lease.ttl == 60.0
            with pytest.raises(GPUPoolError, match="give lease_store= as a URL"):
                gpu.popen(["true"])
            gpu.check()
        assert left_behind(temporary) == []


def test_the_process_that_renews_says_why_it_does_not_start(monkeypatch, temporary):
    """Its last word is in the error."""
    monkeypatch.setattr(inherited.tempfile, "gettempdir", lambda: str(temporary))
    with local_pool(monkeypatch, Cards(1), lease_store=Expiring()) as pool, pool.gpu() as gpu:
        monkeypatch.setattr(pool, "_recipe", lambda store: (int, ("no number",)))
        with pytest.raises(GPUPoolError, match="did not start: ValueError: invalid literal"):
            gpu.run(["true"])


@pytest.mark.parametrize("moment", ["made", "opened"])
def test_who_tidies_up_disturbs_nobody_who_begins(monkeypatch, temporary, moment):
    """Another thread or process that starts a command finds the new directory before it is locked, and removes it."""
    monkeypatch.setattr(inherited.tempfile, "gettempdir", lambda: str(temporary))
    mkdtemp, opened = inherited.tempfile.mkdtemp, inherited._opened
    removed = []

    def sweep(path):
        if not removed:
            removed.append(path)
            inherited._sweep(str(temporary))
            assert not os.path.exists(path)

    def made_and_swept(**where):
        path = mkdtemp(**where)
        if moment == "made":
            sweep(path)
        return path

    def opened_and_swept(path, *how, **where):
        found = opened(path, *how, **where)
        if moment == "opened" and path != str(temporary):
            # Before the sweep, which opens it too.
            monkeypatch.setattr(inherited, "_opened", opened)
            sweep(path)
        return found

    monkeypatch.setattr(inherited.tempfile, "mkdtemp", made_and_swept)
    monkeypatch.setattr(inherited, "_opened", opened_and_swept)
    bequest = inherited.Bequest()
    try:
        assert removed
        assert left_behind(temporary) == [os.path.basename(bequest.directory)]
        inherited._sweep(str(temporary))
        assert left_behind(temporary) == [os.path.basename(bequest.directory)]
    finally:
        bequest.end()


def test_many_that_begin_at_once(monkeypatch, temporary):
    """Each has its directory for itself, whoever tidies up meanwhile, and leaves nothing."""
    monkeypatch.setattr(inherited.tempfile, "gettempdir", lambda: str(temporary))

    def begin_and_end(_):
        for _ in range(50):
            bequest = inherited.Bequest()
            inherited.put(bequest.directory, "name", "")
            assert os.listdir(bequest.directory) == ["name"]
            bequest.end()

    run_threads(8, begin_and_end)
    assert left_behind(temporary) == []


def test_a_forked_child_does_not_keep_the_directory_locked(monkeypatch, temporary):
    """It has forgotten the lease: the commands of its parent must not seem to run as long as it lives."""
    monkeypatch.setattr(inherited.tempfile, "gettempdir", lambda: str(temporary))
    bequest = inherited.Bequest()
    inside, outside = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(outside)
        os.read(inside, 1)
        os._exit(0)
    try:
        os.close(inside)
        # The parent dies without a word, as far as the lock is concerned.
        bequest.let_go()
        eventually(lambda: inherited._sweep(str(temporary)) or not left_behind(temporary))
    finally:
        os.close(outside)
        os.waitpid(child, 0)
