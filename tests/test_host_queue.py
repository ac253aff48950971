"""The queue of the host's locks, among stores as different processes have them: who is told, and what that saves."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import json
import os
import resource
import sys
import time

import pytest

from gpupool_sync.errors import LeaseStoreError
from gpupool_sync.leases import host
from gpupool_sync.leases.base import Granted, Queued, Refused, Share
from gpupool_sync.leases.host import CROWDED_TIME, RECORD_BYTES, RECORD_TIME, HostStore, _Glance
from gpupool_sync.leases.tickets import ANSWER_TIME
from test_leases_contract import Clock, Hints, claim, granted

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kernel locks of Linux")


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def locks(tmp_path):
    return tmp_path / "locks"


@pytest.fixture
def stores(locks, clock):
    """Stores of one directory, which know each other by its files only."""
    made = []

    def make(number):
        made.extend(HostStore(str(locks), clock=clock) for _ in range(number))
        return made[-number:]

    yield make
    for store in made:
        store.close()


def wait(store, *cards, who, **more):
    """A ticket; returns its claim."""
    waiting = claim(*cards, who=who, queue=True, **more)
    assert isinstance(store.claim(waiting), Queued)
    return waiting


def fails(name):
    raise AssertionError(f"{name} was read")


def reads_no_tickets(store, monkeypatch):
    """From here on, reading a ticket is an error."""

    monkeypatch.setattr(store, "_load_ticket", fails)


def test_who_was_told_of_a_card_takes_it_without_reading_the_queue(stores, clock, monkeypatch):
    """Whoever told it has read the queue for that."""
    first, second, third = stores(3)
    held = claim("gpu", who="first")
    granted(first.claim(held))
    hints = Hints(second)
    mine = wait(second, "gpu", who="second")
    clock.advance(0.01)
    wait(third, "gpu", who="third", waited=0.0)
    first.release([held.id])
    second.listen(5.0)
    assert hints.take() == [mine.id]
    reads_no_tickets(second, monkeypatch)
    assert granted(second.claim(mine)) == ("gpu",)


def test_a_hint_that_is_too_old_gives_no_right_to_the_card(stores, clock):
    """After a second it is the next one's turn, who may be about to claim."""
    first, second, third = stores(3)
    held = claim("gpu", who="first")
    granted(first.claim(held))
    mine = wait(second, "gpu", who="second")
    clock.advance(0.01)
    theirs = wait(third, "gpu", who="third")
    first.release([held.id])
    second.listen(5.0)
    clock.advance(ANSWER_TIME)
    assert granted(third.claim(theirs)) == ("gpu",)
    assert isinstance(second.claim(mine), Queued)


def test_a_card_that_was_taken_meanwhile_is_looked_for_in_the_ordinary_way(stores, clock):
    """A hint is no promise: whoever comes too late stays in the queue, and takes what else is free."""
    first, second, third = stores(3)
    held = [claim(card, who="first") for card in ("gpu-1", "gpu-2")]
    for each in held:
        granted(first.claim(each))
    mine = wait(second, "gpu-1", "gpu-2", who="second")
    first.release([held[0].id])
    second.listen(5.0)
    assert isinstance(third.claim(claim("gpu-1", who="third")), Refused)
    # Somebody who does not ask the queue, such as an older version.
    intruder = os.open(f"{first.path}/gpu-gpu-1", os.O_RDWR)
    fcntl.flock(intruder, fcntl.LOCK_EX)
    try:
        assert isinstance(second.claim(mine), Queued)
        first.release([held[1].id])
        assert granted(second.claim(mine)) == ("gpu-2",)
    finally:
        os.close(intruder)


def test_several_cards_go_to_the_oldest_each_one_of_its_own(stores, clock):
    """Who was told of a card does not need the next one."""
    first, *others = stores(4)
    held = [claim(card, who="first") for card in ("gpu-1", "gpu-2")]
    for each in held:
        granted(first.claim(each))
    hints = [Hints(store) for store in others]
    tickets = []
    for number, store in enumerate(others):
        tickets.append(wait(store, "gpu-1", "gpu-2", who=f"waiter-{number}"))
        clock.advance(0.01)
    for each in held:
        first.release([each.id])
    for store in others:
        store.listen(0.0)
    assert [each.take() for each in hints] == [[tickets[0].id], [tickets[1].id], []]
    cards = [granted(store.claim(ticket)) for store, ticket in zip(others[:2], tickets[:2], strict=True)]
    assert sorted(cards) == [("gpu-1",), ("gpu-2",)]


