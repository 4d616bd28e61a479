"""Certificates for tests, made by the openssl program: valid, expired, and of a CA that nobody trusts.

Every server certificate is for 127.0.0.1 and localhost.
"""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Authority", "Pair"]


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key, PEM."""

    certificate: Path
    key: Path


class Authority:
    """A CA in a folder of its own, which it makes."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.own = Pair(folder / "ca.pem", folder / "ca.key")
        _openssl(
            "req", "-x509", *_NEW_KEY, "-keyout", self.own.key, "-out", self.own.certificate, "-days", "2",
            "-subj", f"/CN={folder.name}", "-addext", "basicConstraints=critical,CA:TRUE",
        )

    @property
    def certificate(self) -> Path:
        return self.own.certificate

    def issue(self, name: str, *, alternatives: str = "", expired: bool = False) -> Pair:
        """A certificate for the common name `name`; by default it is valid for this host's servers."""
        pair = Pair(self.folder / f"{name}.pem", self.folder / f"{name}.key")
        request, extensions, issued = (self.folder / f"{name}.{end}" for end in ("csr", "ext", "db"))
        _openssl("req", *_NEW_KEY, "-keyout", pair.key, "-out", request, "-subj", f"/CN={name}")
        pair.key.chmod(0o600)
        extensions.write_text(f"subjectAltName={alternatives or 'IP:127.0.0.1,DNS:localhost'}\n")
        issued.touch()
        settings = self.folder / f"{name}.cnf"
        settings.write_text(
            f"[ca]\ndefault_ca=d\n[d]\ndatabase={issued}\nnew_certs_dir={self.folder}\ndefault_md=sha256\n"
            "policy=p\nrand_serial=yes\n[p]\ncommonName=supplied\n"
        )
        moments = ("20200101000000Z", "20200102000000Z") if expired else ("20200101000000Z", "20991231000000Z")
        _openssl(
            "ca", "-batch", "-config", settings, "-cert", self.certificate, "-keyfile", self.own.key, "-in", request,
            "-out", pair.certificate, "-extfile", extensions, "-notext",
            "-startdate", moments[0], "-enddate", moments[1],
        )
        return pair


_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def _openssl(*arguments: object) -> None:
    assert shutil.which("openssl"), "These tests make certificates by the openssl program: apt-get install openssl"
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
