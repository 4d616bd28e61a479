import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.contracts.durable import remove_directory, sha256_of
from pipelines.contracts.errors import FacetError, IntegrityError, InvalidTable, VersionNotFound
from pipelines.contracts.rowcodec import codec
from pipelines.contracts.segment import Segment
from pipelines.contracts.segment_delta import DeltaSegment, open_segment
from pipelines.contracts.segment_delta_writer import write_copy, write_delta
from pipelines.contracts.segment_header import DELTA_NAME
from pipelines.contracts.segment_writer import write_segment
from pipelines.contracts.spec import TableSpec
from tests.cases import RowReaderCases, rows_or_none
from tests.pipelines.contracts.test_segment import reseal
from tests.releases import FeastRepository, published_rows

DIM = 12
WIDTH = codec("int4").row_bytes(DIM)
SPEC = TableSpec("item.kge", DIM, 0, "int4", "vocabulary", "cd" * WIDTH)
Rows = dict[int, bytes]


class Batches:
    """A table's record batches, as often as they are asked for."""

    def __init__(self, rows: Rows, *, width: int = WIDTH, size: int = 7_000) -> None:
        self.ids, self.width, self.size = np.array(sorted(rows), np.int64), width, size
        self.packed = np.frombuffer(b"".join(rows[key] for key in sorted(rows)), np.uint8).reshape(-1, width)

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        kind = pa.binary(self.width)
        for start in range(0, len(self.ids), self.size):
            part = self.packed[start : start + self.size]
            column = pa.FixedSizeBinaryArray.from_buffers(kind, len(part), [None, pa.py_buffer(part.tobytes())])
            yield pa.record_batch({"id": pa.array(self.ids[start : start + self.size]), "row": column})
            yield pa.record_batch({"id": pa.array([], pa.int64()), "row": pa.array([], kind)})


def full(directory: Path, rows: Rows, *, spec: TableSpec = SPEC, size: int = 7_000, **options: int) -> Segment:
    spec = replace(spec, rows=len(rows))
    batches = Batches(rows, width=spec.row_bytes, size=size)
    write_segment(directory, spec=spec, version=1, manifest_sha256="aa", batches=batches, **options)
    return Segment.open(directory)


def newer(
    directory: Path, rows: Rows, parent: Path, *, spec: TableSpec = SPEC, most_changed: float = 1.0, size: int = 7_000
) -> DeltaSegment:
    spec = replace(spec, rows=len(rows))
    assert write_delta(
        directory, spec=spec, version=2, manifest_sha256="bb", batches=Batches(rows, width=spec.row_bytes, size=size),
        parent=parent, most_changed=most_changed,
    )
    segment = open_segment(directory)
    assert isinstance(segment, DeltaSegment)
    assert (segment.spec, segment.version, segment.manifest_sha256) == (spec, 2, "bb")
    return segment


def refused(directory: Path, rows: Rows, parent: Path, *, spec: TableSpec = SPEC, **options: float) -> bool:
    """Whether no delta is written, and nothing left of it."""
    spec = replace(spec, rows=len(rows))
    written = write_delta(
        directory, spec=spec, version=2, manifest_sha256="bb", batches=Batches(rows, width=spec.row_bytes),
        parent=parent, **options,
    )
    assert not list(directory.parent.glob(".staging*")) and directory.exists() == written
    return not written


def random_rows(ids: np.ndarray, seed: int, width: int = WIDTH) -> Rows:
    packed = np.random.default_rng(seed).integers(0, 256, (len(ids), width), np.uint8)
    return {int(key): row.tobytes() for key, row in zip(ids, packed, strict=True)}


def random_ids(count: int, seed: int, low: int = -(2**63)) -> np.ndarray:
    ids = np.random.default_rng(seed).integers(low, 2**63 - 1, count)
    assert len(np.unique(ids)) == count
    return ids


def require_same(segment: DeltaSegment, rows: Rows) -> None:
    ids = np.random.default_rng(5).permutation(np.array(list(rows), np.int64))
    answer, found = segment.lookup(ids)
    assert found.all() and [row.tobytes() for row in answer] == [rows[key] for key in ids.tolist()]


