"""The host's arbiter among real processes: killed, stopped, forked, of several users."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import pytest

from gpupool_sync.errors import ConfigError, LeaseStoreError
from gpupool_sync.leases import host
from gpupool_sync.leases.host import HostStore, default_directory
from gpupool_sync.leases.tickets import ANSWER_TIME
from helpers import HoldLog, eventually, run_threads

HERE = Path(__file__).parent

#: For an interpreter that is not this one (see `python_of`): everything that is imported here.
PATH = os.pathsep.join([str(HERE), *(path for path in sys.path if path.endswith("site-packages")), str(HERE.parent)])

pytestmark = [pytest.mark.real, pytest.mark.skipif(sys.platform != "linux", reason="kernel locks of Linux")]


class Worker:
    """
    A `host_worker.py` process.

    Who waits is given *patience* seconds to answer a hint before it is passed over: on a busy machine a process that
    is well may need more than the second that it has otherwise.
    """

    def __init__(self, directory, cards, name, user=None, python=sys.executable, prefix=(), patience=60.0) -> None:
        self.process = subprocess.Popen(
            [*prefix, python, "-W", "error", str(HERE / "host_worker.py"), str(cards), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            user=user,
            group=user,
            extra_groups=[] if user is not None else None,
            cwd="/",
            env={
                **os.environ,
                "PYTHONPATH": PATH,
                "GPU_POOL_LOCK_DIR": str(directory),
                "HOME": "/",
                "ANSWER_TIME": str(patience),
            },
        )
        self.pid = self.answer()["ready"]

    def tell(self, command) -> None:
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def answer(self, timeout=150.0) -> dict:
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            assert selector.select(timeout), "the worker answers"
        line = self.process.stdout.readline()
        assert line, "the worker lives"
        return json.loads(line)

    def has_answered(self) -> bool:
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            return bool(selector.select(0))

    def ask(self, command) -> dict:
        self.tell(command)
        return self.answer()

    def signal(self, number) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(60)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait(60)
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def directory():
    """Not in pytest's: each start of another pytest takes the others' way into that, and they are users here."""
    path = Path(tempfile.mkdtemp(prefix="gpupool-test-"))
    path.chmod(0o1777)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def workers(directory):
    made = []

    def make(*names, cards=1, **options):
        new = [Worker(directory, cards, name, **options) for name in names]
        made.extend(new)
        return new if len(new) > 1 else new[0]

    yield make
    for worker in made:
        worker.close()


def queued(directory, number):
    eventually(
        lambda: len([name for name in os.listdir(directory / "queue") if name.startswith("ticket-")]) == number,
        message=f"{number} tickets",
    )


def test_processes_exclude_each_other_and_are_served_in_order(workers, directory):
    """One card, four processes: each waits its turn, first come, first served."""
    first, *others = workers("a", "b", "c", "d")
    assert first.ask("acquire 60")["cards"] == ["GPU-00000000"]
    for number, worker in enumerate(others, 1):
        worker.tell("acquire 120")
        queued(directory, number)
    tokens = []
    holder = first
    for worker in others:
        holder.ask("release")
        got = worker.answer()
        assert not any(other.has_answered() for other in others)
        tokens.append(got["token"])
        holder = worker
    assert tokens == sorted(set(tokens))


def test_many_processes_never_hold_a_card_twice(workers, tmp_path):
    """Six processes race for two cards: no overlap, growing tokens, nobody starves, nothing is left."""
    racers = workers(*"abcdef", cards=2)
    log = tmp_path / "log"
    for worker in racers:
        worker.tell(f"loop {log} 60")
    assert [worker.answer()["rounds"] for worker in racers] == [60] * 6
    holds = HoldLog(log)
    assert len(holds.holds()) == 360
    assert holds.overlaps() == []
    assert holds.token_regressions() == []
    assert racers[0].ask("leases")["leases"] == []


def test_a_killed_holders_card_goes_to_the_waiter(workers, directory):
    """kill -9: the kernel frees the card, and who waits has it without anybody's ttl."""
    holder, waiter = workers("holder", "waiter")
    first = holder.ask("acquire 60")
    waiter.tell("acquire 120")
    queued(directory, 1)
    holder.kill()
    assert waiter.answer()["token"] > first["token"]


