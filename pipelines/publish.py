"""From a release to an immutable version: copy, check, rename, point. Each is a step of its own.

```
release ──copy, hashing──► .staging/ ──check, hash again──► manifest ──flush, rename──► versions/N/ ──► CURRENT
```

A hard link instead of the copy would cost nothing, and would let whoever has the release's file open change the
version. The copy is what is checked: nobody else can alter it between the check and the manifest.

A crash before the rename leaves only a staging directory, which the next publish deletes. A crash before the pointer
moves leaves a whole version that nobody serves yet; publishing the same release again moves the pointer.
"""

import hashlib
import logging
import os
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from tqdm import tqdm

from pipelines.contracts.durable import require_writable, sha256_of, sweep_staging
from pipelines.contracts.errors import VersionConflict
from pipelines.contracts.freshness import DEFAULT_LIMITS, FreshnessLimits
from pipelines.contracts.manifest import Manifest
from pipelines.contracts.version import VersionStore
from pipelines.contracts.workspace import Workspace
from pipelines.release import Release

__all__ = ["point", "publish"]

logger = logging.getLogger(__name__)

BLOCK_BYTES = 1 << 22
LINK_NAME = "link"


def publish(
    workspace: Workspace, directory: Path, *, parents: tuple[int, ...] = (),
    limits: FreshnessLimits = DEFAULT_LIMITS,
) -> Manifest:
    """Publish the release at `directory` under the next number and point to it.

    Args:
        parents: versions it was warm-started from; they must be published, or retired.
        limits: how old its pretraining may be.

    Raises:
        NotPrepared: there is no release.
        StalePretraining: its pretraining is older than the limits allow.
        InvalidTable: the release may not be published; nothing is left of it.
        IntegrityError: a crash left it published without the pointer, and its upper model is not what was published.
        VersionNotFound: a parent was never published here.
        VersionConflict: this release is published already, or another process took the number.
        InvalidConfig: the workspace cannot be written.
    """
    versions = workspace.versions
    release = Release.read(directory)
    limits.check(release.windows, f"release {directory}")
    require_writable(versions.root)
    for parent in set(parents) - set(versions.retired()):
        versions.manifest(parent)
    sweep_staging(versions.root)
    number = versions.next_number()  # before looking for a twin: one that appears later takes this number first
    if twin := _published_as(versions, release):
        return _resume(versions, twin)
    with versions.creating(number) as staging:
        hashes = _copy(release, staging)
        _share_with(versions, parents, hashes, staging)
        replace(release, directory=staging).check()
        manifest = Manifest(
            version=number,
            dataset=release.dataset,
            created_at=datetime.now(UTC),
            as_of=release.as_of,
            windows=release.windows,
            parents=tuple(sorted(set(parents))),
            tables=release.tables,
            lineage=release.lineage,
            metrics=release.metrics,
            files=hashes,
        )
        manifest.verify(staging)  # what was checked is what was read
        manifest.write(staging)
    logger.info("version %d is complete, manifest %s", manifest.version, manifest.sha256)
    versions.point_to(manifest.version, only_forward=True)
    return manifest


def point(workspace: Workspace, version: int) -> None:
    """Make a published version the current one, once its upper model is proved to be one that a ranker can run.

    Raises:
        VersionNotFound: it is not published here.
        VersionConflict: it is being retired at this moment.
        IntegrityError: its manifest or its upper model was altered, or no ranker could run it.
    """
    _prove(workspace.versions, workspace.versions.manifest(version))
    workspace.versions.point_to(version)


def _prove(versions: VersionStore, manifest: Manifest) -> None:
    from pipelines.contracts.upper_files import prove_published_model  # imports PyTorch, which takes seconds

    prove_published_model(manifest, versions.path(manifest.version))


def _copy(release: Release, staging: Path) -> dict[str, str]:
    """Copy the release's files, reading each once; returns their SHA-256 by name."""
    hashes = {}
    total = sum((release.directory / name).stat().st_size for name in release.files)
    with tqdm(total=total, desc="publish", unit="B", unit_scale=True, unit_divisor=1024, disable=None) as progress:
        for name in release.files:
            (staging / name).parent.mkdir(exist_ok=True)
            digest = hashlib.sha256()
            with (release.directory / name).open("rb") as source, (staging / name).open("wb") as target:
                while block := source.read(BLOCK_BYTES):
                    digest.update(block)
                    target.write(block)
                    progress.update(len(block))
            hashes[name] = digest.hexdigest()
    return hashes


def _share_with(versions: VersionStore, parents: Collection[int], hashes: dict[str, str], staging: Path) -> None:
    """Make files that a parent has too hard links to its own: the same bytes lie on the disk once, and never change."""
    for parent in versions.manifests():
        directory = versions.path(parent.version)
        for name, sha256 in parent.files.items() & hashes.items() if parent.version in parents else ():
            with suppress(OSError):  # retired meanwhile, or a file system without hard links: the copy stays
                if sha256_of(directory / name) != sha256:
                    logger.warning("%s is corrupted: the new version has a copy of its own", directory / name)
                    continue
                os.link(directory / name, staging / LINK_NAME)
                os.replace(staging / LINK_NAME, staging / name)
                logger.info("%s is that of version %d", name, parent.version)


def _published_as(versions: VersionStore, release: Release) -> Manifest | None:
    """The version of the release's files and lineage. Hashes only what has the same size, the smallest first."""
    paths = {name: release.directory / name for name in release.files}
    names = sorted(paths, key=lambda name: paths[name].stat().st_size)
    for manifest in versions.manifests():
        theirs = versions.path(manifest.version)
        if manifest.lineage == release.lineage and manifest.files.keys() == paths.keys() and all(
            (theirs / name).is_file() and (theirs / name).stat().st_size == paths[name].stat().st_size for name in names
        ) and all(sha256_of(paths[name]) == manifest.files[name] for name in names):
            return manifest
    return None


def _resume(versions: VersionStore, twin: Manifest) -> Manifest:
    """Finish a publish that crashed between rename and pointer; anything else is a second publish of the same."""
    current = versions.current()
    if twin.version != versions.numbers()[-1] or (current is not None and current >= twin.version):
        raise VersionConflict(
            "this release", expected="one that is not published yet", got=f"the files of version {twin.version}",
            remedy=f"`facet versions show {twin.version}` tells about it; train or quantize anew for another version.",
        )
    _prove(versions, twin)
    logger.info("version %d was complete; only the pointer had to move", twin.version)
    versions.point_to(twin.version, only_forward=True)
    return twin
