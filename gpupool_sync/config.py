"""Settings: one table from which resolving, error texts and the documentation come.

Nothing here does I/O, but that `resolve` has the file read that GPU_POOL_CONFIG names.  No error, repr or id ever shows
a secret: what a URL carries before its ``@`` or after its ``?`` is never quoted.
"""

from __future__ import annotations

import ipaddress
import math
import numbers
import os
import re
import sys
import urllib.parse
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import attrs

from gpupool_sync.errors import ConfigError

if TYPE_CHECKING:
    from gpupool_sync.config_file import ConfigFile

#: The strategies that have a name.
STRATEGIES = ("availability", "round_robin", "weighted")
#: The options of each of them, and of which type each option is.
STRATEGY_OPTIONS: Mapping[str, Mapping[str, type]] = {
    "availability": {"spread": bool, "seed": int},
    "round_robin": {"seed": int},
    "weighted": {"seed": int},
}
#: The variable that names the configuration file.
CONFIG_VARIABLE = "GPU_POOL_CONFIG"

#: Longest part of a wrong value that an error quotes.
_QUOTED = 100
#: Longer waits are mistakes (milliseconds for seconds), and `threading` refuses the really long ones.
_LONGEST = 86400.0

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://([^/?#]*)([^?#]*)(\?[^#]*)?(#.*)?", re.DOTALL)
_NO_PORT = re.compile(r"(://[^/?#@\[\],]*?:)(?!\d{0,5}(?:[/?#,]|$)).*", re.DOTALL)
_REST = re.compile(r"([?#]).+", re.DOTALL)
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_\-]{0,61}[a-z0-9_])?")
_NAMED = re.compile(r"([^:/=]*)=(.*)", re.DOTALL)
_FLOAT = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_FILE = re.compile(r"file:", re.IGNORECASE)
_DNS = re.compile(r"dns\+", re.IGNORECASE)
_HEADER_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_DEFAULT_PORTS = {"http": 80, "https": 443}


def redact_url(text: str) -> str:
    """
    *text* without what may be secret in a URL: everything between ``//`` and the last ``@``, query and fragment.

    For any text, not only valid URLs: a password that was not percent-encoded makes a URL invalid, and must
    not be shown for that.
    """
    head, at, rest = text.rpartition("@")
    if at:
        scheme = _SCHEME.match(head)
        # Behind a '?' or '#' the '@' may stand in the secret itself, as in redis://host?password=a@b.
        rest = "***" if "?" in head or "#" in head else f"***@{rest}"
        text = f"{scheme.group(0) if scheme else ''}{rest}"
    # Where a port should be, there may be a password that lacks its host.
    text = _NO_PORT.sub(r"\1***", text)
    return _REST.sub(r"\1***", text)


def _show(value: object) -> str:
    """*value* for an error: short, on one line, without secrets."""
    if isinstance(value, str):
        text = repr(redact_url(value))
    elif value is None or isinstance(value, (bool, int, float)):
        try:
            text = repr(value)
        except ValueError:  # an int of thousands of digits
            text = "a huge number"
    else:
        # The repr of somebody else's object may hold anything.
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _QUOTED else text[:_QUOTED] + "…"


def _show_url(value: object) -> str:
    """`_show`, of what should be a URL: without a scheme what stands behind a colon may be a password all the same."""
    if isinstance(value, str) and not _SCHEME.match(value) and not value.startswith("file:"):
        return _show(redact_url(f"http://{value}")[len("http://") :])
    return _show(value)


# --- endpoints ------------------------------------------------------------------------------------


def _canonical_host(host: str) -> str:
    """Lower case, IDNA, IP addresses in their one form; raises ValueError with the reason."""
    if not host.isascii():
        import idna  # requests depends on it; its tables are big and hardly ever needed

        try:
            host = idna.encode(host, uts46=True).decode("ascii")
        except UnicodeError:  # every error of idna is one
            raise ValueError("the host's name is not a valid international name") from None
    host = host.lower()
    labels = host.removesuffix(".").split(".")
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError("the host is not a valid name or address")
    if re.fullmatch(r"[0-9]+|0x[0-9a-f]*", labels[-1]):
        # The resolver takes 127.1, 0x7f.1 and 010.0.0.1 for addresses: one server, many spellings.
        try:
            host = str(ipaddress.IPv4Address(host))
        except ValueError:
            raise ValueError("an IPv4 address is four numbers from 0 to 255, without leading zeros") from None
    return host


def _canonical_address(text: str) -> str:
    """An IPv6 address in its one form, in brackets; raises ValueError with the reason."""
    if "%" in text:
        raise ValueError("IPv6 addresses with a zone are not supported; use a global address or a name")
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError:
        raise ValueError("what is in brackets is not an IPv6 address") from None
    # Python versions differ in how they write mapped addresses; they are IPv4 anyway.
    mapped = address.ipv4_mapped
    return str(mapped) if mapped is not None else f"[{address.compressed}]"


def _canonical_path(path: str) -> str:
    """Percent-encoded in one way, without trailing slashes; raises ValueError with the reason."""
    if "@" in path:
        # Most likely a password with a slash in it: part of it would end up in ids and logs.
        raise ValueError("the path has an '@'; in a password '/' is written %2F, in a path '@' is written %40")
    if re.search(r"%(?![0-9A-Fa-f]{2})", path):
        raise ValueError("a '%' in the path is not followed by two hexadecimal digits")
    if any(part in (".", "..") for part in path.split("/")):
        raise ValueError("'.' and '..' are not allowed in the path")
    path = re.sub(r"%..", lambda found: found.group(0).upper(), path.rstrip("/"))
    return urllib.parse.quote(path, safe="/%:!$&'()*+,;=~-._")