def test_a_killed_waiter_is_passed_over(workers, directory):
    """A dead waiter at the head of the queue holds up nobody."""
    holder, dead, alive = workers("holder", "dead", "alive")
    holder.ask("acquire 60")
    dead.tell("acquire 120")
    queued(directory, 1)
    alive.tell("acquire 120")
    queued(directory, 2)
    dead.kill()
    holder.ask("release")
    assert alive.answer()["cards"] == ["GPU-00000000"]


def test_a_stopped_waiter_is_passed_over_and_keeps_its_place(workers, directory):
    """A suspended waiter delays the next one by a moment only, and is served when it goes on."""
    holder, stopped, next_one = workers("holder", "stopped", "next", patience=ANSWER_TIME)
    holder.ask("acquire 60")
    stopped.tell("acquire 120")
    queued(directory, 1)
    next_one.tell("acquire 120")
    queued(directory, 2)
    stopped.signal(signal.SIGSTOP)
    holder.ask("release")
    assert next_one.answer()["cards"] == ["GPU-00000000"]
    stopped.signal(signal.SIGCONT)
    next_one.ask("release")
    assert stopped.answer()["cards"] == ["GPU-00000000"]


def test_a_stopped_holder_keeps_its_card(workers):
    """A suspended job's memory is still on the card, so the card is still taken."""
    holder, other = workers("holder", "other")
    holder.ask("acquire 60")
    holder.signal(signal.SIGSTOP)
    assert "timeout" in other.ask("acquire 1.5")
    holder.signal(signal.SIGCONT)
    holder.ask("release")
    assert "cards" in other.ask("acquire 60")


@pytest.mark.parametrize("how", ["fork", "popen"])
def test_a_card_stays_taken_while_a_child_may_compute(workers, how):
    """The parent is killed, its child lives on with the lock: the card is free when the child ends."""
    holder, other = workers("holder", "other")
    holder.ask("acquire 60")
    child = holder.ask(how)["child"]
    try:
        holder.kill()
        assert "timeout" in other.ask("acquire 1")
    finally:
        os.kill(child, signal.SIGKILL)
    assert "cards" in other.ask("acquire 60")


def test_an_explicit_release_frees_the_card_for_all(workers):
    """release() means it, although a forked child still has the descriptor."""
    holder, other = workers("holder", "other")
    holder.ask("acquire 60")
    child = holder.ask("fork")["child"]
    try:
        holder.ask("release")
        assert "cards" in other.ask("acquire 60")
    finally:
        os.kill(child, signal.SIGKILL)


def test_several_cards_and_shares_across_processes(workers):
    """Two cards for one process, shares of one card for two, never both."""
    one, two = workers("one", "two", cards=2)
    assert one.ask("acquire 60 2")["cards"] == ["GPU-00000000", "GPU-00000001"]
    assert "timeout" in two.ask("share 0 1000")
    one.ask("release")
    assert "cards" in one.ask("share 60 50000")
    shared = two.ask("share 60 30000")["cards"]
    other = two.ask("share 60 60000")["cards"]
    assert shared != other
    assert "timeout" in one.ask("acquire 0")


def test_leases_tell_who_holds_what(workers):
    """Every process sees the leases of all; those of the dead are gone."""
    one, two = workers("one", "two", cards=2)
    one.ask("acquire 60")
    two.ask("acquire 60")
    assert sorted(one.ask("leases")["leases"]) == [[["GPU-00000000"], "one"], [["GPU-00000001"], "two"]]
    two.kill()
    assert one.ask("leases")["leases"] == [[["GPU-00000000"], "one"]]


def as_root(test):
    """Only root can become other users, and make namespaces anywhere."""
    skip = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root")
    return pytest.mark.root_only(skip(test))


@pytest.fixture
def others_python(directory):
    """An interpreter that other users may run, with a way for them to the locks."""
    for parent in directory.parents:
        if not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o011)
    python = python_of(65534)
    if python is None:
        pytest.skip("no interpreter here that other users may run")
    return python


@pytest.fixture(params=["as it is", "2"])
def protected_regular(request):
    """fs.protected_regular: 2 refuses O_CREAT on files of others in sticky directories."""
    if request.param == "as it is":
        yield
        return
    path = Path("/proc/sys/fs/protected_regular")
    try:
        before = path.read_text()
        path.write_text(request.param)
    except OSError as exc:
        pytest.skip(f"{path} cannot be written: {exc.strerror}")
    yield
    path.write_text(before)


