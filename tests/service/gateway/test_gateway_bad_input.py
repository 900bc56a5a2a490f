"""What a client gets for requests that cannot be served, and that nothing else is harmed."""

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import grpc.aio
import pytest

from tandem.api.v1 import generation_pb2, model_pb2, model_pb2_grpc, tokenizer_pb2, tokenizer_pb2_grpc
from tandem.errors import Reason, from_rpc_error
from tests.service.gateway.conftest import Suite

NAN, INFINITY = float("nan"), float("inf")
TEXT = {"text": "x"}

BAD_FIELDS: list[tuple[Mapping[str, Any], Reason, str]] = [
    ({}, Reason.PROMPT_EMPTY, "input"),
    ({"text": ""}, Reason.PROMPT_EMPTY, "text"),
    ({"token_ids": {"ids": []}}, Reason.PROMPT_EMPTY, "token_ids"),
    ({"chat": {"messages": []}}, Reason.PROMPT_EMPTY, "chat"),
    ({"chat": {"messages": [{"role": 0, "content": "x"}]}}, Reason.INVALID_REQUEST, "chat.messages[0].role"),
    ({"chat": {"messages": [{"role": 1}, {"role": 77}]}}, Reason.INVALID_REQUEST, "chat.messages[1].role"),
    ({"chat": {"messages": [{"role": 2}] * 3000}}, Reason.PROMPT_TOO_LONG, "chat"),
    ({"text": "x" * 2048}, Reason.PROMPT_TOO_LONG, "input"),
    ({"text": "x" * 100_000}, Reason.PROMPT_TOO_LONG, "text"),
    ({"token_ids": {"ids": [5] * 2048}}, Reason.PROMPT_TOO_LONG, "token_ids.ids"),
    ({"token_ids": {"ids": [5, 512]}}, Reason.INVALID_REQUEST, "token_ids.ids"),
    ({"token_ids": {"ids": [2**32 - 1]}}, Reason.INVALID_REQUEST, "token_ids.ids"),
    *(
        ({**TEXT, "sampling": {name: value}}, Reason.INVALID_SAMPLING, f"sampling.{name}")
        for name, values in {
            "temperature": (-0.1, 100.1, NAN, INFINITY, -INFINITY),
            "top_k": (-1,),
            "top_p": (0.0, -1.0, 1.01, NAN, INFINITY),
            "min_p": (-0.1, 1.1, NAN),
            "repetition_penalty": (0.0, 10.1, NAN, INFINITY),
            "presence_penalty": (-2.1, 2.1, NAN),
            "frequency_penalty": (-2.1, 2.1, NAN),
        }.items()
        for value in values
    ),
    *(
        ({**TEXT, "stopping": stopping}, Reason.INVALID_REQUEST, f"stopping.{field}")
        for stopping, field in (
            ({"max_tokens": 0}, "max_tokens"),
            ({"max_tokens": -1}, "max_tokens"),
            ({"max_tokens": 2**31}, "max_tokens"),
            ({"max_tokens": 2**63 - 1}, "max_tokens"),
            ({"max_tokens": 2048}, "max_tokens"),
            ({"min_tokens": -1}, "min_tokens"),
            ({"max_tokens": 4, "min_tokens": 5}, "min_tokens"),
            ({"min_tokens": 2048}, "min_tokens"),
            ({"stop": ["x"] * 100_000}, "stop"),
            ({"stop": [""]}, "stop"),
            ({"stop": ["x" * 257]}, "stop"),
            ({"stop_token_ids": [1] * 257}, "stop_token_ids"),
            ({"stop_token_ids": [512]}, "stop_token_ids"),
        )
    ),
    ({**TEXT, "output": {"logprobs": -1}}, Reason.INVALID_REQUEST, "output.logprobs"),
    ({**TEXT, "output": {"prompt_logprobs": 21}}, Reason.INVALID_REQUEST, "output.prompt_logprobs"),
]


