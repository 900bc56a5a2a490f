"""What a client gets when all goes well."""

import asyncio
import time

import pytest
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

from tandem.api.v1 import generation_pb2, operations_pb2, operations_pb2_grpc
from tests.fakes.workers import letters, spelling
from tests.service.gateway.conftest import MakeSuite, Suite

USER = generation_pb2.CHAT_ROLE_USER


def chat(*contents: str) -> generation_pb2.Chat:
    return generation_pb2.Chat(messages=[generation_pb2.ChatMessage(role=USER, content=content) for content in contents])


def ids(text: str) -> list[int]:
    return [3 + byte for byte in text.encode()]


async def test_text_gives_the_workers_tokens_in_order(suite: Suite) -> None:
    answer = await suite.generate(text="hello", stopping={"max_tokens": 20})
    expected = [letters(ids("hello"), index) for index in range(20)]
    assert answer.token_ids == expected
    assert answer.text == "".join(chr(token_id - 3) for token_id in expected)
    assert answer.finished.reason == generation_pb2.FINISH_REASON_LENGTH
    assert answer.finished.usage.prompt_tokens == 5
    assert answer.finished.usage.completion_tokens == 20
    assert answer.finished.timings.handoff_bytes == 1000
    assert answer.finished.timings.transport == generation_pb2.TRANSPORT_TCP
    assert len({response.request_id for response in answer.responses}) == 1
    await suite.all_idle()


async def test_indexes_are_continuous(suite: Suite) -> None:
    answer = await suite.generate(text="hello", stopping={"max_tokens": 50})
    count = 0
    for delta in answer.deltas:
        assert delta.index == count
        count += len(delta.token_ids)
    assert count == 50


async def test_tokens_and_chat_are_inputs_too(suite: Suite) -> None:
    by_tokens = await suite.generate(token_ids={"ids": ids("hello")}, stopping={"max_tokens": 5})
    assert by_tokens.token_ids == [letters(ids("hello"), index) for index in range(5)]
    await suite.generate(chat=chat("hi", "you"), stopping={"max_tokens": 2})
    rendered = "user: hi\nuser: you\nassistant: "
    assert list(suite.prefill.requests[-1].token_ids) == ids(rendered)


async def test_one_token_needs_no_decode_leg(suite: Suite) -> None:
    answer = await suite.generate(text="hello", stopping={"max_tokens": 1})
    assert answer.token_ids == [letters(ids("hello"), 0)]
    assert suite.prefill.requests[0].first_token_only
    assert not suite.decode.requests
    assert not suite.prefill.tickets
    assert answer.finished.timings.transport == generation_pb2.TRANSPORT_UNSPECIFIED


async def test_an_end_token_stops_and_has_no_text(make_suite: MakeSuite) -> None:
    suite = await make_suite(token=spelling("done"))
    answer = await suite.generate(text="x", stopping={"max_tokens": 100})
    assert (answer.text, answer.token_ids[-1]) == ("done", 2)
    assert answer.finished.reason == generation_pb2.FINISH_REASON_STOP
    assert answer.finished.usage.completion_tokens == 5


async def test_an_end_token_first_ends_the_decode_leg_and_frees_the_ticket(make_suite: MakeSuite) -> None:
    suite = await make_suite(token=spelling(""))
    suite.decode.gates.close("reserve")
    answer = await suite.generate(text="x", stopping={"max_tokens": 100})
    assert (answer.text, answer.token_ids) == ("", [2])
    assert answer.finished.reason == generation_pb2.FINISH_REASON_STOP
    await suite.all_idle()
    assert [ticket.fate for ticket in suite.prefill.tickets.values()] == ["released"]


async def test_ignored_and_forbidden_end_tokens_do_not_stop(make_suite: MakeSuite) -> None:
    suite = await make_suite(token=spelling("ab"))
    ignored = await suite.generate(text="x", stopping={"max_tokens": 5, "ignore_eos": True})
    assert ignored.token_ids == [*ids("ab"), 2, 2, 2]
    assert ignored.text == "ab"
    late = await suite.generate(text="x", stopping={"max_tokens": 9, "min_tokens": 4})
    assert late.text == "ab--"
    assert late.finished.reason == generation_pb2.FINISH_REASON_STOP


