"""Who a process belongs to, as far as /proc tells."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from gpupool_sync.models import ComputeProcess


def describe(pid: int, memory_mb: float | None, name: str | None = None) -> ComputeProcess:
    """
    The process with its user and name; each None where it is not told (gone, hidden, another pid namespace).

    *name* is what the driver calls it, for when /proc does not.
    """
    user = comm = None
    try:
        user = _user_name(os.stat(f"/proc/{pid}").st_uid)
        # The short name, not the command line: that may hold secrets.
        comm = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        pass
    return ComputeProcess(
        pid=pid, user=user, memory_mb=memory_mb, name=comm or (os.path.basename(name) if name else None)
    )


@functools.lru_cache(maxsize=256)
def _user_name(uid: int) -> str:
    # A directory service may be slow, so each name is asked for once.
    try:
        import pwd

        return pwd.getpwuid(uid).pw_name
    except (ImportError, KeyError):
        return str(uid)
