"""One feature view per table per published version, generated from the manifests in `../var/versions`.

`feast apply` after `facet publish` adds the new version's views. A version that was retired loses them, and its
segments. A manifest that is lost, or whose seal is broken, raises `IntegrityError`: nothing is applied.
"""

from datetime import timedelta

from entities import item, user
from feast import FeatureView, Field, FileSource
from feast.data_format import ParquetFormat
from feast.types import Bytes, Int64
from sources import WORKSPACE

from pipelines.contracts.embedding_view import EmbeddingView
from pipelines.contracts.manifest import Manifest
from pipelines.contracts.spec import TableSpec

__all__ = ["views_by_version"]

ENTITIES = {"user": user, "item": item}


def _view(manifest: Manifest, spec: TableSpec) -> FeatureView:
    name = spec.view_name(manifest.version)
    source = FileSource(
        name=f"{name}_source",
        path=str(WORKSPACE.versions.path(manifest.version) / manifest.table_path(spec.name)),
        file_format=ParquetFormat(),
        timestamp_field="event_timestamp",
        field_mapping={"id": spec.entity},
    )
    return FeatureView(
        name=name,
        entities=[ENTITIES[spec.entity]],
        ttl=timedelta(0),
        schema=[Field(name=spec.entity, dtype=Int64), Field(name=EmbeddingView.FEATURE, dtype=Bytes)],
        source=source,
        online=True,
        tags=EmbeddingView.of(manifest, spec).tags(manifest),
        description=f"{spec.name} of version {manifest.version}: {spec.rows} rows of {spec.dim} columns",
    )


views_by_version = {
    manifest.version: [_view(manifest, spec) for spec in manifest.tables] for manifest in WORKSPACE.versions.manifests()
}

# Feast collects module attributes.
globals().update({view.name: view for views in views_by_version.values() for view in views})
