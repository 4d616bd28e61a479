"""Bad input at both servers: typed refusals, and afterwards the right answers, from processes that have not grown."""

import math
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from online.lookup.client import LookupClient
from online.proto import lookup_pb2, rank_pb2
from online.ranking.client import RankClient
from online.rpc.channel import open_channel
from tests.fleet import anonymous_bytes, descriptors
from tests.online.http2 import call_beginning, frame
from tests.online.raw_bytes import exchange
from tests.releases import published_rows
from tests.waiting import PROGRAM_S

DEADLINE_S = 20
GROWTH_BYTES, GROWTH_DESCRIPTORS = 32 << 20, 8
METHODS = {"lookup": "/facet.v1.Lookup/Lookup", "rank": "/facet.v1.Rank/Rank"}
ROUND = settings(
    max_examples=20, database=None, derandomize=True, suppress_health_check=list(HealthCheck),
)
TYPED = {
    grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}

RUNS = {
    "lookup": 3000, "message": 5000, "rank": 150, "cpu_tier_admin": 500, "ranker_admin": 200, "gate": 10_000,
    "shards": 5000, "manifest": 3000, "roles": 3000, "segment_header": 300, "delta_header": 150, "view_tags": 3000,
}  # fmt: skip
"""Of each target of `tests.online.fuzz`, about as many as it manages in a second or two after it has started."""

int64s = st.integers(-(2**63), 2**63 - 1)
packed = st.one_of(
    st.lists(int64s, max_size=20).map(lambda ids: struct.pack(f"<{len(ids)}q", *ids)),
    int64s.map(lambda id_: struct.pack("<q", id_) * 300),
    st.binary(max_size=50),
)
texts = st.one_of(st.text(max_size=20), st.text(min_size=1, max_size=3).map(lambda text: text * 3000))
tables = st.builds(
    lookup_pb2.TableIds, name=st.one_of(st.sampled_from(["item.kge", "user.kge", "item.none"]), texts), ids=packed
)
lookups = st.builds(
    lookup_pb2.LookupRequest, request_id=texts, accepted_versions=st.lists(st.one_of(st.just(1), int64s), max_size=70),
    tables=st.lists(tables, max_size=70),
    shard=st.one_of(
        st.none(),
        st.builds(lookup_pb2.Shard, index=st.integers(0, 2**32 - 1), count=st.integers(0, 2**32 - 1)),
    ),
)
ranks = st.builds(
    rank_pb2.RankRequest, request_id=texts, user=int64s, candidates=packed,
    now_seconds=st.one_of(st.floats(), st.sampled_from([math.nan, math.inf, 1e308])),
)


class Served:
    """Both servers as processes, and what they must still answer."""

    def __init__(self, workspace, launch) -> None:
        tier = launch(workspace, "serve", "cpu-tier", "--versions", "1").wait_ready()
        ranker = launch(workspace, "serve", "ranker", "--versions", "1", "--cpu-tier", tier.port("lookup")).wait_ready()
        self.processes = [tier, ranker]
        self.addresses = {"lookup": tier.port("lookup"), "rank": ranker.port("rank")}
        self.ids, self.rows = published_rows(workspace, 1, "item.kge")
        self.clients = LookupClient([tier.port("lookup")], timeout_s=DEADLINE_S), RankClient(ranker.port("rank"))
        self.channels = {name: open_channel(address) for name, address in self.addresses.items()}
        self.expected = self.scores()

    def scores(self) -> np.ndarray:
        return self.clients[1].rank(1, self.ids[:20], now_seconds=1.3e9).scores

    def send(self, service: str, raw: bytes) -> None:
        """A call with these bytes as its message: answered, or refused with a status that names the caller's slip."""
        try:
            self.channels[service].unary_unary(METHODS[service])(raw, timeout=DEADLINE_S)
        except grpc.RpcError as error:
            assert error.code() in TYPED, (error.code(), error.details(), raw[:200])

    def write(self, service: str, raw: bytes) -> None:
        """These bytes on a new connection, which then ends; whatever the server says to it is right."""
        host, _, port = self.addresses[service].rpartition(":")
        exchange(host, int(port), raw, timeout_s=DEADLINE_S)

    def check(self) -> None:
        """Good requests are answered as ever."""
        answer = self.clients[0].lookup([1], {"item.kge": self.ids})
        assert answer.found["item.kge"].all() and (answer.rows["item.kge"] == self.rows).all()
        np.testing.assert_allclose(self.scores(), self.expected, atol=1e-6)

    def sizes(self) -> list[tuple[int, int]]:
        pids = [launched.process.pid for launched in self.processes]
        return [(anonymous_bytes(pid), descriptors(pid)) for pid in pids]