class TestDelta(RowReaderCases):
    """Every table of both versions as a delta of one that differs from it by changed, added and vanished rows."""

    errors = (VersionNotFound,)

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        self.folder = tmp_path_factory.mktemp("deltas")

    def prepare(self, repository: FeastRepository) -> None:
        self.readers: dict[tuple[int, str], DeltaSegment] = {}

    def read(self, version: int, table: str, ids: list[int]) -> list[bytes | None]:
        if (version, table) not in self.readers:
            spec = self.repository.workspace.versions.manifest(version).table(table)
            packed = published_rows(self.repository.workspace, version, table)
            rows = {int(key): row.tobytes() for key, row in zip(*packed, strict=True)}
            before = rows | random_rows(packed[0][::20], seed=1, width=spec.row_bytes)
            before |= random_rows(np.array([3, 5, 2**62 + 1]), seed=2, width=spec.row_bytes)
            for key in packed[0][1::30].tolist():
                del before[key]
            parent, directory = self.folder / f"{version}-{table}", self.folder / f"{version}-{table}-newer"
            full(parent, before, spec=spec)
            self.readers[version, table] = newer(directory, rows, parent, spec=spec, most_changed=0.1)
        return rows_or_none(*self.readers[version, table].lookup(np.array(ids, np.int64)))


IDS = st.integers(-(2**63), 2**63 - 1)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(IDS, st.integers(0, 3), min_size=1, max_size=60), st.data(), st.sampled_from([1, 7, DIM]),
    st.booleans(), st.integers(1, 30),
)
def test_a_delta_of_a_delta_is_a_dictionary(
    tmp_path_factory: pytest.TempPathFactory, first: dict[int, int], data: st.DataObject, dim: int, exact: bool,
    size: int,
) -> None:
    """Rows of few values, so that strangers and changes often meet bytes that were there before."""
    folder, width = tmp_path_factory.mktemp("s"), codec("int4").row_bytes(dim)
    spec = replace(SPEC, dim=dim, default_row="cd" * width)
    packed = lambda values: {key: bytes([value]) * width for key, value in values.items()}  # noqa: E731
    full(folder / "0", packed(first), spec=spec, size=size, exact_rows=60 if exact else 0)
    values, known = first, set(first)
    for version in (1, 2):
        gone = data.draw(st.sets(st.sampled_from(sorted(values))))
        others = data.draw(st.dictionaries(st.one_of(st.sampled_from(sorted(known)), IDS), st.integers(0, 3)))
        values = {key: value for key, value in values.items() if key not in gone} | others
        known |= set(values)
        if not values:
            return
        if refused(
            folder / str(version), packed(values), folder / str(version - 1), spec=spec, most_changed=100.0
        ):
            pytest.fail("it is never too little that they share")
        segment = open_segment(folder / str(version))
        asked = data.draw(st.lists(st.one_of(st.sampled_from(sorted(known)), IDS), max_size=40))
        expected = [packed(values).get(key, bytes.fromhex(spec.default_row)) for key in asked]
        rows, found = segment.lookup(np.array(asked, np.int64))
        assert [row.tobytes() for row in rows] == expected
        assert found.tolist() == [key in values for key in asked]
        require_same(segment, packed(values))


@pytest.mark.parametrize("exact_rows", [0, 100_000], ids=["16 bits", "64 bits"])
def test_changed_added_and_vanished_rows_of_a_large_table(tmp_path: Path, exact_rows: int) -> None:
    ids = random_ids(90_000, seed=1)
    before = random_rows(ids, seed=2)
    full(tmp_path / "1", before, exact_rows=exact_rows)
    rows = before | random_rows(ids[:4_000], seed=3) | random_rows(random_ids(2_000, seed=4), seed=5)
    gone = ids[5_000:7_000]
    for key in gone.tolist():
        del rows[key]
    segment = newer(tmp_path / "2", rows, tmp_path / "1", most_changed=0.1)
    assert segment.shared_rows == 84_000
    require_same(segment, rows)
    answer, found = segment.lookup(gone)
    assert not found.any() and (answer == 0xCD).all()
    own = [path for path in (tmp_path / "2").rglob("*") if path.is_file() and path.stat().st_nlink == 1]
    assert sum(path.stat().st_size for path in own) < 0.2 * sum(
        path.stat().st_size for path in (tmp_path / "1").iterdir()
    )


