"""A host that fails: no descriptors, no memory, a wall clock that jumps, a process that stands still, many pools.

Full and read-only file systems, deleted lock directories and stopped holders are in test_host_processes.py and
test_deleted_locks.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import psutil
import pytest

from attacked import victim
from cards import Cards, local_pool
from gpupool_sync import AcquireTimeout, GPUPool, GPUPoolError, LeaseStoreError
from gpupool_sync.leases.base import Claim, Granted, Holder, Wanted
from gpupool_sync.leases.host import HostStore
from gpupool_sync.testing import FakeFleet
from helpers import eventually


def claim(claim_id: str, *keys: str) -> Claim:
    return Claim(claim_id, Holder(f"holder of {claim_id}", None, "user", "host", 1), (tuple(map(Wanted, keys)),))


def descriptors() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


def in_a_child(
    program: str, *arguments: str, command: tuple[str, ...] = (), timeout: float = 50.0, **environ: str
) -> dict:
    """What *program* prints as its last line, as JSON; it may use the modules beside this one."""
    here = os.path.dirname(os.path.abspath(__file__))
    done = subprocess.run(
        [*command, sys.executable, "-W", "error", "-c", textwrap.dedent(program), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([here, *sys.path]), **environ},
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# -- descriptors --------------------------------------------------------------------------------------------------


@pytest.fixture
def starved(monkeypatch):
    """A function that takes so many descriptors that only a number of them is left, and gives them back."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []

    def starve(left: int) -> None:
        feed()
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
        while True:
            try:
                taken.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
            except OSError:
                break
        for _ in range(left):
            os.close(taken.pop())

    def feed() -> None:
        while taken:
            os.close(taken.pop())
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    starve.feed = feed  # type: ignore[attr-defined]
    yield starve
    feed()


