"""What is fuzzed: for each target a function of bytes that raises on anything but a right answer or a typed refusal.

The services are called as gRPC calls them, with the bytes of a message, behind the same gate.
"""

import json
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import atheris
import grpc
import numpy as np

from online.lookup.hosted import HostedVersions
from online.lookup.reader import VersionReader
from online.lookup.shards import cut
from online.proto import lookup_pb2, lookup_pb2_grpc, rank_pb2, rank_pb2_grpc
from online.rpc.arrival import Arrivals
from online.rpc.gate import Gate, GuardedServer
from online.rpc_error import Code
from online.security.roles import Identity, Roles, token_sha256
from pipelines.contracts.errors import FacetError
from pipelines.contracts.manifest import Manifest
from pipelines.contracts.workspace import Workspace
from tests.online.lookup.as_protobuf import answer_differs, request_differs

__all__ = ["TARGETS"]

Target = Callable[[bytes], None]

MAX_IDS = 512
ODD_INTEGERS = [0, 1, 2, -1, 7, 1 << 31, -(1 << 63), (1 << 63) - 1]
ODD_NUMBERS = [0.0, -0.0, -1.0, 1.3e9, 1e308, -1e308, 5e-324, math.nan, math.inf, -math.inf]
# Of a refusal that names a defect; what comes from outside must not reach one.
DEFECTS = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)


class Refused(Exception):
    """What `abort` ends a method with."""


class Call:
    """The context of a call that nobody made."""

    def __init__(self, metadata: tuple[tuple[str, Any], ...] = (), certificate: dict[str, list[bytes]] | None = None):
        self._metadata, self._certificate = metadata, certificate or {}
        self.code: Code | None = None

    def invocation_metadata(self) -> tuple:
        return self._metadata

    def auth_context(self) -> dict:
        return self._certificate

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def time_remaining(self) -> float | None:
        return None

    def set_trailing_metadata(self, metadata: tuple[tuple[str, str], ...]) -> None:
        self.code = Code[dict(metadata)["facet-error"]]

    def abort(self, status: grpc.StatusCode, details: str) -> None:
        assert self.code.status is status and status not in DEFECTS, (self.code, details)
        assert len(details.encode()) <= 1600, len(details)
        raise Refused


class Methods:
    """Takes what a service registers with a server."""

    def add_registered_method_handlers(self, service: str, handlers: dict) -> None:
        self.method = next(iter(handlers.values())).stream_unary

    def add_generic_rpc_handlers(self, handlers: tuple) -> None: ...


def method_of(add: Callable[[Any, Any], None], service: Any, gate: Gate | None = None) -> Callable[[bytes, Call], Any]:
    """A service's only method, from the bytes of a request: its answer, or None for a typed refusal."""
    methods = Methods()
    add(service, GuardedServer(methods, gate, Arrivals(60.0)))

    def call(raw: bytes, context: Call | None = None) -> Any:
        try:
            return methods.method(iter([raw]), context or Call())
        except Refused:
            return None

    return call


def odd_integer(data: atheris.FuzzedDataProvider) -> int:
    return data.PickValueInList(ODD_INTEGERS) if data.ConsumeBool() else data.ConsumeInt(8)


def packed(data: atheris.FuzzedDataProvider, known: np.ndarray) -> bytes:
    """Ids as they travel: known ones, odd ones, repeated ones, and sometimes bytes of no whole number of ids."""
    ids = [
        int(known[data.ConsumeIntInRange(0, len(known) - 1)]) if data.ConsumeBool() else odd_integer(data)
        for _ in range(data.ConsumeIntInRange(0, 12))
    ]
    raw = np.array(ids * data.PickValueInList([1, 1, 1, 2, 60]), "<i8").tobytes()
    return raw + data.ConsumeBytes(data.PickValueInList([0, 0, 0, 1, 7]))