def test_added_ids_that_pass_for_old_ones_take_nobodys_row(tmp_path: Path) -> None:
    ids = random_ids(60_000, seed=1)
    before = random_rows(ids, seed=2)
    base = full(tmp_path / "1", before, exact_rows=0)
    strangers = random_ids(2**22, seed=3)
    passing = strangers[base.positions(strangers) >= 0]
    assert len(passing) > 30
    same_bytes, others = passing[::2], passing[1::2]
    rows = before | random_rows(others, seed=4)
    rows |= {int(key): base.rows[base.positions(np.array([key]))[0]].tobytes() for key in same_bytes}
    segment = newer(tmp_path / "2", rows, tmp_path / "1", most_changed=0.1)
    require_same(segment, rows)
    # those whose place somebody took by other bytes lie in the overlay, all others are shared
    assert segment.overlay.spec.rows == 2 * len(others)

    owners = np.array(list(before))[np.isin(base.positions(np.array(list(before))), base.positions(passing))]
    changed = rows | random_rows(owners[::2], seed=5)
    for key in owners[1::2].tolist():
        del changed[key]
    require_same(newer(tmp_path / "3", changed, tmp_path / "2", most_changed=0.1), changed)


def test_strangers_pass_at_the_stated_rate(tmp_path: Path) -> None:
    ids = random_ids(100_000, seed=1)
    rows = random_rows(ids, seed=2)
    full(tmp_path / "1", rows, exact_rows=0)
    segment = newer(tmp_path / "2", rows | random_rows(ids[:10_000], seed=3), tmp_path / "1", most_changed=0.1)
    passed = int(segment.lookup(random_ids(2**22, seed=9))[1].sum())
    assert 26 <= passed <= 98  # 57.6 are expected: 2**-16 of those that meet one of the 90,000 shared rows


def test_a_delta_never_lies_upon_a_delta(tmp_path: Path) -> None:
    ids = random_ids(5_000, seed=1)
    rows = random_rows(ids, seed=2)
    full(tmp_path / "1", rows)
    for version in range(2, 6):
        rows = rows | random_rows(ids[100 * version : 100 * version + 100], seed=version)
        segment = newer(tmp_path / str(version), rows, tmp_path / str(version - 1), most_changed=0.1)
        require_same(segment, rows)
        assert segment.shared_rows == 5_000 - 100 * (version - 1) and type(segment.base) is Segment
        assert (tmp_path / str(version) / "base" / "rows.npy").samefile(tmp_path / "1" / "rows.npy")
    rows = rows | random_rows(ids[:200], seed=9)
    assert refused(tmp_path / "6", rows, tmp_path / "5", most_changed=0.1)
    for version in range(1, 5):
        remove_directory(tmp_path / str(version), within=tmp_path)
    assert open_segment(tmp_path / "5").lookup(ids)[1].all()


@pytest.mark.parametrize("buckets_change", [False, True])
def test_buckets_of_the_newer_version(tmp_path: Path, buckets_change: bool) -> None:
    spec = replace(SPEC, id_rule="vocabulary+buckets", buckets=50, hash_seed=3, rows=50)
    buckets, ids = spec.rule.all_bucket_ids(), random_ids(3_000, seed=1, low=0)
    before = random_rows(np.concatenate([buckets, ids]), seed=2)
    full(tmp_path / "1", before, spec=spec, exact_rows=0)
    added = random_ids(40, seed=7, low=0)
    rows = before | random_rows(np.concatenate([ids[:30], added]), seed=3)
    if buckets_change:
        rows |= random_rows(buckets, seed=4)
    for key in ids[100:130].tolist():
        del rows[key]
    segment = newer(tmp_path / "2", rows, tmp_path / "1", spec=spec, most_changed=0.1)
    asked = np.concatenate([buckets, ids, added, random_ids(2_000, seed=8)])
    vocabulary = np.array(sorted(key for key in rows if key >= 0))
    answer, found = segment.lookup(asked)
    assert found.all()
    stored = spec.rule.stored_ids(asked, vocabulary=vocabulary).tolist()
    assert [row.tobytes() for row in answer] == [rows[key] for key in stored]