def _canonical_url(text: str) -> tuple[str, tuple[str, str] | None]:
    """
    The one form of an endpoint's URL, and the user and password that stood in it.

    Raises:
        ValueError: with the reason, which quotes no part of *text* by itself: any may be a mistyped password.
    """
    if text[:1] in tuple("\"'[({<"):
        raise ValueError("quotation marks and brackets are no part of a URL; several are separated by commas")
    if any(ch.isspace() or not ch.isprintable() or ch == "\\" for ch in text):
        raise ValueError(
            "a URL has no spaces, control characters or backslashes"
            + ("; several are separated by commas" if text.count("://") > 1 else "")
        )
    if text.count("://") > 1 and ";" in text:
        raise ValueError("several URLs are separated by commas")
    found = _URL.fullmatch(text)
    if found is None:
        bare = re.sub(r"^(?:https?)?:?/+", "", text, flags=re.IGNORECASE)
        raise ValueError(f"http:// or https:// is missing; write {_show('http://' + bare)}")
    scheme, authority, path, query, fragment = found.groups()
    scheme = scheme.lower()
    if scheme not in _DEFAULT_PORTS:
        raise ValueError("only http:// and https:// are allowed")
    if query is not None or fragment is not None:
        raise ValueError("no '?' and no '#' is allowed (in a password they are written %3F and %23)")
    userinfo, at, address = authority.rpartition("@")
    auth = None
    if at:
        user, _, password = userinfo.partition(":")
        try:
            auth = _unquote(user), _unquote(password)
        except UnicodeDecodeError:
            raise ValueError("the user or the password is not UTF-8 after percent-decoding") from None
        if not auth[0]:
            raise ValueError("there is an '@' but no user before it")
    if address.startswith("["):
        inside, bracket, after = address[1:].partition("]")
        if not bracket or (after and not after.startswith(":")):
            raise ValueError("an IPv6 address is written [address] or [address]:port")
        host = _canonical_address(inside)
        colon, port_text = after[:1], after[1:]
    else:
        name, colon, port_text = address.partition(":")
        if ":" in port_text:
            raise ValueError("an IPv6 address is written in brackets, as in http://[::1]:8000")
        if not name:
            raise ValueError("the host is missing")
        host = _canonical_host(name)
    netloc = host
    if colon:
        if not re.fullmatch(r"[0-9]{1,10}", port_text) or not 1 <= int(port_text) <= 65535:
            raise ValueError("the port is a number from 1 to 65535")
        if int(port_text) != _DEFAULT_PORTS[scheme]:
            netloc = f"{host}:{int(port_text)}"
    return f"{scheme}://{netloc}{_canonical_path(path)}", auth


def _unquote(text: str) -> str:
    return urllib.parse.unquote(text, errors="strict")


def _visible(text: str) -> bool:
    """Whether *text* may stand in a header: no control characters, and no line breaks of any kind."""
    return not any(ord(ch) < 32 or 127 <= ord(ch) < 160 or ch in "\u2028\u2029" for ch in text)


def _check_name(name: object) -> str | None:
    if name is None:
        return None
    if not isinstance(name, str) or not name or len(name) > 200:
        raise ValueError("the name is not a text of 1 to 200 characters")
    if any(ch in ":/,=@\\" or ch.isspace() or not ch.isprintable() for ch in name):
        # "endpoint:0" must be readable one way only, and so must "name=URL,name=URL".
        raise ValueError("a name has no ':', '/', ',', '=', '@', '\\', spaces or control characters")
    return name


def _check_token(token: object) -> str | None:
    if token is None:
        return None
    if not isinstance(token, str) or not re.fullmatch(r"[\x21-\x7e]+", token):
        raise ValueError(
            "token: visible ASCII characters are allowed, at least one; no spaces, no line break at the end"
        )
    return token


def _check_auth(auth: object) -> tuple[str, str] | None:
    if auth is None:
        return None
    if (
        not isinstance(auth, (tuple, list))
        or len(auth) != 2
        or not all(isinstance(part, str) and _visible(part) for part in auth)
    ):
        raise ValueError("auth: a pair (user, password) of texts without control characters is allowed")
    user, password = auth
    if not user or ":" in user:
        # Basic authentication joins the two with a colon.
        raise ValueError("auth: the user must not be empty, and has no ':'")
    return user, password


def _check_headers(headers: object) -> tuple[tuple[str, str], ...]:
    if headers is None:
        return ()
    items: Any = headers.items() if isinstance(headers, Mapping) else headers
    if not isinstance(headers, Mapping) and not (
        isinstance(headers, (tuple, list))
        and all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in headers)
    ):
        raise ValueError("headers: a mapping of names to values, or a list of such pairs, is allowed")
    pairs = [(name, value) for name, value in items]
    seen = set()
    for number, (name, value) in enumerate(pairs, 1):
        # A value that took the place of the name must not be shown, so only good names are quoted.
        if not isinstance(name, str) or not _HEADER_NAME.fullmatch(name):
            raise ValueError(f"headers: the name of header {number} is not a header name")
        if not isinstance(value, str) or not _visible(value) or value != value.strip() or not _latin1(value):
            raise ValueError(
                f"headers: the value of {name} must be a Latin-1 text"
                " without line breaks, control characters or spaces around it"
            )
        if name.lower() in seen:
            raise ValueError(f"headers: {name} is given twice")
        seen.add(name.lower())
    return tuple(sorted(pairs, key=lambda pair: pair[0].lower()))


def _latin1(text: str) -> bool:
    return all(ord(ch) < 256 for ch in text)


