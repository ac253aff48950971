"""The instruments of the other tests find what they are there to find."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import pytest_socket

from helpers import HoldLog, eventually, run_threads


def test_eventually_returns_what_came_true():
    """
    A test that waits for something gets it as soon as it is there.
    """
    threading.Timer(0.05, (seen := []).append, [7]).start()

    assert eventually(lambda: seen) == [7]


def test_eventually_fails_with_the_message():
    """
    A condition that never comes true fails the test and says which it was.
    """
    with pytest.raises(pytest.fail.Exception, match=r"nobody came .waited 0.02 s; last value: 0"):
        eventually(lambda: 0, timeout=0.02, message="nobody came")
    with pytest.raises(pytest.fail.Exception, match="worked out late"):
        eventually(lambda: None, timeout=0, message=lambda: "worked out late")


def test_run_threads_runs_all_at_once():
    """
    Threads of a test are really all there at the same moment, and their results come in order.
    """
    together = threading.Barrier(5)

    def meet(number):
        together.wait(10)
        return number * number

    assert run_threads(5, meet) == [0, 1, 4, 9, 16]


def test_run_threads_raises_what_a_thread_raised():
    """
    An assertion that fails in a thread fails the test.
    """
    with pytest.raises(ZeroDivisionError):
        run_threads(3, lambda number: 1 // (number - 1))


def test_run_threads_shows_where_a_thread_is_stuck():
    """
    A thread that hangs fails the test soon, with the line it hangs at.
    """
    never = threading.Event()
    try:
        with pytest.raises(pytest.fail.Exception, match=r"1 of 2 threads(.|\n)*never\.wait"):
            run_threads(2, lambda number: number or never.wait(30), timeout=0.3)
    finally:
        never.set()


def test_a_planted_overlap_is_found():
    """
    Two users of one card at one time are found, also where a third one lies between them.
    """
    log = HoldLog()
    log.add("a", 0.0, 10.0, who="long")
    log.add("a", 1.0, 2.0, who="inside")
    log.add("a", 9.0, 11.0, who="late")
    log.add("b", 0.0, 10.0, who="other card")

    assert [(one.who, two.who) for one, two in log.overlaps()] == [("long", "inside"), ("long", "late")]


def test_holds_that_follow_each_other_do_not_overlap():
    """
    A card that is passed on, even at the very same instant, is not held twice.
    """
    log = HoldLog()
    log.add("a", 0.0, 1.0, token=1)
    log.add("a", 1.0, 2.0, token=2)
    log.add("b", 0.5, 1.5, token=1)

    assert log.overlaps() == []
    assert log.token_regressions() == []


def test_a_hold_without_an_end_counts_for_its_beginning():
    """
    A killed user is not accused of holding for ever, but of beginning while another one held.
    """
    log = HoldLog()
    log.add("a", 0.0, None, who="killed")
    log.add("a", 1.0, 3.0, who="next")
    assert log.overlaps() == []

    log.add("a", 2.0, None, who="killed too")
    assert [(one.who, two.who) for one, two in log.overlaps()] == [("next", "killed too")]


def test_a_token_that_does_not_grow_is_found():
    """
    A fencing token that repeats or falls is found, on the card where it happened.
    """
    log = HoldLog()
    for number, token in enumerate((5, 7, 7, 6, 8)):
        log.add("a", float(number), number + 0.5, token=token)
    log.add("b", 10.0, 11.0, token=1)

    assert [(one.token, two.token) for one, two in log.token_regressions()] == [(7, 7), (7, 6)]


def test_threads_that_really_overlap_are_caught():
    """
    What threads note around their own blocks shows a double hold when there is one, and none when a lock
    forbids it.
    """
    loose, strict = HoldLog(), HoldLog()
    inside, lock = threading.Barrier(4), threading.Lock()

    def use(number):
        with loose.holding("card"):
            inside.wait(10)
        with lock, strict.holding("card", token=number):
            time.sleep(0.001)

    run_threads(4, use)

    assert len(loose.overlaps()) == 3
    assert len(strict.holds()) == 4
    assert strict.overlaps() == []


def _hold_twice(log: HoldLog, inside) -> None:
    with log.holding("card"):
        inside.wait(20)


def test_processes_share_a_log(tmp_path):
    """
    A double hold by two processes is found in the file that both wrote to.
    """
    context = multiprocessing.get_context("spawn")
    log, inside = HoldLog(tmp_path / "holds"), context.Barrier(2)
    workers = [context.Process(target=_hold_twice, args=(log, inside)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)

    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len(log.overlaps()) == 1
    assert len({hold.who.partition("/")[0] for hold in log.holds()}) == 2
    with pytest.raises(TypeError):
        pickle.dumps(HoldLog())


def test_only_loopback_can_be_reached():
    """
    A test that tries to leave this machine fails instead of depending on the network.
    """
    # It warns and then raises; where warnings are errors the warning comes first.
    expected = (pytest_socket.SocketConnectBlockedError, UserWarning)
    with socket.socket() as sock, pytest.raises(expected, match=r"192\.0\.2\.1"):
        sock.connect(("192.0.2.1", 9))


def test_loopback_and_unix_sockets_can_be_reached(tmp_path):
    """
    Servers on this machine can be tested.
    """
    for family, address in ((socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_UNIX, str(tmp_path / "s"))):
        with socket.socket(family) as server, socket.socket(family) as client:
            server.bind(address)
            server.listen()
            client.connect(server.getsockname())


def _run_pytest(tmp_path: Path, source: str, **environment: str) -> str:
    """Run a test file beside a copy of our conftest, in a process of its own; return what it printed."""
    (tmp_path / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(textwrap.dedent(source))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--rootdir",
            str(tmp_path),
            str(tmp_path),
        ],
        env={**os.environ, **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    return done.stdout + done.stderr


def test_a_test_that_leaves_a_thread_behind_fails(tmp_path):
    """
    A pool that does not stop its threads is noticed in the test that made it.
    """
    output = _run_pytest(
        tmp_path,
        """
        import threading, conftest
        conftest.THREAD_GRACE = 0.2
        def start(name, daemon, seconds=3.0):
            event = threading.Event()
            threading.Thread(target=event.wait, args=(seconds,), name=name, daemon=daemon).start()
        def test_ours(): start("gpupool-monitor", True)
        def test_not_daemon(): start("worker", False)
        def test_harmless(): start("library", True)
        def test_ends_in_time(): start("gpupool-short", True, 0.05)
        """,
    )

    assert "threads left behind: gpupool-monitor" in output
    assert "threads left behind: worker" in output
    assert "4 passed, 2 errors" in output


def test_tests_do_not_see_settings_from_outside(tmp_path):
    """
    Whoever has GPU settings or a proxy in the environment gets the same results as everybody else.
    """
    output = _run_pytest(
        tmp_path,
        """
        import os
        SEEN = [name for name in os.environ if name.startswith("GPU_") or "PROXY" in name.upper()]
        def test_clean(): assert not SEEN
        def test_leaks(): os.environ["GPU_POLLING_INTERVAL"] = "1"
        def test_leaks_too():
            assert "GPU_POLLING_INTERVAL" not in os.environ
            os.environ["GPU_POLLING_INTERVAL"] = "1"
        def test_clean_after(): assert "GPU_POLLING_INTERVAL" not in os.environ
        """,
        GPU_SERVICE_ENDPOINTS="http://example.invalid",
        http_proxy="http://example.invalid",
    )

    assert "4 passed" in output
