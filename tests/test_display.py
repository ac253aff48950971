"""What notebooks and terminals show: everything escaped, at the right place, and gone afterwards."""

from __future__ import annotations

import contextlib
import errno
import html.parser
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cards import Cards, local_pool
from gpupool_sync import display, progress
from gpupool_sync.status import (
    CardStatus,
    CardVerdict,
    EndpointStatus,
    Explanation,
    LeasesStatus,
    LeaseStatus,
    Status,
    TicketStatus,
)

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&amp;\u202e\x1b[2J"
HERE = Path(__file__).parent


class Page(html.parser.HTMLParser):
    """A page as a browser reads it: tags with attributes, the rows of tables, all text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[tuple[str, ...]] = set()
        self.text = ""
        self.rows: list[list[str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add((tag, *(name for name, _ in attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        self.text += data
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def check(page: str) -> Page:
    """Nothing in the page but our own few tags, and no character that turns the text around."""
    read = Page(page)
    ours = {("div", "class"), ("div", "style"), ("table", "style"), ("thead",), ("tbody",), ("tr",), ("b",)}
    assert read.tags <= ours | {("th", "style"), ("td", "style"), ("span", "style")}
    assert read.text.isprintable()
    assert "color:#" not in re.sub(r'<span style="color:#[0-9a-f]{6}">●</span>', "", page), "text has the page's colour"
    return read


def evil_status(cards: int = 1) -> Status:
    endpoint = EndpointStatus(EVIL, EVIL, False, None, 1, 0, None, last_error=EVIL, arbiter=EVIL, scope=EVIL)
    gpu = CardStatus(f"{EVIL}:0", EVIL, 0, EVIL, None, None, False, uuid=EVIL, holders=[EVIL], held_for=61.0, note=EVIL)
    stuck = CardStatus(f"{EVIL}:1", EVIL, 1, EVIL, 40.0, 5.0, False, why_not=EVIL)
    return Status(1, 0, 1, 0, 1, 0, [endpoint], {}, name=EVIL, gpus=[gpu, stuck] * cards, hint=EVIL)


def evil_explanation() -> Explanation:
    verdicts = [CardVerdict(f"{EVIL}:{n}", EVIL, EVIL, "held", EVIL) for n in (0, 1, 2, 5)]
    return Explanation(EVIL, verdicts, {EVIL: EVIL}, 0, 2, 3, EVIL)


def evil_leases() -> LeasesStatus:
    lease = LeaseStatus([EVIL], EVIL, 3.0, None, EVIL, 7, EVIL, EVIL)
    ticket = TicketStatus(0, EVIL, 3.0, EVIL, EVIL, EVIL)
    return LeasesStatus([lease], [ticket], ["host"], [EVIL])


@pytest.mark.parametrize("value", [evil_status(), evil_explanation(), evil_leases()], ids=lambda v: type(v).__name__)
def test_what_others_said_is_text_and_nothing_else(value):
    """A server, a user or a note cannot bring a tag, an attribute or a script into a notebook."""
    page = check(value._repr_html_())

    assert "<script>alert('x')</script>" in page.text, "it is shown as what it is"


def test_a_table_of_thousands_is_cut():
    """A notebook stays usable with a pool of thousands of cards."""
    page = check(evil_status(cards=1000)._repr_html_())

    assert len(page.rows) == 2 + 1 + display.MOST_ROWS  # of the servers; the head; the cards
    assert f"and {2000 - display.MOST_ROWS} more" in page.text


def test_cards_of_which_the_same_is_true_share_a_row():
    """An explanation names them as the text does."""
    page = check(evil_explanation()._repr_html_())

    assert [row[0].rpartition(":")[2] for row in page.rows[1:]] == ["0-2,5"]


def test_pools_and_handles_show_themselves(monkeypatch):
    """Showing a pool does not open it; handles say whether they are held."""
    cards = Cards(2)
    cards.set(0, name=EVIL)
    cards.set(1, name=EVIL)
    pool = local_pool(monkeypatch, cards, name=EVIL.replace("\u202e\x1b", ""))
    assert "not opened yet" in check(pool._repr_html_()).text
    assert cards.reads == 0
    with pool:
        both = pool.acquire(count=2, note=EVIL)
        one = both[0]
        assert len(check(both._repr_html_()).rows) == 3
        assert "held, for" in check(one._repr_html_()).rows[1][-1]
        shown = check(pool._repr_html_())
        assert "<script>" in shown.rows[-1][1]
        assert "note" not in one._repr_html_()
        assert both._tie.grant.id not in shown.text + both._repr_html_() + one._repr_html_(), "it is a capability"
        both.release()
        assert "released" in check(one._repr_html_()).rows[1][-1]
    assert "closed" in check(pool._repr_html_()).text


def test_the_line_of_a_wait_is_one_line():
    """Place, who and why, without anything that drives a terminal."""
    line = display.waiting_line(evil_explanation(), 75.0, 2)

    assert line.isprintable()
    assert line.startswith("waiting 1 min 15 s for ")
    assert ", place 2: " in line


# -- who is shown a wait, and where ----------------------------------------------------------------------------------


class Screen:
    """A standard error that says whether it is a terminal."""

    def __init__(self, terminal: bool) -> None:
        self._terminal = terminal
        self.text = ""

    def isatty(self):
        return self._terminal

    def fileno(self):
        raise OSError(errno.ENOTTY, "no descriptor")

    def write(self, text):
        self.text += text
        return len(text)

    def flush(self):
        pass


def started_by(name: str, wanted: bool | None, **options) -> progress.Progress:
    """A `Progress` that is made on behalf of a module of that name."""
    code = "from contextlib import ExitStack\nwith ExitStack() as stack: made = stack.enter_context(Block())"

    class Block:
        __enter__ = eval("lambda self: Progress(wanted, **options)", {  # as pool.py calls it
            "__name__": "gpupool_sync.pool", "Progress": progress.Progress, "wanted": wanted, "options": options,
        })  # fmt: skip

        def __exit__(self, *_):
            pass

    space = {"__name__": name, "Block": Block}
    exec(code, space)
    return space["made"]


@pytest.mark.parametrize(
    ("name", "wanted", "terminal", "expected"),
    [
        ("__main__", None, True, "_Terminal"),
        ("__main__", None, False, "NoneType"),
        ("__main__", False, True, "NoneType"),
        ("__main__", True, False, "_Lines"),
        ("training.loop", None, True, "NoneType"),
        ("training.loop", True, True, "_Terminal"),
    ],
)
def test_where_a_wait_is_shown(monkeypatch, name, wanted, terminal, expected):
    """Not asked, only the program itself on a terminal; asked, also a library, and without a terminal in lines."""
    monkeypatch.setattr(sys, "stderr", Screen(terminal))
    monkeypatch.setenv("TERM", "xterm")

    assert type(started_by(name, wanted)._surface).__name__ == expected


def test_a_worker_process_does_not_write_over_its_siblings(monkeypatch):
    """A pool that came by fork or in a pickle is quiet, unless it is told not to be."""
    monkeypatch.setattr(sys, "stderr", Screen(True))
    monkeypatch.setenv("TERM", "xterm")

    assert started_by("__main__", None, inherited=True)._surface is None
    assert started_by("__main__", True, inherited=True)._surface is not None


def test_a_display_that_breaks_breaks_no_wait(monkeypatch):
    """A closed terminal, or an explanation that fails, is not the caller's trouble."""
    screen = Screen(False)
    monkeypatch.setattr(sys, "stderr", screen)
    first, second = progress.Progress(True), progress.Progress(True)
    first.tell(3.0, 1, evil_explanation)
    second.tell(3.0, 2, evil_explanation)  # quiet: another one is shown
    assert screen.text.count("waiting") == 1
    first.close()
    second.tell(4.0, 1, lambda: 1 / 0)
    second.tell(5.0, 1, evil_explanation)
    second.close()
    assert screen.text.count("waiting") == 1


class Program:
    """`waiting_program.py` with a terminal as its standard error."""

    def __init__(self, mode: str, options: dict | None = None, *, terminal: bool = True) -> None:
        self._master, slave = pty.openpty() if terminal else os.pipe()
        environ = {**os.environ, "TERM": "xterm", "COLUMNS": "160", "PYTHONPATH": str(HERE)}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", str(HERE / "waiting_program.py"), mode, json.dumps(options or {})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=slave,
            env=environ,
            text=True,
        )
        os.close(slave)
        self.seen = ""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.communicate()
        os.close(self._master)

    def wait_for(self, pattern: str, timeout: float = 100.0) -> None:
        """Until the terminal has shown it."""
        end = time.monotonic() + timeout
        while not re.search(pattern, self.seen):
            assert self._read(end), f"{pattern!r} was not shown: {self.seen!r}"

    def _read(self, end: float) -> bool:
        if not select.select([self._master], [], [], max(0.0, end - time.monotonic()))[0]:
            return False
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            data = os.read(self._master, 65536)
            self.seen += data.decode()
            return bool(data)
        return False

    def first_line(self) -> None:
        assert self._process.stdout.readline() == "waits\n"

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def release(self) -> None:
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def end(self) -> list[str]:
        """What it printed, once it has ended and everything it showed was read."""
        out, _ = self._process.communicate(timeout=120)
        while self._read(time.monotonic() + 5):
            pass
        assert self._process.returncode == 0, self.seen
        return out.split("\n")[:-1]