def lookup(workspace: Workspace) -> Target:
    """`Lookup`: an answer has, for each id, its row or the default row, of an accepted version."""
    from online.lookup.service import LookupService

    versions = HostedVersions(lambda version: VersionReader.open(workspace, version))
    for version in (1, 2):
        versions.load(version)
    call = method_of(LookupService.add_to, LookupService(versions, max_ids=MAX_IDS))
    readers = {version: VersionReader.open(workspace, version) for version in (1, 2)}
    tables = list(readers[1].tables)
    known = known_ids(workspace, tables[0])

    def built(data: atheris.FuzzedDataProvider) -> bytes:
        request = lookup_pb2.LookupRequest(
            request_id=data.ConsumeUnicodeNoSurrogates(20) * data.PickValueInList([1, 1, 1000]),
            accepted_versions=[
                data.PickValueInList([1, 2, 3, odd_integer(data)])
                for _ in range(data.PickValueInList([0, 1, 2, 3, 80]))
            ],
            tables=[
                lookup_pb2.TableIds(
                    name=data.PickValueInList([*tables, data.ConsumeUnicodeNoSurrogates(5) * 300]),
                    ids=packed(data, known),
                )
                for _ in range(data.PickValueInList([0, 1, 1, 1, 2, 5, 70]))
            ],
        )
        request.shard.index = data.PickValueInList([0, 0, 0, data.ConsumeUInt(4)])
        request.shard.count = data.PickValueInList([0, 0, 1, data.ConsumeUInt(4)])
        return request.SerializeToString()

    def check(answered: bytes, raw: bytes) -> None:
        request, answer = lookup_pb2.LookupRequest.FromString(raw), lookup_pb2.LookupResponse.FromString(answered)
        assert answer.version in request.accepted_versions and len(answer.tables) == len(request.tables)
        for asked, got in zip(request.tables, answer.tables, strict=True):
            rows, found = readers[answer.version].lookup(asked.name, np.frombuffer(asked.ids, "<i8"))
            assert (got.name, got.row_bytes, got.rows) == (asked.name, rows.shape[1], rows.tobytes())
            assert got.found == found.tobytes()

    def target(raw: bytes) -> None:
        data = atheris.FuzzedDataProvider(raw)
        message = built(data) if data.ConsumeIntInRange(0, 3) else data.ConsumeBytes(data.remaining_bytes())
        if answer := call(message):
            check(answer, message)
        assert not any(version.in_flight for version in versions.status().versions)

    return target


def rank(workspace: Workspace) -> Target:
    """`Rank`: an answer has a probability for each candidate and task."""
    import torch

    from online.lookup.same_host import SameHostRows
    from online.ranking.context_source import FeastContext
    from online.ranking.scorer import Scorer
    from online.ranking.service import RankService, RunnableModels

    torch.set_num_threads(1)
    versions = HostedVersions(lambda version: VersionReader.open(workspace, version))
    versions.load(1)
    context = FeastContext(workspace.feature_repo)
    models = RunnableModels(lambda version: Scorer.load(workspace, version, device="cpu"), context=context)
    models.load(1)
    service = RankService(models, SameHostRows(versions), context, max_candidates=MAX_IDS)
    call = method_of(rank_pb2_grpc.add_RankServicer_to_server, service)
    known = known_ids(workspace, next(name for name in VersionReader.open(workspace, 1).tables if "item" in name))

    def built(data: atheris.FuzzedDataProvider) -> bytes:
        return rank_pb2.RankRequest(
            request_id=data.ConsumeUnicodeNoSurrogates(20),
            user=odd_integer(data),
            candidates=packed(data, known),
            now_seconds=data.PickValueInList(ODD_NUMBERS) if data.ConsumeBool() else data.ConsumeFloat(),
        ).SerializeToString()

    def target(raw: bytes) -> None:
        data = atheris.FuzzedDataProvider(raw)
        message = built(data) if data.ConsumeIntInRange(0, 3) else data.ConsumeBytes(data.remaining_bytes())
        if answer := call(message):
            candidates = len(rank_pb2.RankRequest.FromString(message).candidates) // 8
            scores = np.frombuffer(answer.scores, "<f4").reshape(candidates, len(answer.tasks))
            assert answer.version == 1 and ((scores >= 0) & (scores <= 1)).all(), scores

    return target


def wire(workspace: Workspace) -> Target:
    """A lookup's messages: what we read is what protobuf reads, of any bytes."""

    def target(raw: bytes) -> None:
        for differs in (request_differs, answer_differs):
            if difference := differs(raw):
                raise AssertionError(difference)

    return target


