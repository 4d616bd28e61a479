"""Which ids share a row: the same in both facets, in the ranker, in what is published and in what is served."""

import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from online.ranking.verify import OfflineVersion
from pipelines.contracts.errors import InvalidConfig, InvalidTable, NotPrepared, StaleInput
from pipelines.contracts.idrule import IdRule
from pipelines.contracts.manifest import Manifest
from pipelines.contracts.rowcodec import codec
from pipelines.contracts.runspec import FACETS
from pipelines.contracts.segment import Segment
from pipelines.contracts.segment_writer import write_segment
from pipelines.publish import publish
from tests.lineages import record_again, record_prepared
from tests.planted import planted_run
from tests.training.conftest import DAY_ZERO, FIRST_ITEM, FIRST_USER, TIMESTAMP, World
from training.contrastive import Pairs
from training.facets import pretrain_facet
from training.ids import IdsConfig, RunIds, load_ids
from training.kge.evaluate import LinkPrediction
from training.kge.graph import Graph
from training.quantize import quantize
from training.ranker.checkpoint import RankerTable, TrainedRanker, score
from training.ranker.finetune import finetune
from training.ranker.inputs import load_folds
from training.ranker.vocabulary import DEFAULT_ROW, Vocabulary
from training.tables import TableOptions

SMALL = """
contrastive: {dim: 8, epochs: 1, groups: 2, group_rows: 32, uniform_negatives: 16}
kge: {dim: 8, epochs: 1, groups: 2, group_edges: 32, uniform_negatives: 16}
"""
BUCKETS = {"rule": "vocabulary+buckets", "buckets": 12, "seed": 3}
RULES = {
    "vocabulary": {},
    "vocabulary+buckets": {"user": {**BUCKETS, "min_events": 3}, "item": {**BUCKETS, "buckets": 300, "min_events": 2}},
    "hash": {"user": {"rule": "hash", "buckets": 30}, "item": {"rule": "hash", "buckets": 40, "seed": 2**63 - 1}},
}
KNOWN_USERS, KNOWN_ITEMS = 50, 70  # of 60 and 80: the others first appear in the fine-tuning window
STRANGERS = np.array([1, 17, 2**62, -(2**60), 999_999])


def fill_pretraining_window(world: World) -> None:
    """Pairs and graph of the world's older users and items; the last five of each occur twice."""
    random = np.random.default_rng(0)
    user = np.concatenate([random.integers(0, KNOWN_USERS - 5, 900), np.arange(KNOWN_USERS - 5, KNOWN_USERS).repeat(2)])
    item = np.concatenate([random.integers(0, KNOWN_ITEMS - 5, 905), np.arange(KNOWN_ITEMS - 5, KNOWN_ITEMS)])
    moments = [DAY_ZERO + timedelta(days=int(day)) for day in random.integers(0, 31, len(user))]
    pairs = {"user": user + FIRST_USER, "item": item + FIRST_ITEM, "event_timestamp": pa.array(moments, TIMESTAMP)}
    pq.write_table(pa.table(pairs), world.run.pairs)
    latest_first = sorted(zip(user, item, moments, strict=True), key=lambda event: event[2], reverse=True)
    write_graph(
        world.run.graph, users=FIRST_USER + np.arange(KNOWN_USERS), items=FIRST_ITEM + np.arange(KNOWN_ITEMS),
        bought={(u, i): moment for u, i, moment in latest_first},  # the first one's time stays
    )


