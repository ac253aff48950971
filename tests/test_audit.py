"""The audit of what is installed: a vulnerability fails it, unless it is accepted with a reason; silence does not."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from pathlib import Path

import pytest

import servers

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


# -- the real program, and a service of our own ----------------------------------------------------------------


ADVISORY = {
    "id": "PYSEC-2026-1",
    "aliases": ["CVE-2026-1"],
    "modified": "2026-01-01T00:00:00Z",
    "published": "2026-01-01T00:00:00Z",
    "summary": "it is weak",
    "affected": [
        {
            "package": {"name": "weak", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "1.1"}]}],
        }
    ],
}


def knows_of(name):
    """Answers as the database does: with what it has on the package that is asked for."""

    def script(connection):
        while True:
            asked = connection.request().json()
            known = asked["package"]["name"] == name and asked["version"] == "1.0"
            body = json.dumps({"vulns": [ADVISORY]} if known else {}).encode()
            connection.send(servers.head(length=len(body)) + body)

    return script


@pytest.fixture
def environment(tmp_path):
    """A program that is asked where its packages are, as an interpreter, and has two there."""
    for name in ("weak", "sound"):
        directory = tmp_path / "site-packages" / f"{name}-1.0.dist-info"
        directory.mkdir(parents=True)
        (directory / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho {tmp_path}/site-packages\n")
    program.chmod(0o755)
    return str(program)


@pytest.fixture
def audited(environment, monkeypatch, capsys, tmp_path):
    """What `main` returns and prints with the service at a URL."""
    monkeypatch.setattr(audit, "SERVICES", ("osv",))  # of the other one the address is fixed
    monkeypatch.setattr(audit, "ACCEPTED", tmp_path / "accepted")
    audit.ACCEPTED.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(url):
        monkeypatch.setenv("PIP_AUDIT_OSV_URL", f"{url}/v1/query")
        return audit.main(environment), capsys.readouterr().out

    return run


def test_what_a_service_knows_fails_the_run(audited):
    """Through pip-audit itself, over HTTP; and no longer when it is accepted."""
    with servers.Server(knows_of("weak")) as service:
        status, out = audited(service.url)
        assert {request.json()["package"]["name"] for request in service.requests} == {"weak", "sound"}
        assert status == 1
        assert "2 packages looked up by osv, 0 not known there, 1 vulnerabilities" in out
        assert "weak 1.0: CVE-2026-1, PYSEC-2026-1; fixed in 1.1" in out
        audit.ACCEPTED.write_text("CVE-2026-1 we never call that\n")
        status, out = audited(service.url)
    assert (status, "0 vulnerabilities" in out) == (0, True)


def test_a_service_that_knows_nothing_bad(audited):
    """That is an audit, and a clean one."""
    with servers.Server(knows_of("another")) as service:
        assert audited(service.url) == (0, "2 packages looked up by osv, 0 not known there, 0 vulnerabilities\n\n")


@pytest.mark.parametrize("fault", ["refused", "503", "no JSON"])
def test_a_service_that_does_not_answer_is_no_clean_audit(audited, fault):
    """It says that nothing was audited."""
    with contextlib.ExitStack() as running:
        if fault == "refused":
            url = running.enter_context(servers.refusing())
        else:
            script = servers.answer(b"{}", 503) if fault == "503" else servers.answer(b"<html>")
            url = running.enter_context(servers.Server(script)).url
        assert audited(url) == (0, "NOT AUDITED: none of osv could be asked\n")


def test_the_list_can_be_read():
    """The one that is used."""
    audit.accepted(audit.ACCEPTED.read_text())
