"""What a gateway of another make, or a broken one, might send: each request is refused by itself, and the engine lives on."""

from typing import Any

import grpc
import pytest

from tandem.api.v1 import generation_pb2
from tandem.errors import Reason, from_rpc_error
from tandem.worker.v1 import decode_pb2, kv_pb2, prefill_pb2
from tests.fakes.runner import CONTEXT_TOKENS, VOCABULARY_SIZE, completion
from tests.service.workers.harness import (
    Node,
    decode_request,
    generate,
    node,
    open_decode,
    open_prefill,
    pair,
    prefill_request,
    sampling,
)

PROMPT = [(11 * index + 5) % 251 for index in range(21)]
NAN, INFINITY = float("nan"), float("inf")


def rule(**fields: Any) -> dict[str, Any]:
    return {"stop_rule": prefill_pb2.StopRule(**{"max_tokens": 8, **fields})}


SAMPLING: dict[str, dict[str, Any]] = {
    "sampling unset": {"sampling": None},
    "a field of it unset": {"sampling": generation_pb2.SamplingParams(temperature=1.0)},
    "temperature NaN": {"sampling": sampling(temperature=NAN)},
    "temperature negative": {"sampling": sampling(temperature=-1.0)},
    "top_k negative": {"sampling": sampling(top_k=-1)},
    "top_p 0": {"sampling": sampling(top_p=0.0, temperature=1.0)},
    "min_p over 1": {"sampling": sampling(min_p=1.5, temperature=1.0)},
    "repetition_penalty 0": {"sampling": sampling(repetition_penalty=0.0)},
    "presence_penalty infinite": {"sampling": sampling(presence_penalty=INFINITY)},
    "frequency_penalty NaN": {"sampling": sampling(frequency_penalty=NAN)},
}
REQUESTS: dict[str, dict[str, Any]] = {
    "no request id": {"request_id": ""},
    "attempt 0": {"attempt": 0},
    "no tokens": {"token_ids": []},
    "token outside of the vocabulary": {"token_ids": [*PROMPT[:-1], VOCABULARY_SIZE]},
    "more tokens than the context": {"token_ids": [1] * CONTEXT_TOKENS, "num_prompt_tokens": CONTEXT_TOKENS},
    "num_prompt_tokens 0": {"num_prompt_tokens": 0},
    "num_prompt_tokens too high": {"num_prompt_tokens": len(PROMPT) + 1},
    "max_tokens 0": rule(max_tokens=0),
    "max_tokens generated already": {"num_prompt_tokens": len(PROMPT) - 2, **rule(max_tokens=2)},
    "end token outside of the vocabulary": rule(min_tokens=4, end_token_ids=[VOCABULARY_SIZE]),
    "no token left to draw": {"sampling": sampling(temperature=1.0, top_k=5)} | rule(min_tokens=4, end_token_ids=range(251)),
    "logprobs negative": {"logprobs": -5},
    "logprobs of more than all": {"logprobs": 2**31 - 1},
}
PROMPT_LOGPROBS: dict[str, dict[str, Any]] = {"prompt_logprobs negative": {"prompt_logprobs": -5}}
TICKETS: dict[str, dict[str, Any]] = {
    "no ticket id": {"ticket_id": ""},
    "a block too few": {"block_ids": [0] * 5},
    "a block too many": {"block_ids": [0] * 7},
    "num_tokens other than the request's": {"num_tokens": 22},
    "num_tokens 0": {"num_tokens": 0},
    "another epoch": {"epoch": 2},
    "no address": {"address": ""},
    "layout of nothing": {"layout": None},
    "no checksum": {"checksum_algorithm": 0},
    "a ticket id longer than any frame": {"ticket_id": "x" * 100_000},
}
UNREACHABLE: dict[str, tuple[str, int]] = {
    "host too long": ("a" * 300, 5),
    "host with an empty part": ("a..b", 5),
    "host with a NUL": ("a\0b", 5),
    "host empty": ("", 5),
    "port 0": ("127.0.0.1", 0),
    "port too high": ("127.0.0.1", 99_999),
}
REFUSALS = {
    Reason.INVALID_REQUEST,
    Reason.INVALID_SAMPLING,
    Reason.PROMPT_TOO_LONG,
    Reason.KV_LAYOUT_MISMATCH,
}


