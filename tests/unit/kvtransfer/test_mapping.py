"""What a mapped pool costs the process that reads it."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvtransfer import mapping
from kvtransfer.mapping import Mapping
from llm.kv.block_arrays import BlockIds, Sums
from llm.kv.host_copies import Memory
from llm.kv.memory_file import MemoryFile, allocate

BLOCK_BYTES, NUM_BLOCKS = 1 << 16, 16


@pytest.fixture
def file() -> Iterator[MemoryFile]:
    memory, file = allocate("tandem-test", BLOCK_BYTES * NUM_BLOCKS)
    if file is None:
        pytest.skip("memory cannot be shared here")
    memory[:] = b"\1" * len(memory)
    yield file
    memory.close()
    os.close(file.fd)


def test_what_was_read_leaves_the_memory_of_the_reader(file: MemoryFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping, "_LET_GO_BYTES", 4 * BLOCK_BYTES)
    mapped = Mapping(file)
    _read(mapped, range(3))
    assert _resident_bytes(mapped) >= 3 * BLOCK_BYTES
    _read(mapped, range(3, 4))
    assert _resident_bytes(mapped) == 0
    assert _read(mapped, range(4)) == 4 * BLOCK_BYTES, "it can be read again"
    mapped.close()


def _read(mapped: Mapping, blocks: range) -> int:
    def add(memory: Memory, source_ids: BlockIds, block_ids: BlockIds) -> Sums:
        return np.array([memory[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES].sum() for block in source_ids], np.uint64)

    ids = np.array(blocks, np.int32)
    return int(mapped.read(add, BLOCK_BYTES, ids, ids).sum())


def _resident_bytes(mapped: Mapping) -> int:
    begin = f"{mapped.bytes.ctypes.data:x}-"
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    assert any(line.startswith(begin) for line in lines)
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Rss:"))
