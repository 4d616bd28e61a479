"""A port: who may take it, whose role it asks for, and what it shows of its queue."""

import socket

import pytest

from online.observe import metrics
from online.rpc import server
from online.rpc.server import Endpoint
from online.security.credentials import ServerSecurity
from online.security.roles import token_sha256
from pipelines.contracts.errors import InvalidConfig
from tests.holding import holding
from tests.online.rpc.test_guard import AUTHORIZED, TOKEN, ask, code_of, served
from tests.waiting import PATIENCE_S, until


@pytest.fixture
def roles(tmp_path) -> ServerSecurity:
    """The caller may rank, and nothing else."""
    path = tmp_path / "roles.yaml"
    path.write_text(f"caller: {{token_sha256: {token_sha256(TOKEN)}, roles: [rank]}}\n")
    path.chmod(0o600)
    return ServerSecurity(roles=path)


def test_a_port_is_taken_once() -> None:
    with served() as (_, endpoint, _), pytest.raises(InvalidConfig, match=f"listen on 127.0.0.1:{endpoint.port} for"):
        Endpoint("lookup", "127.0.0.1", endpoint.port, 1)


def test_a_port_may_be_shared_where_that_is_asked_for() -> None:
    with served(reuse_port=True) as (_, endpoint, _):
        other = Endpoint("lookup", "127.0.0.1", endpoint.port, 1, reuse_port=True)
        assert other.port == endpoint.port
        assert other.stop().wait(PATIENCE_S)


def test_a_port_asks_for_the_role_that_it_is_given_else_for_that_of_its_name(roles) -> None:
    for role, code in (("", "NOT_ALLOWED"), ("rank", "OK")):
        with served(security=roles, role=role) as (service, _, channel):
            service.go.release(1)
            assert code_of(ask(channel, metadata=AUTHORIZED)) == code


def test_a_role_that_nobody_can_have_is_refused(roles) -> None:
    with pytest.raises(InvalidConfig, match=r"role of lookup: expected one of \['lookup', .*got 'nobody'"):
        Endpoint("lookup", "127.0.0.1", 0, 1, security=roles, role="nobody")


def test_a_port_that_is_stopped_takes_nothing_new_and_answers_what_is_under_way(monkeypatch) -> None:
    monkeypatch.setattr(server, "STOP_GRACE_S", PATIENCE_S)
    with served() as (service, endpoint, channel):
        call = ask(channel)
        until(lambda: service.inside == 1)
        ended = endpoint.stop()
        until(lambda: refused(endpoint.port))
        service.go.release()
        assert code_of(call) == "OK"
        assert ended.wait(PATIENCE_S)


def refused(port: int) -> bool:
    """Whether nobody can connect any more."""
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return True
    return False


def test_metrics_show_the_queue_of_requests() -> None:
    def in_flight() -> dict[str, float]:
        samples = (sample for metric in metrics.registry.collect() for sample in metric.samples)
        return {s.labels["service"]: s.value for s in samples if s.name == "facet_in_flight"}

    with served() as (_, endpoint, _), holding(endpoint):
        metrics.observe_request("lookup", "OK", 0.0)  # it is looked at whenever something is counted
        assert in_flight()["lookup"] == endpoint.admission.slots
