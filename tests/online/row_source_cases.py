"""What every source of rows must do for a ranker. Each implementation inherits the cases and says how it is made."""

import zlib
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from online.lookup.hosted import HostedVersions
from online.lookup.row_source import RowSource, VersionRows
from online.rpc_error import Code, RpcError
from tests.releases import DIMS, FeastRepository, published_rows
from tests.waiting import until

__all__ = ["RowSourceCases"]

VERSIONS = (1, 2)
ONE = np.array([1], np.int64)


class RowSourceCases(ABC):
    """Cases over a source of versions 1, which is preferred, and 2 of `workspace_with_versions`."""

    @abstractmethod
    def open(self, repository: FeastRepository, host_cpu_tier: Any) -> tuple[RowSource, list[HostedVersions]]:
        """A source, and what the hosts behind it hold: versions 1 and 2, of which 1 is preferred."""

    @pytest.fixture(autouse=True)
    def _opened(self, workspace_with_versions: FeastRepository, host_cpu_tier: Any) -> Any:
        self.repository = workspace_with_versions
        self.source, self.hosts = self.open(workspace_with_versions, host_cpu_tier)
        yield
        self.source.close()

    def change(self, name: str, *arguments: Any) -> None:
        """What a rollout does to every host."""
        for hosted in self.hosts:
            getattr(hosted, name)(*arguments)

    def read(self, accepted: Any, ids: dict[str, Any], **options: Any) -> VersionRows:
        return self.source.start(accepted, ids, **options).result()

    def refused(self, accepted: Any, ids: dict[str, Any]) -> RpcError:
        pending = self.source.start(accepted, ids)  # must not raise: who starts a lookup is about to do something else
        with pytest.raises(RpcError) as caught:
            pending.result()
        return caught.value

    def truth(self, version: int, table: str) -> dict[int, bytes]:
        ids, rows = published_rows(self.repository.workspace, version, table)
        return {int(key): row.tobytes() for key, row in zip(ids, rows, strict=True)}

    def check(self, answer: VersionRows, ids: dict[str, Any]) -> None:
        """Every row is what was published for its id under the version that is named."""
        manifest = self.repository.workspace.versions.manifest(answer.version)
        assert answer.manifest_sha256 == manifest.sha256
        assert set(answer.rows) == set(answer.found) == set(ids)
        for table, asked in ids.items():
            rows, found, truth = answer.rows[table], answer.found[table], self.truth(answer.version, table)
            spec = manifest.table(table)
            assert rows.dtype == np.uint8 and rows.shape == (len(asked), spec.row_bytes) and found.dtype == np.bool_
            assert found.tolist() == [int(id_) in truth for id_ in asked]
            assert [row.tobytes() for row in rows] == [truth.get(int(id_), spec.default_row_bytes) for id_ in asked]

    @pytest.mark.parametrize("version", VERSIONS)
    def test_every_published_row_of_every_table(self, version: int) -> None:
        ids = {table: np.array(list(self.truth(version, table))) for table in DIMS}
        answer = self.read([version], ids)
        assert answer.version == version
        self.check(answer, ids)

    # one test, inherited: hypothesis would otherwise warn that several classes run it
    @settings(
        max_examples=15,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
    )
    @given(st.data())
    def test_order_repeats_strangers_and_no_ids(self, data: st.DataObject) -> None:
        known = list(self.truth(1, "user.kge"))
        batch = st.lists(st.sampled_from(known) | st.integers(-(2**63), 2**63 - 1), max_size=20)
        ids = {table: np.array(data.draw(batch), np.int64) for table in ("user.kge", "item.kge", "user.contrastive")}
        self.check(self.read(VERSIONS, ids), ids)

    def test_ids_of_any_layout(self) -> None:
        known = np.array(list(self.truth(1, "item.kge")))
        for ids in (known[::-2], known.astype(">i8"), np.lib.stride_tricks.as_strided(known, (5,), (0,))):
            self.check(self.read([1], {"item.kge": ids}), {"item.kge": ids})

    def test_the_preferred_of_the_accepted_versions_answers(self) -> None:
        ids = {"item.kge": ONE}
        assert self.read(VERSIONS, ids).version == 1
        assert self.read([2], ids).version == self.read([77, 2], ids).version == 2
        self.change("promote", 2)
        assert self.read(VERSIONS, ids).version == 2 and self.read([1], ids).version == 1

    def test_the_request_id_decides_what_a_canary_answers(self) -> None:
        self.change("promote", 2, 0.4)
        ids = {"item.kge": np.arange(20)}
        for number in range(40):
            name = f"request-{number}"
            assert self.read(VERSIONS, ids, request_id=name).version == (
                2 if zlib.crc32(name.encode()) / 2**32 < 0.4 else 1
            )
        assert {self.read(VERSIONS, ids).version for _ in range(100)} == {1, 2}  # names of its own are as good

    def test_a_drained_version_answers_nothing_new(self) -> None:
        self.change("drain", 1)
        assert self.read(VERSIONS, {"item.kge": ONE}).version == 2
        refusal = self.refused([1], {"item.kge": ONE})
        assert refusal.code is Code.VERSION_NOT_AVAILABLE and refusal.versions == (2,)
        self.change("unload", 1)
        assert self.refused([1], {"item.kge": ONE}).code is Code.VERSION_NOT_AVAILABLE

    @pytest.mark.parametrize(
        ("accepted", "ids", "code"),
        [
            ([3], {"item.kge": ONE}, Code.VERSION_NOT_AVAILABLE),
            ([1], {"pin.kge": ONE}, Code.TABLE_UNKNOWN),
            ([1], {"item.kge": np.arange(9), "pin.kge": np.empty(0, np.int64)}, Code.TABLE_UNKNOWN),
            ([1], {"pin.kge": np.empty(0, np.int64)}, Code.TABLE_UNKNOWN),
            ([], {"item.kge": ONE}, Code.NO_ACCEPTED_VERSIONS),
            ([1], {}, Code.NO_TABLES),
        ],
        ids=["version", "table", "table without ids beside another", "table without ids", "no version", "no table"],
    )
    def test_refusals(self, accepted: list[int], ids: dict[str, np.ndarray], code: Code) -> None:
        assert self.refused(accepted, ids).code is code

    def test_tables_that_only_some_versions_have(self) -> None:
        """The choice of the version is the host's; then only that version's tables are looked up."""
        ids = {table: np.array([*self.truth(1, table)][:30]) for table in ("user.kge", "item.kge", "item.contrastive")}
        only = {"user.kge": (1,), "item.contrastive": (2, 7), "of.no_version": (9,)}
        asked = {**ids, "of.no_version": ONE}
        for version, there in ((1, ("user.kge", "item.kge")), (2, ("item.kge", "item.contrastive"))):
            self.change("promote", version)
            answer = self.read(VERSIONS, asked, only=only)
            assert answer.version == version and list(answer.rows) == list(there)
            self.check(answer, {table: ids[table] for table in there})
        answer = self.read([2], {"user.kge": ONE}, only={"user.kge": (1,)})
        assert (answer.version, answer.rows, answer.found) == (2, {}, {})

    def test_threads_get_one_version_each_while_hosts_are_promoted_one_by_one(self) -> None:
        ids = {table: np.array([*self.truth(1, table)][:30]) for table in ("user.kge", "item.kge")}
        answers: list[VersionRows] = []

        def read() -> None:
            for _ in range(40):
                answers.append(self.read(VERSIONS, ids))

        with ThreadPoolExecutor(3) as pool:
            reading = [pool.submit(read) for _ in range(3)]

            def moved_on(before: int) -> bool:
                return len(answers) > before or all(future.done() for future in reading)

            while not all(future.done() for future in reading):
                for version in (2, 1):
                    for hosted in self.hosts:
                        hosted.promote(version)
                        until(partial(moved_on, len(answers)))
            for future in reading:
                future.result()
        assert len(answers) == 120
        for answer in answers[:: 5]:
            self.check(answer, ids)
        wanted = {
            (version, table): b"".join(self.truth(version, table)[int(id_)] for id_ in ids[table])
            for version in VERSIONS for table in ids
        }
        for answer in answers:
            assert all(answer.rows[table].tobytes() == wanted[answer.version, table] for table in ids)
