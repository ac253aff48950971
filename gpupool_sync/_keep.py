"""The process that renews a lease for the commands that run on it: ``python -m gpupool_sync._keep``.

Started by `inherited.Bequest.keep` where a lease has a ttl.  It outlives the process that acquired: as long as that one
or any command has the lease, it renews; when the last is gone, it gives the lease back.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pickle
import shutil
import sys
import threading
import time

from gpupool_sync import inherited
from gpupool_sync.clock import boottime
from gpupool_sync.errors import GPUPoolError
from gpupool_sync.inherited import ToKeep
from gpupool_sync.keeper import GIVE_UP, RETRY, Keeper
from gpupool_sync.leases.base import LeaseStore

#: Seconds between two looks at what the keeper has reached; in short ttls a twentieth of them.
LOOK = 1.0


def main() -> None:
    # From the process that started us, by a pipe that nobody else has.
    told: ToKeep = pickle.load(sys.stdin.buffer)  # noqa: S301
    directory = os.open(told.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    with contextlib.suppress(OSError):
        os.chdir(told.working_directory)  # certificates may be named relative to it
    make, arguments = told.recipe
    store = make(*arguments)
    if os.fork():
        os._exit(0)  # says "ready" to who waits for us
    # Nobody reads what we could say.
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    keep(told, store, directory)


def keep(told: ToKeep, store: LeaseStore, directory: int) -> None:
    """Renew until nobody locks the directory any more; then give the lease back and remove the directory."""

    def on_lost(lease_id: str) -> None:
        why = store.why_gone(lease_id) or "its arbiter took it back, or did not confirm it in time"
        with contextlib.suppress(OSError):
            inherited.put(told.directory, inherited.LOST, why)

    keeper = Keeper(on_lost)
    keeper.add(told.lease_id, store, told.ttl, told.good_until - GIVE_UP * told.ttl)
    ended = threading.Event()
    threading.Thread(target=_wait_for_the_end, args=(directory, ended), name="gpupool-end", daemon=True).start()
    pause = min(LOOK, RETRY * told.ttl)
    noted = told.good_until
    while not ended.wait(pause):
        keeper.ensure_running()
        good_until = keeper.good_until(told.lease_id)
        if good_until is not None and good_until > noted:
            with contextlib.suppress(OSError):
                inherited.put(told.directory, inherited.GOOD_UNTIL, repr(good_until))
                noted = good_until
    keeper.remove(told.lease_id)
    # Beyond its ttl the lease has ended by itself.
    end = boottime() + told.ttl
    while True:
        try:
            store.release([told.lease_id])
        except GPUPoolError:
            if boottime() < end:
                time.sleep(RETRY * told.ttl)
                continue
        break
    shutil.rmtree(told.directory, ignore_errors=True)


def _wait_for_the_end(directory: int, ended: threading.Event) -> None:
    while True:
        try:
            fcntl.flock(directory, fcntl.LOCK_SH)
        except OSError:  # pragma: no cover - the kernel is out of locks
            time.sleep(LOOK)
            continue
        ended.set()
        return


if __name__ == "__main__":
    main()
