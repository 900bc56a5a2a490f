"""Placement: pure policy."""

from contextlib import ExitStack
from dataclasses import replace

import pytest

from gateway.capacity import Capacity, capacity_of, largest_decode_pool, seconds_ahead
from gateway.routing import Layout, PlacementLedger, Role, Wishes, Worker, choose, usable
from gateway.targets import Target, parse_target
from tandem.errors import Reason, TandemError
from tandem.worker.v1 import kv_pb2

LAYOUT = Layout(2, 2, 16, 16, 1)
PREFILL = Worker("p1:1", Role.PREFILL, "id", True, "model", layout=LAYOUT, max_requests=64, tokens_per_second=100.0)
DECODE = Worker("d1:1", Role.DECODE, "id", True, "model", layout=LAYOUT, max_requests=64, total_blocks=100, free_blocks=100)


def chosen(*workers: Worker, num_tokens: int = 100, ledger: PlacementLedger | None = None) -> tuple[str, str]:
    placement = choose(workers, "model", num_tokens, ledger or PlacementLedger())
    return placement.prefill.address, placement.decode.address


def test_equal_loads_are_decided_by_address() -> None:
    workers = [replace(PREFILL, address="p2:1"), PREFILL, replace(DECODE, address="d2:1"), DECODE]
    assert chosen(*workers) == chosen(*reversed(workers)) == ("p1:1", "d1:1")


def test_prefill_is_chosen_by_seconds_of_work() -> None:
    fast = replace(PREFILL, address="p2:1", queued_tokens=1000, tokens_per_second=1000.0)
    assert chosen(replace(PREFILL, queued_tokens=200), fast, DECODE)[0] == "p2:1"
    assert chosen(PREFILL, fast, DECODE, num_tokens=10)[0] == "p1:1"


def test_an_unmeasured_prefill_worker_counts_as_the_fastest() -> None:
    fresh = replace(PREFILL, address="p2:1", tokens_per_second=0.0)
    assert chosen(replace(PREFILL, queued_tokens=1), fresh, DECODE)[0] == "p2:1"


def test_decode_is_chosen_by_requests_then_by_room() -> None:
    other = replace(DECODE, address="d2:1")
    assert chosen(PREFILL, replace(DECODE, running_requests=3), replace(other, running_requests=2))[1] == "d2:1"
    assert chosen(PREFILL, DECODE, replace(other, free_blocks=101))[1] == "d2:1"


def test_the_largest_pool_is_of_usable_decode_workers() -> None:
    larger = replace(DECODE, address="d2:1", total_blocks=200)
    assert largest_decode_pool([replace(PREFILL, total_blocks=900), DECODE, larger], "model") == 3200
    assert largest_decode_pool([DECODE, replace(larger, ready=False)], "model") == 1600
    assert largest_decode_pool([DECODE], "other") is None


def test_a_decode_worker_without_room_is_the_last_choice() -> None:
    crowded = replace(DECODE, free_blocks=6)  # 100 tokens and the next one need 7 blocks
    busy = replace(DECODE, address="d2:1", running_requests=50)
    assert chosen(PREFILL, crowded, busy)[1] == "d2:1"
    assert chosen(PREFILL, crowded)[1] == "d1:1"


def test_full_workers_are_the_last_choice() -> None:
    full = replace(PREFILL, running_requests=64)
    assert chosen(full, replace(PREFILL, address="p2:1", queued_tokens=10_000), DECODE)[0] == "p2:1"


PAIRS = [
    replace(PREFILL, worker_id="p1"),
    replace(PREFILL, address="p2:1", worker_id="p2"),
    replace(DECODE, worker_id="d1"),
    replace(DECODE, address="d2:1", worker_id="d2"),
]


