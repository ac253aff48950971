"""The benchmarks still run, and their arithmetic is right.  Nothing here is about speed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the benchmarks are in the checkout only", allow_module_level=True)
sys.path.insert(0, str(ROOT))  # pytest itself only finds what lies in tests/

from benchmarks import __main__ as main  # noqa: E402
from benchmarks import _harness as harness  # noqa: E402

pytestmark = pytest.mark.checkout

#: In the order of the tables.
NAMES = (
    "inprocess",
    "handover",
    "host_store",
    "wakeup",
    "fairness",
    "redis_store",
    "server_leases",
    "sweep",
    "freshness",
    "endpoints",
    "serving",
    "waiting",
    "bookkeeping",
    "import_time",
)
#: Those that compare nothing without a program that may be missing.
NEED_REDIS = ("redis_store",)


@pytest.mark.real
@pytest.mark.parametrize("name", NAMES)
def test_each_benchmark_runs_in_its_smallest_form(name):
    """
    Every benchmark runs to its end and prints a table, with those peers that are installed.
    """
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--smoke", "--only", name],
        cwd=ROOT,
        env={**os.environ, "GPU_SERVICE_ENDPOINTS": "nonsense"},  # settings from outside do not count
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )

    assert process.returncode == 0, process.stderr
    assert f"({name})" in process.stdout
    if name not in NEED_REDIS or shutil.which("redis-server"):
        assert "ours" in process.stdout
    assert "did not stop" not in process.stderr


@pytest.mark.real
def test_without_the_peers_the_others_go_on():
    """
    The extra `bench` is not needed to try them: who is missing is named and left out.
    """
    program = """
import sys
sys.modules.update(aiohttp=None, psycopg_pool=None, sqlalchemy=None, filelock=None, waitress=None)
from benchmarks.__main__ import main
sys.exit(main(["--smoke", "--only", "sweep", "--only", "inprocess", "--only", "host_store", "--only", "waiting"]))
"""
    process = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=150, check=False
    )

    assert process.returncode == 0, process.stderr
    for name in ("aiohttp", "psycopg_pool", "sqlalchemy", "filelock", "waitress"):
        assert f"{name} is not installed" in process.stdout


def test_the_document_has_a_place_for_every_benchmark():
    """
    `--markdown` finds the marks that it writes between.
    """
    assert main.NAMES == NAMES
    text = main.DOCUMENT.read_text()
    for name in (*NAMES, main.TARGETS, "machine"):
        replaced = harness.between_marks(text, name, "content of this test")
        assert replaced.count("content of this test") == 1
        assert harness.between_marks(replaced, name, "content of this test") == replaced


def test_a_document_without_marks_is_not_touched():
    """
    Where the marks are missing nothing is guessed.
    """
    with pytest.raises(ValueError, match="begin: sweep"):
        harness.between_marks("no marks", "sweep", "content")


def test_smoke_figures_are_not_written_into_the_document(capsys):
    """
    A run that measures nothing cannot replace the figures of one that did.
    """
    for arguments in (["--smoke", "--markdown"], ["--rounds", "1", "--markdown"]):
        with pytest.raises(SystemExit):
            main.main(arguments)
        assert arguments[0] in capsys.readouterr().err


def test_all_targets_are_in_one_table(monkeypatch, tmp_path, capsys):
    """
    A run of everything ends with one table of what has a target, met or missed, and writes it into the document.
    """
    found = {
        "one": harness.Report([harness.Row("fast", [1.0], "them", [2.0], target=1.0), harness.Row("seen", [1.0])]),
        "two": harness.Report([harness.Row("slow", [3.0], "them", [2.0], target=1.0)], ["a note"]),
    }
    for name, report in found.items():
        module = types.SimpleNamespace(TITLE=f"Title {name}", run=lambda mode, report=report: report)
        monkeypatch.setitem(sys.modules, f"benchmarks.{name}", module)
    document = tmp_path / "performance.md"
    document.write_text(
        "\n".join(f"<!-- begin: {n} -->\n<!-- end: {n} -->" for n in ("machine", "targets", "one", "two"))
    )
    monkeypatch.setattr(main, "NAMES", ("one", "two"))
    monkeypatch.setattr(main, "DOCUMENT", document)
    monkeypatch.setattr(main, "clean_environment", lambda: None)

    assert main.main(["--markdown"]) == 0

    table = document.read_text().partition("begin: targets")[2].partition("end: targets")[0]
    assert "| Title one: fast | them | 1.00 s | 2.00 s | 0.500 | one round | ≤ 1: met |" in table
    assert "| Title two: slow | them | 3.00 s | 2.00 s | 1.50 | one round | ≤ 1: missed |" in table
    assert "seen" not in table
    assert "All targets" in capsys.readouterr().out


def test_a_ratio_is_the_median_of_the_rounds():
    """
    A machine that was slow for one round moves neither the ratio nor the verdict, only the spread.
    """
    row = harness.Row("what", ours=[1.0, 8.0, 1.0], against="them", theirs=[2.0, 2.0, 2.0], target=0.8)

    assert row.ratio == 0.5
    assert row.verdict == "≤ 0.8: met"
    assert row.cells() == ["what", "them", "1.00 s", "2.00 s", "0.500", "0.500–4.00", "≤ 0.8: met"]


def test_a_missed_target_says_so():
    """
    The verdict is not bent.
    """
    assert harness.Row("what", [3.0], "them", [2.0], target=1.4).verdict == "≤ 1.4: missed"
    assert harness.Row("what", [0.002], target=0.001).verdict == "≤ 1.00 ms: missed"
    assert harness.Row("what", [1.0], "them", [20.0], target=1 / 30).verdict == "≤ 0.0333: missed"
    assert harness.Row("what", [3.0], "them", [2.0]).verdict == ""


def test_a_row_without_a_rival_is_absolute():
    """
    Its spread is that of the values, and there is no ratio.
    """
    row = harness.Row("what", ours=[1e-3, 2e-3, 4e-3])
    assert row.cells() == ["what", "—", "2.00 ms", "—", "—", "1.00 ms–4.00 ms", ""]


def test_contenders_take_turns_and_begin_in_turn():
    """
    Nobody always comes first, and the round for warming up does not count.
    """
    order = []

    def contender(name):
        def turn():
            order.append(name)
            return {"wall": float(len(order))}

        return harness.Contender(name, turn)

    found = harness.take_turns([contender("a"), contender("b")], rounds=3)

    assert order == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert harness.column(found, "a", "wall") == [3.0, 6.0, 7.0]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (21.04, "21.0 s"),
        (0.02049, "20.5 ms"),
        (1e-3, "1.00 ms"),
        (9.996e-4, "1.00 ms"),
        (47.8e-6, "47.8 µs"),
        (123.4e-6, "123 µs"),
        (5e-9, "5.00 ns"),
        (0.0, "0 ns"),
    ],
)
def test_seconds_are_printed_in_a_unit_that_suits(value, text):
    """
    Three digits, whatever the size.
    """
    assert harness.quantity(value, "s") == text


def test_more_files_than_allowed_are_refused():
    """
    A size for which the system's limit is too low is left out instead of failing half-way.
    """
    resource = pytest.importorskip("resource")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        pytest.skip("there is no limit here")

    assert harness.room_for_files(10)
    assert not harness.room_for_files(hard + 1)