def _check_path(value: object, what: str) -> str:
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str) or not path or "\0" in path:
        raise ValueError(f"{what} is allowed")
    return path


def _check_server_name(name: object) -> str | None:
    if name is None:
        return None
    if not isinstance(name, str) or not name:
        raise ValueError("server_name: the name of a host is allowed")
    try:
        return _canonical_host(name)
    except ValueError as exc:
        raise ValueError(f"server_name: {exc}") from None


#: A certificate by its fingerprint; OpenSSL prints it with colons.
_PIN = re.compile(r"sha256[:=]([0-9a-f]{64})", re.IGNORECASE)


def _check_verify(verify: object) -> bool | str:
    if isinstance(verify, bool):
        return verify
    what = "verify: True, False, the path of a file or directory of CA certificates, or 'sha256:' and a fingerprint"
    path = _check_path(verify, what)
    if path.lower().startswith(("sha256:", "sha256=")):
        found = _PIN.fullmatch(path[:7] + path[7:].replace(":", ""))
        if found is None:
            raise ValueError(
                "verify: after 'sha256:' the 64 hexadecimal digits of a certificate's fingerprint are allowed"
            )
        return f"sha256:{found.group(1).lower()}"
    return path


def _check_cert(cert: object) -> str | tuple[str, str] | None:
    if cert is None:
        return None
    what = "cert: the path of a certificate with its key, or a pair (certificate, key) of paths"
    if isinstance(cert, (tuple, list)):
        if len(cert) != 2:
            raise ValueError(f"{what} is allowed")
        return _check_path(cert[0], what), _check_path(cert[1], what)
    return _check_path(cert, what)


@attrs.frozen(init=False)
class Endpoint:
    """
    One statistics server: where it is, and how to be let in.

    `url` is kept in one canonical form: lower-case scheme and host, no default port, no trailing slash; a
    user and password in it move to `auth`.  `token`, `auth`, the values of `headers` and `cert` are secrets:
    neither ``repr`` nor any error shows them.  A pickled endpoint does contain them.

    Raises:
        ConfigError: a value cannot be used; the message says what is allowed.
    """

    url: str
    name: str | None = attrs.field(kw_only=True)
    #: Sent as ``Authorization: Bearer``.
    token: str | None = attrs.field(kw_only=True, repr=False)
    #: User and password for basic authentication.
    auth: tuple[str, str] | None = attrs.field(kw_only=True, repr=False)
    #: Sent with every request; sorted pairs.
    headers: tuple[tuple[str, str], ...] = attrs.field(kw_only=True, repr=False)
    #: Whether to verify the server's certificate, or the path of the CA certificates to do it with, or ``sha256:`` and
    #: the fingerprint of the one certificate that is accepted.
    verify: bool | str = attrs.field(kw_only=True)
    #: Client certificate: one path, or the paths of certificate and key.
    cert: str | tuple[str, str] | None = attrs.field(kw_only=True, repr=False)
    #: True: this endpoint's cards are in this machine, whatever it says of itself. None: it is believed.
    local: bool | None = attrs.field(kw_only=True)
    #: Most requests per second that the server may get from one pool; None: no limit.
    max_rate: float | None = attrs.field(kw_only=True)
    #: The name to ask for (``Host``, TLS) and to find in the certificate, where the URL has an address instead.
    server_name: str | None = attrs.field(kw_only=True)
    #: Public id: `name`, else host, port if it is not the default one, and path, joined by ``-``. It never has
    #: a colon and never depends on other endpoints.
    id: str = attrs.field(init=False, eq=False)

    @id.default
    def _make_id(self) -> str:
        if self.name is not None:
            return self.name
        # The path may hold any character that a URL may; the rest has only ':', '[' and ']' to lose.
        text = self.url.partition("://")[2].replace("[", "").replace("]", "")
        return re.sub(r"[^A-Za-z0-9._~-]", "-", text)

    def __init__(
        self,
        url: str,
        *,
        name: str | None = None,
        token: str | None = None,
        auth: tuple[str, str] | None = None,
        headers: Mapping[str, str] | Iterable[tuple[str, str]] | None = None,
        verify: bool | str | os.PathLike[str] = True,
        cert: str | os.PathLike[str] | tuple[str | os.PathLike[str], str | os.PathLike[str]] | None = None,
        local: bool | None = None,
        max_rate: float | None = None,
        server_name: str | None = None,
    ) -> None:
        if not isinstance(url, str):
            raise ConfigError(f"endpoint {_show(url)}: a URL is allowed, such as 'http://server1:8000'")
        url = url.strip()
        # Raised outside the handler: a chained exception could hold on to what the message leaves out.
        problem = None
        try:
            bare, hash_, fragment = url.partition("#")
            if hash_ and fragment.lower().startswith("sha256"):
                if verify is not True:
                    raise ValueError("verify is given, and a fingerprint in the URL as well; one of them is allowed")
                verify, url = fragment, bare
            canonical, in_url = _canonical_url(url)
            if in_url is not None and auth is not None:
                raise ValueError("auth is given, and a user in the URL as well; one of them is allowed")
            checked_auth = _check_auth(auth if in_url is None else in_url)
            checked_token = _check_token(token)
            pairs = _check_headers(headers)
            ways = (checked_token is not None) + (checked_auth is not None)
            ways += any(key.lower() == "authorization" for key, _ in pairs)
            if ways > 1:
                raise ValueError(
                    "only one of token, auth (or a user in the URL) and an Authorization header is allowed"
                )
            if local is not None and not isinstance(local, bool):
                raise ValueError("local: True, False or None is allowed")
            if max_rate is not None:
                max_rate = _real(max_rate)
                if max_rate is None or max_rate <= 0:
                    raise ValueError("max_rate: a number of requests per second above 0 is allowed")
            checked_name, checked_verify, checked_cert, checked_server_name = (
                _check_name(name),
                _check_verify(verify),
                _check_cert(cert),
                _check_server_name(server_name),
            )
        except ValueError as exc:
            problem = str(exc)
        if problem is not None:
            raise ConfigError(f"endpoint {_show_url(url)}: {problem}")
        self.__attrs_init__(
            canonical,
            name=checked_name,
            token=checked_token,
            auth=checked_auth,
            headers=pairs,
            verify=checked_verify,
            cert=checked_cert,
            local=local,
            max_rate=max_rate,
            server_name=checked_server_name,
        )

    @property
    def host(self) -> str:
        """The host alone, an IPv6 address without its brackets."""
        return urllib.parse.urlsplit(self.url).hostname or ""

    @property
    def is_loopback(self) -> bool:
        """Whether the URL means "this machine" on every machine."""
        host = self.host.removesuffix(".")
        if host == "localhost" or host.endswith(".localhost"):
            return True
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        # Connecting to 0.0.0.0 or :: reaches this machine, too.
        return address.is_loopback or address.is_unspecified


