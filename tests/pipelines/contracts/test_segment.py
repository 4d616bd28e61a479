import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numba
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.contracts import segment
from pipelines.contracts.durable import sha256_of
from pipelines.contracts.errors import IntegrityError, InvalidTable, VersionNotFound
from pipelines.contracts.hashing import bucket_of
from pipelines.contracts.rowcodec import codec
from pipelines.contracts.sealed import seal_path, write_sealed
from pipelines.contracts.segment import Segment, ranges_of
from pipelines.contracts.segment_header import ARRAYS, HEADER_NAME, SegmentHeader, read_header
from pipelines.contracts.segment_index import gather
from pipelines.contracts.segment_writer import write_segment
from pipelines.contracts.spec import TableSpec
from tests.waiting import PROGRAM_S

WIDTH = 8
HUGE_PAGE_BYTES = 2 << 20


def spec(rows: int) -> TableSpec:
    return TableSpec("item.kge", 8, rows, "int4", "vocabulary", "0102030405060708")


def batch(ids: list[int], width: int = WIDTH) -> pa.RecordBatch:
    rows = [bytes((i + column) % 256 for column in range(width)) for i in ids]
    return pa.record_batch({"id": pa.array(ids, pa.int64()), "row": pa.array(rows, pa.binary(width))})


def write(directory: Path, *batches: pa.RecordBatch, rows: int) -> Segment:
    write_segment(directory, spec=spec(rows), version=3, manifest_sha256="ab", batches=batches)
    return Segment.open(directory)


def test_rows_of_several_batches(tmp_path: Path) -> None:
    segment = write(tmp_path / "s", batch([-5, 2]), batch([]), batch([7, 9, 2**62]), rows=5)
    rows, found = segment.lookup(np.array([9, 3, -5, 9]))
    assert found.tolist() == [True, False, True, True]
    nine, default, minus_five = [*range(9, 17)], [*range(1, 9)], [(column - 5) % 256 for column in range(8)]
    assert rows.tolist() == [nine, default, minus_five, nine]
    assert (segment.version, segment.manifest_sha256, segment.spec) == (3, "ab", spec(5))


def test_a_slice_of_a_batch_brings_its_own_rows(tmp_path: Path) -> None:
    segment = write(tmp_path / "s", batch([1, 2, 3, 4]).slice(1, 2), rows=2)
    rows, found = segment.lookup(np.array([2, 3]))
    assert found.all() and rows[:, 0].tolist() == [2, 3]


def test_a_table_without_rows(tmp_path: Path) -> None:
    rows, found = write(tmp_path / "s", rows=0).lookup(np.array([1]))
    assert not found.any() and rows.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]


@given(st.sets(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=60), st.data())
def test_lookup_is_a_dictionary(tmp_path_factory: pytest.TempPathFactory, ids: set[int], data: st.DataObject) -> None:
    segment = write(tmp_path_factory.mktemp("s") / "s", batch(sorted(ids)), rows=len(ids))
    asked = data.draw(st.lists(st.one_of(st.sampled_from(sorted(ids)), st.integers(-(2**63), 2**63 - 1)), max_size=30))
    rows, found = segment.lookup(np.array(asked, np.int64))
    known = np.array([key in ids for key in asked], bool)
    assert (found == known).all()
    assert rows[known].tolist() == [[(key + column) % 256 for column in range(WIDTH)] for key in asked if key in ids]
    assert (rows[~found] == np.arange(1, WIDTH + 1)).all()
    positions = segment.positions(np.array(asked, np.int64))
    assert ((positions >= 0) == found).all() and (segment.rows[positions[found]] == rows[found]).all()


