"""Memory in large pages: a simulation touches a little of everything, and translating addresses is a share of its time."""

import ctypes
import sys
from collections.abc import Iterator

_PAGE_BYTES = 1 << 21
# madvise (Linux): the kernel may use large pages from now on; it shall do so at once (since 6.1, and else it says no).
_HUGEPAGE, _COLLAPSE = 14, 25


def use_large_pages() -> None:
    """For all private memory that this process has by now, where the system lets it."""
    if sys.platform != "linux":
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for begin, end in _private_memory():
        first = -(-begin // _PAGE_BYTES) * _PAGE_BYTES
        num_bytes = end // _PAGE_BYTES * _PAGE_BYTES - first
        if num_bytes > 0 and madvise(first, num_bytes, _HUGEPAGE) == 0:
            madvise(first, num_bytes, _COLLAPSE)


def _private_memory() -> Iterator[tuple[int, int]]:
    with open("/proc/self/maps", encoding="utf-8") as maps:
        for line in maps.readlines():
            addresses, access, _, _, inode, *name = line.split()
            if access == "rw-p" and inode == "0" and name in ([], ["[heap]"]):
                first, last = addresses.split("-")
                yield int(first, 16), int(last, 16)
