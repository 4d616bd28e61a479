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
from online.observe import request_log
from online.observe.request_log import JsonFormatter, LimitedRate, ServedRequest, current_request
from online.rpc_error import Code, RpcError
from pipelines.contracts.errors import IntegrityError
from tests.waiting import PATIENCE_S, joined

OVERLOADED = RpcError(Code.OVERLOADED, "request", expected="a free slot", got="none", remedy="Ask later.")


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What the root logger writes as JSON, with the settings of `configure` as they were afterwards."""
    stream, root = io.StringIO(), logging.getLogger()
    handler, handlers = logging.StreamHandler(stream), root.handlers
    root.handlers, level = [handler], root.level
    root.setLevel(logging.INFO)
    settings, request_log._settings = request_log._settings, request_log._Settings()
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
    assert "refused: OVERLOADED" in line["message"]


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


def test_a_storm_of_refusals_is_a_few_lines_which_say_how_many_there_were(log, monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr(request_log.time, "monotonic", lambda: now[0])
    for _ in range(1000):
        refuse()
    refuse(error=ZeroDivisionError())  # another kind has its own share
    assert len(lines(log)) == request_log.LINES_PER_SECOND + 1
    now[0] += 1.0
    refuse()
    assert lines(log)[-1]["left_out"] == 1000 - request_log.LINES_PER_SECOND


@given(limit=st.integers(1, 5), gaps=st.lists(st.floats(0, 2), max_size=60))
def test_a_limited_rate_admits_no_more_and_loses_no_count(limit, gaps) -> None:
    rate, now, admitted, left_out = LimitedRate(limit), 0.0, [], 0
    for gap in gaps:
        now += gap
        before = rate.admit("key", now=now)
        if before is None:
            left_out += 1
        else:
            assert before == left_out
            left_out = 0
            admitted.append(now)
    for start in admitted:  # windows may meet, hence twice
        assert sum(start <= at < start + 1.0 for at in admitted) <= 2 * limit


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


def test_a_defect_is_logged_with_its_trace(log) -> None:
    try:
        raise ZeroDivisionError("over there")
    except ZeroDivisionError:
        logging.getLogger("x").exception("failed")
    assert "over there" in lines(log)[0]["exception"]


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
