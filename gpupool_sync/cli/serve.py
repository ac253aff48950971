"""``gpupool-sync serve``: the statistics server of one host."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from gpupool_sync.cli._common import Number, Seconds, json_option, print_json


@click.command()
@click.option(
    "--host",
    metavar="ADDRESS",
    help="Address to listen on; 0.0.0.0 lets other machines in.  [default: 127.0.0.1, or HOST]",
)
@click.option("--port", metavar="NUMBER", help="TCP port; 0 takes any that is free.  [default: 8000, or PORT]")
@click.option(
    "--interval",
    metavar="SECONDS",
    help="Time between two looks at the GPUs, in seconds.  [default: 1, or REFRESH_INTERVAL]",
)
@click.option(
    "--log-level",
    metavar="LEVEL",
    help="debug, info, warning, error or critical.  [default: info, or LOG_LEVEL]",
)
@click.option(
    "--simulate",
    metavar="N[xMODEL]",
    help="Serve GPUs that do not exist: 8, 4xA100, or 4xA100,2xH100.  [default: this machine's own]",
)
@click.option(
    "--simulate-lag",
    type=Seconds(min=0, max=86400),
    default=0.0,
    metavar="SECONDS",
    show_default=True,
    help="Readings of simulated GPUs are so many seconds old.",
)
@click.option(
    "--simulate-foreign",
    type=Number(min=0, max=1),
    default=0.0,
    metavar="PROBABILITY",
    show_default=True,
    help="Chance, 0 to 1, that somebody outside uses a simulated GPU; it changes every minute.",
)
@click.option(
    "--simulate-noise",
    type=Number(min=0, max=100),
    default=0.0,
    metavar="PERCENT",
    show_default=True,
    help="Readings of simulated GPUs wander by so many percent points.",
)
@click.option("--seed", type=int, default=0, metavar="NUMBER", show_default=True, help="Of all that is simulated.")
@click.option(
    "--name",
    metavar="TEXT",
    help="Name of the simulated host; its GPUs' UUIDs follow from it.  "
    "[default: this machine's, and the port unless that is 8000]",
)
@click.option(
    "--lock-dir",
    metavar="DIRECTORY",
    help="Where the locks of the GPUs are; the same as for all processes of this machine.  "
    "[default: GPU_POOL_LOCK_DIR, or the system's lock directory; a private one with --simulate]",
)
@click.option("--no-leases", is_flag=True, help="Serve statistics only; grant no leases to other machines.")
@click.option(
    "--container-ok",
    is_flag=True,
    help="Grant leases although only this container sees the locks: nobody outside uses its GPUs without asking here.",
)
@click.option(
    "--init",
    is_flag=True,
    help="Make a token for clients, one for an admin, and a certificate in --config-dir; print the lines for both, "
    "and end.",
)
@click.option(
    "--config-dir",
    metavar="DIRECTORY",
    type=click.Path(path_type=Path),
    help="Where --init puts them, and where they are found.  [default: ~/.config/gpupool-sync]",
)
@click.option(
    "--tokens",
    metavar="FILE",
    help="Who is let in: lines of USER TOKEN, or USER TOKEN admin; read again when it changes.  "
    "[default: tokens of --config-dir if it is there; also GPU_SERVER_TOKENS=USER:TOKEN,…]",
)
@click.option("--public-stats", is_flag=True, help="Statistics need no token, leases do.")
@click.option(
    "--tls-cert", metavar="FILE", help="Certificate, PEM.  [default: cert.pem of --config-dir if it is there]"
)
@click.option("--tls-key", metavar="FILE", help="Its key, PEM.  [default: key.pem of --config-dir if it is there]")
@click.option(
    "--insecure",
    is_flag=True,
    help="No TLS, though other machines connect: whoever can read the network's packets has the tokens, and your GPUs.",
)
@json_option
@click.pass_context
def serve(
    context: click.Context,
    host: str | None,
    port: str | None,
    interval: str | None,
    log_level: str | None,
    simulate: str | None,
    simulate_lag: float,
    simulate_foreign: float,
    simulate_noise: float,
    seed: int,
    name: str | None,
    lock_dir: str | None,
    no_leases: bool,
    container_ok: bool,
    init: bool,
    config_dir: Path | None,
    tokens: str | None,
    public_stats: bool,
    tls_cert: str | None,
    tls_key: str | None,
    insecure: bool,
    as_json: bool,
) -> None:
    """
    Serve this host's GPU statistics, and leases on its GPUs, by HTTP, until interrupted.

    Pools read them: export GPU_SERVICE_ENDPOINTS=http://HOST:PORT. With --json the one value is printed when the server
    can be reached.
    """
    _only_with_simulate(context, simulate)
    # Imported here: the other commands do without it.
    from gpupool_sync.server import require_extra

    require_extra("server", "fastapi", "uvicorn")

    from gpupool_sync import devices
    from gpupool_sync.server import run, setup

    directory = setup.default_directory() if config_dir is None else config_dir
    if init:
        _init(directory, host, port, as_json)
        return
    found = {
        name: str(directory / name) for name in (setup.TOKENS, setup.CERT, setup.KEY) if (directory / name).exists()
    }
    if config_dir is not None and not found:
        raise click.UsageError(f"there is nothing in {config_dir}; --init makes it")
    if tls_cert is None and tls_key is None and not insecure:
        tls_cert, tls_key = found.get(setup.CERT), found.get(setup.KEY)
    options = run.Options.resolve(
        host=host,
        port=port,
        interval=interval,
        log_level=log_level,
        leases=not no_leases,
        lock_dir=lock_dir,
        container_ok=container_ok,
        tokens=found.get(setup.TOKENS) if tokens is None else tokens,
        public_stats=public_stats,
        tls_cert=tls_cert,
        tls_key=tls_key,
        insecure=insecure,
    )
    reader: devices.Reader
    if simulate is None:
        reader = devices.open_reader()
    else:
        from gpupool_sync.devices.simulated import SimulatedReader, parse_cards

        reader = SimulatedReader(
            parse_cards(simulate),
            name=name or _simulated_name(devices.host_identity().name, options.port),
            foreign=simulate_foreign,
            noise=simulate_noise,
            lag=simulate_lag,
            seed=seed,
        )
    run.serve(reader, options, announce=print_json if as_json else click.echo)


def _simulated_name(host: str, port: int) -> str:
    """Two servers on two ports stand for two machines: with one name they would have the same GPUs."""
    return host if port in (0, 8000) else f"{host}-{port}"


def _init(directory: Path, host: str | None, port: str | None, as_json: bool) -> None:
    from gpupool_sync.leases.shared import user_name
    from gpupool_sync.server import run, setup

    options = run.Options.resolve(host=host, port=port)
    made = setup.init(directory, user_name())
    name = run.url_of("" if options.host == run.Options().host else options.host, options.port).partition("://")[2]
    where = name.rpartition(":")[0].strip("[]"), options.port
    url, admin_url = made.url(*where), made.admin_url(*where)
    if as_json:
        print_json(
            {
                "directory": made.directory,
                "user": made.user,
                "fingerprint": made.fingerprint,
                "url": url,
                "admin": made.admin,
                "admin_url": admin_url,
            }
        )
        return
    click.echo(f"made {made.directory}: tokens, a certificate and its key. Serve this machine's GPUs to others:")
    click.echo("    gpupool-sync serve --host 0.0.0.0")
    click.echo(f"and say on the machines of those who may use them (it has the token of {made.user} in it):")
    click.echo(f"    export GPU_SERVICE_ENDPOINTS='{url}'")
    click.echo("All who share a token are one user to the server, and may take each other's GPUs back. For a token of")
    click.echo(f"one's own (a line NAME TOKEN), with NAME:TOKEN for {made.user}:… in what that person exports:")
    # Not openssl: where it lacks, half a line would shut everybody out.
    making = "import secrets; print('NAME', secrets.token_urlsafe(32))"
    click.echo(f'    python3 -c "{making}" >> {shlex.quote(made.tokens)}')
    click.echo(f"For yourself alone: {made.admin} takes GPUs back from anybody (its token is in the same file):")
    click.echo(f"    GPU_SERVICE_ENDPOINTS='{admin_url}' gpupool-sync release --force GPU")


def _only_with_simulate(context: click.Context, simulate: str | None) -> None:
    """A forgotten --simulate would otherwise serve the real GPUs and say nothing."""
    if simulate is not None:
        return
    for option in ("simulate_lag", "simulate_foreign", "simulate_noise", "seed", "name"):
        if context.get_parameter_source(option) not in (click.core.ParameterSource.DEFAULT, None):
            raise click.UsageError(f"--{option.replace('_', '-')} is only possible together with --simulate")
