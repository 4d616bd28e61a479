import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from pipelines.cli import facet
from pipelines.contracts.durable import creating_directory
from pipelines.contracts.errors import (
    FacetError,
    IntegrityError,
    InvalidConfig,
    InvalidTable,
    NotPrepared,
    StalePretraining,
    VersionConflict,
    VersionNotFound,
)
from pipelines.contracts.rowcodec import CODEC_NAMES
from pipelines.contracts.version import VersionStore
from pipelines.contracts.workspace import Workspace
from pipelines.publish import point, publish
from tests.crash import kill_during, publish_release
from tests.lineages import invented_ranker
from tests.planted_models import DAMAGES, plant
from tests.releases import AS_OF, DIMS, TASKS, WINDOWS, retell_windows, write_release, write_table


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("release") / "int4", seed=1)


@pytest.fixture
def release(pristine: Path, tmp_path: Path) -> Path:
    """A release that a test may break."""
    return Path(shutil.copytree(pristine, tmp_path / "release"))


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "var")


def other_release(release: Path, seed: int) -> Path:
    """Another release of the same tables: only the upper model differs."""
    other = Path(shutil.copytree(release, release.with_name(f"release-{seed}")))
    weights = load_file(other / "upper/model.safetensors")
    save_file({name: tensor + np.float32(seed) for name, tensor in weights.items()}, other / "upper/model.safetensors")
    return other


def whole(versions: VersionStore) -> list[int]:
    """Numbers of the published versions, each verified."""
    for number in versions.numbers():
        versions.manifest(number).verify(versions.path(number))
    return versions.numbers()


def test_a_version_is_the_releases_files_under_a_sealed_manifest(workspace: Workspace, release: Path) -> None:
    manifest = publish(workspace, release)
    directory = workspace.versions.path(1)
    assert workspace.versions.current() == 1 and workspace.versions.manifest(1) == manifest
    files = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    assert files == {*manifest.files, "manifest.json", "manifest.sha256"}
    assert all((directory / name).read_bytes() == (release / name).read_bytes() for name in manifest.files)
    assert manifest.lineage == invented_ranker(dataset="synthetic", windows=WINDOWS, tasks=TASKS, seed=1)
    assert manifest.as_of == AS_OF and {spec.name: spec.dim for spec in manifest.tables} == DIMS


def test_numbers_go_up_and_are_never_used_twice(workspace: Workspace, release: Path) -> None:
    publish(workspace, release)
    publish(workspace, other_release(release, 1), parents=(1,))
    workspace.versions.point_to(1)
    workspace.versions.retire(2)
    manifest = publish(workspace, other_release(release, 2), parents=(1,))
    assert (manifest.version, manifest.parents, workspace.versions.numbers()) == (3, (1,), [1, 3])
    workspace.versions.point_to(1)
    workspace.versions.retire(3)
    assert workspace.versions.next_number() == 4


def test_the_same_release_twice_is_refused(workspace: Workspace, release: Path) -> None:
    publish(workspace, release)
    with pytest.raises(VersionConflict, match="the files of version 1"):
        publish(workspace, release)
    assert whole(workspace.versions) == [1]


def test_the_same_files_from_another_ranker_are_another_version(workspace: Workspace, release: Path) -> None:
    first = publish(workspace, release)
    other = invented_ranker(dataset="synthetic", windows=WINDOWS, tasks=TASKS, seed=7)
    edit_release(lambda content: content.update(lineage=other.to_dict()))(release)
    second = publish(workspace, release)
    assert (second.version, second.files, second.lineage) == (2, first.files, other) and first.lineage != other
    with pytest.raises(VersionConflict, match="the files of version 2"):
        publish(workspace, release)


def test_what_happens_to_the_release_later_does_not_happen_to_the_version(
    workspace: Workspace, release: Path
) -> None:
    manifest = publish(workspace, release)
    for name in manifest.files:
        with (release / name).open("r+b") as file:
            file.write(b"gone")
    manifest.verify(workspace.versions.path(1))


