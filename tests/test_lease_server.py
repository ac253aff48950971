"""Leases from a server: to remote holders, beside local ones, across its death, and against clients that misbehave."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import signal
import socket
import threading
import warnings
from urllib.parse import urlsplit

import attrs
import pytest

from gpupool_sync.clock import boottime
from gpupool_sync.config import Endpoint, Settings
from gpupool_sync.errors import ConfigError, LeaseLost, LeaseStoreError
from gpupool_sync.leases import documents
from gpupool_sync.leases.base import Granted, Queued, Refused, Share
from gpupool_sync.leases.host import HostStore
from gpupool_sync.leases.http import HTTPStore
from gpupool_sync.server import leases as server_leases
from gpupool_sync.server.leases import GONE_TIME, MAX_BODY, Granter
from gpupool_sync.server.run import Options
from gpupool_sync.testing import FakeFleet
from helpers import HoldLog, eventually, run_threads
from lease_server import api_now, server_of_leases
from test_leases_contract import Clock, claim, granted
from test_server import running


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def url(tmp_path, clock):
    with server_of_leases(tmp_path / "locks", clock=clock) as url:
        yield url


@pytest.fixture
def stores():
    with contextlib.ExitStack() as ending:

        def make(url, clock=boottime, **settings):
            store = HTTPStore(Endpoint(url), Settings(**{"endpoint_timeout": 60.0, **settings}), clock=clock)
            ending.callback(store.close)
            return store

        yield make


def local(path, **options):
    store = HostStore(str(path), **options)
    return contextlib.closing(store)


def ask(url, method, path, body=None, content_type="application/json", headers=None):
    """One request; status, headers, document."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=90)
    try:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        extra = {} if content_type is None else {"Content-Type": content_type}
        connection.request(method, path, data, {**extra, **(headers or {})})
        answer = connection.getresponse()
        return answer.status, answer.headers, json.loads(answer.read())
    finally:
        connection.close()


def body_of(wish, ttl=60.0):
    return documents.claim_document(wish, ttl)


# -- remote and local holders ----------------------------------------------------------------------------------


@pytest.mark.real
def test_remote_and_local_holders_exclude_each_other(stores):
    """One card: whoever has it, through the server or through the lock directory, the other one has not."""
    with FakeFleet([1]) as fleet, local(fleet[0].lock_dir) as here:
        remote = stores(fleet[0].url)
        card = uuids(fleet[0].url)[0]
        mine = claim(card, who="local")
        first = here.claim(mine).lease.token
        refused = remote.claim(claim(card, who="remote"))
        assert refused.reasons[card].code == "held"
        assert remote.holders_of(card)[0].holder.name == "local"
        assert remote.is_held(card)
        here.release([mine.id])
        theirs = claim(card, who="remote")
        second = remote.claim(theirs).lease.token
        assert second > first
        assert "remote" in here.claim(claim(card)).reasons[card].text
        assert [info.holder.name for info in here.leases()] == ["remote"]
        remote.release([theirs.id])
        assert here.claim(claim(card)).lease.token > second


@pytest.mark.real
def test_who_has_asked_for_the_leases_knows_the_holders(stores):
    """Also of cards that it never claimed: displays ask, and must not call a held card free."""
    with FakeFleet([2]) as fleet:
        one, two = stores(fleet[0].url), stores(fleet[0].url)
        card, other = uuids(fleet[0].url)
        mine = claim(card, who="one")
        granted(one.claim(mine))
        shares = [claim(other, who=who, share=Share(places=3)) for who in ("one", "two")]
        granted(one.claim(shares[0]))
        granted(one.claim(shares[1]))
        assert not two.is_held(card)
        two.leases()
        assert [info.holder.name for info in two.holders_of(card)] == ["one"]
        assert [info.holder.name for info in two.holders_of(other)] == ["one", "two"]
        one.leases()
        assert [info.holder.name for info in one.holders_of(card)] == ["one"]
        one.release([mine.id])
        assert not one.is_held(card), "what this process has let go of is not held because it was told before"
        two.leases()
        assert not two.is_held(card)


