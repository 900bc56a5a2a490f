"""Tickets and frames survive the way over protobuf; what is not legal is refused by name."""

from dataclasses import replace

import pytest

from kvtransfer.frames import BlocksFrame, EndFrame, Frame
from kvtransfer.pull_state import InterruptedPullError
from kvtransfer.ticket import BlockFence, HeartbeatPort, KvTicket, ShmOffer, TcpOffer, check_names
from kvtransfer.wire import frame_from_proto, frame_to_proto, ticket_from_proto, ticket_to_proto
from llm.kv.layout import KvLayout
from llm.kv.memory_file import MemoryFile
from tandem.errors import Reason, TandemError
from tandem.worker.v1 import kv_pb2

TICKET = KvTicket(
    ticket_id="a" * 32,
    epoch=3,
    producer_id="p" * 32,
    model_digest="m",
    tokenizer_digest="t",
    layout=KvLayout(2, 3, 4, 16, "bfloat16", tensor_parallel_size=2, tensor_parallel_rank=1),
    num_tokens=33,
    block_ids=(7, 0, 2**31),
    lease_ms=5000,
    offers=(ShmOffer(12, 3, 2**63, "boot", 2**40), TcpOffer("host", 65535)),
    address="host:1",
    heartbeat=HeartbeatPort("host", 65535),
    fence=BlockFence(MemoryFile(12, 4, 2**63, "boot", 2**40), (0, 1, 2**64 - 1)),
)
SIZE = TICKET.layout.block_bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_tickets(dtype: str) -> None:
    ticket = replace(TICKET, layout=replace(TICKET.layout, dtype=dtype))
    message = kv_pb2.KvTicket.FromString(ticket_to_proto(ticket).SerializeToString())
    assert ticket_from_proto(message) == ticket


@pytest.mark.parametrize("frame", [BlocksFrame(3, 5, (0, 2**64 - 1)), EndFrame(3, 49151)])
def test_frames(frame: Frame) -> None:
    message = kv_pb2.PullResponse.FromString(frame_to_proto(frame, TICKET.ticket_id, SIZE).SerializeToString())
    assert frame_from_proto(message, TICKET) == frame


@pytest.mark.parametrize("frame", [BlocksFrame(3, 5, (0, 2**64 - 1)), EndFrame(3, 49151)])
def test_a_frame_of_another_ticket_is_no_frame(frame: Frame) -> None:
    for ticket_id, size in (("b" * 32, SIZE), ("", SIZE), (TICKET.ticket_id, SIZE - 1)):
        if isinstance(frame, BlocksFrame) or size == SIZE:
            with pytest.raises(InterruptedPullError):
                frame_from_proto(frame_to_proto(frame, ticket_id, size), TICKET)


def test_no_flipped_bit_in_the_last_frame_goes_unnoticed() -> None:
    whole = frame_to_proto(EndFrame(3, 49151), TICKET.ticket_id, SIZE)
    for name, bits in (("epoch", 32), ("first_token_id", 32), ("checksum", 64)):
        for bit in range(bits):
            damaged = kv_pb2.PullResponse.FromString(whole.SerializeToString())
            setattr(damaged.end, name, getattr(damaged.end, name) ^ (1 << bit))
            with pytest.raises(InterruptedPullError):
                frame_from_proto(damaged, TICKET)


def test_what_a_later_version_adds_is_skipped() -> None:
    message = ticket_to_proto(TICKET)
    message.offers.add()
    for name in ("heartbeat", "fence"):
        message.ClearField(name)
        assert getattr(ticket_from_proto(message), name) is None
    assert ticket_from_proto(message).offers == TICKET.offers
    assert frame_from_proto(kv_pb2.PullResponse(), TICKET) is None


@pytest.mark.parametrize("name", ["ticket_id", "producer_id", "address", "num_tokens"])
def test_a_ticket_without_its_parts_is_refused(name: str) -> None:
    message = ticket_to_proto(TICKET)
    message.ClearField(name)
    with pytest.raises(TandemError) as caught:
        ticket_from_proto(message)
    assert caught.value.reason is Reason.INVALID_REQUEST
    assert caught.value.violations[0].field == f"ticket.{name}"


def test_an_unknown_element_type_or_checksum_is_a_mismatch() -> None:
    for path, value in (("layout", 9), ("checksum_algorithm", 9)):
        message = ticket_to_proto(TICKET)
        if path == "layout":
            message.layout.dtype = value
        else:
            message.checksum_algorithm = value
        with pytest.raises(TandemError) as caught:
            ticket_from_proto(message)
        assert caught.value.reason is Reason.KV_LAYOUT_MISMATCH


def test_transport_names_are_checked() -> None:
    assert check_names(["tcp", "shm"]) == ("tcp", "shm")
    for names in ([], ["shm", "pigeon"]):
        with pytest.raises(ValueError, match="cuda_ipc, shm, nccl, tcp"):
            check_names(names)


def test_a_fence_has_one_generation_for_each_block() -> None:
    message = ticket_to_proto(TICKET)
    message.fence.generations.append(1)
    with pytest.raises(TandemError) as caught:
        ticket_from_proto(message)
    assert caught.value.violations[0].field == "ticket.fence.generations"
