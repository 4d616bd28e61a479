"""The whole system on real data, by the commands a user would type, and what each of them measured."""

import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from pipelines.contracts.durable import replacing_file
from pipelines.contracts.errors import FacetError, InvalidConfig
from pipelines.contracts.workspace import Workspace

__all__ = ["Demo", "StageFailed"]

log = logging.getLogger(__name__)

BIN = Path(sys.executable).parent
STOP_TIMEOUT_S = 20
TIMEOUT_S = 60
"""Seconds for a live request, and for its rows: on a busy machine an answer may take long, and is no failure."""
ARM = "both"
MARGIN_S, PAUSE_S = 5, 3
"""Seconds of traffic before the second version and after its rollout; and between the phases of the rollout."""
THINK_MS = 20
"""How long each of two clients waits before a request: without it they would keep the cores from what is shown."""
BEGINNING = "2000-01-01T00:00:00"


class StageFailed(FacetError):
    """A command of the demo ended with an error; what it printed stands above."""


@dataclass(frozen=True)
class Server:
    """Where a server that is ready listens, `host:port` each."""

    address: str
    admin: str

    @classmethod
    def from_ready_line(cls, line: str) -> "Server":
        """Parse the one JSON line that `facet serve` prints when it can answer."""
        ports = json.loads(line)["ports"]
        address, admin = (f"127.0.0.1:{port}" for name, port in sorted(ports.items(), key=lambda p: p[0] == "admin"))
        return cls(address, admin)