def gate(workspace: Workspace) -> Target:
    """The gate: nobody passes without the token or the certificate."""
    secret = "a-token-that-is-long-enough-for-it"
    known = Roles(
        {
            "reader": Identity(("lookup",), token_sha256=token_sha256(secret)),
            "other": Identity(("rank",), certificate="other.example"),
            "trusted": Identity(("lookup", "rank"), certificate="trusted.example"),
        }
    )
    watched = SimpleNamespace(value=lambda: known)
    gatekeeper = Gate(SimpleNamespace(watch_roles=lambda: watched), "lookup")

    class Open(lookup_pb2_grpc.LookupServicer):
        def Lookup(self, request, context):
            return lookup_pb2.LookupResponse(version=1)

    call = method_of(lookup_pb2_grpc.add_LookupServicer_to_server, Open(), gatekeeper)
    pieces = ["Bearer ", "bearer ", "BEARER", "Basic ", secret, secret[:-1], " ", ""]

    def target(raw: bytes) -> None:
        data = atheris.FuzzedDataProvider(raw)
        values = [
            "".join(
                data.PickValueInList(pieces) if data.ConsumeBool() else data.ConsumeUnicode(8)
                for _ in range(data.ConsumeIntInRange(0, 4))
            )
            for _ in range(data.ConsumeIntInRange(0, 3))
        ]
        name = data.PickValueInList([b"trusted.example", b"other.example", b"trusted.example.", data.ConsumeBytes(8)])
        certificate = {"x509_common_name": [name]} if data.ConsumeBool() else {}
        answer = call(b"", Call(tuple(("authorization", value) for value in values), certificate))
        good = [value.partition(" ") for value in values]
        tokens_good = all(scheme.lower() == "bearer" and token.strip() == secret for scheme, _, token in good)
        trusted = bool(certificate) and name == b"trusted.example"
        assert (answer is not None) == (tokens_good and (bool(values) or trusted)), (values, certificate)

    return target


def shards(workspace: Workspace) -> Target:
    """Cutting a batch by shard: every id in its own part, and all of them back in their places."""

    def target(raw: bytes) -> None:
        data = atheris.FuzzedDataProvider(raw)
        count = data.ConsumeIntInRange(1, 9)
        ids = np.array([odd_integer(data) for _ in range(data.ConsumeIntInRange(0, 40))], np.int64)
        parts, whole = cut(ids, count), np.zeros(len(ids), np.int64)
        for shard in range(count):
            part = parts.of(shard)
            assert all(_shard_by_the_contract(int(id_), count) == shard for id_ in part)
            parts.put_back(shard, part, whole)
        assert (whole == ids).all()

    return target


def manifest(workspace: Workspace) -> Target:
    """Manifests as JSON: one that is not right is refused by an error that its reader expects."""
    right = json.loads(Manifest.read(workspace.versions.path(1)).to_json())

    def target(raw: bytes) -> None:
        data = atheris.FuzzedDataProvider(raw)
        values = [None, True, -1, 0, 1e300, "", "x", [], {}, [1], {"a": 1}, [[]], [{}], data.ConsumeUnicode(8)]
        place, changed = right, json.loads(json.dumps(right))
        at = changed
        while isinstance(place, dict | list) and place:
            keys = sorted(place) if isinstance(place, dict) else range(len(place))
            key = data.PickValueInList(list(keys))
            place = place[key]
            if not isinstance(place, dict | list) or not place or data.ConsumeProbability() < 0.3:
                at[key] = data.PickValueInList(values)
                break
            at = at[key]
        try:
            Manifest.from_dict(changed).sha256  # noqa: B018
        except (AttributeError, ValueError, KeyError, TypeError, FacetError):
            return

    return target


def known_ids(workspace: Workspace, table: str) -> np.ndarray:
    """int64 (N,), of a published table."""
    import pyarrow.parquet as pq

    return pq.read_table(workspace.versions.path(1) / Manifest.table_path(table), columns=["id"])["id"].to_numpy()


def _shard_by_the_contract(id_: int, count: int) -> int:
    """`lookup.proto`, word by word."""
    mask = (1 << 64) - 1
    value = id_ & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    value ^= value >> 31
    return (value >> 32) * count >> 32


TARGETS: dict[str, Callable[[Workspace], Target]] = {
    "lookup": lookup, "wire": wire, "rank": rank, "gate": gate, "shards": shards, "manifest": manifest,
}