def write_graph(folder: Path, *, users: np.ndarray, items: np.ndarray, bought: dict) -> None:
    """bought (anchor, timed), beside (item to the next two items, timed), has_word (item to one of four words)."""
    pair = np.array(list(bought))
    beside = np.array([(i, (i + step) % len(items)) for i in range(len(items)) for step in (1, 2)])
    word = np.arange(len(items)) % 4
    counts = len(pair), len(beside), len(items)
    nodes = ["user"] * len(users) + ["item"] * len(items) + ["word"] * 4
    pq.write_table(
        pa.table({"type": nodes, "node": np.arange(len(nodes)), "id": np.concatenate([users, items, np.arange(4)])}),
        folder / "nodes.parquet",
    )
    pq.write_table(
        pa.table({
            "relation": pa.array(np.repeat([0, 1, 2], counts), pa.int32()),
            "head": np.concatenate([pair[:, 0], len(users) + beside[:, 0], len(users) + np.arange(len(items))]),
            "tail": len(users) + np.concatenate([pair[:, 1], beside[:, 1], len(items) + word]),
            "event_timestamp": pa.array(
                [*bought.values(), *([DAY_ZERO] * len(beside)), *([None] * len(items))], TIMESTAMP
            ),
            "weight": pa.array(np.ones(sum(counts)), pa.float32()),
        }),
        folder / "edges.parquet",
    )
    (folder / "relations.json").write_text(json.dumps([
        {"name": "bought", "head": "user", "tail": "item", "anchor": True},
        {"name": "beside", "head": "item", "tail": "item", "anchor": False},
        {"name": "has_word", "head": "item", "tail": "word", "anchor": False},
    ]))


def written(folder: Path, rules: dict) -> Path:
    path = folder / "config.yaml"
    path.write_text(SMALL + "".join(f"{entity}_ids: {json.dumps(values)}\n" for entity, values in rules.items()))
    return path


@pytest.fixture
def prepared(world: World) -> World:
    fill_pretraining_window(world)
    record_prepared(world.workspace, world.run)
    for facet in FACETS:
        for seed in range(2):
            for path in sorted(world.run.facet(facet, seed).iterdir()):
                path.unlink()
    return world


# ---- The configuration and the vocabulary ----------------------------------------------------------------------------


