"""Sends one process's share of a load, and watches its own event loop so that a run it spoilt is visible."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from bench.loads import ClosedLoop, Planned, prompt_ids
from bench.records import UNFINISHED, Measurement, Record

LAG_TICK_S = 0.01


class Client(Protocol):
    """A server as seen by one process. `exact`: it can be told to give exactly as many tokens as asked for."""

    exact: bool

    async def send(self, prompt: Sequence[int], completion_tokens: int, record: Record, clock: "Clock") -> None:
        """Sends one request and notes in `record` all that comes of it; no failure is raised."""

    async def close(self) -> None: ...


@dataclass(frozen=True)
class Clock:
    """Microseconds since a load's beginning."""

    begin_ns: int

    def now_us(self) -> int:
        return (time.monotonic_ns() - self.begin_ns) // 1000

    async def until(self, moment_us: int) -> None:
        """Returns at a moment or just after it; timers of the event loop may be a millisecond early."""
        while (left_us := moment_us - self.now_us()) > 0:  # noqa: ASYNC110  (time has no event)
            await asyncio.sleep(left_us / 1e6)


@dataclass(frozen=True)
class Share:
    """One process's part of a load: some streams of a closed loop, or some arrivals of an open one.

    Nothing is sent after `seconds`, if that is not 0; what has not ended `drain_s` after the last sending is given up.
    """

    seed: int
    vocabulary_size: int
    loop: dict[str, int] | None
    streams: list[int]
    num_requests: int | None
    arrivals: list[tuple[int, int, int, float]]
    seconds: float
    drain_s: float

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Share":
        return cls(**value)


async def run_share(client: Client, share: Share, begin_ns: int) -> Measurement:
    """Waits for the beginning and runs the share to its end."""
    run = _Run(client, share, Clock(begin_ns))
    await run.clock.until(0)
    watching = asyncio.create_task(run.watch_lag())
    try:
        await run.send_all()
    finally:
        watching.cancel()
    return run.measurement


class _Run:
    def __init__(self, client: Client, share: Share, clock: Clock) -> None:
        self._client = client
        self._share = share
        self.clock = clock
        self.measurement = Measurement()
        self._sending: set[asyncio.Task[None]] = set()

    async def send_all(self) -> None:
        share = self._share
        if share.loop is not None:
            loop = ClosedLoop(**share.loop)
            for stream in share.streams:
                self._start(self._follow(loop.requests_of(stream, share.num_requests)))
        else:
            await self._pace([Planned(*each) for each in share.arrivals])
        await self._drain()

    async def watch_lag(self) -> None:
        """Notes by how much a short sleep overran: the time that a message would have waited for this process."""
        while True:
            before = time.monotonic_ns()
            await asyncio.sleep(LAG_TICK_S)
            self.measurement.lags_us.append(max(0, (time.monotonic_ns() - before) // 1000 - round(LAG_TICK_S * 1e6)))

    async def _follow(self, requests: Iterator[Planned]) -> None:
        for request in requests:
            if self._over():
                return
            await self._send(request, due_us=None)

    async def _pace(self, requests: Sequence[Planned]) -> None:
        for request in requests:
            due_us = round(request.due_s * 1e6)
            await self.clock.until(due_us)
            self._start(self._send(request, due_us))

    async def _send(self, request: Planned, due_us: int | None) -> None:
        share = self._share
        prompt = prompt_ids(share.seed, request.number, request.prompt_tokens, share.vocabulary_size)
        sent_us = self.clock.now_us()
        record = Record(request.number, request.prompt_tokens, sent_us, 0 if due_us is None else sent_us - due_us)
        self.measurement.records.append(record)
        try:
            await self._client.send(prompt, request.completion_tokens, record, self.clock)
        except asyncio.CancelledError:
            record.error = record.error or UNFINISHED
            raise
        if self._client.exact:
            record.fail_unless_complete(request.completion_tokens)

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    def _over(self) -> bool:
        return bool(self._share.seconds) and self.clock.now_us() >= self._share.seconds * 1e6

    async def _drain(self) -> None:
        """Streams of a closed loop by number may take as long as they need; all else has `drain_s` after its last sending."""
        limit_s = None
        if self._share.seconds:
            limit_s = max(0.0, self._share.seconds - self.clock.now_us() / 1e6) + self._share.drain_s
        if not self._sending:
            return
        done, running = await asyncio.wait(set(self._sending), timeout=limit_s)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for task in done:
            task.result()
