"""Who may do what on a server: bearer tokens, each of which names a user, and the log of what was done with them."""

from __future__ import annotations

import base64
import binascii
import datetime
import hashlib
import hmac
import logging
import os
import re
import stat
import time
from collections.abc import Iterable, Mapping

import attrs

from gpupool_sync import wire
from gpupool_sync.errors import ConfigError
from gpupool_sync.server.asgi import App, Receive, Scope, Send, send_answer
from gpupool_sync.server.pages import Answer, Header

logger = logging.getLogger(__name__)
#: One JSON object a line: grant, release, expiry, force, denied.
audit_log = logging.getLogger("gpupool_sync.audit")

#: The variable with tokens: ``USER:TOKEN`` or ``USER:TOKEN:admin``, separated by commas.
VARIABLE = "GPU_SERVER_TOKENS"
#: Characters of a token, at least: fewer can be guessed.
SHORTEST = 16
#: Seconds after which a token that was taken out of the file is certainly refused.
REREAD = 1.0
#: Lines of refusals a second; how many more there were is told with the next.
MOST_DENIALS = 20
#: Bytes of a file of tokens.
MAX_FILE = 1024 * 1024

_USER = re.compile(r"[A-Za-z0-9._@-]{1,100}")
_TOKEN = re.compile(r"[!-+\--9;-~]+")  # visible, without the comma and the colon that separate them in the variable
_SCOPE = "gpupool_sync.user"


@attrs.frozen
class User:
    """Whom a token names."""

    name: str
    #: May take GPUs from others.
    admin: bool = False


@attrs.frozen
class _Token:
    digest: bytes = attrs.field(repr=False)
    user: User


def _token(user: str, token: str, role: str, origin: str) -> _Token:
    # No part of the token is quoted: what is wrong may be where it stands, not what it is.
    if not _USER.fullmatch(user):
        raise ConfigError(f"{origin}: the name of a user has letters, digits and . _ @ -, at most 100 of them")
    if len(token) < SHORTEST or not _TOKEN.fullmatch(token):
        raise ConfigError(f"{origin}: a token has {SHORTEST} or more visible ASCII characters without comma and colon")
    if role not in ("", "admin"):
        raise ConfigError(f"{origin}: after the token only 'admin' is allowed")
    return _Token(hashlib.sha256(token.encode()).digest(), User(user, role == "admin"))


def _unique(tokens: Iterable[_Token], origin: str) -> tuple[_Token, ...]:
    found: dict[bytes, _Token] = {}
    for each in tokens:
        if found.setdefault(each.digest, each) is not each:
            raise ConfigError(f"{origin}: {found[each.digest].user.name} and {each.user.name} have the same token")
    return tuple(found.values())


def _in_variable(text: str) -> tuple[_Token, ...]:
    tokens = []
    for number, each in enumerate(filter(None, map(str.strip, text.split(","))), 1):
        parts = each.split(":")
        if len(parts) not in (2, 3):
            raise ConfigError(f"{VARIABLE}, entry {number}: USER:TOKEN or USER:TOKEN:admin is allowed")
        tokens.append(_token(parts[0], parts[1], parts[2] if len(parts) == 3 else "", f"{VARIABLE}, entry {number}"))
    return _unique(tokens, VARIABLE)


