"""What is asked of a server and when: closed loops, Poisson arrivals, traces. Pure: no clock, no network.

A load's requests are numbered, and all about a request follows from seed and number, so that two servers get the same ones
however many processes send them.
"""

import argparse
import csv
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy


@dataclass(frozen=True)
class Planned:
    """One request: its size, and in an open loop when it is due, in seconds after the load's beginning."""

    number: int
    prompt_tokens: int
    completion_tokens: int
    due_s: float = 0.0


@dataclass(frozen=True)
class Extent:
    """How much of a load is run: for `seconds`, or if that is 0, `num_requests` (0: a number that suits the load).

    What was sent in the first `warmup_s` seconds is not counted.
    """

    seconds: float = 0.0
    num_requests: int = 0
    warmup_s: float = 0.0


@dataclass(frozen=True)
class ClosedLoop:
    """`streams` clients, each of which sends its next request when the last one has ended."""

    prompt_tokens: int
    completion_tokens: int
    streams: int
    kind = "closed"

    @property
    def name(self) -> str:
        return f"{self.prompt_tokens}/{self.completion_tokens}, {self.streams} {'stream' if self.streams == 1 else 'streams'}"

    @property
    def intensity(self) -> float:
        return float(self.streams)

    def num_requests(self, extent: Extent) -> int | None:
        """How many requests there are in all; None if time ends the load."""
        return None if extent.seconds else extent.num_requests or max(6, 4 * self.streams)

    def requests_of(self, stream: int, num_requests: int | None) -> Iterator[Planned]:
        numbers = itertools.count(stream, self.streams)
        if num_requests is not None:
            numbers = itertools.takewhile(lambda number: number < num_requests, numbers)
        return (Planned(number, self.prompt_tokens, self.completion_tokens) for number in numbers)


@dataclass(frozen=True)
class PoissonArrivals:
    """`rate` requests a second on average, at random moments: an open loop, which never waits for answers."""

    prompt_tokens: int
    completion_tokens: int
    rate: float
    kind = "open"

    @property
    def name(self) -> str:
        return f"{self.prompt_tokens}/{self.completion_tokens}, Poisson {self.rate:g}/s"

    @property
    def intensity(self) -> float:
        return self.rate

    def arrivals(self, extent: Extent, seed: int) -> Sequence[Planned]:
        chance = numpy.random.default_rng([seed, 1])
        seconds = extent.seconds or 20.0
        expected = extent.num_requests if extent.num_requests and not extent.seconds else round(2 * self.rate * seconds) + 20
        moments = numpy.cumsum(chance.exponential(1 / self.rate, expected)).tolist()
        if extent.seconds or not extent.num_requests:
            moments = [moment for moment in moments if moment < seconds]
        return [Planned(number, self.prompt_tokens, self.completion_tokens, due) for number, due in enumerate(moments)]


@dataclass(frozen=True)
class TraceReplay:
    """Arrivals and sizes of real users, from a csv of arrival time (seconds or ISO 8601), prompt tokens, completion tokens.

    `speed` 2 sends them twice as fast; `lengths` 0.1 makes prompts and completions a tenth as long, at least 1 token.
    """

    path: Path
    speed: float = 1.0
    lengths: float = 1.0
    kind = "open"

    @property
    def name(self) -> str:
        return f"{self.path.stem} x{self.speed:g}"

    @property
    def intensity(self) -> float:
        return self.speed

    def arrivals(self, extent: Extent, seed: int) -> Sequence[Planned]:
        rows = read_trace(self.path)
        begin = rows[0][0]
        planned = (
            Planned(number, self._scaled(prompt), self._scaled(completion), (moment - begin) / self.speed)
            for number, (moment, prompt, completion) in enumerate(rows)
        )
        if extent.seconds:
            planned = itertools.takewhile(lambda request: request.due_s < extent.seconds, planned)
        return list(planned if extent.seconds or not extent.num_requests else itertools.islice(planned, extent.num_requests))

    def _scaled(self, num_tokens: int) -> int:
        return max(1, round(num_tokens * self.lengths))


OpenLoop = PoissonArrivals | TraceReplay
Load = ClosedLoop | OpenLoop


def parse_load(text: str) -> Load:
    """IN/OUT/STREAMS, IN/OUT@RATE, or trace:FILE[@SPEED[xLENGTHS]]: 256/128/16, 1024/128@20, trace:azure.csv@2x0.25."""
    try:
        if text.startswith("trace:"):
            path, _, scales = text.removeprefix("trace:").partition("@")
            speed, _, lengths = scales.partition("x")
            return TraceReplay(Path(path), float(speed or 1), float(lengths or 1))
        if "@" in text:
            sizes, _, rate = text.partition("@")
            prompt_tokens, completion_tokens = _positive(sizes, 2)
            return PoissonArrivals(prompt_tokens, completion_tokens, _positive_rate(rate))
        return ClosedLoop(*_positive(text, 3))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not IN/OUT/STREAMS, IN/OUT@RATE or trace:FILE@SPEED: {error}") from error


def _positive(text: str, count: int) -> list[int]:
    numbers = [int(part) for part in text.split("/")]
    if len(numbers) != count or min(numbers) < 1:
        raise ValueError(f"{count} numbers above 0 are needed")
    return numbers


def _positive_rate(text: str) -> float:
    rate = float(text)
    if not 0 < rate < 1e6:
        raise ValueError("the rate must be above 0")
    return rate


def read_trace(path: Path) -> list[tuple[float, int, int]]:
    """Moment in seconds, prompt and completion tokens, by moment; rows of names at the top are skipped. ValueError if malformed."""
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        for line, fields in enumerate(csv.reader(file)):
            if not fields or (not rows and not any(_is_value(field) for field in fields)):
                continue
            try:
                rows.append((_moment(fields[0]), int(fields[1]), int(fields[2])))
            except (ValueError, IndexError) as error:
                raise ValueError(f"{path}, line {line + 1}: {fields} is not time, prompt tokens, completion tokens") from error
    if not rows:
        raise ValueError(f"{path} has no requests")
    return sorted(rows)


def _is_value(text: str) -> bool:
    try:
        _moment(text)
    except ValueError:
        return False
    return True


def _moment(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return datetime.fromisoformat(text).timestamp()


def prompt_ids(seed: int, number: int, num_tokens: int, vocabulary_size: int) -> list[int]:
    """Random tokens, so that no two prompts share a prefix; the first hundred ids, where special tokens are, are left out."""
    chance = numpy.random.default_rng([seed & 0xFFFFFFFF, number, 2])
    ids: list[int] = chance.integers(min(100, vocabulary_size // 2), vocabulary_size, num_tokens).tolist()
    return ids
