"""FP32 rows to published bytes: FBGEMM against the codec, refusals before a write, the release."""

import json
import re
from dataclasses import replace
from datetime import UTC, date, datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file, save_file

from pipelines.contracts.errors import InvalidConfig, InvalidTable, NotPrepared, StaleInput
from pipelines.contracts.lineage import Lineage, lineage_of
from pipelines.contracts.rowcodec import CODEC_NAMES, codec
from pipelines.contracts.runspec import RunSpec
from pipelines.contracts.spec import TableSpec
from pipelines.contracts.upper_files import load_upper_model
from pipelines.release import Release
from tests.lineages import invented_events, record_again, record_facet, record_prepared
from training.commands.quantize import quantize as command
from training.quantize import pack_rows, quantize, quantized_table
from training.ranker.checkpoint import RankerTable, TrainedRanker, score
from training.ranker.finetune import finetune
from training.ranker.inputs import load_folds
from training.ranker.metrics import task_aucs
from training.tables import TableOptions

TABLES = ("user.contrastive", "user.kge", "item.contrastive", "item.kge")


@pytest.fixture
def trained(world, small) -> TrainedRanker:
    return finetune(
        world.workspace, world.run, arm="both", seed=0, config=replace(small, epochs=1), options=TableOptions()
    )


@settings(max_examples=150, deadline=None)
@given(
    hnp.arrays(
        np.float32, st.tuples(st.integers(0, 9), st.integers(1, 35)),
        elements=st.one_of(st.floats(-30_000, 30_000, width=32), st.sampled_from([0.0, -0.0, 1e-45, -1e-40, 6e-8])),
    ),
    st.sampled_from(CODEC_NAMES), st.integers(1, 80),
)
def test_packed_rows_are_the_codecs_bytes_whatever_the_chunks(rows, name, chunk_elements):
    packed = pack_rows(rows, name, chunk_elements=chunk_elements)
    np.testing.assert_array_equal(packed, codec(name).encode(rows))


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(name, value):
    rows = np.zeros((5, 8), np.float32)
    rows[3, 2] = value
    with pytest.raises(InvalidTable, match="row 3"):
        pack_rows(rows, name)


def test_an_overflow_is_refused():
    with pytest.raises(InvalidTable, match="overflow in row 1"):
        pack_rows(np.array([[0] * 4, [-7e4] * 4], np.float32), "int4")


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_errors_name_the_row_of_the_table_not_of_the_chunk(name):
    rows = np.zeros((50, 4), np.float32)
    rows[31, 2] = np.nan
    with pytest.raises(InvalidTable, match="row 31"):
        pack_rows(rows, name, chunk_elements=16)
    rows[31] = 0
    rows[42] = [-3.4e38, 3.4e38, 0, 0]
    with pytest.raises(InvalidTable, match="overflow in row" if name == "fp16" else "overflow in row 42"):
        pack_rows(rows, name, chunk_elements=16)


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_no_rows_and_rows_without_columns(name):
    assert pack_rows(np.empty((0, 6), np.float32), name).shape == (0, codec(name).row_bytes(6))
    empty = RankerTable(np.empty(0, np.int64), np.empty((0, 6), np.float32), np.ones(6, np.float32))
    rows, default, served = quantized_table(empty, name)
    assert rows.shape == (0, codec(name).row_bytes(6)) and len(default) == codec(name).row_bytes(6)
    assert served.weight.shape == (0, 6)
    for shape in ((0, 0), (3, 0), (3,)):
        with pytest.raises(InvalidTable, match=r"\(N, D\)"):
            pack_rows(np.empty(shape, np.float32), name)


@pytest.mark.slow
def test_more_elements_than_31_bits_count():
    """Rows that overlap in memory: row i is base[i : i + 64], 2**31 elements and some lie in 128 MiB."""
    count = (1 << 25) + 1000
    base = np.random.default_rng(0).normal(size=count + 63).astype(np.float32)
    rows = np.lib.stride_tricks.sliding_window_view(base, 64)
    assert rows.size > 1 << 31
    packed = pack_rows(rows, "int4")
    assert packed.shape == (count, 36)
    for some in (slice(0, 5), slice((1 << 25) - 5, (1 << 25) + 5), slice(count - 5, count)):
        np.testing.assert_array_equal(packed[some], codec("int4").encode(rows[some]))
    assert codec("int4").finite(packed, 64).all()


