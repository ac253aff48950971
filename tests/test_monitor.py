"""The schedule: who is polled when, by which threads, and whom a sick endpoint delays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from gpupool_sync import monitor as monitor_module
from gpupool_sync.clock import Deadline
from gpupool_sync.errors import EndpointUnavailable
from gpupool_sync.monitor import FAST_LANE, Monitor, wait_for
from helpers import eventually


class Endpoint:
    """What the monitor needs of an endpoint; `gate` holds its polls up."""

    open = False

    def __init__(self, name, *, interval=60.0, sick=False, gate=None):
        self.id = name
        self.sick = sick
        self.interval = interval
        self.gate = gate
        self.error: Exception | None = None
        self.polls = 0
        self.running = 0
        self.most_running = 0
        self.threads: set[str] = set()

    def poll(self):
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        self.threads.add(threading.current_thread().name)
        try:
            if self.gate is not None:
                self.gate.wait(30)
            self.polls += 1
            if self.error is not None:
                raise self.error
            return self
        finally:
            self.running -= 1

    def pause(self, retry_after=None):
        return max(self.interval, retry_after or 0.0)

    def abort(self):
        if self.gate is not None:
            self.gate.set()


@pytest.fixture
def start():
    running = []

    def make(*endpoints, **callbacks):
        defaults = {"on_snapshot": lambda _: None, "on_failure": lambda _: None, "housekeeping": lambda: True}
        made = Monitor(endpoints, name=f"gpupool-test{len(running)}", **{**defaults, **callbacks})
        running.append((made, endpoints))
        made.start()
        return made

    yield make
    for made, endpoints in running:
        for endpoint in endpoints:
            endpoint.abort()
        assert made.stop(20)


def test_polls_are_spread_over_the_interval(start):
    """Endpoints that were first read together are not read together from then on; who asks for patience gets it."""
    endpoints = [Endpoint(f"e{n}") for n in range(40)]
    patient = Endpoint("patient")
    patient.error = EndpointUnavailable("patient", "too many requests", retry_after=60.0)
    monitor = start(*endpoints, patient)
    entries = {entry.endpoint.id: entry for entry in monitor._entries.values()}
    eventually(lambda: all(not entry.running and entry.due > entry.began for entry in entries.values()))

    pauses = {name: entry.due - entry.began for name, entry in entries.items()}
    assert pauses.pop("patient") >= 59.9
    assert all(29.9 <= pause <= 61.0 for pause in pauses.values())
    assert max(pauses.values()) - min(pauses.values()) > 5.0


def test_results_arrive_one_by_one(start):
    """An endpoint that hangs delays nobody else's result."""
    gate = threading.Event()
    hung, quick = Endpoint("hung", gate=gate), Endpoint("quick")
    seen = []
    start(hung, quick, on_snapshot=lambda snapshot: seen.append(snapshot.id))
    eventually(lambda: seen == ["quick"], message="the quick one arrives while the other hangs")
    gate.set()
    eventually(lambda: seen == ["quick", "hung"])


def test_black_holes_do_not_starve_the_living(start):
    """More hanging endpoints than polls at a time: after a moment they count no more, and the others get their turn."""
    gate = threading.Event()
    holes = [Endpoint(f"hole{number}", gate=gate) for number in range(FAST_LANE + 10)]
    living = [Endpoint(f"living{number}") for number in range(20)]
    start(*holes, *living)
    eventually(lambda: all(each.polls for each in living), message="the living are polled")
    assert not any(each.polls for each in holes)
    gate.set()


def test_the_sick_are_polled_apart(start):
    """Endpoints whose last poll failed have a lane of their own, also when all of them hang."""
    gate = threading.Event()
    sick = [Endpoint(f"sick{number}", sick=True, gate=gate) for number in range(20)]
    well = [Endpoint(f"well{number}", interval=0.01) for number in range(5)]
    start(*sick, *well)
    eventually(lambda: all(each.polls > 5 for each in well), message="the well go on")
    assert all("-probe_" in name for each in sick for name in each.threads)
    assert all("-poll_" in name for each in well for name in each.threads)
    gate.set()


def test_polls_of_one_endpoint_never_overlap(start):
    """However often a poll is asked for, one is under way at a time, and calls are coalesced."""
    gate = threading.Event()
    endpoint = Endpoint("one", gate=gate)
    monitor = start(endpoint)
    eventually(lambda: endpoint.running == 1)
    futures = [future for _ in range(50) for future in monitor.poll_soon(["one"])]
    for _ in range(50):
        monitor.nudge("one")
    assert not wait_for(futures, Deadline.after(0.05))
    gate.set()
    assert wait_for(futures, Deadline.after(20))
    assert endpoint.most_running == 1
    assert endpoint.polls <= 3


