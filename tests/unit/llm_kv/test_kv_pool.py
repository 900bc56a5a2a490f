"""KV layout and pool."""

import mmap
import os
import sys
from pathlib import Path

import pytest
import torch

from llm.kv.host_identity import boot_id
from llm.kv.layout import KvLayout
from llm.kv.pool import MEMORY_NAME, KvPool

LAYOUT = KvLayout(num_layers=2, num_kv_heads=3, head_dim=4, block_tokens=5, dtype="bfloat16")
linux = pytest.mark.skipif(sys.platform != "linux", reason="pools are shared on Linux only")


def test_sizes() -> None:
    assert LAYOUT.block_bytes == 2 * 2 * 3 * 5 * 4 * 2
    assert [LAYOUT.blocks_for(tokens) for tokens in (0, 1, 5, 6)] == [0, 1, 1, 2]


def test_smollm2_block_sizes() -> None:
    assert [KvLayout(30, 3, 64, 16, dtype).block_bytes for dtype in ("bfloat16", "float32")] == [368_640, 737_280]


def test_int8_blocks_hold_scales_and_whole_stretches_of_a_checksum() -> None:
    layout = KvLayout(30, 3, 64, 16, "int8")
    assert layout.block_shape == (30, 2, 3, 16, 64 + 4)
    assert 30 * 2 * 3 * 16 * 68 == 195_840 and layout.block_bytes == 196_608 == 192 * 1024
    pool = KvPool.create(layout, 3)
    pool.tensor[1] = 7
    assert pool.tensor[1].is_contiguous() and bytes(pool.block_view(1)) == b"\7" * 195_840 + b"\0" * 768
    assert not any(pool.block_view(0)) and not any(pool.block_view(2))
    pool.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_views_and_tensor_are_the_same_memory(dtype: str) -> None:
    pool = KvPool.create(KvLayout(2, 3, 4, 5, dtype), 3)  # type: ignore[arg-type]
    assert pool.tensor.shape == (3, 2, 2, 3, 5, 4)
    assert not pool.tensor.any()
    pool.tensor[1] = torch.arange(240, dtype=torch.float32).view(2, 2, 3, 5, 4)
    assert bytes(pool.block_view(1)) == pool.tensor[1].contiguous().view(torch.uint8).numpy().tobytes()
    pool.block_view(2)[:] = pool.block_view(1)
    assert torch.equal(pool.tensor[2], pool.tensor[1])
    assert not pool.tensor[0].any()
    pool.close()


def test_a_block_outside_of_the_pool_is_refused() -> None:
    pool = KvPool.create(LAYOUT, 2)
    for block in (-1, 2):
        with pytest.raises(IndexError):
            pool.block_view(block)
    pool.close()


@linux
def test_another_mapping_sees_what_is_written_and_cannot_resize_it() -> None:
    pool = KvPool.create(LAYOUT, 2)
    shared = pool.shared
    assert shared is not None
    assert (shared.pid, shared.boot_id, shared.num_bytes) == (os.getpid(), boot_id(), 2 * LAYOUT.block_bytes)
    assert os.fstat(shared.fd).st_ino == shared.inode
    with pytest.raises(PermissionError):
        os.ftruncate(shared.fd, 0)
    fd = os.open(f"/proc/{shared.pid}/fd/{shared.fd}", os.O_RDONLY)
    mapped = mmap.mmap(fd, shared.num_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
    os.close(fd)
    pool.tensor.fill_(2.0)
    assert mapped[:2] == b"\x00\x40"
    mapped.close()
    pool.close()


@linux
def test_nothing_is_left_after_close_even_with_a_tensor_about() -> None:
    pool = KvPool.create(LAYOUT, 2)
    fd = pool.shared.fd if pool.shared else -1
    view, tensor = pool.block_view(0), pool.tensor
    pool.close()
    pool.close()
    with pytest.raises(OSError):
        os.fstat(fd)
    tensor.fill_(1.0)
    assert view[0] or view[1]
    del view, tensor
    assert MEMORY_NAME not in Path("/proc/self/maps").read_text()
