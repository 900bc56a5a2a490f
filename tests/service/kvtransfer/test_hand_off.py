"""The hand-off between a real producer and a real puller, by both transports."""

import asyncio
import threading
from dataclasses import replace
from typing import Any

import grpc
import pytest

from kvtransfer import host_blocks
from kvtransfer import producer as producer_module
from kvtransfer import puller as puller_module
from kvtransfer.counters import ProducerCounters, PullCounters
from kvtransfer.host_blocks import HostBlocks
from kvtransfer.pull_state import PullState
from kvtransfer.ticket import KvTicket
from llm.kv.block_arrays import BlockIds, Sums
from llm.kv.host_copies import Memory
from tandem.errors import Reason, TandemError
from tests.service.kvtransfer.harness import FIRST_TOKEN, LAYOUT, LEASE_S, NUM_BLOCKS, transfer

both_transports = pytest.mark.parametrize("transport", ["shm", "tcp"])
MINE = tuple(range(20, 28))


def reason_of(caught: pytest.ExceptionInfo[TandemError]) -> Reason:
    return caught.value.reason


@both_transports
async def test_a_finished_prompt(transport: str) -> None:
    async with transfer(transport) as at:
        ticket = at.complete()
        result = await at.puller.pull(ticket, MINE)
        assert (result.first_token_id, result.transport, result.num_refetched) == (FIRST_TOKEN, transport, 0)
        assert result.num_bytes == 8 * LAYOUT.block_bytes and result.pull_us > 0
        assert at.arrived(ticket, MINE) and at.freed == []
        await at.puller.release(ticket)
        await at.until(lambda: at.freed == [ticket.block_ids])
        await at.puller.release(ticket)
        assert at.freed == [ticket.block_ids]


@both_transports
async def test_chunk_by_chunk(transport: str) -> None:
    """What is ready arrives while the rest is not; a block counts as ready only from its progress on."""
    async with transfer(transport) as at:
        ticket = at.grant()
        pulling = asyncio.create_task(at.puller.pull(ticket, MINE))
        for ready in (1, 4, 4, 7):
            at.producer.progress(ticket.ticket_id, ready)
            await at.until(lambda ready=ready: at.target.block_view(MINE[ready - 1]) == at.source.block_view(ready - 1))
            assert not any(at.target.block_view(MINE[7]))
        at.producer.finish(ticket.ticket_id, FIRST_TOKEN)
        assert (await pulling).first_token_id == FIRST_TOKEN
        assert at.arrived(ticket, MINE)


@both_transports
async def test_many_at_once_over_kept_connections(transport: str) -> None:
    async with transfer(transport) as at:
        for _ in range(3):
            tickets = [at.grant((index, index + 10)) for index in range(10)]
            mine = [(20 + index, 30 + index) for index in range(10)]
            pulls = [asyncio.create_task(at.puller.pull(ticket, blocks)) for ticket, blocks in zip(tickets, mine, strict=True)]
            for ticket in tickets:
                at.producer.finish(ticket.ticket_id, FIRST_TOKEN)
            await asyncio.gather(*pulls)
            assert all(at.arrived(ticket, blocks) for ticket, blocks in zip(tickets, mine, strict=True))
            await asyncio.gather(*(at.puller.release(ticket) for ticket in tickets))
        await at.until(lambda: len(at.freed) == 30)


@both_transports
async def test_a_ticket_may_be_pulled_again_until_it_is_released(transport: str) -> None:
    async with transfer(transport) as at:
        ticket = at.complete()
        await at.puller.pull(ticket, MINE)
        at.wait(LEASE_S - 0.1)
        await at.puller.pull(ticket, MINE)
        at.wait(LEASE_S - 0.1)
        assert at.freed == []
        await at.puller.release(ticket)
        with pytest.raises(TandemError) as caught:
            await at.puller.pull(ticket, MINE)
        assert reason_of(caught) is Reason.TICKET_NOT_FOUND


@both_transports
async def test_an_aborted_prefill_ends_the_waiting_pull_with_its_error(transport: str) -> None:
    async with transfer(transport) as at:
        ticket = at.grant()
        at.producer.progress(ticket.ticket_id, 3)
        pulling = asyncio.create_task(at.puller.pull(ticket, MINE))
        await at.until(lambda: at.num_readers(ticket) == 1)
        at.producer.abort(ticket.ticket_id, TandemError(Reason.ENGINE_FAILED, "the engine failed", metadata={"device": "cpu"}))
        with pytest.raises(TandemError) as caught:
            await pulling
        assert (reason_of(caught), caught.value.message) == (Reason.ENGINE_FAILED, "the engine failed")
        assert dict(caught.value.metadata) == {"device": "cpu"}
        await at.until(lambda: at.freed == [ticket.block_ids])


