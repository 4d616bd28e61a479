"""What a host may say of itself: an answer that cannot be true is refused where it enters, and not counted on later."""

import math
import re
from collections.abc import Sequence
from itertools import pairwise

from online.lookup.shards import MAX_SHARDS
from online.printable import printable
from online.proto import admin_pb2
from online.rpc_error import Code, RpcError

__all__ = ["checked"]

Status = admin_pb2.CpuTierStatus | admin_pb2.RankerStatus

_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_DEVICE_CHARACTERS = 64


def checked(answer: Status, host: str) -> Status:
    """The answer of a host; raises `RpcError`, INTERNAL, if it cannot be true."""
    problems = _of_cpu_tier if isinstance(answer, admin_pb2.CpuTierStatus) else _of_ranker
    if problem := problems(answer):
        expected, got = problem
        raise RpcError(
            Code.INTERNAL, f"status of {host}", expected=expected, got=got,
            remedy="Check what listens at that address, and that it runs the same Facet.",
        )
    return answer


def _of_cpu_tier(answer: admin_pb2.CpuTierStatus) -> tuple[str, str] | None:
    held = {0, *(entry.version for entry in answer.versions)}
    if problem := _of_versions(answer.versions):
        return problem
    if not {answer.preferred, answer.canary} <= held:
        return f"a preferred version and a canary of {sorted(held)}", f"{answer.preferred} and {answer.canary}"
    if not 0 <= answer.canary_share <= 1:
        return "a canary's share from 0 to 1", str(answer.canary_share)
    if not answer.shard < (answer.shards or 1) <= MAX_SHARDS:
        return f"shard < shards <= {MAX_SHARDS}", f"shard {answer.shard} of {answer.shards}"
    return None


def _of_ranker(answer: admin_pb2.RankerStatus) -> tuple[str, str] | None:
    bounds = answer.latency_bounds_ms
    if problem := _of_versions(answer.models):
        return problem
    if not all(a < b < math.inf for a, b in pairwise([0.0, *bounds])):
        return "finite bounds of a latency histogram, ascending", f"{len(bounds)}, of which the first are {bounds[:8]}"
    for entry in answer.models:
        if len(entry.latency_counts) not in (0, len(bounds) + 1):
            return f"{len(bounds) + 1} latency counts of version {entry.version}", str(len(entry.latency_counts))
        if len(entry.device) > _MAX_DEVICE_CHARACTERS or not entry.device.isprintable():
            return "the name of a device", printable(entry.device)
    return None


def _of_versions(
    entries: Sequence[admin_pb2.HostedVersion] | Sequence[admin_pb2.LoadedModel],
) -> tuple[str, str] | None:
    versions = [entry.version for entry in entries]
    if len(set(versions)) < len(versions) or min(versions, default=1) < 1:
        return "versions from 1 on, each once", f"{len(versions)}, of which the first are {versions[:8]}"
    for entry in entries:
        if not _SHA256.fullmatch(entry.manifest_sha256):
            return f"the SHA-256 of version {entry.version}'s manifest", printable(entry.manifest_sha256)
    return None
