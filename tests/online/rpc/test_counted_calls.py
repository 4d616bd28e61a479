"""Which calls a guard counts: those that its service, which counts its own, never saw or is done with."""

import logging
from collections import Counter

import pytest

from online.observe import metrics
from tests.online.rpc.test_guard import (
    BIG,
    METHOD,
    SLOTS,
    WAIT_S,
    Holding,
    ask,
    code_of,
    read_nothing,
    served,
    unread_limits,
)
from tests.waiting import until


@pytest.fixture
def counted():
    """Call it for the requests of `lookup` that were counted since the test began, by code."""
    before = _requests()
    return lambda: dict(_requests() - before)


def _requests() -> Counter[str]:
    samples = (sample for metric in metrics.registry.collect() for sample in metric.samples)
    return Counter(
        {
            sample.labels["code"]: sample.value for sample in samples
            if sample.name == "facet_requests_total" and sample.labels["service"] == "lookup"
        }
    )


def test_what_is_refused_before_the_service_sees_it_is_counted_and_logged_with_who_sent_it(counted, caplog) -> None:
    with caplog.at_level(logging.WARNING), served() as (service, _, channel):
        service.go.release(10)
        assert code_of(ask(channel, timeout=None)) == "NO_DEADLINE"
        assert code_of(channel.unary_unary(METHOD).future(b"\x0a\xff", timeout=WAIT_S)) == "MALFORMED_REQUEST"
    assert counted() == {"NO_DEADLINE": 1, "MALFORMED_REQUEST": 1}
    lines = [record.getMessage() for record in caplog.records if "lookup refused" in record.getMessage()]
    assert [code in line for code, line in zip(("NO_DEADLINE", "MALFORMED_REQUEST"), lines, strict=True)] == [True] * 2
    assert all(", from 'ipv4:127.0.0.1:" in line for line in lines)


def test_what_the_service_answers_or_refuses_is_left_to_it(counted) -> None:
    with served() as (service, endpoint, channel):
        service.go.release(10)
        assert [code_of(ask(channel, name)) for name in ("", "error", "defect")] == ["OK", "WRONG_SHARD", "INTERNAL"]
        until(lambda: endpoint.admission.in_flight == 0)
    assert counted() == {}


def test_a_call_that_is_given_up_is_counted_unless_the_service_is_at_it(counted) -> None:
    with served() as (service, endpoint, channel):
        worked_on = [ask(channel) for _ in range(SLOTS)]
        until(lambda: service.inside == SLOTS)
        waits = ask(channel)
        until(lambda: endpoint.admission.waiting == 1)
        for call in [*worked_on, waits]:
            call.cancel()
        until(lambda: counted() == {"CANCELLED": 1})
        service.go.release(SLOTS)
        until(lambda: endpoint.admission.in_flight == 0)
    assert counted() == {"CANCELLED": 1}


def test_an_answer_that_nobody_would_read_is_counted_as_refused(counted) -> None:
    with served(Holding(BIG), limits=unread_limits()) as (_, endpoint, _), read_nothing(endpoint, 8) as connection:
        until(lambda: connection.statuses("OVERLOADED") + endpoint.server.guard.unread.total // BIG >= 8)
        assert counted() == {"OVERLOADED": connection.statuses("OVERLOADED")} != {"OVERLOADED": 0}


def test_with_answers_that_it_has_not_read_a_connection_may_not_even_send_a_message() -> None:
    """Once more than it may is unread, as one large answer can be."""
    limits = unread_limits(unread_bytes=BIG)
    with served(Holding(3 * BIG), limits=limits) as (_, endpoint, _), read_nothing(endpoint, 1) as connection:
        until(lambda: endpoint.server.guard.unread.total > BIG)
        connection.call(METHOD, None)
        until(lambda: connection.statuses("OVERLOADED") == 1)
