"""Runs the server: its settings, its socket, its end."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import math
import os
import signal
import socket
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from gpupool_sync.devices import Reader
from gpupool_sync.devices.simulated import SimulatedReader
from gpupool_sync.errors import ConfigError, GPUPoolError
from gpupool_sync.server import require_extra
from gpupool_sync.server.access import Audit, Guard, Tokens, audit_log
from gpupool_sync.server.asgi import METRICS_PATH, App, Front
from gpupool_sync.server.connections import ACCEPTED_AT_ONCE, KEEP_ALIVE, MAX_HEAD, Connections, allowed_connections
from gpupool_sync.server.metrics import SUMMARY as METRICS_SUMMARY
from gpupool_sync.server.metrics import Metrics
from gpupool_sync.server.pages import Pages
from gpupool_sync.server.sampler import Sampler

if TYPE_CHECKING:
    import uvicorn

    from gpupool_sync.server.leases import LeaseAPI

logger = logging.getLogger(__name__)

LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
#: Seconds that requests under way get to end when the server stops.
GRACE = 1
#: Seconds that the announcement waits for the first readings.
FIRST_SAMPLE = 3.0

_LOOPBACK = "127.0.0.1"


@attrs.frozen
class Options:
    """How the server runs; `resolve` fills in what is not given."""

    host: str = _LOOPBACK
    port: int = 8000  # 0: any that is free
    interval: float = 1.0  # seconds between two looks at the cards
    log_level: str = "info"
    leases: bool = True  # whether to grant leases on the cards
    lock_dir: str | None = None  # where the locks are; None: where this host's processes have theirs
    container_ok: bool = False  # whether to grant leases although only this container sees the locks
    tokens: str | None = None  # the file of the tokens that let in; None: those of the variable, if any
    public_stats: bool = False  # whether statistics are for everybody, and only leases need a token
    tls_cert: str | None = None  # the file of the certificate, and of its chain; None: no TLS
    tls_key: str | None = None  # the file of its key
    insecure: bool = False  # whether tokens may travel without TLS

    @classmethod
    def resolve(
        cls,
        *,
        host: str | None = None,
        port: int | str | None = None,
        interval: float | str | None = None,
        log_level: str | None = None,
        leases: bool = True,
        lock_dir: str | None = None,
        container_ok: bool = False,
        tokens: str | None = None,
        public_stats: bool = False,
        tls_cert: str | None = None,
        tls_key: str | None = None,
        insecure: bool = False,
        environ: Mapping[str, str] | None = None,
    ) -> Options:
        """
        What is given, else the predecessor's variables HOST, PORT, REFRESH_INTERVAL and LOG_LEVEL, else the default.

        Raises:
            ConfigError: a value cannot be used.
        """
        environ = os.environ if environ is None else environ

        def pick(given: object, option: str, variable: str) -> tuple[Any, str] | None:
            if given is not None:
                return given, f"--{option}"
            text = environ.get(variable, "").strip()
            return (text, variable) if text else None

        default = cls()
        picked_host = pick(host, "host", "HOST")
        if picked_host is not None and picked_host[1] == "HOST" and picked_host[0] == socket.gethostname():
            # csh exports the machine's name in HOST for everybody; that is no wish to be reached from outside.
            logger.info("HOST=%s is this machine's name and not taken as the address to listen on", picked_host[0])
            picked_host = None
        picked_port = pick(port, "port", "PORT")
        picked_interval = pick(interval, "interval", "REFRESH_INTERVAL")
        picked_level = pick(log_level, "log-level", "LOG_LEVEL")
        return cls(
            host=str(picked_host[0]) if picked_host else default.host,
            port=_port(*picked_port) if picked_port else default.port,
            interval=_interval(*picked_interval) if picked_interval else default.interval,
            log_level=_log_level(*picked_level) if picked_level else default.log_level,
            leases=leases,
            lock_dir=_lock_dir(lock_dir, leases),
            container_ok=container_ok,
            tokens=tokens,
            public_stats=public_stats,
            **_tls(tls_cert, tls_key),
            insecure=insecure,
        )


def _tls(cert: str | None, key: str | None) -> dict[str, str | None]:
    if (cert is None) != (key is None):
        raise ConfigError("--tls-cert and --tls-key: both are needed, or none")
    return {"tls_cert": cert, "tls_key": key}


def _port(value: object, origin: str) -> int:
    try:
        port = int(str(value))
    except ValueError:
        port = -1
    if not 0 <= port <= 65535:
        raise ConfigError(f"{origin}={value!r}: a port number from 0 to 65535 is allowed, 0 for any that is free")
    return port


def _interval(value: object, origin: str) -> float:
    try:
        interval = float(str(value))
    except ValueError:
        interval = math.nan
    if not 0.01 <= interval <= 3600.0:
        raise ConfigError(f"{origin}={value!r}: a number of seconds from 0.01 to 3600 is allowed")
    return interval


def _log_level(value: object, origin: str) -> str:
    level = str(value).lower()
    if level not in LOG_LEVELS:
        raise ConfigError(f"{origin}={value!r}: {', '.join(LOG_LEVELS)} are allowed")
    return level


def _lock_dir(value: str | None, leases: bool) -> str | None:
    if value is None:
        return None
    if not leases:
        raise ConfigError("--lock-dir and --no-leases: a server that grants no leases has no locks")
    if not os.path.isabs(value):
        raise ConfigError(f"--lock-dir={value!r}: an absolute path is allowed")
    return value


def listen(host: str, port: int) -> list[socket.socket]:
    """
    Sockets that listen on every address of *host*, all with the same port.

    Raises:
        GPUPoolError: the port is in use, or there is no such address here.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as exc:
        raise GPUPoolError(f"cannot listen on {host!r}: {exc}") from exc
    sockets: list[socket.socket] = []
    problem: OSError | None = None
    for family, kind, protocol, _, address in dict.fromkeys(found):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                # Else "::" would also take the IPv4 address that "0.0.0.0" of the same name stands for.
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if port == 0 and sockets:
                address = (address[0], sockets[0].getsockname()[1], *address[2:])
            sock.bind(address)
            sock.listen(2048)
        except OSError as exc:
            sock.close()
            # A name may stand for addresses that this machine lacks, such as ::1.
            if exc.errno == errno.EADDRINUSE or problem is None:
                problem = exc
            if exc.errno == errno.EADDRINUSE:
                break
        else:
            sockets.append(sock)
    if problem is not None and (not sockets or problem.errno == errno.EADDRINUSE):
        for sock in sockets:
            sock.close()
        hint = "; another port can be chosen with --port" if problem.errno == errno.EADDRINUSE else ""
        raise GPUPoolError(f"cannot listen on {url_of(host, port)}: {os.strerror(problem.errno or 0)}{hint}")
    return sockets


