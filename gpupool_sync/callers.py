"""Where in the user's code a call came from: for warnings, and for the place of an acquire."""

from __future__ import annotations

import sys


def _package_frame(name: str) -> bool:
    return name == "gpupool_sync" or name.startswith("gpupool_sync.")


def user_stacklevel() -> int:
    """The `stacklevel` that makes a warning of the caller point at the first caller outside this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and _package_frame(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    return level


def caller() -> str:
    """File and line of the first caller outside this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _package_frame(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