def changed(message: Any, fields: dict[str, Any]) -> Any:
    """A copy of the message with other values; None unsets."""
    copy = type(message).FromString(message.SerializeToString())
    for name in fields:
        copy.ClearField(name)
    copy.MergeFrom(type(message)(**{name: value for name, value in fields.items() if value is not None}))
    return copy


async def refusal(call: grpc.aio.UnaryStreamCall) -> Reason:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        while await call.read() is not grpc.aio.EOF:
            pass
    return from_rpc_error(caught.value).reason


async def survives(at: Node) -> None:
    assert (await first_token(at, prefill_request(PROMPT, first_token_only=True))) == completion(PROMPT, 1)[0]
    await at.wait_idle()


async def first_token(at: Node, request: prefill_pb2.PrefillRequest) -> int:
    events = [event async for event in open_prefill(at, request)]
    return int(events[1].first_token.token.token_id)


async def test_prefill_refuses_what_would_break_it() -> None:
    async with node("prefill") as at:
        for name, fields in (SAMPLING | REQUESTS | PROMPT_LOGPROBS).items():
            assert await refusal(open_prefill(at, changed(prefill_request(PROMPT), fields))) in REFUSALS, name
        await survives(at)


async def test_decode_refuses_what_would_break_it() -> None:
    async with pair() as nodes:
        for name, fields in (SAMPLING | REQUESTS).items():
            request, call = await _prefilled(nodes.prefill)
            assert await refusal(open_decode(nodes.decode, changed(request, fields))) in REFUSALS, name
            call.cancel()
        await nodes.decode.wait_idle()
        assert (await generate(nodes, prefill_request(PROMPT)))[0] == completion(PROMPT, 8)


async def test_decode_refuses_tickets_that_contradict_themselves() -> None:
    async with pair() as nodes:
        for name, fields in TICKETS.items():
            request, call = await _prefilled(nodes.prefill)
            bad = changed(request, {"ticket": changed(request.ticket, fields)})
            assert await refusal(open_decode(nodes.decode, bad)) in REFUSALS, name
            call.cancel()
        assert await refusal(open_decode(nodes.decode, changed(request, {"ticket": None}))) in REFUSALS
        await nodes.decode.wait_idle()
        assert (await generate(nodes, prefill_request(PROMPT)))[0] == completion(PROMPT, 8)


async def test_offers_that_lead_nowhere_cut_one_request_only() -> None:
    async with pair() as nodes:
        for name, (host, port) in UNREACHABLE.items():
            request, call = await _prefilled(nodes.prefill)
            offer = kv_pb2.TransportOffer(tcp=kv_pb2.TcpOffer(host=host, port=port))
            bad = changed(request, {"ticket": changed(request.ticket, {"offers": [offer]})})
            assert await refusal(open_decode(nodes.decode, bad)) is Reason.TRANSFER_INTERRUPTED, name
            call.cancel()
        await nodes.decode.wait_idle()
        assert (await generate(nodes, prefill_request(PROMPT)))[0] == completion(PROMPT, 8)


async def test_a_producers_first_token_outside_of_the_vocabulary_breaks_one_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    async with pair() as nodes:
        producer = nodes.prefill.worker._producer
        finish = producer.finish
        with monkeypatch.context() as patch:
            patch.setattr(producer, "finish", lambda ticket_id, token: finish(ticket_id, token + VOCABULARY_SIZE))
            request, _ = await _prefilled(nodes.prefill)
            assert await refusal(open_decode(nodes.decode, request)) is Reason.INTERNAL
        await nodes.decode.wait_idle()
        assert (await generate(nodes, prefill_request(PROMPT)))[0] == completion(PROMPT, 8)


async def _prefilled(at: Node) -> tuple[decode_pb2.DecodeRequest, grpc.aio.UnaryStreamCall]:
    request = prefill_request(PROMPT)
    call = open_prefill(at, request)
    return decode_request((await call.read()).admitted, request), call
