"""Rows from segments mapped in the ranker's own process."""

from typing import Any

from online.lookup.hosted import HostedVersions
from online.lookup.reader import VersionReader
from online.lookup.same_host import SameHostRows
from tests.online.row_source_cases import ONE, RowSourceCases
from tests.releases import FeastRepository


def hosted_versions(repository: FeastRepository) -> HostedVersions:
    hosted = HostedVersions(lambda version: VersionReader.open(repository.workspace, version))
    for version in (1, 2):
        hosted.load(version)
    hosted.promote(1)
    return hosted


class TestSameHostRows(RowSourceCases):
    def open(self, repository: FeastRepository, host_cpu_tier: Any) -> tuple[SameHostRows, list[HostedVersions]]:
        hosted = hosted_versions(repository)
        return SameHostRows(hosted), [hosted]


def test_answers_are_counted_and_none_stays_in_flight(workspace_with_versions) -> None:
    hosted = hosted_versions(workspace_with_versions)
    source = SameHostRows(hosted)
    pending = source.start([1], {"item.kge": ONE})  # at once: there is nothing to overlap
    source.start([1], {"item.kge": ONE, "pin.kge": ONE})
    (first, second) = hosted.status().versions
    assert (first.answered, first.in_flight, second.answered) == (1, 0, 0)
    hosted.drain(1)
    hosted.unload(1)
    assert len(pending.result().rows["item.kge"]) == 1  # rows are the caller's own