def test_a_quantized_table_decodes_to_what_will_be_served():
    generator = np.random.default_rng(0)
    table = RankerTable(np.arange(20), *(generator.normal(size=s).astype(np.float32) for s in ((20, 8), (8,))))
    rows, default, served = quantized_table(table, "int4")
    np.testing.assert_array_equal(codec("int4").decode(rows, 8), served.weight)
    np.testing.assert_array_equal(codec("int4").decode(np.frombuffer(default, np.uint8)[None], 8)[0], served.default)
    assert 0 < np.abs(served.weight - table.weight).max() < 0.3


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_the_release_is_complete(world, trained, name):
    metrics = quantize(world.workspace, world.run, arm="both", seed=0, to=name)
    directory = world.run.ranker("both", 0) / name
    release = json.loads((directory / "release.json").read_text())
    assert release["metrics"] == metrics and release["dataset"] == "planted"
    assert datetime.fromisoformat(release["as_of"]) == datetime(2024, 3, 15, tzinfo=UTC)
    specs = [TableSpec(**table) for table in release["tables"]]
    assert sorted(spec.name for spec in specs) == sorted(TABLES)
    for spec in specs:
        table = pq.read_table(directory / "tables" / f"{spec.name}.parquet")
        assert table.schema == pa.schema(
            [("id", pa.int64()), ("row", pa.binary(spec.row_bytes)), ("event_timestamp", pa.timestamp("us", tz="UTC"))]
        )
        fp32 = trained.tables[spec.name]
        np.testing.assert_array_equal(table["id"].to_numpy(), fp32.ids)
        assert b"".join(table["row"].to_pylist()) == codec(name).encode(fp32.weight).tobytes()
        assert spec.default_row_bytes == codec(name).encode(fp32.default[None]).tobytes()
        assert table["event_timestamp"].unique().to_pylist() == [datetime(2024, 3, 15, tzinfo=UTC)]
    assert metrics["bytes_per_row"] == codec(name).row_bytes(8)
    assert metrics["bytes_ratio_to_fp16"] == pytest.approx(codec(name).row_bytes(8) / 16)


def test_the_quantized_auc_is_that_of_the_published_bytes(world, trained):
    metrics = quantize(world.workspace, world.run, arm="both", seed=0, to="int4")
    directory = world.run.ranker("both", 0) / "int4"
    tables = {}
    for spec in (TableSpec(**table) for table in json.loads((directory / "release.json").read_text())["tables"]):
        published = pq.read_table(directory / "tables" / f"{spec.name}.parquet")
        packed = np.frombuffer(b"".join(published["row"].to_pylist()), np.uint8).reshape(-1, spec.row_bytes)
        default = np.frombuffer(spec.default_row_bytes, np.uint8)[None]
        rows, default_row = codec("int4").decode(packed, spec.dim), codec("int4").decode(default, spec.dim)[0]
        tables[spec.name] = RankerTable(published["id"].to_numpy(), rows, default_row)
    test = load_folds(world.workspace, world.run)["test"]
    auc = task_aucs(("click", "convert"), test.labels, score(tables, load_upper_model(directory / "upper"), test))
    assert metrics["auc"]["quantized"] == auc != metrics["auc"]["fp32"] == trained.metrics["auc"]
    assert metrics["auc_delta"]["click"] == pytest.approx(auc["click"] - trained.metrics["auc"]["click"])


def test_the_release_states_what_its_ranker_was_trained_with(world, trained):
    """Whatever the run says by now."""
    spec = RunSpec.read(world.run.spec)
    test = replace(spec.windows.test, end=date(2024, 5, 1))
    validation = replace(spec.windows.validation, end=date(2024, 3, 14))
    others = replace(spec.windows, test=test, validation=validation)
    RunSpec("another", others, ("convert", "click")).write(world.run.spec)
    metrics = quantize(world.workspace, world.run, arm="both", seed=0, to="int4")
    release = Release.read(world.run.ranker("both", 0) / "int4")
    assert (release.dataset, release.windows) == ("planted", spec.windows)
    assert release.as_of == spec.windows.validation.end_time
    assert metrics["auc"]["fp32"] == trained.metrics["auc"] and list(metrics["auc_delta"]) == ["click", "convert"]
    assert release.lineage == Lineage.read(lineage_of(world.run.ranker("both", 0)), stage="finetune")