@both_transports
async def test_unknown_stale_and_expired_tickets(transport: str) -> None:
    async with transfer(transport) as at:
        ticket = at.complete()
        for wrong in (replace(ticket, ticket_id="0" * 32), replace(ticket, epoch=2)):
            with pytest.raises(TandemError) as caught:
                await at.puller.pull(wrong, MINE)
            assert reason_of(caught) is Reason.TICKET_NOT_FOUND
        at.wait(LEASE_S)
        assert at.freed == [ticket.block_ids]
        with pytest.raises(TandemError) as caught:
            await at.puller.pull(ticket, MINE)
        assert reason_of(caught) is Reason.TICKET_NOT_FOUND
        assert not any(at.target.block_view(MINE[0]))


@both_transports
async def test_no_lease_runs_while_the_prompt_is_computed(transport: str) -> None:
    async with transfer(transport) as at:
        ticket = at.grant()
        pulling = asyncio.create_task(at.puller.pull(ticket, MINE))
        await at.until(lambda: at.num_readers(ticket) == 1)
        at.wait(1000 * LEASE_S)
        at.producer.finish(ticket.ticket_id, FIRST_TOKEN)
        await pulling
        assert at.freed == []
        at.wait(LEASE_S)
        assert at.freed == [ticket.block_ids]


async def test_the_timer_ends_a_lease_that_nobody_uses() -> None:
    """The one test on the real clock: the lease is as good as over when it begins."""
    async with transfer() as at:
        ticket = at.grant()
        at.producer._clock = lambda: at.clock.now + LEASE_S - 0.01
        at.producer.finish(ticket.ticket_id, FIRST_TOKEN)
        at.clock.now += LEASE_S
        await at.until(lambda: at.freed == [ticket.block_ids])


@both_transports
@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("model_digest", "other", Reason.MODEL_MISMATCH),
        ("tokenizer_digest", "other", Reason.MODEL_MISMATCH),
        ("layout", replace(LAYOUT, dtype="bfloat16"), Reason.KV_LAYOUT_MISMATCH),
        ("layout", replace(LAYOUT, dtype="int8"), Reason.KV_LAYOUT_MISMATCH),
        ("layout", replace(LAYOUT, block_tokens=8), Reason.KV_LAYOUT_MISMATCH),
        ("layout", replace(LAYOUT, tensor_parallel_size=2), Reason.KV_LAYOUT_MISMATCH),
        ("block_ids", (1, 2), Reason.KV_LAYOUT_MISMATCH),
        ("kv_port", None, Reason.KV_LAYOUT_MISMATCH),
    ],
)
async def test_what_does_not_fit_is_refused_before_a_byte_moves(transport: str, field: str, value: object, reason: Reason) -> None:
    async with transfer(transport) as at:
        wrong: KvTicket = replace(at.complete(), **{field: value})
        with pytest.raises(TandemError) as caught:
            await at.puller.pull(wrong, MINE)
        assert (reason_of(caught), caught.value.code) == (reason, grpc.StatusCode.FAILED_PRECONDITION)
        assert not any(at.target.block_view(MINE[0])) and at.puller._peers._peers == {}


@both_transports
async def test_a_block_that_stays_damaged_is_never_used(transport: str) -> None:
    async with transfer(transport) as at:
        ticket = at.grant()
        at.producer.progress(ticket.ticket_id, 8)
        await at.until(lambda: at.producer._outboxes[ticket.ticket_id].num_checksums == 8)
        at.flip(5)
        at.producer.finish(ticket.ticket_id, FIRST_TOKEN)
        with pytest.raises(TandemError) as caught:
            await at.puller.pull(ticket, MINE)
        assert reason_of(caught) is Reason.KV_CHECKSUM_MISMATCH
        assert caught.value.metadata["block_index"] == "5"
        at.flip(5)
        assert (await at.puller.pull(ticket, MINE)).num_refetched == 0