@pytest.mark.parametrize(
    ("avoided", "expected"),
    [
        ([("p1", "d1")], ("p1", "d2")),
        ([("p1", "d1"), ("p1", "d2")], ("p2", "d1")),
        ([("p1", "d1"), ("p1", "d2"), ("p2", "d1")], ("p2", "d2")),
        ([("p1", "d1"), ("p1", "d2"), ("p2", "d1"), ("p2", "d2")], ("p1", "d1")),
    ],
)
def test_an_avoided_pair_is_the_last_choice(avoided: list[tuple[str, str]], expected: tuple[str, str]) -> None:
    assert choose(PAIRS, "model", 100, PlacementLedger(), Wishes(avoided_pairs=avoided)).pair == expected


def test_a_pair_to_leave_out_is_no_choice() -> None:
    without = [("p1", "d1"), ("p1", "d2"), ("p2", "d1")]
    assert choose(PAIRS, "model", 100, PlacementLedger(), Wishes(without_pairs=without)).pair == ("p2", "d2")
    with pytest.raises(TandemError, match="all pairs") as raised:
        choose(PAIRS, "model", 100, PlacementLedger(), Wishes(without_pairs=[*without, ("p2", "d2")]))
    assert raised.value.reason is Reason.NO_WORKER


def test_a_burst_spreads_before_the_workers_report_it() -> None:
    ledger, burst = PlacementLedger(), ExitStack()
    workers = [PREFILL, replace(PREFILL, address="p2:1"), DECODE, replace(DECODE, address="d2:1")]
    counts: dict[str, int] = {}
    for _ in range(8):
        placement = choose(workers, "model", 100, ledger)
        burst.enter_context(ledger.placed(placement, 100))
        for address in (placement.prefill.address, placement.decode.address):
            counts[address] = counts.get(address, 0) + 1
    assert counts == {"p1:1": 4, "p2:1": 4, "d1:1": 4, "d2:1": 4}


def test_what_had_arrived_is_counted_by_the_worker_itself_from_then_on() -> None:
    ledger = PlacementLedger()
    with ledger.sending("p1:1", 10) as arrived, ledger.sending("p1:1", 20):
        assert (ledger.num_requests("p1:1"), ledger.num_tokens("p1:1")) == (2, 30)
        arrived()
        assert ledger.num_tokens("p1:1") == 30
        ledger.heard("p1:1")
        assert ledger.num_tokens("p1:1") == 20
    assert ledger.num_requests("p1:1") == 0


def test_equal_requests_are_counted_one_by_one() -> None:
    ledger = PlacementLedger()
    with ledger.sending("p1:1", 10), ledger.sending("p1:1", 10) as arrived:
        arrived()
        ledger.heard("p1:1")
        assert ledger.num_requests("p1:1") == 1
    assert ledger.num_requests("p1:1") == 0


@pytest.mark.parametrize(
    ("workers", "words"),
    [
        ((), "no prefill worker can take the request: none is known"),
        ((PREFILL,), "no decode worker can take the request: none is known"),
        ((PREFILL, replace(DECODE, ready=False)), "1 not ready"),
        ((PREFILL, replace(DECODE, ready=False, worker_id="")), "1 unreachable"),
        ((replace(PREFILL, model_digest="other"), DECODE), "1 of another model"),
        ((PREFILL, replace(DECODE, layout=replace(LAYOUT, block_tokens=32))), "KV layout"),
        ((PREFILL, replace(DECODE, layout=replace(LAYOUT, dtype=kv_pb2.KV_DTYPE_INT8))), "KV layout"),
    ],
)
def test_no_worker_says_why(workers: tuple[Worker, ...], words: str) -> None:
    with pytest.raises(TandemError, match=words) as raised:
        choose(workers, "model", 1, PlacementLedger())
    assert raised.value.reason is Reason.NO_WORKER


def test_only_workers_of_one_layout_are_paired() -> None:
    other = replace(LAYOUT, block_tokens=32)
    workers = [PREFILL, replace(PREFILL, address="p2:1", layout=other, queued_tokens=10**6), replace(DECODE, layout=other)]
    assert chosen(*workers) == ("p2:1", "d1:1")


