"""`facet token`: a bearer token, and the entry by which servers know it."""

import os
from pathlib import Path

import click

from online.security.roles import ROLES, token_sha256
from pipelines.contracts.errors import InvalidConfig

__all__ = ["token"]


@click.command()
@click.argument("name")
@click.option(
    "--role", "roles", type=click.Choice(ROLES), required=True, multiple=True, help="What it may do; repeat for more."
)
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), required=True,
    help="New file for the token, readable by you alone: what --token-file wants.",
)
def token(name: str, roles: tuple[str, ...], out: Path) -> None:
    """Make a random token for NAME and print its entry for the servers' --roles file.

    \b
      facet token ranker-1 --role lookup --out ranker-1.token >> roles.yaml
      facet serve cpu-tier --roles roles.yaml --tls-certificate … --tls-key …
      facet serve ranker --cpu-tier-token-file ranker-1.token --cpu-tier-tls-ca …

    The token itself is not printed; the entry has only its hash. Servers read a changed roles file without restart.
    """
    import secrets

    import yaml

    made = secrets.token_urlsafe(32)
    try:
        with open(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(made + "\n")
    except OSError as error:
        raise InvalidConfig(
            f"token file {out}", expected="a new file", got=error.strerror or str(error),
            remedy="Give another path, or remove the old token first.",
        ) from error
    entry = {name: {"token_sha256": token_sha256(made), "roles": list(roles)}}
    click.echo(yaml.safe_dump(entry, sort_keys=False), nl=False)