@pytest.mark.real
def test_remote_and_local_waiters_stand_in_one_queue(stores):
    """A local release wakes the remote waiter at the head, and the other way round."""
    with FakeFleet([1]) as fleet, local(fleet[0].lock_dir) as here:
        remote = stores(fleet[0].url)
        card = uuids(fleet[0].url)[0]
        remote_hints, local_hints = [], []
        remote.subscribe(remote_hints.extend)
        here.subscribe(local_hints.extend)
        held = claim(card, who="holder")
        granted(here.claim(held))
        far, near = claim(card, who="far", queue=True), claim(card, who="near", queue=True)
        assert remote.claim(far) == Queued(0)
        assert here.claim(near) == Queued(1)
        assert [ticket.holder.name for ticket in remote.queue()] == ["far", "near"]
        listening = threading.Thread(target=remote.listen, args=(20.0,))
        listening.start()
        here.release([held.id])
        listening.join(30)
        assert remote_hints == [far.id]
        assert isinstance(here.claim(claim(card, who="newcomer")), Refused)
        granted(remote.claim(far))
        remote.release([far.id])
        here.listen(20.0)
        assert local_hints == [near.id]
        granted(here.claim(near))


@pytest.mark.real
def test_remote_and_local_racers_never_hold_a_card_twice(stores):
    """Threads of three clients and of the host itself race for two cards: no overlap, growing tokens."""
    log = HoldLog()
    with FakeFleet([2]) as fleet, local(fleet[0].lock_dir) as here:
        racers = [here, *(stores(fleet[0].url) for _ in range(3))]
        cards = uuids(fleet[0].url)

        def work(number):
            store = racers[number % 4]
            for _ in range(40):
                wish = claim(*cards, who=str(number))
                outcome = store.claim(wish)
                if isinstance(outcome, Granted):
                    with log.holding(outcome.lease.cards[0], outcome.lease.token):
                        pass
                    store.release([wish.id])

        run_threads(8, work)
        assert here.leases() == []
    assert log.holds()
    assert (log.overlaps(), log.token_regressions()) == ([], [])


def uuids(url) -> list[str]:
    return [gpu["uuid"] for gpu in ask(url, "GET", "/gpu/summary")[2]["gpus_summary"]]


# -- the server's death ----------------------------------------------------------------------------------------


@pytest.mark.real
def test_leases_survive_the_servers_death(stores):
    """kill -9 and restart: the holder keeps its card, nobody takes it meanwhile, and tokens grow."""
    with FakeFleet([2]) as fleet, local(fleet[0].lock_dir) as here:
        store = stores(fleet[0].url)
        card, other = uuids(fleet[0].url)
        wish = claim(card, who="alice", note="training")
        lease = store.claim(wish).lease
        fleet[0].kill()
        # The kernel has freed the lock, but alice computes on.
        assert isinstance(here.claim(claim(card)), Refused)
        with pytest.raises(LeaseStoreError):
            store.renew([wish.id])
        assert store.is_held(card)
        fleet[0].restart()
        assert store.renew([wish.id]) == {wish.id: True}
        assert store.claim(wish).lease == lease
        (info,) = store.leases()
        assert (info.holder.name, info.note, info.token) == ("alice", "training", lease.token)
        assert isinstance(here.claim(claim(card)), Refused)
        granted(here.claim(claim(other)))
        store.release([wish.id])
        assert here.claim(claim(card)).lease.token > lease.token


@pytest.mark.real
def test_a_release_that_does_not_arrive_is_told_later(stores):
    """The server is down when the card is given back: it hears of it with the next request."""
    with FakeFleet([1]) as fleet:
        store = stores(fleet[0].url)
        card = uuids(fleet[0].url)[0]
        first = claim(card)
        granted(store.claim(first))
        fleet[0].kill()
        with pytest.raises(LeaseStoreError):
            store.release([first.id])
        assert not store.is_held(card)
        fleet[0].restart()
        granted(store.claim(claim(card, who="b")))


def die(granter) -> None:
    """What kill -9 does: the kernel closes the files, and nothing else happens."""
    for held in granter.store._held.values():
        for file in held.files:
            file.close()
    granter.store._held.clear()
    granter._state.close()


def granter_in(path, clock, **options) -> Granter:
    store = HostStore(str(path), clock=clock)
    state = os.path.join(store.path, "server.state")
    return Granter(store, own=lambda key: True, state_path=state, clock=clock, **options)


