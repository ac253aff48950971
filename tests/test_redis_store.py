"""The arbiter in Redis: the contract of all stores, and what only it has: ttl, restarts, lost data, other processes."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import logging
import os
import random
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

pytest.importorskip("redis", reason="redis-py is not installed")

import test_leases_contract as contract
from gpupool_sync.clock import boottime
from gpupool_sync.errors import ConfigError, LeaseLost, LeaseStoreError, MissingExtra
from gpupool_sync.leases import redis as module
from gpupool_sync.leases.base import Claim, Granted, Queued, Refused, Share, Wanted
from gpupool_sync.leases.memory import MemoryStore
from gpupool_sync.leases.redis import GONE_TIME, MAX_TTL, TICKET_TTL, RedisStore, redis_store
from gpupool_sync.leases.tickets import ANSWER_TIME
from helpers import HoldLog, eventually
from redis_server import RedisServer, needs_redis

# Every test of the contract, with the fixtures of this file.
from test_leases_contract import *  # noqa: F403
from test_leases_contract import Hints, claim, granted, holder

pytestmark = needs_redis

HERE = Path(__file__).parent
_namespaces = itertools.count()


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory) -> Iterator[RedisServer]:
    """A server for all tests that do not harm it; each has a namespace of its own."""
    server = RedisServer(tmp_path_factory.mktemp("redis")).start()
    yield server
    server.kill()


@pytest.fixture
def server(tmp_path) -> Iterator[RedisServer]:
    """A server of the test's own, not started yet."""
    made = RedisServer(tmp_path / "redis")
    yield made
    made.kill()


@pytest.fixture
def namespace():
    return f"test-{next(_namespaces)}"


@pytest.fixture
def clock():
    return contract.Clock()


@pytest.fixture
def stores(namespace):
    """Makes stores as different processes have them: each with connections and a list of hints of its own."""
    made = []

    def make(server, **options) -> RedisStore:
        made.append(RedisStore(server.url, **{"namespace": namespace, "quarantine": 0.0, **options}))
        return made[-1]

    yield make
    for store in made:
        store.close()


@pytest.fixture
def store(stores, shared_server, clock) -> RedisStore:
    return stores(shared_server, clock=clock)


@pytest.fixture
def workers(namespace):
    """Starts `redis_worker.py` processes and ends them, stopped ones too."""
    made = []

    def start(server, name="worker") -> Worker:
        made.append(Worker(server.url, namespace, name))
        return made[-1]

    yield start
    for worker in made:
        worker.kill()


class Worker:
    """A `redis_worker.py` process."""

    def __init__(self, url, namespace, name) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", str(HERE / "redis_worker.py"), url, namespace, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])},
        )
        assert self.answer()["ready"] == self.process.pid

    def tell(self, *words) -> None:
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()

    def answer(self, timeout=120.0) -> dict:
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            assert selector.select(timeout), "the worker answers"
        line = self.process.stdout.readline()
        assert line, "the worker lives"
        return json.loads(line)

    def ask(self, *words) -> dict:
        self.tell(*words)
        return self.answer()

    def signal(self, number) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(60.0)
        self.process.stdin.close()
        self.process.stdout.close()


# -- ttl -------------------------------------------------------------------------------------------------------


def test_a_lease_that_is_not_renewed_ends(store, clock):
    """A card comes back when its holder has been silent for the ttl, and the holder is told."""
    stale = claim("a", who="a", ttl=10.0)
    first = store.claim(stale).lease
    clock.advance(9.9)
    assert isinstance(store.claim(claim("a", who="b")), Refused)
    clock.advance(0.2)
    # What is left of its holder may still compute there, until a reading from after the end shows the card empty.
    assert store.claim(claim("a", who="b", emptied={"a": 0.15})).reasons["a"].code == "closed"
    assert store.closed() == {"a": pytest.approx(clock() - 0.1)}
    fresh = store.claim(claim("a", who="b", ttl=10.0, emptied={"a": 0.05})).lease

    assert fresh.token > first.token
    assert store.renew([stale.id]) == {stale.id: False}
    with pytest.raises(LeaseLost):
        store.claim(stale)
    assert store.released_at("a") is None, "nobody said that the card's memory is free"


