"""``gpupool-sync doctor``: what is wrong, and what to do about it."""

from __future__ import annotations

import difflib
import os
import shutil
import time
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal

import attrs
import click

from gpupool_sync.cli._common import (
    SCOPES,
    client_options,
    make_console,
    milliseconds,
    plain,
    plural,
    print_json,
    quiet_log,
    seconds,
)
from gpupool_sync.errors import BadAnswer, ConfigError, EndpointUnavailable, GPUPoolError

if TYPE_CHECKING:
    from gpupool_sync.config import Endpoint, Settings
    from gpupool_sync.endpoint import PolledEndpoint
    from gpupool_sync.models import Snapshot

#: Variables that are ours and no pool's setting.
OTHER_VARIABLES = {
    "GPU_POOL_CONFIG",
    "GPU_POOL_INHERITED",
    "GPU_POOL_LOCK_DIR",
    "GPU_POOL_PASSTHROUGH",
    "GPU_POOL_REMOTE_PROGRAM",
    "GPU_POOL_SSH",
    "GPU_POOL_VISIBLE",
}
#: How much alike two names of variables must be for one to be taken for a mistyped other, 0 to 1.
ALIKE = 0.85
#: Servers that are asked at the same time.
AT_ONCE = 32
#: UUIDs that a finding names; the rest is counted.
NAMED = 3

Level = Literal["problem", "warning", "note"]


@attrs.frozen
class Finding:
    """
    Something to know.

    A *problem* is wrong and makes the exit status 1; a *warning* works as long as one minds it; a *note* says how far
    something reaches.
    """

    level: Level
    where: str  # an endpoint's id, "configuration" or "this machine"
    what: str
    do: str


@attrs.frozen
class EndpointReport:
    """One endpoint; None where it has not told."""

    endpoint_id: str
    url: str
    reachable: bool
    protocol: str | None = None
    grants_leases: bool = False
    round_trip_ms: float | None = None
    age: float | None = None  # seconds since its server took the sample
    gpus: int = 0
    gpus_unavailable: int = 0
    with_uuid: int = 0
    host_name: str | None = None
    host_id: str | None = None
    simulated: bool = False
    is_this_machine: bool = False
    arbiter: str | None = None
    scope: str | None = None
    error: str | None = None
    origin: str = ""  # what named it: "argument", a variable, a configuration file, a source


@attrs.frozen
class MachineReport:
    """The machine that this command runs on."""

    host_name: str
    host_id: str
    read_by: str | None  # how its GPUs are read; None if they cannot be
    nvidia_smi: str | None  # the program's path; None if there is none
    gpus: int
    gpus_unavailable: int
    error: str | None = None


@attrs.frozen
class Diagnosis:
    """All of it; `ok` if no finding is a problem."""

    ok: bool
    endpoints: Sequence[EndpointReport]
    this_machine: MachineReport
    findings: Sequence[Finding]


@click.command()
@client_options
def doctor(endpoints: str | None, timeout: float | None, as_json: bool) -> int:
    """
    Check configuration, servers and this machine; say what is wrong and what to do.

    Exit status 0 if nothing is wrong, 1 if something is.
    """
    with quiet_log():
        diagnosis = examine(endpoints, timeout)
    if as_json:
        print_json(diagnosis)
    else:
        _show(diagnosis)
    return 0 if diagnosis.ok else 1


# -- looking ---------------------------------------------------------------------------------------------------


def examine(endpoints: str | None, timeout: float | None) -> Diagnosis:
    """Look at everything once."""
    findings: list[Finding] = []
    settings = _settings(endpoints, timeout, findings)
    reports: list[EndpointReport] = []
    if settings is not None:
        reports = _endpoints(settings, findings)
    alone = settings is not None and not settings.endpoints and not settings.sources
    machine = _this_machine(findings, needed=alone)
    order = {"problem": 0, "warning": 1, "note": 2}
    findings.sort(key=lambda finding: order[finding.level])
    return Diagnosis(not any(finding.level == "problem" for finding in findings), reports, machine, findings)