def attack(served: Served, examples: settings) -> None:
    """Everything bad, at both servers; after each kind they must answer."""

    @examples
    @given(lookups)
    def lookup_messages(request):
        served.send("lookup", request.SerializeToString())

    @examples
    @given(ranks)
    def rank_messages(request):
        served.send("rank", request.SerializeToString())

    @examples
    @given(st.sampled_from(sorted(METHODS)), st.binary(max_size=200))
    def bytes_that_are_no_message(service, raw):
        served.send(service, raw)

    @examples
    @given(st.sampled_from(sorted(METHODS)), st.binary(max_size=200), st.integers(0, 3))
    def bytes_that_are_no_http(service, noise, kind):
        begun = call_beginning(METHODS[service])
        message = b"\0" + struct.pack(">I", 1000) + noise  # of which the rest never comes
        served.write(
            service,
            [
                noise,
                begun[: len(noise)],
                begun + frame(0, 0, 1, message),
                begun + frame(noise[0] if noise else 0, 1, 1, noise, length=1 + 2 * len(noise)),
            ][kind],
        )

    def a_million_ids():
        million = np.arange(10**6, dtype="<i8").tobytes()
        table = lookup_pb2.TableIds(name="item.kge", ids=million)
        served.send("lookup", lookup_pb2.LookupRequest(accepted_versions=[1], tables=[table]).SerializeToString())
        served.send("rank", rank_pb2.RankRequest(candidates=million).SerializeToString())

    kinds = (lookup_messages, rank_messages, bytes_that_are_no_message, bytes_that_are_no_http, a_million_ids)
    for kind in kinds:
        kind()
        served.check()


@pytest.mark.slow
def test_bad_input_is_refused_by_type_and_leaves_the_servers_as_they_were(
    workspace_with_versions, launch, monkeypatch
) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")  # not one for each of forty threads, that fills when it is first used
    served = Served(workspace_with_versions.workspace, launch)
    attack(served, ROUND)  # warms every path up
    before = served.sizes()
    for _ in range(2):
        attack(served, settings(ROUND, max_examples=30, derandomize=False))
    grown = [(now - then, more - fewer) for (now, more), (then, fewer) in zip(served.sizes(), before, strict=True)]
    assert all(size < GROWTH_BYTES and count <= GROWTH_DESCRIPTORS for size, count in grown), grown
    for launched in served.processes:
        errors = launched.errors.read_text()
        assert launched.process.poll() is None and "Traceback" not in errors, errors[-3000:]
    for end in (*served.clients, *served.channels.values()):
        end.close()


def test_make_fuzz_and_the_suite_run_every_target() -> None:
    from tests.online.fuzz.targets import TARGETS

    makefile = Path(__file__).parents[2] / "Makefile"
    of_make = re.search(r"for target in ([a-z_\s\\]*); do", makefile.read_text())[1].replace("\\", " ").split()
    assert sorted(of_make) == sorted(RUNS) == sorted(TARGETS)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "runs"), RUNS.items())
def test_coverage_guided_fuzzing_finds_nothing(workspace_with_versions, tmp_path, target, runs) -> None:
    """A short run with a fixed seed; `make fuzz` goes on for longer."""
    # Linux counts the peak memory of whoever starts a program as the program's: a shell's is small, this process's not.
    command = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-m", "tests.online.fuzz", target]
    command += [f"-runs={runs}", "-seed=4", "-timeout=60", "-reload=0"]  # a reload, after a second, adds runs
    done = subprocess.run(
        [*command, f"-artifact_prefix={tmp_path}/", "--workspace", str(workspace_with_versions.workspace.root)],
        capture_output=True, text=True, timeout=PROGRAM_S, env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0 and f"Done {runs} runs" in done.stderr, done.stderr[-4000:]