def test_while_the_server_is_down_its_leases_end_with_their_ttl(tmp_path, clock):
    """A local process steps back until the remote holder must have given up; then it may have the card."""
    server = granter_in(tmp_path, clock)
    wish = claim("a", ttl=10.0)
    granted(server.claim(wish)[0])
    die(server)
    with local(tmp_path, clock=clock) as here:
        clock.advance(9.9)
        assert isinstance(here.claim(claim("a", who="b")), Refused)
        clock.advance(0.2)
        # Nobody is left to say so, but the lease has expired, so the card is closed until it is seen empty.
        assert here.claim(claim("a", who="b", emptied={"a": 0.15})).reasons["a"].code == "closed"
        granted(here.claim(claim("a", who="b", emptied={"a": 0.05})))
        again = granter_in(tmp_path, clock)
        assert again.renew([wish.id])[0] == [False]
        with pytest.raises(LeaseLost):
            again.claim(wish)
        again.close()


def test_a_restarted_server_extends_leases_by_its_downtime(tmp_path, clock):
    """Nobody could renew while it was down, so that time does not count."""
    server = granter_in(tmp_path, clock)
    wish = claim("a", ttl=10.0)
    token = server.claim(wish)[0].lease.token
    clock.advance(4.0)
    server.tick()
    die(server)
    clock.advance(5.0)
    server = granter_in(tmp_path, clock)
    clock.advance(5.9)
    server.expire()
    assert [info.token for info in server.leases()] == [token]
    clock.advance(0.1)
    server.expire()
    assert server.leases() == []
    server.close()


def test_renewals_are_remembered_too(tmp_path, clock):
    """A lease that was renewed before the server's death is as good as one just granted."""
    server = granter_in(tmp_path, clock)
    wish = claim("a", ttl=10.0)
    server.claim(wish)
    for _ in range(5):
        clock.advance(5.0)
        assert server.renew([wish.id])[0] == [True]
    server.tick()
    die(server)
    with local(tmp_path, clock=clock) as here:
        clock.advance(9.0)
        assert isinstance(here.claim(claim("a", who="b")), Refused)
    server = granter_in(tmp_path, clock)
    assert server.renew([wish.id])[0] == [True]
    server.close()


@pytest.mark.parametrize("share", [None, Share(places=2)], ids=str)
def test_a_release_just_before_the_servers_death_counts(tmp_path, clock, share):
    """The server dies before it has noted the release: the card's own record has."""
    server = granter_in(tmp_path, clock)
    wish = claim("a", share=share, ttl=60.0)
    granted(server.claim(wish)[0])
    server.release([wish.id])
    die(server)
    server = granter_in(tmp_path, clock)
    assert server.renew([wish.id])[0] == [False]
    granted(server.claim(claim("a", who="b", ttl=60.0))[0])
    server.close()


def test_a_lease_of_another_boot_is_forgotten(tmp_path, clock, monkeypatch):
    """After a reboot nobody computes there any more."""
    server = granter_in(tmp_path, clock)
    wish = claim("a", ttl=300.0)
    server.claim(wish)
    die(server)
    from gpupool_sync.leases import host

    for module in (host, server_leases):
        monkeypatch.setattr(module, "boot_id", lambda: "another-boot")
    server = granter_in(tmp_path, clock)
    assert server.leases() == []
    granted(server.claim(claim("a", who="b", ttl=10.0))[0])
    server.close()


def test_shares_survive_the_servers_death(tmp_path, clock):
    """Local processes neither take the whole card nor more than what the remote share leaves."""
    server = granter_in(tmp_path, clock)
    wish = claim("a", share=Share(memory_mb=6000.0), room=10_000.0, ttl=60.0)
    granted(server.claim(wish)[0])
    die(server)
    with local(tmp_path, clock=clock) as here:
        small = claim("a", share=Share(memory_mb=4000.0), room=10_000.0, who="b")
        granted(here.claim(small))
        assert isinstance(here.claim(claim("a", share=Share(memory_mb=1000.0), room=10_000.0)), Refused)
        here.release([small.id])
        assert isinstance(here.claim(claim("a", who="whole")), Refused)
        again = granter_in(tmp_path, clock)
        assert again.renew([wish.id])[0] == [True]
        assert isinstance(here.claim(claim("a", who="whole")), Refused)
        again.release([wish.id])
        granted(here.claim(claim("a", who="whole")))
        again.close()


def test_the_memory_of_the_server_is_for_its_user_only(tmp_path, clock):
    """Ids are in it, so nobody else may read it; and no second server uses it."""
    server = granter_in(tmp_path, clock)
    wish = claim("a", id="secret-id-of-a-lease", ttl=10.0)
    server.claim(wish)
    assert (tmp_path / "server.state").stat().st_mode & 0o777 == 0o600
    for file in tmp_path.rglob("*"):
        if file.is_file() and file.name != "server.state":
            assert wish.id not in file.read_text()
    with pytest.raises(LeaseStoreError, match="another server"):
        granter_in(tmp_path, clock)
    server.close()


