"""The lines of the specification that can be ticked: headings, items, fields of models, and examples."""

from __future__ import annotations

import re


def lines_of(text: str) -> list[str]:
    """Headings with their ``#``, the rest without bullet and number; of code, fields, exports and the constructor."""
    found: list[str] = []
    language: str | None = None
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("```"):
            language = None if language is not None else stripped.removeprefix("```") or "text"
        elif language == "python":
            if field := re.match(r"    (\w+): ", line):
                found.append(f"field {field.group(1)}")
            elif line.startswith("client = "):
                found.append("client = GPUWorkerPoolClient(…)")
        elif language == "bash":
            if stripped.startswith("export "):
                found.append(stripped.split('"  #')[0].removesuffix('"') + '"')
        elif line.startswith("#"):
            found.append(stripped)
        elif item := re.match(r"\s*(?:-|\d+\.) (.*)", line):
            found.append(item.group(1).strip())
    return found