def kept_to_be_read(fd, locks) -> bool:
    """Whether it is the file of a card or ticket that stays open to be looked at; some are opened late."""
    try:
        name = os.readlink(f"/proc/self/fd/{fd}")
        looked_at = name.startswith((f"{locks}/gpu-", f"{locks}/queue/ticket-"))
        return looked_at and fcntl.fcntl(int(fd), fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    except OSError:
        return False  # closed meanwhile


def test_without_descriptors_the_hosts_leases_fail_and_come_back(monkeypatch, tmp_path, starved):
    """However few are left, a claim succeeds or fails with an error of ours, leaks nothing, and later succeeds."""
    with local_pool(monkeypatch, Cards(3), lease_store=HostStore(str(tmp_path / "locks"))) as pool:
        with pool.gpus(3, timeout=10):
            pass
        outcomes: dict[int, str] = {}
        open_after: list[int] = []
        for _ in range(3):  # in the first round, files may be opened that stay open
            for left in range(12):
                starved(left)
                try:
                    with pool.gpus(2, timeout=0.05):
                        outcomes[left] = "granted"
                except GPUPoolError as exc:
                    outcomes[left] = type(exc).__name__
                finally:
                    starved.feed()
                with pool.gpus(3, timeout=10) as gpus:
                    assert len(gpus) == 3
            open_after.append(len([fd for fd in descriptors() if not kept_to_be_read(fd, tmp_path / "locks")]))
        assert outcomes[11] == "granted"
        assert open_after[1] >= open_after[2]


def test_a_claim_without_descriptors_is_an_error_of_ours(tmp_path, starved):
    """And leaves neither a lock nor a descriptor behind."""
    store = HostStore(str(tmp_path / "locks"))
    before = descriptors()
    starved(0)
    try:
        with pytest.raises(LeaseStoreError, match="Too many open files"):
            store.claim(claim("id-1", "a"))
    finally:
        starved.feed()
    assert descriptors() == before
    assert isinstance(store.claim(claim("id-2", "a")), Granted)
    store.close()


@pytest.mark.real
def test_without_descriptors_servers_are_down_and_come_back(starved):
    """A pool that cannot open a connection says so; when it can again, the servers are there again."""
    with FakeFleet([1]) as fleet:
        for _ in range(2):  # the first has everything imported
            before = descriptors()
            with GPUPool(fleet.urls, poll_interval=0.1, health_check_interval=0.2, endpoint_timeout=1.0) as pool:
                pool.refresh(timeout=20)
        with GPUPool(fleet.urls, poll_interval=0.1, health_check_interval=0.2, endpoint_timeout=1.0) as pool:
            starved(0)
            try:
                with pytest.raises(AcquireTimeout) as caught, pool.gpu(timeout=0.3):
                    pass
            finally:
                starved.feed()
            assert "Too many open files" in str(caught.value)
            with pool.gpu(timeout=30) as gpu:
                assert gpu.url == fleet.urls[0]
        eventually(lambda: len(descriptors()) <= len(before), message="nothing is left open")


# -- memory -------------------------------------------------------------------------------------------------------


def test_without_memory_nothing_is_lost(tmp_path):
    """Where memory runs out, a call fails with MemoryError or an error of ours; leases stay, and the pool goes on."""
    told = in_a_child(
        """
        import json, resource, sys
        from gpupool_sync import GPUPoolError, devices
        from cards import Cards, HERE
        from gpupool_sync import GPUPool
        from gpupool_sync.leases.host import HostStore

        cards = Cards(4)
        devices.open_reader, devices.host_identity = (lambda: cards), (lambda: HERE)
        with GPUPool(lease_store=HostStore(sys.argv[1]), poll_interval=0.05) as pool:
            mine = pool.acquire(timeout=10)
            with pool.gpu(timeout=10):
                pass
            with open("/proc/self/statm") as file:
                used = int(file.read().split()[0]) * resource.getpagesize()
            outcomes = [None] * 400
            hoard = None  # a chain: a list would want one large piece for itself, and end too early
            resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
            for size in (1 << 20, 1 << 16, 1 << 12, 1 << 9, 1 << 6, 1):
                try:
                    while True:
                        hoard = (hoard, bytes(size))
                except MemoryError:
                    pass
            for number in range(len(outcomes)):
                try:
                    try:
                        gpu = pool.acquire(timeout=0)
                        outcomes[number] = "granted"
                        pool.release(gpu)
                    except MemoryError:
                        outcomes[number] = "MemoryError"
                    except GPUPoolError:
                        outcomes[number] = "GPUPoolError"
                except MemoryError:  # of these lines
                    pass
                for _ in range(20):  # a little more room than before
                    hoard = hoard and hoard[0]
            hoard = None
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            lost = mine.lost
            gpus = pool.acquire(timeout=10, count=3)  # all but mine
            held = sorted({name for lease in pool.leases().leases for name in lease.gpus})
            pool.release(gpus)
        told = {"lost": lost, "granted": len(gpus), "held": held, "outcomes": sorted(map(str, set(outcomes)))}
        print(json.dumps(told))
        """,
        str(tmp_path / "locks"),
    )
    assert told["lost"] is False
    assert told["granted"] == 3
    assert len(told["held"]) == 4
    assert "granted" in told["outcomes"]  # at the end, where there is room again
    assert set(told["outcomes"]) & {"MemoryError", "GPUPoolError", "None"}


def test_a_record_that_there_is_no_memory_for_keeps_no_card(monkeypatch, tmp_path):
    """What a lock file says is for people; that it cannot be written must not keep the card locked."""
    one, two = (HostStore(str(tmp_path / "locks")) for _ in range(2))

    def no_memory(*args):
        raise MemoryError

    assert isinstance(one.claim(claim("id-1", "a")), Granted)
    with monkeypatch.context() as patch:
        patch.setattr("gpupool_sync.leases.host._padded", no_memory)
        one.release(["id-1"])
    assert isinstance(two.claim(claim("id-2", "a")), Granted)
    one.close()
    two.close()


# -- clocks -------------------------------------------------------------------------------------------------------

FAKETIME = shutil.which("faketime")
#: Seconds by which a machine with too much to do may be late with the end of a lease. It bounds hangs.
LATE = 40.0
JUMPS = {"a day ahead": 86400.0, "a day back": -86400.0}


@pytest.mark.parametrize("jump", JUMPS)
def test_a_wall_clock_that_jumps_ends_no_lease_and_prolongs_none(monkeypatch, tmp_path, jump):
    """Leases, tickets and readings count by a clock that nobody sets; fencing tokens grow all the same."""
    real = time.time
    with FakeFleet([1]) as fleet, GPUPool(fleet.urls, ttl=1.0, poll_interval=0.2) as pool:
        gpu = pool.acquire(timeout=20)
        token = gpu.fencing_token
        monkeypatch.setattr(time, "time", lambda: real() + JUMPS[jump])
        # Renewed twice and more since.
        eventually(lambda: pool.leases().leases[0].since > 2.5, 20.0, "time passes", tick=0.1)
        assert not gpu.lost
        gpu.check()
        with pytest.raises(AcquireTimeout):
            pool.acquire(timeout=0.1)
        pool.release(gpu)
        again = pool.acquire(timeout=20)
        assert again.fencing_token > token
        pool.release(again)


@pytest.fixture
def faketime():
    """The command, which is in nobody's way: what it shares with its children has the name of its process id."""

    def forget_the_dead():
        for left in (*Path("/dev/shm").glob("sem.faketime_sem_*"), *Path("/dev/shm").glob("faketime_shm_*")):
            # Who was killed left it behind, and the next process with that id could not begin.
            if not psutil.pid_exists(int(left.name.rpartition("_")[2])):
                with contextlib.suppress(OSError):
                    left.unlink()

    if FAKETIME is None:
        pytest.skip("faketime is not installed")
    forget_the_dead()
    yield FAKETIME
    forget_the_dead()


@pytest.mark.external_service
@pytest.mark.parametrize("offset", ["+1d", "-1d"])
def test_processes_of_different_dates_share_a_host(faketime, tmp_path, offset):
    """A process that lives in another day takes its turn: it is refused what is held, and its tokens are larger."""
    store = HostStore(str(tmp_path / "locks"))
    program = """
        import json, sys, time
        from gpupool_sync.leases.base import Claim, Granted, Holder, Wanted
        from gpupool_sync.leases.host import HostStore
        from gpupool_sync.clock import boottime

        store = HostStore(sys.argv[1])
        wish = Claim("id-2", Holder("h2", None, "u", "h", 1), ((Wanted("a"), Wanted("b")),), 1)
        outcome = store.claim(wish)
        held = [(info.cards[0], info.since) for info in store.leases()]
        token = outcome.lease.token if isinstance(outcome, Granted) else None
        key = outcome.lease.cards[0] if isinstance(outcome, Granted) else None
        print(json.dumps({"key": key, "token": token, "held": held, "time": time.time(), "boot": boottime()}))
    """
    first = store.claim(claim("id-1", "a"))
    assert isinstance(first, Granted)
    # The boot-time clock is left alone, as setting the date leaves it alone.
    told = in_a_child(
        program,
        store.path,
        "2",
        command=(faketime, "-f", offset),
        FAKETIME_DONT_FAKE_MONOTONIC="1",
        DONT_FAKE_MONOTONIC="1",
    )
    assert abs(told["time"] - time.time()) > 80_000
    assert told["key"] == "b"
    since = dict(told["held"])["a"]
    assert 0.0 <= since < 50.0
    second = store.claim(claim("id-3", "b"))
    assert isinstance(second, Granted)
    assert second.lease.token > told["token"]
    store.release(["id-1", "id-3"])
    store.close()


class FakedDate:
    """The date of processes with `environ`, and of nobody else: each of their looks at it reads a file."""

    def __init__(self, faketime: str, file: Path) -> None:
        self._file = file
        self.step("+0d")
        told = subprocess.run(
            [faketime, "-m", "-f", "+0d", "printenv", "LD_PRELOAD"], capture_output=True, text=True, timeout=30
        )
        self.environ = {
            "LD_PRELOAD": told.stdout.strip(),
            "FAKETIME_TIMESTAMP_FILE": str(file),
            "FAKETIME_NO_CACHE": "1",
            # Setting the date moves neither the other clocks nor the times of files.
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }

    def step(self, offset: str) -> None:
        """From now on it is *offset* from the true date."""
        fresh = self._file.with_suffix(".fresh")
        fresh.write_text(offset)
        fresh.replace(self._file)  # at once: it is never read half written


@pytest.mark.real
@pytest.mark.external_service
def test_a_servers_date_that_is_set_ends_no_lease_and_prolongs_none(faketime, monkeypatch, tmp_path):
    """A day ahead, then two days back: what is held stays so and ends by its ttl, who waits waits, tokens grow."""
    ttl = 30.0  # what is done between two renewals takes a second or two, and many on a busy machine
    date = FakedDate(faketime, tmp_path / "date")
    with contextlib.ExitStack() as ending:
        with monkeypatch.context() as patch:
            for name, value in date.environ.items():
                patch.setenv(name, value)
            server = ending.enter_context(victim())
        cards = [gpu["uuid"] for gpu in json.loads(server.get("/gpu/summary")[1])["gpus_summary"]]

        def ask(number: int, card: str) -> dict:
            holder = {"id": f"holder-{number}", "user": "u", "host": "h", "pid": 1}
            return {"id": f"id-{number}", "holder": holder, "cards": [{"key": card}], "ttl": ttl, "queue": False}

        def ahead() -> float:
            """Seconds by which the server's date is ahead of the true one."""
            told = json.loads(server.get("/gpu/summary")[1])["timestamp"]
            return datetime.fromisoformat(told).timestamp() - time.time()

        def renew() -> tuple[float, float]:
            """The instants between which the server has begun the ttl anew."""
            sent = time.monotonic()
            assert server.post("/v1/leases/renew", {"ids": ["id-0"]}) == (200, {"alive": [True], "why": [None]})
            return sent, time.monotonic()

        status, held = server.post("/v1/leases", ask(0, cards[0]))
        assert (status, held["cards"]) == (200, cards[:1])
        pool = ending.enter_context(GPUPool(server.url, poll_interval=0.2))
        apart = ending.enter_context(ThreadPoolExecutor(1))
        waiting = apart.submit(pool.acquire, timeout=120, uuid=cards[0])
        tokens = []
        for number, (offset, seconds) in enumerate({"+0d": 0.0, "+1d": 86400.0, "-1d": -86400.0}.items(), 1):
            renewed = renew()
            date.step(offset)
            eventually(
                lambda seconds=seconds: abs(ahead() - seconds) < 7200.0,
                message=lambda: f"the server lives {ahead():.0f} s ahead",
            )
            (lease,) = json.loads(server.get("/v1/leases")[1])["leases"]
            assert lease["token"] == held["token"]
            assert 0.0 <= lease["expires_in"] <= ttl
            assert 0.0 <= lease["since"] < 150.0
            eventually(lambda: json.loads(server.get("/v1/queue")[1])["queue"], message="somebody waits")
            (ticket,) = json.loads(server.get("/v1/queue")[1])["queue"]
            assert 0.0 <= ticket["waited"] < 150.0
            status, other = server.post("/v1/leases", ask(number, cards[1]))
            assert status == 200
            # Made of the date, but for those that would be smaller than the last one.
            tokens.append(other["token"])
            assert server.post("/v1/leases/release", {"ids": [f"id-{number}"]})[0] == 200
            assert not waiting.done()
        assert tokens == sorted(set(tokens))
        # Not renewed since the last step, which was back by two days.
        gpu = waiting.result()
        granted_at = time.monotonic()
        assert renewed[0] + ttl <= granted_at
        assert granted_at < renewed[1] + ttl + LATE
        assert gpu.fencing_token > held["token"]
        assert server.post("/v1/leases/renew", {"ids": ["id-0"]}) == (200, {"alive": [False], "why": [None]})
        pool.release(gpu)


# -- a process that stands still -----------------------------------------------------------------------------------


@pytest.mark.real
def test_a_client_that_was_suspended_beyond_its_ttl_knows_that_it_lost(tmp_path):
    """Its GPU has gone to somebody else meanwhile; the first look after it wakes tells it so."""
    with FakeFleet([1]) as fleet:
        program = """
            import sys
            from gpupool_sync import GPUPool
            with GPUPool(sys.argv[1], ttl=1.0, poll_interval=0.2) as pool:
                gpu = pool.acquire(timeout=30)
                print("holds", gpu.fencing_token, flush=True)
                sys.stdin.readline()
                print("lost" if gpu.lost else "has it", flush=True)
        """
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program), fleet.urls[0]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            token = int(child.stdout.readline().split()[1])
            child.send_signal(signal.SIGSTOP)
            with GPUPool(fleet.urls, poll_interval=0.2) as pool, pool.gpu(timeout=50, busy_ok=True) as gpu:
                assert gpu.fencing_token > token
                child.send_signal(signal.SIGCONT)
                child.stdin.write("\n")
                child.stdin.flush()
                assert child.stdout.readline() == "lost\n"
        finally:
            child.kill()
            child.wait(30)
            child.stdin.close()
            child.stdout.close()