def _in_file(path: str) -> tuple[tuple[_Token, ...], tuple[int, ...]]:
    """The tokens in the file, and what tells whether it has changed."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as exc:
        why = "is a symbolic link, which is not followed" if os.path.islink(path) else exc.strerror
        raise ConfigError(f"the tokens in {path} cannot be read: {why}") from None
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(f"{path} is not a file")
        if found.st_uid not in (0, os.geteuid()):
            raise ConfigError(f"{path} belongs to somebody else, who could change the tokens in it")
        if found.st_mode & 0o077:
            raise ConfigError(f"{path} can be read or written by others: chmod 600 {path}")
        body = file.read(MAX_FILE + 1)
    if len(body) > MAX_FILE:
        raise ConfigError(f"{path} has more than {MAX_FILE} bytes")
    tokens = []
    for number, line in enumerate(body.decode("ascii", "replace").splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) not in (2, 3):
            raise ConfigError(f"{path}, line {number}: USER TOKEN or USER TOKEN admin is allowed")
        tokens.append(_token(words[0], words[1], words[2] if len(words) == 3 else "", f"{path}, line {number}"))
    return _unique(tokens, path), _stamp(found)


def _stamp(found: os.stat_result) -> tuple[int, ...]:
    return found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_size


class Tokens:
    """
    The tokens that let in, from a file, from `VARIABLE`, or from both.

    The file is read again when it has changed, so that a token can be revoked, or given, without a restart. One that
    can no longer be read lets nobody in.  Used by one thread.

    Raises:
        ConfigError: the file or the variable cannot be used.
    """

    def __init__(self, path: str | None = None, environ: Mapping[str, str] = os.environ) -> None:
        self._fixed = _in_variable(environ.get(VARIABLE, ""))
        self._path = path
        self._in_file: tuple[_Token, ...] = ()
        self._stamp: tuple[int, ...] | None = None
        self._looked_at = time.monotonic()
        if path is not None:
            self._in_file, self._stamp = _in_file(path)

    def __bool__(self) -> bool:
        """Whether tokens are asked for at all: also when all of them have been revoked."""
        return self._path is not None or bool(self._fixed)

    def _follow(self) -> None:
        if self._path is None or time.monotonic() - self._looked_at < REREAD:
            return
        self._looked_at = time.monotonic()
        stamp: tuple[int, ...] | None = None
        try:
            stamp = _stamp(os.stat(self._path, follow_symlinks=False))
            if stamp == self._stamp:
                return
            self._in_file, self._stamp = _in_file(self._path)
        except (ConfigError, OSError) as exc:
            if self._in_file or stamp != self._stamp:
                logger.error("the tokens of %s let nobody in any more: %s", self._path, exc)
            self._in_file, self._stamp = (), stamp

    def who(self, headers: Iterable[Header]) -> User | None:
        """Whom the credentials of a request name: ``Bearer TOKEN``, or ``Basic`` with the user and the token."""
        self._follow()
        given = [value for name, value in headers if name.lower() == b"authorization"]
        if len(given) != 1:
            return None
        scheme, _, value = given[0].partition(b" ")
        value = value.strip()
        named = None
        if scheme.lower() == b"basic":
            try:
                named, _, value = base64.b64decode(value, validate=True).partition(b":")
            except binascii.Error:
                return None
        elif scheme.lower() != b"bearer":
            return None
        digest = hashlib.sha256(value).digest()
        found: User | None = None
        # All are compared, each in constant time: how long it takes tells nothing of any.
        for token in (*self._fixed, *self._in_file):
            if hmac.compare_digest(digest, token.digest):
                found = token.user
        return found if found is None or named in (None, found.name.encode()) else None


class Audit:
    """Writes the audit lines; used by several threads, as loggers are."""

    def __init__(self) -> None:
        self._second = 0
        self._denials = 0

    def note(self, event: str, **fields: object) -> None:
        """One line; no field may be a secret: of a lease that is its id."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        audit_log.info("%s", wire.dump({"at": now, "event": event, **fields}).decode())

    def denied(self, **fields: object) -> None:
        """A refusal; of a flood of them some are told, and how many more there were."""
        second = int(time.monotonic())
        untold = 0
        if second != self._second:
            untold = max(0, self._denials - MOST_DENIALS)
            self._second, self._denials = second, 0
        self._denials += 1
        if self._denials <= MOST_DENIALS:
            self.note("denied", **fields, **({"untold_before": untold} if untold else {}))


class Guard:
    """
    Lets requests through to *app* that may pass: those with a token, and those that need none.

    Without one ``/health`` is open, and with *public_stats* all that is no lease.
    """

    def __init__(self, app: App, tokens: Tokens, audit: Audit, *, public_stats: bool = False) -> None:
        self._app = app
        self._tokens = tokens
        self._audit = audit
        self._public_stats = public_stats

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            user = self._tokens.who(scope["headers"])
            scope[_SCOPE] = user
            path = scope["path"]
            if user is None and not self._is_open(path):
                client = scope.get("client") or ("?",)
                self._audit.denied(why="no valid token", client=client[0], method=scope["method"], path=path[:200])
                await send_answer(send, _UNAUTHORIZED, head=scope["method"] == "HEAD")
                return
        await self._app(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        return path == "/health" or (self._public_stats and not path.startswith("/v1/"))


def user_of(scope: Scope) -> User | None:
    """Whose token a request has; None where tokens are not asked for."""
    found: User | None = scope.get(_SCOPE)
    return found


def refusal(status: int, code: str, message: str, *more: Header) -> Answer:
    """An answer that says no."""
    body = wire.dump(wire.error_document(code, message))
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *more]
    return Answer(status, [*headers, (b"cache-control", b"no-store")], body)


_UNAUTHORIZED = refusal(
    401,
    "unauthorized",
    "a token is needed: Endpoint(url, token=…), or https://USER:TOKEN@HOST",
    (b"www-authenticate", b'Bearer realm="gpupool-sync"'),
)