def test_usable_leaves_out_what_was_tried() -> None:
    assert usable([PREFILL, DECODE], Role.DECODE, "model", without={"d1:1"}) == []


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("localhost:50061", Target("localhost", 50061)),
        ("[::1]:5", Target("::1", 5)),
        ("dns:///prefill:50061", Target("prefill", 50061, by_name=True)),
    ],
)
def test_targets(text: str, target: Target) -> None:
    assert parse_target(text) == target
    assert parse_target(target.address) == replace(target, by_name=False)


@pytest.mark.parametrize("text", ["", "host", "host:", ":5", "host:0", "host:70000", "host:x", "dns:///x"])
def test_malformed_targets(text: str) -> None:
    with pytest.raises(ValueError, match="neither"):
        parse_target(text)


def test_the_capacity_is_what_all_usable_workers_do_together() -> None:
    other = replace(DECODE, address="d2:1", max_requests=10)
    assert capacity_of([PREFILL, DECODE, other], "model") == Capacity(74, 3200, 100.0)
    unmeasured = replace(PREFILL, address="p2:1", tokens_per_second=0.0)
    assert capacity_of([PREFILL, DECODE, unmeasured], "model") == Capacity(64, 1600, 200.0)
    assert capacity_of([unmeasured, DECODE], "model") == Capacity(64, 1600, 0.0)
    assert capacity_of([replace(DECODE, ready=False)], "model") is None


def test_seconds_ahead_are_those_of_the_least_busy_and_never_more_than_a_fair_share() -> None:
    busy = replace(PREFILL, queued_tokens=1000)
    assert seconds_ahead([busy, replace(busy, address="p2:1", queued_tokens=500)], "model", 1000, PlacementLedger()) == 5.0
    assert seconds_ahead([busy], "model", 100, PlacementLedger()) == 4.0
    assert seconds_ahead([busy, replace(PREFILL, address="p2:1", tokens_per_second=0.0)], "model", 1000, PlacementLedger()) == 0.0
    assert seconds_ahead([], "model", 1000, PlacementLedger()) == 0.0


def test_who_failed_lately_is_the_last_choice_and_who_refused_none() -> None:
    other = replace(DECODE, address="d2:1", running_requests=50)
    workers = [PREFILL, DECODE, other]

    def decode_of(wishes: Wishes) -> str:
        return choose(workers, "model", 100, PlacementLedger(), wishes).decode.address

    assert decode_of(Wishes(avoided={"d1:1"})) == "d2:1"
    assert decode_of(Wishes(avoided={"d1:1", "d2:1"})) == "d1:1"
    assert decode_of(Wishes(without={"d1:1"}, avoided={"d2:1"})) == "d2:1"
    with pytest.raises(TandemError, match="2 tried already"):
        decode_of(Wishes(without={"d1:1", "d2:1"}))


def test_a_prompt_goes_to_where_its_prefix_is_unless_that_worker_is_full_or_avoided() -> None:
    other = replace(PREFILL, address="p2:1", queued_tokens=500)
    workers = [PREFILL, other, DECODE]

    def prefill_of(workers: list[Worker], wishes: Wishes) -> str:
        return choose(workers, "model", 100, PlacementLedger(), wishes).prefill.address

    assert prefill_of(workers, Wishes(preferred="p2:1")) == "p2:1"
    assert prefill_of(workers, Wishes(preferred="p2:1", avoided={"p2:1"})) == "p1:1"
    assert prefill_of([PREFILL, replace(other, running_requests=64), DECODE], Wishes(preferred="p2:1")) == "p1:1"


def test_addresses_without_requests_are_not_remembered() -> None:
    ledger = PlacementLedger()
    with ledger.sending("a:1", 5) as arrived:
        arrived()
        ledger.heard("a:1")
        with ledger.sending("a:1", 7):
            assert (ledger.num_requests("a:1"), ledger.num_tokens("a:1")) == (1, 7)
        with ledger.sending("a:1", 9):
            assert ledger.num_tokens("a:1") == 9
    assert not ledger._pending
