"""docs/specification.md names every line, with modules and tests that exist."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest
from spec_lines import lines_of

import gpupool_sync

HERE = Path(__file__).parent
DOCUMENT = Path(gpupool_sync.__file__).parent.parent / "docs" / "specification.md"
#: Where the specification itself stands, in some checkouts.
ORIGINAL = DOCUMENT.parent.parent.parent / "shared" / "specification.md"
CELLS = re.compile(r"^\| (.*) \| (`.*`) \| (`test_.*) \|$")

pytestmark = pytest.mark.checkout


def listed(name):
    return (HERE / name).read_text(encoding="utf-8").splitlines()


def rows(text):
    """First cell, modules and tests of each row of a table of lines."""
    found = []
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith(("| line |", "| ---")):
            cells = CELLS.match(line)
            assert cells is not None, f"no modules or no tests: {line}"
            found.append((cells[1].replace("\\|", "|"), re.findall(r"`([^`]+)`", cells[2]), named_in(cells[3])))
    return found


def named_in(cell):
    return re.findall(r"`(test_\w+\.py)::(test_\w+)`", cell)


def headings(text):
    return [line.lstrip("# ") for line in text.splitlines() if line.startswith("#")]


@pytest.fixture(scope="module")
def document():
    return DOCUMENT.read_text(encoding="utf-8")


def parts(document):
    """The specification's own tables, those of the requirements, and what comes after."""
    specification, requirements = document.split("\n## Requirements\n")
    requirements, rest = requirements.split("\n## Deviations\n")
    return specification, requirements, rest


def test_every_line_of_the_specification_is_there_in_its_order(document):
    specification, _, _ = parts(document)
    lines = listed("specification.txt")
    assert [text for text, _, _ in rows(specification)] == [line for line in lines if not line.startswith("#")]
    assert headings(specification)[1:] == [line.lstrip("# ") for line in lines if line.startswith("#")]


def test_every_requirement_is_there(document):
    _, requirements, _ = parts(document)
    lines = [line.replace("\\|", "|") for line in listed("requirements.txt")]
    assert [text for text, _, _ in rows(requirements)] == [line for line in lines if not line.startswith("#")]
    assert headings(requirements) == [line.lstrip("# ") for line in lines if line.startswith("#")]


def test_every_module_and_every_test_that_is_named_exists(document):
    known: dict[str, set[str]] = {}
    for path in [*HERE.glob("test_*.py"), *HERE.parent.glob("test_*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        known[path.name] = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    specification, requirements, _ = parts(document)
    for text, modules, tests in [*rows(specification), *rows(requirements)]:
        assert modules, text
        assert tests, text
        for module in modules:
            assert importlib.util.find_spec(f"gpupool_sync.{module}") is not None, f"{text}: {module}"
        for file, test in tests:
            assert test in known.get(file, ()), f"{text}: {file}::{test}"


def test_every_test_of_the_specification_ticks_a_line(document):
    """Or it would be in another file."""
    ticked = set(named_in(document))
    for path in HERE.glob("test_spec_*.py"):
        if path.name == Path(__file__).name:
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                assert (path.name, node.name) in ticked


def test_every_deviation_has_a_reason_and_is_referred_to_by_number(document):
    specification, requirements, rest = parts(document)
    deviations = re.split(r"^(\d+)\. ", rest.split("\n## ")[0], flags=re.MULTILINE)
    numbers = deviations[1::2]
    assert numbers == [str(number) for number in range(1, len(numbers) + 1)]
    for text in deviations[2::2]:
        assert "Reason: " in text
    used = set(re.findall(r"\[\((\d+)\)\]\(#deviations\)", specification + requirements))
    assert used <= set(numbers)
    assert len(used) >= 8


def test_the_list_of_lines_is_that_of_the_specification():
    """Where the specification is at hand; elsewhere of the sample below, so that the reader of lines is tested."""
    sample = "# A\n#### 1. B\n- one\n  - two: x\n1. **C**: y\n```python\nclass D:\n    e: str  # f\n```\n"
    sample += '```bash\n# g\nexport H="i"  # j\n```\n```python\nclient = K(\n    l=1\n)\n```\nprose\n'
    expected = ["# A", "#### 1. B", "one", "two: x", "**C**: y", "field e", 'export H="i"']
    assert lines_of(sample) == [*expected, "client = GPUWorkerPoolClient(…)"]
    if ORIGINAL.exists():
        assert lines_of(ORIGINAL.read_text(encoding="utf-8")) == listed("specification.txt")