def test_a_card_that_nobody_came_for_is_not_forgotten(stores, clock):
    """Its waiter was told and is silent: with the next card that comes free, the next ones hear of both."""
    first, *others = stores(4)
    held = [claim(card, who="first") for card in ("gpu-1", "gpu-2")]
    for each in held:
        granted(first.claim(each))
    hints = [Hints(store) for store in others]
    tickets = []
    for number, store in enumerate(others):
        tickets.append(wait(store, "gpu-1", "gpu-2", who=f"waiter-{number}"))
        clock.advance(0.01)
    first.release([held[0].id])
    clock.advance(ANSWER_TIME)
    first.release([held[1].id])
    for store in others[1:]:
        store.listen(0.0)
    assert [each.take() for each in hints[1:]] == [[tickets[1].id], [tickets[2].id]]


def test_a_wish_for_several_cards_is_served_by_the_whole_queue(stores, clock):
    """The first in line collects: what comes free meanwhile is not handed to those behind it."""
    first, second, third = stores(3)
    held = [claim(card, who="first") for card in ("gpu-1", "gpu-2")]
    for each in held:
        granted(first.claim(each))
    behind, both = Hints(third), Hints(second)
    two = wait(second, "gpu-1", "gpu-2", who="second", count=2)
    clock.advance(0.01)
    wait(third, "gpu-1", "gpu-2", who="third")
    first.release([held[0].id])
    third.listen(0.0)
    assert behind.take() == []
    first.release([held[1].id])
    second.listen(0.0)
    assert both.take() == [two.id]
    assert sorted(granted(second.claim(two))) == ["gpu-1", "gpu-2"]


def test_released_shares_tell_those_who_wait_for_the_whole_card(stores):
    """A share is not a card: who waits hears of it when the last one is gone."""
    first, second = stores(2)
    shares = [claim("gpu", who="first", share=Share(places=2)) for _ in range(2)]
    for each in shares:
        granted(first.claim(each))
    hints = Hints(second)
    whole = wait(second, "gpu", who="second")
    first.release([shares[0].id])
    assert isinstance(second.claim(whole), Queued)
    first.release([shares[1].id])
    second.listen(5.0)
    assert whole.id in hints.take()
    assert granted(second.claim(whole)) == ("gpu",)


def test_what_stands_in_a_note_is_not_taken_for_a_held_card(stores):
    """Records are searched for the word before they are read."""
    first, second = stores(2)
    held = claim("gpu", who="first", note='"released_at":null')
    granted(first.claim(held))
    first.release([held.id])
    assert not second._says_held(second._raw_record("gpu"))
    waiting = claim("gpu", who="second", queue=True)
    assert granted(second.claim(waiting)) == ("gpu",)


def test_a_fifo_in_the_directory_keeps_nobody_waiting(stores, locks):
    """Opening one to read it waits for somebody who writes."""
    (store,) = stores(1)
    os.mkfifo(locks / "gpu-fifo")
    assert store.is_held("fifo") is False
    assert store._raw_record("fifo") == b""


def test_it_is_crowded_for_a_moment_after_somebody_was_seen_waiting(stores, clock):
    """A first claim without a ticket is of use only where nobody waits."""
    first, second, third = stores(3)
    assert not third.crowded()
    held = claim("gpu", who="first")
    granted(first.claim(held))
    mine = wait(second, "gpu", who="second")
    assert isinstance(third.claim(claim("gpu", who="third")), Refused)
    assert third.crowded()
    second.withdraw([mine.id])
    clock.advance(CROWDED_TIME)
    assert not third.crowded()