def test_a_renewal_restarts_the_ttl(store, clock):
    """Who renews in time keeps the card as long as it likes, and its token."""
    wish = claim("a", ttl=10.0)
    lease = store.claim(wish).lease
    for _ in range(5):
        clock.advance(9.0)
        assert store.renew([wish.id]) == {wish.id: True}

    assert store.claim(wish) == Granted(lease)
    assert lease.ttl == 10.0
    (info,) = store.leases()
    assert (info.since, info.expires_in) == (45.0, 10.0)


def test_a_ttl_has_a_limit(store, clock):
    """No claim can outlive the quarantine that follows a loss of data."""
    wish = claim("a", ttl=86400.0)

    assert store.claim(wish).lease.ttl == MAX_TTL
    clock.advance(MAX_TTL + 0.1)
    granted(store.claim(claim("a", who="b", emptied={"a": 0.0})))


def test_an_expiry_is_hinted_to_the_next_in_line(store, clock):
    """Whoever speaks first after an expiry wakes the waiter."""
    hints = Hints(store)
    store.claim(claim("a", ttl=10.0))
    wish = claim("a", who="b", queue=True)
    store.claim(wish)
    clock.advance(4.0)
    store.claim(wish)
    clock.advance(4.0)
    store.claim(wish)
    clock.advance(3.0)
    assert store.leases() == []

    assert hints.take() == [wish.id]


def test_ids_are_remembered_for_ten_minutes(store, clock):
    """A delayed duplicate is turned away for longer than anything in a network lives."""
    wish = claim("a")
    store.claim(wish)
    store.release([wish.id])
    clock.advance(GONE_TIME - 1.0)
    with pytest.raises(LeaseLost):
        store.claim(wish)


def test_the_ticket_of_a_silent_waiter_is_dropped(store, clock):
    """Dead waiters do not stand in the queue, and one that comes back has its old place by its waiting time."""
    store.claim(claim("a"))
    silent, other = claim("a", who="silent", queue=True), claim("a", who="other", queue=True)
    store.claim(silent)
    clock.advance(TICKET_TTL - 1.0)
    store.claim(other)
    clock.advance(1.5)

    assert [ticket.holder.name for ticket in store.queue()] == ["other"]
    assert store.claim(attrs.evolve(silent, waited=TICKET_TTL + 0.5)) == Queued(0)


# -- the same as in memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(8))
def test_the_order_of_service_is_that_of_the_other_stores(stores, shared_server, number, monkeypatch):
    """Whatever is asked in whatever order, this arbiter decides and hints as the one in memory does."""
    monkeypatch.setattr(module, "TICKET_TTL", 1e6)  # the other one never drops a ticket by itself
    seed = random.randrange(1 << 30)
    print(f"seed {seed} of run {number}")
    rng = random.Random(seed)
    clock = contract.Clock()
    ours, theirs = stores(shared_server, clock=clock), MemoryStore(clock=clock)
    told = [Hints(ours), Hints(theirs)]
    shares = [None, None, None, Share(places=2), Share(places=3), Share(memory_mb=3000.0), Share(memory_mb=5000.5)]
    wishes: list[Claim] = []
    for _ in range(120):
        action = rng.choice(["new", "new", "again", "release", "advance"])
        if action == "new" or not wishes:
            cards = [rng.sample("abcd", rng.randint(1, 4)), rng.sample("wxyz", rng.randint(1, 3))]
            share = rng.choice(shares)
            count = rng.choice([1, 1, 2, 3]) if share is None else 1
            wishes.append(
                claim(
                    groups=cards[: rng.randint(1, 2)],
                    count=count,
                    share=share,
                    room=8000.0,
                    queue=rng.random() < 0.8,
                    reserve=rng.random() < 0.8,
                    waited=rng.choice([0.0, 0.0, 2.5]),
                    who=str(len(wishes)),
                )
            )
            action = "again"
            wish = wishes[-1]
        else:
            wish = rng.choice(wishes)
        if action == "again":
            wish = attrs.evolve(wish, waited=rng.choice([wish.waited, 7.0]))
            outcomes = []
            for store in (ours, theirs):
                try:
                    outcome = store.claim(wish)
                    if isinstance(outcome, Granted):
                        outcomes.append(outcome.lease.cards)
                    elif isinstance(outcome, Queued):
                        outcomes.append(outcome.position)
                    else:
                        outcomes.append({key: reason.text for key, reason in outcome.reasons.items()})
                except LeaseLost:
                    outcomes.append("gone")
            assert outcomes[0] == outcomes[1]
        elif action == "release":
            wishes.remove(wish)
            for store in (ours, theirs):
                store.release([wish.id])
        else:
            clock.advance(rng.choice([0.25, 0.5, 1.0, 3.0]) / 2)
            for lease_id in [each.id for each in wishes]:
                ours.renew([lease_id])
        assert told[0].take() == told[1].take()
        assert [ticket.holder for ticket in ours.queue()] == [ticket.holder for ticket in theirs.queue()]