@pytest.mark.parametrize("tokens_per_delta", [1, 3, 100])
async def test_a_stop_string_across_tokens_ends_the_text_before_it(make_suite: MakeSuite, tokens_per_delta: int) -> None:
    suite = await make_suite(token=spelling("one STO two STOP three" * 20))
    suite.decode.tokens_per_delta = tokens_per_delta
    answer = await suite.generate(text="x", stopping={"max_tokens": 300, "stop": ["STOP", "never"]})
    assert answer.text == "one STO two "
    assert answer.finished.reason == generation_pb2.FINISH_REASON_STOP
    assert answer.token_ids == ids("one STO two STOP")
    assert answer.finished.usage.completion_tokens == len("one STO two STOP")
    await suite.all_idle()


async def test_held_text_comes_at_the_end(make_suite: MakeSuite) -> None:
    suite = await make_suite(token=spelling("almost STO"))
    answer = await suite.generate(text="x", stopping={"max_tokens": 300, "stop": ["STOP"]})
    assert answer.text == "almost STO"


async def test_code_points_are_never_split(make_suite: MakeSuite) -> None:
    text = "grüße 你好 🙂 👩‍👩‍👧"
    suite = await make_suite(token=spelling(text))
    answer = await suite.generate(text="x", stopping={"max_tokens": 300})
    assert answer.text == text
    assert not any("\ufffd" in delta.text for delta in answer.deltas)


async def test_text_that_ends_within_a_code_point_shows_a_replacement(make_suite: MakeSuite) -> None:
    suite = await make_suite(token=spelling("a🙂"))
    assert (await suite.generate(text="x", stopping={"max_tokens": 3})).text == "a\ufffd"


async def test_echo_and_logprobs(suite: Suite) -> None:
    output = {"echo": True, "logprobs": 2, "prompt_logprobs": 1}
    answer = await suite.generate(text="<s>hi", stopping={"max_tokens": 3}, output=output)
    prompt = answer.deltas[0].prompt
    assert prompt.text == "<s>hi"
    assert list(prompt.token_ids) == [1, *ids("hi")]
    assert [logprob.token for logprob in prompt.logprobs] == ["h", "i"]
    assert all(len(logprob.top) == 1 for logprob in prompt.logprobs)
    assert not any(delta.HasField("prompt") for delta in answer.deltas[1:])
    drawn = [logprob for delta in answer.deltas for logprob in delta.logprobs]
    assert [logprob.token_id for logprob in drawn] == answer.token_ids
    assert all(logprob.logprob == -0.5 and len(logprob.top) == 2 for logprob in drawn)


async def test_every_sampling_field_is_set_for_the_workers(suite: Suite) -> None:
    await suite.generate(text="x", sampling={"temperature": 0.0, "top_k": 7}, stopping={"max_tokens": 2, "stop_token_ids": [9]})
    request = suite.prefill.requests[0]
    fields = {descriptor.name for descriptor, _ in request.sampling.ListFields()}
    assert fields == {descriptor.name for descriptor in request.sampling.DESCRIPTOR.fields}
    assert (request.sampling.temperature, request.sampling.top_k, request.sampling.top_p) == (0.0, 7, 1.0)
    assert list(request.stop_rule.end_token_ids) == [2, 9]
    decode = suite.decode.requests[0]
    assert decode.sampling == request.sampling
    assert decode.ticket.epoch == decode.attempt == request.attempt == 1


async def test_seeds_are_kept_or_chosen(suite: Suite) -> None:
    for seed in ({"seed": 2**64 - 1}, {}, {}):
        await suite.generate(text="x", sampling=seed, stopping={"max_tokens": 1})
    seeds = [request.sampling.seed for request in suite.prefill.requests]
    assert seeds[0] == 2**64 - 1
    assert seeds[1] != seeds[2]


async def test_max_tokens_defaults_to_what_the_context_holds(make_suite: MakeSuite) -> None:
    suite = await make_suite(token=spelling("short"))
    await suite.generate(text="x" * 100)
    assert suite.prefill.requests[0].stop_rule.max_tokens == 2048 - 100


