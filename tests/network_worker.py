"""
A process that acquires, holds and releases until its standard input ends, for tests of broken networks.

Run with its settings as JSON.  It holds cards for moments, and while the file ``keep`` is there for as long as it can;
it asks for the card that the file ``want`` names.
What it held goes to a `HoldLog`, up to the last instant at which it was told that its lease is good; what it did goes
to standard output, one line of JSON a round.
"""

from __future__ import annotations

import json
import logging
import random
import sys
import threading
import time
from pathlib import Path

from gpupool_sync import AcquireTimeout, Endpoint, GPUPool, GPUPoolError
from helpers import HoldLog


def text(path: Path) -> str | None:
    """What is in the file; None if there is none."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return None


def main() -> None:
    settings = json.loads(sys.argv[1])
    logging.disable(logging.CRITICAL)  # a broken network is told of again and again
    log = HoldLog(settings["log"])
    keep, want = Path(settings["keep"]), Path(settings["want"])
    chance = random.Random(settings["name"])
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()

    def say(what: str, **more: object) -> None:
        print(json.dumps({"what": what, "at": time.monotonic(), **more}), flush=True)

    pool = GPUPool(
        [Endpoint(settings["url"], name="net", **settings.get("options", {}))],
        lease_store=settings.get("store"),
        ttl=settings["ttl"],
        poll_interval=0.3,
        health_check_interval=1.0,
        endpoint_timeout=settings["endpoint_timeout"],
        name=settings["name"],
    )
    with pool:
        say("ready")
        while not over.is_set():
            begun = time.monotonic()
            held = False
            try:
                wanted = text(want)
                with pool.gpu(timeout=settings["timeout"], local=False, uuid=wanted) as gpu:
                    acquired = time.monotonic()
                    if gpu.lost:
                        say("lost before it began", took=acquired - begun)
                        continue
                    hold = log.begin(str(gpu.uuid), gpu.fencing_token, settings["name"], at=acquired)
                    held = True
                    say("acquired", took=acquired - begun, key=gpu.uuid)
                    until = acquired + chance.uniform(0.02, 0.2)
                    good = acquired
                    lost = False
                    keeping = False
                    while not lost and (good < until or keep.exists()) and not over.is_set():
                        if not keeping and keep.exists():
                            keeping = True
                            say("keeping", took=0.0, key=gpu.uuid)
                        time.sleep(0.01)
                        now = time.monotonic()
                        lost = gpu.lost
                        good = good if lost else now
                    log.end(hold, at=good)
                    released = time.monotonic()
                say("lost" if lost else "released", took=time.monotonic() - released)
            except AcquireTimeout:
                say("timeout", took=time.monotonic() - begun)
            except GPUPoolError as exc:
                say(
                    "error at release" if held else "error",
                    took=time.monotonic() - begun,
                    text=f"{type(exc).__name__}: {exc}",
                )
                time.sleep(0.05)
        begun = time.monotonic()
    say("closed", took=time.monotonic() - begun)


if __name__ == "__main__":
    main()