@attrs.frozen(init=False)
class EndpointSource:
    """
    Where endpoints are found, instead of being listed: a file, or a name with several addresses.

    ``file:/path`` is a file with one URL (or name=URL) a line, or Prometheus' ``file_sd`` in JSON;
    ``dns+http://name:port`` is one endpoint for each address of the name.  Both are looked at again while the pool
    runs.  The *options* are those of `Endpoint`, for each endpoint that is found; of a file's endpoints `name` cannot
    be one, of a name's it is the beginning of their ids.

    Raises:
        ConfigError: the place or an option cannot be used; the message says what is allowed.
    """

    #: ``file:/path`` or ``dns+http://name:port``, without credentials.
    spec: str
    #: What the endpoints have in common; of a file without their URL.
    template: Endpoint = attrs.field(repr=False)

    def __init__(self, spec: str, **options: Any) -> None:
        if not isinstance(spec, str):
            raise ConfigError(f"endpoint source {_show(spec)}: file:/path or dns+http://name:port is allowed")
        text = spec.strip()
        problem = None
        if _FILE.match(text):
            path = re.sub("^//+", "/", text.partition(":")[2])
            if not path.startswith("/") or not path.isprintable() or path.endswith("/"):
                problem = "the path of the file must be absolute, as in file:/etc/gpu-servers"
            elif options.get("name") is not None:
                problem = "the lines of the file name their endpoints, as in server1=http://10.0.0.1:8000"
            else:
                self.__attrs_init__(f"file:{path}", Endpoint("http://file.invalid", **options))
        elif _DNS.match(text):
            template = Endpoint(text[len("dns+") :], **options)
            try:
                ipaddress.ip_address(template.host)
                problem = "an address is one endpoint; write http://… without dns+"
            except ValueError:
                self.__attrs_init__(f"dns+{template.url}", template)
        else:
            problem = "file:/path, dns+http://name:port or dns+https://name:port is allowed"
        if problem is not None:
            raise ConfigError(f"endpoint source {_show_url(text)}: {problem}")

    @property
    def path(self) -> str | None:
        """Of the file; None: it is a name."""
        kind, _, path = self.spec.partition(":")
        return path if kind == "file" else None


def unique_endpoints(endpoints: Iterable[Endpoint]) -> tuple[Endpoint, ...]:
    """
    *endpoints* in their order, without repetitions.

    Raises:
        ConfigError: one URL is configured in two ways, or two URLs have the same id.
    """
    by_url: dict[str, Endpoint] = {}
    by_id: dict[str, Endpoint] = {}
    for endpoint in endpoints:
        known = by_url.setdefault(endpoint.url, endpoint)
        if known is not endpoint:
            differing = [
                field.name
                for field in attrs.fields(Endpoint)
                if field.eq and getattr(known, field.name) != getattr(endpoint, field.name)
            ]
            if differing:
                raise ConfigError(
                    f"endpoints {known.id!r} and {endpoint.id!r} have the same URL {endpoint.url}"
                    f" but differ in {', '.join(differing)}; name each server once"
                )
            continue
        namesake = by_id.setdefault(endpoint.id, endpoint)
        if namesake is not endpoint:
            raise ConfigError(
                f"endpoints {namesake.url} and {endpoint.url} have the same id {endpoint.id!r};"
                " give one of them a name, as in name=http://… or Endpoint(url, name=…)"
            )
    return tuple(by_url.values())


def _endpoints_in_text(text: str) -> list[Endpoint | EndpointSource]:
    """The endpoints of a comma-separated list of URLs, name=URL and sources; empty items are ignored."""
    items = [item.strip() for item in text.split(",")]
    for number, item in enumerate(items[1:], 2):
        # What looks like an item may be the rest of a password with a comma: nothing of it may be shown.
        if "@" in item and "://" not in item:
            raise ConfigError(
                f"item {number} has an '@' but no http:// or https:// before it; in a password ',' is written %2C"
            )
    result: list[Endpoint | EndpointSource] = []
    for item in filter(None, items):
        named = _NAMED.fullmatch(item)
        place = (named.group(2) if named else item).strip()
        if _FILE.match(place) or _DNS.match(place):
            options = {"name": named.group(1).strip()} if named else {}
            result.append(EndpointSource(place, **options))
        else:
            result.append(endpoint_in_text(item))
    return result


