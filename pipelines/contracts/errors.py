"""Errors that say what was expected, what came, and what to do."""

__all__ = [
    "DiskFull",
    "FacetError",
    "IntegrityError",
    "InvalidConfig",
    "InvalidEvents",
    "InvalidTable",
    "NotPrepared",
    "StaleInput",
    "StalePretraining",
    "Unavailable",
    "VersionConflict",
    "VersionInUse",
    "VersionNotFound",
]


class FacetError(Exception):
    """A refusal a user can act on. The command line prints it as one message and exits with status 2.

    Args:
        problem: what is wrong, naming the file, column or option.
        expected: what would have been accepted.
        got: what came instead.
        remedy: what to do about it, as an imperative.
    """

    def __init__(self, problem: str, *, expected: str, got: str, remedy: str) -> None:
        super().__init__(f"{problem}: expected {expected}, got {got}. {remedy}")
        self.problem, self.expected, self.got, self.remedy = problem, expected, got, remedy


class InvalidEvents(FacetError):
    """A log that does not fit the event schema."""


class InvalidConfig(FacetError):
    """A configuration or option that was refused before any work started."""


class InvalidTable(FacetError):
    """A table that may not be published: not finite, wrong shape, ids not unique."""


class DiskFull(FacetError):
    """A file that did not fit where it was to be written; nothing half-written is left in its place."""


class IntegrityError(FacetError):
    """A file whose bytes are not those its manifest names."""


class VersionNotFound(FacetError):
    """A version that is not published, not materialized or not loaded where it was asked for."""


class VersionConflict(FacetError):
    """A version that exists already, or that another process is writing."""


class VersionInUse(FacetError):
    """A version that may not be retired: the pointer names it, or a process serves it."""


class StalePretraining(FacetError):
    """A version whose pretraining data is too old for the data it was fine-tuned on."""


class NotPrepared(FacetError):
    """A stage whose input an earlier stage has not written yet."""


class StaleInput(FacetError):
    """An artefact that was made from something else than what is there now."""


class Unavailable(FacetError):
    """A server that did not answer, or refused what it was asked."""
