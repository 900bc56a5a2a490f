"""The shm transport: a producer's pool, mapped read-only."""

import mmap
import os
from collections.abc import AsyncGenerator
from contextlib import suppress

from kvtransfer.frames import Frame
from kvtransfer.host_blocks import HostBlocks
from kvtransfer.intake import Pull, follow
from kvtransfer.ticket import ShmOffer
from llm.kv.host_identity import boot_id


class ShmUnavailableError(Exception):
    """The offered memory cannot be mapped here; the message says why, for people."""


class Mapping:
    """The mapped pool of one producer. The kernel ends the producer's memory only when this is closed too."""

    def __init__(self, offer: ShmOffer) -> None:
        """Maps what was offered, after making sure that it is that. Raises ShmUnavailableError."""
        self.offer = offer
        self._memory = _map(offer)
        self._bytes = memoryview(self._memory)

    def block(self, block_id: int, block_bytes: int) -> memoryview:
        """A block's bytes in the producer's pool, read-only; they may change as soon as the ticket's lease is over."""
        return self._bytes[block_id * block_bytes : (block_id + 1) * block_bytes]

    def close(self) -> None:
        # A traceback that is still about may hold a view; the memory then goes with it.
        with suppress(BufferError):
            self._bytes.release()
            self._memory.close()


async def fetch(frames: AsyncGenerator[Frame, None], mapping: Mapping, blocks: HostBlocks, pull: Pull) -> int:
    """Copies the blocks that `frames` tell of; returns and raises what `follow` does."""
    size, source_ids, block_ids = pull.ticket.layout.block_bytes, pull.ticket.block_ids, pull.destination.block_ids

    def arrive(first: int, last: int) -> list[int]:
        sources = [mapping.block(block, size) for block in source_ids[first:last]]
        return blocks.fetch(sources, block_ids[first:last])

    return await follow(frames, pull, arrive)


def producer_is_gone(mapping: Mapping) -> bool:
    """Whether the mapped process, or its pool, is no more."""
    return not os.path.lexists(_path(mapping.offer))


def _path(offer: ShmOffer) -> str:
    return f"/proc/{offer.pid}/fd/{offer.fd}"


def _map(offer: ShmOffer) -> mmap.mmap:
    if not offer.boot_id or offer.boot_id != boot_id():
        raise ShmUnavailableError("producer runs on another host (boot id differs)")
    try:
        fd = os.open(_path(offer), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise ShmUnavailableError("producer's process is not visible from here (ended, or in another container)") from error
    except OSError as error:
        raise ShmUnavailableError(f"producer's memory cannot be opened ({error.strerror})") from error
    try:
        status = os.fstat(fd)
        if (status.st_ino, status.st_size) != (offer.inode, offer.pool_bytes):
            raise ShmUnavailableError("what the offer names is not the producer's memory (inode or size differs)")
        return mmap.mmap(fd, offer.pool_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
    except (OSError, ValueError) as error:
        raise ShmUnavailableError(f"producer's memory cannot be mapped ({error})") from error
    finally:
        os.close(fd)
