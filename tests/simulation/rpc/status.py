"""What both ends of a call say to each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc

Code = grpc.StatusCode
Trailers = Sequence[tuple[str, Any]]


@dataclass(frozen=True)
class Arrival:
    """A call as it comes to the server."""

    number: int
    path: str
    request: Any
    deadline: float | None
    metadata: Trailers