def test_a_server_that_dies_amid_a_word_remembers_the_others(tmp_path, clock):
    """An incomplete last line costs the lease in it only, and what is said afterwards can be read again."""
    server = granter_in(tmp_path, clock)
    wishes = [claim(key, who=key, ttl=60.0) for key in ("a", "b")]
    for wish in wishes:
        granted(server.claim(wish)[0])
    die(server)
    with open(tmp_path / "server.state", "rb+") as file:
        file.truncate((tmp_path / "server.state").stat().st_size - 10)
    server = granter_in(tmp_path, clock)
    assert server.renew([wish.id for wish in wishes])[0] == [True, False]
    granted(server.claim(claim("c", id="c" * 32, ttl=60.0))[0])
    die(server)
    server = granter_in(tmp_path, clock)
    assert server.renew([wishes[0].id, "c" * 32])[0] == [True, True]
    server.close()


@pytest.mark.parametrize("trouble", ["full", "deleted"])
def test_the_memory_is_begun_anew_when_it_is_full_or_gone(tmp_path, clock, monkeypatch, trouble):
    """It holds what there is, however often leases came and went, and a file that was deleted is made again."""
    state = tmp_path / "server.state"
    if trouble == "full":
        monkeypatch.setattr(server_leases, "MAX_STATE", 2000)
    server = granter_in(tmp_path, clock)
    kept = claim("a", ttl=60.0)
    granted(server.claim(kept)[0])
    for number in range(10):
        if trouble == "deleted":
            state.unlink()
        wish = claim("b", id=f"{number:032x}", ttl=60.0)
        granted(server.claim(wish)[0])
        server.release([wish.id])
        assert state.stat().st_size <= 2000
    die(server)
    server = granter_in(tmp_path, clock)
    assert server.renew([kept.id])[0] == [True]
    server.close()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"v": 1}', '{"v": 1, "boot": "x", "leases": 7}'])
def test_a_garbled_memory_costs_the_leases_in_it_only(tmp_path, clock, text):
    """The server starts all the same."""
    granter_in(tmp_path, clock).close()
    (tmp_path / "server.state").write_text(text)
    server = granter_in(tmp_path, clock)
    granted(server.claim(claim("a", ttl=10.0))[0])
    server.close()


# -- time ------------------------------------------------------------------------------------------------------


def test_a_lease_that_is_not_renewed_ends(url, clock, stores, caplog):
    """At its ttl by the server's clock; the id is gone for good, and the log names the holder, not the id."""
    store = stores(url, clock)
    wish = claim("a", who="alice", ttl=10.0, id="secret-id-of-a-lease")
    token = store.claim(wish).lease.token
    clock.advance(9.0)
    assert store.renew([wish.id]) == {wish.id: True}
    clock.advance(9.9)
    assert isinstance(stores(url).claim(claim("a", who="b")), Refused)
    clock.advance(0.1)
    other = stores(url)
    with caplog.at_level(logging.INFO):
        assert other.claim(claim("a", who="b")).reasons["a"].code == "closed"
    assert set(other.closed()) == {"a"}
    clock.advance(0.1)
    assert other.claim(claim("a", who="b", emptied={"a": 0.05})).lease.token > token
    assert store.renew([wish.id]) == {wish.id: False}
    assert not store.is_held("a")
    with pytest.raises(LeaseLost):
        store.claim(wish)
    assert "alice" in caplog.text
    assert wish.id not in caplog.text


def test_an_expired_lease_is_offered_to_who_waits(url, clock, stores):
    """The server looks at its clock by itself, and hints."""
    store = stores(url, clock)
    hints = []
    store.subscribe(hints.extend)
    granted(store.claim(claim("a", ttl=10.0)))
    waits = claim("a", who="b", queue=True)
    store.claim(waits)
    clock.advance(10.0)
    eventually(lambda: (store.listen(1.0), hints)[1], message="the hint comes")
    assert set(hints) == {waits.id}
    clock.advance(0.1)
    granted(store.claim(attrs.evolve(waits, emptied={"a": 0.05})))


