"""
A process that claims and releases in a Redis as it is told, for tests of that arbiter.

Reads commands from standard input, one a line, and answers each with one line of JSON.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
import time

import attrs

from gpupool_sync.leases.base import Claim, Granted, Holder, Lease, Wanted
from gpupool_sync.leases.redis import RedisStore
from gpupool_sync.waiting import RECHECK, Waiter, WaitingRoom, listener
from helpers import HoldLog


class Client:
    """One process' store, with the listener that pools use."""

    def __init__(self, url: str, namespace: str, name: str) -> None:
        self.store = RedisStore(url, namespace=namespace, quarantine=0.0)
        self.holder = Holder(id=os.urandom(8).hex(), name=name, user="user", host="host", pid=os.getpid())
        self._room = WaitingRoom(None)
        self._numbers = itertools.count()
        self.store.subscribe(self._room.hint)

    def wish(self, cards: list[str], ttl: float) -> Claim:
        return Claim(
            id=f"{self.holder.id}-{next(self._numbers)}",
            holder=self.holder,
            groups=(tuple(Wanted(card) for card in cards),),
            ttl=ttl,
            queue=True,
        )

    def acquire(self, wish: Claim) -> Lease:
        begun = time.monotonic()
        waiter = Waiter(wish.id)
        self._room.join(waiter)
        try:
            while True:
                outcome = self.store.claim(attrs.evolve(wish, waited=time.monotonic() - begun))
                if isinstance(outcome, Granted):
                    return outcome.lease
                listener(self.store).listen_for(self._room)
                waiter.wait(RECHECK)
        finally:
            self._room.leave(waiter)


def main() -> None:
    client = Client(*sys.argv[1:4])
    wish: Claim | None = None

    def say(**answer: object) -> None:
        print(json.dumps(answer), flush=True)

    say(ready=os.getpid())
    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "acquire":
            wish = client.wish(arguments[1:], float(arguments[0]))
            lease = client.acquire(wish)
            say(cards=lease.cards, token=lease.token)
        elif command == "release":
            assert wish is not None
            client.store.release([wish.id])
            say(released=True)
        elif command == "loop":
            log, rounds = HoldLog(arguments[0]), int(arguments[1])
            for _ in range(rounds):
                wish = client.wish(arguments[2:], 30.0)
                lease = client.acquire(wish)
                with log.holding(lease.cards[0], lease.token):
                    threading.Event().wait(0.001)
                client.store.release([wish.id])
            say(done=rounds)
    client.store.close()


if __name__ == "__main__":
    main()