def test_a_copy_that_is_not_what_was_read_is_refused(
    workspace: Workspace, release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def alter(versions: VersionStore, parents: tuple[int, ...], hashes: dict[str, str], staging: Path) -> None:
        with (staging / "upper/config.json").open("a") as file:
            file.write(" ")  # the release's check finds nothing wrong with it

    monkeypatch.setattr("pipelines.publish._share_with", alter)
    with pytest.raises(IntegrityError, match=r"upper/config\.json"):
        publish(workspace, release)
    assert workspace.versions.current() is None and not any(workspace.versions.root.glob("*"))


def test_files_that_a_parent_has_too_lie_on_the_disk_once(workspace: Workspace, release: Path) -> None:
    publish(workspace, release)
    second, third = other_release(release, 1), other_release(release, 2)
    manifest = publish(workspace, second, parents=(1,))
    first, child = workspace.versions.path(1), workspace.versions.path(2)
    shared = {name for name in manifest.files if (child / name).samefile(first / name)}
    assert shared == set(manifest.files) - {"upper/model.safetensors"}
    assert {path.name for path in child.iterdir()} == {path.name for path in first.iterdir()}
    with (first / "tables/item.kge.parquet").open("ab") as file:
        file.write(b"x")
    publish(workspace, third, parents=(1,))  # not from a corrupted parent, nor from one that is none
    table = workspace.versions.path(3) / "tables/item.kge.parquet"
    workspace.versions.manifest(3).verify(workspace.versions.path(3))
    assert table.stat().st_nlink == 1
    assert (workspace.versions.path(3) / "tables/user.kge.parquet").samefile(first / "tables/user.kge.parquet")


@pytest.mark.parametrize("quantization", CODEC_NAMES)
def test_a_table_without_rows_and_every_quantization_can_be_published(
    workspace: Workspace, tmp_path: Path, quantization: str
) -> None:
    release = write_release(tmp_path / quantization, seed=3, quantization=quantization)
    rewrite("item.kge", lambda table: table.slice(0, 0))(release)
    content = json.loads((release / "release.json").read_text())
    next(table for table in content["tables"] if table["name"] == "item.kge")["rows"] = 0
    (release / "release.json").write_text(json.dumps(content))
    assert publish(workspace, release).table("item.kge").rows == 0 and whole(workspace.versions) == [1]


def test_an_unknown_parent_is_refused(workspace: Workspace, release: Path) -> None:
    with pytest.raises(VersionNotFound, match="version 5"):
        publish(workspace, release, parents=(5,))
    assert workspace.versions.numbers() == []


def rewrite(table: str, change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    def apply(release: Path) -> None:
        path = release / "tables" / f"{table}.parquet"
        pq.write_table(change(pq.read_table(path)), path)

    return apply


def edit_release(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(release: Path) -> None:
        content = json.loads((release / "release.json").read_text())
        change(content)
        (release / "release.json").write_text(json.dumps(content))

    return apply


def with_column(name: str, values: pa.Array) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.schema.get_field_index(name), name, values)


def scale_of_row_17(value: float) -> Callable[[Path], None]:
    def apply(release: Path) -> None:
        table = pq.read_table(release / "tables/item.kge.parquet")
        rows = np.array([np.frombuffer(row, np.uint8) for row in table["row"].to_pylist()])
        rows[17, -4:-2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
        write_table(release / "tables/item.kge.parquet", table["id"].to_numpy(), rows, AS_OF)

    return apply


def with_buckets(release: Path) -> None:
    """Says that the table has hash buckets, which have no rows."""
    edit_release(lambda r: r["tables"][0].update(id_rule="vocabulary+buckets", buckets=2))(release)


def nan_weight(release: Path) -> None:
    weights = load_file(release / "upper/model.safetensors")
    weights["heads.bias"] = np.full_like(weights["heads.bias"], np.inf)
    save_file(weights, release / "upper/model.safetensors")


def other_dims(release: Path) -> None:
    config = json.loads((release / "upper/config.json").read_text())
    config["tables"]["item.kge"] = 99
    (release / "upper/config.json").write_text(json.dumps(config))


BROKEN = {
    "unsorted ids": (rewrite("item.kge", lambda t: t.take(pa.array(np.arange(200)[::-1]))), "increasing ids"),
    "repeated ids": (rewrite("item.kge", lambda t: t.take(pa.array([0, *range(199)]))), "increasing ids"),
    "a row too few": (rewrite("item.kge", lambda t: t.slice(1)), r"200 rows, got 199"),
    "null ids": (rewrite("item.kge", with_column("id", pa.nulls(200, pa.int64()))), "no nulls"),
    "text ids": (rewrite("item.kge", with_column("id", pa.array(map(str, range(200))))), "id.*string"),
    "wide rows": (rewrite("item.kge", with_column("row", pa.array([b"x" * 11] * 200, pa.binary(11)))), r"binary\[11\]"),
    "another time": (
        rewrite("item.kge", with_column("event_timestamp", pa.array([0] * 200, pa.timestamp("us", "UTC")))),
        "event_timestamp 2011-07-01",
    ),
    "no such column": (rewrite("item.kge", lambda t: t.drop_columns(["row"])), "row.*None"),
    "null rows": (rewrite("item.kge", with_column("row", pa.nulls(200, pa.binary(10)))), "no nulls"),
    "a row too many": (rewrite("item.kge", lambda t: pa.concat_tables([t, t.slice(199)])), r"200 rows, got at least"),
    "one row of another time": (
        rewrite(
            "item.kge",
            with_column("event_timestamp", pa.array([AS_OF] * 199 + [AS_OF.replace(day=2)], pa.timestamp("us", "UTC"))),
        ),
        "event_timestamp 2011-07-01.*2011-07-02",
    ),
    "buckets without rows": (with_buckets, "bucket ids -2 to -1"),
    "NaN in a row": (scale_of_row_17(np.nan), r"item.kge.*NaN or infinity in the row of id \d+"),
    "infinity in a row": (scale_of_row_17(-np.inf), r"item.kge.*NaN or infinity in the row of id \d+"),
    "infinity in the default row": (
        edit_release(lambda r: r["tables"][0].update(default_row=r["tables"][0]["default_row"][:-4] + "007c")),
        "NaN or infinity in its default row",
    ),
    "no columns": (edit_release(lambda r: r["tables"][0].update(dim=0, default_row="00" * 4)), "columns, got 0"),
    "cut Parquet": (lambda c: os.truncate(c / "tables/item.kge.parquet", 500), "a Parquet file"),
    "no table file": (lambda c: (c / "tables/item.kge.parquet").unlink(), "no file"),
    "not Parquet": (lambda c: (c / "tables/item.kge.parquet").write_text("hello"), "a Parquet file"),
    "infinite weight": (nan_weight, "heads.bias"),
    "other dimensions": (other_dims, "99"),
    "no weights": (lambda c: (c / "upper/model.safetensors").unlink(), "upper/model.safetensors"),
    "cut weights": (lambda c: os.truncate(c / "upper/model.safetensors", 100), "upper model"),
    "no tables": (edit_release(lambda r: r.update(tables=[])), "distinct tables"),
    "a table twice": (edit_release(lambda r: r["tables"].append(r["tables"][0])), "distinct tables"),
    "no metrics": (edit_release(lambda r: r.pop("metrics")), "metrics"),
    "local time": (edit_release(lambda r: r.update(as_of="2011-07-01T00:00:00")), "no time zone"),
    "short default row": (edit_release(lambda r: r["tables"][0].update(default_row="00")), "8 bytes, .*got 2 char"),
    "no lineage": (edit_release(lambda r: r.pop("lineage")), "expected .*lineage, got KeyError"),
    "a lineage of nothing": (edit_release(lambda r: r.update(lineage={"artefacts": []})), "the lineage of .*release"),
    "windows that its ranker never saw": (
        edit_release(lambda r: r["windows"].update(test=["2011-09-05", "2011-11-01"])),
        r"what its ranker was trained with, got setting windows.test: .*2011-10-10.*now .*2011-11-01",
    ),
    "another data set": (edit_release(lambda r: r.update(dataset="x")), 'setting dataset: "synthetic", now "x"'),
    "leaking windows": (edit_release(lambda r: r["windows"].update(test=["2011-01-01", "2011-02-01"])), "leaks"),
    "not JSON": (lambda c: (c / "release.json").write_text("{"), "cannot be understood"),
}


WRONG_IN_ITSELF = {"no columns", "short default row", "leaking windows", "a lineage of nothing"}
"""What a spec, the windows or the lineage refuse before any file is looked at."""


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_release_is_refused_and_nothing_is_written(
    workspace: Workspace, release: Path, broken: str
) -> None:
    damage, message = BROKEN[broken]
    damage(release)
    with pytest.raises(InvalidConfig if broken in WRONG_IN_ITSELF else InvalidTable, match=message):
        publish(workspace, release)
    assert workspace.versions.current() is None and not any(workspace.versions.root.glob("*"))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_model_that_no_ranker_could_run_is_neither_published_nor_pointed_at(
    workspace: Workspace, release: Path, damage: str
) -> None:
    first = publish(workspace, release)
    second = other_release(release, 1)
    apply, message = DAMAGES[damage]
    apply(second / "upper")
    with pytest.raises(InvalidTable, match=message):
        publish(workspace, second)
    assert workspace.versions.current() == first.version and workspace.versions.numbers() == [1]


def test_an_unfit_version_of_old_is_not_pointed_at(workspace: Workspace, release: Path) -> None:
    publish(workspace, release)
    publish(workspace, other_release(release, 1))
    apply, message = DAMAGES["an unknown transform"]
    plant(workspace, 1, apply)
    with pytest.raises(IntegrityError, match=message):
        point(workspace, 1)
    assert workspace.versions.current() == 2


def test_a_crash_before_the_pointer_is_not_finished_once_the_model_was_damaged(
    workspace: Workspace, release: Path
) -> None:
    publish(workspace, release)
    second = other_release(release, 1)
    publish(workspace, second)
    point(workspace, 1)  # as if the process had died between the rename and the pointer
    weights = workspace.versions.path(2) / "upper/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(IntegrityError, match=r"model\.safetensors is corrupted"):
        publish(workspace, second)
    assert workspace.versions.current() == 1


def test_no_release_names_the_stage_that_makes_it(workspace: Workspace, tmp_path: Path) -> None:
    with pytest.raises(NotPrepared, match="facet quantize"):
        publish(workspace, tmp_path / "nowhere")


def test_a_workspace_that_cannot_be_written(tmp_path: Path, release: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(InvalidConfig, match="cannot write to"):
        publish(Workspace(tmp_path / "file"), release)


def test_two_writers_of_one_number(workspace: Workspace) -> None:
    versions = workspace.versions
    with pytest.raises(VersionConflict, match="version 7"), versions.creating(7) as mine:
        (mine / "manifest.json").write_text("{}")
        with versions.creating(7) as theirs:
            (theirs / "manifest.json").write_text("{}")
    assert [path.name for path in versions.root.iterdir()] == ["7"]


def test_what_a_crash_left_is_swept_and_what_a_living_writer_fills_is_not(
    workspace: Workspace, release: Path
) -> None:
    root = workspace.versions.root
    (root / ".staging-dead-9" / "tables").mkdir(parents=True)
    (root / ".staging-dead-CURRENT").touch()
    os.utime(root / ".staging-dead-CURRENT", (time.time() - 7200,) * 2)
    with creating_directory(root / "8") as living:
        publish(workspace, release)
        assert living.is_dir() and [p.name for p in root.glob(".staging*")] == [living.name]


def test_a_crash_before_the_pointer_is_finished_by_publishing_again(workspace: Workspace, release: Path) -> None:
    publish(workspace, release)
    second = other_release(release, 1)
    sha = publish(workspace, second).sha256
    workspace.versions.point_to(1)  # as if the process had died between the rename and the pointer
    assert publish(workspace, second).sha256 == sha
    assert (workspace.versions.current(), whole(workspace.versions)) == (2, [1, 2])


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("large") / "int4", seed=2, rows=150_000)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_publishing_killed_at_any_instant(workspace: Workspace, release: Path, large: Path, seed: int) -> None:
    first, second = publish(workspace, release), large
    pointer = workspace.versions.root / "CURRENT"
    before = pointer.read_bytes()
    killed = kill_during(publish_release, workspace.root, second, between_s=(0.0, 0.25), seed=seed)
    renamed, pointed = workspace.versions.path(2).exists(), pointer.read_bytes() != before
    assert workspace.versions.manifest(1) == first and whole(workspace.versions) == ([1, 2] if renamed else [1])
    assert workspace.versions.current() == (2 if pointed else 1)
    assert renamed >= pointed >= (not killed), "one after the other, and all of it unless it was killed"
    if not pointed:
        publish(workspace, second)
    assert (workspace.versions.current(), whole(workspace.versions)) == (2, [1, 2])
    assert not list(workspace.versions.root.glob(".staging-*-2"))


class TestCommands:
    def run(self, workspace: Workspace, *args: str) -> str:
        result = CliRunner().invoke(facet, ["--workspace", str(workspace.root), *args], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    def test_publish_versions_and_show(self, workspace: Workspace, pristine: Path) -> None:
        shutil.copytree(pristine, workspace.run("v1").ranker("both", 0) / "int4")
        assert "No version is published" in self.run(workspace, "versions")
        assert "published version 1" in self.run(workspace, "publish", "--run", "v1")
        listed = self.run(workspace, "versions")
        assert "1*" in listed and "0/4" in listed and "synthetic" in listed
        shown = self.run(workspace, "versions", "show", "1")
        assert workspace.versions.manifest(1).sha256 in shown
        for expected in ("2010-12-01 to 2011-04-01", "item_kge__v1", "auc.purchase", "0.5000", "no table yet"):
            assert expected in shown

    def test_the_staleness_gate(
        self, workspace: Workspace, pristine: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        release = workspace.run("v1").ranker("both", 0) / "int4"
        shutil.copytree(pristine, release)
        retell_windows(release, pretrain=["2010-09-01", "2010-12-01"])
        publish = ("publish", "--run", "v1")  # 121 days between the windows
        with pytest.raises(StalePretraining, match="at most 120 days, got 121"):
            self.run(workspace, *publish, "--pretraining-refuse-days", "120")
        monkeypatch.setenv("FACET_PRETRAINING_REFUSE_DAYS", "100")
        with pytest.raises(StalePretraining, match=r"at most 100 days, got 121.*arXiv 2508.05700.*3 months.*6 months"):
            self.run(workspace, *publish)
        with pytest.raises(InvalidConfig, match="130 and 100"):
            self.run(workspace, *publish, "--pretraining-warn-days", "130")
        assert not workspace.versions.root.exists()
        self.run(workspace, *publish, "--force-stale")
        assert "121 days before fine-tuning starts" in caplog.text and workspace.versions.numbers() == [1]
        assert "121 d" in self.run(workspace, "versions")

    def test_an_unknown_version(self, workspace: Workspace) -> None:
        with pytest.raises(FacetError, match="version 3"):
            self.run(workspace, "versions", "show", "3")