@pytest.mark.parametrize(("num_prompt_tokens", "max_tokens"), [(100, 60), (159, 1), (160, 2048 - 160), (10, 150)])
async def test_max_tokens_defaults_to_what_the_decode_pools_hold(
    make_suite: MakeSuite, num_prompt_tokens: int, max_tokens: int
) -> None:
    """A prompt that no pool holds keeps its room, so that the workers' refusal says what is wrong."""
    suite = await make_suite(num_decode=2, token=spelling("short"))
    for decode, total_blocks in zip(suite.decodes, (10, 3), strict=True):
        decode.say(total_blocks=total_blocks)
    await suite.until(lambda: sum(worker.total_blocks for worker in suite.gateway.directory.workers[1:]) == 13)
    await suite.generate(text="x" * num_prompt_tokens)
    assert suite.prefill.requests[0].stop_rule.max_tokens == max_tokens


async def test_timings_add_up_to_the_wall_time(suite: Suite) -> None:
    suite.prefill.cached_tokens = 3
    suite.prefill.queue_us, suite.decode.queue_us = 2_000, 3_000
    suite.prefill.gates.close("run")
    began = time.monotonic()
    answering = asyncio.create_task(suite.generate(text="hello", stopping={"max_tokens": 20}))
    await suite.prefill.gates.reached("run")
    await asyncio.sleep(0.05)
    suite.prefill.gates.open("run")
    finished = (await answering).finished
    wall_us = (time.monotonic() - began) * 1e6
    timings = finished.timings
    phases = [descriptor.name for descriptor in timings.DESCRIPTOR.fields if descriptor.name.endswith("_us")]
    total = sum(getattr(timings, name) for name in phases)
    assert all(getattr(timings, name) >= 0 for name in phases)
    assert total <= wall_us
    # Beside the phases there is the way from and to the client, a few milliseconds in a busy process.
    assert wall_us - total < 0.05 * wall_us + 20_000
    assert timings.prefill_us > 40_000
    assert timings.prefill_queue_us == 2_000
    assert finished.usage.cached_prompt_tokens == 3


async def test_sixteen_at_once_are_all_right_and_spread(make_suite: MakeSuite) -> None:
    suite = await make_suite(2, 2)
    prompts = [f"prompt {number}" for number in range(16)]
    answers = await asyncio.gather(*(suite.generate(text=prompt, stopping={"max_tokens": 30}) for prompt in prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.token_ids == [letters(ids(prompt), index) for index in range(30)]
    assert all(len(worker.requests) == 8 for worker in (*suite.prefills, *suite.decodes))
    await suite.all_idle()


async def test_a_trace_has_the_gateways_spans_under_the_clients(suite: Suite) -> None:
    trace_id, span_id = f"{RandomIdGenerator().generate_trace_id():032x}", "00000000000000ff"
    call = suite.call(text="hello", stopping={"max_tokens": 2})
    call.cancel()
    request = generation_pb2.GenerateRequest(chat=chat("hi"), stopping={"max_tokens": 2})
    from tandem.api.v1 import generation_pb2_grpc

    stub = generation_pb2_grpc.GenerationServiceStub(suite.channel)
    async for _ in stub.Generate(request, metadata=(("traceparent", f"00-{trace_id}-{span_id}-01"),)):
        pass
    operations = operations_pb2_grpc.OperationsServiceStub(suite.channel)
    spans = (await operations.GetTrace(operations_pb2.GetTraceRequest(trace_id=trace_id))).spans
    by_name = {span.name: span for span in spans}
    root = by_name["chat random:tiny"]
    assert root.parent_span_id == span_id
    assert {"gateway.tokenize", "gateway.route"} <= set(by_name)
    assert all(by_name[name].parent_span_id == root.span_id for name in ("gateway.tokenize", "gateway.route"))
    attributes = {attribute.key: attribute.value for attribute in root.attributes}
    assert attributes["gen_ai.operation.name"] == "chat"
    assert attributes["gen_ai.request.model"] == "random:tiny"
    assert attributes["gen_ai.request.max_tokens"] == "2"
    assert attributes["gen_ai.usage.output_tokens"] == "2"
    assert not any(value == "hi" for value in attributes.values())
    assert suite.prefill.traceparents[-1].startswith(f"00-{trace_id}-{root.span_id}")
    assert suite.decode.traceparents[-1].startswith(f"00-{trace_id}-{root.span_id}")
