"""How a server proves who it is and knows its callers, and how a client does: files named, read and checked at once."""

import ipaddress
import os
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

from online.security.roles import Roles
from online.security.watched import Watched
from pipelines.contracts.errors import InvalidConfig

__all__ = ["ClientSecurity", "ServerSecurity", "is_loopback"]

MIN_TOKEN_CHARACTERS = 32


def is_loopback(host: str) -> bool:
    """Whether only processes of this machine reach the address; a name other than localhost counts as another's."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True)
class ServerSecurity:
    """What a server shows and asks for. Everything is checked before anything listens.

    Attributes:
        certificate, key: PEM; the server's certificate followed by those between it and the CA, and its private key.
            Without them nothing is encrypted.
        client_ca: PEM; every client must then show a certificate that one of these CAs signed (mutual TLS).
        roles: YAML, see `online.security.roles`; without it everybody who can connect may do everything.
            Nobody may do anything while the file is gone, can be changed by others or has a slip in it.
        reflection: tell anybody what services there are, even with roles.

    Raises:
        InvalidConfig: a file is missing, is not what it should be, does not fit another, or is open to others.
    """

    certificate: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None
    roles: Path | None = None
    reflection: bool = False

    def __post_init__(self) -> None:
        _check_both(self.certificate, self.key)
        if self.client_ca and not self.certificate:
            raise InvalidConfig(
                "client CA", expected="a certificate and key of the server as well", got="none",
                remedy="Give --tls-certificate and --tls-key.",
            )
        if self.encrypted:
            self._context()
        if self.roles:
            self._read_roles()

    @property
    def encrypted(self) -> bool:
        return self.certificate is not None

    def credentials(self) -> grpc.ServerCredentials:
        """For a gRPC port. Files that are replaced come into effect with the next connection, within a second or so;
        those that are half replaced do not."""
        watched = Watched(self._tls_files(), self._configuration)
        given = [watched.value()]

        def changed() -> grpc.ServerCertificateConfiguration | None:
            current = watched.value()
            if current is given[0]:
                return None
            given[0] = current
            return current

        return grpc.dynamic_ssl_server_credentials(
            given[0], changed, require_client_authentication=self.client_ca is not None
        )

    def watch_tls(self) -> Watched[ssl.SSLContext]:
        """For any other port: as `credentials`, to be asked for each connection."""
        return Watched(self._tls_files(), self._context)

    def _tls_files(self) -> list[Path]:
        return [path for path in (self.certificate, self.key, self.client_ca) if path]

    def _context(self) -> ssl.SSLContext:
        context = _with_pair(self.certificate, self.key)
        if self.client_ca:
            _trust(context, self.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        self._context()
        return grpc.ssl_server_certificate_configuration(
            [(self.key.read_bytes(), self.certificate.read_bytes())],
            root_certificates=self.client_ca.read_bytes() if self.client_ca else None,
        )

    def watch_roles(self, *, clock: Callable[[], float] = time.monotonic) -> Watched[Roles]:
        """The roles file, read again when it changes; nobody's roles while it is not what it should be."""
        return Watched([self.roles], self._read_roles, if_unusable=Roles({}), clock=clock)

    def _read_roles(self) -> Roles:
        _check_only_owner(self.roles, writing=True)
        roles = Roles.read(self.roles)
        if roles.by_certificate and not self.client_ca:
            raise InvalidConfig(
                f"{self.roles}: identities by certificate", expected="a CA that their certificates are checked by",
                got="none", remedy="Give --tls-client-ca, or know them by tokens.",
            )
        return roles