def test_a_poll_that_was_asked_for_begins_after_the_asking(start):
    """An answer that may be older than the question does not serve it."""
    gate = threading.Event()
    endpoint = Endpoint("one", gate=gate)
    monitor = start(endpoint)
    eventually(lambda: endpoint.running == 1)
    (future,) = monitor.poll_soon(["one"])
    gate.set()
    assert wait_for([future], Deadline.after(20))
    assert endpoint.polls == 2


def test_nudges_keep_a_distance_and_respect_retry_after(start, monkeypatch):
    """Thousands of releases cause few polls, and none before the time that the server asked for."""
    monkeypatch.setattr(monitor_module, "NUDGE_GAP", 0.05)
    polite, plain = Endpoint("polite"), Endpoint("plain")
    polite.error = EndpointUnavailable("polite", "busy", 60.0)
    monitor = start(polite, plain)
    eventually(lambda: polite.polls == plain.polls == 1)
    begin = time.monotonic()
    while plain.polls < 5:
        monitor.nudge("polite")
        monitor.nudge("plain")
        assert time.monotonic() - begin < 20
    # Four polls more, each at least a gap after the one before.
    assert time.monotonic() - begin >= 3 * 0.05
    assert polite.polls == 1


def test_an_endpoint_can_be_added_and_removed(start):
    """The schedule follows; who waits for a poll of an endpoint that is gone is told."""
    first, second = Endpoint("first"), Endpoint("second", interval=0.01)
    monitor = start(first)
    monitor.add(second)
    eventually(lambda: second.polls > 2)
    monitor.remove("second")
    (future,) = monitor.poll_soon(["second"])
    with pytest.raises(EndpointUnavailable, match="not an endpoint"):
        future.result(20)
    polls = second.polls
    assert wait_for(monitor.poll_soon(["first"]), Deadline.after(20))
    assert second.polls <= polls + 1


def test_an_error_in_a_callback_does_not_end_polling(start):
    """What breaks on a worker is logged, and the next poll comes all the same."""
    endpoint = Endpoint("one", interval=0.01)

    def broken(snapshot):
        raise ZeroDivisionError

    start(endpoint, on_snapshot=broken)
    eventually(lambda: endpoint.polls > 3)


def test_stopping_serves_everybody_who_waits(start):
    """Nobody hangs in a refresh of a monitor that stops."""
    gate = threading.Event()
    endpoint = Endpoint("one", gate=gate)
    monitor = start(endpoint)
    eventually(lambda: endpoint.running == 1)
    futures = monitor.poll_soon(["one"])
    stopper = threading.Thread(target=monitor.stop)
    stopper.start()
    endpoint.abort()
    stopper.join(20)
    assert wait_for(futures, Deadline.after(20)) or futures[0].done()


def test_a_monitor_that_nobody_needs_stops_itself(start):
    """When the pool is gone, so are its threads."""
    needed = threading.Event()
    needed.set()
    endpoint = Endpoint("one", interval=0.01)
    monitor = start(endpoint, housekeeping=needed.is_set)
    eventually(lambda: endpoint.polls > 1)
    needed.clear()
    eventually(lambda: monitor.threads() == 0, message="the threads end")


WAITS = """
import signal, threading
from gpupool_sync.monitor import _Commands

signal.signal(signal.SIGUSR1, lambda *_: None)
waits = threading.Thread(target=_Commands().wait, args=(0.3,), daemon=True)
waits.start()
# From here on the signal can fall to that thread only.
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
print("waits", flush=True)
waits.join(20)
print("still" if waits.is_alive() else "went on", flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="processes cannot be stopped here")
def test_a_schedule_goes_on_after_the_process_was_stopped_and_a_signal_fell_to_its_thread():
    """`queue.SimpleQueue.get(timeout)` never returns then, with Python 3.12 and before: no reading came any more."""
    with subprocess.Popen([sys.executable, "-c", WAITS], stdout=subprocess.PIPE, text=True) as program:
        try:
            assert program.stdout.readline() == "waits\n"
            os.kill(program.pid, signal.SIGSTOP)
            os.waitid(os.P_PID, program.pid, os.WSTOPPED)
            os.kill(program.pid, signal.SIGUSR1)
            time.sleep(0.5)  # its time ends meanwhile
            os.kill(program.pid, signal.SIGCONT)
            assert program.stdout.readline() == "went on\n"
        finally:
            program.kill()


def test_commands_are_taken_in_their_order_and_what_one_breaks_delays_no_other(start):
    """Neither is a command lost that comes while others are taken."""
    commands, told = monitor_module._Commands(), []
    for number in range(3):
        commands.put(lambda number=number: told.append(number))
    for command in commands.take():
        command()
        if len(told) == 1:
            break
    begin = time.monotonic()
    commands.wait(30.0)
    for command in commands.take():
        command()
        if told[-1] == 2:
            commands.put(lambda: told.append(3))
    assert told == [0, 1, 2, 3]
    assert time.monotonic() - begin < 20, "it did not wait for what was there"