ERASE = "\r\x1b[2K"


@pytest.mark.real
@pytest.mark.parametrize("mode", ["script", "thread"])
def test_a_terminal_has_one_line_while_a_script_waits(mode):
    """It says for what, the place and who has it, is drawn over, and is gone when the GPU comes."""
    with Program(mode) as program:
        program.wait_for(r"waiting [0-9.]+ s for one GPU, place [12]: .*held by here .*, this process")
        program.wait_for(r"(?s)waiting.*waiting")
        program.release()
        assert program.end()[-2:] == ["granted", "over"]

    drawn = program.seen.split(ERASE)
    assert drawn[0] == "", "nothing before the first line"
    assert drawn[-1] == "", "erased at the end"
    assert "\n" not in program.seen
    lines = [text for text in drawn if text]
    assert all(text.startswith("waiting ") and len(text) < 160 for text in lines)
    assert all(text.isprintable() for text in lines), "the note of the lease drives nothing"


@pytest.mark.real
def test_ctrl_c_ends_a_shown_wait_at_once_and_leaves_no_line():
    """An interrupt finds the waiting thread as it would without a display."""
    with Program("script") as program:
        program.wait_for("waiting")
        program.interrupt()
        assert program.end() == ["waits", "over"]
    assert program.seen.endswith(ERASE)


@pytest.mark.real
@pytest.mark.parametrize(
    ("mode", "options", "terminal"),
    [("library", {}, True), ("child", {}, True), ("script", {"progress": False}, True), ("script", {}, False)],
    ids=["library", "forked", "refused", "piped"],
)
def test_who_has_not_asked_is_shown_nothing(mode, options, terminal):
    """Libraries, worker processes and programs without a terminal are quiet."""
    with Program(mode, options, terminal=terminal) as program:
        program.first_line()
        time.sleep(0 if mode == "child" else 0.7)  # twice what it takes to be shown
        program.release()
        assert program.end()[-2:] == ["granted", "over"]
    assert program.seen == ""


@pytest.mark.real
def test_a_short_wait_imports_nothing():
    """Before it is to be shown, nothing of the display is even loaded."""
    with Program("short") as program:
        program.first_line()
        time.sleep(0.5)
        program.release()
        assert program.end()[-3:] == ["granted", "[]", "over"]
    assert program.seen == ""