@pytest.mark.parametrize("same_bytes", [False, True])
def test_buckets_ids_that_pass_for_others_read_their_buckets(tmp_path: Path, same_bytes: bool) -> None:
    """About six of 400,000 do, in a base of 16-bit fingerprints."""
    spec = replace(SPEC, id_rule="vocabulary+buckets", buckets=400_000, rows=400_000)
    buckets, ids = spec.rule.all_bucket_ids(), random_ids(1_000, seed=1, low=0)
    before = random_rows(np.concatenate([buckets, ids]), seed=2)
    if same_bytes:
        before = dict.fromkeys(before, bytes(WIDTH))
    full(tmp_path / "1", before, spec=spec, exact_rows=0)
    rows = before | random_rows(ids[:10], seed=3)
    require_same(newer(tmp_path / "2", rows, tmp_path / "1", spec=spec), rows)


@pytest.mark.parametrize(
    "other",
    [
        {"name": "item.contrastive"}, {"quantization": "int8", "dim": WIDTH - 8}, {"hash_seed": 1},
        {"id_rule": "hash", "buckets": 100}, {"dim": 14, "default_row": "cd" * 11},
    ],
    ids=str,
)
def test_a_table_of_another_kind_shares_nothing(tmp_path: Path, other: dict) -> None:
    spec = replace(SPEC, rows=100, **other)
    full(tmp_path / "1", random_rows(np.arange(-100, 0), seed=1))
    rows = random_rows(np.arange(-100, 0), seed=1, width=spec.row_bytes)
    assert refused(tmp_path / "2", rows, tmp_path / "1", spec=spec, most_changed=1.0)
    assert not write_copy(
        tmp_path / "2", spec=spec, version=2, manifest_sha256="bb", parent=tmp_path / "1", parent_manifest_sha256="aa"
    )


def test_what_shares_too_little_is_not_written(tmp_path: Path) -> None:
    ids = random_ids(1_000, seed=1)
    rows = random_rows(ids, seed=2)
    full(tmp_path / "1", rows)
    some, fewer = rows | random_rows(ids[:101], seed=3), {key: rows[key] for key in ids[:900].tolist()}
    assert refused(tmp_path / "2", some, tmp_path / "1", most_changed=0.1)
    assert refused(tmp_path / "2", fewer, tmp_path / "1", most_changed=0.1)  # 100 dead rows for 900 living
    assert refused(tmp_path / "2", random_rows(ids, seed=3), tmp_path / "1")
    assert not refused(tmp_path / "2", rows | random_rows(ids[:100], seed=3), tmp_path / "1", most_changed=0.1)


def test_a_new_default_row_is_no_difference(tmp_path: Path) -> None:
    rows = random_rows(random_ids(100, seed=1), seed=2)
    full(tmp_path / "1", rows)
    segment = newer(tmp_path / "2", rows, tmp_path / "1", spec=replace(SPEC, default_row="ef" * WIDTH))
    answer, found = segment.lookup(np.array([17]))
    assert segment.shared_rows == 100 and not found.any() and (answer == 0xEF).all()
    require_same(segment, rows)