def table(spec: TableSpec, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random stored ids, ascending, and rows of a table."""
    rng = np.random.default_rng(seed)
    low = 0 if spec.buckets else -(2**63)
    keys = np.unique(rng.integers(low, 2**63 - 1, 2 * (spec.rows - spec.buckets)))
    keys = np.sort(rng.permutation(keys)[: spec.rows - spec.buckets])
    ids = np.concatenate([spec.rule.all_bucket_ids(), keys])
    return ids, rng.integers(0, 256, (spec.rows, spec.row_bytes), dtype=np.uint8)


def batches_of(ids: np.ndarray, rows: np.ndarray, size: int) -> Iterator[pa.RecordBatch]:
    for start in range(0, len(ids), size):
        part = np.ascontiguousarray(rows[start : start + size])
        column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(rows.shape[1]), len(part), [None, pa.py_buffer(part)])
        yield pa.record_batch({"id": pa.array(ids[start : start + size]), "row": column})


@pytest.mark.parametrize("group_bytes", [1 << 20, 1 << 30], ids=["spilled", "in memory"])
def test_many_parts_and_groups_hold_every_row_once(tmp_path: Path, group_bytes: int) -> None:
    spec = TableSpec("item.kge", 64, 200_000, "int4", "vocabulary", "ab" * 36)
    ids, rows = table(spec)
    write_segment(
        tmp_path / "s", spec=spec, version=1, manifest_sha256="ab", batches=batches_of(ids, rows, 7_001),
        group_bytes=group_bytes,
    )
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == sorted(
        [*ARRAYS, "segment.json", "segment.sha256"]
    )
    segment = Segment.open(tmp_path / "s")
    order = np.random.default_rng(1).permutation(len(ids))
    answer, found = segment.lookup(ids[order])
    assert found.all() and (answer == rows[order]).all()
    assert sorted(segment.positions(ids).tolist()) == list(range(len(ids)))


def test_groups_do_not_change_what_is_written(tmp_path: Path) -> None:
    spec = TableSpec("item.kge", 16, 90_000, "int4", "vocabulary", "ab" * 12)
    ids, rows = table(spec)
    for name, group_bytes in (("a", 1 << 18), ("b", 1 << 30)):
        write_segment(
            tmp_path / name, spec=spec, version=1, manifest_sha256="ab", batches=batches_of(ids, rows, 10_000),
            group_bytes=group_bytes,
        )
    for name in [*ARRAYS, "segment.json"]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(("exact_rows", "at_least", "at_most"), [(99_999, 30, 104), (100_000, 0, 0)])
def test_strangers_pass_at_the_stated_rate(tmp_path: Path, exact_rows: int, at_least: int, at_most: int) -> None:
    spec = TableSpec("item.kge", 8, 100_000, "int4", "vocabulary", "ab" * 8)
    ids, rows = table(spec)
    write_segment(
        tmp_path / "s", spec=spec, version=1, manifest_sha256="ab", batches=batches_of(ids, rows, 50_000),
        exact_rows=exact_rows,
    )
    segment = Segment.open(tmp_path / "s")
    assert (segment.lookup(ids)[0] == rows).all()
    strangers = np.random.default_rng(9).integers(-(2**63), 2**63 - 1, 2**22)  # none of the ids, as good as surely
    passed = int(segment.lookup(strangers)[1].sum())
    assert at_least <= passed <= at_most  # of 16 bits 64 are expected, standard deviation 8


def test_forty_bytes_are_enough_for_a_row_of_thirty_six(tmp_path: Path) -> None:
    spec = TableSpec("item.kge", 64, 300_000, "int4", "vocabulary", "ab" * 36)
    ids, rows = table(spec)
    write_segment(
        tmp_path / "s", spec=spec, version=1, manifest_sha256="ab", batches=batches_of(ids, rows, 65_536), exact_rows=0
    )
    assert sum(path.stat().st_size for path in (tmp_path / "s").iterdir()) <= 40 * len(ids)


@pytest.mark.parametrize(
    ("rule", "rows", "buckets"), [("vocabulary+buckets", 3_000, 700), ("vocabulary+buckets", 9, 9), ("hash", 500, 500)]
)
def test_every_id_has_a_row_where_there_are_buckets(tmp_path: Path, rule: str, rows: int, buckets: int) -> None:
    spec = TableSpec("item.kge", 8, rows, "int4", rule, "ab" * 8, buckets=buckets, hash_seed=3)
    ids, packed = table(spec)
    write_segment(tmp_path / "s", spec=spec, version=1, manifest_sha256="ab", batches=batches_of(ids, packed, 257))
    segment = Segment.open(tmp_path / "s")
    asked = np.concatenate([ids, np.random.default_rng(2).integers(-(2**63), 2**63 - 1, 5_000)])
    stored = spec.rule.stored_ids(asked, vocabulary=ids[buckets:])
    answer, found = segment.lookup(asked)
    truth = dict(zip(ids.tolist(), map(bytes, packed), strict=True))
    assert found.all()
    assert [bytes(row) for row in answer] == [truth[key] for key in stored.tolist()]
    assert sorted(segment.positions(ids).tolist()) == list(range(rows))


def test_other_negative_ids_than_the_buckets_are_refused(tmp_path: Path) -> None:
    spec = TableSpec("item.kge", 8, 4, "int4", "vocabulary+buckets", "ab" * 8, buckets=2)
    for ids in ([-3, -1, 5, 6], [-2, 3, 5, 6], [-3, -2, -1, 5]):
        with pytest.raises(InvalidTable, match="bucket ids -2 to -1"):
            write_segment(tmp_path / "s", spec=spec, version=1, manifest_sha256="ab", batches=[batch(ids)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dim", [1, 2, 5, 7, 8, 15, 63])
@pytest.mark.parametrize("quantization", ["int4", "int8", "fp16"])
@pytest.mark.parametrize("exact_rows", [0, 50], ids=["16 bits", "64 bits"])
def test_rows_of_every_width(tmp_path: Path, dim: int, quantization: str, exact_rows: int) -> None:
    width = codec(quantization).row_bytes(dim)
    spec = TableSpec("item.kge", dim, 50, quantization, "vocabulary", "cd" * width)
    ids, rows = table(spec)
    write_segment(
        tmp_path / "s", spec=spec, version=1, manifest_sha256="ab", batches=batches_of(ids, rows, 20),
        exact_rows=exact_rows,
    )
    answer, found = Segment.open(tmp_path / "s").lookup(np.append(ids, 3))
    assert found.tolist() == [True] * 50 + [False]
    assert (answer[:-1] == rows).all() and (answer[-1] == 0xCD).all()


def test_threads_may_share_a_segment(tmp_path: Path) -> None:
    spec = TableSpec("item.kge", 64, 50_000, "int4", "vocabulary", "ab" * 36)
    ids, rows = table(spec)
    write_segment(tmp_path / "s", spec=spec, version=1, manifest_sha256="ab", batches=batches_of(ids, rows, 50_000))
    segment = Segment.open(tmp_path / "s")

    def look(seed: int) -> bool:
        chosen = np.random.default_rng(seed).integers(0, len(ids), 4_096)
        return all((segment.lookup(ids[chosen])[0] == rows[chosen]).all() for _ in range(20))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(look, range(8)))


@pytest.mark.parametrize(
    ("batches", "rows", "message"),
    [
        ([batch([2, 1])], 2, "strictly increasing"),
        ([batch([1, 1])], 2, "strictly increasing"),
        ([batch([1, 2]), batch([2, 3])], 4, "strictly increasing"),
        ([batch([1, 2])], 3, "3 rows, got 2"),
        ([batch([1, 2]), batch([3])], 2, "2 rows, got at least 3"),
        ([batch([1], width=9)], 1, r"binary\[8\]"),
        ([pa.record_batch({"id": pa.array([1]), "row": pa.array([None], pa.binary(WIDTH))})], 1, "1 nulls"),
    ],
)
def test_a_bad_table_leaves_nothing(tmp_path: Path, batches: list, rows: int, message: str) -> None:
    with pytest.raises(InvalidTable, match=message):
        write(tmp_path / "s", *batches, rows=rows)
    assert not list(tmp_path.iterdir())


def test_a_segment_is_never_written_over(tmp_path: Path) -> None:
    segment = write(tmp_path / "s", batch([1]), rows=1)
    with pytest.raises(OSError):
        write(tmp_path / "s", batch([2]), rows=1)
    assert segment.lookup(np.array([1]))[1].all() and [path.name for path in tmp_path.iterdir()] == ["s"]


def test_no_segment(tmp_path: Path) -> None:
    with pytest.raises(VersionNotFound, match="feast materialize"):
        Segment.open(tmp_path / "s")


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_other_bytes_than_were_written(tmp_path: Path, name: str, damage: str) -> None:
    write(tmp_path / "s", batch([1, 2]), rows=2)
    path = tmp_path / "s" / name
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[:-1] + (b"" if damage == "cut" else bytes([content[-1] ^ 1])))
    with pytest.raises(IntegrityError, match=f"{name} is corrupted"):
        Segment.open(tmp_path / "s")


def reseal(directory: Path, change: Callable[[dict], object], name: str = HEADER_NAME) -> None:
    """Change a header and seal it again: its bytes are not damaged, what it says is."""
    header = json.loads((directory / name).read_text())
    change(header)
    for path in (directory / name, seal_path(directory / name)):
        path.unlink()
    write_sealed(directory / name, json.dumps(header))


CHANGES: dict[str, Callable[[dict], object]] = {
    "lists no files": lambda header: header.update(files={}),
    "does not list the rows": lambda header: header["files"].pop("rows.npy"),
    "lists another file": lambda header: header["files"].update({"../../x": "ab" * 32}),
    "a hash that is none": lambda header: header["files"].update({"rows.npy": ""}),
    "no files": lambda header: header.pop("files"),
    "one key more": lambda header: header.update(more=1),
    "another format": lambda header: header.update(format=4),
    "a version that is text": lambda header: header.update(version="3"),
    "version 0": lambda header: header.update(version=0),
    "no table": lambda header: header.update(table=None),
    "more rows": lambda header: header["table"].update(rows=300),
    "fewer rows": lambda header: header["table"].update(rows=100),
    "rows without end": lambda header: header["table"].update(rows=2**62),
    "a fraction of rows": lambda header: header["table"].update(rows=200.0),
    "wider rows": lambda header: header["table"].update(dim=4096, default_row="00" * 2052),
    "a hash bucket": lambda header: header["table"].update(buckets=1, id_rule="vocabulary+buckets"),
    "a path for a name": lambda header: header["table"].update(name="../x.y"),
    "more slots": lambda header: header["index"].update(slots=10**5),
    "no slots": lambda header: header["index"].update(slots=0),
    "fewer slots": lambda header: header["index"].update(slots=1),
    "more pilots": lambda header: header["index"].update(pilots=10**6),
    "no pilots": lambda header: header["index"].update(pilots=0),
    "pilots that are true": lambda header: header["index"].update(pilots=True),
    "a part of another shift": lambda header: header["index"].update(part_shift=62),
    "a shift out of range": lambda header: header["index"].update(part_shift=64),
    "a negative shift": lambda header: header["index"].update(part_shift=-1),
    "another fingerprint": lambda header: header["index"].update(fingerprint_bytes=2),
    "no fingerprint": lambda header: header["index"].update(fingerprint_bytes=0),
    "a seed too large": lambda header: header["index"].update(seed=2**64),
}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_a_header_that_does_not_fit_is_refused_before_anything_is_looked_up(
    tmp_path: Path, change: str, verify: bool
) -> None:
    write(tmp_path / "s", batch([*range(200)]), rows=200)
    reseal(tmp_path / "s", CHANGES[change])
    with pytest.raises(IntegrityError, match="Delete the segment"):
        Segment.open(tmp_path / "s", verify=verify)


def test_the_format_before_is_refused_by_its_number(tmp_path: Path) -> None:
    write(tmp_path / "s", batch([1]), rows=1)

    def as_before(header: dict) -> None:
        header["format"] = 2
        header["index"]["print_bytes"] = header["index"].pop("fingerprint_bytes")

    reseal(tmp_path / "s", as_before)
    with pytest.raises(IntegrityError, match=r"format 3, got .*got 2.*materialize the version again"):
        Segment.open(tmp_path / "s")


@pytest.mark.parametrize("text", ["[]", "null", "5", '"segment"', "{}", "[" * 100_000], ids=lambda text: text[:9])
def test_a_header_of_another_kind_of_json(tmp_path: Path, text: str) -> None:
    write(tmp_path / "s", batch([1]), rows=1)
    for name in (HEADER_NAME, "segment.sha256"):
        (tmp_path / "s" / name).unlink()
    write_sealed(tmp_path / "s" / HEADER_NAME, text)
    with pytest.raises(IntegrityError, match=r"segment\.json cannot be understood"):
        Segment.open(tmp_path / "s")


@pytest.mark.parametrize("bounds", [(0, 201), (2**63, 2**63), (5, 200), (200, 0), (0, 199)], ids=str)
def test_parts_that_lead_out_of_the_arrays_are_refused(tmp_path: Path, bounds: tuple[int, int]) -> None:
    write(tmp_path / "s", batch([*range(200)]), rows=200)
    path = tmp_path / "s" / "parts.npy"
    parts = np.load(path)
    assert parts[:, 0].tolist() == [0, 200]
    parts[:, 0] = bounds
    path.unlink()
    np.save(path, parts)
    reseal(tmp_path / "s", lambda header: header["files"].update({"parts.npy": sha256_of(path)}))
    with pytest.raises(IntegrityError, match=r"parts\.npy does not fit its header"):
        Segment.open(tmp_path / "s")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *((name, change) for name in ARRAYS for change in ("other type", "longer", "pickle")),
        ("rows.npy", "by columns"), ("parts.npy", "by columns"),
    ],
)
def test_an_array_of_another_kind_is_refused_whatever_its_hash(tmp_path: Path, name: str, change: str) -> None:
    write(tmp_path / "s", batch([*range(200)]), rows=200)
    path = tmp_path / "s" / name
    array = np.load(path)
    path.unlink()
    if change == "other type":
        np.save(path, array.view(f"i{array.itemsize}"))
    elif change == "by columns":
        np.save(path, np.asfortranarray(array))
    elif change == "longer":
        np.save(path, array)
        path.write_bytes(path.read_bytes() + b"\0")
    else:
        np.save(path, array.astype(object), allow_pickle=True)
    reseal(tmp_path / "s", lambda header: header["files"].update({name: sha256_of(path)}))
    with pytest.raises(IntegrityError, match=rf"{name} cannot be read"):
        Segment.open(tmp_path / "s")


@pytest.mark.parametrize("name", ["rows.npy", "pilots.npy"], ids=["mapped", "read"])
def test_a_file_that_is_replaced_after_it_was_hashed_is_not_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Another process puts a file of the same size into its place, at the worst moment."""
    ids = np.arange(200)
    truth = write(tmp_path / "s", batch(ids.tolist()), rows=200).lookup(ids)[0]
    path, planted, swaps = tmp_path / "s" / name, tmp_path / "planted", []
    content = path.read_bytes()
    planted.write_bytes(content[:128] + bytes(len(content) - 128))

    def swap(hashed: bool) -> None:
        if hashed and not swaps:
            swaps.append(os.replace(planted, path))

    def file_digest(file: BinaryIO, algorithm: str, original: Callable = hashlib.file_digest) -> object:
        digest = original(file, algorithm)
        swap(os.path.samestat(os.fstat(file.fileno()), os.stat(path)))
        return digest

    def sha256(data: bytes = b"", original: Callable = hashlib.sha256) -> object:
        digest = original(data)
        swap(data == content)
        return digest

    monkeypatch.setattr(hashlib, "file_digest", file_digest)
    monkeypatch.setattr(hashlib, "sha256", sha256)
    segment = Segment.open(tmp_path / "s")
    assert swaps and path.read_bytes() != content
    rows, found = segment.lookup(ids)
    assert found.all() and (rows == truth).all()


LOOK_TWICE = """
import sys
from pathlib import Path
import numpy as np
from pipelines.contracts import mapped_array
from pipelines.contracts.errors import IntegrityError
from pipelines.contracts.segment import Segment

mapped_array.PRIVATE_BYTES = int(sys.argv[2])
segment, ids = Segment.open(Path(sys.argv[1])), np.arange(300_000)
print(segment.lookup(ids)[1].all(), flush=True)
sys.stdin.readline()
for _ in range(2):
    try:
        print("answered", segment.lookup(ids)[1].all(), flush=True)
    except IntegrityError as error:
        print(error, flush=True)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A segment of 300,000 rows; every file of many pages."""
    path, ids = tmp_path_factory.mktemp("large") / "s", np.arange(300_000)
    rows = np.tile(np.arange(WIDTH, dtype=np.uint8), (len(ids), 1))
    write_segment(
        path, spec=spec(len(ids)), version=1, manifest_sha256="ab", batches=batches_of(ids, rows, 100_000)
    )
    return path


@pytest.mark.parametrize(
    ("name", "private_bytes", "size"),
    [
        *(("rows.npy", 1 << 20, size) for size in (0, 100_000, -1)), ("pilots.npy", 0, 0), ("remap.npy", 0, 0),
        ("pilots.npy", 1 << 20, 0), ("remap.npy", 1 << 20, 0),
    ],
)
def test_a_file_that_is_cut_under_a_process_does_not_kill_it(
    tmp_path: Path, large: Path, name: str, private_bytes: int, size: int
) -> None:
    directory = tmp_path / "s"
    shutil.copytree(large, directory)
    process = subprocess.Popen(
        [sys.executable, "-c", LOOK_TWICE, str(directory), str(private_bytes)], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    )
    assert process.stdout.readline() == "True\n"
    path = directory / name
    path.chmod(0o644)
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    said = process.communicate("\n", timeout=PROGRAM_S)[0].splitlines()
    assert process.returncode == 0
    if name == "rows.npy" or not private_bytes:
        assert len(said) == 2 and all(f"{name} is corrupted" in line for line in said)
    else:
        assert said == ["answered True"] * 2


def test_files_of_a_segment_are_read_only(tmp_path: Path) -> None:
    write(tmp_path / "s", batch([1]), rows=1)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "s").iterdir()} == {0o444}


