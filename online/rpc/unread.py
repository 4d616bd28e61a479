"""Answers that were given to gRPC and that their clients have not read yet."""

from online.rpc_error import Code, RpcError

__all__ = ["UnreadAnswers"]


class UnreadAnswers:
    """Bounds the bytes of answers that wait for their clients, by connection and in all.

    gRPC keeps an answer until its client takes it or the call's deadline passes. A client that asks and does not read
    would fill the memory of a server by that. A connection that has read everything is always given one answer, so
    others cannot keep it from being served. For the coroutines of one event loop.

    Args:
        of_connection: bytes for one connection.
        of_all: bytes for all connections; beyond, only those that have read everything are answered.
    """

    def __init__(self, *, of_connection: int, of_all: int) -> None:
        self._of_connection, self._of_all = of_connection, of_all
        self._by_connection: dict[str, int] = {}
        self.total = 0

    def check(self, connection: str, size: int = 0) -> None:
        """Raise `RpcError` OVERLOADED where a further answer of `size` bytes must not be kept for the connection."""
        unread = self._by_connection.get(connection, 0)
        if unread and (unread + size > self._of_connection or self.total + size > self._of_all):
            raise RpcError(
                Code.OVERLOADED, "answers to this connection are not read",
                expected=f"at most {self._of_connection} bytes that wait to be read, and {self._of_all} of all clients",
                got=f"{unread} bytes of it, {self.total} of all, and an answer of {size} bytes",
                remedy="Read the answers, or ask for fewer at a time.",
            )

    def add(self, connection: str, size: int) -> None:
        """An answer of `size` bytes was given to gRPC."""
        self._by_connection[connection] = self._by_connection.get(connection, 0) + size
        self.total += size

    def remove(self, connection: str, size: int) -> None:
        """It was read, or its call has ended."""
        self.total -= size
        left = self._by_connection.pop(connection, 0) - size  # 0: what is left is empty answers
        if left:
            self._by_connection[connection] = left
