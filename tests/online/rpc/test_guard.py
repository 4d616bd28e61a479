"""A guarded port over real channels: who is refused, when, and that nobody can hold it."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from online.observe import metrics
from online.proto import admin_pb2, admin_pb2_grpc, lookup_pb2, lookup_pb2_grpc
from online.rpc import guard
from online.rpc.channel import open_channel
from online.rpc.limits import Limits
from online.rpc.server import Endpoint
from online.rpc_error import Code, RpcError
from online.security.credentials import ServerSecurity
from online.security.roles import token_sha256
from tests.holding import holding, lasted
from tests.online.http2 import Connection
from tests.waiting import PATIENCE_S, until

SLOTS, QUEUE = 3, 2
WAIT_S = PATIENCE_S
"""For what is to come: a bound for a test that fails, and the longest deadline that a call may have by default."""
NEVER_S = 3600.0
TOKEN = "a" * 40
AUTHORIZED = (("authorization", f"Bearer {TOKEN}"),)
METHOD = "/facet.v1.Lookup/Lookup"
HEALTH = "/grpc.health.v1.Health/Check"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


class Holding(lookup_pb2_grpc.LookupServicer):
    """Answers when it is let go, one named `quick` at once; one named `defect` or `error` fails."""

    def __init__(self, answer_bytes: int = 0) -> None:
        self.inside, self.most, self.threads, self.go = 0, 0, [], threading.Semaphore(0)
        self._counting, self._answer = threading.Lock(), "x" * answer_bytes

    def Lookup(self, request: lookup_pb2.LookupRequest, call: Any) -> lookup_pb2.LookupResponse:
        self.threads.append(threading.current_thread().name)
        with self._counting:
            self.inside += 1
            self.most = max(self.most, self.inside)
        try:
            if request.request_id != "quick":
                assert self.go.acquire(timeout=2 * PATIENCE_S)
            if request.request_id == "defect":
                raise ZeroDivisionError("secret")
            if request.request_id == "error":
                raise RpcError(Code.WRONG_SHARD, "ids", expected="0/1", got="1/2", remedy="Ask another.", versions=(3,))
            return lookup_pb2.LookupResponse(version=7, manifest_sha256=self._answer)
        finally:
            with self._counting:
                self.inside -= 1


@contextmanager
def served(service: Holding | None = None, **options: Any) -> Iterator[tuple[Holding, Endpoint, grpc.Channel]]:
    """A port of `SLOTS` slots, and a channel to it."""
    service = service or Holding()
    endpoint = Endpoint("lookup", "127.0.0.1", 0, SLOTS, QUEUE, **options)
    lookup_pb2_grpc.add_LookupServicer_to_server(service, endpoint.server)
    endpoint.start()
    with open_channel(f"127.0.0.1:{endpoint.port}") as channel:
        yield service, endpoint, channel
        service.go.release(100_000)
    assert endpoint.stop().wait(PATIENCE_S)


@pytest.fixture
def roles(tmp_path) -> ServerSecurity:
    path = tmp_path / "roles.yaml"
    path.write_text(f"caller: {{token_sha256: {token_sha256(TOKEN)}, roles: [lookup, admin]}}\n")
    path.chmod(0o600)
    return ServerSecurity(roles=path)


def ask(channel: grpc.Channel, name: str = "", *, timeout: float | None = WAIT_S, metadata: Any = ()) -> Any:
    request = lookup_pb2.LookupRequest(request_id=name)
    return lookup_pb2_grpc.LookupStub(channel).Lookup.future(request, timeout=timeout, metadata=metadata)


def silent(
    channel: grpc.Channel, over: threading.Event, method: str = METHOD, *, timeout: float = WAIT_S, **options: Any
) -> Any:
    """A call whose message does not come before `over` is set."""

    def nothing() -> Iterator[bytes]:
        over.wait(NEVER_S)
        return
        yield

    return channel.stream_unary(method).future(nothing(), timeout=timeout, **options)


@contextmanager
def silence() -> Iterator[threading.Event]:
    over = threading.Event()
    try:
        yield over
    finally:
        over.set()


def code_of(call: Any) -> str:
    """The error code of a call, or the status of one that has none; OK."""
    error = call.exception(timeout=2 * PATIENCE_S)
    return dict(error.trailing_metadata() or ()).get("facet-error", error.code().name) if error else "OK"


# ---- work


def test_slots_work_a_queue_waits_and_all_others_are_refused_at_once() -> None:
    with served() as (service, endpoint, channel):
        for _ in range(3):  # everything is free again afterwards
            calls = [ask(channel) for _ in range(SLOTS + QUEUE)]
            until(lambda: service.inside == SLOTS and endpoint.admission.waiting == QUEUE)
            assert [code_of(ask(channel)) for _ in range(20)] == ["OVERLOADED"] * 20
            health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
            assert health.status == health_pb2.HealthCheckResponse.SERVING
            service.go.release(SLOTS + QUEUE)
            assert [code_of(call) for call in calls] == ["OK"] * (SLOTS + QUEUE)
            until(lambda: endpoint.admission.in_flight == 0)
        assert service.most == SLOTS


def test_who_cannot_be_answered_in_time_is_refused_before_a_message_is_read() -> None:
    with served() as (_, endpoint, channel), silence() as over:
        lasted(endpoint, 600.0)
        with holding(endpoint):
            assert code_of(silent(channel, over)) == "OVERLOADED"
        until(lambda: endpoint.admission.in_flight == 0)


def test_a_call_that_fails_frees_its_slot_and_says_why() -> None:
    with served() as (service, endpoint, channel):
        service.go.release(100)
        for _ in range(2 * SLOTS):
            assert code_of(ask(channel, "defect")) == "INTERNAL"
            assert code_of(ask(channel, "error")) == "WRONG_SHARD"
        error = ask(channel, "defect").exception(timeout=2 * PATIENCE_S)
        assert "request 'defect'" in error.details() and "secret" not in error.details()
        metadata = dict(ask(channel, "error").exception(timeout=2 * PATIENCE_S).trailing_metadata())
        assert metadata["facet-versions"] == "3"
        until(lambda: endpoint.admission.in_flight == 0)


def test_a_call_that_is_given_up_keeps_its_slot_until_its_work_is_done() -> None:
    with served() as (service, endpoint, channel):
        calls = [ask(channel) for _ in range(SLOTS)]
        until(lambda: service.inside == SLOTS)
        waiting = [ask(channel) for _ in range(QUEUE)]
        until(lambda: endpoint.admission.waiting == QUEUE)
        for call in [*calls, *waiting]:
            call.cancel()
        until(lambda: endpoint.admission.waiting == 0)  # who waits gives his place back at once
        assert endpoint.admission.in_flight == service.inside == SLOTS
        service.go.release(SLOTS)
        until(lambda: endpoint.admission.in_flight == 0)
        assert service.most == SLOTS


def test_a_quick_call_is_answered_without_a_thread_if_nobody_else_is_worked_on() -> None:
    with served() as (service, endpoint, channel):
        endpoint.server.guard.is_quick = lambda message: b"quick" in message
        assert code_of(ask(channel, "quick")) == "OK"
        slow = ask(channel, "slow")
        until(lambda: service.inside == 1)
        assert code_of(ask(channel, "quick")) == "OK"
        service.go.release()
        assert code_of(slow) == "OK"
        in_loop, *in_threads = service.threads
        assert in_loop == "rpc" and all(name.startswith("lookup") for name in in_threads)


# ---- who may call, and for how long


def test_a_call_needs_a_deadline_that_is_not_too_far() -> None:
    with served(limits=Limits(call_s=2000.0)) as (service, _, channel):
        service.go.release(10)
        assert code_of(ask(channel, timeout=None)) == "NO_DEADLINE"
        assert code_of(ask(channel, timeout=4000.0)) == "NO_DEADLINE"
        assert code_of(ask(channel, timeout=1900.0)) == "OK"
        with pytest.raises(grpc.RpcError) as caught:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert dict(caught.value.trailing_metadata())["facet-error"] == "NO_DEADLINE"


def test_who_has_no_credentials_is_refused_before_his_message_comes(roles) -> None:
    with served(security=roles) as (service, _, channel), silence() as over:
        service.go.release(10)
        assert code_of(silent(channel, over)) == "NOT_AUTHENTICATED"
        wrong = (("authorization", f"Bearer {'b' * 40}"),)
        assert code_of(silent(channel, over, metadata=wrong)) == "NOT_AUTHENTICATED"
        assert code_of(ask(channel, metadata=AUTHORIZED)) == "OK"


class Admin(admin_pb2_grpc.CpuTierAdminServicer):
    """Versions up to 8 are published."""

    def Load(self, request: admin_pb2.VersionRequest, call: Any) -> admin_pb2.CpuTierStatus:
        if request.version > 8:
            raise RpcError(Code.VERSION_NOT_PUBLISHED, "version 9", expected="it", got="none", remedy="Publish it.")
        return admin_pb2.CpuTierStatus(preferred=request.version)


@contextmanager
def served_admin(security: ServerSecurity, **options: Any) -> Iterator[tuple[Endpoint, grpc.Channel]]:
    """An admin port, and a channel to it."""
    endpoint = Endpoint("admin", "127.0.0.1", 0, SLOTS, QUEUE, security=security, audited=True, **options)
    admin_pb2_grpc.add_CpuTierAdminServicer_to_server(Admin(), endpoint.server)
    endpoint.start()
    with open_channel(f"127.0.0.1:{endpoint.port}") as channel:
        yield endpoint, channel
    assert endpoint.stop().wait(PATIENCE_S)


@contextmanager
def silent_calls(endpoint: Endpoint, channel: grpc.Channel, method: str, **options: Any) -> Iterator[list[Any]]:
    """Many more than the port has slots and places in its queue, none of which ends by its deadline.

    The block begins when the server has seen all of them: each waits for its client, or for its turn, or has ended.
    """
    with silence() as over:
        calls = [silent(channel, over, method, timeout=NEVER_S, **options) for _ in range(40 * SLOTS)]
        until(
            lambda: sum(call.done() for call in calls) + len(endpoint.waiting) + endpoint.admission.waiting
            + endpoint.admission.in_flight >= len(calls)
        )
        yield calls
        for call in calls:
            call.cancel()


SILENT_LIMITS = Limits(message_s=NEVER_S, call_s=NEVER_S)
OPEN = "held"  # to everybody: such a call waits for its client
REFUSED = {"/facet.v1.Lookup/Nothing": "UNIMPLEMENTED", HEALTH: OPEN, REFLECTION: OPEN}


def outcomes(endpoint: Endpoint, calls: list[Any]) -> set[str]:
    """Of silent calls: their codes, `OPEN` of those that the server waits for."""
    ended = {code_of(call) for call in calls if call.done()}
    return ended | ({OPEN} if len(endpoint.waiting) else set())


@pytest.mark.parametrize(("method", "outcome"), [(METHOD, "NOT_AUTHENTICATED"), *REFUSED.items()])
def test_silent_calls_of_any_method_keep_nobody_waiting(roles, method, outcome) -> None:
    security = replace(roles, reflection=True)
    with served(security=security, limits=SILENT_LIMITS) as (service, endpoint, channel):
        service.go.release(10)
        with silent_calls(endpoint, channel, method) as calls:
            assert [code_of(ask(channel, metadata=AUTHORIZED)) for _ in range(5)] == ["OK"] * 5
            assert outcomes(endpoint, calls) == {outcome}


@pytest.mark.parametrize(
    ("method", "outcome"), [("/facet.v1.CpuTierAdmin/Load", "NOT_AUTHENTICATED"), *REFUSED.items()]
)
def test_silent_calls_of_any_method_keep_nobody_waiting_at_an_admin_port(roles, method, outcome) -> None:
    security, request = replace(roles, reflection=True), admin_pb2.VersionRequest(version=8)
    with served_admin(security, limits=SILENT_LIMITS) as (endpoint, channel):
        load = admin_pb2_grpc.CpuTierAdminStub(channel).Load
        with silent_calls(endpoint, channel, method) as calls:
            for _ in range(5):
                assert code_of(load.future(request, timeout=WAIT_S, metadata=AUTHORIZED)) == "OK"
            assert outcomes(endpoint, calls) == {outcome}


def test_silent_calls_with_credentials_keep_nobody_waiting_either(roles) -> None:
    with served(security=roles, limits=SILENT_LIMITS) as (service, endpoint, channel):
        service.go.release(10)
        with silent_calls(endpoint, channel, METHOD, metadata=AUTHORIZED) as calls:
            assert [code_of(ask(channel, metadata=AUTHORIZED)) for _ in range(5)] == ["OK"] * 5
            assert outcomes(endpoint, calls) == {OPEN}
        until(lambda: len(endpoint.waiting) == 0)


@pytest.mark.parametrize("method", [METHOD, HEALTH])
def test_a_silent_call_ends_when_its_time_is_over(method) -> None:
    with served(limits=Limits(message_s=0.05)) as (_, endpoint, channel), silence() as over:
        assert code_of(silent(channel, over, method)) == "DEADLINE"
        assert len(endpoint.waiting) == 0


# ---- answers that nobody reads

BIG = 1 << 20


def unread_limits(**limits: Any) -> Limits:
    return Limits(**{"unread_bytes": 4 * BIG, "all_unread_bytes": 100 * BIG} | limits)


def read_nothing(endpoint: Endpoint, calls: int, timeout: str = f"{WAIT_S:.0f}S") -> Connection:
    """A connection that allows the server to send no byte of an answer, with so many calls."""
    connection = Connection(endpoint.port, window=0)
    for _ in range(calls):
        connection.call(METHOD, lookup_pb2.LookupRequest(request_id="quick").SerializeToString(), timeout=timeout)
    return connection


def test_answers_that_nobody_reads_are_bounded_by_connection() -> None:
    with served(Holding(BIG), limits=unread_limits()) as (_, endpoint, channel):
        unread = endpoint.server.guard.unread
        with read_nothing(endpoint, 30) as connection:
            until(lambda: connection.statuses("OVERLOADED") + unread.total // BIG >= 30)
            assert 3 * BIG <= unread.total <= 4 * BIG
            assert code_of(ask(channel, "quick")) == "OK", "another connection is served"
        until(lambda: unread.total == 0)  # the connection ended


def test_answers_that_nobody_reads_are_bounded_in_all_but_who_reads_is_served() -> None:
    with served(Holding(BIG), limits=unread_limits(all_unread_bytes=6 * BIG)) as (_, endpoint, channel):
        unread = endpoint.server.guard.unread
        connections = [read_nothing(endpoint, 10) for _ in range(4)]
        until(
            lambda: sum(each.statuses("OVERLOADED") for each in connections) + unread.total // BIG >= 40, 300
        )
        assert unread.total <= (6 + 4) * BIG  # one more for each that had read everything
        assert [code_of(ask(channel, "quick")) for _ in range(5)] == ["OK"] * 5
        for connection in connections:
            connection.close()
        until(lambda: unread.total == 0)


def test_an_answer_that_nobody_reads_ends_with_its_call() -> None:
    """The connection lives on: it is the call's deadline that frees what was kept for it."""
    with served(Holding(BIG), limits=unread_limits()) as (_, endpoint, _):
        connection = read_nothing(endpoint, 2, "1S")
        until(lambda: connection.resets == 2)
        until(lambda: endpoint.server.guard.unread.total == 0)
        connection.ping(b"12345678")
        until(lambda: b"12345678" in connection.pongs)
        connection.close()


