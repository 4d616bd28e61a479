"""Channels: addresses, and options that fit what servers allow."""

import pytest

from online.rpc.channel import CHANNEL_OPTIONS, open_channel
from online.rpc.limits import Limits
from pipelines.contracts.errors import InvalidConfig


@pytest.mark.parametrize("address", ["localhost", ":80", "host:", "host:port", ""])
def test_an_address_needs_host_and_port(address) -> None:
    with pytest.raises(InvalidConfig, match="host:port"):
        open_channel(address)


def test_clients_ping_no_more_often_than_servers_allow() -> None:
    options = dict(CHANNEL_OPTIONS)
    assert options["grpc.keepalive_time_ms"] >= 1.5 * Limits().ping_interval_s * 1e3
    assert "grpc.keepalive_permit_without_calls" not in options  # nor without a call


def test_clients_take_the_largest_answer_of_a_server() -> None:
    assert dict(CHANNEL_OPTIONS)["grpc.max_receive_message_length"] >= Limits().response_bytes
