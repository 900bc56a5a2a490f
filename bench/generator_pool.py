"""Several processes that send one load: a message costs its receiver 25 to 40 us, so one process is soon the bottleneck."""

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from bench.generator import Share
from bench.loads import ClosedLoop, Extent, Load
from bench.records import Measurement

# From when all shares are sent until the common beginning.
BEGIN_AFTER_S = 0.2
LONGEST_LINE_BYTES = 1 << 28


def default_num_processes() -> int:
    """One for every eight cores: the server and its engines need the rest."""
    return min(8, max(1, (os.cpu_count() or 1) // 8))


class GeneratorPool:
    """Processes that are connected to one server."""

    def __init__(self, processes: Sequence[asyncio.subprocess.Process], vocabulary_size: int, drain_s: float) -> None:
        self._processes = processes
        self._vocabulary_size = vocabulary_size
        self._drain_s = drain_s
        self.begin_ns = 0
        """Of the last load, on the monotonic clock."""

    async def run(self, load: Load, extent: Extent, seed: int) -> Measurement:
        """Runs a load in all processes at once."""
        shares = self._shares(load, extent, seed)
        self.begin_ns = time.monotonic_ns() + round(BEGIN_AFTER_S * 1e9)
        for process, share in zip(self._processes, shares, strict=True):
            await _tell(process, {"share": asdict(share), "begin_ns": self.begin_ns})
        answers = await asyncio.gather(*(_answer(process) for process in self._processes))
        return Measurement.together([Measurement.from_json(answer) for answer in answers])

    def _shares(self, load: Load, extent: Extent, seed: int) -> list[Share]:
        count = len(self._processes)
        if isinstance(load, ClosedLoop):
            streams = [list(range(number, load.streams, count)) for number in range(count)]
            return [self._share(extent, seed, loop=load, streams=each) for each in streams]
        arrivals = [(each.number, each.prompt_tokens, each.completion_tokens, each.due_s) for each in load.arrivals(extent, seed)]
        return [self._share(extent, seed, arrivals=arrivals[number::count]) for number in range(count)]

    def _share(
        self,
        extent: Extent,
        seed: int,
        loop: ClosedLoop | None = None,
        streams: Sequence[int] = (),
        arrivals: Sequence[tuple[int, int, int, float]] = (),
    ) -> Share:
        return Share(
            seed=seed,
            vocabulary_size=self._vocabulary_size,
            loop=None if loop is None else asdict(loop),
            streams=list(streams),
            num_requests=None if loop is None else loop.num_requests(extent),
            arrivals=list(arrivals),
            seconds=extent.seconds,
            drain_s=self._drain_s,
        )


@contextlib.asynccontextmanager
async def generator_pool(
    target: Mapping[str, Any], num_processes: int, vocabulary_size: int, drain_s: float
) -> AsyncIterator[GeneratorPool]:
    """`num_processes` processes, connected to `target` (`bench.generator_process`), ended at the end of the block."""
    processes = [await _start() for _ in range(num_processes)]
    try:
        for process in processes:
            await _tell(process, target)
        await asyncio.gather(*(_answer(process) for process in processes))
        yield GeneratorPool(processes, vocabulary_size, drain_s)
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def _start() -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "bench.generator_process",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=LONGEST_LINE_BYTES,
    )


async def _tell(process: asyncio.subprocess.Process, message: Mapping[str, Any]) -> None:
    assert process.stdin is not None, "made with a pipe"
    process.stdin.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")
    await process.stdin.drain()


async def _answer(process: asyncio.subprocess.Process) -> dict[str, Any]:
    assert process.stdout is not None, "made with a pipe"
    line = await process.stdout.readline()
    if not line:
        raise SystemExit(f"a load generator ended with status {await process.wait()}; its own messages say why")
    answer: dict[str, Any] = json.loads(line)
    return answer