def _settings(endpoints: str | None, timeout: float | None, findings: list[Finding]) -> Settings | None:
    from gpupool_sync import config

    known = {variable for setting in config.SETTINGS for variable in setting.variables} | OTHER_VARIABLES
    for name in sorted(os.environ):
        # Other programs have variables that begin with GPU_, too: those that look like none of ours are theirs.
        meant = difflib.get_close_matches(name.upper(), known, 1, ALIKE) if name.upper().startswith("GPU") else []
        if name in known or not (meant or name.startswith("GPU_POOL_")):
            continue
        findings.append(
            Finding(
                "warning",
                "configuration",
                f"the variable {name} is none of ours, so it has no effect"
                + (f"; {meant[0]} may be meant" if meant else ""),
                f"rename it to {meant[0]}, or unset it" if meant else "docs/configuration.md lists all there are",
            )
        )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            settings = config.resolve(endpoints, endpoint_timeout=timeout)
        except ConfigError as exc:
            findings.append(
                Finding("problem", "configuration", str(exc), "correct the value; docs/configuration.md has the table")
            )
            settings = None
    findings += [
        Finding(
            "problem",
            "configuration",
            str(warning.message),
            "unset one of them, so that nobody is misled" if "ignored" in str(warning.message) else "correct this",
        )
        for warning in caught
    ]
    return settings


@attrs.frozen
class _Look:
    snapshot: Snapshot | None = None
    round_trip: float | None = None  # seconds
    error: GPUPoolError | None = None


def _look_at(endpoint: PolledEndpoint) -> _Look:
    try:
        snapshot = endpoint.poll()
        # The first exchange also had to connect; the second is what a pool sees all day.
        begin = time.perf_counter()
        snapshot = endpoint.poll()
        return _Look(snapshot, time.perf_counter() - begin)
    except GPUPoolError as exc:
        return _Look(error=exc)


def _endpoints(settings: Settings, findings: list[Finding]) -> list[EndpointReport]:
    from gpupool_sync.endpoint import make_endpoint, make_local_endpoint

    configured: dict[str, Endpoint] = {each.id: each for each in settings.endpoints}
    origins = dict.fromkeys(configured, settings.endpoints_from or "")
    for source, found in _sources(settings, findings).items():
        for each in found:
            if configured.setdefault(each.id, each) is each:
                origins[each.id] = source
    made = [make_endpoint(each, settings) for each in configured.values()]
    if not settings.endpoints and not settings.sources:
        made = [make_local_endpoint(settings)]
    try:
        with ThreadPoolExecutor(min(AT_ONCE, max(1, len(made))), thread_name_prefix="gpupool-doctor") as executor:
            try:
                looks = dict(zip(made, executor.map(_look_at, made), strict=True))
            except BaseException:  # Ctrl-C must not wait for the slowest
                for endpoint in made:
                    endpoint.abort()
                raise
        arbiters = _arbiters(settings, findings)
        reports = []
        for endpoint, look in looks.items():
            arbiter, scope = arbiters.get(endpoint.id, (None, None))
            report = _report(endpoint, look, arbiter, scope)
            reports.append(attrs.evolve(report, origin=origins.get(endpoint.id, "this machine")))
            findings += _judge(endpoint, look, settings, configured.get(endpoint.id))
    finally:
        for endpoint in made:
            endpoint.close()
    findings += _same_hosts([look.snapshot for look in looks.values() if look.snapshot is not None])
    return reports


def _sources(settings: Settings, findings: list[Finding]) -> dict[str, Sequence[Endpoint]]:
    """What each source lists."""
    from gpupool_sync.discovery import Watch

    found: dict[str, Sequence[Endpoint]] = {}
    for source in settings.sources:
        watch = Watch(source, settings)
        found[source.spec] = watch.poll().endpoints
        if watch.why is not None:
            what = "the file" if source.path is not None else "the name and the name server"
            findings.append(
                Finding("problem", source.spec, watch.why, f"look at {what}; it is read again all the time")
            )
    return found