def test_repeating_a_claim_begins_its_ttl_anew(url, clock, stores):
    """A holder counts from its last request, so the server does too."""
    store = stores(url, clock)
    wish = claim("a", ttl=10.0)
    store.claim(wish)
    clock.advance(9.0)
    store.claim(wish)
    clock.advance(9.0)
    assert store.renew([wish.id]) == {wish.id: True}


def test_a_delayed_duplicate_is_gone_for_ten_minutes(url, clock, stores):
    """Released, withdrawn or never seen: a claim of that id that comes late gets nothing."""
    store = stores(url, clock)
    released, withdrawn = claim("a"), claim("a", who="b", queue=True)
    store.claim(released)
    store.claim(withdrawn)
    store.withdraw([withdrawn.id])
    store.release([released.id, "never-seen"])
    clock.advance(GONE_TIME)
    for each in (released.id, withdrawn.id, "never-seen"):
        status, _, document = ask(url, "POST", "/v1/leases", body_of(claim("a", id=each)))
        assert (status, document["error"]["code"]) == (410, "gone")
    assert store.leases() == []


def test_a_lost_answer_leaks_no_card(url, clock, stores):
    """A client that did not hear of its lease finds it by asking again, or gives it back by its id."""
    wish = claim("a", "b")
    first = ask(url, "POST", "/v1/leases", body_of(wish))[2]
    second = ask(url, "POST", "/v1/leases", body_of(wish))[2]
    assert first == second
    assert len(ask(url, "GET", "/v1/leases")[2]["leases"]) == 1
    stores(url, clock).release([wish.id])
    assert ask(url, "GET", "/v1/leases")[2]["leases"] == []


def test_repeats_at_the_same_time_take_one_card(url):
    """Of eight copies of one claim that arrive at once, all get the same card."""
    wish = claim(*"abcdefgh")
    answers = run_threads(8, lambda number: ask(url, "POST", "/v1/leases", body_of(wish))[2]["cards"])
    assert answers == [answers[0]] * 8
    assert len(ask(url, "GET", "/v1/leases")[2]["leases"]) == 1


def test_the_ticket_of_a_silent_holder_is_withdrawn(url, clock, stores):
    """Who neither claims nor waits for five seconds stands in nobody's way, and may come back."""
    store = stores(url, clock)
    held = claim("a")
    store.claim(held)
    silent, patient = claim("a", who="silent", queue=True), claim("a", who="patient", queue=True)
    store.claim(silent)
    store.claim(patient)
    clock.advance(4.0)
    ask(url, "POST", "/v1/wait", {"holder": patient.holder.id, "timeout": 0})
    clock.advance(1.1)
    eventually(lambda: [ticket.holder.name for ticket in store.queue()] == ["patient"], message="one ticket goes")
    assert store.claim(silent) == Queued(1)


def test_holders_who_fall_silent_together_are_withdrawn_together(url, clock, stores, monkeypatch):
    """Who stands behind them is told when all are gone, once: a thousand looks at a thousand tickets take long."""
    store = stores(url, clock)
    store.claim(claim("a"))
    for number in range(20):
        store.claim(claim("a", who=f"silent-{number}", queue=True))
    patient = claim("a", who="patient", queue=True)
    store.claim(patient)
    locks = api_now().granter.store
    told, pass_on = [], locks.pass_on

    def noted():
        told.append([ticket.holder.name for ticket in locks.queue()])
        pass_on()

    monkeypatch.setattr(locks, "pass_on", noted)
    clock.advance(4.0)
    ask(url, "POST", "/v1/wait", {"holder": patient.holder.id, "timeout": 0})
    clock.advance(1.1)
    eventually(lambda: told, message="their tickets are withdrawn")
    assert told == [["patient"]]


def test_a_waiter_that_vanishes_is_noticed(url, clock, stores):
    """Its connection ends, its long poll with it, and its ticket five seconds later."""
    store = stores(url, clock)
    store.claim(claim("a"))
    wish = claim("a", who="w", queue=True)
    store.claim(wish)
    waiting = poll(url, wish.holder.id)
    eventually(lambda: api_now()._number == 1, message="it waits")
    clock.advance(100.0)
    api_now().granter.expire()
    assert len(store.queue()) == 1
    waiting.close()
    eventually(lambda: api_now()._number == 0, message="its end is noticed")
    clock.advance(5.1)
    eventually(lambda: store.queue() == [], message="its ticket goes")


# -- many, and bounds ------------------------------------------------------------------------------------------


