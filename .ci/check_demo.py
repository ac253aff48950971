"""Check what ``gpupool-sync demo --json`` printed: one JSON object, and everything in it is as promised."""

from __future__ import annotations

import json
import sys
from pathlib import Path

KEYS = {
    "jobs_done",
    "jobs_failed",
    "jobs_run_again",
    "double_holds",
    "leaked",
    "killed_worker",
    "gpus_of_killed_worker",
    "gpus_back_after_s",
    "per_endpoint",
    "killed",
    "recovered",
    "jobs_on_killed_after_recovery",
    "wait_p50_s",
    "wait_p99_s",
}


def faults(result: object) -> list[str]:
    """What is wrong with *result*, in sentences; empty if nothing is."""
    if not isinstance(result, dict):
        return [f"an object was expected, not {type(result).__name__}"]
    if missing := KEYS - result.keys():
        return [f"missing: {', '.join(sorted(missing))}"]
    found = [
        f"{key} is {result[key]!r}, not 0" for key in ("jobs_failed", "double_holds", "leaked") if result[key] != 0
    ]
    if result["jobs_done"] < 60:
        found.append(f"jobs_done is {result['jobs_done']!r}, not at least 60")
    if sum(result["per_endpoint"].values()) != result["jobs_done"]:
        found.append("per_endpoint does not add up to jobs_done")
    if not result["killed_worker"] or not result["gpus_of_killed_worker"] or result["gpus_back_after_s"] is None:
        found.append(f"the GPUs of the killed worker did not come back: {result['gpus_of_killed_worker']!r}")
    if not result["killed"] or not result["recovered"]:
        found.append(f"killed is {result['killed']!r} and recovered is {result['recovered']!r}")
    if result["jobs_on_killed_after_recovery"] < 1:
        found.append("the killed server did not serve again")
    if not 0 <= result["wait_p50_s"] <= result["wait_p99_s"] <= 60:
        found.append(f"waits of {result['wait_p50_s']!r} and {result['wait_p99_s']!r} s make no sense")
    return found


if __name__ == "__main__":
    problems = faults(json.loads(Path(sys.argv[1]).read_text()))
    sys.exit("\n".join(problems) or 0)