def _arbiters(settings: Settings, findings: list[Finding]) -> dict[str, tuple[str, str]]:
    """Who arbitrates each endpoint's cards, and among whom: asked of a pool, which alone decides it."""
    from gpupool_sync.pool import GPUPool

    with warnings.catch_warnings():
        # That leases reach less far than everybody is among the notes, with what to do.
        warnings.simplefilter("ignore")
        try:
            pool = GPUPool(
                [*settings.endpoints, *settings.sources] or None,
                lease_store=settings.lease_store,
                endpoint_timeout=settings.endpoint_timeout,
                endpoint_max_retries=settings.endpoint_max_retries,
            )
            pool.open()
        except GPUPoolError as exc:
            findings.append(
                Finding(
                    "problem", "configuration", str(exc), "unset GPU_POOL_LEASE_STORE, or name a store that is there"
                )
            )
            return {}
    with pool:
        found = {
            each.endpoint_id: (getattr(each, "arbiter", ""), getattr(each, "scope", ""))
            for each in pool.status().endpoints
        }
    if any(scope == "process" for _, scope in found.values()):
        findings.append(
            Finding(
                "note",
                "configuration",
                f"leases hold {SCOPES['process']}: two programs that use these GPUs do not see each other's leases",
                "run the jobs as threads of one process, or see to it that two programs do not use the same servers",
            )
        )
    if any(scope == "container" for _, scope in found.values()):
        findings.append(_private_locks(settings))
    remote = [each.id for each in settings.endpoints if not each.is_loopback and each.local is not True]
    if remote and any(scope == "host" for _, scope in found.values()):
        findings.append(
            Finding(
                "note",
                "configuration",
                f"leases on {', '.join(remote)} hold {SCOPES['host']}: other client machines that use the same servers "
                "are not excluded",
                "let one machine use these servers, or see to it that two do not at the same time",
            )
        )
    return found


def _private_locks(settings: Settings) -> Finding:
    from gpupool_sync.leases.host import host_store

    asked = settings.lease_store if isinstance(settings.lease_store, str) else ""
    store = host_store(asked.partition(":")[2] or None)
    return Finding(
        "warning",
        "this machine",
        f"leases hold {SCOPES['container']}: {store.private}",
        f"mount the host's lock directory (docker run -v {store.path}:{store.path}), or use the host's "
        "`gpupool-sync serve` as endpoint; nothing, if nobody else can use these GPUs",
    )


def _report(endpoint: PolledEndpoint, look: _Look, arbiter: str | None, scope: str | None) -> EndpointReport:
    snapshot = look.snapshot
    if snapshot is None:
        return EndpointReport(
            endpoint.id, endpoint.url, reachable=False, arbiter=arbiter, scope=scope, error=_error_text(look.error)
        )
    sample = snapshot.sample
    if endpoint.url == "local:":
        protocol = "read directly"
    else:
        protocol = "statistics only" if sample.protocol is None else f"gpupool_sync v{sample.protocol}"
    return EndpointReport(
        endpoint.id,
        endpoint.url,
        reachable=True,
        protocol=protocol,
        grants_leases=sample.leases is not None,
        round_trip_ms=None if look.round_trip is None else 1000 * look.round_trip,
        age=snapshot.age(snapshot.received_at),
        gpus=len(snapshot.cards),
        gpus_unavailable=len(sample.faults),
        with_uuid=sum(card.reading.uuid is not None for card in snapshot.cards),
        host_name=sample.host.name if sample.host is not None else None,
        host_id=sample.host.id if sample.host is not None else None,
        simulated=sample.host is not None and sample.host.simulated,
        is_this_machine=snapshot.is_local,
        arbiter=arbiter,
        scope=scope,
    )


def _error_text(error: GPUPoolError | None) -> str:
    return error.message if isinstance(error, (EndpointUnavailable, BadAnswer)) else str(error)


# -- judging ---------------------------------------------------------------------------------------------------