@pytest.mark.parametrize(("fields", "reason", "field"), BAD_FIELDS, ids=range(len(BAD_FIELDS)))
async def test_a_bad_field_is_named(suite: Suite, fields: Mapping[str, Any], reason: Reason, field: str) -> None:
    answer = await suite.generate(**fields)
    assert answer.error is not None
    assert answer.error.reason is reason
    assert answer.error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in answer.error.violations] == [field]
    assert not answer.responses
    assert not suite.prefill.requests


async def test_all_bad_fields_are_named_at_once(suite: Suite) -> None:
    answer = await suite.generate(text="x", sampling={"top_p": 2.0, "temperature": NAN}, stopping={"max_tokens": 0})
    assert answer.error is not None
    fields = [violation.field for violation in answer.error.violations]
    assert fields == ["sampling.temperature", "sampling.top_p", "stopping.max_tokens"]


async def test_an_unknown_model_is_not_found(suite: Suite) -> None:
    answer = await suite.generate(model="gpt-17", text="x")
    assert answer.error is not None
    assert (answer.error.reason, answer.error.code) == (Reason.UNKNOWN_MODEL, grpc.StatusCode.NOT_FOUND)
    assert (await suite.generate(model="random:tiny", text="x", stopping={"max_tokens": 1})).error is None


async def test_malformed_bytes_and_text_are_the_clients_fault(suite: Suite) -> None:
    path = "/tandem.api.v1.GenerationService/Generate"
    call = suite.channel.unary_stream(path, request_serializer=None, response_deserializer=None)
    for payload in (b"\xff\xff\xff", b"\x12\x02\xff\xfe"):  # no message; invalid UTF-8 in `text`
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call(payload).read()
        assert from_rpc_error(raised.value).reason is Reason.MESSAGE_MALFORMED


async def test_an_oversize_message_is_refused(suite: Suite) -> None:
    answer = await suite.generate(text="x" * (5 << 20))
    assert answer.error is not None
    assert answer.error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await suite.generate(text="x", stopping={"max_tokens": 2})).error is None


async def test_strange_but_legal_text_is_served(suite: Suite) -> None:
    for text in ("\0\0", "\u202eabc\u202c", "\ufeff", "a\u0301", "\U0010ffff", " ", "\n" * 50):
        answer = await suite.generate(text=text, stopping={"max_tokens": 3})
        assert answer.error is None
        assert list(suite.prefill.requests[-1].token_ids) == [3 + byte for byte in text.encode()]


async def test_bad_input_does_not_hold_up_the_loop(suite: Suite) -> None:
    """Between two turns of a task this thread computes for a moment only. Its own time counts, since others may have the cores."""
    longest = 0.0

    async def beat() -> None:
        nonlocal longest
        while True:
            began = time.thread_time()
            await asyncio.sleep(0.001)
            longest = max(longest, time.thread_time() - began)

    beating = asyncio.create_task(beat())
    await suite.generate(text="x", stopping={"stop": ["x"] * 100_000})
    await suite.generate(token_ids={"ids": [5] * 500_000})
    await suite.generate(chat={"messages": [{"role": 2, "content": "a b " * 200}] * 2000})
    beating.cancel()
    assert longest < 0.25  # 50 ms in a process of its own; here client and workers share the loop