def test_a_dead_holder_is_asked_for_once_in_a_while_by_who_waits_and_at_once_by_who_does_not(stores, clock):
    """A waiter looks again; a claim without a ticket may be the only one that its caller makes."""
    first, second = stores(2)
    held = claim("gpu", who="first")
    outcome = first.claim(held)
    assert isinstance(outcome, Granted)
    mine = wait(second, "gpu", who="second")
    for file in first._held[held.id].files:  # as the kernel does when a process dies
        file.unlock()
    assert isinstance(second.claim(mine), Queued), "it has asked the kernel just now"
    clock.advance(RECORD_TIME)
    assert granted(second.claim(mine)) == ("gpu",)
    for file in second._held[mine.id].files:
        file.unlock()
    (third,) = stores(1)
    assert granted(third.claim(claim("gpu", who="third"))) == ("gpu",)


def test_files_that_are_kept_open_end_with_the_store(stores):
    """They are for looking only, and few."""

    def open_files():
        return sum("gpu-" in os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd))

    def _is_open(fd):
        return os.path.lexists(f"/proc/self/fd/{fd}")

    gc.collect()  # what the tests before this one have left open in cycles
    before = open_files()
    first, second = stores(2)
    cards = [f"gpu-{number}" for number in range(100)]
    for card in cards:
        each = claim(card, who="first")
        granted(first.claim(each))
        first.release([each.id])
    for card in cards:
        second.is_held(card)
    assert open_files() - before <= 64
    second.close()
    first.close()
    assert open_files() == before


def test_whom_a_card_is_for_stands_in_its_record(stores, clock, monkeypatch):
    """So that whoever else looks at it need not read the queue, which would tell the same."""
    first, second, third = stores(3)
    held = claim("gpu", who="first")
    granted(first.claim(held))
    mine = wait(second, "gpu", who="second")
    first.release([held.id])
    reads_no_tickets(third, monkeypatch)
    assert isinstance(third.claim(claim("gpu", who="third", queue=True)), Queued)
    assert isinstance(third.claim(claim("gpu", who="third")), Refused)
    second.listen(5.0)
    assert granted(second.claim(mine)) == ("gpu",)


def test_a_card_is_kept_for_nobody_longer_than_a_second(stores, clock):
    """Its process may be stopped."""
    first, second, third = stores(3)
    held = claim("gpu", who="first")
    granted(first.claim(held))
    wait(second, "gpu", who="second")
    first.release([held.id])
    clock.advance(ANSWER_TIME)
    assert granted(third.claim(claim("gpu", who="third"))) == ("gpu",)


def test_a_card_that_is_kept_for_somebody_who_left_is_free(stores):
    """And whoever is next hears of it."""
    first, second, third = stores(3)
    held = claim("gpu", who="first")
    granted(first.claim(held))
    mine = wait(second, "gpu", who="second")
    theirs = wait(third, "gpu", who="third", waited=-1.0)
    hints = Hints(third)
    first.release([held.id])
    second.withdraw([mine.id])
    third.listen(5.0)
    assert hints.take() == [theirs.id]
    assert granted(third.claim(theirs)) == ("gpu",)


def test_who_has_a_card_kept_stands_in_nobodys_way_at_another(stores, clock):
    """It is about to take the one that it was told of."""
    first, second, third = stores(3)
    held = claim("gpu-1", who="first")
    granted(first.claim(held))
    other = claim("gpu-2", who="first")
    granted(first.claim(other))
    mine = wait(second, "gpu-1", "gpu-2", who="second")
    first.release([held.id])
    first.release([other.id])
    assert granted(third.claim(claim("gpu-2", "gpu-1", who="third", queue=True))) == ("gpu-2",)
    second.listen(5.0)
    assert granted(second.claim(mine)) == ("gpu-1",)


def test_a_record_without_room_for_the_name_is_released_all_the_same(stores, monkeypatch):
    """Then whoever looks at the card reads the queue."""
    monkeypatch.setattr(host, "PROMISE_BYTES", RECORD_BYTES)
    first, second, third = stores(3)
    held = claim("gpu", who="first")
    granted(first.claim(held))
    mine = wait(second, "gpu", who="second")
    hints = Hints(second)
    first.release([held.id])
    assert isinstance(third.claim(claim("gpu", who="third")), Refused)
    second.listen(5.0)
    assert hints.take() == [mine.id]
    assert granted(second.claim(mine)) == ("gpu",)


