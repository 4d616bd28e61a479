"""What is fuzzed: for each target a function of bytes that raises on anything but a right answer or a typed refusal.

The services are called as gRPC calls them, with the bytes of a message, behind the same gate.
"""

import asyncio
import atexit
import json
import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import atheris
import grpc
import numpy as np
import pyarrow as pa

from online.lookup.hosted import HostedVersions
from online.lookup.reader import VersionReader
from online.lookup.shards import cut
from online.proto import admin_pb2, admin_pb2_grpc, lookup_pb2, lookup_pb2_grpc, rank_pb2, rank_pb2_grpc
from online.rpc.admission import Admission
from online.rpc.executor import Executor
from online.rpc.gate import Gate
from online.rpc.guard import Guard
from online.rpc.limits import Limits
from online.rpc.message import parsed
from online.rpc.server import GuardedServer
from online.rpc.waiting import WaitingCalls
from online.rpc_error import Code, RpcError
from online.security.roles import Identity, Roles, token_sha256
from pipelines.contracts.embedding_view import EmbeddingView
from pipelines.contracts.errors import IntegrityError, InvalidConfig
from pipelines.contracts.manifest import Manifest
from pipelines.contracts.sealed import seal_path, write_sealed
from pipelines.contracts.segment import Segment
from pipelines.contracts.segment_delta import open_segment
from pipelines.contracts.segment_delta_writer import write_delta
from pipelines.contracts.segment_header import DELTA_NAME, HEADER_NAME
from pipelines.contracts.spec import TableSpec
from pipelines.contracts.workspace import Workspace
from tests.releases import published_rows

__all__ = ["TARGETS"]

Target = Callable[[bytes], None]
Method = Callable[..., Any]
"""Takes the bytes of a request and, if it matters, a `Call`."""

MAX_IDS = 512
ODD_INTEGERS = [0, 1, 2, -1, 7, 1 << 31, -(1 << 63), (1 << 63) - 1]
ODD_NUMBERS = [0.0, -0.0, -1.0, 1.3e9, 1e308, -1e308, 5e-324, math.nan, math.inf, -math.inf]
# Of a refusal that names a defect; what comes from outside must not reach one.
DEFECTS = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)


class Refused(Exception):
    """What `abort` ends a method with."""


class Call:
    """The context of a call that nobody made, as gRPC's asyncio server gives it to a method."""

    def __init__(self, metadata: tuple[tuple[str, Any], ...] = (), certificate: dict[str, list[bytes]] | None = None):
        self._metadata, self._certificate = metadata, certificate or {}
        self.message = b""

    def invocation_metadata(self) -> tuple:
        return self._metadata

    def auth_context(self) -> dict:
        return self._certificate

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def time_remaining(self) -> float:
        return 30.0

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        callback(self)

    async def read(self) -> bytes:
        return self.message

    async def abort(self, status: grpc.StatusCode, details: str, trailing: tuple[tuple[str, str], ...]) -> None:
        code = Code[dict(trailing)["facet-error"]]
        assert code.status is status and status not in DEFECTS, (code, details)
        assert len(details.encode()) <= 1600, len(details)
        raise Refused


def methods_of(add: Callable[[Any, Any], None], service: Any, guard: Guard) -> dict[str, Method]:
    """A service's methods behind their guard, by name, from the bytes of a request: the answer's bytes, or None for a
    typed refusal."""
    loop, server = asyncio.new_event_loop(), GuardedServer(guard)
    add(service, server)
    guard.is_quick = lambda message: True

    def method(handler: grpc.RpcMethodHandler) -> Method:
        def call(raw: bytes, context: Call | None = None) -> Any:
            context = context or Call()
            context.message = raw
            try:
                return loop.run_until_complete(handler.stream_unary(None, context))
            except Refused:
                return None

        return call

    return {name.rpartition("/")[2]: method(handler) for name, handler in server.methods.items()}


def method_of(add: Callable[[Any, Any], None], service: Any, gate: Gate | None = None) -> Method:
    """A service's only method behind the guard of a port for traffic."""
    guard = Guard("lookup", Executor(Admission(1), "fuzz"), WaitingCalls(), Limits(), gate=gate)
    (method,) = methods_of(add, service, guard).values()
    return method


def admin_methods_of(add: Callable[[Any, Any], None], service: Any) -> dict[str, Method]:
    """As `methods_of`, behind the guard of a port for a rollout's controller."""
    executor = Executor(Admission(1), "fuzz")
    return methods_of(add, service, Guard("admin", executor, WaitingCalls(), Limits().for_admin(), audited=True))


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
        if answered := call(message):
            answer = rank_pb2.RankResponse.FromString(answered)
            candidates = len(rank_pb2.RankRequest.FromString(message).candidates) // 8
            scores = np.frombuffer(answer.scores, "<f4").reshape(candidates, len(answer.tasks))
            assert answer.version == 1 and ((scores >= 0) & (scores <= 1)).all(), scores

    return target