# -- other processes -------------------------------------------------------------------------------------------


def test_a_release_elsewhere_wakes_the_listener(stores, shared_server):
    """The waiter of another process is told of the card, and since when it is free."""
    here, there = stores(shared_server), stores(shared_server)
    hints = Hints(here)
    held, wish = claim("a", who="there"), claim("a", who="here", queue=True)
    there.claim(held)
    assert isinstance(here.claim(wish), Queued)
    here.listen(0.001)
    assert here.is_held("a")
    before = boottime()
    there.release([held.id])
    here.listen(20.0)

    assert hints.take() == [wish.id]
    assert not here.is_held("a")
    assert here.released_at("a") >= before
    assert granted(here.claim(wish)) == ("a",)


def test_a_refusal_tells_who_holds_the_card(stores, shared_server):
    """What was learned by asking is known without asking, for a while."""
    here, there = stores(shared_server), stores(shared_server)
    there.claim(claim("a", who="alice", note="training", ttl=60.0))
    assert not here.is_held("a")
    assert isinstance(here.claim(claim("a", who="bob")), Refused)

    assert here.is_held("a")
    (info,) = here.holders_of("a")
    assert (info.holder.name, info.note) == ("alice", "training")
    assert 50.0 < info.expires_in <= 60.0


def test_what_was_read_of_others_is_not_believed_for_long(stores, shared_server, clock):
    """A process that hears nothing does not take a card for held for ever."""
    here, there = stores(shared_server, clock=clock), stores(shared_server, clock=clock)
    there.claim(claim("a", who="alice"))
    here.leases()
    assert here.is_held("a")
    clock.advance(module.BELIEVED)

    assert not here.is_held("a")
    assert here.holders_of("a") == ()


def test_a_killed_holder_loses_its_card_to_a_waiter(stores, workers, shared_server):
    """After kill -9 the card is granted to who waits for it when the ttl has passed, and not before."""
    ttl = 1.5
    worker = workers(shared_server)
    sent = time.monotonic()
    token = worker.ask("acquire", ttl, "a")["token"]
    worker.kill()
    store = stores(shared_server)
    wish = claim("a", who="waiter", queue=True)
    lease = eventually(lambda: getattr(store.claim(attrs.evolve(wish, emptied={"a": 0.0})), "lease", None))

    assert time.monotonic() - sent >= ttl - 0.05
    assert lease.token > token


def test_processes_racing_for_two_cards_never_overlap(workers, shared_server, tmp_path):
    """Six processes that wait by hints share two cards: no double hold, growing tokens, everybody served."""
    path = tmp_path / "holds"
    racing = [workers(shared_server, str(number)) for number in range(6)]
    for worker in racing:
        worker.tell("loop", path, 40, "a", "b")
    for worker in racing:
        assert worker.answer(150.0) == {"done": 40}
    log = HoldLog(path)

    assert len(log.holds()) == 6 * 40
    assert log.overlaps() == []
    assert log.token_regressions() == []