def poll(url, holder, timeout=25) -> socket.socket:
    """A long poll whose answer is not read yet."""
    place = urlsplit(url)
    body = json.dumps({"holder": holder, "timeout": timeout}).encode()
    head = f"POST /v1/wait HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection = socket.create_connection((place.hostname, place.port), timeout=90)
    connection.sendall(head.encode() + body)
    return connection


def answer_to(connection):
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    return json.loads(answer.read())


def test_two_hundred_waiters_need_no_threads(url, clock, stores):
    """Each long poll is a connection and nothing more, and each is answered at its own hint."""
    store = stores(url, clock)
    store.claim(claim("other"))  # the threads that every request needs are there
    held = claim("a")
    store.claim(held)
    first = claim("a", who="0", queue=True)
    store.claim(first)
    before = threading.active_count()
    polls = [poll(url, f"holder-{number}") for number in range(200)]
    try:
        eventually(lambda: api_now()._number == 200, message="all wait")
        assert threading.active_count() <= before + 4
        store.release([held.id])
        assert answer_to(polls[0]) == {"hints": [documents.digest(first.id)]}
        eventually(lambda: api_now()._number == 199, message="the others wait on")
    finally:
        for connection in polls:
            connection.close()
    eventually(lambda: api_now()._number == 0, message="all are gone")


def test_too_many_waiters_are_turned_away(url, monkeypatch):
    """With 503 and Retry-After, not by falling over."""
    monkeypatch.setattr(api_now(), "most_waiters", 1)
    connection = poll(url, "first")
    eventually(lambda: api_now()._number == 1, message="it waits")
    status, headers, document = ask(url, "POST", "/v1/wait", {"holder": "second", "timeout": 25})
    assert (status, headers["Retry-After"], document["error"]["code"]) == (503, "1", "busy")
    connection.close()


def test_too_many_tickets_are_turned_away(url, clock, stores, monkeypatch):
    """The queue has a bound; who stands in it already may go on asking."""
    monkeypatch.setattr(server_leases, "MAX_TICKETS", 1)
    store = stores(url, clock)
    store.claim(claim("a"))
    first = claim("a", who="b", queue=True)
    store.claim(first)
    with pytest.raises(LeaseStoreError, match=r"503.*wait here already"):
        store.claim(claim("a", who="c", queue=True))
    assert store.claim(first) == Queued(0)


def test_long_polls_end_with_the_server(url):
    """A server that is told to stop does not wait for its waiters."""
    connection = poll(url, "anybody")
    eventually(lambda: api_now()._number == 1, message="it waits")
    api_now().stopping = lambda: True
    assert answer_to(connection) == {"hints": []}
    connection.close()


# -- bad requests ----------------------------------------------------------------------------------------------


def test_a_body_that_is_too_large_is_refused(url):
    """Announced or not, more than a mebibyte is not read."""
    head = b"POST /v1/leases HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    announced = [b"Content-Length: %d\r\n\r\n" % (MAX_BODY + 1)]
    # No byte after the one too many: the server hangs up, and what it has not read would cost us its answer.
    chunked = [b"Transfer-Encoding: chunked\r\n\r\n", *[b"10000\r\n" + b" " * 0x10000 + b"\r\n"] * 16, b"1\r\n "]
    place = urlsplit(url)
    for pieces in (announced, chunked):
        with socket.create_connection((place.hostname, place.port), timeout=90) as connection:
            for piece in (head, *pieces):
                connection.sendall(piece)
            assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"nonsense", 400),
        (b"[1]", 400),
        (b'{"id": NaN}', 400),
        (b"{}", 422),
        (b"[" * 100_000, 400),
    ],
    ids=["empty", "no JSON", "a list", "NaN", "no fields", "deep"],
)
@pytest.mark.parametrize("path", ["/v1/leases", "/v1/leases/renew", "/v1/leases/release", "/v1/wait"])
def test_a_body_that_is_no_request_is_refused(url, path, body, status):
    """With an error object that says why."""
    found, _, document = ask(url, "POST", path, body)
    assert found == status
    assert set(document["error"]) == {"code", "message"}