# ---- messages


def test_a_message_of_too_many_fields_is_refused_before_it_is_parsed() -> None:
    with served() as (service, _, channel):
        service.go.release(1)
        call = channel.unary_unary(METHOD)
        many = lookup_pb2.LookupRequest(tables=[lookup_pb2.TableIds()] * 300_000).SerializeToString()
        assert code_of(call.future(many, timeout=WAIT_S)) == "BATCH_TOO_LARGE"
        assert code_of(call.future(b"\x0a\xff", timeout=WAIT_S)) == "MALFORMED_REQUEST"
        assert not service.threads, "no thread was woken for it"
        assert code_of(ask(channel)) == "OK"


def test_a_stream_without_a_message_is_refused() -> None:
    with served() as (_, _, channel):
        assert code_of(channel.stream_unary(METHOD).future(iter(()), timeout=WAIT_S)) == "MALFORMED_REQUEST"


# ---- what is written down


def requests_by_code() -> dict[str, float]:
    samples = (sample for metric in metrics.registry.collect() for sample in metric.samples)
    return {s.labels["code"]: s.value for s in samples if s.name == "facet_requests_total"}


def test_a_call_that_is_given_up_before_its_message_is_counted_as_cancelled(monkeypatch) -> None:
    monkeypatch.setattr(guard, "GIVEN_UP_S", 600.0)
    before = requests_by_code()
    with served() as (_, endpoint, channel), silence() as over:
        calls = [silent(channel, over) for _ in range(20)]
        until(lambda: len(endpoint.waiting) == 20)
        for call in calls:
            call.cancel()
        until(lambda: requests_by_code().get("CANCELLED", 0) == before.get("CANCELLED", 0) + 20)
        assert requests_by_code().get("MALFORMED_REQUEST") == before.get("MALFORMED_REQUEST")