def is_loopback(sockets: Sequence[socket.socket]) -> bool:
    """Whether only this machine can connect to them."""
    return all(ipaddress.ip_address(sock.getsockname()[0].partition("%")[0]).is_loopback for sock in sockets)


def _check_access(options: Options, tokens: Tokens, sockets: Sequence[socket.socket]) -> str | None:
    """
    Why no leases can be granted to other machines, if so.

    Raises:
        ConfigError: tokens would travel where others can read them.
    """
    if is_loopback(sockets):
        return None
    if tokens and options.tls_cert is None and not options.insecure:
        raise ConfigError(
            "tokens need TLS where other machines connect: gpupool-sync serve --init makes a certificate. With "
            "--insecure they travel as they are: whoever can read the network's packets can then use your GPUs in your "
            "name, until you revoke the token"
        )
    if options.leases and not tokens:
        return "other machines can connect, and leases for them need a token: gpupool-sync serve --init makes one"
    return None


def _what_insecure_means(options: Options, tokens: Tokens, sockets: Sequence[socket.socket]) -> str | None:
    """What ``--insecure`` gives up here; None: nothing, as nobody is on the way or TLS is used all the same."""
    if not options.insecure or options.tls_cert is not None or is_loopback(sockets):
        return None
    what = "--insecure: there is no TLS, and other machines can connect. "
    way = "readable and changeable by whoever is on the way"
    if tokens:
        return (
            f"{what}Tokens and everything else travel {way}: who reads one can use these GPUs in its user's name, and "
            "with an admin's take them from everybody, until you revoke it; who changes answers can pose as this server"
        )
    return f"{what}Everything travels {way}; and as there are no tokens, anybody who reaches the port can read it all"


