"""
Small networks of the tests' own: network namespaces joined by a switch, with faults on their links.

Everything lies in namespaces made here.  They have no names: each lasts as long as a process in it, which ends when we
do, however that is.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType

import attrs

#: Nobody routes it, and it is seen in our namespaces only.
SUBNET = "10.255.77"


class NetworkError(Exception):
    """A program that builds the network said no; the text is what it said."""


def _run(*command: str, stdin: str | None = None) -> None:
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=30.0, check=False)
    except OSError as exc:
        raise NetworkError(f"{command[0]}: {exc.strerror}") from exc
    if done.returncode:
        raise NetworkError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")


class _Namespace:
    """A network namespace, and the process that keeps it: it reads from us, and ends when we close, or end."""

    def __init__(self) -> None:
        self._keeper = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        try:
            ours, deadline = os.readlink("/proc/self/ns/net"), time.monotonic() + 30.0
            while (found := self._find()) in ("", ours):
                if self._keeper.poll() is not None or time.monotonic() > deadline:
                    raise NetworkError("unshare --net does not work")
                time.sleep(0.001)
            self.id = found
        except BaseException:
            self.close()
            raise

    def _find(self) -> str:
        try:
            return os.readlink(f"/proc/{self.pid}/ns/net")
        except OSError:  # it has ended
            return ""

    @property
    def pid(self) -> int:
        return self._keeper.pid

    def command(self, *command: str) -> list[str]:
        """What runs *command* there; it is killed when we end."""
        return ["setpriv", "--pdeathsig", "KILL", "nsenter", f"--net=/proc/{self.pid}/ns/net", *command]

    def run(self, *command: str, stdin: str | None = None) -> None:
        _run(*self.command(*command), stdin=stdin)

    def close(self) -> None:
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        try:
            self._keeper.wait(10.0)
        except subprocess.TimeoutExpired:
            self._keeper.kill()
            self._keeper.wait(10.0)


class Host(_Namespace):
    """One machine, with one link to the switch."""

    def __init__(self, name: str, number: int) -> None:
        super().__init__()
        self.name = name
        self.address = f"{SUBNET}.{number}"

    def nft(self, *rules: str) -> None:
        """Filter what comes in and goes out from now on; rules are ``input …`` or ``output …``."""
        lines = ["table ip faults {}", "delete table ip faults", "table ip faults {"]
        for chain in ("input", "output"):
            mine = [rule.partition(" ")[2] for rule in rules if rule.startswith(chain)]
            lines += [f"chain {chain} {{ type filter hook {chain} priority 0;", *mine, "}"]
        self.run("nft", "-f", "-", stdin="\n".join([*lines, "}"]) + "\n")

    def heal_nft(self) -> None:
        self.run("nft", "-f", "-", stdin="table ip faults {}\ndelete table ip faults\n")

    def ip(self, *words: str) -> None:
        self.run("ip", *words)

    def tc(self, *words: str) -> None:
        self.run("tc", *words)


class Network:
    """Hosts on one switch; a context manager that leaves nothing behind."""

    def __init__(self, *names: str) -> None:
        self._names = names
        self.hosts: dict[str, Host] = {}
        self._ending = contextlib.ExitStack()

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def __enter__(self) -> Network:
        try:
            switch = _Namespace()
            self._ending.callback(switch.close)
            switch.run("ip", "link", "add", "switch", "type", "bridge")
            switch.run("ip", "link", "set", "switch", "up")
            for number, name in enumerate(self._names, 1):
                host = self.hosts[name] = Host(name, number)
                self._ending.callback(host.close)
                port = f"port{number}"
                # Both ends are made inside: not even for an instant is there an interface among the machine's own.
                switch.run("ip", "link", "add", port, "type", "veth", "peer", "link0", "netns", str(host.pid))
                switch.run("ip", "link", "set", port, "master", "switch", "up")
                host.ip("link", "set", "lo", "up")
                host.ip("address", "add", f"{host.address}/24", "dev", "link0")
                host.ip("link", "set", "link0", "up")
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        self._ending.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@attrs.frozen
class Fault:
    """What is done to a host's link, and undone."""

    name: str
    begin: Callable[[Host], None]
    end: Callable[[Host], None]
    #: Whether nothing gets through in one direction at least.
    cuts: bool = True
    #: The program that it needs.
    program: str = "nft"

    def __str__(self) -> str:
        return self.name


def _filtered(name: str, *rules: str, cuts: bool = True) -> Fault:
    return Fault(name, lambda host: host.nft(*rules), Host.heal_nft, cuts)


def _down(host: Host) -> None:
    host.ip("link", "set", "link0", "down")


def _up(host: Host) -> None:
    host.ip("link", "set", "link0", "up")


def _prohibit(host: Host) -> None:
    host.ip("route", "replace", "prohibit", f"{SUBNET}.0/24")


def _permit(host: Host) -> None:
    host.ip("route", "replace", f"{SUBNET}.0/24", "dev", "link0", "src", host.address)


def _slow(host: Host) -> None:
    # Some packets a second, each of which waits for those before it.
    host.tc("qdisc", "add", "dev", "link0", "root", "tbf", "rate", "24kbit", "burst", "1600", "limit", "6000")


def _fast(host: Host) -> None:
    host.tc("qdisc", "delete", "dev", "link0", "root")


FAULTS = (
    _filtered("everything is dropped", "input drop", "output drop"),
    _filtered("nothing arrives", "input drop"),
    _filtered("nothing gets out", "output drop"),
    _filtered(
        "one packet of five is lost",
        "input numgen random mod 10 < 2 drop",
        "output numgen random mod 10 < 2 drop",
        cuts=False,
    ),
    _filtered("every connection is reset", "input meta l4proto tcp reject with tcp reset"),
    Fault("the link is down", _down, _up, program="ip"),
    Fault("there is no route", _prohibit, _permit, program="ip"),
    Fault("the link is slow", _slow, _fast, cuts=False, program="tc"),
)


@functools.cache
def why_not(fault: Fault | None = None) -> str | None:
    """Why there can be no network of our own here, or not this fault; None if there can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces are for root"
    missing = [
        name
        for name in ("ip", "unshare", "nsenter", "setpriv", *([fault.program] if fault else []))
        if shutil.which(name) is None
    ]
    if missing:
        return f"{', '.join(missing)} is not installed"
    try:
        with Network("probe") as network:
            if fault is not None:
                fault.begin(network["probe"])
                fault.end(network["probe"])
    except NetworkError as exc:
        return f"this kernel offers no such thing: {exc}"
    return None


def forms(faults: Sequence[Fault] = FAULTS) -> list[str]:
    """The names of the faults, for parametrisation."""
    return [fault.name.replace(" ", "-") for fault in faults]
