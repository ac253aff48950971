"""``gpupool-sync release``: take GPUs back from whoever holds them."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from gpupool_sync.cli._common import PATIENCE, Seconds, client_options, looking_pool, plain, print_json, seconds
from gpupool_sync.errors import LeaseStoreError, NoSuchGPU

if TYPE_CHECKING:
    from gpupool_sync.pool import GPUPool
    from gpupool_sync.status import LeaseStatus

#: Seconds between two looks at whether a holder has let go.
LOOK = 0.2


@click.command()
@click.argument("gpus", nargs=-1, metavar="GPU...")
@click.option("--mine", is_flag=True, help="All leases of this user on this machine.")
@click.option("--force", is_flag=True, help="Also leases of other users, and of other machines.")
@click.option(
    "--wait",
    type=Seconds(min=0, max=3600),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for the holders to let go; those of a server or Redis hear of it when they renew next.",
)
@client_options
def release(
    gpus: tuple[str, ...],
    mine: bool,
    force: bool,
    wait: float,
    endpoints: str | None,
    timeout: float | None,
    as_json: bool,
) -> int:
    """
    Take GPUs back from whoever holds them; GPU is an id such as server1:0, or a UUID.

    The holder is told (gpu.lost, on_lost) and its pool lets go of the GPU.  Nobody else is granted it before that: who
    does not react keeps it until its process ends, or until its lease's ttl is over.

    Exit status: 0 all of them were given back; 1 somebody still holds one.
    """
    if bool(gpus) == mine:
        raise click.UsageError("name the GPUs, or say --mine for all that this user holds on this machine")
    with looking_pool(endpoints, timeout) as pool:
        names = list(gpus)
        if mine:
            names = list(dict.fromkeys(lease.gpus[0] for lease in pool.leases().leases if lease.own))
        revoked = _revoke(pool, names, mine, force)
        left = _wait(pool, revoked, wait)
    given_back = [each for each in revoked if _key(each) not in map(_key, left)]
    if as_json:
        print_json({"released": given_back, "still_held": left})
        return 1 if left else 0
    for lease in given_back:
        click.echo(plain(f"{', '.join(lease.gpus)}: given back by {lease.holder}"))
    for lease in left:
        what = ", ".join(lease.gpus)
        until = "its process ends" if lease.expires_in is None else f"its lease ends, in {seconds(lease.expires_in)}"
        click.echo(plain(f"{what}: {lease.holder} was told, but still holds it; nobody else gets it until {until}"))
    if not revoked:
        click.echo("no leases of this user on this machine")
    return 1 if left else 0


def _revoke(pool: GPUPool, names: Sequence[str], mine: bool, force: bool) -> list[LeaseStatus]:
    revoked: dict[tuple[str, int, str], LeaseStatus] = {}
    for name in names:
        try:
            for lease in pool.revoke(name, force=force):
                revoked[_key(lease)] = lease
        except NoSuchGPU:
            # Several of one lease, or one that has just been given back.
            if not mine and not any(name in lease.gpus for lease in revoked.values()):
                raise
    return list(revoked.values())


def _key(lease: LeaseStatus) -> tuple[str, int, str]:
    return lease.arbiter, lease.token, lease.holder


def _wait(pool: GPUPool, revoked: Sequence[LeaseStatus], wait: float) -> list[LeaseStatus]:
    """Those that are still held when all are given back, or the time is over."""
    begin = time.monotonic()
    end, told = begin + wait, not sys.stderr.isatty()
    left = list(revoked)
    while left:
        if not told and time.monotonic() - begin > PATIENCE:
            told = True
            by_ttl = any(lease.expires_in is not None for lease in left)
            when = ", which hears of it when it renews its lease, each 20 s as a rule" if by_ttl else ""
            holders = ", ".join(dict.fromkeys(plain(lease.holder) for lease in left))
            click.echo(f"waiting for up to {wait:g} s (--wait) for {holders}{when}", err=True)
        state = pool.leases()
        if state.problems:
            raise LeaseStoreError("; ".join(state.problems))
        held = {_key(lease): lease for lease in state.leases}
        left = [held[_key(each)] for each in left if _key(each) in held]
        if not left or time.monotonic() >= end:
            break
        time.sleep(min(LOOK, max(0.0, end - time.monotonic())))
    return left
