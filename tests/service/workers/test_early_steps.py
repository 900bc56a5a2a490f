"""Workers on GPUs that are faked: decode's first step of a request is launched while its KV is still being copied."""

import asyncio
import math
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from llm.kv.layout import KvLayout
from llm.kv.pool import KvPool
from tandem.errors import Reason, from_rpc_error
from tests.fakes.device_runner import DeviceRunner
from tests.fakes.late_copies import LateCopy, make_late
from tests.fakes.runner import StampError, completion
from tests.service.kvtransfer.gpu_harness import fake_gpus, gpu_pool
from tests.service.workers import harness
from tests.service.workers.harness import generate, pair, prefill_request

PROMPT = [(7 * index + 3) % 251 for index in range(41)]


class Runner(DeviceRunner):
    """`after_copies`: steps that were launched behind copies. KV that is not right is no error where steps are."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.after_copies = 0
        self.num_misread = 0
        self.wait_for = lambda event: event.make()  # type: ignore[attr-defined]

    def start_step(self, slices: Any, sources: Any, rows: Any, after: Any = ()) -> Any:
        self.after_copies += bool(after)
        return super().start_step(slices, sources, rows, after)

    def _rows(self, piece: Any) -> list[int]:
        try:
            return super()._rows(piece)
        except StampError:
            self.num_misread += 1
            return [13]


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[LateCopy]:
    """Pools in GPU memory, and copies into them that are made when the step behind them is, or when they were looked at often."""
    fake_gpus(monkeypatch)
    monkeypatch.setattr("kvtransfer.device_blocks.SLOW_S", 60.0)
    monkeypatch.setattr("kvtransfer.intake.LOOKS_S", 60.0)

    class Pools:
        @staticmethod
        def create(layout: KvLayout, num_blocks: int) -> KvPool:
            return gpu_pool(layout, num_blocks)

    monkeypatch.setattr(harness, "KvPool", Pools)
    monkeypatch.setattr(harness, "FakeRunner", Runner)
    return make_late(monkeypatch, looks=20)


@pytest.mark.parametrize("max_tokens", [1, 2, 9])
async def test_tokens_are_those_of_an_unsplit_run(late: list[LateCopy], max_tokens: int) -> None:
    async with pair("cuda_ipc") as nodes:
        for number in range(3):
            prompt = [number, *PROMPT]
            tokens, finished = await generate(nodes, prefill_request(prompt, max_tokens=max_tokens))
            assert tokens == completion(prompt, max_tokens)
            assert finished.queue_us >= 0 and finished.run_us >= 0
        assert len(late) >= 3
        assert (nodes.decode.runner.after_copies > 0) == (max_tokens > 1)
        assert nodes.decode.runner.num_misread == 0
        await nodes.prefill.wait_idle()
        await nodes.decode.wait_idle()


async def test_many_at_once_do_not_mix(late: list[LateCopy]) -> None:
    prompts = [[(index * 31 + position) % 251 for position in range(1 + 5 * index)] for index in range(12)]
    async with pair("cuda_ipc", num_blocks=160, token_budget=16) as nodes:
        answers = await asyncio.gather(*(generate(nodes, prefill_request(prompt)) for prompt in prompts))
        assert [tokens for tokens, _ in answers] == [completion(prompt, 8) for prompt in prompts]
        await nodes.decode.wait_idle()


def damaging(nodes: harness.Pair, times: int) -> Callable[[], int]:
    """So many copies come damaged, and all when the step behind them does; how many did."""
    whole, left = nodes.decode.worker._puller._blocks.begin_fetch, [times]

    def begin_fetch(source: Any, source_ids: Any, block_ids: Any) -> Any:
        copying = whole(source, source_ids, block_ids)
        copying._looks = math.inf
        if left[0]:
            left[0] -= 1
            make = copying._copy

            def damaged() -> Any:
                found = make()
                nodes.decode.worker._loaded.pool.tensor[int(block_ids[0])] += 1.0
                found[0] ^= 1
                return found

            copying._copy = damaged
        return copying

    nodes.decode.worker._puller._blocks.begin_fetch = begin_fetch
    return lambda: times - left[0]


@pytest.mark.parametrize("times", [1, 2])
async def test_no_token_of_damaged_kv_gets_out(late: list[LateCopy], times: int) -> None:
    async with pair("cuda_ipc") as nodes:
        num_damaged = damaging(nodes, times)
        tokens, _ = await generate(nodes, prefill_request(PROMPT, max_tokens=6))
        assert tokens == completion(PROMPT, 6)
        assert num_damaged() == times
        assert nodes.decode.runner.num_misread > 0, "or nothing was begun with"
        await nodes.decode.wait_idle()


async def test_a_pull_that_fails_for_good_gives_everything_back(late: list[LateCopy]) -> None:
    async with pair("cuda_ipc") as nodes:
        damaging(nodes, 3)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generate(nodes, prefill_request(PROMPT, max_tokens=6))
        assert from_rpc_error(caught.value).reason is Reason.KV_CHECKSUM_MISMATCH
        await nodes.decode.wait_idle()
        tokens, _ = await generate(nodes, prefill_request(PROMPT[1:], max_tokens=6))
        assert tokens == completion(PROMPT[1:], 6)


async def test_a_first_token_that_does_not_exist_takes_no_step(late: list[LateCopy], monkeypatch: pytest.MonkeyPatch) -> None:
    async with pair("cuda_ipc") as nodes:
        monkeypatch.setattr(nodes.decode.worker._decode, "_limits", type("Limits", (), {"vocabulary_size": 1})())
        monkeypatch.setattr("decode_svc.service.check_request", lambda request, limits: None)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generate(nodes, prefill_request(PROMPT, max_tokens=6))
        assert from_rpc_error(caught.value).reason is Reason.INTERNAL
        assert nodes.decode.runner.sizes == []
        await nodes.decode.wait_idle()
