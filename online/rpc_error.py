"""Errors that cross the wire: a gRPC status, a code a program can act on, and a sentence for a person."""

import logging
from enum import Enum
from typing import NoReturn

import grpc
import grpc.aio

from online.printable import shortened
from pipelines.contracts.errors import FacetError, IntegrityError, NotPrepared, Unavailable, VersionNotFound

__all__ = ["Code", "RpcError", "abort", "as_rpc_error", "rpc_error_from", "rpc_error_of"]

logger = logging.getLogger(__name__)

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
    """What a client is told of any error: a defect is INTERNAL, and logged.

    Args:
        named: the request, in the log and in what the client is told.
    """
    if isinstance(error, FacetError):
        return as_rpc_error(error)
    logger.error("%s failed", named, exc_info=error)
    return RpcError(
        Code.INTERNAL, named, expected="an answer", got="a defect of the server",
        remedy="The server's log has the details under this name.",
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
    """The refusal a client sees: a server's own code where it sent one, else what the transport's status means."""
    metadata = dict(error.trailing_metadata() or ())
    status = error.code()
    name = metadata.get(CODE_KEY)
    if name in Code.__members__:
        code = Code[name]
    elif status in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):  # by a server that stops
        code = Code.LOOKUP_UNAVAILABLE
    elif status is grpc.StatusCode.DEADLINE_EXCEEDED:
        code = Code.DEADLINE
    elif status is grpc.StatusCode.RESOURCE_EXHAUSTED:  # gRPC's own limits, which say no more than this
        code = Code.BATCH_TOO_LARGE if "larger than max" in (error.details() or "") else Code.OVERLOADED
    else:
        code = Code.INTERNAL
    versions = tuple(int(text) for text in str(metadata.get(VERSIONS_KEY, "")).split(",") if text)
    return RpcError(
        code, f"{target} did not answer ({status.name})", expected="an answer", got=error.details() or "no details",
        remedy=_REMEDIES.get(code, "Correct the request."), versions=versions, status=status,
    )


_REMEDIES = {
    Code.OVERLOADED: "Ask another replica, or later.",
    Code.LOOKUP_UNAVAILABLE: "Check that a server listens at that address.",
    Code.DEADLINE: "Check the server's load, or allow it more time.",
    Code.INTERNAL: "See the server's log.",
    Code.INTEGRITY: "Publish or materialize the version again.",
    Code.VERSION_NOT_AVAILABLE: "Load one of the accepted versions there, or accept one that answers.",
}