def _judge(endpoint: PolledEndpoint, look: _Look, settings: Settings, configured: Endpoint | None) -> Iterable[Finding]:
    """What is to be said of one endpoint by itself."""
    snapshot = look.snapshot
    if snapshot is None:
        yield _unreachable(endpoint, look.error)
        return
    sample = snapshot.sample
    age = snapshot.age(snapshot.received_at)
    if age > settings.max_stats_age:
        yield Finding(
            "problem",
            endpoint.id,
            f"its sample is {seconds(age)} old; above {settings.max_stats_age:g} s (max_stats_age) nothing is granted",
            "its reading of the GPUs hangs: look at nvidia-smi on that machine, and at the server's log; restart it",
        )
    for fault in sample.faults:
        number = "?" if fault.local_gpu_id is None else fault.local_gpu_id
        yield Finding(
            "problem",
            endpoint.id,
            f"GPU {number} cannot be used: {fault.reason}",
            "look at nvidia-smi and the kernel's log (dmesg) on that machine; the other GPUs are not affected",
        )
    if not snapshot.cards and not sample.faults:
        if configured is not None:
            what = "it answers, but has no GPU"
            do = "look at CUDA_VISIBLE_DEVICES and at nvidia-smi where the server runs"
        else:
            why = "; ".join(sample.problems)
            what = "no endpoint is configured, and this machine has no GPU" + (f": {why}" if why else "")
            do = "set GPU_SERVICE_ENDPOINTS to the URLs of other machines' servers, or install the NVIDIA driver here"
        yield Finding("problem", endpoint.id, what, do)
    if configured is not None:
        for problem in sample.problems:
            yield Finding("warning", endpoint.id, problem, f"look at what it sends: curl {endpoint.url}/gpu/summary")
    without = [card for card in snapshot.cards if card.reading.uuid is None]
    if without and configured is not None:
        yield Finding(
            "warning",
            endpoint.id,
            f"it tells no UUIDs of {plural(len(without), 'GPU')}, so their names to the arbiter are made of its URL",
            f"everybody must write exactly {endpoint.url}; or run `gpupool-sync serve` there, which tells UUIDs",
        )
        if configured.is_loopback:
            yield Finding(
                "warning",
                endpoint.id,
                "its URL means this very machine on every machine, and without UUIDs GPUs of different machines would "
                "be taken for one another",
                "use the machine's name in the URL, or run `gpupool-sync serve` there",
            )


def _unreachable(endpoint: PolledEndpoint, error: GPUPoolError | None) -> Finding:
    text = _error_text(error)
    if endpoint.url == "local:":
        what = f"this machine's GPUs cannot be read: {text}"
        do = "to use other machines' GPUs set GPU_SERVICE_ENDPOINTS; for this one's install the NVIDIA driver"
    elif isinstance(error, BadAnswer):
        what = f"it answers, but not with GPU statistics: {text}"
        do = "look at the URL (is it a statistics server's?) and at that server's log"
    elif "status 401" in text or "status 403" in text:
        what = text
        do = "give the credentials in GPU_SERVICE_ENDPOINTS or Endpoint(token=…)"
    else:
        what = f"it cannot be reached: {text}"
        do = "is it running (gpupool-sync serve --host …)? Then look at URL, port and firewall"
    return Finding("problem", endpoint.id, what, do)


def _same_hosts(snapshots: Sequence[Snapshot]) -> Iterable[Finding]:
    """GPUs that several endpoints show."""
    seen: dict[str, list[Snapshot]] = {}
    for snapshot in snapshots:
        for card in snapshot.cards:
            if card.reading.uuid is not None:
                seen.setdefault(card.reading.uuid, []).append(snapshot)
    shared: dict[tuple[str, ...], list[str]] = {}
    for uuid, where in seen.items():
        if len(where) > 1:
            shared.setdefault(tuple(each.endpoint_id for each in where), []).append(uuid)
    by_id = {snapshot.endpoint_id: snapshot.sample.host for snapshot in snapshots}
    for ids, uuids in shared.items():
        hosts = {host.id for host in map(by_id.__getitem__, ids) if host is not None}
        named = ", ".join(uuids[:NAMED]) + (f" and {len(uuids) - NAMED} more" if len(uuids) > NAMED else "")
        together = " and ".join(ids)
        if len(hosts) > 1:
            yield Finding(
                "problem",
                together,
                f"they say that they are different machines, but show the same GPUs ({named})",
                "one of them must be wrong (a cloned virtual machine, a proxy?): remove it from the endpoints",
            )
        else:
            yield Finding(
                "warning",
                together,
                f"they are several URLs of one machine: {plural(len(uuids), 'GPU')} ({named})",
                "keep one of them; each of these GPUs is counted and granted once all the same",
            )