@dataclass(frozen=True)
class Demo:
    """Runs the stages in order and remembers each that is done, so that a second run goes on where the first stopped.

    Args:
        workspace: where everything is written; its sibling `feature_repo/` is the Feast repository.
        dataset: name or YAML file of a data set with the runs `v1` and `v2`.
        source: its log, if not the one the data set names.
        config: training options that differ from the defaults.
        seeds: how many seeds each arm of the experiment is trained with.
        requests: ranking requests sent while version 2 rolls out.
        candidates: items scored per request.
    """

    workspace: Workspace
    dataset: str
    source: Path | None
    config: Path | None
    seeds: int
    requests: int
    candidates: int

    def run(self) -> dict[str, Any]:
        """Run what is not done yet; returns the facts of every stage, each with the seconds it took (`wall_s`)."""
        stages: list[tuple[str, str, Callable[[], dict[str, Any]]]] = [
            ("ingest", f"the log of {self.dataset} becomes canonical events", self._ingest),
            ("prepare", "views, pairs, graph and examples for two sets of windows", self._prepare),
            ("apply", "feast apply: the context views become known to the feature store", self._apply),
            ("evaluate", f"two facets and four arms, {self.seeds} seeds each", self._evaluate),
            ("version_1", "quantize and publish version 1, feast apply, feast materialize", self._first_version),
            ("version_2", "both facets and the ranker on later windows, published as version 2", self._second_version),
            ("serve", "serve version 1; materialize and roll out version 2 under live traffic", self._serve),
            ("audit", "every published row, compared over every path", self._audit),
        ]
        facts = {}
        for number, (name, what, work) in enumerate(stages, start=1):
            record = self._records / f"{name}.json"
            label = click.style(f"[{number}/{len(stages)}] {name}", fg="cyan", bold=True)
            if record.is_file():
                facts[name] = json.loads(record.read_text())
                click.echo(f"{label}: done before, {facts[name]['wall_s']:.0f} s", err=True)
                continue
            click.echo(f"{label}: {what}", err=True)
            start = time.monotonic()
            facts[name] = work() | {"wall_s": round(time.monotonic() - start, 2)}
            facts[name]["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
            with replacing_file(record) as path:
                path.write_text(json.dumps(facts[name], indent=1))
        return facts

    def clear(self) -> None:
        """Delete an earlier demo's workspace; raises `InvalidConfig` if the folder is something else."""
        if self.workspace.root.exists():
            if not self._records.is_dir():
                raise InvalidConfig(
                    f"--fresh would delete {self.workspace.root}", expected="the workspace of an earlier demo",
                    got="a folder without one", remedy="Delete it yourself, or give another --workspace.",
                )
            shutil.rmtree(self.workspace.root)

    def require_own_workspace(self) -> None:
        """Raise `InvalidConfig` if versions are here that no demo published: it would take them for its own."""
        if (numbers := self.workspace.versions.numbers()) and not self._records.is_dir():
            raise InvalidConfig(
                f"the demo's workspace {self.workspace.root}", expected="an empty one, or that of an earlier demo",
                got=f"published versions {numbers}", remedy="Give another folder with `facet --workspace DIR demo`.",
            )

    @property
    def _records(self) -> Path:
        return self.workspace.root / "demo"

    # -- stages ---------------------------------------------------------------------------------------------------

    def _ingest(self) -> dict[str, Any]:
        source = ["--source", str(self.source)] if self.source else []
        self._facet("ingest", "--dataset", self.dataset, *source)
        return {}

    def _prepare(self) -> dict[str, Any]:
        for run in ("v1", "v2"):
            self._facet("prepare", "--run", run)
        return {}

    def _apply(self) -> dict[str, Any]:
        self._feast("apply")
        return {}

    def _evaluate(self) -> dict[str, Any]:
        self._facet("evaluate", "--run", "v1", "--seeds", str(self.seeds), *self._config)
        return json.loads((self.workspace.run("v1").directory / "evaluation.json").read_text())

    def _release(self, run: str, version: int) -> None:
        """Quantize a run's ranker and publish it, unless an interrupted demo did so already."""
        self._facet("quantize", "--run", run, "--arm", ARM, "--seed", "0", "--to", "int4")
        if version not in self.workspace.versions.numbers():
            parent = ["--parent", str(version - 1)] if version > 1 else []
            self._facet("publish", "--run", run, "--arm", ARM, "--seed", "0", *parent)

    def _materialize(self, version: int, *more_views: str) -> None:
        """Apply and materialize a version's tables, and `more_views`, as of the end of the version's data."""
        self._feast("apply")
        manifest = self.workspace.versions.manifest(version)
        views = (*(spec.view_name(version) for spec in manifest.tables), *more_views)
        until = manifest.as_of.replace(tzinfo=None).isoformat()
        self._feast("materialize", BEGINNING, until, *(word for view in views for word in ("--views", view)))

    def _first_version(self) -> dict[str, Any]:
        self._release("v1", 1)
        self._materialize(1, "user_context", "item_context", "user_item_context")
        return {}

    def _second_version(self) -> dict[str, Any]:
        for facet in ("contrastive", "kge"):
            self._facet("pretrain", facet, "--run", "v2", "--seed", "0", *self._config)
        self._facet("finetune", "--run", "v2", "--arm", ARM, "--seed", "0", *self._config)
        self._release("v2", 2)
        return {}

    def _serve(self) -> dict[str, Any]:
        load_file, lookup_file = self._records / "load.json", self._records / "lookup.json"
        timeline, enough = self.workspace.root / "rollout" / "timeline-to-2.json", self._records / "traffic-may-end"
        enough.unlink(missing_ok=True)
        ranker_options = ("--versions", "1", "--timeout", str(TIMEOUT_S))
        with self._server("cpu-tier", "--versions", "1") as tier:
            self._facet("load", "--lookup", tier.address, "--version", "1", "--concurrency", "1", "--requests", "3000",
                        "--out", str(lookup_file))
            with self._server("ranker", *ranker_options, "--cpu-tier", tier.address) as ranker:
                load = self._start(
                    "load", "--ranker", ranker.address, "--concurrency", "2", "--think-ms", str(THINK_MS),
                    "--timeout", str(TIMEOUT_S), "--requests", str(self.requests), "--until", str(enough),
                    "--candidates", str(self.candidates), "--version", "1", "--out", str(load_file),
                )
                try:
                    time.sleep(MARGIN_S)
                    materializing = [_now()]
                    self._materialize(2)
                    materializing.append(_now())
                    self._facet(
                        "rollout", "--to", "2", "--cpu-tier", tier.admin, "--ranker", ranker.admin,
                        "--pause", str(PAUSE_S),
                    )
                    time.sleep(MARGIN_S)
                    enough.touch()
                    status = load.wait()
                finally:
                    load.kill()
                if status:
                    raise self._failed("facet load --ranker …", status)
        return {
            "load": json.loads(load_file.read_text()),
            "lookup": json.loads(lookup_file.read_text()),
            "rollout": json.loads(timeline.read_text()),
            "materializing": materializing,
        }

    def _audit(self) -> dict[str, Any]:
        for version in (1, 2):
            self._facet("audit", "--version", str(version))
        return {
            str(version): json.loads((self.workspace.root / "audit" / f"{version}.json").read_text())
            for version in (1, 2)
        }

    @property
    def _config(self) -> list[str]:
        return ["--config", str(self.config)] if self.config else []

    # -- commands -------------------------------------------------------------------------------------------------

    def _words(self, *words: str) -> list[str]:
        return [str(BIN / "facet"), "--workspace", str(self.workspace.root), *words]

    def _facet(self, *words: str) -> None:
        shown = "facet " + " ".join(words)
        click.secho(f"$ {shown}", fg="bright_black", err=True)
        done = subprocess.run(self._words(*words), env=_utc(os.environ), stdout=sys.stderr, check=False)
        if done.returncode:
            raise self._failed(shown, done.returncode)

    def _feast(self, *words: str) -> None:
        """Run a stock Feast command; what it says on standard error is shown only if it fails."""
        shown = "feast " + " ".join(words)
        click.secho(f"$ {shown}", fg="bright_black", err=True)
        done = subprocess.run(
            [str(BIN / "feast"), *words], cwd=self.workspace.feature_repo, env=_utc(os.environ),
            stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False,
        )
        if done.returncode:
            click.echo(done.stderr, err=True)
            raise self._failed(shown, done.returncode)

    def _start(self, *words: str) -> subprocess.Popen:
        click.secho(f"$ facet {' '.join(words)} &", fg="bright_black", err=True)
        return subprocess.Popen(self._words(*words), env=_utc(os.environ))

    @contextmanager
    def _server(self, role: str, *options: str) -> Iterator["Server"]:
        """Start a server on free ports, wait until it says that it is ready, stop it at the end."""
        words = ("serve", role, *options, "--port", "0", "--admin-port", "0")
        click.secho(f"$ facet {' '.join(words)} &", fg="bright_black", err=True)
        process = subprocess.Popen(self._words(*words), stdout=subprocess.PIPE, text=True, env=_utc(os.environ))
        try:
            line = process.stdout.readline()
            if not line:
                raise self._failed(f"facet {' '.join(words)}", process.wait())
            yield Server.from_ready_line(line)
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    @staticmethod
    def _failed(command: str, status: int) -> StageFailed:
        return StageFailed(
            f"`{command}`", expected="exit status 0", got=str(status),
            remedy="What went wrong stands above; run the demo again to go on from this stage.",
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _utc(environment: "os._Environ[str]") -> dict[str, str]:
    """The environment, with times in UTC: Feast reads a time without a zone in the zone of its process."""
    return {**environment, "TZ": "UTC"}
