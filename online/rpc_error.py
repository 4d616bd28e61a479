"""Errors that cross the wire: a gRPC status, a code a program can act on, and a sentence for a person."""

import re
from enum import Enum
from typing import NoReturn

import grpc
import grpc.aio

from online.printable import one_line, printable, shortened
from pipelines.contracts.errors import FacetError, IntegrityError, NotPrepared, Unavailable, VersionNotFound

__all__ = ["Code", "RpcError", "abort", "as_rpc_error", "rpc_error_from", "rpc_error_of"]

CODE_KEY, VERSIONS_KEY = "facet-error", "facet-versions"


class Code(Enum):
    """Machine-readable reasons, sent as trailing metadata `facet-error`, each with its gRPC status."""

    VERSION_NOT_AVAILABLE = grpc.StatusCode.FAILED_PRECONDITION
    TABLE_UNKNOWN = grpc.StatusCode.NOT_FOUND
    NO_ACCEPTED_VERSIONS = grpc.StatusCode.INVALID_ARGUMENT
    NO_TABLES = grpc.StatusCode.INVALID_ARGUMENT
    MALFORMED_REQUEST = grpc.StatusCode.INVALID_ARGUMENT
    MALFORMED_IDS = grpc.StatusCode.INVALID_ARGUMENT
    BATCH_TOO_LARGE = grpc.StatusCode.INVALID_ARGUMENT
    INVALID_TIME = grpc.StatusCode.INVALID_ARGUMENT
    INVALID_SHARE = grpc.StatusCode.INVALID_ARGUMENT
    NO_DEADLINE = grpc.StatusCode.INVALID_ARGUMENT
    WRONG_SHARD = grpc.StatusCode.FAILED_PRECONDITION
    OVERLOADED = grpc.StatusCode.RESOURCE_EXHAUSTED
    NOT_AUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
    NOT_ALLOWED = grpc.StatusCode.PERMISSION_DENIED
    LOOKUP_UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
    DEADLINE = grpc.StatusCode.DEADLINE_EXCEEDED
    VERSION_MISMATCH = grpc.StatusCode.INTERNAL
    VERSION_NOT_PUBLISHED = grpc.StatusCode.NOT_FOUND
    VERSION_NOT_LOADED = grpc.StatusCode.FAILED_PRECONDITION
    LAST_VERSION = grpc.StatusCode.FAILED_PRECONDITION
    STILL_ANSWERING = grpc.StatusCode.FAILED_PRECONDITION
    IN_FLIGHT = grpc.StatusCode.FAILED_PRECONDITION
    INTEGRITY = grpc.StatusCode.DATA_LOSS
    INTERNAL = grpc.StatusCode.INTERNAL

    # Several codes share a status, which an Enum would otherwise take for one member under many names.
    def __new__(cls, status: grpc.StatusCode) -> "Code":
        member = object.__new__(cls)
        member._value_ = len(cls.__members__)
        member.status = status
        return member


class RpcError(FacetError):
    """A request that a server did not answer.

    Attributes:
        code: why, for programs.
        versions: versions that could have answered, where that is the question; or the one that could not be read.
        status: gRPC status; the code's own, unless the transport itself failed.
    """

    def __init__(
        self, code: Code, problem: str, *, expected: str, got: str, remedy: str, versions: tuple[int, ...] = (),
        status: grpc.StatusCode | None = None,
    ) -> None:
        super().__init__(problem, expected=expected, got=got, remedy=remedy)
        self.code, self.versions, self.status = code, versions, status or code.status


def rpc_error_of(error: Exception, named: str) -> RpcError:
    """What a client is told of any error: a defect is INTERNAL, and its own words stay here.

    Args:
        named: the request.
    """
    if isinstance(error, FacetError):
        return as_rpc_error(error)
    return RpcError(
        Code.INTERNAL, named, expected="an answer", got="a defect of the server",
        remedy="The server's log has the details, under this name or that of a request like it.",
    )


async def abort(context: grpc.aio.ServicerContext, error: RpcError) -> NoReturn:
    """End a call by an error's status and trailing metadata; raises what gRPC has a method end by."""
    trailing = ((CODE_KEY, error.code.name), (VERSIONS_KEY, ",".join(map(str, error.versions))))
    await context.abort(error.status, shortened(str(error)), trailing)