@pytest.mark.parametrize("note", [None, '"closed_at"', '"remote_until":1', '{"v":1,"boot":"x"', "ä\\\n"])
@pytest.mark.parametrize("waits", [False, True])
def test_what_is_read_of_a_released_record_without_parsing_it_is_what_it_says(stores, note, waits):
    """Most records that are read are of this kind."""
    first, second = stores(2)
    held = claim("gpu", who="first", note=note)
    outcome = first.claim(held)
    assert isinstance(outcome, Granted)
    assert host._ended(first._raw_record("gpu")) is None
    if waits:
        wait(second, "gpu", who="second")
    first.release([held.id])
    raw = first._raw_record("gpu")
    record, ended = json.loads(raw), host._ended(raw)
    assert record["note"] == note
    assert ended is not None
    assert (ended["boot"], ended["token"], ended["released_at"]) == (
        record["boot"],
        outcome.lease.token,
        record["released_at"],
    )
    assert ended["for"] == (record["for"][:1] if waits else None)


def test_what_keeps_a_released_card_closed_is_never_left_out(stores):
    """A lease that ended without being given back has its record read as a whole."""
    (store,) = stores(1)
    held = claim("gpu", who="first")
    granted(store.claim(held))
    store.expire([held.id])
    assert host._ended(store._raw_record("gpu")) is None
    assert json.loads(store._raw_record("gpu"))["closed_at"] is not None


def test_a_promise_in_a_note_is_none(stores, clock):
    """Records are searched for it before they are read."""
    first, second = stores(2)
    held = claim("gpu-1", who="first")
    granted(first.claim(held))
    wait(second, "gpu-1", who="second", waited=-1.0)
    (ticket,) = second._ticket_names()
    note = f'"released_at":1.0,"for":["{ticket}",{clock():.6f}]'
    noted = claim("gpu-2", who="first", note=note)
    granted(first.claim(noted))
    first.release([noted.id])
    assert granted(first.claim(claim("gpu-2", who="first"))) == ("gpu-2",)


def test_a_share_does_not_take_what_is_kept_for_a_wish_for_the_whole_card(stores, clock):
    """Room for a share is no free card: one that waits for all of a card has the empty one, and the share the other."""
    first, second = stores(2)
    share = Share(places=3)
    granted(first.claim(claim("a", who="first", share=share)))
    whole = claim("b", who="first")
    granted(first.claim(whole))
    older = wait(second, "a", "b", who="second")
    first.release([whole.id])
    clock.advance(ANSWER_TIME / 2)
    assert granted(first.claim(claim("b", "a", who="third", share=share))) == ("a",)
    second.listen(0.0)
    assert granted(second.claim(older)) == ("b",)


def test_a_share_leaves_the_empty_card_to_a_ticket_that_nobody_has_told(stores, clock, monkeypatch):
    """The queue decides then, and asks of each card whether all of it is free."""
    monkeypatch.setattr(HostStore, "_next_for", lambda self, held, now: None)
    monkeypatch.setattr(HostStore, "_pass_on", lambda self, freed=(), **more: None)
    first, second = stores(2)
    share = Share(places=3)
    granted(first.claim(claim("a", who="first", share=share)))
    whole = claim("b", who="first")
    granted(first.claim(whole))
    wait(second, "a", "b", who="second")
    first.release([whole.id])
    assert granted(first.claim(claim("b", "a", who="third", share=share))) == ("a",)


def test_two_cards_that_end_at_once_are_not_both_kept_for_the_same(stores, clock, monkeypatch):
    """Each of their holders finds the same ticket next, before the other has told it: the second one is passed on."""
    one, other, first, second = stores(4)
    held = [claim("gpu-1", who="one"), claim("gpu-2", who="other")]
    granted(one.claim(held[0]))
    granted(other.claim(held[1]))
    hints = Hints(second)
    tickets = [wait(first, "gpu-1", "gpu-2", who="first")]
    clock.advance(0.01)
    tickets.append(wait(second, "gpu-1", "gpu-2", who="second"))
    free = one._free

    def free_both(*args, **options):
        promised = free(*args, **options)
        other.release([held[1].id])
        return promised

    monkeypatch.setattr(one, "_free", free_both)
    one.release([held[0].id])
    first.listen(5.0)
    granted(first.claim(tickets[0]))
    second.listen(0.0)
    assert hints.take() == [tickets[1].id]
    granted(second.claim(tickets[1]))


