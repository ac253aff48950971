"""Processes on cards that they do not hold, seen in this machine's readings."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from cards import Cards, local_pool, reading
from gpupool_sync import AcquireTimeout, bystanders
from gpupool_sync.bystanders import Bystanders, Claimed
from gpupool_sync.devices.base import DeviceError
from gpupool_sync.models import Card, ComputeProcess
from helpers import eventually
from test_host_processes import Worker

PARENTS = Claimed(ours=False, shared=False, pids=frozenset({os.getppid()}))
NOBODYS = Claimed(ours=False, shared=False, pids=frozenset())
OURS = Claimed(ours=True, shared=False, pids=frozenset({os.getpid()}))
STRANGER = ComputeProcess(1, "bob", 4000.0, "python")


def card(*processes):
    return Card("k", "here", reading(0, processes=processes))


def look(watch, processes, claimed, times=3):
    for _ in range(times):
        watch.look([card(*processes)], lambda key: claimed)


@pytest.fixture
def watch():
    return Bystanders(enabled=lambda: True)


def told(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "gpupool_sync.bystanders"]


def test_a_stranger_on_our_card_is_named_once(watch, caplog):
    """With process and user; not again at the next reading."""
    look(watch, [STRANGER], OURS)
    assert len(told(caplog)) == 1
    assert "process 1 (python) of bob computes on here:0, which this pool holds" in told(caplog)[0]


def test_this_program_on_a_card_that_it_does_not_hold_is_named_once(watch, caplog):
    """Its CUDA context outlived the lease, or it never asked."""
    look(watch, [ComputeProcess(os.getpid(), "me", 4000.0, "python")], NOBODYS)
    assert len(told(caplog)) == 1
    assert f"process {os.getpid()} (python) of me, of this program, computes on here:0 without" in told(caplog)[0]


def test_one_reading_proves_nothing(watch, caplog):
    """The process may have begun before it, and the lease after."""
    look(watch, [STRANGER], OURS, times=1)
    look(watch, [], OURS, times=1)
    look(watch, [STRANGER], OURS, times=1)
    assert told(caplog) == []


@pytest.mark.parametrize(
    ("process", "claimed"),
    [
        (ComputeProcess(os.getpid()), OURS),
        (STRANGER, NOBODYS),
        (STRANGER, Claimed(ours=True, shared=True, pids=frozenset())),  # others share the card
        (
            ComputeProcess(os.getpid()),
            Claimed(ours=False, shared=False, pids=frozenset({os.getppid()})),
        ),  # our parent's
        (ComputeProcess(None, "bob"), OURS),
        (ComputeProcess(1, "root", 30.0, "nvidia-cuda-mps-server"), OURS),
    ],
    ids=["ours on ours", "others among themselves", "a shared card", "our parent's", "no pid", "the MPS server"],
)
def test_what_is_as_it_should_be(watch, caplog, process, claimed):
    """Nothing is said."""
    look(watch, [process], claimed)
    assert told(caplog) == []


def test_a_child_computes_for_its_parent(watch, caplog):
    """Started by any means, as long as it is a descendant."""
    show = "import os; print(os.getpid(), flush=True); input()"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {show!r}])"
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        grandchild = ComputeProcess(int(child.stdout.readline()))
        look(watch, [grandchild], OURS)
        assert told(caplog) == []
        look(watch, [grandchild], NOBODYS)
        assert len(told(caplog)) == 1
        child.stdin.write("\n")


def test_where_the_drivers_process_ids_are_not_ours_nothing_is_said(caplog):
    """In a container our own process would look like a stranger."""
    look(Bystanders(enabled=lambda: False), [STRANGER], OURS)
    assert told(caplog) == []
    assert not bystanders.sees_the_drivers_pids("/nowhere")


def test_a_pool_watches_its_cards(monkeypatch, caplog):
    """Over a whole pool: a stranger comes while we hold the card."""
    monkeypatch.setattr(bystanders, "_FIRST_NAMESPACE", os.readlink("/proc/self/ns/pid"))
    cards = Cards(2)
    with local_pool(monkeypatch, cards) as pool, pool.gpu(timeout=20) as gpu:
        cards.set(gpu.local_gpu_id, processes=(ComputeProcess(os.getpid()), STRANGER))
        eventually(lambda: told(caplog))
        assert "process 1 (python) of bob" in told(caplog)[0]
    assert len(told(caplog)) == 1


def test_a_pool_watches_itself(monkeypatch, caplog):
    """Over a whole pool: our process is seen on the card that it does not hold."""
    monkeypatch.setattr(bystanders, "_FIRST_NAMESPACE", os.readlink("/proc/self/ns/pid"))
    cards = Cards(2)
    with local_pool(monkeypatch, cards) as pool, pool.gpu(timeout=20) as gpu:
        other = 1 - gpu.local_gpu_id
        cards.set(other, processes=(ComputeProcess(os.getpid(), "me", 4000.0, "python"),))
        eventually(lambda: told(caplog))
        reads = cards.reads
        eventually(lambda: cards.reads > reads + 3)
    (line,) = told(caplog)
    assert f"process {os.getpid()} (python) of me, of this program, computes on" in line
    assert f":{other} without" in line


# -- hygiene: what the last job left on the card -------------------------------------------------------------------


def test_a_card_whose_memory_does_not_fall_stays_closed_until_it_does(monkeypatch):
    """After the release the next reading counts, with process and user; it heals by itself."""
    cards = Cards(1)
    with local_pool(monkeypatch, cards) as pool:
        with pool.gpu(timeout=20):
            cards.set(0, memory_used_mb=70000.0, memory_usage_percent=85.0, processes=(STRANGER,))
            pool.refresh(timeout=20)
        pool.refresh(timeout=20)
        with pytest.raises(AcquireTimeout, match=r"used outside the pool: process 1 \(python\) of bob"):
            pool.acquire(timeout=0)
        (verdict,) = pool.explain().cards
        assert (verdict.code, "bob" in verdict.text) == ("foreign-process", True)
        cards.set(0, memory_used_mb=70000.0, memory_usage_percent=85.0, processes=None)
        pool.refresh(timeout=20)
        with pytest.raises(AcquireTimeout, match="memory usage 85 %"):
            pool.acquire(timeout=0)
        cards.set(0, memory_used_mb=10.0, memory_usage_percent=0.0, processes=())
        pool.acquire(timeout=20).release()


@pytest.mark.real
@pytest.mark.skipif(sys.platform != "linux", reason="flock")
def test_after_a_crash_a_card_stays_closed_while_somebody_computes_on_it(monkeypatch, tmp_path):
    """The kernel has freed the lock of the killed holder; what it left running keeps the card, till its end."""
    left = ComputeProcess(4711, "ann", 70000.0, "trainer")
    holder = Worker(tmp_path / "locks", 1, "night-run")
    cards = Cards(1)
    try:
        assert holder.ask("acquire 60")["cards"] == ["GPU-00000000"]
        with local_pool(monkeypatch, cards, lease_store=f"host:{tmp_path / 'locks'}") as pool:
            cards.set(0, processes=(left,))
            pool.refresh(timeout=20)
            eventually(lambda: [card.code for card in pool.explain().cards] == ["held"])
            holder.process.kill()
            holder.process.wait(60)
            # The record still names the dead holder: that this one is gone is found out by the claim.
            with pytest.raises(AcquireTimeout):
                pool.acquire(timeout=0)
            eventually(lambda: [card.code for card in pool.explain().cards] == ["foreign-process"])
            (verdict,) = pool.explain().cards
            assert "used outside the pool: process 4711 (trainer) of ann" in verdict.text
            with pytest.raises(AcquireTimeout, match=r"process 4711 \(trainer\) of ann"):
                pool.acquire(timeout=1.5)
            waiting: list[str] = []
            waiter = threading.Thread(target=lambda: waiting.append(pool.acquire(timeout=60).uuid))
            waiter.start()
            eventually(lambda: pool.stats()["waiting"] == 1)
            assert waiting == []
            cards.set(0, processes=())
            waiter.join(60)
            assert waiting == ["GPU-00000000"]
    finally:
        holder.close()


def test_a_granted_card_is_not_judged_by_its_holders_job(monkeypatch):
    """What its holder fills it with says nothing against the holder's lease, nor against its next after a release."""
    cards = Cards(1)
    with local_pool(monkeypatch, cards) as pool:
        with pool.gpu(timeout=20) as gpu:
            cards.set(0, memory_used_mb=80000.0, memory_usage_percent=98.0, utilization_percent=100.0)
            pool.refresh(timeout=20)
            assert not gpu.lost
            cards.error = DeviceError("no newer reading")
        with pool.gpu(timeout=20):
            pass
        # A reading from after the release counts.
        cards.error = None
        pool.refresh(timeout=20)
        with pytest.raises(AcquireTimeout, match="memory usage 98 %"):
            pool.acquire(timeout=0)