@as_root
@pytest.mark.usefixtures("protected_regular")
def test_three_users_share_the_machine(workers, directory, others_python):
    """Whoever comes first makes the files; users without privileges exclude and serve one another all the same."""
    python = others_python
    first, second, third = (workers(str(uid), user=uid, python=python) for uid in (65534, 4321, 4322))
    assert "cards" in first.ask("acquire 60")
    second.tell("acquire 120")
    queued(directory, 1)
    third.tell("acquire 120")
    queued(directory, 2)
    first.ask("release")
    assert "cards" in second.answer()
    second.kill()
    assert "cards" in third.answer()
    assert {(directory / name).stat().st_mode & 0o777 for name in os.listdir(directory) if name != "queue"} == {0o666}


@as_root
def test_two_users_may_make_the_directory_at_the_same_time(monkeypatch):
    """Between mkdir and fchmod of the one, the other may not enter yet."""
    path = tempfile.mkdtemp(prefix="gpupool-test-")  # of mode 0700, as after a mkdir with a strict umask

    def finish(seconds):
        os.seteuid(0)
        os.chmod(path, 0o1777)
        os.seteuid(65534)

    monkeypatch.setattr(host, "time", types.SimpleNamespace(**{**vars(time), "sleep": finish}))
    os.seteuid(65534)
    try:
        HostStore(path).close()
    finally:
        os.seteuid(0)
        shutil.rmtree(path)


def namespace(*options, setup="true"):
    """What starts a command in namespaces of its own, after *setup*; skips where that is not possible."""
    prefix = ["unshare", *options, "sh", "-ec", f'{setup}; exec "$@"', "sh"]
    try:
        probe = subprocess.run([*prefix, "true"], capture_output=True, check=False, timeout=30, text=True)
    except FileNotFoundError:
        pytest.skip("there is no unshare(1)")
    if probe.returncode != 0:
        pytest.skip(f"no such namespace can be made here: {probe.stderr.strip()}")
    return prefix


