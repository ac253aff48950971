"""
A process that acquires and releases as it is told, for tests of the host's arbiter.

Reads commands from standard input, one a line, and answers each with one line of JSON.  Run with the number of cards
and a name; its cards are invented, its locks are real.  `ANSWER_TIME` in the environment is that of the tickets.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys

from cards import HERE, Cards
from gpupool_sync import AcquireTimeout, GPUPool, devices
from gpupool_sync.leases import tickets
from helpers import HoldLog


def main() -> None:
    number, name = int(sys.argv[1]), sys.argv[2]
    tickets.ANSWER_TIME = float(os.environ["ANSWER_TIME"])
    devices.open_reader = lambda: Cards(number)  # type: ignore[assignment]
    devices.host_identity = lambda: HERE  # type: ignore[assignment]
    pool = GPUPool(poll_interval=60.0, name=name)
    held = []

    def say(**answer: object) -> None:
        print(json.dumps(answer), flush=True)

    say(ready=os.getpid())
    for line in sys.stdin:
        command, *arguments = line.split()
        try:
            if command == "acquire":
                count = int(arguments[1]) if len(arguments) > 1 else None
                gpu = pool.acquire(timeout=float(arguments[0]), count=count)
                held.append(gpu)
                say(cards=[card.key for card in gpu._all_cards], token=gpu.fencing_token)
            elif command == "share":
                gpu = pool.acquire(timeout=float(arguments[0]), memory_mb=float(arguments[1]))
                held.append(gpu)
                say(cards=[gpu.uuid], token=gpu.fencing_token)
            elif command == "release":
                held.pop(0).release()
                say(released=True)
            elif command == "fork":
                # The child inherits the lock and stays until it is killed.
                child = os.fork()
                if child == 0:
                    sys.stdin.close()
                    os.pause() if hasattr(os, "pause") else __import__("signal").pause()
                say(child=child)
            elif command == "popen":
                child = held[0].popen(["sleep", "300"], stdin=subprocess.DEVNULL)
                say(child=child.pid)
            elif command == "loop":
                log, rounds = HoldLog(arguments[0]), int(arguments[1])
                for _ in range(rounds):
                    with pool.gpu(timeout=50) as gpu, log.holding(gpu.uuid, gpu.fencing_token):
                        pass
                say(rounds=rounds, waits=pool.stats()["queued"])
            elif command == "no-collector":
                gc.disable()
                say(collecting=gc.isenabled())
            elif command == "leases":
                say(leases=[[list(info.cards), info.holder.name] for info in pool._state.engine.arbiter.leases()])
            else:
                say(error=f"unknown command {command}")
        except AcquireTimeout as exc:
            say(timeout=str(exc))
        except Exception as exc:
            say(error=f"{type(exc).__name__}: {exc}")
    pool.close()


if __name__ == "__main__":
    main()
