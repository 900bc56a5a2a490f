"""`python -m tests.faults.corruption`: hand-offs whose bytes are damaged, by seed, between a real producer and a real consumer.

Over tcp the stream itself is harmed: bits flip, it is cut, pieces of it are lost, repeated or taken from another prompt's stream,
or the whole answer is an older epoch's, with checksums that fit. Over shm so is the stream that tells of blocks, and the mapped
memory: bits, blocks that are another's, blocks that are reused although their bytes stay. Only the right blocks may be admitted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from kvtransfer import connections
from kvtransfer.checksum import block_checksum
from kvtransfer.connection import Connection
from kvtransfer.kv_messages import Message, NewsMessage, PullMessage, encode
from kvtransfer.ticket import KvTicket
from llm.kv.pool import KvPool
from tandem.errors import TandemError
from tests.service.kvtransfer.harness import FIRST_TOKEN, LAYOUT, Transfer, transfer

SOURCE, OTHERS, MINE = tuple(range(8)), tuple(range(8, 16)), tuple(range(20, 28))
OLD_TOKEN = FIRST_TOKEN + 1
QUICK_STALL_S = 0.1
KINDS = {
    "tcp": ("flip", "cut", "lose", "repeat", "splice", "old epoch"),
    "shm": ("flip", "cut", "lose", "splice", "old epoch", "flip in memory", "another's block", "reuse"),
}


class CutError(ConnectionResetError):
    """The stream ends here."""


@dataclass
class Wire:
    """The way from the producer to the consumer. `harm` gets the bytes of each sending, and what went before them in this answer;
    it harms so many answers, and the ones after are left alone."""

    harm: Callable[[int, bytes], bytes] | None = None
    num_answers: int = 0
    record: bytearray = field(default_factory=bytearray)
    _passed: int = 0

    def asked(self) -> None:
        """A new answer begins."""
        self._passed = 0
        self.record.clear()
        self.num_answers -= 1
        if self.num_answers < 0:
            self.harm = None

    def carried(self, data: bytes) -> bytes:
        self.record += data
        before, self._passed = self._passed, self._passed + len(data)
        return data if self.harm is None else self.harm(before, data)


@contextlib.contextmanager
def harmed_wire() -> Iterator[Wire]:
    """What any producer in this process sends goes over the wire that this gives."""
    wire, send_at_once, send_blocks = Wire(), Connection.send_at_once, Connection.send_blocks

    def sent_at_once(self: Connection, message: Message) -> bool:
        if isinstance(message, PullMessage):
            wire.asked()
            return send_at_once(self, message)
        self._unsent = memoryview(encode(message))
        return False

    async def sent_blocks(self: Connection, blocks: Sequence[memoryview], check: Callable[[], None]) -> None:
        await send_blocks(self, [memoryview(wire.carried(b"".join(blocks)))], check)

    Connection.send_at_once, Connection.send_blocks = sent_at_once, sent_blocks  # type: ignore[method-assign]
    try:
        yield wire
    finally:
        Connection.send_at_once, Connection.send_blocks = send_at_once, send_blocks  # type: ignore[method-assign]


@contextlib.contextmanager
def quick_stalls() -> Iterator[None]:
    """A consumer waits for bytes that were lost until it gives the connection up; nothing here is that slow."""
    usual_s, connections.STALL_S = connections.STALL_S, QUICK_STALL_S
    try:
        yield
    finally:
        connections.STALL_S = usual_s


@dataclass
class Tally:
    """`noticed`: a block was fetched again, or the hand-off was resumed or refused. `unharmed`: the damage changed nothing."""

    admitted: Counter[str] = field(default_factory=Counter)
    noticed: Counter[str] = field(default_factory=Counter)
    unharmed: Counter[str] = field(default_factory=Counter)

    @property
    def num_harmed(self) -> int:
        return self.noticed.total() + self.admitted.total()


class Corruptions:
    """Runs over one pair of producer and consumer, in one process."""

    def __init__(self, at: Transfer, transport: str, wire: Wire, seed: int) -> None:
        self._at, self._transport, self._wire = at, transport, wire
        self._chance = random.Random(seed)
        self._truth = [bytes(at.source.block_view(block)) for block in SOURCE]
        self._others = b""
        self.tally = Tally()

    async def run(self, count: int) -> Tally:
        for _ in range(count):
            await self._once(self._chance.choice(KINDS[self._transport]))
        return self.tally

    async def _once(self, kind: str) -> None:
        at, wire = self._at, self._wire
        for block in MINE:
            at.target.block_view(block)[:] = bytes(LAYOUT.block_bytes)
        if kind in ("splice", "old epoch"):
            await self._record_others()
        ticket = await at.sealed(SOURCE)
        self._apply(kind, ticket)
        try:
            result = await at.puller.pull(ticket, MINE)
        except TandemError:
            self.tally.noticed[kind] += 1
        else:
            whole = [bytes(at.target.block_view(block)) for block in MINE] == self._truth
            right = whole and result.first_token_id == FIRST_TOKEN
            seen = result.num_refetched + result.num_resumed > 0
            (self.tally.admitted if not right else self.tally.noticed if seen else self.tally.unharmed)[kind] += 1
        finally:
            wire.harm = None
            at.producer.release(ticket.ticket_id, ticket.epoch)
            for block, content in zip(SOURCE, self._truth, strict=True):
                at.source.block_view(block)[:] = content

    async def _record_others(self) -> None:
        """What an undisturbed answer about another prompt is like."""
        if not self._others:
            ticket = await self._at.sealed(OTHERS)
            await self._at.puller.pull(ticket, MINE)
            self._others = bytes(self._wire.record)
            self._at.producer.release(ticket.ticket_id, ticket.epoch)

    def _apply(self, kind: str, ticket: KvTicket) -> None:
        at, wire, chance = self._at, self._wire, self._chance
        block, other = chance.choice(SOURCE), chance.choice(OTHERS)
        wire.num_answers = chance.choice((1, 1, 1, 4))
        match kind:
            case "flip in memory":
                at.source.block_view(block)[chance.randrange(LAYOUT.block_bytes)] ^= 1 << chance.randrange(8)
            case "another's block":
                at.source.block_view(block)[:] = bytes(at.source.block_view(other))
            case "reuse":
                at.source.generations.bump(block)
            case "old epoch":
                wire.harm = _instead(old_answer(at.source, ticket, with_blocks=self._transport == "tcp"))
            case _:
                wire.harm = self._stream_harm(kind, self._position(ticket))

    def _position(self, ticket: KvTicket) -> int:
        """A third of the harms meet a header."""
        header = len(encode(news(ticket, ticket.epoch, (2**64 - 1,) * len(SOURCE), FIRST_TOKEN)))
        payload = len(SOURCE) * LAYOUT.block_bytes if self._transport == "tcp" else 0
        return self._chance.randrange(header if self._chance.random() < 1 / 3 else header + payload)

    def _stream_harm(self, kind: str, position: int) -> Callable[[int, bytes], bytes]:
        length, mask, others = self._chance.randrange(1, 300), 1 << self._chance.randrange(8), self._others

        def harm(passed: int, data: bytes) -> bytes:
            at = position - passed
            if not 0 <= at < len(data):
                return data
            before, rest = data[:at], data[at:]
            match kind:
                case "flip":
                    return before + bytes([rest[0] ^ mask]) + rest[1:]
                case "lose":
                    return before + rest[length:]
                case "repeat":
                    return before + rest[:length] + rest
                case "splice":
                    return before + others[position : position + len(rest[:length])] + rest[length:]
            raise CutError(f"cut after {position} bytes")

        return harm


def news(ticket: KvTicket, epoch: int, checksums: tuple[int, ...], token: int) -> NewsMessage:
    return NewsMessage(ticket.ticket_id, epoch, 0, len(checksums), LAYOUT.block_bytes, 0, checksums, (token,))


def old_answer(pool: KvPool, ticket: KvTicket, *, with_blocks: bool) -> bytes:
    """All that an earlier attempt at the ticket would have been told: complete, with checksums that fit the blocks."""
    blocks = [bytes(pool.block_view(block)) for block in OTHERS]
    message = news(ticket, ticket.epoch - 1, tuple(block_checksum(memoryview(block)) for block in blocks), OLD_TOKEN)
    return encode(message) + (b"".join(blocks) if with_blocks else b"")


def _instead(answer: bytes) -> Callable[[int, bytes], bytes]:
    return lambda passed, data: b"" if passed else answer


async def measure(transport: str, count: int, seed: int) -> Tally:
    with harmed_wire() as wire, quick_stalls():
        async with transfer(transport) as at:
            return await Corruptions(at, transport, wire, seed).run(count)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.corruption", description="Damages hand-offs; counts what is admitted."
    )
    parser.add_argument("--count", type=int, default=5000, help="of each transport")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    num_admitted = 0
    for transport in KINDS:
        began = time.monotonic()
        tally = asyncio.run(measure(transport, arguments.count, arguments.seed))
        took_s = time.monotonic() - began
        num_admitted += tally.admitted.total()
        print(f"{transport}: {tally.num_harmed} hand-offs damaged, {tally.admitted.total()} admitted, in {took_s:.0f} s")
        for name in ("admitted", "noticed", "unharmed"):
            print(f"  {name:9} {dict(sorted(getattr(tally, name).items()))}")
    raise SystemExit(num_admitted > 0)


if __name__ == "__main__":
    main()