@pytest.mark.parametrize(
    "change",
    [
        {"id": ""},
        {"id": "has spaces"},
        {"id": "x" * 129},
        {"id": 7},
        {"holder": None},
        {"holder": {"id": "../../x"}},
        {"holder": {"id": "h", "name": 7}},
        {"count": 0},
        {"count": True},
        {"count": 1.5},
        {"cards": []},
        {"cards": [{}]},
        {"cards": ["GPU-1"]},
        {"cards": [{"key": "k" * 301}]},
        {"cards": [{"key": "a", "room_mb": "much"}]},
        {"share": {}},
        {"share": {"places": 0}},
        {"share": {"places": 2, "memory_mb": 1.0}},
        {"ttl": None},
        {"ttl": 0},
        {"ttl": 301},
        {"ttl": "60"},
        {"waited": -1},
        {"queue": 1},
        {"reserve": None},
        {"note": 7},
    ],
    ids=str,
)
def test_a_claim_with_a_bad_field_is_refused(url, change):
    """Nothing is guessed, and nothing is granted."""
    status, _, document = ask(url, "POST", "/v1/leases", {**body_of(claim("a")), **change})
    assert (status, document["error"]["code"]) == (422, "bad_request")
    assert ask(url, "GET", "/v1/leases")[2] == {"leases": [], "closed": []}


def test_only_json_is_taken(url):
    """A page in a browser can make it send text, but not JSON."""
    for kind in (None, "text/plain", "application/x-www-form-urlencoded"):
        assert ask(url, "POST", "/v1/leases", body_of(claim("a")), kind)[0] == 415
    assert ask(url, "POST", "/v1/leases", body_of(claim("a")), "application/json; charset=utf-8")[0] == 200


def test_other_methods_are_refused(url):
    """And the answer says which there are."""
    status, headers, _ = ask(url, "DELETE", "/v1/leases")
    assert (status, headers["Allow"]) == (405, "GET, POST")
    assert ask(url, "GET", "/v1/wait")[0] == 405


def test_too_many_ids_are_refused(url, clock, stores):
    """The store sends them in batches."""
    ids = [f"id-{number}" for number in range(documents.MAX_IDS + 1)]
    assert ask(url, "POST", "/v1/leases/renew", {"ids": ids})[0] == 422
    assert stores(url, clock).renew(ids) == dict.fromkeys(ids, False)


def test_ids_are_nowhere_to_be_seen(url, clock, stores, caplog):
    """Neither in a list nor in an error nor in a log: who knows an id may release its card."""
    store = stores(url, clock)
    secret = "secret-id-of-a-lease"
    with caplog.at_level(logging.DEBUG):
        store.claim(claim("a", id=secret))
        store.claim(claim("a", who="b", id=f"{secret}-2", queue=True))
        seen = [ask(url, "GET", path)[2] for path in ("/v1/leases", "/v1/queue")]
        seen.append(ask(url, "POST", "/v1/leases", body_of(claim("a", who="c", id=secret)))[2])
        clock.advance(60.0)
        store.queue()
    assert secret not in json.dumps(seen)
    assert secret not in caplog.text


def test_cards_of_others_are_refused(tmp_path, stores):
    """A server arbitrates its own cards only, and says which are not."""
    with server_of_leases(tmp_path / "locks", own={"mine"}.__contains__) as url:
        store = stores(url)
        refused = store.claim(claim("http://server1:8000#0", "GPU-elsewhere", queue=True))
        assert {reason.code for reason in refused.reasons.values()} == {"not-here"}
        assert granted(store.claim(claim("GPU-elsewhere", "mine"))) == ("mine",)
        assert isinstance(store.claim(claim("GPU-elsewhere", "mine", count=2)), Refused)


# -- the client ------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_what_is_no_clear_answer_grants_nothing(stores):
    """Down, frozen, failing or garbled: an error, never a lease."""
    with FakeFleet([1]) as fleet:
        server = fleet[0]
        store = stores(server.url, endpoint_timeout=2.0, endpoint_max_retries=0)
        patient = stores(server.url, endpoint_timeout=60.0)
        card = uuids(server.url)[0]
        for trouble in (server.kill, server.freeze, server.fail, server.error_body, server.hang):
            trouble()
            wish = claim(card)
            with pytest.raises(LeaseStoreError, match=server.url):
                store.claim(wish)
            server.heal()
            # A frozen server finds the claim in its mailbox when it thaws.
            patient.release([wish.id])
        granted(stores(server.url).claim(claim(card)))


