"""Who may do what: identities with roles, each known by a bearer token or a client certificate.

```yaml
ranker-1:                      # any name; it is what logs call this identity
  token_sha256: 9f86d0…        # hexadecimal SHA-256 of its token: `facet token` makes a token and prints this entry
  roles: [lookup]
controller:
  certificate: rollout.example # common name or an alternative name of a certificate that the client CA signed
  roles: [admin]
```

The file holds no secrets: from the hash of a random token nobody finds the token.
"""

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipelines.contracts.errors import InvalidConfig
from pipelines.contracts.strict import build, read_yaml

__all__ = ["ROLES", "Identity", "Roles", "token_sha256"]

ROLES = ("lookup", "rank", "admin", "metrics")


def token_sha256(token: str) -> str:
    """Hexadecimal SHA-256 of a token, by which a roles file knows it."""
    return hashlib.sha256(token.encode(errors="surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Identity:
    """One entry: its roles, and exactly one way to know it."""

    roles: tuple[str, ...]
    token_sha256: str | None = None
    certificate: str | None = None

    def __post_init__(self) -> None:
        if (self.token_sha256 is None) == (self.certificate is None):
            raise InvalidConfig(
                "identity in a roles file", expected="one of token_sha256 and certificate",
                got="neither" if self.certificate is None else "both", remedy="Give each identity one; make two of it.",
            )
        if not self.roles or (unknown := sorted(set(self.roles) - set(ROLES))):
            raise InvalidConfig(
                "roles of an identity", expected=f"some of {list(ROLES)}", got=str(unknown) if self.roles else "none",
                remedy="Correct the roles file.",
            )
        digest = self.token_sha256
        if digest is not None and (len(digest) != 64 or set(digest) - set("0123456789abcdef")):
            raise InvalidConfig(  # without what came: it might be the token itself
                "token_sha256 of an identity", expected="64 digits of lowercase hexadecimal", got="something else",
                remedy="Take it from `facet token`. If the token itself stood there, make another token.",
            )


class Roles:
    """A roles file.

    Args:
        identities: name -> identity; two may not share a token or a certificate.
    """

    def __init__(self, identities: dict[str, Identity]) -> None:
        known = [identity.token_sha256 or f"certificate {identity.certificate}" for identity in identities.values()]
        if twice := sorted(name for name, key in zip(identities, known, strict=True) if known.count(key) > 1):
            raise InvalidConfig(
                "roles file", expected="a token or certificate for each identity alone", got=f"shared by {twice}",
                remedy="Make another token, or join the entries.",
            )
        self.identities = identities
        self._by_token = [(i.token_sha256.encode(), name) for name, i in identities.items() if i.token_sha256]
        self._by_certificate = {i.certificate: name for name, i in identities.items() if i.certificate}

    @classmethod
    def read(cls, path: Path) -> "Roles":
        """Parse a roles file; raises `InvalidConfig`, silent about what came: it might be a token."""
        return cls(
            {
                str(name): build(
                    Identity, entry, where=f"{path}: {name}", manual="online/security/roles.py", secret=True
                )
                for name, entry in read_yaml(path, secret=True).items()
            }
        )

    @property
    def by_certificate(self) -> bool:
        """Whether some identity is known by its certificate."""
        return bool(self._by_certificate)

    def of_token(self, token: str) -> str | None:
        """Name of the identity of a token. The time it takes does not depend on which one, if any, it is."""
        digest, found = token_sha256(token).encode(), None
        for known, name in self._by_token:
            if hmac.compare_digest(known, digest):
                found = name
        return found

    def of_certificate(self, names: Iterable[str]) -> list[str]:
        """Names of the identities of a verified certificate's common name and alternative names."""
        return sorted({self._by_certificate[name] for name in names if name in self._by_certificate})