# -- many pools ---------------------------------------------------------------------------------------------------


def test_a_thousand_pools_leave_nothing(monkeypatch, tmp_path):
    """Threads, descriptors and lock files are back to where they were, and memory hardly grows."""
    process = psutil.Process()

    def use(number: int) -> None:
        store = HostStore(str(tmp_path / "locks")) if number % 2 else None
        options = {} if store is None else {"lease_store": store}
        with local_pool(monkeypatch, Cards(2), **options) as pool, pool.gpu(timeout=20):
            pass
        if store is not None:
            store.close()

    for number in range(20):
        use(number)
    gc.collect()
    threads, files, rss = threading.active_count(), len(descriptors()), process.memory_info().rss
    listing = sorted(path.name for path in (tmp_path / "locks").rglob("*"))
    for number in range(1000):
        use(number)
    gc.collect()
    eventually(lambda: threading.active_count() <= threads, message="the threads have ended")
    assert len(descriptors()) <= files
    assert sorted(path.name for path in (tmp_path / "locks").rglob("*")) == listing
    assert process.memory_info().rss < rss + (32 << 20)


@pytest.mark.real
def test_pools_of_servers_leave_no_connection():
    """Neither here nor at the servers."""
    with FakeFleet([1, 1]) as fleet:

        def use():
            with GPUPool(fleet.urls, poll_interval=5.0) as pool, pool.gpu(timeout=20):
                pass

        use()  # this machine's lock directory is opened once for all pools
        gc.collect()
        threads, files = threading.active_count(), len(descriptors())
        there = psutil.Process(fleet[0].pid)
        for _ in range(500):
            use()
        gc.collect()
        eventually(lambda: threading.active_count() <= threads, message="the threads have ended")
        assert len(descriptors()) <= files
        eventually(
            lambda: not [each for each in there.net_connections("tcp") if each.status == psutil.CONN_ESTABLISHED],
            message="the server has no connections left",
        )
