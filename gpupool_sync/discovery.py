"""Endpoints that are found instead of listed: in a file, or behind a name with several addresses.

A source is looked at on the monitor's schedule, like an endpoint.  What it says counts until it says something else: a
file that cannot be read, or is just being written, changes nothing.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import re
import socket
import stat
import threading
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any

import attrs

from gpupool_sync.config import Endpoint, EndpointSource, Settings, endpoint_in_text, unique_endpoints
from gpupool_sync.config_file import read_bytes
from gpupool_sync.errors import ConfigError, EndpointUnavailable, GPUPoolError
from gpupool_sync.starting import start

logger = logging.getLogger(__name__)

#: Seconds after the first failed look of a source that has never said anything; doubles up to the poll interval.
FIRST_PAUSE = 0.25
#: Seconds between two looks of which the second has to confirm that an endpoint is gone.
CONFIRM = 1.0


@attrs.frozen
class Found:
    """What a source lists."""

    source: str
    endpoints: tuple[Endpoint, ...]


class Watch:
    """
    One source on the monitor's schedule.

    `poll` is called by one thread at a time (the monitor sees to it), everything else from any thread.  A look has no
    time limit of its own where a network file system or the resolver hangs; so it is done on a thread that is left
    behind then, and no second one is started before that one is back.
    """

    #: What the monitor asks of endpoints; a source has no breaker.
    open = False

    def __init__(self, source: EndpointSource, settings: Settings) -> None:
        self.id = source.spec
        self._source = source
        self._timeout = settings.endpoint_timeout
        self._interval = settings.poll_interval
        # A name is asked for less often than a file: others have to answer it.
        self._pause = settings.poll_interval if source.path is not None else settings.health_check_interval
        self._looking: _Look | None = None
        self._content: object = None
        self._failures = 0
        self._absent: frozenset[str] = frozenset()  # URLs that the last look missed
        self._unsettled = False
        #: Why the last look failed; None if it did not.
        self.problem: str | None = None
        #: What the source lists, as far as is known.
        self.endpoints: tuple[Endpoint, ...] = ()

    @property
    def sick(self) -> bool:
        """Whether the last look failed; such sources are looked at among the sick endpoints."""
        return self.problem is not None

    @property
    def known(self) -> bool:
        """Whether it says where endpoints are; one that does not may do so later."""
        return self.problem is None and bool(self.endpoints)

    @property
    def why(self) -> str | None:
        """What is wrong with it, for people."""
        return self.problem or (None if self.endpoints else "it lists no endpoint")

    def poll(self) -> Found:
        """Look once; what cannot be read leaves the list as it is, and is told once."""
        try:
            listed = self._listed(self._look())
        except GPUPoolError as exc:
            self._failed(exc.message if isinstance(exc, EndpointUnavailable) else str(exc))
        except OSError as exc:
            self._failed(f"cannot be read: {exc.strerror or exc}")
        else:
            self._failures = 0
            if self.problem is not None:
                logger.warning("%s is read again", self.id)
            self.problem = None
            self._take(listed)
        return Found(self.id, self.endpoints)

    def pause(self, retry_after: float | None = None) -> float:
        """Seconds until the next look is due."""
        if self._failures:
            if not self.endpoints:
                return min(self._interval, FIRST_PAUSE * 2.0 ** min(self._failures - 1, 30))
            return self._interval
        return min(self._interval, CONFIRM) if self._unsettled else self._pause

    def abort(self) -> None:
        """A poll that is under way returns at once."""
        looking = self._looking
        if looking is not None:
            looking.done.set()

    def _failed(self, text: str) -> None:
        self._failures += 1
        if text != self.problem:
            kept = f"; the {len(self.endpoints)} endpoints that it listed before stay" if self.endpoints else ""
            logger.warning("%s: %s%s", self.id, text, kept)
        self.problem = text

    def _look(self) -> Any:
        looking = self._looking
        if looking is None:
            looking = self._looking = _Look(self._read_file if self._source.path is not None else self._resolve)
        if not looking.done.wait(self._timeout):
            raise EndpointUnavailable(self.id, f"no answer within {self._timeout:g} s")
        self._looking = None
        if looking.error is not None:
            raise looking.error
        if looking.result is None:
            raise EndpointUnavailable(self.id, "not waited for, the pool is being closed")
        return looking.result

    def _take(self, listed: Sequence[Endpoint]) -> None:
        """
        Believe what was listed; that an endpoint is gone only when it is missing twice in a row.

        A file that is written in place is shorter for a moment, and a name server may leave addresses out.
        """
        urls, ids = {each.url for each in listed}, {each.id for each in listed}
        missing = [each for each in self.endpoints if each.url not in urls and each.id not in ids]
        kept = [each for each in missing if each.url not in self._absent]
        self._absent = frozenset(each.url for each in kept)
        self._unsettled = self._unsettled or bool(kept)
        self.endpoints = (*listed, *kept)

    # -- a file ------------------------------------------------------------------------------------------------

    def _read_file(self) -> bytes:
        path = self._source.path
        assert path is not None
        # Always read, as it is small: by its times alone a change within their resolution would be missed.
        data, mode = read_bytes(path)
        if self._content is None and mode & stat.S_IROTH and re.search(rb"://[^/?#\s]*@", data):
            logger.warning("%s has passwords, and every user of this machine may read it: chmod 600", self.id)
        return data

    def _listed(self, told: Any) -> list[Endpoint]:
        template = self._source.template
        self._unsettled = False
        if not isinstance(told, bytes):
            return [self._at(address) for address in told]
        # A last line without an end may be the half of one; when it stays as it is, it is whole.
        whole = self._content is None or told == self._content
        self._content = told
        try:
            text = told.decode("utf-8-sig")
        except UnicodeDecodeError as exc:
            raise ConfigError(f"not UTF-8 (byte {exc.start})") from None
        if text.lstrip()[:1] in ("[", "{") or (self._source.path or "").endswith(".json"):
            return endpoints_of_file_sd(text, template)
        self._unsettled = not whole and bool(text) and not text.endswith("\n")
        return endpoints_of_lines(text[: text.rfind("\n") + 1] if self._unsettled else text, template)

    # -- a name ------------------------------------------------------------------------------------------------

    def _resolve(self) -> list[str]:
        name = self._source.template.host
        try:
            found = socket.getaddrinfo(name, None, 0, socket.SOCK_STREAM)
        except socket.gaierror as exc:
            raise EndpointUnavailable(self.id, f"the name cannot be resolved: {exc.strerror}") from exc
        except UnicodeError as exc:
            raise EndpointUnavailable(self.id, "the name cannot be resolved: not a valid name") from exc
        # One family: a host with an IPv4 and an IPv6 address would be two endpoints, and its cards, where the server
        # tells no UUIDs, be granted twice.
        for family in (socket.AF_INET, socket.AF_INET6):
            addresses = {str(address[0]) for kind, _, _, _, address in found if kind == family}
            addresses = {each for each in addresses if "%" not in each}  # with a zone it means nothing elsewhere
            if addresses:
                return sorted(addresses, key=lambda each: int(ipaddress.ip_address(each)))
        raise EndpointUnavailable(self.id, "the name has no address")

    def _at(self, address: str) -> Endpoint:
        template = self._source.template
        parts = urllib.parse.urlsplit(template.url)
        host = f"[{address}]" if ":" in address else address
        netloc = host if parts.port is None else f"{host}:{parts.port}"
        return attrs.evolve(
            template,
            url=f"{parts.scheme}://{netloc}{parts.path}",
            name=None if template.name is None else f"{template.name}-{address.replace(':', '-')}",
            # By its name the server is known to its certificate, and perhaps to a proxy before it.
            server_name=template.server_name or template.host,
        )


class _Look:
    """One look, on a thread of its own that nobody has to wait for."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self.done = threading.Event()
        self.result: Any = None
        self.error: Exception | None = None
        start(threading.Thread(target=self._run, name="gpupool-look", daemon=True))

    def _run(self) -> None:
        try:
            self.result = self._work()
        except Exception as exc:
            self.error = exc
        finally:
            self.done.set()