def test_calls_of_an_audited_port_are_logged_with_version_and_outcome(roles, caplog) -> None:
    with caplog.at_level(logging.INFO), served_admin(roles) as (_, channel):
        load = admin_pb2_grpc.CpuTierAdminStub(channel).Load
        assert load(admin_pb2.VersionRequest(version=8), timeout=WAIT_S, metadata=AUTHORIZED).preferred == 8
        for version, metadata in ((9, AUTHORIZED), (8, ())):
            with pytest.raises(grpc.RpcError):
                load(admin_pb2.VersionRequest(version=version), timeout=WAIT_S, metadata=metadata)
    lines = [record.getMessage() for record in caplog.records if "CpuTierAdmin/Load" in record.getMessage()]
    assert len(lines) == 3
    assert "8" in lines[0] and "caller" in lines[0] and "OK" in lines[0]
    assert "9" in lines[1] and "caller" in lines[1] and "VERSION_NOT_PUBLISHED" in lines[1]
    assert "NOT_AUTHENTICATED" in lines[2] and "caller" not in lines[2]
    assert all(" from 'ipv4:127.0.0.1:" in line for line in lines)


# ---- connections


def test_a_client_may_ping_as_often_as_the_limits_say_without_a_call_under_way() -> None:
    with served(limits=Limits(ping_interval_s=0.001)) as (_, endpoint, _), Connection(endpoint.port) as connection:
        for number in range(10):
            payload = number.to_bytes(8)
            connection.ping(payload)
            until(lambda payload=payload: payload in connection.pongs or connection.ended)
            answered = time.monotonic()
            until(lambda answered=answered: time.monotonic() > answered + 0.01)  # ten times as long as it has to wait
        assert len(connection.pongs) == 10 and not connection.ended
    with served(limits=Limits(ping_interval_s=3600.0)) as (_, endpoint, _), Connection(endpoint.port) as connection:
        for number in range(10):
            connection.ping(number.to_bytes(8))
        until(lambda: connection.ended)


def test_a_service_that_streams_is_refused_when_it_is_registered() -> None:
    endpoint = Endpoint("lookup", "127.0.0.1", 0, 1)
    handler = grpc.stream_stream_rpc_method_handler(lambda messages, context: messages)
    with pytest.raises(TypeError, match="/a/B streams"):
        endpoint.server.add_registered_method_handlers("a", {"B": handler})
    assert endpoint.stop().wait(PATIENCE_S)