@pytest.mark.parametrize("levels", [1, 2], ids=["of a segment", "of a delta"])
def test_a_copy_has_links_and_a_header_of_its_own(tmp_path: Path, levels: int) -> None:
    ids = random_ids(300, seed=1)
    rows = random_rows(ids, seed=2)
    full(tmp_path / "1", rows)
    if levels == 2:
        rows = rows | random_rows(ids[:10], seed=3)
        newer(tmp_path / "2", rows, tmp_path / "1")
    parent, identity = tmp_path / str(levels), {"version": 7, "manifest_sha256": "cc"}
    before = {path: path.read_bytes() for path in parent.rglob("*") if path.is_file()}
    spec = replace(SPEC, rows=300, default_row="ef" * WIDTH)
    sha = open_segment(parent).manifest_sha256
    assert write_copy(tmp_path / "c", spec=spec, **identity, parent=parent, parent_manifest_sha256=sha)
    assert before == {path: path.read_bytes() for path in parent.rglob("*") if path.is_file()}
    copy = open_segment(tmp_path / "c")
    assert (copy.version, copy.manifest_sha256, copy.spec) == (7, "cc", spec)
    own = [path.name for path in (tmp_path / "c").rglob("*") if path.is_file() and path.stat().st_nlink == 1]
    assert sorted(own) == (["segment.json", "segment.sha256"] if levels == 1 else ["delta.json", "delta.sha256"])
    require_same(copy, rows)
    assert not write_copy(tmp_path / "d", spec=spec, **identity, parent=parent, parent_manifest_sha256="dd")
    other = replace(spec, rows=301)
    assert not write_copy(tmp_path / "d", spec=other, **identity, parent=parent, parent_manifest_sha256=sha)
    assert not write_copy(tmp_path / "d", spec=spec, **identity, parent=tmp_path / "?", parent_manifest_sha256=sha)
    assert not (tmp_path / "d").exists() and not list(tmp_path.glob(".staging*"))