def test_a_stopped_waiter_delays_the_next_by_a_second_and_keeps_its_place(stores, workers, shared_server):
    """A suspended process at the head of the queue is passed over, and served when it goes on."""
    store = stores(shared_server)
    held = claim("a", ttl=60.0)
    store.claim(held)
    stopped, other = workers(shared_server, "stopped"), workers(shared_server, "other")
    stopped.tell("acquire", 60.0, "a")
    eventually(lambda: len(store.queue()) == 1)
    stopped.signal(signal.SIGSTOP)
    other.tell("acquire", 60.0, "a")
    eventually(lambda: any(ticket.holder.name == "other" for ticket in store.queue()))
    begun = time.monotonic()
    store.release([held.id])

    assert other.answer()["cards"] == ["a"]
    # What the stopped one said last may have been a moment before, not after, the release.
    assert time.monotonic() - begun < ANSWER_TIME + 10.0
    stopped.signal(signal.SIGCONT)
    eventually(lambda: [ticket.holder.name for ticket in store.queue()] == ["stopped"])
    other.ask("release")
    assert stopped.answer()["cards"] == ["a"]


def test_a_forked_child_has_connections_of_its_own(stores, shared_server):
    """The child forgets the parent's leases, releases none, and its talk is not mixed with the parent's."""
    store = stores(shared_server)
    mine = claim("a")
    store.claim(mine)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            known = store.is_held("a")
            for _ in range(50):
                assert [info.cards for info in store.leases()] == [("a",)]
            assert not known
            granted(store.claim(claim("a", "b", who="child", id="child")))
            store.release(["child"])
            code = 0
        finally:
            os._exit(code)
    for _ in range(50):
        assert store.renew([mine.id]) == {mine.id: True}

    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert [info.cards for info in store.leases()] == [("a",)]
    assert store.is_held("a")


def test_pools_of_one_process_share_a_store(shared_server):
    """Two pools that name the same Redis are one process to it, with one listener."""
    assert redis_store(shared_server.url) is redis_store(shared_server.url)


# -- restarts and lost data ------------------------------------------------------------------------------------


def test_leases_survive_a_restart_with_an_append_only_file(tmp_path, stores):
    """Who held a card before the restart holds it afterwards, without a quarantine, and tokens go on growing."""
    server = RedisServer(tmp_path / "aof", appendonly=True).start()
    try:
        store = stores(server)
        wish, released = claim("a", ttl=60.0), claim("b")
        before = store.claim(wish).lease
        token = store.claim(released).lease.token
        store.release([released.id])
        server.restart()
        later = stores(server, quarantine=300.0)

        assert isinstance(later.claim(claim("a", who="other")), Refused)
        assert store.renew([wish.id]) == {wish.id: True}
        assert store.claim(wish).lease == before
        assert later.claim(claim("b", who="other")).lease.token > token
        with pytest.raises(LeaseLost):
            later.claim(released)
    finally:
        server.kill()


def test_leases_are_extended_by_a_restart(tmp_path, stores, clock):
    """Nobody could renew while the arbiter was down, so nobody loses a card by that."""
    server = RedisServer(tmp_path / "aof", appendonly=True).start()
    try:
        store = stores(server, clock=clock)
        wish = claim("a", ttl=10.0)
        store.claim(wish)
        server.kill()
        clock.advance(60.0)
        server.start()

        assert isinstance(store.claim(claim("a", who="other")), Refused)
        assert store.renew([wish.id]) == {wish.id: True}
    finally:
        server.kill()


def test_after_a_loss_of_data_nothing_is_granted_until_old_leases_have_ended(server, stores):
    """A restart without persistence leads to no double hold: holders renew, newcomers wait for the quarantine."""
    server.start()
    keeps, dies = claim("a", ttl=60.0), claim("b", ttl=2.0)
    store = stores(server)
    tokens = [store.claim(wish).lease.token for wish in (keeps, dies)]
    server.restart()
    other = stores(server, quarantine=4.0)
    refused = other.claim(claim("b", "c", who="other", queue=True))

    assert isinstance(refused, Refused)
    assert refused.reasons["b"].code == "quarantine"
    assert str(refused.reasons["b"]).startswith("quarantine after a restart")
    assert store.renew([keeps.id]) == {keeps.id: True}
    assert store.claim(keeps).lease.token == tokens[0]
    wish = claim("a", "b", who="other", queue=True)
    lease = eventually(lambda: getattr(other.claim(wish), "lease", None))
    assert lease.cards == ("b",)
    assert lease.token > max(tokens)
    assert store.renew([dies.id]) == {dies.id: False}