def test_a_ranker_that_does_not_fit_what_is_there_is_refused_by_name(world, trained, small):
    def refused(*messages: str) -> None:
        with pytest.raises(StaleInput) as refusal:
            quantize(world.workspace, world.run, arm="both", seed=0, to="int4")
        for message in messages:
            assert re.search(message, str(refusal.value)), (message, str(refusal.value))
        assert not (world.run.ranker("both", 0) / "int4").exists()

    def again() -> None:
        finetune(
            world.workspace, world.run, arm="both", seed=0, config=replace(small, epochs=1), options=TableOptions()
        )

    command = r"Run `facet finetune --run v1 --arm both --seed 0`, which trains it anew"
    table = pq.read_table(world.run.examples)
    pq.write_table(table.replace_schema_metadata({"changed": "yes"}), world.run.examples)
    refused(r"examples.parquet: expected the file that `facet prepare --run v1` wrote")
    record_again(world.run.examples)
    refused(r"ranker both of run v1, seed 0 was trained from something else.*got examples of run v1\.", command)
    again()
    view = world.workspace.view("item_context")
    table = pq.read_table(view)
    pq.write_table(table.slice(0, len(table) // 2), view)
    record_again(view)
    world.apply_features()
    refused(r"got context of run v1 \(the view item_context\)\.", command)
    again()
    path = world.run.facet("contrastive", 0) / "user.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "weight": tensors["weight"] * 2}, path)
    refused(r"user.safetensors: expected the file that `facet pretrain contrastive --run v1 --seed 0` wrote")
    record_again(path.parent)
    refused(r"got contrastive facet of run v1, seed 0\.", command)
    again()
    world.run.pairs.write_bytes(b"others")
    record_prepared(world.workspace, world.run, log="more clicks")
    stale = r"contrastive facet of run v1, .*got pairs of run v1 \(the events"
    refused(stale, "Run `facet pretrain contrastive --run v1 --seed 0`")
    record_facet(world.workspace, world.run, "contrastive", 0)
    record_facet(world.workspace, world.run, "kge", 0)
    invented_events("still more").write(lineage_of(world.workspace.events))
    refused("made from other events.*the log /logs/shop.csv.*Run `facet prepare --run v1`")
    record_prepared(world.workspace, world.run, log="more clicks")
    quantize(world.workspace, world.run, arm="both", seed=0, to="fp16")
    weights = world.run.ranker("both", 0) / "tables" / "item.kge.safetensors"
    weights.write_bytes(weights.read_bytes() + b"x")
    refused(r"item.kge.safetensors: expected the file that `facet finetune --run v1 --arm both --seed 0` wrote")


def test_nan_in_a_table_is_refused_and_the_last_release_stays(world, trained):
    quantize(world.workspace, world.run, arm="both", seed=0, to="int4")
    directory = world.run.ranker("both", 0)
    before = (directory / "int4" / "release.json").read_bytes()
    path = directory / "tables" / "item.kge.safetensors"
    tensors = load_file(path)
    tensors["weight"][5, 0] = np.nan
    save_file(tensors, path)
    record_again(directory)
    for name in CODEC_NAMES:
        with pytest.raises(InvalidTable, match="NaN"):
            quantize(world.workspace, world.run, arm="both", seed=0, to=name)
    assert (directory / "int4" / "release.json").read_bytes() == before
    assert not (directory / "int8").exists() and not (directory / "fp16").exists()


def test_tables_without_any_row_are_refused(world, trained):
    for path in (world.run.ranker("both", 0) / "tables").iterdir():
        save_file({**load_file(path), "ids": np.empty(0, np.int64), "weight": np.empty((0, 8), np.float32)}, path)
    record_again(world.run.ranker("both", 0))
    with pytest.raises(InvalidTable, match="a row in one of them"):
        quantize(world.workspace, world.run, arm="both", seed=0, to="int4")


def test_an_untrained_ranker_or_an_unknown_format_is_refused(world):
    with pytest.raises(NotPrepared, match="facet finetune --run v1 --arm kge --seed 3"):
        quantize(world.workspace, world.run, arm="kge", seed=3, to="int4")
    with pytest.raises(InvalidConfig, match="'int3'"):
        quantize(world.workspace, world.run, arm="kge", seed=3, to="int3")


def test_the_command_tells_bytes_and_auc(world, trained):
    words = ["--run", "v1", "--arm", "both", "--to", "int4"]
    result = CliRunner().invoke(command, words, obj=world.workspace, catch_exceptions=False)
    assert result.exit_code == 0
    assert "rows of 8.0 bytes, 50.0% of FP16" in result.output and "int4" in result.output
