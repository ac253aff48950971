"""The audit of what is installed: a vulnerability fails it, unless it is accepted with a reason; silence does not."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parent.parent / ".ci" / "audit.py"
if not PATH.exists():
    pytest.skip("the audit is in the checkout only", allow_module_level=True)
_spec = importlib.util.spec_from_file_location("audit", PATH)
audit = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(audit)

pytestmark = pytest.mark.checkout

SOUND = {"name": "sound", "version": "1.0", "vulns": []}
UNKNOWN = {"name": "unknown", "skip_reason": "not found"}
WEAK = {
    "name": "weak",
    "version": "1.0",
    "vulns": [{"id": "PYSEC-2026-1", "aliases": ["CVE-2026-1"], "fix_versions": ["1.1"]}],
}


@pytest.fixture
def pip_audit(tmp_path):
    """A program in its place, which says *told* of every service."""

    def make(told: str, status: int = 0) -> str:
        program = tmp_path / "pip-audit"
        program.write_text(f"#!{sys.executable}\nimport sys\nprint({told!r})\nsys.exit({status})\n")
        program.chmod(0o755)
        return str(program)

    return make


def test_a_vulnerability_fails_the_run(pip_audit, capsys):
    """It is named, with all its names and the version that mends it."""
    program = pip_audit(json.dumps({"dependencies": [SOUND, UNKNOWN, WEAK]}), status=1)
    assert audit.main(sys.executable, program) == 1
    out = capsys.readouterr().out
    assert "weak 1.0: CVE-2026-1, PYSEC-2026-1; fixed in 1.1" in out
    assert "2 packages looked up by pypi, 1 not known there" in out


@pytest.mark.parametrize("name", ["PYSEC-2026-1", "CVE-2026-1"])
def test_one_that_is_accepted_does_not(pip_audit, capsys, monkeypatch, tmp_path, name):
    """By any of its names."""
    monkeypatch.setattr(audit, "ACCEPTED", tmp_path / "accepted")
    audit.ACCEPTED.write_text(f"# comment\n\n{name} we never call that\n")
    assert audit.main(sys.executable, pip_audit(json.dumps({"dependencies": [WEAK]}), status=1)) == 0
    assert "0 vulnerabilities" in capsys.readouterr().out


def test_a_reason_is_needed():
    """Else nobody could tell later whether it still holds."""
    with pytest.raises(ValueError, match="without a reason"):
        audit.accepted("CVE-2026-1\n")


@pytest.mark.parametrize(
    "told", ["", "no JSON", "[]", json.dumps({"dependencies": [UNKNOWN]})], ids=["nothing", "text", "list", "unknown"]
)
def test_where_no_service_answers_it_says_so(pip_audit, capsys, told):
    """An audit that was not made is no finding, and no clean bill either."""
    assert audit.main(sys.executable, pip_audit(told, status=1)) == 0
    assert "NOT AUDITED" in capsys.readouterr().out


def test_the_list_can_be_read():
    """The one that is used."""
    audit.accepted(audit.ACCEPTED.read_text())
