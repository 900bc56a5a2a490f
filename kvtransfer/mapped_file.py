"""Another process's memory, mapped read-only."""

import mmap
import os

from llm.kv.host_identity import boot_id
from llm.kv.memory_file import MemoryFile


class UnmappableError(Exception):
    """The memory cannot be mapped here; the message says why, for people."""


class InvisibleProcessError(UnmappableError):
    """There is no such process as far as can be seen from here, or another under its number."""


def map_file(file: MemoryFile) -> mmap.mmap:
    """Maps what is named, after making sure that it is that. Raises UnmappableError."""
    if not file.boot_id or file.boot_id != boot_id():
        raise UnmappableError("producer runs on another host (boot id differs)")
    try:
        fd = os.open(_path(file), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise InvisibleProcessError("producer's process is not visible from here (ended, or in another container)") from error
    except OSError as error:
        raise UnmappableError(f"producer's memory cannot be opened ({error.strerror})") from error
    try:
        status = os.fstat(fd)
        if (status.st_ino, status.st_size) != (file.inode, file.num_bytes):
            raise InvisibleProcessError("what the offer names is not the producer's memory (inode or size differs)")
        return mmap.mmap(fd, file.num_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
    except (OSError, ValueError) as error:
        raise UnmappableError(f"producer's memory cannot be mapped ({error})") from error
    finally:
        os.close(fd)


def is_gone(file: MemoryFile) -> bool:
    """Whether the process, or the memory in it, is no more."""
    return not os.path.lexists(_path(file))


def _path(file: MemoryFile) -> str:
    return f"/proc/{file.pid}/fd/{file.fd}"
