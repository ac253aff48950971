"""Compare what our server says of this machine's GPUs with nvidia-smi, field by field.

    python examples/compare_with_nvidia_smi.py                 # reads the devices as `gpupool-sync serve` does
    python examples/compare_with_nvidia_smi.py http://host:8000  # asks a running server

Prints a Markdown table; ends with 1 if a field that should not move differs, or one that moves differs by too much.
Run it on an idle machine: readings of a busy one change between the two looks.
"""

from __future__ import annotations

import json
import subprocess
import sys

import requests

from gpupool_sync import devices, wire

#: nvidia-smi's column, our field, and by how much they may differ between two looks.
FIELDS = (
    ("index", "gpu_id", 0.0),
    ("uuid", "uuid", 0.0),
    ("name", "name", 0.0),
    ("memory.total", "memory_total_mb", 1.0),
    ("memory.used", "memory_used_mb", 64.0),
    ("utilization.gpu", "utilization_percent", 15.0),
    ("temperature.gpu", "temperature_c", 5.0),
    ("power.draw", "power_draw_w", 30.0),
    ("power.limit", "power_limit_w", 1.0),
)


def nvidia_smi() -> dict[str, dict[str, str]]:
    """Its words by UUID."""
    columns = [column for column, _, _ in FIELDS]
    text = subprocess.run(
        ["nvidia-smi", f"--query-gpu={','.join(columns)}", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    rows = (dict(zip(columns, (cell.strip() for cell in line.split(",")), strict=True)) for line in text.splitlines())
    return {row["uuid"]: row for row in rows}


def ours(url: str | None) -> dict[str, dict[str, object]]:
    """What `/gpu/summary` says, by UUID."""
    if url is not None:
        document = requests.get(f"{url.rstrip('/')}/gpu/summary", timeout=10).json()
    else:
        reader = devices.open_reader()
        document = json.loads(wire.dump(wire.summary_document(reader.read(10.0), timestamp="now")))
        reader.close()
    return {card["uuid"]: card for card in document["gpus_summary"]}


def agrees(theirs: str, mine: object, tolerance: float) -> bool:
    """Whether the two say the same; what nvidia-smi calls N/A must be None."""
    if theirs.startswith("["):
        return mine is None
    if isinstance(mine, (int, float)):
        return abs(float(theirs) - mine) <= tolerance
    return theirs == mine


def main(argv: list[str]) -> int:
    """Print the table; 0 if everything agrees."""
    theirs, mine = nvidia_smi(), ours(argv[0] if argv else None)
    print("| GPU | field | nvidia-smi | ours | agrees |\n| --- | --- | --- | --- | --- |")
    wrong = set(theirs) ^ set(mine)
    for uuid in sorted(theirs.keys() & mine.keys()):
        for column, field, tolerance in FIELDS:
            good = agrees(theirs[uuid][column], mine[uuid].get(field), tolerance)
            if not good:
                wrong.add(uuid)
            print(
                f"| {theirs[uuid]['index']} | {field} | {theirs[uuid][column]} | {mine[uuid].get(field)} "
                f"| {'yes' if good else 'NO'} |"
            )
    for uuid in sorted(set(theirs) ^ set(mine)):
        print(f"| ? | uuid | {uuid in theirs} | {uuid in mine} | NO |")
    return 1 if wrong or not theirs else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