def test_a_lease_that_was_over_is_not_brought_back(server, stores, clock):
    """A renewal in the quarantine restores only what had not expired by the holder's own count."""
    server.start()
    store = stores(server, clock=clock, quarantine=0.0)
    wish = claim("a", ttl=10.0)
    store.claim(wish)
    server.restart()
    stores(server, clock=clock, quarantine=300.0).leases()
    clock.advance(10.0)

    assert store.renew([wish.id]) == {wish.id: False}
    assert not store.is_held("a")


def test_a_restart_from_a_snapshot_is_a_loss_of_data(server, stores):
    """What was granted after the last save point is not in the snapshot, so the quarantine applies."""
    server.start()
    store = stores(server)
    store.claim(claim("a"))
    server.snapshot()
    store.claim(claim("b"))
    server.restart()

    outcome = stores(server, quarantine=300.0).claim(claim("b", who="other"))
    assert outcome.reasons["b"].code == "quarantine"


def test_a_redis_that_has_been_up_for_long_needs_no_quarantine(shared_server, stores):
    """The first pool at a running Redis starts at once: there is nobody whose lease was lost."""
    eventually(lambda: _uptime(shared_server) >= 1)

    granted(stores(shared_server, quarantine=1.0).claim(claim("a")))


def _uptime(server):
    import redis

    with redis.Redis.from_url(server.url) as client:
        return client.info("server")["uptime_in_seconds"]


# -- fail closed -----------------------------------------------------------------------------------------------


def test_a_server_that_is_down_grants_nothing_and_is_used_again_when_it_is_back(server, stores):
    """Every method says at once that the arbiter cannot be asked, and works again afterwards."""
    server.start()
    store = stores(server)
    wish = claim("a")
    store.claim(wish)
    server.kill()
    calls = [
        lambda: store.claim(claim("b")),
        lambda: store.renew([wish.id]),
        lambda: store.release(["other"]),
        lambda: store.withdraw(["other"]),
        lambda: store.listen(1.0),
        store.leases,
        store.queue,
    ]
    for call in calls:
        begun = time.monotonic()
        with pytest.raises(LeaseStoreError, match="cannot be asked"):
            call()
        assert time.monotonic() - begun < 10.0
    assert store.is_held("a"), "held leases stay, as far as is known here"
    server.start()

    granted(store.claim(claim("b")))


def test_a_server_that_hangs_is_not_waited_for_for_ever(server, stores, monkeypatch):
    """A silent server is an error after the timeout, and nothing is sent twice to it."""
    monkeypatch.setattr(module, "OPERATION_TIMEOUT", 0.5)
    server.start()
    store = stores(server)
    store.leases()
    server.pause()
    wish = claim("a")
    begun = time.monotonic()
    with pytest.raises(LeaseStoreError):
        store.claim(wish)
    assert time.monotonic() - begun < 10.0
    server.go_on()

    # The claim may have arrived after all: repeating it finds out, and never takes a second card.
    granted(store.claim(wish))
    assert len(store.leases()) == 1


def test_no_message_shows_the_password(tmp_path, stores, caplog):
    """Descriptions, errors and logs do not carry credentials."""
    caplog.set_level(logging.DEBUG)
    server = RedisServer(tmp_path / "redis", options=("--requirepass", "right-secret"))
    server.start(password="right-secret")
    try:
        wrong = RedisStore(server.url.replace("//", "//:wrong-secret@"))
        with pytest.raises(LeaseStoreError) as error:
            wrong.leases()
        right = RedisStore(server.url.replace("//", "//:right-secret@"), quarantine=0.0)
        granted(right.claim(claim("a")))
        right.close()
        wrong.close()
    finally:
        server.kill()

    assert wrong.description == f"redis://127.0.0.1:{server.port}/0"
    assert "secret" not in f"{error.value} {wrong!r} {right!r} {caplog.text}"


@pytest.mark.parametrize("url", ["http://host", "redis://host:port", "nonsense"])
def test_a_url_that_cannot_be_used_is_a_configuration_error(url):
    """A typing error is found before the first claim."""
    with pytest.raises(ConfigError):
        RedisStore(url)


def test_a_full_server_grants_nothing(server, stores):
    """Where nothing can be written down, nothing is granted."""
    server.start()
    store = stores(server)
    wish = claim("a", who="x" * 1000)
    store.leases()
    assert server.command("CONFIG", "SET", "maxmemory", "1") == "+OK"
    with pytest.raises(LeaseStoreError):
        store.claim(wish)
    assert store.leases() == []
    assert server.command("CONFIG", "SET", "maxmemory", "0") == "+OK"

    granted(store.claim(wish))