def test_who_was_held_back_at_a_card_for_somebody_who_took_another_is_told(stores, clock):
    """Who is about to take a card that the other one does not want counts as before it at this one too."""
    one, first, second = stores(3)
    held = [claim(card, who="one") for card in ("gpu-1", "gpu-2")]
    for each in held:
        granted(one.claim(each))
    hints = Hints(second)
    mine = wait(first, "gpu-1", "gpu-2", who="first")
    for each in held:
        one.release([each.id])
    clock.advance(0.01)
    theirs = wait(second, "gpu-2", who="second")
    first.listen(5.0)
    assert granted(first.claim(mine)) == ("gpu-1",)
    second.listen(0.0)
    assert hints.take() == [theirs.id]


@pytest.mark.parametrize(
    "garbled",
    [
        b'"token":5,"released_at":1.2.3,"share":null,"since":1.0,',
        b'"token":5,"released_at":1.2,"for":["ticket-0-a",1.2.3],"share":null,"since":1.0,',
        b'"token":null,"released_at":1.2}',
        b'"token":"many","released_at":1.2}',
    ],
)
@pytest.mark.parametrize("boot", [None, b'"boot":"\xff"'])
def test_a_garbled_record_keeps_nobody_from_the_card(stores, locks, garbled, boot):
    """A record informs; what decides is the lock."""
    (store,) = stores(1)
    before = claim("gpu")
    granted(store.claim(before))
    store.release([before.id])
    with open(locks / "gpu-gpu", "r+b") as file:
        file.write((b'{"v":1,' + (boot or store._boot_mark) + b"," + garbled).ljust(RECORD_BYTES - 1) + b"\n")
    assert store.is_held("gpu") is False
    assert granted(store.claim(claim("gpu"))) == ("gpu",)


