"""The checksum of a KV block."""

import xxhash


def block_checksum(block: memoryview | bytes) -> int:
    """XXH3, 64 bits, seed 0, over the bytes. Does not hold the GIL while it reads a block."""
    return xxhash.xxh3_64_intdigest(block)
