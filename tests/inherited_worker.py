"""
A process that acquires, and starts others like itself on what it has, as it is told; for tests of `gpu.popen`.

Reads commands from the socket whose descriptor is its first argument, one a line, and answers each with one line of
JSON.  The socket is the test's, so the test can talk to a command whose parent is gone.  The second argument says as
JSON what its pool is made of; without ``cards`` it has those that there are.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from typing import Any

from cards import HERE, Cards
from gpupool_sync import AcquireTimeout, Endpoint, GPUPool, devices
from helpers import HoldLog


def make_pool(cards: int | None = None, server: str | None = None, redis: str | None = None, **options: Any) -> GPUPool:
    if cards is not None:
        devices.open_reader = lambda: Cards(cards)  # type: ignore[assignment]
        devices.host_identity = lambda: HERE  # type: ignore[assignment]
    if redis is not None:
        from gpupool_sync.leases import redis as module

        # A server that has just started would grant nothing for minutes.
        module._stores[redis] = module.RedisStore(redis, quarantine=0.0)
        options["lease_store"] = redis
    endpoints = None if server is None else [Endpoint(server, name="here", local=True)]
    return GPUPool(endpoints, **{"poll_interval": 60.0, **options})


def start(gpu: Any, number: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-W", "error", __file__, str(number), "{}"]
    start_it = subprocess.Popen if gpu is None else gpu.popen
    child: subprocess.Popen[bytes] = start_it(command, pass_fds=(number,), stdin=subprocess.DEVNULL)
    os.close(number)
    return child


def main() -> None:
    number = int(sys.argv[1])
    pool = make_pool(**json.loads(sys.argv[2]))
    held: list[Any] = []
    children: list[subprocess.Popen[bytes]] = []
    told: list[str] = []
    connection = socket.socket(fileno=os.dup(number))
    os.close(number)
    file = connection.makefile("rw")

    def say(**answer: object) -> None:
        file.write(json.dumps(answer) + "\n")
        file.flush()

    def on_lost(gpu: Any) -> None:
        told.append(repr(gpu))

    say(ready=os.getpid())
    for line in file:
        command, *arguments = line.split(maxsplit=1)
        options = json.loads(arguments[0]) if arguments else {}
        try:
            if command == "acquire":
                gpu = pool.acquire(on_lost=on_lost, **options)
                held.append(gpu)
                say(
                    cards=[card.key for card in gpu._all_cards],
                    names=[card.global_gpu_id for card in gpu._all_cards],
                    token=gpu.fencing_token,
                    scope=gpu.scope,
                    arbiter=gpu._tie.grant.store.description,
                    id=gpu._tie.grant.id,
                )
            elif command == "release":
                held.pop(0).release()
                say(released=True)
            elif command == "close":
                pool.close()
                say(closed=True)
            elif command in ("popen", "spawn"):
                # The descriptor comes over the socket: a process that has it is what the test talks to.
                say(where=None)
                _, fds, _, _ = socket.recv_fds(connection, 1, 1)
                gpu = None if command == "spawn" else held[0]
                if "only" in options:
                    gpu = gpu[options["only"]]
                children.append(start(gpu, fds[0]))
                say(child=children[-1].pid)
            elif command == "wait":
                say(returned=children.pop(0).wait(100))
            elif command == "lost":
                say(lost=held[0].lost, told=told)
            elif command == "check":
                held[0].check()
                say(good=True)
            elif command == "loop":
                log = HoldLog(options["log"])
                for _ in range(options["rounds"]):
                    with pool.gpu(timeout=150) as gpu, log.holding(gpu.uuid):
                        pass
                say(rounds=options["rounds"])
            elif command == "look":
                say(environ=dict(os.environ), fds=sorted(os.listdir("/proc/self/fd")))
            elif command == "quit":
                break
            else:
                say(error=f"unknown command {command}")
        except AcquireTimeout as exc:
            say(timeout=str(exc))
        except Exception as exc:
            say(error=f"{type(exc).__name__}: {exc}")
    pool.close()
    file.close()
    connection.close()


if __name__ == "__main__":
    main()
