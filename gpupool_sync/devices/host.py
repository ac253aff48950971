"""Which machine this is."""

from __future__ import annotations

import functools
import socket
from pathlib import Path

from gpupool_sync.models import HostIdentity

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@functools.lru_cache(maxsize=1)
def host_identity() -> HostIdentity:
    """
    Which machine this is: its boot id, the same in every container on it, and its host name.

    Where there is no boot id (not Linux), a network address stands in.
    """
    try:
        boot_id = _BOOT_ID.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        boot_id = ""
    if not boot_id:
        import uuid

        boot_id = f"node-{uuid.getnode():012x}"
    return HostIdentity(id=boot_id, name=socket.gethostname())
