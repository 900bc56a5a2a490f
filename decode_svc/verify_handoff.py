"""`python -m decode_svc.verify_handoff`: does a hand-off change what the model computes? A line of JSON for each transport.

A prompt is computed once, and its continuation twice with the same given tokens: where the prompt's KV was computed, and from a
second pool that pulled it over loopback. The logits are compared, not the text: a fault in a few KV bytes seldom changes a greedy
token.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import get_args

import torch

from kvtransfer.producer import KvProducer, ProducerIdentity
from kvtransfer.puller import KvPuller
from kvtransfer.service import add_transfer_service
from llm.kv.layout import KvWish
from llm.kv.pool import KvPool
from llm.kv.settings import KvSettings
from llm.runner import RunnerSettings, SequenceSlice
from llm.startup import LoadedModel, load_model
from tandem.addresses import free_port
from tandem.channels import open_internal_channel
from tandem.errors import TandemError
from tandem.models import ModelError, cache_directory, resolve_model
from tandem.server import Server, ServerSettings

BLOCK_TOKENS = 16
PROMPT_TOKENS = 5 * BLOCK_TOKENS + 3
"""Ends in a block that is part full, which decode then writes to."""
CONTINUED_TOKENS = 2 * BLOCK_TOKENS
TOLERANCE = 1e-5
"""Of the largest logit. The same numbers go through the same operations, so on a CPU even the last bit should be equal."""
_DIGESTS = ("model", "tokenizer")


@dataclass(frozen=True)
class Verdict:
    """What one transport did to the logits; `error` if nothing arrived."""

    transport: str
    num_positions: int = 0
    max_deviation: float = 0.0
    """Relative to the largest logit."""
    error: str = ""

    @property
    def passed(self) -> bool:
        return not self.error and self.max_deviation <= TOLERANCE


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares logits with and without a KV hand-off, on the CPU.")
    parser.add_argument("--model", default="random:tiny")
    parser.add_argument("--transports", nargs="+", default=["shm", "tcp"])
    parser.add_argument("--kv-dtype", choices=get_args(KvWish), default="auto")
    arguments = parser.parse_args()
    try:
        loaded = load(arguments.model, arguments.kv_dtype)
    except (ModelError, ValueError) as error:
        sys.exit(f"the model cannot be loaded: {error}")
    verdicts = asyncio.run(verify(loaded, arguments.transports))
    for verdict in verdicts:
        print(json.dumps({**asdict(verdict), "passed": verdict.passed}))
    loaded.pool.close()
    sys.exit(0 if all(verdict.passed for verdict in verdicts) else 1)


def load(model: str, kv_dtype: KvWish = "auto") -> LoadedModel:
    """Raises ModelError, and ValueError for a model that is not served."""
    settings = RunnerSettings("decode", kv_dtype=kv_dtype, cache_directory=cache_directory())
    blocks = KvSettings(kv_blocks=_num_blocks(), block_tokens=BLOCK_TOKENS)
    return load_model(resolve_model(model), settings, blocks)


async def verify(loaded: LoadedModel, transports: Sequence[str]) -> list[Verdict]:
    """The prompt's KV is computed once and handed over by each transport in turn."""
    tokens = _tokens(loaded.runner.config.vocab_size)
    source_ids = loaded.allocator.allocate(_num_blocks())
    loaded.runner.forward([SequenceSlice(tokens[:PROMPT_TOKENS], 0, source_ids)])
    prompt_ids = source_ids[: loaded.layout.blocks_for(PROMPT_TOKENS)]
    pulled = [await _pulled(loaded, transport, prompt_ids) for transport in transports]
    expected = _continue(loaded, loaded.pool, tokens, source_ids)
    verdicts = []
    for transport, pool in zip(transports, pulled, strict=True):
        if isinstance(pool, TandemError):
            verdicts.append(Verdict(transport, error=pool.message))
            continue
        actual = _continue(loaded, pool, tokens, list(reversed(range(_num_blocks()))))
        pool.close()
        verdicts.append(Verdict(transport, CONTINUED_TOKENS, deviation(actual, expected)))
    loaded.allocator.free(source_ids)
    return verdicts


def deviation(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest, relative to the largest logit; infinite if one is no number."""
    worst = ((actual - expected).abs().max() / expected.abs().max()).item()
    return worst if worst == worst else float("inf")  # noqa: PLR0124 - only NaN differs from itself


async def _pulled(loaded: LoadedModel, transport: str, source_ids: Sequence[int]) -> KvPool | TandemError:
    """A second pool that holds the prompt's blocks, in reversed places; the caller closes it."""
    target = KvPool.create(loaded.layout, _num_blocks())
    try:
        mine = list(reversed(range(_num_blocks())))[: len(source_ids)]
        await _hand_over(loaded, transport, source_ids, target, mine)
    except TandemError as error:
        target.close()
        return error
    return target


async def _hand_over(loaded: LoadedModel, transport: str, source_ids: Sequence[int], target: KvPool, mine: Sequence[int]) -> None:
    port = free_port("127.0.0.1")
    server = Server("verify-handoff", ServerSettings(port=port, grace_s=0.1))
    identity = ProducerIdentity("verify-handoff", *_DIGESTS, f"127.0.0.1:{port}")
    producer = KvProducer(loaded.pool, identity, lease_s=5.0, free=lambda block_ids: None, transports=(transport,))
    puller = KvPuller(target, loaded.layout, *_DIGESTS, channels=open_internal_channel, transports=(transport,))
    add_transfer_service(server, producer)
    await producer.start()
    await server.start()
    try:
        ticket = producer.grant(1, PROMPT_TOKENS, source_ids)
        producer.finish(ticket.ticket_id, 0)
        await puller.pull(ticket, mine)
        await puller.release(ticket)
    finally:
        await puller.close()
        server.stop()
        await server.run_until_stopped(_nothing, producer.close)


async def _nothing() -> None:
    """There is nothing to drain."""


def _continue(loaded: LoadedModel, pool: KvPool, tokens: Sequence[int], block_ids: Sequence[int]) -> torch.Tensor:
    """Logits [continued tokens, vocab] of the tokens after the prompt, computed one by one as decode does."""
    with _attached(loaded, pool):
        steps = range(PROMPT_TOKENS, PROMPT_TOKENS + CONTINUED_TOKENS)
        return torch.cat([loaded.runner.forward([SequenceSlice([tokens[at]], at, block_ids)]).clone() for at in steps])


@contextmanager
def _attached(loaded: LoadedModel, pool: KvPool) -> Iterator[None]:
    loaded.runner.attach(pool)
    try:
        yield
    finally:
        loaded.runner.attach(loaded.pool)


def _tokens(vocabulary_size: int) -> list[int]:
    """Given tokens for every position: no draw, so that one deviation does not lead to the next."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(3, vocabulary_size, (PROMPT_TOKENS + CONTINUED_TOKENS,), generator=generator)
    return [int(token) for token in drawn]


def _num_blocks() -> int:
    return -(-(PROMPT_TOKENS + CONTINUED_TOKENS) // BLOCK_TOKENS)


if __name__ == "__main__":
    main()