def endpoint_in_text(item: str, template: Endpoint | None = None) -> Endpoint:
    """
    The endpoint that a URL or name=URL means, with the options of *template*, if there is one.

    Raises:
        ConfigError: it is neither; the message shows no secret.
    """
    named = _NAMED.fullmatch(item)
    name, url = (named.group(1).strip(), named.group(2)) if named else (None, item)
    try:
        return Endpoint(url, name=name) if template is None else attrs.evolve(template, url=url, name=name)
    except ConfigError as exc:
        problem = str(exc)
    if named:
        # Only the item as a whole can be redacted: of "host?key=secret", the part that looks like the URL
        # is the secret.
        problem = f"endpoint {_show(item)}: URL or name=URL is allowed, as in server1=http://10.0.0.1:8000"
        if _SCHEME.match(url.strip()):
            problem += f" ({_reason(url, name)})"
    raise ConfigError(problem)


def _reason(url: str, name: str | None) -> str:
    """Why Endpoint(url, name=name) is refused, without the URL."""
    try:
        _canonical_url(url.strip())
        _check_name(name)
    except ValueError as exc:
        return str(exc)
    return "it cannot be used"


def _parse_endpoints(value: object, from_text: bool) -> tuple[Endpoint | EndpointSource, ...]:
    if isinstance(value, (str, Endpoint, EndpointSource)):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise ValueError
    found: list[Endpoint | EndpointSource] = []
    for item in value:
        if isinstance(item, (Endpoint, EndpointSource)):
            found.append(item)
        elif isinstance(item, str):
            found.extend(_endpoints_in_text(item))
        else:
            raise ConfigError(f"item {_show(item)}: a URL, name=URL or an Endpoint is allowed")
    sources: dict[str, EndpointSource] = {}
    for each in found:
        if isinstance(each, EndpointSource) and sources.setdefault(each.spec, each) != each:
            raise ConfigError(f"endpoint source {each.spec} is given twice, with different options; name it once")
    return (*unique_endpoints(each for each in found if isinstance(each, Endpoint)), *sources.values())


# --- the other settings ---------------------------------------------------------------------------

Parse = Callable[[object, bool], object]


