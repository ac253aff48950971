"""
One worker of the soak: a process with one pool that acquires, holds and releases until it is told to end.

Run by `benchmarks.soak` with one argument, its settings as JSON.  What it does it appends to the log, one line a note,
one `write` each; the instants are of ``time.monotonic``, which all processes of a machine share.  It knows that it may
be killed, stopped and interrupted at any instant, and notes only what is certain then:

* ``ask`` before it asks, ``begin`` after the grant, ``end`` before the release, ``fail`` where there was no grant;
* a ``begin`` is noted only if the lease was not lost after its instant was taken;
* ``good`` of an ``end`` is the last instant after which the lease was still not lost.

With ``"sweep": [key, …]`` in the settings it claims each of these cards once and prints which it got.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from types import FrameType
from typing import Any

from benchmarks._cards import HERE, StillCards
from gpupool_sync import AcquireTimeout, Endpoint, GPUPool, GPUPoolError, devices

#: Seconds between two looks at a lease that is held.
LOOK = 0.01


class Worker:
    """Acquires, holds and releases."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._who = settings["who"]
        self._random = random.Random(settings["seed"])
        self._log = os.open(settings["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._number = 0
        self._children: list[int] = []
        self._parent = os.getppid()
        # SIGINT raises while it is armed: then the pool is at work. Our own notes are not what is tested.
        self._armed = False
        self._interrupted = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._interrupted = True
        if self._armed:
            self._armed = False
            raise KeyboardInterrupt

    def _note(self, what: str, **more: Any) -> None:
        note = {"note": what, "who": self._who, "pid": os.getpid(), "number": self._number, **more}
        os.write(self._log, (json.dumps(note) + "\n").encode())

    def _over(self) -> bool:
        return os.path.exists(self._settings["stop"]) or os.getppid() != self._parent

    def run(self) -> None:
        """Until the file that ends it is there, or the parent is gone."""
        signal.signal(signal.SIGINT, self._handle)
        with make_pool(self._settings) as pool:
            self._note("ready", at=time.monotonic())
            while not self._over():
                self._number += 1
                try:
                    self._round(pool)
                finally:
                    self._armed = False
                self._reap()
                if self._interrupted and (leaked := lock_files()):
                    self._note("leak", at=time.monotonic(), files=leaked)
                if self._random.random() < 0.1:
                    time.sleep(self._random.uniform(0.0, 0.05))
            self._note("left", at=time.monotonic(), held=pool.stats()["held"])
            if leaked := lock_files():
                self._note("leak", at=time.monotonic(), files=leaked)

    def _round(self, pool: GPUPool) -> None:
        chance = self._random.random()
        count = 2 if chance < 0.05 and self._settings["cards"] > 1 else 1
        places = 2 if chance > 0.92 else 1
        request: dict[str, Any] = {"timeout": self._settings["timeout"], "local": False}
        if self._settings["store"] == "host":
            del request["local"]
        if places > 1:
            request["max_holders"] = places
        granted = False
        self._interrupted = False
        self._note("ask", at=time.monotonic(), count=count, places=places)
        try:
            self._armed = True
            with pool.gpus(count, **request) if count > 1 else pool.gpu(**request) as gpu:
                self._armed = False
                begin = time.monotonic()
                granted = True
                keys = [each.uuid for each in gpu] if count > 1 else [gpu.uuid]
                if gpu.lost:
                    self._note("fail", at=begin, why="lost before it began")
                else:
                    self._note("begin", at=begin, keys=keys, token=gpu.fencing_token)
                    good, lost = self._hold(gpu, begin)
                    self._note("end", at=time.monotonic(), good=good, lost=lost)
                    if self._interrupted:
                        raise KeyboardInterrupt
                self._armed = True
        except KeyboardInterrupt:
            self._armed = False
            if not granted:
                self._note("fail", at=time.monotonic(), why="interrupted")
        except AcquireTimeout as exc:
            self._armed = False
            self._note("fail", at=time.monotonic(), why="timeout", text=str(exc)[:1500])
        except GPUPoolError as exc:
            self._armed = False
            why = f"{type(exc).__name__}{' at release' if granted else ''}"
            self._note("error" if granted else "fail", at=time.monotonic(), why=why, text=str(exc)[:1500])
            time.sleep(0.02)

    def _hold(self, gpu: Any, begin: float) -> tuple[float, bool]:
        """Hold it for a while; the last instant at which it was certainly ours, and whether it was lost."""
        chance = self._random.random()
        # Mostly short; the longest, which are rare, have to be renewed where there is a ttl.
        least, most = (1.0, 5.0) if chance < 0.002 else (0.05, 1.0) if chance < 0.02 else (0.001, 0.05)
        until = begin + self._random.uniform(least, most)
        if self._random.random() < 0.01:
            self._fork()
        good = begin
        while True:
            now = time.monotonic()
            if gpu.lost:
                return good, True
            good = now
            if now >= until or self._interrupted:
                return good, False
            time.sleep(min(LOOK, until - now))

    def _fork(self) -> None:
        """A child that has inherited everything and does nothing with it."""
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                time.sleep(0.03)
            os._exit(0)
        self._children.append(child)

    def _reap(self) -> None:
        self._children = [child for child in self._children if os.waitpid(child, os.WNOHANG) == (0, 0)]


def lock_files(patience: float = 0.5) -> list[str]:
    """
    The files of cards in the lock directory that this process has open, and goes on to have open.

    Between two rounds there should be none: each is a kernel lock, or may be.
    """
    until = time.monotonic() + patience
    directory = os.environ.get("GPU_POOL_LOCK_DIR", "/nowhere")
    before: set[tuple[str, str]] | None = None
    while True:
        found = set()
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/self/fd/{name}")
                if target.startswith(f"{directory}/gpu-"):
                    found.add((name, target))
        # Other threads read records now and then, through descriptors that are soon gone.
        before = found if before is None else before & found
        if not before or time.monotonic() >= until:
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
