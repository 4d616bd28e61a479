"""What comes to a port and is no call leaves no line in the log, however often it comes."""

import random
from collections.abc import Iterator
from contextlib import closing
from itertools import islice

import pytest

from online.lookup.client import LookupClient
from tests.online.http2 import GOAWAY, HEADERS, PREFACE, SETTINGS, call_beginning, frame, headers
from tests.online.raw_bytes import exchange
from tests.releases import published_rows
from tests.waiting import PATIENCE_S

CONNECTIONS = 400


def junk() -> Iterator[bytes]:
    """Without end; gRPC's own log would have lines of the frames, with bytes that the sender chose."""
    chance, begun = random.Random(1), PREFACE + frame(SETTINGS, 0, 0, b"")
    while True:
        yield chance.randbytes(200)
        yield b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
        yield begun + frame(HEADERS, 5, 1, headers("/no.such/Method", "5x"))  # no time that there is
        yield begun + frame(GOAWAY, 0, 0, bytes(7) + b"\1" + b"it\nends")
        yield call_beginning("/no.such/Method") + frame(chance.randrange(12), chance.randrange(256), 1, b"junk")


@pytest.mark.slow
def test_connections_that_bring_junk_leave_no_line_in_the_log(workspace_with_versions, launch, monkeypatch) -> None:
    monkeypatch.delenv("GRPC_VERBOSITY", raising=False)  # the command sees to it itself
    tier = launch(workspace_with_versions.workspace, "serve", "cpu-tier", "--versions", "1").wait_ready()
    before = tier.errors.read_bytes()
    for name in ("lookup", "admin"):
        host, _, port = tier.port(name).rpartition(":")
        for raw in islice(junk(), CONNECTIONS):
            exchange(host, int(port), raw, timeout_s=PATIENCE_S)
    ids, _ = published_rows(workspace_with_versions.workspace, 1, "item.kge")
    with closing(LookupClient([tier.port("lookup")])) as client:
        assert client.lookup([1], {"item.kge": ids}).found["item.kge"].all()
    logged = tier.errors.read_bytes()[len(before) :]
    assert not logged, (logged.count(b"\n"), logged[:2000])
