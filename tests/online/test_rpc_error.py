"""Errors across a real channel: codes, versions and sentences arrive; a defect is INTERNAL and tells no secrets."""

import grpc
import pytest

from online.proto import lookup_pb2, lookup_pb2_grpc
from online.rpc.channel import open_channel
from online.rpc.server import Endpoint
from online.rpc_error import Code, RpcError, rpc_error_from
from pipelines.contracts.errors import FacetError, IntegrityError, VersionNotFound

WORDS = {"expected": "this", "got": "that", "remedy": "Do it."}


@pytest.fixture(scope="module")
def failing():
    """Call with an exception: the refusal a client sees when a server's method raises it."""
    raised: list[Exception] = []

    class Failing(lookup_pb2_grpc.LookupServicer):
        def Lookup(self, request, context):
            raise raised.pop()

    endpoint = Endpoint("failing", "127.0.0.1", 0, 1)
    lookup_pb2_grpc.add_LookupServicer_to_server(Failing(), endpoint.server)
    endpoint.start()

    def fail(error: Exception) -> RpcError:
        raised.append(error)
        with open_channel(f"127.0.0.1:{endpoint.port}") as channel, pytest.raises(grpc.RpcError) as caught:
            lookup_pb2_grpc.LookupStub(channel).Lookup(lookup_pb2.LookupRequest(request_id="r1"), timeout=5)
        return rpc_error_from(caught.value, "the server")

    yield fail
    endpoint.stop().wait()


@pytest.mark.parametrize("code", Code)
def test_every_code_arrives_with_its_status_and_versions(failing, code) -> None:
    refusal = failing(RpcError(code, "größe", versions=(3, 11), **WORDS))
    assert (refusal.code, refusal.status, refusal.versions) == (code, code.status, (3, 11))
    assert "größe: expected this, got that. Do it." in str(refusal)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (IntegrityError("file", **WORDS), Code.INTEGRITY),
        (VersionNotFound("version 9", **WORDS), Code.VERSION_NOT_PUBLISHED),
        (FacetError("something", **WORDS), Code.INTERNAL),
    ],
    ids=lambda value: type(value).__name__,
)
def test_our_errors_have_codes(failing, error, code) -> None:
    refusal = failing(error)
    assert refusal.code is code and error.problem in str(refusal)


def test_a_defect_is_internal_and_names_only_the_request(failing, caplog) -> None:
    refusal = failing(ZeroDivisionError("secret"))
    assert refusal.code is Code.INTERNAL and "r1" in str(refusal) and "secret" not in str(refusal)
    assert "secret" in caplog.text  # the server's own log has it
