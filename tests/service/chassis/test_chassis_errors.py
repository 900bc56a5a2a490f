"""How calls end: TandemErrors arrive as they were raised, everything else as INTERNAL, and every end is counted once."""

import asyncio
import logging
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest

from tandem.api.v1 import model_pb2, model_pb2_grpc, tokenizer_pb2, tokenizer_pb2_grpc
from tandem.errors import FieldViolation, Reason, TandemError, from_rpc_error
from tandem.interceptor import CallCounts, _abort
from tandem.worker.v1 import prefill_pb2, prefill_pb2_grpc

TOKENIZER = "tandem.api.v1.TokenizerService"
PREFILL = "tandem.worker.v1.PrefillService"

FULL_ERROR = TandemError(
    Reason.QUEUE_FULL,
    "4 requests wait",
    metadata={"queued_requests": "4"},
    retry_after_s=2.5,
    violations=(FieldViolation("model", "none"),),
)


class FailingTokenizer(tokenizer_pb2_grpc.TokenizerServiceServicer):
    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error

    async def Tokenize(
        self, request: tokenizer_pb2.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> tokenizer_pb2.TokenizeResponse:
        if self.error is not None:
            raise self.error
        return tokenizer_pb2.TokenizeResponse(token_ids=[1])


class FailingPrefill(prefill_pb2_grpc.PrefillServiceServicer):
    """Admits, then raises."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def Prefill(
        self, request: prefill_pb2.PrefillRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[prefill_pb2.PrefillResponse]:
        yield prefill_pb2.PrefillResponse(admitted=prefill_pb2.Admitted())
        raise self.error


def tokenizer(error: BaseException | None = None):
    return tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server, FailingTokenizer(error), TOKENIZER


def prefill(error: Exception):
    return prefill_pb2_grpc.add_PrefillServiceServicer_to_server, FailingPrefill(error), PREFILL


def assert_same(error: TandemError, expected: TandemError) -> None:
    assert (error.reason, error.message, error.code) == (expected.reason, expected.message, expected.code)
    assert (error.metadata, error.retry_after_s, error.violations) == (
        expected.metadata,
        expected.retry_after_s,
        expected.violations,
    )


async def test_unary_error_arrives_as_raised(start):
    server, channel = await start(tokenizer(FULL_ERROR))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await tokenizer_pb2_grpc.TokenizerServiceStub(channel).Tokenize(tokenizer_pb2.TokenizeRequest())
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert_same(from_rpc_error(caught.value), FULL_ERROR)
    assert server.counts[f"/{TOKENIZER}/Tokenize"] == CallCounts(received=1, rejected=1)


async def test_stream_error_arrives_after_the_messages_before_it(start):
    server, channel = await start(prefill(TandemError(Reason.ENGINE_FAILED, "broken")))
    received = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for response in prefill_pb2_grpc.PrefillServiceStub(channel).Prefill(prefill_pb2.PrefillRequest()):
            received.append(response.WhichOneof("event"))
    assert received == ["admitted"]
    assert_same(from_rpc_error(caught.value), TandemError(Reason.ENGINE_FAILED, "broken"))
    assert server.counts[f"/{PREFILL}/Prefill"] == CallCounts(received=1, failed=1)


@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream", "stream_unary", "stream_stream"])
async def test_malformed_bytes_are_an_invalid_argument_in_all_four_kinds_of_call(start, kind):
    server, channel = await start(four_kinds())
    call = getattr(channel, kind)(f"/toy.Four/{kind}")
    request = iter_of(b"\xff") if kind.startswith("stream") else b"\xff"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await drain(call(request))
    error = from_rpc_error(caught.value)
    assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, Reason.MESSAGE_MALFORMED)
    assert server.counts[f"/toy.Four/{kind}"] == CallCounts(received=1, rejected=1)


@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream", "stream_unary", "stream_stream"])
async def test_all_four_kinds_of_call_answer(start, kind):
    server, channel = await start(four_kinds())
    call = getattr(channel, kind)(f"/toy.Four/{kind}", response_deserializer=model_pb2.GetModelRequest.FromString)
    payload = model_pb2.GetModelRequest(model="m").SerializeToString()
    request = iter_of(payload) if kind.startswith("stream") else payload
    assert [response.model for response in await drain(call(request))] == ["m"]
    assert server.counts[f"/toy.Four/{kind}"] == CallCounts(received=1, ok=1)


async def test_text_that_is_not_utf8_is_an_invalid_argument(start):
    _, channel = await start(tokenizer())
    broken = tokenizer_pb2.TokenizeRequest(text="ab").SerializeToString().replace(b"ab", b"\xc3\x28")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary(f"/{TOKENIZER}/Tokenize")(broken)
    assert from_rpc_error(caught.value).reason is Reason.MESSAGE_MALFORMED


async def test_unknown_exception_is_internal_and_its_id_is_in_the_log(start, caplog):
    server, channel = await start(tokenizer(KeyError("secret prompt")))
    with caplog.at_level(logging.ERROR), pytest.raises(grpc.aio.AioRpcError) as caught:
        await tokenizer_pb2_grpc.TokenizerServiceStub(channel).Tokenize(tokenizer_pb2.TokenizeRequest())
    error = from_rpc_error(caught.value)
    assert (error.code, error.reason) == (grpc.StatusCode.INTERNAL, Reason.INTERNAL)
    assert "secret" not in error.message
    records = [record for record in caplog.records if error.metadata["error_id"] in record.getMessage()]
    assert [type(record.exc_info[1]) for record in records] == [KeyError]
    assert server.counts[f"/{TOKENIZER}/Tokenize"] == CallCounts(received=1, failed=1)


async def test_stray_cancelled_error_does_not_leave_the_client_waiting(start, caplog):
    server, channel = await start(tokenizer(asyncio.CancelledError()))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await tokenizer_pb2_grpc.TokenizerServiceStub(channel).Tokenize(tokenizer_pb2.TokenizeRequest(), timeout=10)
    assert from_rpc_error(caught.value).reason is Reason.INTERNAL
    assert server.counts[f"/{TOKENIZER}/Tokenize"] == CallCounts(received=1, failed=1)


async def test_unknown_method_is_unimplemented(start):
    _, channel = await start(tokenizer())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await model_pb2_grpc.ModelServiceStub(channel).ListModels(model_pb2.ListModelsRequest())
    assert from_rpc_error(caught.value).reason is Reason.UNIMPLEMENTED


async def test_oversize_message_is_too_large(start):
    _, channel = await start(tokenizer())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await tokenizer_pb2_grpc.TokenizerServiceStub(channel).Tokenize(tokenizer_pb2.TokenizeRequest(text="x" * (5 * 1024 * 1024)))
    assert from_rpc_error(caught.value).reason is Reason.MESSAGE_TOO_LARGE


async def test_huge_error_still_arrives(start):
    violations = [FieldViolation("f" * 10_000, "é" * 10_000)] * 1000
    _, channel = await start(tokenizer(TandemError(Reason.INVALID_REQUEST, "\ud800" + "é" * 100_000, violations=violations)))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await tokenizer_pb2_grpc.TokenizerServiceStub(channel).Tokenize(tokenizer_pb2.TokenizeRequest())
    error = from_rpc_error(caught.value)
    assert error.reason is Reason.INVALID_REQUEST
    assert error.message.startswith("?éé")
    assert error.violations


async def test_unreachable_server_is_a_lost_worker(unused_tcp_port):
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{unused_tcp_port}")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await tokenizer_pb2_grpc.TokenizerServiceStub(channel).Tokenize(tokenizer_pb2.TokenizeRequest(), timeout=30)
    await channel.close()
    assert from_rpc_error(caught.value).reason is Reason.WORKER_LOST


def four_kinds():
    """One method of each kind, each echoing its (first) request."""

    async def unary(request, context):
        return request

    async def stream(request, context):
        yield request

    async def first(requests, context):
        return await anext(requests)

    async def each(requests, context):
        async for request in requests:
            yield request

    codec = {
        "request_deserializer": model_pb2.GetModelRequest.FromString,
        "response_serializer": model_pb2.GetModelRequest.SerializeToString,
    }
    handlers = {
        "unary_unary": grpc.unary_unary_rpc_method_handler(unary, **codec),
        "unary_stream": grpc.unary_stream_rpc_method_handler(stream, **codec),
        "stream_unary": grpc.stream_unary_rpc_method_handler(first, **codec),
        "stream_stream": grpc.stream_stream_rpc_method_handler(each, **codec),
    }
    generic = grpc.method_handlers_generic_handler("toy.Four", handlers)
    return lambda servicer, server: server.add_generic_rpc_handlers((generic,)), None, PREFILL


async def iter_of(*payloads):
    for payload in payloads:
        yield payload


async def drain(call):
    if isinstance(call, grpc.aio.UnaryUnaryCall | grpc.aio.StreamUnaryCall):
        return [await call]
    return [response async for response in call]


class WritingPrefill(prefill_pb2_grpc.PrefillServiceServicer):
    """Writes by itself instead of yielding; fails after the first message."""

    async def Prefill(self, request: prefill_pb2.PrefillRequest, context: grpc.aio.ServicerContext) -> None:
        await context.write(prefill_pb2.PrefillResponse(admitted=prefill_pb2.Admitted()))
        raise TandemError(Reason.KV_BLOCKS_EXHAUSTED, "no room")


async def test_handlers_that_write_by_themselves_end_the_same_way(start):
    server, channel = await start((prefill_pb2_grpc.add_PrefillServiceServicer_to_server, WritingPrefill(), PREFILL))
    call = prefill_pb2_grpc.PrefillServiceStub(channel).Prefill(prefill_pb2.PrefillRequest())
    assert (await call.read()).WhichOneof("event") == "admitted"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert from_rpc_error(caught.value).reason is Reason.KV_BLOCKS_EXHAUSTED
    assert server.counts[f"/{PREFILL}/Prefill"] == CallCounts(received=1, rejected=1)


async def test_a_client_that_has_gone_is_no_error_of_ours() -> None:
    class Gone:
        async def abort_with_status(self, status: object) -> None:
            raise grpc.aio.InternalError("the call is over")

    with pytest.raises(asyncio.CancelledError):
        await _abort(Gone(), TandemError(Reason.DEADLINE_EXCEEDED, "late"))
