"""From a release candidate to an immutable version: check, copy, hash, rename, point. Each is a step of its own.

A crash before the rename leaves only a staging directory, which the next publish deletes. A crash before the pointer
moves leaves a whole version that nobody serves yet; publishing the same candidate again moves the pointer.
"""

import logging
import shutil
from datetime import UTC, datetime
from pathlib import Path

from tqdm import tqdm

from pipelines.candidate import Candidate
from pipelines.contracts.durable import require_writable, sha256_of, sweep_staging
from pipelines.contracts.errors import VersionConflict
from pipelines.contracts.manifest import Manifest
from pipelines.contracts.version import VersionStore
from pipelines.contracts.workspace import Workspace

__all__ = ["publish"]

logger = logging.getLogger(__name__)


def publish(workspace: Workspace, directory: Path, *, parents: tuple[int, ...] = ()) -> Manifest:
    """Publish the candidate at `directory` under the next number and point to it.

    Args:
        parents: versions it was warm-started from; they must be published.

    Raises:
        NotPrepared: there is no candidate.
        InvalidTable: the candidate may not be published; nothing was written.
        VersionNotFound: a parent is not published.
        VersionConflict: this candidate is published already, or another process took the number.
        InvalidConfig: the workspace cannot be written.
    """
    versions = workspace.versions
    candidate = Candidate.read(directory)
    require_writable(versions.root)
    for parent in parents:
        versions.manifest(parent)
    candidate.check()
    sweep_staging(versions.root)
    hashes = {name: sha256_of(directory / name) for name in candidate.files}
    if twin := _published_as(versions, hashes):
        return _resume(versions, twin)
    manifest = Manifest(
        version=versions.next_number(),
        dataset=candidate.dataset,
        created_at=datetime.now(UTC),
        as_of=candidate.as_of,
        windows=candidate.windows,
        parents=tuple(sorted(set(parents))),
        tables=candidate.tables,
        metrics=candidate.metrics,
        files=hashes,
    )
    with versions.creating(manifest.version) as staging:
        _copy(candidate, staging)
        manifest.verify(staging)  # what was copied is what was checked
        manifest.write(staging)
    logger.info("version %d is complete, manifest %s", manifest.version, manifest.sha256)
    versions.point_to(manifest.version)
    return manifest


def _copy(candidate: Candidate, staging: Path) -> None:
    for name in tqdm(candidate.files, desc="publish", unit="file", disable=None):
        target = staging / name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(candidate.directory / name, target)


def _published_as(versions: VersionStore, hashes: dict[str, str]) -> Manifest | None:
    return next((manifest for manifest in versions.manifests() if manifest.files == hashes), None)


def _resume(versions: VersionStore, twin: Manifest) -> Manifest:
    """Finish a publish that crashed between rename and pointer; anything else is a second publish of the same."""
    current = versions.current()
    if twin.version != versions.numbers()[-1] or (current is not None and current >= twin.version):
        raise VersionConflict(
            "this candidate", expected="one that is not published yet", got=f"the files of version {twin.version}",
            remedy=f"`facet versions show {twin.version}` tells about it; train or quantize anew for another version.",
        )
    logger.info("version %d was complete; only the pointer had to move", twin.version)
    versions.point_to(twin.version)
    return twin
