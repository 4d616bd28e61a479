"""What servers log of requests: nothing of those answered in time, and of the others a bounded number of lines."""

import io
import json
import logging
import threading
from collections.abc import Iterator

import click
import click.testing
import pytest
from hypothesis import given
from hypothesis import strategies as st

from online.commands.logging_options import logging_options
from online.observe import metrics, request_log
from online.observe.request_log import JsonFormatter, LimitedRate, ServedRequest, current_request
from online.rpc_error import Code, RpcError
from pipelines.contracts.errors import IntegrityError
from tests.waiting import PATIENCE_S, joined

OVERLOADED = RpcError(Code.OVERLOADED, "request", expected="a free slot", got="none", remedy="Ask later.")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """Of the log's rate limit."""
    return Clock()


@pytest.fixture
def log(clock) -> Iterator[io.StringIO]:
    """What the root logger writes as JSON, with the settings of `configure` as they were afterwards."""
    stream, root = io.StringIO(), logging.getLogger()
    handler, handlers = logging.StreamHandler(stream), root.handlers
    root.handlers, level = [handler], root.level
    root.setLevel(logging.INFO)
    settings, request_log._settings = request_log._settings, request_log._Settings(clock)
    request_log.configure(role="ranker", as_json=True, slow_ms=None)
    yield stream
    root.handlers, request_log._settings = handlers, settings
    root.setLevel(level)


def lines(stream: io.StringIO) -> list[dict]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def refuse(request_id: str = "7f3a", error: Exception = OVERLOADED, version: int = 0) -> None:
    with pytest.raises(type(error)), ServedRequest("rank", request_id) as served:
        served.version = version
        raise error


def test_an_answer_in_time_is_not_worth_a_line(log) -> None:
    with ServedRequest("rank", "a") as served:
        served.version = 2
    assert not lines(log) and current_request.get() == ""


def test_a_refusal_is_one_line_with_its_request(log) -> None:
    refuse(version=3)
    (line,) = lines(log)
    assert (line["request_id"], line["code"], line["role"], line["version"]) == ("7f3a", "OVERLOADED", "ranker", 3)
    assert (line["level"], line["service"], line["logger"]) == ("WARNING", "rank", "online.observe.request_log")
    assert line["reason"] == str(OVERLOADED) and line["ms"] >= 0 and line["time"].endswith("Z")
    assert line["message"] == f"rank refused: OVERLOADED, request '7f3a', {line['ms']:.1f} ms"


def test_errors_have_the_code_that_clients_are_told(log) -> None:
    refuse(error=IntegrityError("segment", expected="a hash", got="another", remedy="Publish again."))
    refuse(error=ZeroDivisionError())
    assert [line["code"] for line in lines(log)] == ["INTEGRITY", "INTERNAL"]


def test_a_slow_answer_is_logged(log) -> None:
    request_log.configure(role="ranker", as_json=True, slow_ms=0.0)
    with ServedRequest("rank", "slow-one"):
        pass
    (line,) = lines(log)
    assert (line["code"], line["request_id"]) == ("OK", "slow-one") and "rank slow" in line["message"]


def test_a_storm_of_refusals_is_a_few_lines_which_say_how_many_there_were(log, clock) -> None:
    for _ in range(1000):
        refuse()
    refuse(error=ZeroDivisionError())  # another kind has its own share
    assert len(lines(log)) == request_log.LINES_PER_SECOND + 1
    clock.now += 0.999
    refuse()
    assert len(lines(log)) == request_log.LINES_PER_SECOND + 1
    clock.now += 0.001
    refuse()
    assert lines(log)[-1]["left_out"] == 1001 - request_log.LINES_PER_SECOND
    assert "(991 more like it left out)" in lines(log)[-1]["message"]
    refuse()
    assert "left_out" not in lines(log)[-1]


@given(
    limit=st.integers(1, 5), window_s=st.sampled_from([0.5, 1.0, 60.0]), gaps=st.lists(st.floats(0, 2), max_size=60)
)
def test_a_limited_rate_admits_no_more_and_loses_no_count(limit, window_s, gaps) -> None:
    now, admitted, left_out = 0.0, [], 0
    rate = LimitedRate(limit, window_s=window_s, clock=lambda: now)
    for gap in gaps:
        now += gap * window_s
        before = rate.admit("key")
        if before is None:
            left_out += 1
        else:
            assert before == left_out
            left_out = 0
            admitted.append(now)
    for start in admitted:  # windows may meet, hence twice
        assert sum(start <= at < start + window_s for at in admitted) <= 2 * limit