def cpu_tier_admin(workspace: Workspace) -> Target:
    """`CpuTierAdmin`: each call has the effect it is named for, or is refused and has none; a version always answers.
    """
    from online.lookup.service import CpuTierAdminService

    hosted = HostedVersions(cache(lambda version: VersionReader.open(workspace, version)), unload_wait_s=0.0)
    calls = admin_methods_of(admin_pb2_grpc.add_CpuTierAdminServicer_to_server, CpuTierAdminService(hosted))

    def at_first() -> None:
        hosted.load(1)
        hosted.promote(1)
        hosted.drain(2)
        hosted.unload(2)

    def check(method: str, request: admin_pb2.VersionRequest, answer: admin_pb2.CpuTierStatus) -> None:
        answering = {each.version for each in answer.versions if not each.draining}
        share = request.share or 1.0
        done = {
            "Load": request.version in answering,
            "Promote": request.version == (answer.preferred if share == 1 else answer.canary),
            "Drain": request.version not in answering,
            "Unload": request.version not in {each.version for each in answer.versions},
            "Status": True,
        }
        assert done[method], (method, request, answer)
        assert answer.preferred in answering <= {1, 2} and answer.canary in {0, *answering} - {answer.preferred}
        assert (0 < answer.canary_share < 1) if answer.canary else answer.canary_share == 0
        assert (answer.shard, answer.shards, answer.workers) == (0, 1, 1)
        answer.ClearField("shards"), answer.ClearField("workers")
        assert answer == hosted.status()

    return admin_target(calls, at_first, check, hosted.status, admin_pb2.CpuTierStatus)


def ranker_admin(workspace: Workspace) -> Target:
    """`RankerAdmin`: as `cpu_tier_admin`. Feast, which takes long to start, would see nothing of the messages."""
    import torch

    from online.ranking.scorer import Scorer
    from online.ranking.service import RankerAdminService, RunnableModels

    torch.set_num_threads(1)
    load = cache(lambda version: Scorer.load(workspace, version, device="cpu"))
    models = RunnableModels(load, context=SimpleNamespace(require=lambda features, beside: None))
    calls = admin_methods_of(admin_pb2_grpc.add_RankerAdminServicer_to_server, RankerAdminService(models))

    def at_first() -> None:
        models.load(1)
        models.unload(2)

    def check(method: str, request: admin_pb2.VersionRequest, answer: admin_pb2.RankerStatus) -> None:
        runnable = {model.version for model in answer.models}
        done = {"Load": request.version in runnable, "Unload": request.version not in runnable, "Status": True}
        assert done[method], (method, request, answer)
        assert runnable and runnable <= {1, 2} and answer == models.status()

    return admin_target(calls, at_first, check, models.status, admin_pb2.RankerStatus)


def admin_target(
    calls: dict[str, Method], at_first: Callable[[], None], check: Callable[[str, Any, Any], None],
    status: Callable[[], Any], answer_type: type,
) -> Target:
    """A few calls one after another, of a host that is brought back to where it was before each input."""

    def built(data: atheris.FuzzedDataProvider) -> bytes:
        version = data.PickValueInList([1, 2, 2, 3, odd_integer(data)])
        share = data.PickValueInList([0.0, 0.5, 1.0, *ODD_NUMBERS]) if data.ConsumeBool() else data.ConsumeFloat()
        return admin_pb2.VersionRequest(version=version, share=share).SerializeToString()

    def target(raw: bytes) -> None:
        data = atheris.FuzzedDataProvider(raw)
        at_first()
        for _ in range(data.ConsumeIntInRange(1, 6)):
            method = data.PickValueInList(sorted(calls))
            message = built(data) if data.ConsumeIntInRange(0, 7) else data.ConsumeBytes(20)
            before = status()
            answered = calls[method](message)
            if answered is None:
                assert status() == before, (method, message)
            else:
                request = admin_pb2.VersionRequest.FromString(b"" if method == "Status" else message)
                check(method, request, answer_type.FromString(answered))

    return target


