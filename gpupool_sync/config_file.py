"""The configuration file that GPU_POOL_CONFIG names: TOML, read into plain values; `config` knows what they mean."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Mapping
from typing import Any

import attrs

from gpupool_sync.errors import ConfigError

#: A file with a thousand servers has a tenth of it; what is larger is some other file.
MAX_BYTES = 1 << 20


@attrs.frozen
class ConfigFile:
    """What a configuration file says."""

    path: str
    #: Contains secrets.
    values: Mapping[str, Any] = attrs.field(repr=False)
    #: Whether every user of this machine may read it.
    public: bool


def read(path: str, variable: str) -> ConfigFile:
    """
    Read the file at *path*, which *variable* names.

    Raises:
        ConfigError: it cannot be read, or is no TOML; the message names the file and, where there is one, the line.
    """
    # Raised outside the handlers: a chained exception could hold on to the file's text, and so to its secrets.
    problem = None
    values: dict[str, Any] = {}
    public = False
    try:
        data, mode = read_bytes(path)
        public = bool(mode & stat.S_IROTH)
        values = _parsed(data.decode("utf-8"))
    except UnicodeDecodeError as exc:
        problem = f"not UTF-8 (byte {exc.start})"
    except OSError as exc:
        problem = f"cannot be read: {exc.strerror or exc}"
    except ValueError as exc:
        problem = f"not TOML: {exc}"
    except RecursionError:
        problem = "not TOML: nested too deeply"
    if problem is not None:
        raise ConfigError(f"{variable}={path!r}: {problem}")
    return ConfigFile(path, values, public)


def read_bytes(path: str) -> tuple[bytes, int]:
    """
    Content and mode of a regular file.

    Raises:
        OSError: it cannot be read, is not a regular file, or is larger than `MAX_BYTES`.
    """
    # A pipe in the place of the file would hold the open, and then the read, for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(None, "not a regular file", path)
        pieces = []
        size = 0
        while piece := os.read(descriptor, 1 << 16):
            size += len(piece)
            if size > MAX_BYTES:
                raise OSError(None, f"larger than {MAX_BYTES >> 20} MiB", path)
            pieces.append(piece)
        return b"".join(pieces), found.st_mode
    finally:
        os.close(descriptor)


def _parsed(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    values: dict[str, Any] = tomllib.loads(text)
    return values