def test_a_server_that_may_evict_is_warned_of_once(server, stores, caplog):
    """An eviction would be a lease that nobody released."""
    server.start()
    assert server.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru") == "+OK"
    store = stores(server)
    store.leases()
    store.listen(0.001)

    assert [record.message for record in caplog.records if "maxmemory-policy" in record.message] == [
        f"{store.description} has maxmemory-policy allkeys-lru: it may drop leases when it is full; "
        "set it to noeviction"
    ]


def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch):
    """Who has no redis-py is told what to type."""
    monkeypatch.setitem(sys.modules, "redis", None)
    spec = importlib.util.spec_from_file_location("without_redis", module.__file__)

    with pytest.raises(MissingExtra, match=r"pip install 'gpupool-sync\[redis\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_a_claim_of_many_cards_is_read_whole(store):
    """Hundreds of cards in one wish, each held by somebody, are no problem for the scripts."""
    cards = [f"card-{number:04}" for number in range(1200)]
    for card in cards[:20]:
        store.claim(claim(card))
    wish = Claim(id="many", holder=holder("many"), groups=(tuple(map(Wanted, cards)),), count=1000, queue=True)

    assert granted(store.claim(wish)) == tuple(cards[20:1020])
    store.release(["many"])
    assert len(store.leases()) == 20


# -- the short way of usual claims ------------------------------------------------------------------------------


class OnlyTheLongWay(RedisStore):
    """Its scripts take nothing for usual."""

    def _told(self, name, body, *usual):
        return super()._told(name, body, "", *usual[1:]) if usual else super()._told(name, body)


def test_the_short_way_leaves_the_same_behind(shared_server, namespace, clock):
    """
    One whole card with nobody waiting is claimed and released by a few commands: answers and data are those of the
    whole script, whatever came before.
    """
    import redis

    made = {
        kind: kind(shared_server.url, namespace=namespace + kind.__name__, quarantine=0.0, clock=clock)
        for kind in (RedisStore, OnlyTheLongWay)
    }
    client = redis.Redis.from_url(shared_server.url)

    def left(kind):
        prefix = f"{{{namespace}{kind.__name__}}}:"
        hashes = {name: client.hgetall(prefix + name) for name in ("leases", "cards", "released", "closed", "wants")}
        sets = {name: client.zrange(prefix + name, 0, -1, withscores=True) for name in ("expires", "gone", "order")}
        # What is over is swept away by whoever comes by.
        sets["gone"] = [(each, until) for each, until in sets["gone"] if until > clock() * 1e6]
        return {**hashes, **sets, "token": client.get(prefix + "token")}

    short: set[str] = set()
    for kind, store in made.items():
        ask = store._told
        if kind is RedisStore:

            def noted(name, body, *usual, ask=ask):
                answer = ask(name, body, *usual)
                if isinstance(answer, list):
                    short.add(name if answer[0] else f"{name}: refused")
                return answer

            store._told = noted
    steps = random.Random(7)
    names: list[str] = []
    for number in range(200):
        clock.advance(steps.choice([0.0, 0.001, 0.5, 20.0, 70.0]))
        what = steps.random()
        if what < 0.55:
            name = steps.choice(names) if names and steps.random() < 0.2 else f"step-{number}"
            wish = claim(
                *steps.sample("abc", steps.randint(1, 3)),
                id=name,
                count=1 if steps.random() < 0.8 else 2,
                share=None if steps.random() < 0.8 else Share(places=2),
                queue=steps.random() < 0.2,
                note=steps.choice([None, "", "a note"]),
            )
            names = [*names, name][-6:]
            call = lambda store, wish=wish: store.claim(wish)  # noqa: E731
        elif what < 0.9:
            ids = steps.sample(names, min(len(names), steps.choice([1, 1, 1, 2])))
            call = lambda store, ids=ids: store.release(ids)  # noqa: E731
        else:
            call = lambda store, ids=tuple(names): store.renew(ids)  # noqa: E731
        told = []
        for store in made.values():
            try:
                told.append(call(store))
            except (LeaseStoreError, LeaseLost) as exc:
                told.append((type(exc), str(exc)))
        assert told[0] == told[1], number
        assert left(RedisStore) == left(OnlyTheLongWay), number
    assert short == {"claim", "release", "take", "take: refused"}
    for store in made.values():
        store.close()
    client.close()


def test_a_short_refusal_tells_who_has_the_cards(store):
    """Nothing is known here of others' leases until a claim is refused; also while somebody waits."""
    stranger = RedisStore(store._url, namespace=store._prefix[1:-2], quarantine=0.0, clock=store._test_clock)
    stranger.claim(claim("a", id="theirs", note="a long job"))
    stranger.claim(claim("a", id="waits", queue=True))
    assert not store.is_held("a")

    assert store.claim(claim("a", id="mine")).reasons["a"].code == "held"
    (info,) = store.holders_of("a")
    assert info.note == "a long job"
    assert info.cards == ("a",)
    assert store.crowded()

    stranger.release(["waits"])
    stranger.release(["theirs"])
    assert granted(store.claim(claim("a", id="next"))) == ("a",)
    assert not store.crowded()
    stranger.close()


def test_an_exchange_that_was_broken_off_answers_no_later_question(store, monkeypatch):
    """Ctrl-C between question and answer: what the server says to it is not taken for the answer to the next."""
    store.claim(claim("a", id="before"))
    (connection,) = store._idle
    with monkeypatch.context() as patch:

        def interrupted(*args, **kwargs):
            raise KeyboardInterrupt

        patch.setattr(connection, "read_response", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.release(["before"])
    assert granted(store.claim(claim("b", id="after"))) == ("b",)
    store.release(["before"])  # whether the first one arrived is not known
    assert [info.cards for info in store.leases()] == [("b",)]


def test_two_interrupts_leave_no_answer_behind(store, monkeypatch):
    """The second Ctrl-C comes while the connection is being closed for the first one."""
    store.claim(claim("a", id="before"))
    (connection,) = store._idle

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(connection, "read_response", interrupted)
        patch.setattr(connection, "disconnect", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.claim(claim("b", id="broken off"))
    assert granted(store.claim(claim("c", id="after"))) == ("c",)


def test_an_answer_that_nobody_asked_for_is_not_taken_for_the_next(store):
    """A proxy may say why it gives up; from then on each answer would be that to the question before."""
    store.claim(claim("a", id="before"))
    (connection,) = store._idle
    connection._sock.sendall(b"*1\r\n$5\r\nBOGUS\r\n")
    with pytest.raises(LeaseStoreError, match="BOGUS"):
        store.claim(claim("b", id="not answered"))
    assert granted(store.claim(claim("c", id="after"))) == ("c",)
    assert granted(store.claim(claim("b", id="not answered"))) == ("b",)


def test_a_card_with_very_many_shares_is_refused(store):
    """More leases than Lua can have on its stack at once, which is 8000 values."""
    script = """for i = 1, 8100 do
      redis.call('HSET', KEYS[1] .. 'leases', i, cmsgpack.pack(
        {h = ARGV[1], c = {'a'}, t = i, m = 'places', a = 9000, n = false, g = 1, l = 1e6}))
      redis.call('ZADD', KEYS[1] .. 'expires', '9e15', i)
      ARGV[i + 1] = {tostring(i), 'places', 9000}
    end
    table.remove(ARGV, 1)
    redis.call('HSET', KEYS[1] .. 'cards', 'a', cmsgpack.pack(ARGV))"""
    store.claim(claim("b", id="before"))
    store._client.eval(script, 1, store._prefix, '["h", null, "u", "x", 1]')
    assert store.claim(claim("a", id="mine")).reasons["a"].code == "held"
    assert len(store.holders_of("a")) == 8100


def test_connections_that_were_closed_meanwhile_are_opened_anew(store):
    """A server, or a firewall, may end a connection that nobody has used for a while."""
    import redis

    store.claim(claim("a", id="before"))
    with contextlib.closing(redis.Redis.from_url(store._url)) as client:
        client.client_kill_filter(_type="normal", skipme=True)
    store.release(["before"])
    store.close()
    assert granted(store.claim(claim("a", id="after"))) == ("a",)
    assert len(store._idle) == 1