def _real(value: object) -> float | None:
    """A finite number as float, else None; True and False are no numbers here."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _number(*, above: float | None = None, low: float = 0.0, high: float) -> Parse:
    def parse(value: object, from_text: bool) -> float:
        if from_text and isinstance(value, str):
            # float() alone would also take "nan", "1_000" and digits of other scripts.
            value = float(value) if _FLOAT.fullmatch(value) else None
        number = _real(value)
        if number is None or number > high or (number < low if above is None else number <= above):
            raise ValueError
        return number + 0.0  # no -0.0

    return parse


def _whole(low: int, high: int) -> Parse:
    def parse(value: object, from_text: bool) -> int:
        if from_text and isinstance(value, str):
            value = int(value) if _INTEGER.fullmatch(value) else None
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise ValueError
        number = int(value)
        if not low <= number <= high:
            raise ValueError
        return number

    return parse


def _parse_strategy(value: object, from_text: bool) -> object:
    if isinstance(value, str):
        name = value.strip().lower().replace("-", "_")
        if name not in STRATEGIES:
            raise ValueError
        return name
    if isinstance(value, type):
        raise ConfigError(f"{value.__name__} is a class; pass an instance of it, {value.__name__}()")
    if not callable(value) and not callable(getattr(value, "order", None)):
        raise ValueError
    return value


def _parse_strategy_options(value: object, from_text: bool) -> dict[str, object]:
    if from_text and isinstance(value, str):
        options: dict[str, object] = {}
        for item in filter(None, (part.strip() for part in value.split(","))):
            name, sign, text = (part.strip() for part in item.partition("="))
            if not sign or not name or name in options:
                raise ValueError
            truth = {"true": True, "false": False}.get(text.lower())
            options[name] = truth if truth is not None else int(text) if _INTEGER.fullmatch(text) else text
        return options
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ValueError
    return dict(value)


def _check_strategy_options(strategy: object, options: Mapping[str, object], origin: str) -> None:
    """Which options there are depends on the strategy."""
    if not isinstance(strategy, str):
        if options:
            raise ConfigError(f"{origin}: a strategy of your own has its options already; leave them out")
        return
    known = STRATEGY_OPTIONS[strategy]
    for name, value in options.items():
        if name not in known:
            raise ConfigError(f"{origin}: {strategy} has no option {_show(name)}; it has {', '.join(known)}")
        kind = known[name]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            what = "True or False" if kind is bool else "a whole number"
            raise ConfigError(f"{origin}: {name}={_show(value)}: {what} is allowed")


def _parse_lease_store(value: object, from_text: bool) -> object:
    if not isinstance(value, str):
        if isinstance(value, type) or not callable(getattr(value, "claim", None)):
            raise ValueError
        return value
    text = value.strip()
    scheme, _, rest = text.partition(":")
    scheme = scheme.lower()
    if not text.isprintable():
        raise ValueError
    if scheme == "memory" and not rest:
        return "memory:"
    if scheme == "host":
        if rest and not rest.startswith("/"):
            raise ConfigError(f"{_show(text)}: the directory must be absolute, as in host:/var/lock/gpus")
        return f"host:{rest}"
    if scheme not in ("redis", "rediss", "unix") or not rest.startswith("//") or " " in rest:
        raise ValueError
    return f"{scheme}:{rest}"


def _parse_name(value: object, from_text: bool) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > 200 or not value.strip().isprintable():
        raise ValueError
    return value.strip()


_FLAGS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def _parse_flag(value: object, from_text: bool) -> bool:
    if from_text and isinstance(value, str):
        value = _FLAGS.get(value.lower())
    if not isinstance(value, bool):
        raise ValueError
    return value


@attrs.frozen
class Setting:
    """
    One row of the table of settings.

    `parse` gets the value and whether it is text from the environment; it raises a plain ValueError, which
    becomes "`allowed` is allowed", or a ConfigError with a reason of its own.
    """

    name: str
    #: Environment variables, the first that is set wins.
    variables: tuple[str, ...]
    default: Any
    #: What is allowed, for errors and the documentation.
    allowed: str
    help: str
    parse: Parse = attrs.field(repr=False)


SETTINGS: tuple[Setting, ...] = (
    Setting(
        "endpoints",
        ("GPU_SERVICE_ENDPOINTS", "GPU_STATS_SERVICE_ENDPOINTS", "GPU_SERVICE_ENDPOINT"),
        (),
        "a comma-separated string of URLs, name=URL, file:/path or dns+http://name:port, a list of those, or Endpoint "
        "and EndpointSource objects",
        "The statistics servers, or where they are found; none: this machine's own GPUs.",
        _parse_endpoints,
    ),
    Setting(
        "strategy",
        ("GPU_LOAD_BALANCING_STRATEGY",),
        "availability",
        "availability, round_robin, weighted, or an object with a method order",
        "In which order servers are tried.",
        _parse_strategy,
    ),
    Setting(
        "strategy_options",
        ("GPU_LOAD_BALANCING_STRATEGY_OPTIONS",),
        None,
        "options of the strategy, such as spread=False (a table; in the variable spread=false,seed=1)",
        "availability: spread=False takes the highest share of free cards literally; all: seed repeats the choices.",
        _parse_strategy_options,
    ),
    Setting(
        "lease_store",
        ("GPU_POOL_LEASE_STORE",),
        None,
        "memory:, host:, host:/directory, redis://…, rediss://…, unix://…, or a lease store object",
        "Who decides who holds a card; unset: the narrowest arbiter that is safe for each card.",
        _parse_lease_store,
    ),
    Setting(
        "memory_threshold",
        ("GPU_MEMORY_THRESHOLD_PERCENT",),
        80.0,
        "a number of percent above 0 and up to 100",
        "A card whose memory is used to this degree or more is not granted.",
        _number(above=0.0, high=100.0),
    ),
    Setting(
        "utilization_threshold",
        ("GPU_UTILIZATION_THRESHOLD_PERCENT",),
        90.0,
        "a number of percent above 0 and up to 100",
        "A card that is busy to this degree or more is not granted.",
        _number(above=0.0, high=100.0),
    ),
    Setting(
        "poll_interval",
        ("GPU_POLLING_INTERVAL", "GPU_POLLING_INTERVAL_SECONDS"),
        5.0,
        "a number of seconds from 0.01 to 86400",
        "Time between two readings of a server.",
        _number(low=0.01, high=_LONGEST),
    ),
    Setting(
        "health_check_interval",
        ("GPU_ENDPOINT_HEALTH_CHECK_INTERVAL",),
        30.0,
        "a number of seconds from 0.01 to 86400, at least poll_interval",
        "Longest time between two attempts to reach a server that is down; unset: never below poll_interval.",
        _number(low=0.01, high=_LONGEST),
    ),
    Setting(
        "max_stats_age",
        ("GPU_POOL_MAX_STATS_AGE",),
        None,
        "a number of seconds from 0.01 to 1000000, at least poll_interval",
        "No card is granted from older readings; unset: 3 × poll_interval + endpoint_timeout.",
        _number(low=0.01, high=1e6),
    ),
    Setting(
        "endpoint_timeout",
        ("GPU_ENDPOINT_TIMEOUT",),
        10.0,
        "a number of seconds from 0.01 to 86400",
        "Time for one exchange with a server, retries included.",
        _number(low=0.01, high=_LONGEST),
    ),
    Setting(
        "endpoint_max_retries",
        ("GPU_ENDPOINT_MAX_RETRIES",),
        3,
        "a whole number from 0 to 100",
        "How often one exchange is repeated that failed before an answer began.",
        _whole(0, 100),
    ),
    Setting(
        "ttl",
        ("GPU_POOL_TTL",),
        60.0,
        "a number of seconds above 0 and up to 300",
        "How long a lease lasts unless renewed, for holders that are not on the card's host.",
        _number(above=0.0, high=300.0),
    ),
    Setting(
        "max_waiting",
        ("GPU_POOL_MAX_WAITING",),
        None,
        "a whole number from 0 to 1000000",
        "How many callers may wait at a time; the next is turned away at once. Unset: any number.",
        _whole(0, 1_000_000),
    ),
    Setting(
        "watch",
        ("GPU_POOL_WATCH",),
        None,
        "a whole number from 1 to 1000000",
        "How many servers a process watches at most: a random subset, widened when it refuses. "
        "Unset: all of up to 500, of more 32.",
        _whole(1, 1_000_000),
    ),
    Setting(
        "name",
        ("GPU_POOL_NAME",),
        None,
        "a text of 1 to 200 printable characters",
        "What others see as the holder of this pool's GPUs, before user, host and pid.",
        _parse_name,
    ),
    Setting(
        "breaker_failures",
        ("GPU_POOL_BREAKER_FAILURES",),
        5,
        "a whole number from 1 to 1000",
        "So many failures in a row, and a server counts as down.",
        _whole(1, 1000),
    ),
    Setting(
        "progress",
        ("GPU_POOL_PROGRESS",),
        None,
        "True or False (in the variable also yes, no, on, off, 1 or 0)",
        "Whether a wait of more than 2 seconds is shown; unset: in notebooks, and in scripts on a terminal.",
        _parse_flag,
    ),
)

_BY_NAME = {setting.name: setting for setting in SETTINGS}


def _workers(value: object, from_text: bool) -> object:
    if value is None or (from_text and isinstance(value, str) and value.lower() == "none"):
        return None
    return _whole(1, 1_000_000)(value, from_text)


#: No setting of a pool: `client` makes requests of it.
MAX_WORKERS_PER_GPU = Setting(
    "max_workers_per_gpu",
    ("GPU_MAX_WORKERS_PER_GPU",),
    1,
    "a whole number from 1 to 1000000, or None (none in the environment)",
    "How many workers of GPUWorkerPoolClient may share a GPU; None: any number while its readings allow it.",
    _workers,
)


_DEFAULTS: dict[str, Any] = {setting.name: setting.default for setting in SETTINGS}


def _show_store(value: object) -> str:
    return repr(redact_url(value)) if isinstance(value, str) else repr(value)


@attrs.frozen(kw_only=True)
class Settings:
    """
    Everything a pool is configured with; what `resolve` returns, complete and checked.

    Made directly, nothing is checked.  It pickles with all it contains: credentials of endpoints and of the
    lease store go into the pickle.  Its ``repr`` shows none.
    """

    #: Empty, as are `sources`: this machine's own GPUs.
    endpoints: tuple[Endpoint, ...] = ()
    #: Where more endpoints are found while the pool runs.
    sources: tuple[EndpointSource, ...] = ()
    #: What gave `endpoints` and `sources`: ``argument``, a variable, or the path of the file.
    endpoints_from: str | None = attrs.field(default=None, eq=False)
    #: One of `STRATEGIES`, or an object.
    strategy: Any = _DEFAULTS["strategy"]
    #: Keyword arguments of the strategy that `strategy` names.
    strategy_options: Mapping[str, Any] | None = _DEFAULTS["strategy_options"]
    #: "memory:…", "host:…", a Redis URL, a store object, or None.
    lease_store: Any = attrs.field(default=_DEFAULTS["lease_store"], repr=_show_store)
    memory_threshold: float = _DEFAULTS["memory_threshold"]  # percent
    utilization_threshold: float = _DEFAULTS["utilization_threshold"]  # percent
    poll_interval: float = _DEFAULTS["poll_interval"]
    health_check_interval: float = _DEFAULTS["health_check_interval"]
    endpoint_timeout: float = _DEFAULTS["endpoint_timeout"]
    endpoint_max_retries: int = _DEFAULTS["endpoint_max_retries"]
    max_stats_age: float = attrs.field()
    ttl: float = _DEFAULTS["ttl"]
    max_waiting: int | None = _DEFAULTS["max_waiting"]
    watch: int | None = _DEFAULTS["watch"]
    name: str | None = _DEFAULTS["name"]
    breaker_failures: int = _DEFAULTS["breaker_failures"]
    progress: bool | None = _DEFAULTS["progress"]

    @max_stats_age.default
    def _three_polls(self) -> float:
        # Two polls may fail, and the third may take its whole time, before a card is withheld for silence.
        return 3 * self.poll_interval + self.endpoint_timeout


def _stacklevel() -> int:
    """The `warnings.warn` level of the caller outside this package, as seen from our caller."""
    level, frame = 1, sys._getframe(1)
    package = __name__.partition(".")[0]
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        level, frame = level + 1, frame.f_back
    return level


def _parse(setting: Setting, value: object, origin: str, *, from_text: bool) -> object:
    try:
        return setting.parse(value, from_text)
    except ConfigError as exc:
        problem = f"{origin}: {exc}"
    except ValueError:
        problem = f"{origin}={_show(value)}: {setting.allowed} is allowed"
    raise ConfigError(problem)


def _from_environ(setting: Setting, environ: Mapping[str, str]) -> tuple[object, str] | None:
    """The value of the first variable that is set, and that variable's name; None if none is."""
    nothing = " \t\r\n\f\v," if setting.name == "endpoints" else None
    given = [(name, environ[name].strip()) for name in setting.variables if environ.get(name, "").strip(nothing)]
    if not given:
        return None
    name, text = given[0]
    if len(given) > 1:
        ignored = " and ".join(other for other, _ in given[1:])
        warnings.warn(f"{name} is set, so {ignored} is ignored", UserWarning, stacklevel=_stacklevel())
    value = _parse(setting, text, name, from_text=True)
    if name == "GPU_SERVICE_ENDPOINT" and isinstance(value, tuple) and len(value) > 1:
        raise ConfigError(f"{name}: one endpoint is allowed here; GPU_SERVICE_ENDPOINTS takes several")
    return value, name


