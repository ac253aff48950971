"""
Look up what an environment has installed among the known vulnerabilities: ``audit.py PYTHON [PIP_AUDIT]``.

The status is 1 if there is one that ``audit-accepted`` does not list, each with the reason why it does not concern us.
Where no advisory service answers, that is said, and the status is 0: an audit that could not be made is no finding.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ACCEPTED = Path(__file__).with_name("audit-accepted")
#: Services to ask, one after another until one answers: PyPI's own, and the database that it draws on.
SERVICES = ("pypi", "osv")
#: Seconds for one of them.
PATIENCE = 240.0


def accepted(text: str) -> dict[str, str]:
    """
    Reasons by identifier of the vulnerability; lines are ``ID reason``, or comments.

    Raises:
        ValueError: one has no reason.
    """
    found = {}
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            identifier, _, reason = line.strip().partition(" ")
            if not reason:
                raise ValueError(f"{identifier} is accepted without a reason")
            found[identifier] = reason
    return found


def judge(report: Mapping[str, Any], reasons: Mapping[str, str]) -> tuple[int, int, list[str]]:
    """How many packages were looked up, how many could not be, and what is vulnerable, in sentences."""
    looked_up = skipped = 0
    found = []
    for package in report["dependencies"]:
        if "skip_reason" in package:
            skipped += 1
            continue
        looked_up += 1
        for each in package["vulns"]:
            names = {each["id"], *each.get("aliases", ())}
            if not names & reasons.keys():
                fixed = ", ".join(each.get("fix_versions", ())) or "no version yet"
                told = f"{package['name']} {package['version']}: {', '.join(sorted(names))}; fixed in {fixed}"
                found.append(told)
    return looked_up, skipped, found


def ask(service: str, python: str, command: Sequence[str]) -> Mapping[str, Any] | None:
    """What the service says; None if it does not."""
    where = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    options = ["--vulnerability-service", service, "--path", where, "--skip-editable", "--format", "json"]
    try:
        done = subprocess.run(
            [*command, *options, "--progress-spinner", "off", "--timeout", "15"],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        report = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        return None
    return report if isinstance(report, dict) else None


def main(python: str, pip_audit: str = "") -> int:
    command = [pip_audit] if pip_audit else [sys.executable, "-m", "pip_audit"]
    reasons = accepted(ACCEPTED.read_text())
    for service in SERVICES:
        report = ask(service, python, command)
        if report is None:
            continue
        looked_up, skipped, found = judge(report, reasons)
        if not looked_up:
            continue
        print(f"{looked_up} packages looked up by {service}, {skipped} not known there, {len(found)} vulnerabilities")
        print("\n".join(found))
        return 1 if found else 0
    print(f"NOT AUDITED: none of {', '.join(SERVICES)} could be asked")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