def _this_machine(findings: list[Finding], *, needed: bool) -> MachineReport:
    from gpupool_sync import devices

    host = devices.host_identity()
    read_by = error = None
    gpus = faults = 0
    try:
        reader = devices.open_reader()
        try:
            sample = reader.read(10.0)
            gpus, faults = len(sample.gpus), len(sample.faults)
            read_by = reader.description
        finally:
            reader.close()
    except GPUPoolError as exc:
        error = str(exc)
    smi = shutil.which("nvidia-smi")
    if not gpus and not needed:
        # Where it is needed, its endpoint has said so.
        findings.append(
            Finding(
                "note",
                "this machine",
                error or f"no GPU here: {read_by}",
                "nothing, if it has none: servers elsewhere do not need one here; else install the NVIDIA driver",
            )
        )
    return MachineReport(host.name, host.id, read_by, smi, gpus, faults, error)


# -- showing ---------------------------------------------------------------------------------------------------

_MARKS = {"problem": ("✗", "bold red"), "warning": ("!", "bold yellow"), "note": ("i", "bold blue")}


def _show(diagnosis: Diagnosis) -> None:
    from rich.text import Text

    console = make_console()

    def line(text: str, mark: str = " ", style: str = "") -> None:
        console.print(Text.assemble("  ", (mark, style), " ", plain(text)))

    def good(text: str) -> None:
        line(text, "✓", "bold green")

    for each in diagnosis.endpoints:
        where_from = f"  from {plain(each.origin)}" if each.origin else ""
        console.print(
            Text.assemble((plain(each.endpoint_id), "bold"), "  ", (plain(each.url), "dim"), (where_from, "dim"))
        )
        if each.reachable:
            took = milliseconds(each.round_trip_ms)
            good(f"answers in {took} ({each.protocol}); its sample is {seconds(each.age)} old")
            host = each.host_name or "a host that does not say which"
            where = "simulated, " if each.simulated else ""
            where += "this machine" if each.is_this_machine else "not this machine"
            broken = f", and {each.gpus_unavailable} that cannot be used" if each.gpus_unavailable else ""
            (good if each.gpus else line)(f"{plural(each.gpus, 'GPU')}{broken}, of {host} ({where})")
        else:
            line(each.error or "no answer", "✗", "bold red")
        if each.arbiter:
            good(f"leases by {each.arbiter}, scope {each.scope}: {SCOPES.get(each.scope or '', 'unknown')}")
    mine = diagnosis.this_machine
    console.print(Text.assemble(("this machine", "bold"), "  ", (plain(mine.host_name), "dim")))
    line(f"host identity {mine.host_id}")
    read_by = f" ({mine.read_by})" if mine.gpus else ""
    line(f"{plural(mine.gpus, 'GPU')}{read_by}; nvidia-smi: {mine.nvidia_smi or 'not found'}")
    if diagnosis.findings:
        console.print(Text("findings", "bold"))
    for finding in diagnosis.findings:
        line(f"{finding.where}: {finding.what}", *_MARKS[finding.level])
        line(f"→ {finding.do}")
    number = sum(finding.level == "problem" for finding in diagnosis.findings)
    end = Text(f"{plural(number, 'problem')} found", "bold red") if number else Text("nothing is wrong", "bold green")
    console.print(end)
