"""Copies and checksums of a pool's blocks through a lane, with the real kernels."""

import numpy as np
import pytest
import torch
import xxhash

from llm.kv.block_arrays import BlockIds

device_lane = pytest.importorskip("llm.kv.device_lane")
quiet_calls = pytest.importorskip("llm.gpu.quiet_calls")


@pytest.fixture
def pool(device: torch.device) -> torch.Tensor:
    return torch.randn(6, 2, 2, 2, 16, 32, device=device)


def ids(*block_ids: int) -> BlockIds:
    return np.array(block_ids, np.int32)


def expected(blocks: torch.Tensor) -> list[int]:
    return [xxhash.xxh3_64_intdigest(block.cpu().view(torch.uint8).numpy().tobytes()) for block in blocks]


def test_fetch_copies_and_tells_what_lies_there(pool: torch.Tensor) -> None:
    source, before = torch.randn_like(pool), pool.clone()
    lane = device_lane.Lane(pool)
    lane.warm_up()
    assert torch.equal(pool, before)
    assert lane.fetch(source, ids(5, 0, 2), ids(1, 4, 0)).tolist() == expected(source[[5, 0, 2]])
    assert torch.equal(pool[[1, 4, 0]], source[[5, 0, 2]])
    assert torch.equal(pool[[2, 3, 5]], before[[2, 3, 5]])


def test_many_blocks_in_one_call(device: torch.device) -> None:
    source = torch.randn(40, 1, 2, 1, 16, 16, device=device)
    pool, count = torch.zeros_like(source), 35
    lane = device_lane.Lane(pool)
    theirs, ours = np.arange(count, dtype=np.int32), np.arange(count, dtype=np.int32)[::-1]
    assert lane.fetch(source, theirs, ours).tolist() == expected(source[:count])
    assert torch.equal(pool[:count], source[:count].flip(0))
    assert not pool[count:].any()


def test_blocks_go_by_a_row_of_the_device(pool: torch.Tensor) -> None:
    lane, before, row = device_lane.Lane(pool), pool.clone(), torch.empty_like(pool[:2])
    lane.gather(ids(4, 1), row)
    assert torch.equal(row, before[[4, 1]])
    assert lane.scatter(row, ids(0, 5)).tolist() == expected(before[[4, 1]])
    assert torch.equal(pool[[0, 5]], before[[4, 1]])
    assert torch.equal(pool[1:5], before[1:5])


def test_blocks_go_through_the_host_and_back(pool: torch.Tensor) -> None:
    lane, before = device_lane.Lane(pool), pool.clone()
    staged = torch.empty(2, pool[0].numel() * 4, dtype=torch.uint8)
    lane.load(ids(3, 1), staged)
    assert expected(staged) == expected(before[[3, 1]])
    assert lane.store(staged, ids(0, 5)).tolist() == lane.checksums(ids(3, 1)).tolist()
    assert torch.equal(pool[[0, 5]], before[[3, 1]])


def test_ids_of_a_call_do_not_reach_into_the_next(pool: torch.Tensor) -> None:
    lane = device_lane.Lane(pool)
    assert lane.checksums(ids(0, 1, 2, 3)).tolist() == expected(pool[:4])
    assert lane.checksums(ids(5)).tolist() == expected(pool[5:])


def test_fetches_that_are_under_way_do_not_mix(pool: torch.Tensor) -> None:
    """On a GPU behind other work of the lane, so that none has begun when the last is launched."""
    source, lane = torch.randn_like(pool), device_lane.Lane(pool)
    lane.warm_up()
    for _ in range(3):
        pool.zero_()
        if pool.is_cuda:
            torch.cuda.synchronize()
            with torch.cuda.stream(lane._stream):
                torch.cuda._sleep(50_000_000)
        begun = [lane.begin_fetch(source, ids(index, index + 1), ids(5 - index, index)) for index in range(device_lane.NUM_BEGUN)]
        assert lane.num_free == 0
        assert [fetch.done() for fetch in begun] == [not pool.is_cuda] * len(begun)
        for index, fetch in enumerate(begun):
            fetch.wait()
            assert fetch.done()
            assert fetch.sums().tolist() == expected(source[[index, index + 1]])
        assert lane.num_free == device_lane.NUM_BEGUN
        assert torch.equal(pool[[5, 4, 0, 1]], source[[0, 1, 1, 2]])


def test_other_streams_wait_for_a_fetch(pool: torch.Tensor) -> None:
    if not pool.is_cuda:
        pytest.skip("no CUDA device")
    source, lane, beside = torch.randn_like(pool), device_lane.Lane(pool), torch.cuda.Stream()
    lane.warm_up()
    pool.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(lane._stream):
        torch.cuda._sleep(50_000_000)
    fetch = lane.begin_fetch(source, ids(2), ids(3))
    with torch.cuda.stream(beside):
        quiet_calls.wait_for(fetch.event)
        copied = pool[3].clone()
    assert not fetch.done(), "nobody has waited"
    beside.synchronize()
    assert fetch.done() and torch.equal(copied, source[2])
    fetch.sums()
