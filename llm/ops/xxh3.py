"""The constants of XXH3 with 64 bits and seed 0 for inputs of whole 1,024-byte stretches, as kernels take them.

Source: the XXH3 specification, "long" inputs. Reference: the xxhash package.
"""

import struct

STRETCH_BYTES = 1024
"""16 stripes of eight 64-bit words; after each stretch but the last the eight lanes are scrambled."""

_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364ea"
    "c5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
_PRIME32 = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
_PRIME64 = (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5)
_START = (_PRIME32[2], _PRIME64[0], _PRIME64[1], _PRIME64[2], _PRIME64[3], _PRIME32[1], _PRIME64[4], _PRIME32[0])

KEYS, LAST_KEYS, SCRAMBLE_KEYS, MERGE_KEYS, STARTS = 0, 24, 32, 40, 48
"""Where each group begins in `table`: stripe keys (8 words from the stripe's number on), those of the very last stripe, and eight
each of the scramble's keys, the merge's keys and the lanes' first values."""


def table() -> tuple[int, ...]:
    """64-bit constants, as signed numbers."""

    def keys(offset: int, count: int) -> tuple[int, ...]:
        return struct.unpack_from(f"<{count}q", _SECRET, offset)

    start = struct.unpack("<8q", struct.pack("<8Q", *_START))
    return (*keys(0, 24), *keys(121, 8), *keys(128, 8), *keys(11, 8), *start)