@as_root
def test_users_that_do_not_see_each_others_processes(workers, directory, others_python):
    """``hidepid=2``: whether a holder lives the kernel knows, although nobody could look it up in /proc."""
    hidden = namespace("--mount", "--propagation", "private", setup="mount -t proc -o hidepid=2 proc /proc")
    users = {uid: ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"] for uid in (65534, 4321, 4322)}
    first, second, third = (
        workers(str(uid), python=others_python, prefix=[*hidden, *become]) for uid, become in users.items()
    )
    look = ["nsenter", f"--mount=/proc/{second.pid}/ns/mnt", "--", *users[4321], "ls", "-d", f"/proc/{first.pid}"]
    seen = subprocess.run(look, capture_output=True, check=False, timeout=30)
    assert seen.returncode != 0, "hidepid works, or this test tests nothing"
    assert "cards" in first.ask("acquire 60")
    second.tell("acquire 120")
    queued(directory, 1)
    third.tell("acquire 120")
    queued(directory, 2)
    first.kill()
    assert "cards" in second.answer()
    assert second.ask("leases")["leases"] == [[["GPU-00000000"], "4321"]]
    second.ask("release")
    assert "cards" in third.answer()


@as_root
def test_two_pid_namespaces_share_the_directory(workers, directory):
    """Containers: each has its own process 1, and neither could ask whether the other's lives."""
    apart = namespace("--pid", "--fork", "--kill-child", "--mount-proc")
    one, two, outside = workers("one", prefix=apart), workers("two", prefix=apart), workers("outside")
    assert (one.pid, two.pid) == (1, 1)
    assert "cards" in one.ask("acquire 60")
    assert "timeout" in two.ask("acquire 0")
    two.tell("acquire 120")
    queued(directory, 1)
    outside.tell("acquire 120")
    queued(directory, 2)
    one.kill()
    assert "cards" in two.answer()
    two.ask("release")
    assert "cards" in outside.answer()
    assert two.ask("leases")["leases"] == [[["GPU-00000000"], "outside"]]


@as_root
def test_a_full_file_system(workers, directory):
    """What was held once is held and given back as ever; a new file is a clear error, and takes nothing along."""
    tiny = namespace("--mount", "--propagation", "private", setup=f"mount -t tmpfs -o size=64k,mode=1777 x {directory}")
    one = workers("one", cards=2, prefix=tiny)
    inside = Path(f"/proc/{one.process.pid}/root{directory}")
    two = workers("two", cards=2, prefix=["nsenter", f"--mount=/proc/{one.process.pid}/ns/mnt", "--"])
    first = one.ask("acquire 60")
    with contextlib.suppress(OSError), (inside / "filling").open("wb", 0) as file:
        while True:
            file.write(bytes(4096))
    assert os.statvfs(inside).f_bavail == 0

    assert "is on a file system that is full" in two.ask("acquire 2")["timeout"]
    assert two.ask("leases")["leases"] == [[["GPU-00000000"], "one"]]
    one.ask("release")
    again = two.ask("acquire 60")
    assert again["cards"] == first["cards"]
    assert again["token"] > first["token"]
    assert "timeout" in one.ask("acquire 1"), "the other card has no file yet"

    (inside / "filling").unlink()
    assert one.ask("acquire 60")["cards"] == ["GPU-00000001"]
    two.ask("release")
    assert one.ask("leases")["leases"] == [[["GPU-00000001"], "one"]]


@as_root
def test_a_read_only_file_system(workers, directory):
    """Nothing is granted without a lock, and the error says why; who can write is not concerned."""
    setup = f"mount --bind {directory} {directory}; mount -o remount,bind,ro {directory}"
    read_only = namespace("--mount", "--propagation", "private", setup=setup)
    one = workers("one")
    assert "cards" in one.ask("acquire 60")
    two = workers("two", prefix=read_only)
    assert "held by one" in two.ask("acquire 0")["timeout"]
    assert two.ask("leases")["leases"] == [[["GPU-00000000"], "one"]], "for a look it does"
    one.ask("release")
    assert "is on a read-only file system" in two.ask("acquire 1")["timeout"]
    assert "cards" in one.ask("acquire 60")


def python_of(uid) -> str | None:
    """An interpreter that the user may run and that finds us: this one may lie in somebody's home."""
    same = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    for python in (sys.executable, f"/usr/bin/{same}", f"/usr/local/bin/{same}"):
        with contextlib.suppress(OSError):
            done = subprocess.run(
                [python, "-c", "import gpupool_sync.pool, pybreaker, helpers"],
                user=uid,
                group=uid,
                extra_groups=[],
                cwd="/",
                env={**os.environ, "PYTHONPATH": PATH},
                capture_output=True,
                check=False,
                timeout=120,
            )
            if done.returncode == 0:
                return python
    return None


# -- the directory ---------------------------------------------------------------------------------------------


def test_the_directory_is_the_same_for_everybody(monkeypatch):
    """TMPDIR, which differs between users, has no say; the variable has."""
    monkeypatch.setenv("TMPDIR", "/somewhere/else")
    assert default_directory({}) in ("/run/lock/gpupool_sync", "/var/lock/gpupool_sync", "/tmp/gpupool_sync")
    assert default_directory({"GPU_POOL_LOCK_DIR": "/x"}) == "/x"
    with pytest.raises(ConfigError, match="GPU_POOL_LOCK_DIR"):
        default_directory({"GPU_POOL_LOCK_DIR": "relative"})


def test_a_new_directory_is_sticky_and_for_all(tmp_path):
    """Whatever the umask, other users can come too, and cannot delete one another's files."""
    before = os.umask(0o077)
    try:
        HostStore(str(tmp_path / "new")).close()
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o7777 == 0o1777


def test_an_unsafe_directory_is_refused(tmp_path):
    """Where everybody may delete everybody's locks, there are no locks."""
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(LeaseStoreError, match=r"chmod \+t"):
        HostStore(str(tmp_path / "open"))


def test_a_symbolic_link_is_not_followed(tmp_path):
    """Who can plant a link must not be able to move the locks."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(LeaseStoreError, match=r"symbolic link|not a directory"):
        HostStore(str(tmp_path / "link"))


def test_a_network_file_system_is_refused_by_name(tmp_path, monkeypatch):
    """Locks that hold on one machine only are worse than none."""
    monkeypatch.setattr(host, "_file_system", lambda fd: "nfs4")
    with pytest.raises(LeaseStoreError, match=r"network file system \(nfs4\)"):
        HostStore(str(tmp_path / "locks"))


def test_a_deleted_card_file_is_not_the_lock(tmp_path):
    """A lock on a file that is no longer there is nobody's lock: the next claimer makes a new file."""
    from test_leases_contract import claim, granted

    store = HostStore(str(tmp_path / "locks"))
    wish = claim("GPU-1")
    granted(store.claim(wish))
    store.release([wish.id])
    (tmp_path / "locks" / "gpu-GPU-1").unlink()
    granted(store.claim(claim("GPU-1")))
    assert (tmp_path / "locks" / "gpu-GPU-1").exists()
    store.close()


def test_something_else_in_place_of_a_card_file_is_named(tmp_path):
    """A planted directory, pipe or link is an error, not a hang and not a lease."""
    from test_leases_contract import claim

    store = HostStore(str(tmp_path / "locks"))
    os.mkfifo(tmp_path / "locks" / "gpu-pipe")
    (tmp_path / "locks" / "gpu-link").symlink_to("/dev/null")
    for key in ("pipe", "link"):
        with pytest.raises(LeaseStoreError):
            store.claim(claim(key))
    store.close()


def test_garbage_in_the_files_decides_nothing(tmp_path):
    """Records and tickets inform; a garbled one costs nobody a card."""
    from test_leases_contract import claim, granted

    path = tmp_path / "locks"
    store = HostStore(str(path))
    (path / "gpu-GPU-1").write_bytes(b"\xff" * 2000)
    (path / "queue" / "ticket-00000000000000000000-x").write_bytes(b"nonsense")
    (path / "queue" / "ticket-").write_bytes(b"")
    granted(store.claim(claim("GPU-1", queue=True)))
    assert store.queue() == []
    store.close()


def test_threads_of_many_stores_never_share_a_card(tmp_path):
    """Stores that know nothing of each other but the directory exclude one another."""
    from gpupool_sync.leases.base import Granted
    from test_leases_contract import claim

    stores = [HostStore(str(tmp_path / "locks")) for _ in range(4)]
    log = HoldLog()

    def work(number):
        store = stores[number]
        for _ in range(100):
            wish = claim("a", "b", who=str(number))
            outcome = store.claim(wish)
            if isinstance(outcome, Granted):
                with log.holding(outcome.lease.cards[0], outcome.lease.token):
                    pass
                store.release([wish.id])

    run_threads(4, work)
    for store in stores:
        store.close()
    assert log.holds()
    assert log.overlaps() == []


def test_a_share_that_was_never_written_down_does_not_count(workers, directory):
    """Its holder was killed after it made the file: those who wait for shares do not wait for it for ever."""
    whole, one, two = workers("whole"), workers("one"), workers("two")
    key = whole.ask("acquire 20")["cards"][0]
    for number, sharer in enumerate((one, two), 1):
        sharer.tell("share 30 40000")
        queued(directory, number)
    left = directory / f"{host._file_name(key)}.share-{'0' * 24}"
    left.touch()
    whole.ask("release")
    assert "cards" in one.answer()
    assert "cards" in two.answer()
    assert not left.exists()


@as_root
def test_a_full_file_system_takes_no_share_along(workers, directory):
    """A share that could not be written down is neither held nor counted when there is room again."""
    tiny = namespace("--mount", "--propagation", "private", setup=f"mount -t tmpfs -o size=64k,mode=1777 x {directory}")
    one = workers("one", prefix=tiny)
    inside = Path(f"/proc/{one.process.pid}/root{directory}")
    assert "cards" in one.ask("acquire 20")
    one.ask("release")
    assert one.ask("no-collector") == {"collecting": False}  # what is held only for as long as an error is kept counts
    with contextlib.suppress(OSError), (inside / "filling").open("wb", 0) as file:
        while True:
            file.write(bytes(4096))
    # The names of its files fit into what there is, their contents do not.
    assert "is on a file system that is full" in one.ask("share 1 40000")["timeout"]
    open_files = [os.readlink(each) for each in Path(f"/proc/{one.process.pid}/fd").iterdir()]
    assert not [name for name in open_files if ".share-" in name]
    (inside / "filling").unlink()
    for _ in range(2):
        assert "cards" in one.ask("share 20 40000")
