"""The load generator before a server of OpenAI's kind: what it counts, and what it makes of faults."""

import time
from dataclasses import asdict

import pytest

from bench.figures import Objective, figures_of
from bench.generator import Clock
from bench.generator_pool import generator_pool
from bench.loads import ClosedLoop, Extent, PoissonArrivals
from bench.openai_client import OpenAiClient, OpenAiTarget, negotiate, words
from bench.records import Record
from tests.service.bench.openai_server import openai_server


async def sent(url: str, num_tokens: int = 5, **options: object) -> Record:
    client = OpenAiClient(OpenAiTarget(url, "some-model", **options))  # type: ignore[arg-type]
    record = Record(0, 3, 0)
    try:
        await client.send([7, 8, 9], num_tokens, record, Clock(time.monotonic_ns()))
    finally:
        await client.close()
    return record


@pytest.mark.parametrize("tokens_per_chunk", [1, 2, 5])
async def test_tokens_are_counted_however_they_are_grouped(tokens_per_chunk):
    async with openai_server(tokens_per_chunk=tokens_per_chunk) as server:
        record = await sent(server.url)
    assert (record.error, record.completion_tokens, record.prompt_tokens, sum(record.counts)) == ("", 5, 3, 5)
    assert len(record.arrivals_us) == -(-5 // tokens_per_chunk)
    assert record.arrivals_us == sorted(record.arrivals_us)


async def test_the_request_asks_for_greedy_tokens_without_an_end():
    async with openai_server() as server:
        await sent(server.url, num_tokens=4)
        (body,) = server.requests
    assert (body["prompt"], body["max_tokens"], body["temperature"], body["ignore_eos"]) == ([7, 8, 9], 4, 0, True)
    assert body["stream_options"] == {"include_usage": True}


async def test_words_stand_for_tokens_where_a_server_takes_text_only():
    async with openai_server() as server:
        record = await sent(server.url, as_text=True)
        assert server.requests[0]["prompt"] == words([7, 8, 9])
    assert record.prompt_tokens == 3
    assert len(words(range(50)).split()) == 50


@pytest.mark.parametrize(("fault", "error"), [("status", "HTTP 503"), ("error", "engine_dead"), ("cut", "RemoteProtocolError")])
async def test_a_fault_is_an_error_of_that_request(fault, error):
    async with openai_server(fault=fault) as server:
        assert (await sent(server.url)).error == error


async def test_nobody_there_is_an_error_too():
    assert (await sent("http://127.0.0.1:1")).error == "ConnectError"


async def test_extras_that_a_server_refuses_are_left_out():
    async with openai_server(refused=frozenset({"return_token_ids", "stream_options"})) as server:
        target = await negotiate(OpenAiTarget(server.url, "some-model"), 100)
        assert target.extras == ("ignore_eos",) and target.exact
        record = await sent(server.url, extras=target.extras)
    assert (record.error, record.completion_tokens) == ("", 5)


async def test_a_server_that_serves_nothing_ends_the_program():
    async with openai_server(fault="status") as server:
        with pytest.raises(SystemExit, match="503"):
            await negotiate(OpenAiTarget(server.url, "some-model"), 100)


async def test_a_server_that_is_not_there_ends_the_program():
    with pytest.raises(SystemExit, match=r"http://127\.0\.0\.1:1 cannot be asked: .*connection"):
        await negotiate(OpenAiTarget("http://127.0.0.1:1", "some-model"), 100)


async def test_processes_share_a_load_and_its_numbers():
    async with openai_server() as server:
        target = asdict(OpenAiTarget(server.url, "some-model"))
        async with generator_pool(target, 2, vocabulary_size=1000, drain_s=5) as pool:
            closed = await pool.run(ClosedLoop(6, 4, 3), Extent(num_requests=8), seed=1)
            numbers = sorted(record.number for record in closed.records)
            opened = await pool.run(PoissonArrivals(6, 4, 200.0), Extent(seconds=0.2), seed=1)
        prompts = {tuple(body["prompt"]) for body in server.requests}
    assert numbers == list(range(8))
    assert not [record.error for record in (*closed.records, *opened.records) if record.error]
    assert len(prompts) == len(server.requests) - len({record.number for record in opened.records} & set(range(8)))
    assert all(record.late_us >= 0 for record in opened.records)
    assert figures_of(closed, Extent(num_requests=8), Objective())["requests"] == 8


async def test_a_completion_that_is_too_short_is_an_error():
    async with openai_server(fault="short") as server:
        target = asdict(OpenAiTarget(server.url, "some-model"))
        async with generator_pool(target, 1, vocabulary_size=1000, drain_s=5) as pool:
            measurement = await pool.run(ClosedLoop(6, 4, 1), Extent(num_requests=1), seed=1)
    assert [record.error for record in measurement.records] == ["INCOMPLETE"]
