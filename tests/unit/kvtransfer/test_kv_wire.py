"""Tickets survive the way over protobuf; what is not legal is refused by name."""

from dataclasses import replace

import pytest

from kvtransfer.ticket import BlockFence, HeartbeatPort, KvPort, KvTicket, ShmOffer, TcpOffer, check_names
from kvtransfer.wire import ticket_from_proto, ticket_to_proto
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
    kv_port=KvPort("host", 65535),
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_tickets(dtype: str) -> None:
    ticket = replace(TICKET, layout=replace(TICKET.layout, dtype=dtype))
    message = kv_pb2.KvTicket.FromString(ticket_to_proto(ticket).SerializeToString())
    assert ticket_from_proto(message) == ticket


def test_what_a_later_version_adds_is_skipped() -> None:
    message = ticket_to_proto(TICKET)
    message.offers.add()
    for name in ("heartbeat", "fence", "kv_port"):
        message.ClearField(name)
        assert getattr(ticket_from_proto(message), name) is None
    assert ticket_from_proto(message).offers == TICKET.offers


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