@pytest.mark.real
def test_a_forked_child_has_nothing_of_its_parents_leases(stores):
    """It forgets them without releasing them, and works at once with its own connection."""
    with FakeFleet([2]) as fleet:
        store = stores(fleet[0].url)
        cards = uuids(fleet[0].url)
        wish = claim(cards[0])
        granted(store.claim(wish))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # some Pythons warn of threads at a fork
            child = os.fork()
        if child == 0:
            good = not store.is_held(cards[0]) and isinstance(store.claim(claim(*cards, who="child")), Granted)
            os._exit(0 if good else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert store.renew([wish.id]) == {wish.id: True}
        assert len(store.leases()) == 2


def test_a_remote_lease_has_no_descriptors(url, clock, stores):
    """There is nothing that a child process could inherit."""
    store = stores(url, clock)
    wish = claim("a")
    lease = store.claim(wish).lease
    assert (store.descriptors(wish.id), lease.ttl, store.scope) == ((), 60.0, "everybody")
    assert store.description == f"server {url}"


# -- the server as a whole -------------------------------------------------------------------------------------


@pytest.mark.real
def test_simulated_cards_show_the_load_of_their_leases(stores):
    """A leased card looks used, as long as it is leased."""
    with FakeFleet([2]) as fleet:
        store = stores(fleet[0].url)
        cards = uuids(fleet[0].url)
        wish = claim(cards[1])
        granted(store.claim(wish))

        def load():
            gpus = ask(fleet[0].url, "GET", "/gpu/summary")[2]["gpus_summary"]
            return [(gpu["memory_usage_percent"] > 50, gpu["utilization_percent"]) for gpu in gpus]

        eventually(lambda: load() == [(False, 0), (True, 80)], message="the load shows")
        store.release([wish.id])
        eventually(lambda: load() == [(False, 0), (False, 0)], message="the load is gone")


@pytest.mark.real
def test_a_server_tells_whether_it_grants_leases(stores):
    """Its summary offers them with its lock directory; a statistics server offers none and grants none."""
    with FakeFleet([1]) as fleet, FakeFleet([1], leases=False) as plain:
        offer = ask(fleet[0].url, "GET", "/gpu/summary")[2]["leases"]
        with local(fleet[0].lock_dir) as here:
            assert offer == {"version": 1, "lock_dir": fleet[0].lock_dir, "lock_dir_id": here.directory_id}
        assert ask(plain[0].url, "GET", "/gpu/summary")[2]["leases"] is None
        assert plain[0].lock_dir is None
        with pytest.raises(LeaseStoreError, match="grants no leases"):
            stores(plain[0].url).claim(claim("a"))
        paths = ask(fleet[0].url, "GET", "/openapi.json")[2]["paths"]
        assert set(paths["/v1/leases"]) == {"get", "post"}
        assert "requestBody" in paths["/v1/wait"]["post"]
        assert "/v1/leases" in ask(fleet[0].url, "GET", "/")[2]["endpoints"]
        assert "/v1/leases" not in ask(plain[0].url, "GET", "/openapi.json")[2]["paths"]
        directory = fleet[0].lock_dir
    assert not os.path.exists(directory)


@pytest.mark.real
def test_leases_survive_an_orderly_restart_too(stores, tmp_path):
    """``serve --lock-dir``: told to stop, the server leaves its leases to its successor on the same port."""
    options = ("--simulate", "1", "--name", "same", "--lock-dir", str(tmp_path / "locks"))
    with running(*options) as (process, url, _):
        store = stores(url)
        card = uuids(url)[0]
        wish = claim(card)
        token = store.claim(wish).lease.token
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    with local(tmp_path / "locks") as here:
        assert isinstance(here.claim(claim(card, who="b")), Refused)
    with running(*options, "--port", str(urlsplit(url).port)):
        assert store.renew([wish.id]) == {wish.id: True}
        assert store.claim(wish).lease.token == token


@pytest.mark.real
def test_a_server_without_leases_says_so():
    """``serve --no-leases`` serves statistics only."""
    with running("--simulate", "1", "--no-leases") as (_, url, line):
        assert "; no leases)" in line
        assert ask(url, "GET", "/gpu/summary")[2]["leases"] is None
        assert ask(url, "GET", "/v1/leases")[0] == 404


def test_the_options_of_leases():
    """A lock directory is an absolute path, and makes no sense without leases."""
    assert Options.resolve(lock_dir="/locks", environ={}).lock_dir == "/locks"
    assert not Options.resolve(leases=False, environ={}).leases
    with pytest.raises(ConfigError, match="--lock-dir"):
        Options.resolve(lock_dir="relative", environ={})
    with pytest.raises(ConfigError, match="--no-leases"):
        Options.resolve(lock_dir="/locks", leases=False, environ={})
