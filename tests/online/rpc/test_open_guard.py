"""Health and reflection: open to everybody, and limited as all else."""

from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2_grpc

from online.rpc.limits import Limits
from tests.online.rpc.test_guard import HEALTH, NEVER_S, REFLECTION, WAIT_S, code_of, served, silence
from tests.waiting import until

WRONG = {"MALFORMED_REQUEST": b"\x0a\xff", "BATCH_TOO_LARGE": b"\x7a\x00" * 257}


def test_of_health_only_the_check_is_offered() -> None:
    """A client that watches and does not read could delay a change of health."""
    with served() as (_, _, channel):
        assert code_of(channel.unary_unary(HEALTH).future(b"", timeout=WAIT_S)) == "OK"
        watched = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
        with pytest.raises(grpc.RpcError) as caught:
            next(watched)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        listed = health_pb2_grpc.HealthStub(channel).List.future(health_pb2.HealthListRequest(), timeout=WAIT_S)
        assert code_of(listed) == "UNIMPLEMENTED"


@pytest.mark.parametrize("code", WRONG)
def test_messages_are_counted_before_they_are_parsed(code: str) -> None:
    with served() as (_, _, channel):
        for method in (HEALTH, REFLECTION):
            call = channel.stream_stream(method)(iter([WRONG[code]]), timeout=WAIT_S)
            with pytest.raises(grpc.RpcError) as caught:
                next(call)
            assert dict(caught.value.trailing_metadata())["facet-error"] == code


def test_a_stream_ends_when_its_time_is_over() -> None:
    with served(limits=Limits(call_s=0.2)) as (_, endpoint, channel), silence() as over:

        def nothing() -> Iterator:
            over.wait(NEVER_S)
            return
            yield

        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(nothing(), timeout=WAIT_S)
        until(lambda: len(endpoint.waiting) == 1)
        with pytest.raises(grpc.RpcError) as caught:
            next(call)
        assert dict(caught.value.trailing_metadata())["facet-error"] == "DEADLINE"