def as_rpc_error(error: FacetError) -> RpcError:
    """What a client is told of an error."""
    if isinstance(error, RpcError):
        return error
    code = Code.INTERNAL
    if isinstance(error, IntegrityError):
        code = Code.INTEGRITY
    elif isinstance(error, VersionNotFound | NotPrepared):
        code = Code.VERSION_NOT_PUBLISHED
    elif isinstance(error, Unavailable):
        code = Code.LOOKUP_UNAVAILABLE
    return RpcError(code, error.problem, expected=error.expected, got=error.got, remedy=error.remedy)


def rpc_error_from(error: grpc.RpcError, target: str) -> RpcError:
    """The refusal a client sees: a server's own code where it sent one, else what the transport's status means.

    What a server sent is bounded and made printable. Versions that are none make the refusal INTERNAL: whatever
    listens at `target` does not keep to the contract, so its code is not believed either.
    """
    metadata, status = dict(error.trailing_metadata() or ()), error.code()
    name, details = metadata.get(CODE_KEY), error.details() or "no details"
    if name in Code.__members__:
        code = Code[name]
    elif status in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):  # by a server that stops
        code = Code.LOOKUP_UNAVAILABLE
    elif status is grpc.StatusCode.DEADLINE_EXCEEDED:
        code = Code.DEADLINE
    elif status is grpc.StatusCode.RESOURCE_EXHAUSTED:  # gRPC's own limits, which say no more than this
        code = Code.BATCH_TOO_LARGE if "larger than max" in details else Code.OVERLOADED
    else:
        code = Code.INTERNAL
    expected, got = "an answer", one_line(details)
    try:
        versions = _versions(metadata.get(VERSIONS_KEY, ""))
    except ValueError:
        code, versions = Code.INTERNAL, ()
        expected = f"versions, separated by commas, as {VERSIONS_KEY} of its refusal"
        got = f"{printable(str(metadata[VERSIONS_KEY]))} beside: {got}"
    return RpcError(
        code, f"{target} did not answer ({status.name})", expected=expected, got=got,
        remedy=_REMEDIES.get(code, "Correct the request."), versions=versions, status=status,
    )


def _versions(text: str | bytes) -> tuple[int, ...]:
    """The versions that a server named; raises `ValueError` if these are none."""
    if not text:
        return ()
    if not isinstance(text, str) or not _VERSIONS.fullmatch(text):
        raise ValueError
    versions = tuple(map(int, text.split(",")))
    if max(versions) > MAX_VERSION:
        raise ValueError
    return versions


_VERSIONS = re.compile(r"[1-9][0-9]{0,18}(,[1-9][0-9]{0,18})*")  # [0-9]: \d and int() take digits of other scripts too
MAX_VERSION = 2**63 - 1  # int64 of the messages
_REMEDIES = {
    Code.BATCH_TOO_LARGE: "Split it over several requests.",
    Code.WRONG_SHARD: "Name every host with its own shard.",
    Code.OVERLOADED: "Ask another replica, or later.",
    Code.NOT_AUTHENTICATED: "Give a token that the server knows.",
    Code.NOT_ALLOWED: "Give a token of a role that may ask for this.",
    Code.LOOKUP_UNAVAILABLE: "Check that a server listens at that address.",
    Code.DEADLINE: "Check the server's load, or allow it more time.",
    Code.INTERNAL: "See the server's log.",
    Code.INTEGRITY: "Publish or materialize the version again.",
    Code.VERSION_MISMATCH: "Let all hosts read the same published versions.",
    Code.VERSION_NOT_AVAILABLE: "Load one of the accepted versions there, or accept one that answers.",
    Code.VERSION_NOT_PUBLISHED: "Publish and materialize the version there.",
    Code.VERSION_NOT_LOADED: "Load the version there first.",
    Code.LAST_VERSION: "Load another version there first.",
    Code.STILL_ANSWERING: "Drain the version on every CPU host first.",
    Code.IN_FLIGHT: "Ask again once its requests have been answered.",
}