def url_of(host: str, port: int, *, tls: bool = False) -> str:
    """The URL by which a client on the network, or here, reaches a server on *host*."""
    if host in ("", "0.0.0.0", "::"):  # noqa: S104 - compared, not bound
        host = socket.gethostname()
    scheme = "https" if tls else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def make_front(sampler: Sampler, config: Mapping[str, Any], leases: LeaseAPI | None = None) -> Front:
    """The application that is served."""
    more_paths = {METRICS_PATH: METRICS_SUMMARY}
    if leases is not None:
        from gpupool_sync.server.leases import PATHS

        config = {**config, "lock_dir": leases.offer.lock_dir}
        more_paths |= {path: "; ".join(methods.values()) for path, methods in PATHS.items()}
    pages = Pages(sampler, {**config, "leases": leases is not None}, more_paths)

    def rest() -> App:
        from gpupool_sync.server.app import create_app

        return create_app(sampler, pages, leases, metrics)

    front = Front(pages, rest, leases)
    metrics = front.metrics = Metrics(sampler, leases, front.requests)
    return front


def make_leases(
    sampler: Sampler, lock_dir: str | None, port: int, *, container_ok: bool = False, audit: Audit | None = None
) -> LeaseAPI:
    """
    The lease API for the cards that *sampler* reads, which must not have been started yet.

    For cards that do not exist (simulated ones), and with *container_ok*, it does not matter who sees the locks.

    Raises:
        GPUPoolError: the locks cannot be used.
    """
    from gpupool_sync.server.leases import open_leases

    reader = sampler.reader
    on_held = reader.set_leased if isinstance(reader, SimulatedReader) else None
    leases = open_leases(
        lock_dir,
        port=port,
        own=sampler.owns,
        on_held=on_held,
        private_ok=container_ok or on_held is not None,
        audit=audit,
    )
    sampler.offer = leases.offer
    sampler.is_leased = leases.granter.is_leased
    return leases


def make_server(
    app: App,
    *,
    access_log: bool = False,
    connections: Connections | None = None,
    tls_cert: str | None = None,
    tls_key: str | None = None,
) -> uvicorn.Server:
    """
    uvicorn, set up for many small answers over few connections.

    Raises:
        ConfigError: the certificate or its key cannot be used.
    """
    require_extra("server", "fastapi", "uvicorn")
    import uvicorn
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    connections = Connections() if connections is None else connections
    config = uvicorn.Config(
        app,
        http=connections.bound(AutoHTTPProtocol),
        h11_max_incomplete_event_size=MAX_HEAD,
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=access_log,
        server_header=False,
        proxy_headers=False,
        backlog=ACCEPTED_AT_ONCE,
        timeout_keep_alive=int(KEEP_ALIVE),
        timeout_graceful_shutdown=GRACE,
        ssl_certfile=tls_cert,
        ssl_keyfile=tls_key,
    )
    if tls_cert is not None:
        try:
            config.load()
        except (OSError, ValueError) as exc:  # ssl.SSLError is one
            raise ConfigError(f"the certificate {tls_cert} with the key {tls_key} cannot be used: {exc}") from exc
    return uvicorn.Server(config)


def _without_query(record: logging.LogRecord) -> bool:
    """What follows a '?' is of no use to this server, and where others expect tokens."""
    # uvicorn: client, method, path with the query, version, status
    if isinstance(record.args, tuple) and len(record.args) == 5 and isinstance(record.args[2], str):
        client, method, path, *rest = record.args
        record.args = (client, method, str(path).partition("?")[0], *rest)
    return True


