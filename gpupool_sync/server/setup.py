"""``serve --init``: a token and a certificate, so that the safe way is the short way."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import ipaddress
import os
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
    user: str
    token: str = attrs.field(repr=False)
    fingerprint: str  # of the certificate: sha256:…

    def url(self, host: str, port: int) -> str:
        """By which a client finds it, is let in, and knows that it is the one."""
        shown = f"[{host}]" if ":" in host else host
        return f"https://{self.user}:{self.token}@{shown}:{port}#{self.fingerprint}"


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
    Make *directory* with a token for *user* and a certificate that signs itself; all for this user's eyes only.

    Raises:
        ConfigError: some of it is there already, or cannot be made.
        MissingExtra: the library that makes certificates is not installed.
    """
    require_extra("server", "cryptography")
    token = secrets.token_urlsafe(32)
    key, cert = _certificate()
    made: list[Path] = []
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, body in (
            (TOKENS, f"# USER TOKEN [admin]\n{user} {token} admin\n".encode()),
            (KEY, key),
            (CERT, cert),
        ):
            path = directory / name
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            made.append(path)
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(descriptor, 0o600)  # whatever the umask says
                file.write(body)
        return Secrets(str(directory), user, token, fingerprint_of(str(directory / CERT)))
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
