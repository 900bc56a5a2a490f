"""The comparison of logits with and without a hand-off: right when all is right, and wrong when a single byte is."""

from collections.abc import Sequence

import pytest
import torch

from decode_svc.verify_handoff import CONTINUED_TOKENS, deviation, load, verify
from kvtransfer.puller import KvPuller, PullResult
from kvtransfer.ticket import KvTicket


async def test_a_hand_off_changes_nothing_and_a_damaged_block_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load("random:tiny")
    try:
        verdicts = await verify(loaded, ["shm", "tcp"])
        assert [(each.transport, each.num_positions, each.passed) for each in verdicts] == [
            ("shm", CONTINUED_TOKENS, True),
            ("tcp", CONTINUED_TOKENS, True),
        ]

        pull = KvPuller.pull

        async def damaging(self: KvPuller, ticket: KvTicket, block_ids: Sequence[int]) -> PullResult:
            result = await pull(self, ticket, block_ids)
            self._blocks._pool.tensor[block_ids[2], 0, 1, 0, 3, 0] += 8  # type: ignore[union-attr]
            return result

        monkeypatch.setattr(KvPuller, "pull", damaging)
        (verdict,) = await verify(loaded, ["shm"])
        assert verdict.max_deviation > 0 and not verdict.passed
    finally:
        loaded.pool.close()


async def test_kv_in_int8_arrives_as_it_was_computed() -> None:
    loaded = load("random:tiny", "int8")
    try:
        assert loaded.layout.dtype == "int8"
        assert all(verdict.passed for verdict in await verify(loaded, ["shm", "tcp"]))
    finally:
        loaded.pool.close()


async def test_a_transport_that_fails_is_a_verdict_too() -> None:
    loaded = load("random:tiny")
    try:
        (verdict,) = await verify(loaded, ["cuda_ipc"])
        assert not verdict.passed and verdict.error
    finally:
        loaded.pool.close()


def test_what_is_no_number_is_no_match() -> None:
    one = torch.ones(2, 2)
    assert deviation(one, one) == 0
    assert deviation(one * float("nan"), one) == float("inf")