@contextlib.contextmanager
def _stopped_by_signals(server: uvicorn.Server) -> Iterator[None]:
    """
    SIGINT and SIGTERM end the server and then mean nothing.

    uvicorn stops at them too, but raises them again afterwards, so that the process would die of them instead of
    ending with status 0.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def serve(reader: Reader, options: Options, announce: Callable[[Announcement], object] = print) -> None:
    """
    Serve what *reader* reads until SIGINT or SIGTERM; closes the reader.

    *announce* is called when the server can be reached.

    Raises:
        MissingExtra: FastAPI or uvicorn is not installed.
        GPUPoolError: it cannot listen where it should.
    """
    require_extra("server", "fastapi", "uvicorn")
    logging.basicConfig(
        level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    audit_log.setLevel(logging.INFO)  # whatever else is told
    # uvicorn tells at "info" what is announced here already.
    logging.getLogger("uvicorn").setLevel(logging.DEBUG if options.log_level == "debug" else logging.WARNING)
    logging.getLogger("uvicorn.access").addFilter(_without_query)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    sampler = Sampler(reader, interval=options.interval)
    sockets: list[socket.socket] = []
    leases: LeaseAPI | None = None
    with contextlib.ExitStack() as ending:
        # Undone from the last to the first.
        ending.callback(sampler.stop)
        sockets = listen(options.host, options.port)
        for sock in sockets:
            ending.callback(sock.close)
        port = int(sockets[0].getsockname()[1])
        config = {"host": options.host, "port": port, "log_level": options.log_level}
        tokens, audit = Tokens(options.tokens), Audit()
        if (why_not := _check_access(options, tokens, sockets)) is not None:
            logger.warning("this server grants no leases: %s", why_not)
            options = attrs.evolve(options, leases=False)
        if (meaning := _what_insecure_means(options, tokens, sockets)) is not None:
            logger.warning("%s", meaning)
        leases = _open_leases(sampler, options, port, ending, audit)
        front: App = make_front(sampler, config, leases)
        if tokens:
            front = Guard(front, tokens, audit, public_stats=options.public_stats)
        connections = Connections(allowed_connections())
        server = make_server(
            front,
            access_log=options.log_level == "debug",
            connections=connections,
            tls_cert=options.tls_cert,
            tls_key=options.tls_key,
        )
        if leases is not None:
            # Who only waits must leave connections to the others.
            leases.most_waiters = min(leases.most_waiters, connections.most // 2)
            leases.stopping = lambda: server.should_exit
            leases.start()
            ending.callback(leases.close)
        with _stopped_by_signals(server):
            sampler.start()
            sampler.wait_for_first(FIRST_SAMPLE)
            # They listen already: whoever connects from now on is served.
            announcement = _announcement(options, port, sampler, leases)
            announce(announcement)
            if not announcement.gpus:
                logger.warning(
                    "no GPU is served: pools that use only this server will grant nothing; nvidia-smi must work here, "
                    "or --simulate 8xA100 serves GPUs that do not exist"
                )
            if not server.should_exit:
                server.run(sockets=sockets)


def _simulated_lock_dir(reader: SimulatedReader, port: int, ending: contextlib.ExitStack) -> str:
    """
    Cards that do not exist need no place among this machine's locks, but one that the next server finds again: leases
    survive a restart.  Who serves cards of the same name shares it, as the UUIDs are the same.

    On any port that is free nobody would find the next server: that directory goes with it.
    """
    if port == 0:
        return ending.enter_context(
            tempfile.TemporaryDirectory(prefix="gpupool-simulated-", ignore_cleanup_errors=True)
        )
    digest = reader.host.id.removeprefix("sim-")[:12]
    path = os.path.join(tempfile.gettempdir(), f"gpupool-simulated-{os.geteuid()}-{digest}")
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise GPUPoolError(f"{path} is not a directory of this user; --lock-dir names another one")
    return path


def _open_leases(
    sampler: Sampler, options: Options, port: int, ending: contextlib.ExitStack, audit: Audit
) -> LeaseAPI | None:
    if not options.leases:
        return None
    lock_dir = options.lock_dir
    if lock_dir is None and isinstance(sampler.reader, SimulatedReader):
        lock_dir = _simulated_lock_dir(sampler.reader, options.port, ending)
    try:
        return make_leases(sampler, lock_dir, port, container_ok=options.container_ok, audit=audit)
    except GPUPoolError as exc:
        if options.lock_dir is not None:
            raise
        logger.warning("this server grants no leases: %s", exc)
        return None


@attrs.frozen
class Announcement:
    """What a server says once it can be reached; as text, one line."""

    url: str
    gpus: int | None  # None: no reading yet
    gpus_unavailable: int
    source: str  # where the readings come from, or why there are none
    leases: bool

    def __str__(self) -> str:
        if self.gpus is None:
            cards = f"no readings yet: {self.source}"
        else:
            cards = f"{self.gpus} GPU{'' if self.gpus == 1 else 's'}, {self.source}"
            if self.gpus_unavailable:
                cards += f"; {self.gpus_unavailable} cannot be read"
        if not self.leases:
            cards += "; no leases"
        return f"serving {self.url} ({cards}); for clients: export GPU_SERVICE_ENDPOINTS={self.url}"


def _announcement(options: Options, port: int, sampler: Sampler, leases: LeaseAPI | None) -> Announcement:
    published = sampler.published
    sample = published.sample
    return Announcement(
        url=url_of(options.host, port, tls=options.tls_cert is not None),
        gpus=None if sample is None else len(sample.gpus),
        gpus_unavailable=0 if sample is None else len(sample.faults),
        source=str(published.error) if sample is None else sampler.reader.description,
        leases=leases is not None,
    )
