"""The statistics server of one host: ``gpupool-sync serve``.

Importing this package costs nothing; its parts need the optional extra ``server``.
"""

from __future__ import annotations

import importlib.util

from gpupool_sync.errors import MissingExtra

__all__ = ["require_extra"]


def require_extra(extra: str, *modules: str) -> None:
    """
    See to it that optional modules are there, without importing them.

    Raises:
        MissingExtra: one is not; the message has the line that installs it.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtra(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed: "
            f"pip install 'gpupool-sync[{extra}]'"
        )
