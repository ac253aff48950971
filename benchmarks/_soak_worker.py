"""
One worker of the soak: a process with one pool that acquires, holds and releases until it is told to end.

Run by `benchmarks.soak` with one argument, its settings as JSON.  What it does it appends to the log, one line a note,
one `write` each; the instants are of ``time.monotonic``, which all processes of a machine share.  It knows that it may
be killed, stopped and interrupted at any instant, and notes only what is certain then:

* ``ask`` before it asks, ``begin`` after the grant, ``end`` before the release, ``fail`` where there was no grant;
* a ``begin`` is noted only if the lease was not lost after its instant was taken;
* ``good`` of an ``end`` is the last instant after which the lease was still not lost.

Now and then a second thread asks too, under the name ``worker-1.b``, and the process forks, also while that thread is
inside the pool.  A forked child, ``worker-1.f1``, must not have anything of its parent's and must not be able to give
it back; it acquires, holds and releases once with the pool that it inherited, and ends.

With ``"sweep": [key, …]`` in the settings it claims each of these cards once and prints which it got.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from types import FrameType
from typing import Any

#: Seconds after which a forked child is ended by the kernel, should it hang.
CHILD_LIFE = 30
# Before the hooks of those who are imported next: a child that hangs in one of them ends as well, and says where.
os.register_at_fork(after_in_child=lambda: signal.alarm(CHILD_LIFE))
faulthandler.register(signal.SIGALRM, chain=True)

from benchmarks._cards import HERE, StillCards  # noqa: E402
from gpupool_sync import AcquireTimeout, Endpoint, GPUPool, GPUPoolError, devices  # noqa: E402

#: Seconds between two looks at a lease that is held.
LOOK = 0.01
#: Seconds that an `acquire` of a forked child waits at most: it may keep a card of its dead parent meanwhile.
CHILD_TIMEOUT = 5.0
#: Forked children of one process that live at the same time.
CHILDREN = 2


class Asker:
    """Acquires, holds and releases, and notes it under one name; each belongs to one thread."""

    def __init__(self, settings: dict[str, Any], who: str, log: int) -> None:
        self._settings = settings
        self._who = who
        self._random = random.Random(f"{settings['seed']}/{who}")
        self._log = log
        self._number = 0
        # SIGINT raises while it is armed: then the pool is at work. Our own notes are not what is tested.
        self._armed = False
        self._interrupted = False

    def note(self, what: str, **more: Any) -> None:
        note = {"note": what, "who": self._who, "pid": os.getpid(), "number": self._number, **more}
        os.write(self._log, (json.dumps(note) + "\n").encode())

    def round(self, pool: GPUPool, timeout: float) -> None:
        """Acquire, hold and release once."""
        self._number += 1
        chance = self._random.random()
        count = 2 if chance < 0.05 and self._settings["cards"] > 1 else 1
        places = 2 if chance > 0.92 else 1
        request: dict[str, Any] = {"timeout": timeout, "local": False}
        if self._settings["store"] == "host":
            del request["local"]
        if places > 1:
            request["max_holders"] = places
        granted = False
        self._interrupted = False
        self.note("ask", at=time.monotonic(), count=count, places=places)
        try:
            self._armed = True
            with pool.gpus(count, **request) if count > 1 else pool.gpu(**request) as gpu:
                self._armed = False
                begin = time.monotonic()
                granted = True
                keys = [each.uuid for each in gpu] if count > 1 else [gpu.uuid]
                if gpu.lost:
                    self.note("fail", at=begin, why="lost before it began")
                else:
                    self.note("begin", at=begin, keys=keys, token=gpu.fencing_token)
                    good, lost = self._hold(pool, gpu, begin)
                    self.note("end", at=time.monotonic(), good=good, lost=lost)
                    if self._interrupted:
                        raise KeyboardInterrupt
                self._armed = True
        except KeyboardInterrupt:
            self._armed = False
            if not granted:
                self.note("fail", at=time.monotonic(), why="interrupted")
        except AcquireTimeout as exc:
            self._armed = False
            self.note("fail", at=time.monotonic(), why="timeout", text=str(exc)[:1500])
        except GPUPoolError as exc:
            self._armed = False
            why = f"{type(exc).__name__}{' at release' if granted else ''}"
            self.note("error" if granted else "fail", at=time.monotonic(), why=why, text=str(exc)[:1500])
            time.sleep(0.02)
        finally:
            self._armed = False

    def _hold(self, pool: GPUPool, gpu: Any, begin: float) -> tuple[float, bool]:
        """Hold it for a while; the last instant at which it was certainly ours, and whether it was lost."""
        chance = self._random.random()
        # Mostly short; the longest, which are rare, have to be renewed where there is a ttl.
        least, most = (1.0, 5.0) if chance < 0.002 else (0.05, 1.0) if chance < 0.02 else (0.001, 0.05)
        until = begin + self._random.uniform(least, most)
        self._while_holding(pool, gpu)
        good = begin
        while True:
            now = time.monotonic()
            if gpu.lost:
                return good, True
            good = now
            if now >= until or self._interrupted:
                return good, False
            time.sleep(min(LOOK, until - now))

    def _while_holding(self, pool: GPUPool, gpu: Any) -> None: ...


class Worker(Asker):
    """The main thread; it forks, and is interrupted."""

    def __init__(self, settings: dict[str, Any]) -> None:
        log = os.open(settings["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        super().__init__(settings, settings["who"], log)
        self._parent = os.getppid()
        self._forks = 0
        self._children: dict[int, str] = {}  # those that live, by pid
        self._second: Asker | None = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._interrupted = True
        if self._armed:
            self._armed = False
            raise KeyboardInterrupt

    def _over(self) -> bool:
        return os.path.exists(self._settings["stop"]) or os.getppid() != self._parent

    def run(self) -> None:
        """Until the file that ends it is there, or the parent is gone."""
        signal.signal(signal.SIGINT, self._handle)
        with make_pool(self._settings) as pool:
            self.note("ready", at=time.monotonic())
            while not self._over():
                second = self._begin_second(pool) if self._random.random() < 0.08 else None
                self.round(pool, self._settings["timeout"])
                interrupted = self._interrupted
                if second is not None:
                    second.join()
                self._reap()
                if interrupted and (leaked := lock_files()):
                    self.note("leak", at=time.monotonic(), files=leaked)
                if self._random.random() < 0.1:
                    time.sleep(self._random.uniform(0.0, 0.05))
            self.note("left", at=time.monotonic(), held=pool.stats()["held"])
            if leaked := lock_files():
                self.note("leak", at=time.monotonic(), files=leaked)
            self._await_children()

    # -- the second thread -------------------------------------------------------------------------------------

    def _begin_second(self, pool: GPUPool) -> threading.Thread:
        """A thread that asks beside us, once; mostly we fork while it does."""
        if self._second is None:
            self._second = Asker(self._settings, f"{self._who}.b", self._log)
            self._second.note("ready", at=time.monotonic(), of=self._who)
        thread = threading.Thread(target=self._second.round, args=(pool, self._settings["timeout"]), name="second")
        thread.start()
        if self._random.random() < 0.6:
            time.sleep(self._random.choice([0.0, self._random.uniform(0.0, 0.002), self._random.uniform(0.0, 0.05)]))
            self._fork(pool)
        return thread

    # -- children ----------------------------------------------------------------------------------------------

    def _while_holding(self, pool: GPUPool, gpu: Any) -> None:
        if self._random.random() < 0.02:
            self._fork(pool, gpu)

    def _fork(self, pool: GPUPool, gpu: Any = None) -> None:
        if len(self._children) >= CHILDREN:
            return
        self._forks += 1
        child = Child(self._settings, f"{self._who}.f{self._forks}", self._log)
        forked = time.monotonic()
        self.note("fork", at=forked, child=child._who)
        pid = os.fork()
        if pid == 0:
            child.live(pool, gpu, self._who, forked)
        self._children[pid] = child._who

    def _reap(self) -> None:
        for pid, who in list(self._children.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del self._children[pid]
                if status:
                    self.note("wrong", at=time.monotonic(), text=f"its child {who} ended with status {status}")

    def _await_children(self) -> None:
        """Each ends by itself, or with its alarm."""
        until = time.monotonic() + CHILD_LIFE + 5.0
        while self._children and time.monotonic() < until:
            self._reap()
            time.sleep(0.01)


class Child(Asker):
    """A forked child; it is made before the fork, and lives in the child."""

    def live(self, pool: GPUPool, gpu: Any, parent: str, forked: float) -> None:
        """Look, ask once, end; never returns."""
        status = 1
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            self.note("ready", at=time.monotonic(), parent=parent, forked=forked)
            self._touch_the_parents(pool, gpu)
            self.round(pool, CHILD_TIMEOUT)
            self.note("left", at=time.monotonic(), held=pool.stats()["held"])
            status = 0
        except BaseException:
            with contextlib.suppress(BaseException):
                self.note("wrong", at=time.monotonic(), text=traceback.format_exc()[-1500:])
        finally:
            os._exit(status)

    def _touch_the_parents(self, pool: GPUPool, gpu: Any) -> None:
        """Nothing of the parent's is ours, and giving it back does nothing; the judge sees whether that is true."""
        if held := pool.stats()["held"]:
            self.note("wrong", at=time.monotonic(), text=f"a forked child's pool counts {held} leases of its parent's")
        if gpu is not None:
            gpu.release()
        pool.release_all()