def message(workspace: Workspace) -> Target:
    """A message that is counted first is what protobuf reads, of any bytes, or refused."""

    def target(raw: bytes) -> None:
        try:
            counted = parsed(raw, lookup_pb2.LookupRequest.FromString)
        except RpcError as error:
            assert error.code in (Code.MALFORMED_REQUEST, Code.BATCH_TOO_LARGE), error
        else:
            assert counted == lookup_pb2.LookupRequest.FromString(raw)

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
    right = json.loads(workspace.versions.manifest(1).to_json())

    def target(raw: bytes) -> None:
        data = atheris.FuzzedDataProvider(raw)
        try:
            Manifest.from_dict(changed(right, data)).sha256  # noqa: B018
        except (ValueError, InvalidConfig):
            return

    return target


def segment_header(workspace: Workspace) -> Target:
    """A segment's header, sealed anew: one that is not the right one is refused, or leads to the same rows.

    Nothing that it says may lead a lookup out of the arrays, which the system would answer by killing the process.
    """
    spec = workspace.versions.manifest(1).tables[0]
    directory = Path(tempfile.mkdtemp(prefix="facet-fuzz-")) / "segment"
    atexit.register(shutil.rmtree, directory.parent, ignore_errors=True)
    shutil.copytree(workspace.segment(1, spec.name), directory)
    for path in directory.iterdir():
        path.chmod(0o644)
    right = json.loads((directory / HEADER_NAME).read_text())
    ids = np.concatenate([known_ids(workspace, spec.name), ODD_INTEGERS])
    truth = Segment.open(directory).lookup(ids)[0]

    def target(raw: bytes) -> None:
        data = atheris.FuzzedDataProvider(raw)
        write_sealed(directory / HEADER_NAME, json.dumps(changed(right, data)))
        try:
            segment = Segment.open(directory, verify=data.ConsumeBool())
        except IntegrityError:
            return
        rows, _ = segment.lookup(ids)
        assert rows.shape[0] == len(ids)
        same = ("index", "files", "table")
        written = json.loads((directory / HEADER_NAME).read_text())
        assert any(written[key] != right[key] for key in same) or (rows == truth).all()

    return target


def delta_header(workspace: Workspace) -> Target:
    """A delta's header, sealed anew: one that is not the right one is refused, or leads to the same rows.

    Some headers name another table, whose rows have another width.
    """
    spec, *others = workspace.versions.manifest(1).tables
    other = next(each for each in others if each.row_bytes != spec.row_bytes)
    directory = Path(tempfile.mkdtemp(prefix="facet-fuzz-")) / "delta"
    atexit.register(shutil.rmtree, directory.parent, ignore_errors=True)
    ids, rows = written_delta(workspace, spec, directory)
    header = directory / DELTA_NAME
    for path in (header, seal_path(header)):
        path.chmod(0o644)
    right = json.loads(header.read_text())
    of_other = {**right, "table": other.to_dict()}

    def target(raw: bytes) -> None:
        data = atheris.FuzzedDataProvider(raw)
        write_sealed(header, json.dumps(changed(data.PickValueInList([right, right, of_other]), data)))
        try:
            segment = open_segment(directory, verify=data.ConsumeBool())
        except IntegrityError:
            return
        got, found = segment.lookup(ids)
        assert (got == rows).all() and found.all()

    return target


def written_delta(workspace: Workspace, spec: TableSpec, directory: Path) -> tuple[np.ndarray, np.ndarray]:
    """Write the delta of a version that has some rows of version 1 no more, and of others their opposite.

    Returns:
        Its ids int64 (N,) and rows uint8 (N, row_bytes).
    """
    parent = directory.with_name("parent")
    shutil.copytree(workspace.segment(1, spec.name), parent)
    ids, rows = published_rows(workspace, 1, spec.name)
    ids, rows = ids[3:], rows[3:].copy()
    rows[::50] ^= 255
    packed = pa.FixedSizeBinaryArray.from_buffers(pa.binary(rows.shape[1]), len(rows), [None, pa.py_buffer(rows)])
    assert write_delta(
        directory, spec=replace(spec, rows=len(ids)), version=2, manifest_sha256="ab" * 32, parent=parent,
        batches=[pa.record_batch({"id": pa.array(ids), "row": packed})],
    )
    return ids, rows


def view_tags(workspace: Workspace) -> Target:
    """Tags of a feature view: what they name lies where segments lie, or they are refused."""
    manifest = workspace.versions.manifest(1)
    right = EmbeddingView.of(manifest, manifest.tables[0]).tags(manifest)
    pieces = ["..", "/", "item", ".", "kge", "1", "\0", "~", "²", "\n", ""]

    def target(raw: bytes) -> None:
        data = atheris.FuzzedDataProvider(raw)
        tags = dict(right)
        for name in ("version", "table", "manifest_sha256", "as_of"):
            if data.ConsumeBool():
                tags[name] = "".join(
                    data.PickValueInList(pieces) if data.ConsumeBool() else data.ConsumeUnicodeNoSurrogates(4)
                    for _ in range(data.ConsumeIntInRange(0, 6))
                )
        try:
            view = EmbeddingView.from_tags(tags)
        except IntegrityError:
            return
        path = workspace.segment(view.version, view.table)
        assert path.parent.parent == workspace.segments and ".." not in path.parts, path

    return target


