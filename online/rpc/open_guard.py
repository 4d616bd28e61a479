"""Health and reflection: they answer while all threads are busy, to anybody, and can hold nothing but coroutines."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from online.rpc.limits import Limits
from online.rpc.message import parsed
from online.rpc.waiting import WaitingCalls
from online.rpc_error import RpcError, abort

__all__ = ["OpenGuard"]

Handler = grpc.RpcMethodHandler


class OpenGuard:
    """Puts limits before methods that are written for gRPC's asyncio server.

    A call of one message has `message_s` to send it and needs a deadline as every other; a stream ends after `call_s`.
    """

    def __init__(self, waiting: WaitingCalls, limits: Limits) -> None:
        self._waiting, self._limits = waiting, limits

    def of_message(self, handler: Handler) -> Handler:
        """Guards a method of one request and one answer."""

        async def behavior(context: grpc.aio.ServicerContext) -> None:
            remaining_s = self._limits.remaining_s(context)
            raw = await self._waiting.message(context, min(self._limits.message_s, remaining_s))
            await context.write(await handler.unary_unary(parsed(raw, handler.request_deserializer), context))

        return _of_stream(behavior, handler)

    def of_stream(self, handler: Handler) -> Handler:
        """Guards a method of streams on both sides."""

        async def requests(context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            while (raw := await context.read()) is not grpc.aio.EOF:
                yield parsed(raw, handler.request_deserializer)

        async def behavior(context: grpc.aio.ServicerContext) -> None:
            with self._waiting.at_most(self._limits.call_s):
                async for response in handler.stream_stream(requests(context), context):
                    await context.write(response)

        return _of_stream(behavior, handler)


def _of_stream(behavior: Callable[[grpc.aio.ServicerContext], Awaitable[None]], handler: Handler) -> Handler:
    async def answer(_: Any, context: grpc.aio.ServicerContext) -> None:
        try:
            await behavior(context)
        except RpcError as error:
            await abort(context, error)

    # As a stream of messages either way, which is the same to a client: see `Guard`.
    return grpc.stream_stream_rpc_method_handler(answer, None, handler.response_serializer)
