"""Options that say how servers and clients prove who they are, and what servers take; read before a command runs."""

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from pipelines.contracts.errors import InvalidConfig

__all__ = ["client_security", "cpu_tier_security", "server_limits", "server_security"]

TOKEN_VARIABLE = "FACET_TOKEN"
FILE = click.Path(dir_okay=False, path_type=Path)

Command = Callable[..., Any]


def server_security(command: Command) -> Command:
    """Add --tls-…, --roles, --reflection and --plaintext; the command gets `security`, a `ServerSecurity` or None."""

    @click.option(
        "--tls-certificate", type=FILE, metavar="PEM", help="This server's certificate, and those up to the CA."
    )
    @click.option("--tls-key", type=FILE, metavar="PEM", help="Its private key, which no others can read.")
    @click.option(
        "--tls-client-ca", type=FILE, metavar="PEM", help="Clients must show a certificate of this CA (mutual TLS)."
    )
    @click.option(
        "--roles", type=FILE, metavar="YAML",
        help="Who may do what: identities by token or certificate, with roles lookup, rank, admin, metrics. "
        "`facet token` makes an entry.",
    )
    @click.option("--reflection", is_flag=True, help="Say what services there are, to anybody, even with --roles.")
    @click.option(
        "--plaintext", is_flag=True,
        help="Listen without TLS on other addresses than loopback too. Whoever sees the network reads it all.",
    )
    @wraps(command)
    def secured(
        *arguments: Any, tls_certificate: Path | None, tls_key: Path | None, tls_client_ca: Path | None,
        roles: Path | None, reflection: bool, plaintext: bool, **options: Any,
    ) -> Any:
        from online.security.credentials import ServerSecurity, is_loopback

        security = None
        if any((tls_certificate, tls_key, tls_client_ca, roles)):
            security = ServerSecurity(tls_certificate, tls_key, tls_client_ca, roles, reflection)
        encrypted = security is not None and security.encrypted
        if not (encrypted or plaintext or is_loopback(options["host"])):
            raise InvalidConfig(
                f"listening on {options['host']}", expected="TLS, since others than this machine reach it",
                got="neither --tls-certificate nor --plaintext",
                remedy="Give --tls-certificate and --tls-key, or --plaintext if that network is yours alone.",
            )
        return command(*arguments, security=security, **options)

    return secured


def server_limits(command: Command) -> Command:
    """Add limits of a listening port; the command gets `limits`, to be narrowed by `Limits.for_ids`."""

    @click.option(
        "--max-connections", type=click.IntRange(1), default=1024, show_default=True,
        help="Connections to one port at a time; more are closed at once.",
    )
    @click.option(
        "--max-streams", type=click.IntRange(1), default=256, show_default=True,
        help="Calls under way on one connection; more wait in the client.",
    )
    @click.option(
        "--connection-idle", type=click.FloatRange(0.001), default=600.0, show_default=True,
        help="Seconds without a call after which a connection is closed.",
    )
    @click.option(
        "--connection-age", type=click.FloatRange(0.001), default=3600.0, show_default=True,
        help="Seconds after which a client has to open another connection; its calls do not fail by that.",
    )
    @click.option(
        "--handshake-timeout", type=click.FloatRange(0.001), default=10.0, show_default=True,
        help="Seconds that a new connection has for TLS and HTTP/2.",
    )
    @wraps(command)
    def limited(
        *arguments: Any, max_connections: int, max_streams: int, connection_idle: float, connection_age: float,
        handshake_timeout: float, **options: Any,
    ) -> Any:
        from online.rpc.limits import Limits

        limits = Limits(
            connections=max_connections, streams=max_streams, idle_s=connection_idle, age_s=connection_age,
            handshake_s=handshake_timeout,
        )
        return command(*arguments, limits=limits, **options)

    return limited


def client_security(command: Command) -> Command:
    """Add --tls-… and --token-file; the command gets `security`, a `ClientSecurity` or None."""
    return _as_client(command, "tls", "the servers", "security")


def cpu_tier_security(command: Command) -> Command:
    """Add --cpu-tier-tls-… and --cpu-tier-token-file, for a server that is a client too; it gets `client_security`."""
    return _as_client(command, "cpu-tier-tls", "the CPU tier", "client_security")


def _as_client(command: Command, prefix: str, servers: str, parameter: str) -> Command:
    token_file = f"{prefix.removesuffix('tls')}token-file"

    @click.option(
        f"--{prefix}-ca", "client_ca", type=FILE, metavar="PEM",
        help=f"CA that signed the certificates of {servers}; without it nothing is encrypted.",
    )
    @click.option(
        f"--{prefix}-certificate", "client_certificate", type=FILE, metavar="PEM",
        help=f"Certificate to show to {servers}.",
    )
    @click.option(
        f"--{prefix}-key", "client_key", type=FILE, metavar="PEM", help="Its private key, which no others can read."
    )
    @click.option(
        f"--{prefix}-server-name", "client_server_name", metavar="NAME",
        help=f"Name in the certificates of {servers}, where it is not the host in their addresses.",
    )
    @click.option(
        f"--{token_file}", "client_token_file", type=FILE, metavar="FILE",
        help=f"Bearer token for {servers}; or in the environment variable {TOKEN_VARIABLE}.",
    )
    @wraps(command)
    def secured(
        *arguments: Any, client_ca: Path | None, client_certificate: Path | None, client_key: Path | None,
        client_server_name: str | None, client_token_file: Path | None, **options: Any,
    ) -> Any:
        from online.security.credentials import ClientSecurity

        variable = TOKEN_VARIABLE if TOKEN_VARIABLE in os.environ and not client_token_file else None
        given = (client_ca, client_certificate, client_key, client_token_file, variable, client_server_name)
        security = ClientSecurity(*given) if any(given) else None
        return command(*arguments, **{parameter: security}, **options)

    return secured
