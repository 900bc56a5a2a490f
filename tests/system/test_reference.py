"""Greedy tokens through the whole suite, in float32, equal the reference's, however the work is split."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tandem.api.v1 import generation_pb2
from tests.system.conftest import Suite, collect, greedy, start, stop

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]

ROLES = {
    "system": generation_pb2.CHAT_ROLE_SYSTEM,
    "user": generation_pb2.CHAT_ROLE_USER,
    "assistant": generation_pb2.CHAT_ROLE_ASSISTANT,
}


def assert_reference(suite: Suite, reference: list[dict]) -> None:  # type: ignore[type-arg]
    for prompt in reference:
        tokens, _, _ = collect(suite.generation.Generate(greedy(prompt["prompt_ids"]), timeout=120))
        assert tokens == prompt["greedy_ids"]


def test_every_kind_of_input_gives_the_reference(exact_suite: Suite, reference: list[dict]) -> None:  # type: ignore[type-arg]
    for prompt in reference:
        messages = [generation_pb2.ChatMessage(role=ROLES[m["role"]], content=m["content"]) for m in prompt["messages"]]
        inputs = (
            {"token_ids": generation_pb2.TokenIds(ids=prompt["prompt_ids"])},
            {"text": prompt["prompt_text"]},
            {"chat": generation_pb2.Chat(messages=messages)},
        )
        for arm in inputs:
            tokens, _, finished = collect(exact_suite.generation.Generate(greedy(**arm), timeout=120))
            assert tokens == prompt["greedy_ids"]
            assert finished.usage.prompt_tokens == len(prompt["prompt_ids"])


def test_a_warm_prefix_cache_is_seen_in_usage_and_changes_nothing(exact_suite: Suite, reference: list[dict]) -> None:  # type: ignore[type-arg]
    prompt = reference[0]
    for _ in range(2):
        tokens, _, finished = collect(exact_suite.generation.Generate(greedy(prompt["prompt_ids"]), timeout=120))
        assert tokens == prompt["greedy_ids"]
    assert finished.usage.cached_prompt_tokens == (len(prompt["prompt_ids"]) - 1) // 16 * 16


def test_alone_or_among_sixteen_others(exact_suite: Suite, reference: list[dict]) -> None:  # type: ignore[type-arg]
    others = [greedy([100 + index, *range(300, 320 + 11 * index)]) for index in range(16)]
    wanted = [greedy(prompt["prompt_ids"]) for prompt in reference]
    with ThreadPoolExecutor(len(others) + len(wanted)) as pool:
        answers = list(pool.map(lambda request: collect(exact_suite.generation.Generate(request, timeout=200)), others + wanted))
    assert [tokens for tokens, _, _ in answers[len(others) :]] == [prompt["greedy_ids"] for prompt in reference]


@pytest.mark.parametrize(
    ("workers", "environment"),
    [
        (("--prefill", "2", "--decode", "2"), {}),
        ((), {"TANDEM_TRANSPORTS": "tcp", "TANDEM_TOKEN_BUDGET": "16"}),
        ((), {"TANDEM_PREFIX_CACHE": "false", "TANDEM_TOKEN_BUDGET": "7", "TANDEM_BLOCK_TOKENS": "8"}),
    ],
    ids=["two of each", "tcp, chunks of 16", "no prefix cache, chunks of 7, blocks of 8"],
)
def test_however_the_suite_is_set_up(workers: tuple[str, ...], environment: dict[str, str], reference: list[dict]) -> None:  # type: ignore[type-arg]
    suite = start("--dtype", "float32", *workers, **environment)
    try:
        assert_reference(suite, reference)
        assert_reference(suite, reference)
        transports = {transport for worker in suite.workers() for transport in worker.transports}
        assert transports == set(environment.get("TANDEM_TRANSPORTS", "shm,tcp").split(","))
    finally:
        assert stop(suite) == 0


def test_the_default_format_stays_close_to_the_reference(reference: list[dict]) -> None:  # type: ignore[type-arg]
    """Teacher-forced: the first step's log-probabilities, which no earlier rounding can push onto another path."""
    suite = start("--dtype", "bfloat16")
    try:
        for prompt in reference:
            request = greedy(prompt["prompt_ids"], max_tokens=1, output=generation_pb2.OutputOptions(logprobs=20))
            responses = list(suite.generation.Generate(request, timeout=120))
            top = {
                entry.token_id: entry.logprob for response in responses for token in response.delta.logprobs for entry in token.top
            }
            for token, logit in zip(prompt["first_step_top5_ids"], prompt["first_step_top5_logits"], strict=True):
                assert top[token] == pytest.approx(logit - prompt["first_step_logsumexp"], abs=0.25)
    finally:
        assert stop(suite) == 0