@pytest.mark.parametrize("batch_ids", [[1, 1], [2, 1]])
def test_a_bad_table_is_refused_and_leaves_nothing(tmp_path: Path, batch_ids: list[int]) -> None:
    full(tmp_path / "1", random_rows(np.array([1, 2]), seed=1))
    batch = pa.record_batch({"id": pa.array(batch_ids), "row": pa.array([bytes(WIDTH)] * 2, pa.binary(WIDTH))})
    with pytest.raises(InvalidTable, match="strictly increasing"):
        write_delta(
            tmp_path / "2", spec=replace(SPEC, rows=2), version=2, manifest_sha256="bb", batches=[batch],
            parent=tmp_path / "1", most_changed=1.0,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_a_segment_is_never_written_over(tmp_path: Path) -> None:
    rows = random_rows(np.arange(50), seed=1)
    full(tmp_path / "1", rows)
    newer(tmp_path / "2", rows, tmp_path / "1")
    with pytest.raises(OSError):
        newer(tmp_path / "2", rows, tmp_path / "1")
    with pytest.raises(OSError):
        write_copy(
            tmp_path / "2", spec=replace(SPEC, rows=50), version=2, manifest_sha256="bb", parent=tmp_path / "1",
            parent_manifest_sha256="aa",
        )
    require_same(open_segment(tmp_path / "2"), rows)


def test_without_hard_links_there_is_no_delta(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(np.arange(50), seed=1)
    full(tmp_path / "1", rows)

    def link(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link", source)

    monkeypatch.setattr(os, "link", link)
    assert refused(tmp_path / "2", rows, tmp_path / "1", most_changed=1.0)


@pytest.mark.parametrize("name", ["rows.npy", "parts.npy", "pilots.npy", "remap.npy", "segment.json", "segment.sha256"])
@pytest.mark.parametrize("parent_is", ["segment", "delta"])
def test_nothing_is_taken_from_a_damaged_parent(tmp_path: Path, name: str, parent_is: str) -> None:
    rows = random_rows(np.arange(5_000), seed=1)
    full(tmp_path / "1", rows)
    parent = tmp_path / "1"
    if parent_is == "delta":
        parent = tmp_path / "2"
        newer(parent, rows, tmp_path / "1")
    path = tmp_path / "1" / name  # with the delta's own link to it
    content = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(content[:-3] + bytes([content[-3] ^ 0x10]) + content[-2:])
    assert refused(tmp_path / "3", rows, parent, most_changed=1.0)


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_every_file_of_a_delta_is_checked(tmp_path: Path, damage: str) -> None:
    ids = random_ids(500, seed=1)
    rows = random_rows(ids, seed=2)
    full(tmp_path / "1", rows)
    newer(tmp_path / "2", rows | random_rows(ids[:20], seed=3), tmp_path / "1")
    paths = [path for path in (tmp_path / "2").rglob("*") if path.is_file()]
    assert len(paths) == 15
    for path in paths:
        content = path.read_bytes()
        path.chmod(0o644)
        if damage == "gone":
            path.unlink()
        else:  # in place: both names of a shared file
            path.write_bytes(content[:-1] + (b"" if damage == "cut" else bytes([content[-1] ^ 1])))
        with pytest.raises(FacetError, match=path.name if path.suffix == ".npy" else None) as refusal:
            open_segment(tmp_path / "2")
        no_delta = damage == "gone" and path.name == DELTA_NAME  # nor any other segment
        assert type(refusal.value) is (VersionNotFound if no_delta else IntegrityError), path
        if path.parent.name == "base" and damage != "gone":
            with pytest.raises(IntegrityError, match=path.with_suffix("").name):
                open_segment(tmp_path / "1")
        path.write_bytes(content)
    open_segment(tmp_path / "2")


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.update(files={}),
        lambda header: header["files"].pop("replaced.npy"),
        lambda header: header["files"].update({"base/rows.npy": "ab" * 32}),
        lambda header: header.update(format=2),
        lambda header: header["table"].update(dim=WIDTH, quantization="fp16", default_row="cd" * 2 * WIDTH),
        lambda header: header["table"].update(hash_seed=1),
    ],
    ids=["no files", "bits not listed", "a file more", "another format", "another kind of table", "another seed"],
)
@pytest.mark.parametrize("verify", [True, False])
def test_a_delta_header_that_does_not_fit_is_refused(
    tmp_path: Path, change: Callable[[dict], object], verify: bool
) -> None:
    ids = random_ids(500, seed=1)
    rows = random_rows(ids, seed=2)
    full(tmp_path / "1", rows)
    newer(tmp_path / "2", rows | random_rows(ids[:20], seed=3), tmp_path / "1")
    reseal(tmp_path / "2", change, DELTA_NAME)
    with pytest.raises(IntegrityError, match="Delete the segment"):
        open_segment(tmp_path / "2", verify=verify)


@pytest.mark.parametrize("verify", [True, False])
def test_fewer_bits_than_the_base_has_rows_are_refused(tmp_path: Path, verify: bool) -> None:
    """Else the kernel would read behind their end."""
    ids = random_ids(500, seed=1)
    rows = random_rows(ids, seed=2)
    full(tmp_path / "1", rows)
    newer(tmp_path / "2", rows | random_rows(ids[:20], seed=3), tmp_path / "1")
    path = tmp_path / "2" / "replaced.npy"
    bits = np.load(path)
    path.unlink()
    np.save(path, bits[:-1])
    reseal(tmp_path / "2", lambda header: header["files"].update({path.name: sha256_of(path)}), DELTA_NAME)
    with pytest.raises(IntegrityError, match=r"replaced\.npy cannot be read"):
        open_segment(tmp_path / "2", verify=verify)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", ["base", "overlay"])
def test_another_whole_segment_in_the_place_of_base_or_overlay_is_refused(
    tmp_path: Path, name: str, verify: bool
) -> None:
    ids = random_ids(500, seed=1)
    for number in (1, 3):
        rows = random_rows(ids, seed=number)
        full(tmp_path / f"{number}", rows)
        newer(tmp_path / f"{number + 1}", rows | random_rows(ids[:20], seed=number + 10), tmp_path / f"{number}")
    (tmp_path / "2" / name).rename(tmp_path / "away")
    (tmp_path / "4" / name).rename(tmp_path / "2" / name)
    with pytest.raises(IntegrityError, match=rf"{name}/segment\.json is corrupted"):
        open_segment(tmp_path / "2", verify=verify)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", ["base", "overlay"])
def test_a_base_or_overlay_of_another_kind_of_table_is_refused(tmp_path: Path, name: str, verify: bool) -> None:
    """Every hash is right."""
    ids = random_ids(500, seed=1)
    rows = random_rows(ids, seed=2)
    full(tmp_path / "1", rows)
    newer(tmp_path / "2", rows | random_rows(ids[:20], seed=3), tmp_path / "1")
    reseal(tmp_path / "2" / name, lambda header: header["table"].update(hash_seed=1))
    file = f"{name}/segment.json"
    reseal(tmp_path / "2", lambda header: header["files"].update({file: sha256_of(tmp_path / "2" / file)}), DELTA_NAME)
    with pytest.raises(IntegrityError, match=rf"2/{name} does not fit delta\.json: expected a table like"):
        open_segment(tmp_path / "2", verify=verify)