@pytest.mark.parametrize("num_damages", [1, 2])
async def test_a_block_damaged_on_the_way_is_fetched_again(num_damages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [num_damages]
    whole = HostBlocks.fetch

    def damaging(self: HostBlocks, memory: Memory, source_ids: BlockIds, block_ids: BlockIds) -> Sums:
        whole(self, memory, source_ids, block_ids)
        for block in block_ids.tolist():
            if left[0] and bytes(self.view(block)) == spoiled:
                left[0] -= 1
                self.view(block)[9] ^= 1
        return self.checksums(block_ids)

    monkeypatch.setattr(HostBlocks, "fetch", damaging)
    async with transfer("shm") as at:
        spoiled = bytes(at.source.block_view(3))
        ticket = at.complete()
        assert (await at.puller.pull(ticket, MINE)).num_refetched == num_damages
        assert at.arrived(ticket, MINE)


@both_transports
@pytest.mark.parametrize("num_ready", [0, 3, 8])
async def test_a_cancelled_pull_leaves_nothing(transport: str, num_ready: int) -> None:
    async with transfer(transport) as at:
        ticket = at.grant()
        at.producer.progress(ticket.ticket_id, num_ready)
        pulling = asyncio.create_task(at.puller.pull(ticket, MINE))
        await at.until(lambda: at.num_readers(ticket) == 1)
        await at.until(lambda: num_ready == 0 or at.target.block_view(MINE[num_ready - 1]) == at.source.block_view(num_ready - 1))
        pulling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pulling
        await at.until(lambda: at.num_readers(ticket) == 0)
        at.producer.finish(ticket.ticket_id, FIRST_TOKEN)
        await at.puller.pull(ticket, MINE)
        assert at.arrived(ticket, MINE)


@both_transports
async def test_cancelled_after_any_number_of_turns_of_the_loop(transport: str) -> None:
    async with transfer(transport) as at:
        ticket = at.complete()
        turns, finished = 0, False
        while not finished:
            pulling = asyncio.create_task(at.puller.pull(ticket, MINE))
            for _ in range(turns):
                await asyncio.sleep(0)
            pulling.cancel()
            finished = not isinstance((await asyncio.gather(pulling, return_exceptions=True))[0], asyncio.CancelledError)
            turns = turns + 1 if turns < 50 else turns * 2
        await at.until(lambda: at.num_readers(ticket) == 0)
        await at.puller.release(ticket)
        await at.until(lambda: at.freed == [ticket.block_ids])


async def test_a_pull_cancelled_while_a_thread_copies_ends_after_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, entered, leave = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
    whole, copied = HostBlocks.fetch, list[int]()

    def held(*arguments: Any) -> Sums:
        loop.call_soon_threadsafe(entered.set)
        assert leave.wait(30)
        copied.append(1)
        return whole(*arguments)

    monkeypatch.setattr(HostBlocks, "fetch", held)
    monkeypatch.setattr(host_blocks, "HERE_BYTES", 0)
    async with transfer("shm") as at:
        pulling = asyncio.create_task(at.puller.pull(at.complete(), MINE))
        await entered.wait()
        pulling.cancel()
        await asyncio.wait([pulling], timeout=0.05)
        assert not pulling.done()
        leave.set()
        with pytest.raises(asyncio.CancelledError):
            await pulling
        after = list(copied)
        for block in MINE:
            at.target.block_view(block)[:] = bytes(LAYOUT.block_bytes)
        await at.puller.close()
        assert copied == after and not any(any(at.target.block_view(block)) for block in MINE)


@both_transports
async def test_a_lost_producer_is_an_interrupted_transfer(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[PullState] = []
    monkeypatch.setattr(puller_module, "PullState", lambda *arguments: states.append(PullState(*arguments)) or states[-1])
    async with transfer(transport) as at:
        ticket = at.grant()
        at.producer.progress(ticket.ticket_id, 3)
        pulling = asyncio.create_task(at.puller.pull(ticket, MINE))
        await at.until(lambda: bool(states) and states[0].num_verified == 3)
        await at.server.stop(None)
        await at.producer._server.close()
        with pytest.raises(TandemError) as caught:
            await pulling
        assert reason_of(caught) is Reason.TRANSFER_INTERRUPTED
        assert caught.value.metadata["verified_blocks"] == "3"
        assert at.puller._peers._peers == {}
        assert at.num_readers(ticket) == 0


@both_transports
async def test_a_producer_that_shuts_down_says_so(transport: str) -> None:
    async with transfer(transport) as at:
        ticket = at.grant()
        pulling = asyncio.create_task(at.puller.pull(ticket, MINE))
        await at.until(lambda: at.num_readers(ticket) == 1)
        await at.producer.close()
        with pytest.raises(TandemError) as caught:
            await pulling
        assert reason_of(caught) in (Reason.DRAINING, Reason.TRANSFER_INTERRUPTED)
        assert at.freed == [ticket.block_ids]


async def test_wait_idle_returns_with_the_last_ticket() -> None:
    async with transfer() as at:
        await at.producer.wait_idle()
        tickets = [at.complete((0,)), at.complete((1,))]
        idle = asyncio.create_task(at.producer.wait_idle())
        at.producer.release(tickets[0].ticket_id, 1)
        await asyncio.sleep(0)
        assert not idle.done()
        at.producer.release(tickets[1].ticket_id, 1)
        await idle


async def test_a_release_of_another_epoch_is_refused() -> None:
    async with transfer() as at:
        ticket = at.complete()
        with pytest.raises(TandemError) as caught:
            await at.puller.release(replace(ticket, epoch=3))
        assert reason_of(caught) is Reason.TICKET_NOT_FOUND and at.freed == []
        await at.puller.release(replace(ticket, ticket_id="unknown"))


async def test_blocks_beyond_the_pool_are_never_read() -> None:
    async with transfer("shm") as at:
        with pytest.raises(TandemError) as caught:
            await at.puller.pull(replace(at.complete((0,)), block_ids=(NUM_BLOCKS,)), (20,))
        assert reason_of(caught) is Reason.KV_LAYOUT_MISMATCH


@both_transports
async def test_a_producer_whose_heart_stops_ends_its_pulls_at_once(transport: str) -> None:
    """Its connections stand and say nothing wrong, as those of a frozen process do."""
    async with transfer(transport) as at:
        ticket = at.grant()
        at.producer.progress(ticket.ticket_id, 3)
        pulling = asyncio.create_task(at.puller.pull(ticket, MINE))
        await at.until(lambda: at.heard(ticket))
        await asyncio.to_thread(at.producer._heart.close)
        with pytest.raises(TandemError) as caught:
            await pulling
        assert reason_of(caught) is Reason.TRANSFER_INTERRUPTED and "is lost" in caught.value.message
        assert [row.interrupted for row in at.puller.counters()] == [1]
        await at.until(lambda: at.num_readers(ticket) == 0)


@both_transports
async def test_a_consumer_whose_heart_stops_loses_its_streams_and_then_its_lease(transport: str) -> None:
    async with transfer(transport) as at:
        ticket = at.grant()
        at.producer.progress(ticket.ticket_id, 3)
        pulling = asyncio.create_task(at.puller.pull(ticket, MINE))
        await at.until(lambda: at.heard(ticket) and at.num_readers(ticket) == 1)
        (peer,) = at.puller._peers._peers.values()
        lifeline = peer._lifeline
        assert lifeline is not None
        lifeline.close()
        await asyncio.to_thread(lifeline._thread.join)
        at.clock.now += producer_module.SILENT_S + 0.1
        with pytest.raises(TandemError) as caught:
            await pulling
        assert reason_of(caught) is Reason.TRANSFER_INTERRUPTED
        assert at.num_readers(ticket) == 0 and at.producer.counters().silenced == 1 and at.freed == []
        at.producer.finish(ticket.ticket_id, FIRST_TOKEN)
        at.wait(LEASE_S)
        assert at.freed == [ticket.block_ids] and at.producer.counters().expired == 1


@both_transports
async def test_a_consumer_that_beats_keeps_its_lease_however_long_the_pull_takes(transport: str) -> None:
    async with transfer(transport) as at:
        ticket = at.complete()
        with at.lifeline_of(ticket).follow(ticket, lambda error: None):
            for _ in range(5):
                at.clock.now += LEASE_S - 0.1
                await at.until(lambda: at.producer._ledger.pulse.heard_at(ticket.ticket_id) == at.clock.now)
                at.wait(0)
        assert at.freed == []
        at.wait(LEASE_S)
        assert at.freed == [ticket.block_ids]


@both_transports
async def test_what_happened_is_counted(transport: str) -> None:
    async with transfer(transport) as at:
        tickets = [at.complete() for _ in range(3)]
        for ticket in tickets[:2]:
            await at.puller.pull(ticket, MINE)
        at.producer.release(tickets[0].ticket_id, 1)
        at.producer.abort(tickets[1].ticket_id, TandemError(Reason.CANCELLED, "gone"))
        at.wait(LEASE_S)
        with pytest.raises(TandemError):
            await at.puller.pull(tickets[2], MINE)
        assert at.producer.counters() == ProducerCounters(3, 1, 1, 1, stale=1, silenced=0, refused_connections=0)
        assert at.puller.counters() == (PullCounters("p" * 32, transport, pulled=2, pulled_blocks=16, stale=1),)
