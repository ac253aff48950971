"""``serve --init``: tokens and a certificate, so that the safe way is the short way."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import ipaddress
import os
import re
import secrets
import socket
import ssl
from collections.abc import Mapping
from pathlib import Path

import attrs

from gpupool_sync.errors import ConfigError
from gpupool_sync.server import require_extra

#: Names of the files in the directory of a server's secrets.
TOKENS, CERT, KEY = "tokens", "cert.pem", "key.pem"
#: Days that the certificate is good: clients trust it by its fingerprint, so nothing is gained by a shorter time.
DAYS = 3650


def default_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Where a user's server has its secrets unless told otherwise."""
    base = environ.get("XDG_CONFIG_HOME") or os.path.join(environ.get("HOME") or "/", ".config")
    return Path(base) / "gpupool-sync"


@attrs.frozen
class Secrets:
    """What a server was given, for its user's eyes."""

    directory: str
    user: str  # of the token for clients
    token: str = attrs.field(repr=False)
    admin: str  # another user: what this one may do, no client needs
    admin_token: str = attrs.field(repr=False)
    fingerprint: str  # of the certificate: sha256:…

    @property
    def tokens(self) -> str:
        """The file with both of them."""
        return os.path.join(self.directory, TOKENS)

    def url(self, host: str, port: int) -> str:
        """By which a client finds it, is let in, and knows that it is the one."""
        return self._url(self.user, self.token, host, port)

    def admin_url(self, host: str, port: int) -> str:
        """The same for who takes GPUs back."""
        return self._url(self.admin, self.admin_token, host, port)

    def _url(self, user: str, token: str, host: str, port: int) -> str:
        shown = f"[{host}]" if ":" in host else host
        return f"https://{user}:{token}@{shown}:{port}#{self.fingerprint}"


def fingerprint_of(path: str) -> str:
    """
    Of the first certificate in a PEM file.

    Raises:
        ConfigError: there is none.
    """
    try:
        text = Path(path).read_text()
        end = "-----END CERTIFICATE-----"
        first = text[text.index("-----BEGIN CERTIFICATE-----") : text.index(end) + len(end)]
        return f"sha256:{hashlib.sha256(ssl.PEM_cert_to_DER_cert(first)).hexdigest()}"
    except OSError as exc:
        raise ConfigError(f"the certificate {path} cannot be read: {exc.strerror}") from None
    except ValueError:
        raise ConfigError(f"{path} has no certificate in PEM format") from None


def init(directory: Path, user: str) -> Secrets:
    """
    Make *directory* with a token for *user*, one for an admin, and a certificate that signs itself.

    All of it is for the eyes of the one who runs this only. The token that clients get is no admin's: it goes to many
    machines, and whoever has an admin's takes everybody's GPUs.

    Raises:
        ConfigError: some of it is there already, or cannot be made.
        MissingExtra: the library that makes certificates is not installed.
    """
    require_extra("server", "cryptography")
    # Of another system's names, such as DOMAIN\\user, what a server takes.
    user = re.sub(r"[^A-Za-z0-9._@-]", "-", user)[:80] or "user"
    admin = f"{user}-admin"
    token, admin_token = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
    key, cert = _certificate()
    made: list[Path] = []
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, body in (
            (TOKENS, f"# USER TOKEN [admin]\n{user} {token}\n{admin} {admin_token} admin\n".encode()),
            (KEY, key),
            (CERT, cert),
        ):
            path = directory / name
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            made.append(path)
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(descriptor, 0o600)  # whatever the umask says
                file.write(body)
        return Secrets(str(directory), user, token, admin, admin_token, fingerprint_of(str(directory / CERT)))
    except OSError as exc:
        for path in made:  # all or nothing
            with contextlib.suppress(OSError):
                path.unlink()
        if isinstance(exc, FileExistsError):
            raise ConfigError(f"{exc.filename} is there already; remove it to begin anew") from None
        raise ConfigError(f"{exc.filename or directory} cannot be made: {exc.strerror}") from None


def _certificate() -> tuple[bytes, bytes]:
    """A key and a certificate for this machine's names, in PEM format."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    host = socket.gethostname()
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host[:64] or "gpupool-sync")])
    names: list[x509.GeneralName] = [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    with contextlib.suppress(ValueError):  # a name that is none in the DNS
        names.insert(0, x509.DNSName(host))
    now = datetime.datetime.now(datetime.timezone.utc)
    cert = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=DAYS))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private, cert.public_bytes(serialization.Encoding.PEM)