def endpoints_of_lines(text: str, template: Endpoint) -> list[Endpoint]:
    """
    The endpoints of a file with one URL or name=URL a line; ``#`` begins a comment.

    Raises:
        ConfigError: a line is neither, or two of them contradict each other; the message names the line.
    """
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        item = re.sub(r"(^|\s)#.*", "", line).strip()
        if item:
            found.append(_endpoint(item, template, f"line {number}"))
    return list(unique_endpoints(found))


def endpoints_of_file_sd(text: str, template: Endpoint) -> list[Endpoint]:
    """
    The endpoints of Prometheus' ``file_sd`` format in JSON: ``[{"targets": ["host:port"], "labels": {…}}]``.

    The label ``__scheme__`` says ``https``; other labels mean nothing here.

    Raises:
        ConfigError: the text is something else, or incomplete.
    """
    try:
        groups = json.loads(text)
    except (ValueError, RecursionError):
        groups = None
    if not isinstance(groups, list):
        raise ConfigError("not a complete JSON list of target groups")
    found = []
    for number, group in enumerate(groups, 1):
        targets = group.get("targets") if isinstance(group, dict) else None
        labels = group.get("labels") or {} if isinstance(group, dict) else None
        if not isinstance(targets, list) or not isinstance(labels, dict):
            raise ConfigError(f'group {number} is not an object with a list "targets"')
        scheme = labels.get("__scheme__", "http")
        for target in targets:
            if not isinstance(target, str):
                raise ConfigError(f"group {number}: a target is not a text")
            url = target if "://" in target else f"{scheme}://{target}"
            found.append(_endpoint(url, template, f"group {number}"))
    return list(unique_endpoints(found))


def _endpoint(item: str, template: Endpoint, where: str) -> Endpoint:
    try:
        return endpoint_in_text(item, template)
    except ConfigError as exc:
        problem = str(exc)
    raise ConfigError(f"{where}: {problem}")