def test_keys_of_others_choice_are_bounded() -> None:
    rate = LimitedRate(1, clock=lambda: 0.0)
    admitted = [rate.admit(number) for number in range(1000)]
    assert admitted == [0] * (request_log.MAX_KEYS + 1) + [None] * (999 - request_log.MAX_KEYS)
    assert rate.admit(0) is None and rate.admit(999) is None


def test_a_request_that_was_refused_unread_is_counted_and_says_where_it_came_from(log, clock) -> None:
    refusal = RpcError(Code.NOT_AUTHENTICATED, "credentials", expected="a token", got="none", remedy="Give one.")
    counted = ("facet_requests_total", {"service": "rank.test", "code": "NOT_AUTHENTICATED"})
    for _ in range(50):
        request_log.count_refused("rank.test", refusal, peer="ipv4:192.0.2.1:77")
    assert metrics.registry.get_sample_value(*counted) == 50, "counted are all of them"
    assert len(lines(log)) == request_log.LINES_PER_SECOND
    line = lines(log)[0]
    assert (line["service"], line["code"], line["peer"]) == ("rank.test", "NOT_AUTHENTICATED", "ipv4:192.0.2.1:77")
    assert line["reason"] == str(refusal) and "request_id" not in line
    assert line["message"] == "rank.test refused: NOT_AUTHENTICATED, from 'ipv4:192.0.2.1:77', 0.0 ms"
    clock.now += 1
    request_log.count_refused("rank.test", refusal)
    assert lines(log)[-1]["message"] == "rank.test refused: NOT_AUTHENTICATED, 0.0 ms (40 more like it left out)"
    clock.now += 1
    request_log.count_refused("rank.test", refusal, peer="unix:\n" + "x" * 1000)
    assert "left_out" not in lines(log)[-1] and len(lines(log)[-1]["peer"]) == 65


# ---- admin calls

PROMOTE = "CpuTierAdmin/Promote"


def test_every_call_of_a_caller_that_may_has_an_audit_line(log) -> None:
    for _ in range(100):
        request_log.audit(PROMOTE, "ops", 3, "OK", 0.0125, peer="ipv4:192.0.2.1:7")
    assert len(lines(log)) == 100
    line = lines(log)[0]
    assert {name: line[name] for name in ("method", "caller", "peer", "outcome", "version", "ms")} == {
        "method": PROMOTE, "caller": "ops", "peer": "ipv4:192.0.2.1:7", "outcome": "OK", "version": 3, "ms": 12.5,
    }  # fmt: skip
    assert (line["level"], line["logger"]) == ("INFO", "online.observe.request_log.audit")
    assert line["message"] == f"{PROMOTE} by 'ops' from 'ipv4:192.0.2.1:7': OK, version 3, 12.5 ms"


def test_an_admin_call_that_failed_says_why_and_is_never_left_out(log) -> None:
    for _ in range(100):
        request_log.audit(PROMOTE, "ops", 9, "VERSION_NOT_LOADED", 0.0)
    assert len(lines(log)) == 100
    assert {(line["level"], line["outcome"], line["version"]) for line in lines(log)} == {
        ("WARNING", "VERSION_NOT_LOADED", 9)
    }


@pytest.mark.parametrize(
    ("outcome", "caller", "who"), [("NOT_AUTHENTICATED", "", ""), ("NOT_ALLOWED", "ranker-1", " by 'ranker-1'")]
)
def test_admin_calls_of_those_who_may_not_are_a_few_lines(log, clock, outcome, caller, who) -> None:
    for _ in range(100):
        request_log.audit(PROMOTE, caller, 0, outcome, 0.0)
    assert len(lines(log)) == request_log.LINES_PER_SECOND
    assert lines(log)[0]["message"] == f"{PROMOTE}{who}: {outcome}, 0.0 ms"
    assert lines(log)[0]["level"] == "WARNING" and "version" not in lines(log)[0]
    request_log.audit(PROMOTE, "ops", 0, "OK", 0.0)
    assert lines(log)[-1]["outcome"] == "OK", "refusals leave room for who may"
    request_log.audit("CpuTierAdmin/Load", caller, 0, outcome, 0.0)
    assert lines(log)[-1]["method"] == "CpuTierAdmin/Load", "and for the refusals of another method"
    other = {"NOT_AUTHENTICATED": "NOT_ALLOWED", "NOT_ALLOWED": "NOT_AUTHENTICATED"}[outcome]
    request_log.audit(PROMOTE, caller, 0, other, 0.0)
    assert lines(log)[-1]["outcome"] == other, "and for those of another kind"
    clock.now += 1
    request_log.audit(PROMOTE, caller, 0, outcome, 0.0)
    assert lines(log)[-1]["left_out"] == 100 - request_log.LINES_PER_SECOND
    assert lines(log)[-1]["message"].endswith("(90 more like it left out)")


