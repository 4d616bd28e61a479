"""Bytes of any kind on a connection of their own, to a server that may end it at any of them."""

import errno
import socket
from contextlib import suppress


def exchange(host: str, port: int, sent: bytes, *, timeout_s: float) -> bytes:
    """What the server answers to these bytes until it ends the connection, by whichever way.

    A reset while we write is an end as well: the write, the shutdown after it, and the read all may meet it.
    """
    with socket.create_connection((host, port), timeout=timeout_s) as connection:
        with suppress(ConnectionError):
            connection.sendall(sent)
        try:
            connection.shutdown(socket.SHUT_WR)
        except OSError as error:
            if error.errno != errno.ENOTCONN:  # the reset came before: Python has no name of its own for it
                raise
        return until_ended(connection)


def until_ended(connection: socket.socket) -> bytes:
    """What comes until the server ends the connection, by whichever way."""
    received = b""
    with suppress(ConnectionError):
        while part := connection.recv(1 << 16):
            received += part
    return received
