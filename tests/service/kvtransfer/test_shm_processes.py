"""Shared memory between two real processes."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtransfer.mapped_file import UnmappableError, is_gone
from kvtransfer.mapping import Mapping
from kvtransfer.ticket import ShmOffer
from tests.service.kvtransfer.harness import LAYOUT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pools are shared on Linux only")

PRODUCER = """
import sys
from dataclasses import astuple
from llm.kv.layout import KvLayout
from llm.kv.pool import KvPool
pool = KvPool.create(KvLayout(2, 2, 16, 4, "float32"), 3)
pool.block_view(1)[:] = bytes([7]) * pool.layout.block_bytes
print(*astuple(pool.shared), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def producer() -> Iterator[tuple[subprocess.Popen[str], ShmOffer]]:
    process = subprocess.Popen([sys.executable, "-c", PRODUCER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid, fd, inode, boot, size = process.stdout.readline().split()
    yield process, ShmOffer(int(pid), int(fd), int(inode), boot, int(size))
    process.kill()
    process.communicate()


def test_a_killed_producer_leaves_nothing_once_it_is_unmapped(producer: tuple[subprocess.Popen[str], ShmOffer]) -> None:
    process, offer = producer
    files_before = sorted(Path("/dev/shm").iterdir())
    mapping = Mapping(offer.file)
    blocks = mapping.bytes.reshape(3, LAYOUT.block_bytes)
    assert (blocks[1] == 7).all() and not blocks[2].any()
    with pytest.raises(ValueError, match="read-only"):
        blocks[1, 0] = 1
    assert not is_gone(offer.file)
    process.kill()
    process.wait()
    assert is_gone(offer.file)
    assert blocks[1, 0] == 7
    del blocks
    mapping.close()
    assert "tandem-kv" not in Path("/proc/self/maps").read_text()
    assert sorted(Path("/dev/shm").iterdir()) == files_before
    with pytest.raises(UnmappableError, match="not visible"):
        Mapping(offer.file)