def _from_file(setting: Setting, file: ConfigFile) -> tuple[object, str] | None:
    """The value of the configuration file, and where it stands; None if it has none."""
    if setting.name not in file.values:
        return None
    origin = f"{file.path}: {setting.name}"
    value = file.values[setting.name]
    if setting.name == "endpoints" and isinstance(value, list):
        value = [
            _endpoint_in_table(item, f"{origin}[{number}]", os.path.dirname(os.path.abspath(file.path)))
            if isinstance(item, dict)
            else item
            for number, item in enumerate(value, 1)
        ]
    return _parse(setting, value, origin, from_text=False), origin


def _endpoint_in_table(table: Mapping[str, Any], origin: str, directory: str) -> Endpoint | EndpointSource:
    """One ``[[endpoints]]`` table; paths of certificates are relative to the file's *directory*."""
    allowed = [field.name for field in attrs.fields(Endpoint) if field.init]
    for key in table:
        if key not in allowed:
            raise ConfigError(f"{origin}.{_plain_key(key)}: an endpoint has no such option{_meant(key, allowed)}")
    options = dict(table)
    url = options.pop("url", None)
    if not isinstance(url, str):
        raise ConfigError(f"{origin}.url: the URL of a server is needed, such as 'http://server1:8000'")
    for key in ("verify", "cert"):
        value = options.get(key)
        if isinstance(value, str) and value and not value.lower().startswith(("sha256:", "sha256=")):
            options[key] = os.path.join(directory, value)
        elif isinstance(value, list):
            options[key] = [os.path.join(directory, each) if isinstance(each, str) else each for each in value]
    make = EndpointSource if _FILE.match(url.strip()) or _DNS.match(url.strip()) else Endpoint
    problem = None
    try:
        return make(url, **options)
    except ConfigError as exc:
        problem = str(exc)
    raise ConfigError(f"{origin}: {problem}")