def test_a_socket_with_a_high_number_hears(stores):
    """A process with more than a thousand files open, as with many data loaders, waits like any other."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2000:
        pytest.skip("no more than so many files may be open")
    first, second = stores(2)
    held = claim("gpu", who="first")
    granted(first.claim(held))
    hints = Hints(second)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
    try:
        with contextlib.ExitStack() as many:
            while many.enter_context(open(os.devnull)).fileno() < 1030:
                pass
            mine = wait(second, "gpu", who="second")
            assert second._socket.fileno() >= 1024
            first.release([held.id])
            second.listen(5.0)
            assert hints.take() == [mine.id]
    finally:
        second.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_killed_processes_left_in_the_queue_goes(stores, locks, clock, monkeypatch):
    """Every look lists them: a socket of each process that was killed, after it had waited once, would be too many."""
    first, living, second = stores(3)
    held = claim("gpu", who="first")
    granted(first.claim(held))
    wait(living, "gpu", who="living")
    killed = HostStore(str(locks), clock=clock)
    wait(killed, "gpu", who="killed")
    killed._socket.close()
    wait(killed, "gpu", who="killed too")  # of the same socket, which is gone
    silent = HostStore(str(locks), clock=clock)
    silent._need_socket()
    silent._socket.close()
    queue = locks / "queue"
    (queue / "ticket-00000000000000000001-1-a").touch()
    (queue / "ticket-00000000000000000002-1-a").touch()
    for path in queue.iterdir():
        if path.name != "ticket-00000000000000000002-1-a":  # perhaps it is being written
            os.utime(path, (time.time() - 2 * host.TIDY_TIME,) * 2)
    monkeypatch.setattr(second, "_tidied_at", time.monotonic() - host.TIDY_TIME)
    assert isinstance(second.claim(claim("gpu", who="second")), Refused)
    mine = {living._socket_name, *living._ticket_ids}
    assert {path.name for path in queue.iterdir()} == {*mine, "ticket-00000000000000000002-1-a"}


def test_a_card_is_not_ours_any_more_when_the_next_one_is_told(stores, clock):
    """Who waits on another thread of the same process may claim it before the one who tells it goes on."""
    (store,) = stores(1)
    held = claim("gpu", who="one")
    granted(store.claim(held))
    waits = wait(store, "gpu", who="two")
    outcomes = []
    store.subscribe(lambda ids: outcomes.append(store.claim(waits)))
    store.release([held.id])
    assert granted(outcomes[0]) == ("gpu",)


def test_who_cannot_leave_a_ticket_does_not_pass_those_who_could(stores, monkeypatch):
    """Such as on a file system that is full by now."""
    first, older, newer = stores(3)
    held = claim("gpu", who="first")
    granted(first.claim(held))
    wait(older, "gpu", who="older")
    newer.queue()  # so it knows that somebody waits
    first.release([held.id])
    monkeypatch.setattr(newer, "_leave_ticket", full)
    with pytest.raises(LeaseStoreError, match="full"):
        newer.claim(claim("gpu", who="newer", queue=True))


def full(claim):
    raise OSError(errno.ENOSPC, "no space left on device")


@pytest.mark.parametrize("note", [None, "n" * 200])
def test_the_first_look_at_a_record_sees_whether_it_is_held(stores, note):
    """What decides stands at its beginning, before what may be long."""
    first, second = stores(2)
    held, other = claim("a", who="first" * 20, note=note), claim("b", who="first" * 20, note=note)
    for each in (held, other):
        granted(first.claim(each))
    wish = claim("a", "b", "c", who="second")
    for key in ("a", "b"):
        second._raw_record(key)
    assert [wanted.key for wanted in second._perhaps_free(wish, _Glance())] == ["c"]
    first.release([other.id])
    assert [wanted.key for wanted in second._perhaps_free(wish, _Glance())] == ["b", "c"]
    assert granted(second.claim(wish)) == ("b",)


STAMPS = b"-                               1.0".ljust(64) + b"sock-0123456789abcdef\n"
WHO = b'{"note":null}\n'
WHAT = b'{"count":1,"reserve":true,"share":null,"groups":[[["a",null]]]}'


def what(groups, count=b"1", share=b"null"):
    return b'{"count":%s,"reserve":true,"share":%s,"groups":%s}' % (count, share, groups)


GARBLED_TICKETS = {
    "nothing": b"",
    "no line": STAMPS[:64],
    "who: a list": STAMPS + b"[]\n" + WHAT,
    "who: null": STAMPS + b"null\n" + WHAT,
    "who: nested": STAMPS + b"[" * 1500 + b"\n" + WHAT,
    "pid: infinite": STAMPS + b'{"note":null,"pid":Infinity}\n' + WHAT,
    "pid: a list": STAMPS + b'{"note":null,"pid":[]}\n' + WHAT,
    "note: a list": STAMPS + b'{"note":[1]}\n' + WHAT,
    "count: infinite": STAMPS + WHO + what(b'[[["a",null]]]', b"1e999"),
    "count: none": STAMPS + WHO + what(b'[[["a",null]]]', b"0"),
    "count: negative": STAMPS + WHO + what(b'[[["a",null]]]', b"-1"),
    "key: a list": STAMPS + WHO + what(b'[[[["a"],null],["a",null]]]', b"2"),
    "key: an object": STAMPS + WHO + what(b'[[[{"a":1},null],["a",null]]]'),
    "key: a number": STAMPS + WHO + what(b'[[["a",null],[5,null]]]', b"2"),
    "key: null": STAMPS + WHO + what(b'[[["a",null],[null,null]]]', b"2"),
    "key: half a character": STAMPS + WHO + what(b'[[["a",null],["\\ud800",null]]]', b"2"),
    "room: text": STAMPS + WHO + what(b'[[["a","x"]]]', share=b"[5,null]"),
    "share: text": STAMPS + WHO + what(b'[[["a",5]]]', share=b'["x",null]'),
    "share: both": STAMPS + WHO + what(b'[[["a",5]]]', share=b"[5,2]"),
    "share: three": STAMPS + WHO + what(b'[[["a",5]]]', share=b"[5,null,1]"),
    "places: text": STAMPS + WHO + what(b'[[["a",5]]]', share=b'[null,"x"]'),
    "groups: an object": STAMPS + WHO + what(b'{"ab":1}'),
    "wish: nested": STAMPS + WHO + b"[" * 1500,
    "stamps: no numbers": b"nan                             nan".ljust(64) + STAMPS[64:] + WHO + WHAT,
    "told in the future": b"1e300                           1.0".ljust(64) + STAMPS[64:] + WHO + WHAT,
}


@pytest.mark.parametrize("garbled", GARBLED_TICKETS.values(), ids=GARBLED_TICKETS)
def test_a_garbled_ticket_keeps_nobody_from_a_card_and_no_card_from_being_released(stores, locks, garbled):
    """Everybody may write into the queue: what is no ticket there is nobody's turn."""
    (store,) = stores(1)
    held = claim("a", who="first")
    granted(store.claim(held))
    # The place of somebody who has waited for years.
    (locks / "queue" / "ticket-00000000000000000001-aa").write_bytes(garbled)

    granted(store.claim(claim("a", "b", who="other")))
    shares = [
        claim("c", who="places", share=Share(places=2)),
        claim("d", who="memory", share=Share(memory_mb=20.0), room=50.0),
        claim("e", "f", who="two", count=2, queue=True),
    ]
    for each in shares:
        granted(store.claim(each))
    waits = claim("a", who="waits", queue=True)
    assert isinstance(store.claim(waits), Queued)
    store.release([held.id, *(each.id for each in shares)])
    assert granted(store.claim(waits)) == ("a",)
    store.queue()


