"""`facet status`: every host a line, whether it answers or not, and what is wrong said so."""

import json
import re
import socket

import numpy as np
import pytest
from click.testing import CliRunner

from online.commands.status import status
from online.ranking.client import RankClient
from online.rollout.controller import Rollout
from pipelines.contracts.errors import InvalidConfig
from tests.waiting import PATIENCE_S


@pytest.fixture
def unused_tcp_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def fleet(own_workspace, host_cpu_tier, host_ranker):
    tier = host_cpu_tier(own_workspace.workspace, (1,))
    return own_workspace.workspace, tier, host_ranker(own_workspace, [tier.address], (1,))


def shown(fleet, *options: str):
    workspace, tier, ranker = fleet
    hosts = ["--cpu-tier", tier.admin_address, "--ranker", ranker.admin_address]
    return CliRunner().invoke(status, [*hosts, "--interval", "0", *options], obj=workspace)


def test_a_fleet_without_a_rollout(fleet) -> None:
    _, tier, ranker = fleet
    client = RankClient(ranker.address, timeout_s=PATIENCE_S)
    client.rank(1, np.array([1, 2]))
    client.close()
    result = shown(fleet)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == "rollout    none in this workspace"
    assert lines[1].startswith("invariant  holds: every version a CPU host answers is on every ranker")
    host = next(line for line in lines if line.startswith(tier.admin_address))
    assert host.split() == [tier.admin_address, "0/1", "1", "1", "preferred", "0", "1"]
    model = next(line for line in lines if line.startswith(ranker.admin_address)).split()
    assert model[1:5] == ["1", "cpu", "1", "0"] and float(model[5]) <= float(model[6])
    assert re.fullmatch(r"traffic    over \d+\.\d s: none", lines[-1])


def test_a_rollout_under_way_its_hosts_and_what_comes_next(fleet) -> None:
    workspace, tier, ranker = fleet
    hosts = {"cpu_tiers": [tier.admin_address], "rankers": [ranker.admin_address]}
    walk = Rollout.begin_or_resume(workspace, 2, **hosts).walk()
    for _ in range(2):
        next(walk)
    walk.close()
    tier.state.promote(2, 0.25)
    result = CliRunner().invoke(status, ["--interval", "0"], obj=workspace)  # the hosts of the rollout
    assert result.exit_code == 0, result.output
    assert "rollout    from 1 to 2: loading models, then rows, begun 20" in result.output
    assert "2 of 6 steps; next: the next stage" in result.output
    assert "canary 25.00%" in result.output
    read = json.loads(CliRunner().invoke(status, ["--interval", "0", "--json"], obj=workspace).output)
    assert (read["rollout"]["to"], read["rollout"]["stage"]) == (2, "prepare") and read["invariant"] == []
    assert [entry["state"] for entry in read["cpu_tiers"][tier.admin_address]["versions"]] == ["preferred", "canary"]
    assert [model["version"] for model in read["rankers"][ranker.admin_address]["models"]] == [1, 2]
    assert read["rankers"][ranker.admin_address]["models"][0]["p95_ms"] is None  # nothing was answered


def test_what_is_wrong_is_said_and_the_exit_status_tells(fleet) -> None:
    fleet[1].state.load(2)  # by hand, before any ranker has the model
    result = shown(fleet)
    assert result.exit_code == 1
    assert "invariant  VIOLATED" in result.output and "can answer version 2, which ranker" in result.output
    assert shown(fleet, "--json").exit_code == 1


def test_a_host_that_does_not_answer_is_a_line(fleet, unused_tcp_port) -> None:
    _, tier, ranker = fleet
    away = f"127.0.0.1:{unused_tcp_port}"
    result = shown(fleet, "--cpu-tier", away, "--ranker", away)
    assert result.exit_code == 3, result.output
    assert result.output.count(f"{away} did not answer (UNAVAILABLE)") == 2
    assert "2 of 4 hosts did not answer" in result.output
    assert tier.admin_address in result.output and ranker.admin_address in result.output
    one_kind = CliRunner().invoke(status, ["--cpu-tier", tier.admin_address, "--interval", "0"], obj=fleet[0])
    assert one_kind.exit_code == 3 and "as far as can be seen: no ranker was asked" in one_kind.output
    read = json.loads(shown(fleet, "--cpu-tier", away, "--json").output)
    assert "did not answer" in read["cpu_tiers"][away]["error"]


def test_without_addresses_and_without_a_rollout(fleet) -> None:
    result = CliRunner().invoke(status, [], obj=fleet[0])
    assert isinstance(result.exception, InvalidConfig)