def changed(right: dict, data: atheris.FuzzedDataProvider) -> dict:
    """A copy of a JSON object with one value, at any depth, replaced or left out."""
    values = [
        None, True, -1, 0, 1, 2, 8, 63, 64, 2**31, 2**63, 2**64, 1e300, "", "x", "../..", [], {}, [1], {"a": 1}, [[]],
        data.ConsumeUnicodeNoSurrogates(8), data.ConsumeInt(8),
    ]
    copy = json.loads(json.dumps(right))
    at = copy
    while True:
        keys = sorted(at) if isinstance(at, dict) else list(range(len(at)))
        key = data.PickValueInList(keys)
        if isinstance(at[key], dict | list) and at[key] and data.ConsumeProbability() >= 0.3:
            at = at[key]
            continue
        if data.ConsumeBool():
            at[key] = data.PickValueInList(values)
        else:
            del at[key]
        return copy


def roles(workspace: Workspace) -> Target:
    """Roles files: known is who stands there; one that is not right is refused as such, and nothing of it repeated."""
    path = Path(tempfile.mkdtemp(prefix="facet-fuzz-")) / "roles.yaml"
    secret = "a-token-that-is-long-enough-for-it"
    good = {
        "roles": {"[lookup]": ("lookup",), "[rank, metrics]": ("rank", "metrics")},
        "token_sha256": {token_sha256(word): token_sha256(word) for word in (secret, "other")} | {"null": None},
        "certificate": {"one.example": "one.example", "'two.example'": "two.example", "7": "7", "null": None},
    }
    bad = {"roles": ["[]", "[root]", "lookup", "null"], "token_sha256": [secret, "5"], "certificate": ["[a]", "1.5"]}

    def read() -> Roles | None:
        try:
            return Roles.read(path)
        except InvalidConfig as error:
            assert secret not in str(error)
            return None

    def meant(fields: list[tuple[str, str]]) -> Identity | None:
        """The identity of one entry, if it is a right one."""
        given = dict(fields)
        if len(given) < len(fields) or "roles" not in given or any(value not in good[key] for key, value in fields):
            return None
        values = {key: good[key][value] for key, value in fields}
        one_way = (values.get("token_sha256") is None) != (values.get("certificate") is None)
        return Identity(**values) if one_way else None

    def target(raw: bytes) -> None:
        data = atheris.FuzzedDataProvider(raw)
        if not data.ConsumeIntInRange(0, 3):
            path.write_bytes(data.ConsumeBytes(data.remaining_bytes()))
            read()
            return
        entries = []
        for _ in range(data.ConsumeIntInRange(1, 4)):
            any_keys = [data.PickValueInList(sorted(good)) for _ in range(data.ConsumeIntInRange(0, 3))]
            usual = ["roles", data.PickValueInList(["token_sha256", "certificate"])]
            keys = usual if data.ConsumeIntInRange(0, 7) else any_keys
            fields = [
                (key, data.PickValueInList([*good[key], *(bad[key] if not data.ConsumeIntInRange(0, 15) else [])]))
                for key in keys
            ]
            entries.append((data.PickValueInList(["a", "b", "c", "'a'", "1", '"1"']), fields))
        path.write_text("\n".join(
            f"{name}: {{{', '.join(f'{key}: {value}' for key, value in fields)}}}" for name, fields in entries
        ))  # fmt: skip
        names, identities = [name.strip("'\"") for name, _ in entries], [meant(fields) for _, fields in entries]
        ways = [each and (each.token_sha256 or each.certificate) for each in identities]
        known = read()
        right = all(identities) and len(set(names)) == len(set(ways)) == len(entries)
        assert (known is not None) == right, path.read_text()
        if known:
            assert known.identities == dict(zip(names, identities, strict=True))
            of_secret = [name for name, way in zip(names, ways, strict=True) if way == token_sha256(secret)]
            assert known.of_token(secret) == (of_secret[0] if of_secret else None)
            assert known.of_token(secret[:-1]) is None

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
    "lookup": lookup, "message": message, "rank": rank, "cpu_tier_admin": cpu_tier_admin, "ranker_admin": ranker_admin,
    "gate": gate, "shards": shards, "manifest": manifest, "roles": roles, "segment_header": segment_header,
    "delta_header": delta_header, "view_tags": view_tags,
}
