"""Names for requests."""

import secrets
import time
import uuid


def new_request_id() -> str:
    """A UUID of version 7 (RFC 9562): begins with the time, so that names sort by it."""
    milliseconds = time.time_ns() // 1_000_000
    value = (milliseconds & (1 << 48) - 1) << 80 | 0x7 << 76 | secrets.randbits(12) << 64 | 0b10 << 62 | secrets.randbits(62)
    return str(uuid.UUID(int=value))