class HeldWork:
    """A method that waits until the event loop has had a turn. `kept_it`: somewhere it had none within ten seconds."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.num_calls = 0
        self.kept_it = False
        self._method = method
        self._loop = asyncio.get_running_loop()

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        turn = threading.Event()
        self.num_calls += 1
        self._loop.call_soon_threadsafe(turn.set)
        self.kept_it |= not turn.wait(10)
        return self._method(*arguments, **options)


@pytest.mark.parametrize("work", ["encode", "decode", "render"])
async def test_the_loop_goes_on_while_a_long_prompt_is_worked_on(suite: Suite, monkeypatch: pytest.MonkeyPatch, work: str) -> None:
    owner = suite.model.template if work == "render" else suite.model.tokenizer
    held = HeldWork(getattr(owner, work))
    monkeypatch.setattr(owner, work, held)
    stub = tokenizer_pb2_grpc.TokenizerServiceStub(suite.channel)
    match work:
        case "encode":
            answer = await suite.generate(text="a b " * 1500)
            assert answer.error is not None and answer.error.reason is Reason.PROMPT_TOO_LONG  # by its tokens
        case "decode":
            await stub.Detokenize(tokenizer_pb2.DetokenizeRequest(token_ids=[100] * 5000))
        case _:
            chat = generation_pb2.Chat(messages=[{"role": 2, "content": "a b "}] * 100)
            await stub.ApplyChatTemplate(tokenizer_pb2.ApplyChatTemplateRequest(chat=chat))
    assert held.num_calls == 1
    assert not held.kept_it


class TestTokenizer:
    async def test_round_trip(self, suite: Suite) -> None:
        stub = tokenizer_pb2_grpc.TokenizerServiceStub(suite.channel)
        tokens = (await stub.Tokenize(tokenizer_pb2.TokenizeRequest(text="<s>grüße 🙂"))).token_ids
        assert tokens[0] == 1
        shown = await stub.Detokenize(tokenizer_pb2.DetokenizeRequest(token_ids=tokens))
        assert shown.text == "<s>grüße 🙂"
        plain = await stub.Detokenize(tokenizer_pb2.DetokenizeRequest(token_ids=tokens, skip_special_tokens=True))
        assert plain.text == "grüße 🙂"

    async def test_chat_template(self, suite: Suite) -> None:
        stub = tokenizer_pb2_grpc.TokenizerServiceStub(suite.channel)
        chat = generation_pb2.Chat(messages=[{"role": 2, "content": "hi"}])
        rendered = await stub.ApplyChatTemplate(tokenizer_pb2.ApplyChatTemplateRequest(chat=chat, omit_generation_prompt=True))
        assert rendered.text == "user: hi\n"
        assert list(rendered.token_ids) == [3 + byte for byte in b"user: hi\n"]

    @pytest.mark.parametrize(
        ("method", "request_", "reason"),
        [
            ("Tokenize", tokenizer_pb2.TokenizeRequest(text="x" * 1_000_000), Reason.PROMPT_TOO_LONG),
            ("Tokenize", tokenizer_pb2.TokenizeRequest(model="other", text="x"), Reason.UNKNOWN_MODEL),
            ("Detokenize", tokenizer_pb2.DetokenizeRequest(token_ids=[512]), Reason.INVALID_REQUEST),
            ("ApplyChatTemplate", tokenizer_pb2.ApplyChatTemplateRequest(), Reason.INVALID_REQUEST),
            ("ApplyChatTemplate", tokenizer_pb2.ApplyChatTemplateRequest(chat={"messages": [{}]}), Reason.INVALID_REQUEST),
        ],
    )
    async def test_bad_input(self, suite: Suite, method: str, request_: Any, reason: Reason) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await getattr(tokenizer_pb2_grpc.TokenizerServiceStub(suite.channel), method)(request_)
        assert from_rpc_error(raised.value).reason is reason


async def test_models_are_described(suite: Suite) -> None:
    stub = model_pb2_grpc.ModelServiceStub(suite.channel)
    (listed,) = (await stub.ListModels(model_pb2.ListModelsRequest())).models
    assert listed == (await stub.GetModel(model_pb2.GetModelRequest(model="random:tiny"))).model
    assert (listed.name, listed.context_tokens, listed.vocabulary_size) == ("random:tiny", 2048, 512)
    assert list(listed.end_token_ids) == [2]
    assert listed.chat_capable
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.GetModel(model_pb2.GetModelRequest(model="other"))
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


async def test_reflection_lists_every_service(suite: Suite) -> None:
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    stub = reflection_pb2_grpc.ServerReflectionStub(suite.channel)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    async for response in call:
        names = {service.name for service in response.list_services_response.service}
    assert names >= {f"tandem.api.v1.{name}Service" for name in ("Generation", "Tokenizer", "Model", "Operations")}
