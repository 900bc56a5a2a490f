"""Requests that kill workers, and workers that die of whatever they are asked."""

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
import pytest

from tandem.errors import Reason, TandemError
from tests.fakes.workers import FakeDecode, FakePrefill, FakeWorker, letters
from tests.service.gateway.conftest import MakeSuite
from tests.service.gateway.moved_streams import expected

PATIENT_S = 120.0
"""For thousands of tokens through gateway, workers and clients in one process, on a machine that does much else."""


class TestPoison:
    """A request under which worker after worker dies."""

    @pytest.mark.parametrize("word", [Reason.ENGINE_FAILED, Reason.CANCELLED])
    async def test_it_costs_two_workers_and_fails_alone(self, make_suite: MakeSuite, word: Reason) -> None:
        """Whether the worker still says so, or only its address tells."""
        suite = await make_suite(1, 3)
        for decode in suite.decodes:
            decode.token = deadly(decode, 4, word)
        innocent = [
            asyncio.create_task(suite.generate(PATIENT_S, text=f"i{number}", stopping={"max_tokens": 400})) for number in range(8)
        ]
        await suite.until(lambda: sum(len(decode.book.running) for decode in suite.decodes) == 8)
        answer = await suite.generate(PATIENT_S, text="poison", stopping={"max_tokens": 10})
        assert answer.error is not None
        assert (answer.error.reason, answer.error.code) == (Reason.REQUEST_QUARANTINED, grpc.StatusCode.INTERNAL)
        assert answer.error.metadata["worker_deaths"] == "2"
        assert answer.error.metadata["tokens_delivered"] == str(len(answer.token_ids))
        for number, other in enumerate(await asyncio.gather(*innocent)):
            prompt = [3 + byte for byte in f"i{number}".encode()]
            assert other.error is None
            assert other.token_ids == [letters(prompt, index) for index in range(400)]
        assert sum(not decode.alive for decode in suite.decodes) == 2

    async def test_it_costs_two_workers_though_none_lives_to_admit_it(self, make_suite: MakeSuite) -> None:
        suite = await make_suite(3, 1)
        killers = [asyncio.create_task(killed_at(prefill, "queue")) for prefill in suite.prefills]
        answer = await suite.generate(text="poison")
        assert answer.error is not None and answer.error.reason is Reason.REQUEST_QUARANTINED
        assert sum(not prefill.alive for prefill in suite.prefills) == 2
        for killer in killers:
            killer.cancel()
        await asyncio.gather(*killers, return_exceptions=True)

    async def test_it_is_refused_the_next_time_whatever_its_seed(self, make_suite: MakeSuite) -> None:
        suite = await make_suite(3, 1)
        for prefill in suite.prefills:
            prefill.token = deadly(prefill, at=0)
        first = await suite.generate(text="poison", sampling={"seed": 1})
        assert first.error is not None and first.error.reason is Reason.REQUEST_QUARANTINED
        again = await suite.generate(text="poison", sampling={"seed": 2})
        assert again.error is not None and again.error.reason is Reason.REQUEST_QUARANTINED
        assert sum(len(prefill.requests) for prefill in suite.prefills) == 2
        assert (await suite.generate(text="hello", stopping={"max_tokens": 10})).token_ids == expected(10)


async def killed_at(worker: FakeWorker, phase: str) -> None:
    worker.gates.close(phase)
    await worker.gates.reached(phase)
    await worker.kill()


def deadly(worker: FakePrefill | FakeDecode, at: int, word: Reason = Reason.ENGINE_FAILED) -> Any:
    """Kills the worker when token `at` or a later one of the poisonous prompt is drawn; `word` is the last that is heard of it."""
    kills: list[asyncio.Task[None]] = []

    def token(prompt: Sequence[int], index: int) -> int:
        if bytes(token_id - 3 for token_id in prompt) == b"poison" and index >= at:
            kills.append(asyncio.get_running_loop().create_task(worker.kill()))
            raise TandemError(word, "the process is gone")
        return letters(prompt, index)

    return token


class CrashLoop:
    """A decode worker that dies of whatever it is asked to decode, and is started again at once, for ever."""

    def __init__(self, worker: FakeDecode) -> None:
        self.num_deaths = 0
        self._digest, self._port = worker.model_digest, int(worker.address.rpartition(":")[2])
        self._worker = worker
        self._dying = asyncio.Event()
        worker.token = self._token
        self.task = asyncio.create_task(self._run())

    def _token(self, prompt: Sequence[int], index: int) -> int:
        self._dying.set()
        raise TandemError(Reason.ENGINE_FAILED, "the process is gone")

    async def _run(self) -> None:
        try:
            while True:
                await self._dying.wait()
                await self._worker.kill()
                self.num_deaths += 1
                self._dying.clear()
                self._worker = FakeDecode(self._digest, self._token)
                await self._worker.start(self._port)
        finally:
            await self._worker.kill()


async def test_a_crash_loop_is_left_alone_and_harms_no_request(make_suite: MakeSuite) -> None:
    suite = await make_suite(1, 2)
    loop = CrashLoop(suite.decodes[0])
    for number in range(40):
        several = (suite.generate(text=f"{number} {each}", stopping={"max_tokens": 5}) for each in range(5))
        assert [answer.error for answer in await asyncio.gather(*several)] == [None] * 5
    assert 2 <= loop.num_deaths < 10
    assert suite.gateway.counts().num_ejections > 0
    loop.task.cancel()
    await asyncio.gather(loop.task, return_exceptions=True)