def _plain_key(key: str) -> str:
    return key if key.isidentifier() and len(key) <= _QUOTED else "…"


def _meant(name: str, names: Iterable[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, list(names), 1)
    return f"; did you mean {close[0]}?" if close else ""


def _read_file(environ: Mapping[str, str]) -> ConfigFile | None:
    path = environ.get(CONFIG_VARIABLE, "").strip()
    if not path:
        return None
    from gpupool_sync import config_file

    file = config_file.read(path, CONFIG_VARIABLE)
    for key in file.values:
        if key not in _BY_NAME:
            raise ConfigError(f"{file.path}: {_plain_key(key)}: there is no such setting{_meant(key, _BY_NAME)}")
    return file


def _has_secrets(value: object) -> bool:
    """Whether somebody who reads *value* (of the endpoints, or of the lease store) could pretend to be us."""
    if isinstance(value, tuple):
        return any(map(_has_secrets, value))
    if isinstance(value, EndpointSource):
        value = value.template
    if isinstance(value, Endpoint):
        return bool(value.token or value.auth or value.headers)
    return isinstance(value, str) and redact_url(value) != value


def resolve(endpoints: object = None, *, environ: Mapping[str, str] | None = None, **options: object) -> Settings:
    """
    Settings from arguments, the environment (*environ*, else ``os.environ``), the file that GPU_POOL_CONFIG names, and
    defaults, in this order.

    *options* are the other names of `SETTINGS`.  None, an empty variable, and endpoints that are all empty
    count as not given.  If several variables of one setting are set, the first in the table wins, with a
    warning; another tells of a file that has secrets and that every user may read.

    Raises:
        ConfigError: a value cannot be used, or two contradict each other; the message names the argument,
            variable, or file and key, the value (never a secret) and what is allowed.
        TypeError: an option is not known.
    """
    for option in options:
        if option not in _BY_NAME:
            raise TypeError(f"unknown option {option!r}; there are {', '.join(_BY_NAME)}")
    environ = os.environ if environ is None else environ
    file = _read_file(environ)
    options["endpoints"] = endpoints
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    secrets = False
    for setting in SETTINGS:
        # Also what is overruled: whether the file is right, and safe, does not depend on who overrules it.
        in_file = None if file is None else _from_file(setting, file)
        secrets = secrets or (in_file is not None and _has_secrets(in_file[0]))
        given = options.get(setting.name)
        if given is not None:
            value = _parse(setting, given, setting.name, from_text=False)
            if setting.name != "endpoints" or value:
                values[setting.name], origins[setting.name] = value, setting.name
                continue
        found = _from_environ(setting, environ) or in_file
        if found is not None:
            values[setting.name], origins[setting.name] = found
    if file is not None and file.public and secrets:
        warnings.warn(
            f"{file.path} has secrets, and every user of this machine may read it: chmod 600 {file.path}",
            UserWarning,
            stacklevel=_stacklevel(),
        )
    _check_together(values, origins)
    places = values.pop("endpoints", ())
    if places:
        where = origins["endpoints"]
        values["endpoints_from"] = "argument" if where == "endpoints" else where.removesuffix(": endpoints")
    values["endpoints"] = tuple(each for each in places if isinstance(each, Endpoint))
    values["sources"] = tuple(each for each in places if isinstance(each, EndpointSource))
    return Settings(**values)


def checked(setting: Setting | str, value: object, origin: str) -> Any:
    """
    *value* as the setting (a row, or the name of one) takes it, for callers that know it by another name, *origin*.

    Raises:
        ConfigError: it cannot be used.
    """
    return _parse(_BY_NAME[setting] if isinstance(setting, str) else setting, value, origin, from_text=False)


def from_environment(setting: Setting | str) -> tuple[Any, str] | None:
    """
    The value that the environment gives a setting, and the variable; None if it gives none.

    Raises:
        ConfigError: it cannot be used.
    """
    return _from_environ(_BY_NAME[setting] if isinstance(setting, str) else setting, os.environ)


def _check_together(values: dict[str, Any], origins: Mapping[str, str]) -> None:
    """Complete *values* where a default follows another value; refuse those that contradict each other."""
    if values.get("strategy_options"):
        strategy = values.get("strategy", _DEFAULTS["strategy"])
        _check_strategy_options(strategy, values["strategy_options"], origins["strategy_options"])
    poll = values.get("poll_interval", _DEFAULTS["poll_interval"])
    for name, why in (
        ("health_check_interval", "a server that is down would be asked more often than a healthy one"),
        ("max_stats_age", "every reading would be too old before the next one comes"),
    ):
        if name in values and values[name] < poll:
            where = origins.get("poll_interval", "the default poll_interval")
            raise ConfigError(
                f"{origins[name]}={values[name]:g}: at least {where}={poll:g} is allowed; otherwise {why}"
            )
    if "health_check_interval" not in values:
        values["health_check_interval"] = max(_DEFAULTS["health_check_interval"], poll)