def lock_files(looks: int = 30) -> list[str]:
    """
    The files of cards in the lock directory that this process has open to lock them, and goes on to have open.

    Between two rounds there should be none: each is a kernel lock, or may be.  What an interrupted release has left the
    pool gives back on a thread of its own, which looks each second; so this looks for longer than that, and counts, as
    time goes on while the process is stopped.
    """
    directory = os.environ.get("GPU_POOL_LOCK_DIR", "/nowhere")
    before: set[tuple[str, str]] | None = None
    while True:
        found = set()
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/self/fd/{name}")
                # Those of locks can be written to; what is open for reading only is never locked.
                writable = fcntl.fcntl(int(name), fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
                if writable and target.startswith(f"{directory}/gpu-"):
                    found.add((name, target))
        # Other threads read records now and then, through descriptors that are soon gone.
        before = found if before is None else before & found
        looks -= 1
        if not before or looks <= 0:
            return sorted(os.path.basename(target) for _, target in before)
        time.sleep(0.05)


def make_pool(settings: dict[str, Any]) -> GPUPool:
    """A pool over the store of the settings."""
    options: dict[str, Any] = {"poll_interval": 0.2, "health_check_interval": 0.5, "endpoint_timeout": 2.0}
    options |= {"ttl": settings["ttl"], "name": f"soak-{settings['who']}"}
    if settings["store"] == "host":
        cards = StillCards(0, settings["cards"])
        devices.open_reader = lambda *args, **kwargs: cards  # type: ignore[assignment]
        devices.host_identity = lambda: HERE  # type: ignore[assignment]
        return GPUPool(**options)
    if settings["store"] == "redis":
        options["lease_store"] = settings["redis"]
    return GPUPool([Endpoint(settings["url"], name="soak")], **options)


def sweep(settings: dict[str, Any]) -> None:
    """Claim every card, all at the same time, and print the keys of those that came within the bound."""
    got = []
    with make_pool(settings) as pool:
        pool.open(wait=True, timeout=10.0)
        deadline = time.monotonic() + settings["timeout"]
        for key in settings["sweep"]:
            with contextlib.suppress(GPUPoolError):
                pool.acquire(timeout=max(0.1, deadline - time.monotonic()), uuid=key)
                got.append(key)
        pool.release_all()
    print(json.dumps(got))


def main() -> None:
    settings = json.loads(sys.argv[1])
    if "sweep" in settings:
        sweep(settings)
    else:
        Worker(settings).run()


if __name__ == "__main__":
    main()