def test_names_of_callers_and_peers_stay_on_one_line(log) -> None:
    request_log.audit(PROMOTE, "a\nb", 0, "OK", 0.0, peer="unix:\x1b[2K" + "x" * 1000)
    (line,) = lines(log)
    assert line["message"].isprintable() and len(line["message"]) < 300 and len(line["peer"]) == 65


def test_every_line_of_a_request_names_it_in_its_own_thread_only(log) -> None:
    inside, done = threading.Event(), threading.Event()

    def serve() -> None:
        with ServedRequest("lookup", "mine"):
            logging.getLogger("feast.online").warning("slow store", extra={"table": "item.kge"})
            inside.set()
            assert done.wait(PATIENCE_S)

    thread = threading.Thread(target=serve)
    thread.start()
    assert inside.wait(PATIENCE_S)
    logging.getLogger("other").warning("elsewhere")
    done.set()
    joined(thread)
    mine, elsewhere = lines(log)
    assert mine["request_id"] == "mine" and mine["table"] == "item.kge"
    assert "request_id" not in elsewhere


@given(request_id=st.text(max_size=300), message=st.text(max_size=100), extra=st.binary(max_size=20))
def test_whatever_comes_from_outside_stays_one_bounded_line(request_id, message, extra) -> None:
    record = logging.makeLogRecord({"msg": "%s", "args": (message,), "levelname": "WARNING", "raw": extra})
    token = current_request.set(request_id)
    line = JsonFormatter(role="ranker").format(record)
    current_request.reset(token)
    assert line.isascii() and len(line.splitlines()) == 1 and len(line) < 4000
    parsed = json.loads(line)
    assert parsed["message"] == message and len(parsed.get("request_id", "")) <= request_log.MAX_ID + 1


def raised(kind: type[Exception] = ZeroDivisionError) -> Exception:
    try:
        raise kind("over there")
    except kind as error:
        return error


def test_a_defect_is_logged_with_its_trace(log) -> None:
    request_log.log_defect("request '7f3a'", raised())
    (line,) = lines(log)
    assert (line["message"], line["level"]) == ("request '7f3a' failed", "ERROR") and "left_out" not in line
    assert 'raise kind("over there")' in line["exception"] and "ZeroDivisionError: over there" in line["exception"]


def test_a_storm_of_one_defect_is_a_few_traces_which_say_how_many_there_were(log, clock) -> None:
    for _ in range(1000):
        request_log.log_defect("request", raised())
    assert len(lines(log)) == request_log.TRACES_PER_MINUTE
    clock.now += 59.999
    request_log.log_defect("request", raised())
    assert len(lines(log)) == request_log.TRACES_PER_MINUTE
    clock.now += 0.001
    request_log.log_defect("request", raised())
    last = lines(log)[-1]
    assert last["left_out"] == 1001 - request_log.TRACES_PER_MINUTE and "over there" in last["exception"]
    assert last["message"] == "request failed (998 more like it left out)"


def test_a_storm_of_one_defect_hides_no_other(log) -> None:
    others = [raised(LookupError), LookupError("raised nowhere")]
    try:
        raise ZeroDivisionError("elsewhere")
    except ZeroDivisionError as error:
        others.append(error)
    for _ in range(100):
        request_log.log_defect("request", raised())
    for other in others:
        request_log.log_defect("another", other)
    assert [line["message"] for line in lines(log)[request_log.TRACES_PER_MINUTE :]] == ["another failed"] * 3


def test_the_options_configure_and_the_command_does_not_see_them(log) -> None:
    @click.command("cpu-tier")
    @logging_options
    @click.option("--port", type=int)
    def command(port: int) -> None:
        logging.getLogger("server").info("listens", extra={"port": port})

    result = click.testing.CliRunner().invoke(command, ["--port", "7", "--log-json", "--slow-ms", "5"])
    assert result.exit_code == 0, result.output
    assert (lines(log)[-1]["role"], lines(log)[-1]["port"]) == ("cpu-tier", 7)
    assert request_log._settings.slow_s == 0.005
