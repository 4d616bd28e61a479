"""The rows client: replicas, bounded retries, and answers that do not fit the question."""

import time

import numpy as np
import pytest

from online.client import LookupClient, _rows_of, open_channel
from online.proto.lookup_pb2 import LookupRequest, LookupResponse, TableIds, TableRows
from online.refusal import Code, Refusal
from online.server import Endpoint
from pipelines.contracts.errors import InvalidConfig

IDS = {"item.kge": np.array([1, 2])}


def answer_of(version: int, *tables: TableRows) -> LookupResponse:
    return LookupResponse(version=version, tables=tables)


def closed_port() -> str:
    endpoint = Endpoint("gone", "127.0.0.1", 0, 1)
    endpoint.stop().wait()
    return f"127.0.0.1:{endpoint.port}"


def test_a_dead_replica_is_passed_over(workspace_with_versions, host_cpu_tier) -> None:
    tier = host_cpu_tier(workspace_with_versions.workspace, (1,))
    client = LookupClient([closed_port(), tier.address], timeout_s=30.0)
    assert [client.lookup([1], IDS).version for _ in range(6)] == [1] * 6
    client.close()


def test_with_no_host_it_gives_up_within_the_deadline() -> None:
    client = LookupClient([closed_port()], timeout_s=0.5)
    began = time.monotonic()
    with pytest.raises(Refusal) as caught:
        client.lookup([1], IDS)
    assert caught.value.code in (Code.LOOKUP_UNAVAILABLE, Code.DEADLINE)
    assert time.monotonic() - began < 3
    client.close()


def test_a_refusal_is_final(workspace_with_versions, host_cpu_tier) -> None:
    tier = host_cpu_tier(workspace_with_versions.workspace, (1,))
    client = LookupClient([tier.address])
    with pytest.raises(Refusal) as caught:
        client.lookup([5], IDS)
    assert caught.value.code is Code.VERSION_NOT_AVAILABLE and caught.value.versions == (1,)
    client.close()


@pytest.mark.parametrize("address", ["localhost", ":80", "host:", "host:port", ""])
def test_an_address_needs_host_and_port(address) -> None:
    with pytest.raises(InvalidConfig, match="host:port"):
        open_channel(address)


@pytest.mark.parametrize(
    "answer",
    [
        answer_of(2, TableRows(name="t", row_bytes=1, rows=b"x", found=b"\1")),
        answer_of(1, TableRows(name="u", row_bytes=1, rows=b"x", found=b"\1")),
        answer_of(1, TableRows(name="t", row_bytes=2, rows=b"x", found=b"\1")),
        answer_of(1, TableRows(name="t", row_bytes=1)),
        answer_of(1),
    ],
    ids=["version not accepted", "another table", "another width", "fewer rows", "no table"],
)
def test_an_answer_that_does_not_fit_is_never_used(answer) -> None:
    request = LookupRequest(accepted_versions=[1], tables=[TableIds(name="t", ids=bytes(8))])
    with pytest.raises(Refusal) as caught:
        _rows_of(answer, request)
    assert caught.value.code is Code.VERSION_MISMATCH