def test_by_default_every_id_keeps_its_own_row(tmp_path: Path) -> None:
    configs = load_ids()
    assert configs == {"user": IdsConfig(), "item": IdsConfig()}
    ids = RunIds.of(None, None, configs)  # reads nothing
    assert ids.stored("item", np.array([-9, 0, 2**62])).tolist() == [-9, 0, 2**62]
    assert ids.describe() == RunIds().describe()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rule": "modulo"}, "id rule"), ({"buckets": 3}, "buckets"), ({"rule": "hash"}, "buckets"),
        ({"rule": "hash", "buckets": 3, "min_events": 2}, "min_events"), ({"min_events": 2}, "min_events"),
        ({"rule": "vocabulary+buckets", "buckets": 3, "min_events": 0}, "min_events"),
        ({"rule": "hash", "buckets": 3, "seed": -1}, "seed"), ({"rule": "hash", "buckets": "many"}, "item_ids.buckets"),
        ({"bucket": 3}, "unknown key"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(tmp_path: Path, values: dict, message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        load_ids(written(tmp_path, {"item": values}))


def test_the_vocabulary_is_what_was_met_often_enough_in_the_pretraining_window(prepared: World) -> None:
    def vocabulary(entity: str, at_least: int) -> set[int]:
        config = IdsConfig("vocabulary+buckets", buckets=2, min_events=at_least)
        return set(RunIds.of(prepared.workspace, prepared.run, {entity: config}).vocabularies[entity].tolist())

    pairs = pq.read_table(prepared.run.pairs).to_pandas()
    for entity in ("user", "item"):
        counts = pairs[entity].value_counts()
        for at_least in (1, 2, 3, 10, 10_000):
            assert vocabulary(entity, at_least) == set(counts[counts >= at_least].index), (entity, at_least)


def test_what_only_the_graph_has_met_counts_too(tmp_path: Path) -> None:
    workspace, run = planted_run(tmp_path)
    nodes = pq.read_table(run.graph / "nodes.parquet").to_pandas()
    pairs = pq.read_table(run.pairs)
    item = nodes.id[nodes.type == "item"].iloc[0]
    pq.write_table(pairs.filter(pa.compute.not_equal(pairs["item"], item)), run.pairs)
    edges = pq.read_table(run.graph / "edges.parquet").to_pandas()
    bought = int(((edges.relation == 0) & (edges["tail"] == nodes.node[nodes.id == item].iloc[0])).sum())
    for at_least, known in ((bought, True), (bought + 1, False)):
        config = IdsConfig("vocabulary+buckets", buckets=2, min_events=at_least)
        assert (item in RunIds.of(workspace, run, {"item": config}).vocabularies["item"]) == known


def test_negative_ids_beside_buckets_and_unprepared_runs_are_refused(tmp_path: Path) -> None:
    workspace, run = planted_run(tmp_path)
    config = {"user": IdsConfig("vocabulary+buckets", buckets=2)}
    pairs = pq.read_table(run.pairs).to_pandas()
    pairs.loc[0, "user"] = -3
    pq.write_table(pa.Table.from_pandas(pairs, preserve_index=False), run.pairs)
    with pytest.raises(InvalidConfig, match="negative ones name buckets"):
        RunIds.of(workspace, run, config)
    run.pairs.unlink()
    with pytest.raises(NotPrepared, match="facet prepare --run v1"):
        RunIds.of(workspace, run, config)


# ---- Pretraining on stored ids ---------------------------------------------------------------------------------------


def test_pairs_of_one_bucket_are_one_entitys(tmp_path: Path) -> None:
    _, run = planted_run(tmp_path)
    ids = RunIds({"item": IdsConfig("hash", buckets=9)})
    plain, shared = Pairs.read(run.pairs, cut=None), Pairs.read(run.pairs, cut=None, ids=ids)
    assert shared.user_ids.tolist() == plain.user_ids.tolist() and len(shared.item) == len(plain.item)
    assert set(shared.item_ids) <= set(range(-9, 0))
    assert shared.item_ids[shared.item].tolist() == ids.stored("item", plain.item_ids[plain.item]).tolist()


@settings(max_examples=25, deadline=None)
@given(buckets=st.integers(1, 60), seed=st.integers(0, 2**63 - 1), users=st.booleans(), cut_day=st.integers(1, 40))
def test_a_graph_of_stored_ids_is_the_graph_with_its_nodes_renamed(tmp_path_factory, buckets, seed, users, cut_day):
    folder = tmp_path_factory.mktemp("graph")
    random = np.random.default_rng(buckets)
    bought = {(int(u), int(i)): DAY_ZERO + timedelta(days=int(d)) for u, i, d in random.integers(0, 15, (60, 3))}
    write_graph(folder, users=500 - np.arange(15), items=900 + 2 * np.arange(15), bought=bought)
    config = IdsConfig("hash", buckets, seed)
    ids = RunIds({"item": config} | ({"user": config} if users else {}))
    cut = DAY_ZERO + timedelta(days=cut_day)

    def named(graph: Graph, relation, head, tail, rename) -> list:
        names = [
            (kind, int(node)) for kind, (begin, end) in graph.ranges.items()
            for node in (ids.stored(kind, graph.ids[begin:end]) if rename else graph.ids[begin:end])
        ]
        return [(r, names[h], names[t]) for r, h, t in zip(relation, head, tail, strict=True)]

    plain, shared = Graph.read(folder, cut=cut), Graph.read(folder, cut=cut, ids=ids)
    edges = named(plain, plain.relation, plain.head, plain.tail, True)
    got = named(shared, shared.relation, shared.head, shared.tail, False)
    assert len(got) == len(set(got)) and set(got) == {edge for edge in edges if edge[1] != edge[2]}
    # what is held out is new: no edge to train on became equal to it
    held = named(shared, shared.held_relation, shared.held_head, shared.held_tail, False)
    late = named(plain, plain.held_relation, plain.held_head, plain.held_tail, True)
    assert not set(held) & set(got) and {e for e in late if e[1] != e[2]} - set(got) <= set(held)
    for kind, (begin, end) in shared.ranges.items():
        assert len(np.unique(shared.ids[begin:end])) == end - begin, kind
    quality = LinkPrediction(shared, edges=10, seed=0).by_degree()
    assert bool(quality) == bool(held) and all(0 < each["mrr"] <= 1 for each in quality.values())


# ---- From pretraining to the bytes that are served -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_every_id_is_served_the_row_it_was_trained_with(prepared: World, small, tmp_path: Path, name: str) -> None:
    world, config = prepared, written(tmp_path, RULES[name])
    configs = load_ids(config)
    ids = RunIds.of(world.workspace, world.run, configs)
    for facet in FACETS:
        directory = pretrain_facet(world.workspace, facet, run="v1", seed=0, config=config)
        assert json.loads((directory / "metrics.json").read_text())["config"]["ids"] == ids.describe()
        for entity in ("user", "item"):
            rows = load_file(directory / f"{entity}.safetensors")["ids"]
            assert (ids.stored(entity, rows) == rows).all() and (np.diff(rows) > 0).all()

    trained = finetune(
        world.workspace, world.run, arm="both", seed=0, config=replace(small, epochs=1), options=TableOptions(),
        id_configs=configs,
    )
    metrics = quantize(world.workspace, world.run, arm="both", seed=0, to="int4")
    manifest = publish(world.workspace, world.run.ranker("both", 0) / "int4")

    ranker = TrainedRanker.load(world.run.ranker("both", 0))
    folds = load_folds(world.workspace, world.run)
    test, offline, served = folds["test"], OfflineVersion(world.workspace, manifest.version), {}
    for spec in manifest.tables:
        table, wanted = ranker.tables[spec.name], RULES[name].get(spec.entity, {})
        assert spec.rule == table.rule == configs[spec.entity].id_rule == trained.tables[spec.name].rule
        assert (spec.buckets, spec.rows) == (wanted.get("buckets", 0), len(table.ids))
        assert table.ids[: spec.buckets].tolist() == spec.rule.all_bucket_ids().tolist()

        segment = materialized(world, manifest, spec)
        asked = np.concatenate([table.ids, getattr(test, spec.entity), STRANGERS])
        stored = spec.rule.stored_ids(asked, vocabulary=table.ids[spec.buckets :])
        place = np.searchsorted(table.ids, stored).clip(max=len(table.ids) - 1)
        known = table.ids[place] == stored
        expected = np.where(known[:, None], table.weight[place], table.default)
        rows, found = segment.lookup(asked)
        assert (found == known).all() and found.all() == bool(spec.buckets)
        np.testing.assert_array_equal(rows, codec("int4").encode(expected))
        np.testing.assert_array_equal(offline.rows(spec, asked), codec("int4").decode(rows, spec.dim))
        # what was fine-tuned shares rows as it did in pretraining
        met = getattr(folds["finetune"], spec.entity)
        stored = spec.rule.stored_ids(met, vocabulary=table.ids[spec.buckets :])
        np.testing.assert_array_equal(stored, ids.stored(spec.entity, met))
        served[spec.name] = segment

    # the trainer's figures are those of what is served, new and rare ids included
    auc = aucs_by_lookup(served, ranker, test)
    assert auc == metrics["auc"]["quantized"]
    again = score(ranker.tables, ranker.upper, test)
    np.testing.assert_array_equal(again, score(trained.tables, trained.upper, test))


def materialized(world: World, manifest: Manifest, spec) -> Segment:
    directory = world.workspace.segment(manifest.version, spec.name)
    with pq.ParquetFile(world.workspace.versions.path(manifest.version) / manifest.table_path(spec.name)) as file:
        write_segment(
            directory, spec=spec, version=manifest.version, manifest_sha256=manifest.sha256,
            batches=file.iter_batches(7, columns=["id", "row"]),
        )
    return Segment.open(directory)


def aucs_by_lookup(served: dict[str, Segment], ranker: TrainedRanker, fold) -> dict[str, float]:
    """ROC-AUC by task of rows as a ranker host would fetch them."""
    import torch

    from training.ranker.metrics import task_aucs

    rows = {}
    for name, segment in served.items():
        packed, _ = segment.lookup(fold.user if name.startswith("user") else fold.item)
        rows[name] = torch.from_numpy(codec("int4").decode(packed, segment.spec.dim))
    with torch.inference_mode():
        scores = torch.sigmoid(ranker.upper(rows, torch.from_numpy(fold.context))).numpy()
    return task_aucs(("click", "convert"), fold.labels, scores)


@pytest.mark.slow
def test_a_bucket_that_nothing_fell_into_is_the_default_row_and_the_others_are_not(prepared, small, tmp_path) -> None:
    config = written(tmp_path, RULES["vocabulary+buckets"])
    for facet in FACETS:
        pretrain_facet(prepared.workspace, facet, run="v1", seed=0, config=config)
    ids = RunIds.of(prepared.workspace, prepared.run, load_ids(config))
    seen = load_folds(prepared.workspace, prepared.run)["finetune"].item
    met = set(ids.stored("item", seen).tolist())
    for arm in ("both", "scratch"):
        ranker = finetune(
            prepared.workspace, prepared.run, arm=arm, seed=0, config=replace(small, epochs=1), options=TableOptions(),
            id_configs=load_ids(config),
        )
        for facet in FACETS:
            table = ranker.tables[f"item.{facet}"]
            pretrained = load_file(prepared.run.facet(facet, 0) / "item.safetensors")["ids"].tolist()
            learned = met | (set(pretrained) if arm == "both" else set())
            buckets = table.ids[:300].tolist()
            assert any(bucket in learned for bucket in buckets) and any(bucket not in learned for bucket in buckets)
            for bucket, row in zip(buckets, table.weight[:300], strict=True):
                assert (row == table.default).all() == (bucket not in learned), (arm, facet, bucket)


# ---- Facets of other ids ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_facet_of_other_ids_is_refused(prepared: World, small, tmp_path: Path) -> None:
    rules = RULES["vocabulary+buckets"]
    config = written(tmp_path, rules)
    for facet in FACETS:
        pretrain_facet(prepared.workspace, facet, run="v1", seed=0, config=config)

    def run_with(changed: dict):
        return finetune(
            prepared.workspace, prepared.run, arm="both", seed=0, config=replace(small, epochs=1),
            options=TableOptions(), id_configs=load_ids(written(tmp_path, changed)),
        )

    others = [
        {}, RULES["hash"], rules | {"item": rules["item"] | {"seed": 4}},
        rules | {"user": rules["user"] | {"buckets": 5}}, rules | {"item": rules["item"] | {"min_events": 1}},
    ]
    for changed in others:
        refusal = r"another configuration.*got setting ids\.(user|item)\..*facet pretrain {} --run v1 --seed 0 --force"
        with pytest.raises(StaleInput, match=refusal.format("contrastive")):
            run_with(changed)
        with pytest.raises(StaleInput, match=refusal.format("kge")):
            pretrain_facet(prepared.workspace, "kge", run="v1", seed=0, config=written(tmp_path, changed))
    first = run_with(rules)

    # the same rule over another vocabulary: the run was prepared again from more events
    pairs = pq.read_table(prepared.run.pairs)
    pq.write_table(pa.concat_tables([pairs, pairs.slice(len(pairs) - 10)]), prepared.run.pairs)
    record_again(prepared.run.pairs)
    anew = r"setting vocabularies\..*; pairs of run v1\. Run `facet pretrain contrastive"
    with pytest.raises(StaleInput, match=anew):
        run_with(rules)
    pq.write_table(pairs, prepared.run.pairs)
    record_again(prepared.run.pairs)
    assert run_with(rules).metrics == first.metrics  # nothing was trained again


# ---- Tables ----------------------------------------------------------------------------------------------------------


@given(
    own=st.lists(st.integers(0, 2**63 - 1), max_size=20), asked=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20),
    name=st.sampled_from(["vocabulary", "vocabulary+buckets", "hash"]), buckets=st.integers(1, 9),
)
def test_an_id_reads_the_row_of_its_stored_id(own, asked, name, buckets) -> None:
    rule = IdRule(name, buckets=0 if name == "vocabulary" else buckets, seed=5)
    own = np.array([] if name == "hash" else own, np.int64)
    vocabulary = Vocabulary(own, rule)
    assert len(vocabulary.ids) == len(np.unique(own)) + rule.buckets == vocabulary.table_rows - 1
    ids = np.array([*own, *asked], np.int64)
    stored = rule.stored_ids(ids, vocabulary=np.unique(own))
    rows = vocabulary.rows(ids)
    assert [int(vocabulary.ids[row - 1]) if row != DEFAULT_ROW else None for row in rows] == [
        int(s) if s in vocabulary.ids else None for s in stored
    ]
    assert not rule.has_buckets or (rows != DEFAULT_ROW).all()


def test_a_table_without_a_row_for_each_bucket_is_refused() -> None:
    rule, weight = IdRule("vocabulary+buckets", buckets=2), np.zeros((3, 4), np.float32)
    RankerTable(np.array([-2, -1, 7]), weight, weight[0], rule)
    for ids in ([-1, 6, 7], [-3, -2, -1], [5, 6, 7]):
        with pytest.raises(InvalidTable, match="2 hash buckets"):
            RankerTable(np.array(ids), weight, weight[0], rule)