@dataclass(frozen=True)
class ClientSecurity:
    """What a client checks and shows. Everything is checked before the first connection; raises `InvalidConfig`.

    Attributes:
        ca: PEM; the servers' certificates must be signed by one of these CAs. Without it nothing is encrypted.
        certificate, key: PEM, shown to servers that ask (mutual TLS).
        token_file: holds the bearer token that goes with every call; read again when it changes.
        token_variable: environment variable that holds it instead.
        server_name: name that the servers' certificates carry, where it is not the host name of their addresses.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    token_file: Path | None = None
    token_variable: str | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        _check_both(self.certificate, self.key)
        if self.certificate:
            _with_pair(self.certificate, self.key)
        if self.ca:
            _trust(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), self.ca)
        elif self.certificate or self.server_name:
            raise InvalidConfig(
                "TLS of a client", expected="the CA that signed the servers' certificates", got="none",
                remedy="Give --tls-ca.",
            )
        self.token()

    def token(self) -> Watched[str] | None:
        """The token, if there is one."""
        if self.token_file:
            return Watched([self.token_file], lambda: _read_token(self.token_file))
        if self.token_variable:
            given = os.environ.get(self.token_variable, "")
            token = _checked_token(given, f"environment variable {self.token_variable}")
            return Watched([], lambda: token)
        return None

    def credentials(self) -> grpc.ChannelCredentials | None:
        """For a channel, which keeps what the files say now as long as it lives; None: plaintext."""
        if not self.ca:
            return None
        return grpc.ssl_channel_credentials(
            root_certificates=self.ca.read_bytes(),
            private_key=self.key.read_bytes() if self.key else None,
            certificate_chain=self.certificate.read_bytes() if self.certificate else None,
        )


def _check_both(certificate: Path | None, key: Path | None) -> None:
    if (certificate is None) != (key is None):
        raise InvalidConfig(
            "certificate and private key", expected="both or neither", got="only one of them", remedy="Give the other."
        )


def _with_pair(certificate: Path, key: Path) -> ssl.SSLContext:
    """A server's context with this certificate."""
    _mode(certificate)
    _check_only_owner(key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # An encrypted key would ask for its passphrase on the terminal.
        context.load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        raise InvalidConfig(
            f"certificate {certificate} with key {key}", expected="PEM files that belong together, the key unencrypted",
            got=getattr(error, "reason", None) or "something else", remedy="Correct the files.",
        ) from error
    return context


def _trust(context: ssl.SSLContext, ca: Path) -> None:
    """Let the context believe certificates that `ca` signed."""
    _check_only_owner(ca, writing=True)
    try:
        context.load_verify_locations(ca)
    except OSError as error:  # an SSLError is one
        raise InvalidConfig(
            f"CA {ca}", expected="certificates as PEM", got=getattr(error, "reason", None) or "something else",
            remedy="Correct it.",
        ) from error


def _mode(path: Path) -> int:
    """Permissions of a file that this process can read; refuses any other."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mode & 0o777
    except OSError as error:
        raise InvalidConfig(
            str(path), expected="a file that this process can read", got=error.strerror or str(error),
            remedy="Correct the path, or the file's owner.",
        ) from error


def _check_only_owner(path: Path, *, writing: bool = False) -> None:
    """Refuse a file that every user can read or, if `writing`, change; what its group may do is the owner's choice."""
    mode = _mode(path)
    if mode & (0o002 if writing else 0o006):
        raise InvalidConfig(
            str(path), expected=f"a file that no others can {'change' if writing else 'read'}", got=f"mode {mode:o}",
            remedy=f"chmod {'o-w' if writing else 'o-rwx'} {path}",
        )


def _read_token(path: Path) -> str:
    _check_only_owner(path)
    return _checked_token(path.read_text(errors="replace").strip(), str(path))


def _checked_token(token: str, where: str) -> str:
    if len(token) < MIN_TOKEN_CHARACTERS or not (token.isascii() and token.isprintable()) or " " in token:
        raise InvalidConfig(  # without what came
            f"token in {where}", expected=f"one word of at least {MIN_TOKEN_CHARACTERS} ASCII characters",
            got=f"{len(token)} characters", remedy="Make one by `facet token`.",
        )
    return token
