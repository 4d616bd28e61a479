"""Errors across a real channel: codes, versions and sentences arrive; a defect is INTERNAL and tells no secrets."""

import grpc
import pytest

from online.observe import request_log
from online.proto import lookup_pb2, lookup_pb2_grpc
from online.rpc.channel import open_channel
from online.rpc.server import Endpoint
from online.rpc_error import Code, RpcError, rpc_error_from
from pipelines.contracts.errors import FacetError, IntegrityError, VersionNotFound
from tests.grpc_server import grpc_server
from tests.waiting import PATIENCE_S

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
        return refusal_of(f"127.0.0.1:{endpoint.port}")

    yield fail
    assert endpoint.stop().wait(PATIENCE_S)


def refusal_of(address: str) -> RpcError:
    with open_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
        lookup_pb2_grpc.LookupStub(channel).Lookup(lookup_pb2.LookupRequest(request_id="r1"), timeout=PATIENCE_S)
    return rpc_error_from(caught.value, "the server")


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


def test_a_defect_that_is_met_again_and_again_is_told_each_time_and_does_not_fill_the_log(
    failing, caplog, monkeypatch
) -> None:
    monkeypatch.setattr(request_log, "_settings", request_log._Settings(lambda: 0.0))
    refusals = [failing(ZeroDivisionError("secret")) for _ in range(30)]
    assert {(refusal.code, "r1" in str(refusal)) for refusal in refusals} == {(Code.INTERNAL, True)}
    assert caplog.text.count("Traceback") == request_log.TRACES_PER_MINUTE
    assert len(caplog.records) == request_log.TRACES_PER_MINUTE


@pytest.fixture(scope="module")
def refusing():
    """Call with trailing metadata and more: the refusal a client sees."""
    said: list[tuple[grpc.StatusCode, str, tuple]] = []

    class Refusing(lookup_pb2_grpc.LookupServicer):
        def Lookup(self, request, context):
            status, details, metadata = said.pop()
            context.set_trailing_metadata(metadata)
            context.abort(status, details)

    with grpc_server(lambda server: lookup_pb2_grpc.add_LookupServicer_to_server(Refusing(), server)) as address:

        def refuse(*metadata, status=grpc.StatusCode.FAILED_PRECONDITION, details="no") -> RpcError:
            said.append((status, details, metadata))
            return refusal_of(address)

        yield refuse


KNOWN = ("facet-error", "VERSION_NOT_AVAILABLE")


@pytest.mark.parametrize(
    "versions",
    [
        "1,x", "1,", ",1", ",", "-1", "0", "01", "1 2", "1, 2", "+1", "1_0", "1e3", "9" * 5000, str(2**63),
        ",".join(["1"] * 2000) + ",", "0x1",
    ],
    ids=lambda versions: versions[:12],
)
def test_versions_that_are_none_are_a_typed_error(refusing, versions) -> None:
    refusal = refusing(KNOWN, ("facet-versions", versions))
    assert (refusal.code, refusal.versions) == (Code.INTERNAL, ())
    assert refusal.status is grpc.StatusCode.FAILED_PRECONDITION and "facet-versions" in str(refusal)
    assert repr(versions[:64])[1:-1] in str(refusal) and "beside: no" in str(refusal) and len(str(refusal)) < 500


class Said(grpc.RpcError):
    """What gRPC's own server does not send."""

    def __init__(self, *metadata: tuple[str, str | bytes]) -> None:
        self.metadata = metadata

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.FAILED_PRECONDITION

    def details(self) -> str:
        return "no"

    def trailing_metadata(self) -> tuple:
        return self.metadata


@pytest.mark.parametrize("versions", ["\u0661", "1\u0661", "\xff", b"1", b"\xff", "9" * 10**6, "1\n"])
def test_versions_of_no_header_are_a_typed_error(versions) -> None:
    refusal = rpc_error_from(Said(KNOWN, ("facet-versions", versions)), "the server")
    assert (refusal.code, refusal.versions) == (Code.INTERNAL, ()) and len(str(refusal)) < 500
    assert str(refusal).isprintable()


def test_the_largest_versions_are_read(refusing) -> None:
    assert refusing(KNOWN, ("facet-versions", f"1,{2**63 - 1}")).versions == (1, 2**63 - 1)
    assert refusing(KNOWN, ("facet-versions", "")).versions == refusing(KNOWN).versions == ()


@pytest.mark.parametrize("name", ["NOT_A_CODE", "", "OVERLOADED,DEADLINE", "__class__", "x" * 5000])
def test_a_code_that_is_unknown_is_what_its_status_means(refusing, name) -> None:
    assert refusing(("facet-error", name)).code is Code.INTERNAL
    assert refusing(("facet-error", name), status=grpc.StatusCode.UNAVAILABLE).code is Code.LOOKUP_UNAVAILABLE
    assert rpc_error_from(Said(("facet-error", name.encode())), "the server").code is Code.INTERNAL


@pytest.mark.parametrize(
    ("status", "details", "code"),
    [
        (grpc.StatusCode.UNAVAILABLE, "", Code.LOOKUP_UNAVAILABLE),
        (grpc.StatusCode.CANCELLED, "", Code.LOOKUP_UNAVAILABLE),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "", Code.DEADLINE),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "", Code.OVERLOADED),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max", Code.BATCH_TOO_LARGE),
        (grpc.StatusCode.UNIMPLEMENTED, "", Code.INTERNAL),
    ],
)
def test_without_a_code_the_status_says_why(refusing, status, details, code) -> None:
    refusal = refusing(status=status, details=details)
    assert (refusal.code, refusal.status) == (code, status)


def test_what_a_server_says_is_one_line_and_bounded(refusing) -> None:
    refusal = refusing(details="a\nb\x1b[2J größe" + "x" * 3000)
    assert "a\\nb\\x1b[2J größe" in str(refusal) and str(refusal).isprintable() and len(str(refusal)) < 1700


def test_only_what_is_wrong_with_a_request_is_to_be_corrected_there(refusing) -> None:
    remedies = {code: refusing(("facet-error", code.name)).remedy for code in Code}
    assert {code for code, remedy in remedies.items() if remedy == "Correct the request."} == {
        Code.TABLE_UNKNOWN, Code.NO_ACCEPTED_VERSIONS, Code.NO_TABLES, Code.MALFORMED_REQUEST, Code.MALFORMED_IDS,
        Code.INVALID_TIME, Code.INVALID_SHARE, Code.NO_DEADLINE,
    }  # fmt: skip
