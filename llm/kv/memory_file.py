"""Memory that other processes of the host may map."""

import fcntl
import mmap
import os
import sys
from dataclasses import dataclass

from llm.kv.host_identity import boot_id

# F_ADD_SEALS and the seals against resizing (Linux, fcntl.h): with them no reader of the memory can be hit by SIGBUS.
_ADD_SEALS = 1033
_NO_RESIZE = 0x1 | 0x2 | 0x4


@dataclass(frozen=True)
class MemoryFile:
    """How another process of this host finds the memory. `inode` tells a reused pid or fd from the real one."""

    pid: int
    fd: int
    inode: int
    boot_id: str
    num_bytes: int


def allocate(name: str, num_bytes: int) -> tuple[mmap.mmap, MemoryFile | None]:
    """Zeros in an anonymous memory file, gone with the last process that has it, however that ends. The caller closes both.

    None where memory cannot be shared like that. `name` is seen in /proc only.
    """
    if sys.platform != "linux":
        return mmap.mmap(-1, num_bytes), None
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, num_bytes)
        fcntl.fcntl(fd, _ADD_SEALS, _NO_RESIZE)
        memory = mmap.mmap(fd, num_bytes)
    except BaseException:
        os.close(fd)
        raise
    return memory, MemoryFile(os.getpid(), fd, os.fstat(fd).st_ino, boot_id(), num_bytes)