@pytest.mark.parametrize(
    "garbled",
    [
        b"[" * RECORD_BYTES,
        b'{"v":1,%s,"token":5,"released_at":null,"share":[1]}',
        b'{"v":1,%s,"token":5,"share":{"places":"x"}}',
        b'{"v":1,%s,"token":5,"released_at":null,"since":1.0,"holder":[]}',
        b'{"v":1,%s,"token":1e999,"holder":{}}',
    ],
)
def test_a_garbled_record_is_no_lease(stores, locks, garbled):
    """Who looks at the leases is not kept from the others by it, and nobody from the card."""
    (store,) = stores(1)
    before = claim("gpu")
    granted(store.claim(before))
    store.release([before.id])
    granted(store.claim(claim("other")))
    garbled = garbled.replace(b"%s", store._boot_mark)
    for name in ("gpu-gpu", "gpu-gpu.share-0123456789"):
        (locks / name).write_bytes(garbled.ljust(RECORD_BYTES - 1)[: RECORD_BYTES - 1] + b"\n" + garbled)

    assert [info.cards for info in store.leases()] == [("other",)]
    assert not store.holders_of("gpu")
    assert granted(store.claim(claim("gpu", share=Share(places=2)))) == ("gpu",)


def test_a_card_is_released_whatever_is_wrong_with_the_queue(stores, monkeypatch):
    """Who is next may stay unknown; that the card is free may not."""
    first, second = stores(2)
    held = claim("gpu", who="first")
    granted(first.claim(held))

    def broken(dir_fd):
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(first._directory, "names", broken)
    with contextlib.suppress(LeaseStoreError):
        first.release([held.id])
    assert granted(second.claim(claim("gpu", who="second"))) == ("gpu",)


def test_the_queue_is_listed_where_proc_is_gone(stores, monkeypatch):
    """As after a chroot."""
    (store,) = stores(1)
    listdir = os.listdir

    def without_proc(path):
        if isinstance(path, str):
            raise FileNotFoundError(errno.ENOENT, "no such file or directory", path)
        return listdir(path)

    held, waits = claim("gpu", who="first"), claim("gpu", who="second", queue=True)
    granted(store.claim(held))
    monkeypatch.setattr(os, "listdir", without_proc)
    assert isinstance(store.claim(waits), Queued)
    assert len(store.queue()) == 1
    store.release([held.id])
    assert granted(store.claim(waits)) == ("gpu",)