def test_descriptors_end_with_their_segment(tmp_path: Path) -> None:
    segment = write(tmp_path / "s", batch([1]), rows=1)
    del segment
    before = len(os.listdir("/proc/self/fd"))
    opened = [Segment.open(tmp_path / "s") for _ in range(5)]
    assert len(os.listdir("/proc/self/fd")) >= before + 5
    del opened
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_header_that_is_not_one(tmp_path: Path) -> None:
    write(tmp_path / "s", batch([1]), rows=1)
    path = tmp_path / "s" / "segment.json"
    path.unlink()
    path.write_text('{"table": {}}')
    with pytest.raises(IntegrityError, match="is corrupted"):
        Segment.open(tmp_path / "s")


@pytest.mark.parametrize("buckets", [0, 3])
def test_the_rows_of_a_part_of_the_ids_are_neighbours(tmp_path: Path, buckets: int) -> None:
    """What a host of one shard enters into its memory are the rows it is asked for, and hardly others."""
    rows = 200_000
    path = tmp_path / "s"
    ids = np.arange(-buckets, rows - buckets)
    rule = "vocabulary+buckets" if buckets else "vocabulary"
    table = TableSpec("item.kge", 8, rows, "int4", rule, "ab" * 8, buckets=buckets, hash_seed=3)
    packed = pa.FixedSizeBinaryArray.from_buffers(pa.binary(WIDTH), rows, [None, pa.py_buffer(np.zeros((rows, WIDTH)))])
    write_segment(
        path, spec=table, version=1, manifest_sha256="ab",
        batches=[pa.record_batch({"id": pa.array(ids), "row": packed})],
    )
    segment = Segment.open(path)
    index, parts = read_header(path / HEADER_NAME, SegmentHeader).index, np.load(path / "parts.npy")
    positions = segment.positions(ids[buckets:])
    for count, surplus in ((4, 1.0), (3, 1.6)):  # the second cuts through parts of the segment
        for number in range(count):
            (_, head), (first, end) = ranges_of((number, count), index, parts, buckets)
            own = positions[bucket_of(ids[buckets:], buckets=count, seed=0) == number]
            assert head == buckets and first <= own.min() and own.max() < end and end - first <= surplus * len(own)
    assert ranges_of((0, 4), replace(index, seed=1), parts, buckets) is None


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="needs Linux's account of mapped pages")
def test_a_quarter_of_the_rows_is_in_the_memory_of_a_host_of_four(tmp_path: Path) -> None:
    rows = 1_200_000
    ids, path = np.arange(rows), tmp_path / "s"
    packed = np.stack([ids, ids ^ 5], axis=1).view(np.uint8)
    array = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), rows, [None, pa.py_buffer(packed)])
    write_segment(
        path, spec=TableSpec("item.kge", 24, rows, "int4", "vocabulary", "00" * 16), version=1, manifest_sha256="ab",
        batches=[pa.record_batch({"id": pa.array(ids), "row": array})],
    )

    def resident() -> int:
        """Bytes of the rows that this process has mapped."""
        total, counting = 0, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if "-" in line.split()[0]:
                counting = line.endswith(str(path / "rows.npy"))
            elif counting and line.startswith("Rss:"):
                total += int(line.split()[1]) * 1024
        return total

    whole = Segment.open(path)
    size = (path / "rows.npy").stat().st_size
    assert 0.95 * size < resident() <= 1.01 * size
    truth = whole.lookup(ids)[0].tobytes()
    del whole
    assert not resident()
    part = Segment.open(path, part=(2, 4))
    held = resident()
    assert 0.24 * size < held <= 0.26 * size + 3 * HUGE_PAGE_BYTES  # at both ends, and that of the id it tries
    part.lookup(ids[bucket_of(ids, buckets=4, seed=0) == 2])
    assert resident() == held  # what it is asked for was there
    assert part.lookup(ids)[0].tobytes() == truth == packed.tobytes()  # and any other it has as well


def test_ids_off_the_wire_and_ids_that_were_made_are_one_type_to_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the first request of either kind compiles."""
    spec = TableSpec("item.kge", 8, 1, "int4", "vocabulary", "00" * 8)
    row = pa.record_batch({"id": pa.array([1], pa.int64()), "row": pa.array([bytes(8)], pa.binary(8))})
    write_segment(tmp_path / "segment", spec=spec, version=1, manifest_sha256="", batches=[row])
    opened, types = Segment.open(tmp_path / "segment"), set()

    def watched(ids: np.ndarray, *arrays: object) -> None:
        types.add(numba.typeof(ids))
        gather(ids, *arrays)

    monkeypatch.setattr(segment, "gather", watched)
    for asked in (np.array([1, 2]), np.frombuffer(np.array([1, 2]).tobytes(), "<i8")):
        assert opened.lookup(asked)[1].tolist() == [True, False]
    assert len(types) == 1
