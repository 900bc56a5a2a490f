"""The one table of errors: what went wrong, as processes and users see it.

A failure inside the suite is a `TandemError`; the server's interceptor turns it into a google.rpc.Status, and `from_rpc_error`
turns that back into the same `TandemError` at the caller. Imports no grpc when loaded, since policy code raises these too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import grpc
    from google.rpc import status_pb2

DOMAIN = "tandem"


class Reason(StrEnum):
    """What went wrong. With the status code this is the contract; the message is for people and may change."""

    INVALID_REQUEST = "INVALID_REQUEST"
    INVALID_SAMPLING = "INVALID_SAMPLING"
    PROMPT_TOO_LONG = "PROMPT_TOO_LONG"
    PROMPT_EMPTY = "PROMPT_EMPTY"
    TEMPLATE_FAILED = "TEMPLATE_FAILED"
    MESSAGE_MALFORMED = "MESSAGE_MALFORMED"
    MESSAGE_TOO_LARGE = "MESSAGE_TOO_LARGE"
    UNKNOWN_MODEL = "UNKNOWN_MODEL"
    UNKNOWN_SERVICE = "UNKNOWN_SERVICE"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    POOL_TOO_SMALL = "POOL_TOO_SMALL"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    QUEUE_FULL = "QUEUE_FULL"
    KV_BLOCKS_EXHAUSTED = "KV_BLOCKS_EXHAUSTED"
    SLOW_READER = "SLOW_READER"
    NO_WORKER = "NO_WORKER"
    WORKER_LOST = "WORKER_LOST"
    DRAINING = "DRAINING"
    LOADING = "LOADING"
    MODEL_MISMATCH = "MODEL_MISMATCH"
    KV_LAYOUT_MISMATCH = "KV_LAYOUT_MISMATCH"
    TICKET_NOT_FOUND = "TICKET_NOT_FOUND"
    KV_CHECKSUM_MISMATCH = "KV_CHECKSUM_MISMATCH"
    TRANSFER_INTERRUPTED = "TRANSFER_INTERRUPTED"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    CANCELLED = "CANCELLED"
    STREAM_BROKEN = "STREAM_BROKEN"
    REQUEST_QUARANTINED = "REQUEST_QUARANTINED"
    TRACE_NOT_FOUND = "TRACE_NOT_FOUND"
    ENGINE_FAILED = "ENGINE_FAILED"
    INTERNAL = "INTERNAL"


Outcome = Literal["rejected", "failed", "cancelled"]
"""How a call that ends with an error is counted: refused by rule, broken, or no longer wanted."""

Extra = Literal["resource", "quota", "precondition"]
"""A further detail that a status carries: google.rpc ResourceInfo, QuotaFailure or PreconditionFailure."""


@dataclass(frozen=True)
class Row:
    """What a reason means on the wire. `retry_after_s` is the delay to advise when the error names none; None advises no retry."""

    code: str
    outcome: Outcome = "rejected"
    retry_after_s: float | None = None
    extra: Extra | None = None


TABLE: Mapping[Reason, Row] = MappingProxyType(
    {
        Reason.INVALID_REQUEST: Row("INVALID_ARGUMENT"),
        Reason.INVALID_SAMPLING: Row("INVALID_ARGUMENT"),
        Reason.PROMPT_TOO_LONG: Row("INVALID_ARGUMENT"),
        Reason.PROMPT_EMPTY: Row("INVALID_ARGUMENT"),
        Reason.TEMPLATE_FAILED: Row("INVALID_ARGUMENT"),
        Reason.MESSAGE_MALFORMED: Row("INVALID_ARGUMENT"),
        Reason.MESSAGE_TOO_LARGE: Row("RESOURCE_EXHAUSTED"),
        Reason.UNKNOWN_MODEL: Row("NOT_FOUND", extra="resource"),
        Reason.UNKNOWN_SERVICE: Row("NOT_FOUND"),
        Reason.UNIMPLEMENTED: Row("UNIMPLEMENTED"),
        Reason.POOL_TOO_SMALL: Row("INVALID_ARGUMENT"),
        Reason.ALREADY_EXISTS: Row("ALREADY_EXISTS"),
        Reason.QUEUE_FULL: Row("RESOURCE_EXHAUSTED", retry_after_s=1.0, extra="quota"),
        Reason.KV_BLOCKS_EXHAUSTED: Row("RESOURCE_EXHAUSTED", retry_after_s=1.0, extra="quota"),
        Reason.SLOW_READER: Row("RESOURCE_EXHAUSTED", retry_after_s=1.0),
        Reason.NO_WORKER: Row("UNAVAILABLE", retry_after_s=1.0),
        Reason.WORKER_LOST: Row("UNAVAILABLE", "failed", retry_after_s=1.0),
        Reason.DRAINING: Row("UNAVAILABLE", retry_after_s=1.0),
        Reason.LOADING: Row("UNAVAILABLE", retry_after_s=2.0),
        Reason.MODEL_MISMATCH: Row("FAILED_PRECONDITION", extra="precondition"),
        Reason.KV_LAYOUT_MISMATCH: Row("FAILED_PRECONDITION", extra="precondition"),
        Reason.TICKET_NOT_FOUND: Row("NOT_FOUND"),
        Reason.KV_CHECKSUM_MISMATCH: Row("DATA_LOSS", "failed"),
        Reason.TRANSFER_INTERRUPTED: Row("UNAVAILABLE", "failed"),
        Reason.DEADLINE_EXCEEDED: Row("DEADLINE_EXCEEDED", "cancelled"),
        Reason.CANCELLED: Row("CANCELLED", "cancelled"),
        Reason.STREAM_BROKEN: Row("ABORTED", "failed"),
        # Workers die under it: our bug, which asking again would only repeat.
        Reason.REQUEST_QUARANTINED: Row("INTERNAL", "failed"),
        Reason.TRACE_NOT_FOUND: Row("NOT_FOUND"),
        Reason.ENGINE_FAILED: Row("INTERNAL", "failed"),
        Reason.INTERNAL: Row("INTERNAL", "failed"),
    }
)

REASON_OF_FOREIGN_CODE: Mapping[str, Reason] = MappingProxyType(
    {
        "CANCELLED": Reason.CANCELLED,
        "INVALID_ARGUMENT": Reason.INVALID_REQUEST,
        "DEADLINE_EXCEEDED": Reason.DEADLINE_EXCEEDED,
        "NOT_FOUND": Reason.UNKNOWN_SERVICE,
        "ALREADY_EXISTS": Reason.ALREADY_EXISTS,
        "RESOURCE_EXHAUSTED": Reason.MESSAGE_TOO_LARGE,
        "UNIMPLEMENTED": Reason.UNIMPLEMENTED,
        "UNAVAILABLE": Reason.WORKER_LOST,
        "ABORTED": Reason.STREAM_BROKEN,
        "DATA_LOSS": Reason.TRANSFER_INTERRUPTED,
        "FAILED_PRECONDITION": Reason.MODEL_MISMATCH,
    }
)
"""What a status without our ErrorInfo means: it comes from gRPC itself, or from a peer of another make. The rest are INTERNAL."""


@dataclass(frozen=True)
class FieldViolation:
    """What is wrong with one field of a request; `field` is its path in the message, `sampling.top_p`."""

    field: str
    description: str


class TandemError(Exception):
    """A failure with a place in the table.

    `metadata` holds ids and numbers under lower_snake keys. `retry_after_s` overrides the table's advice.
    """

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
        violations: Sequence[FieldViolation] = (),
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata: Mapping[str, str] = MappingProxyType(dict(metadata or {}))
        self.retry_after_s = TABLE[reason].retry_after_s if retry_after_s is None else retry_after_s
        self.violations = tuple(violations)

    @property
    def code(self) -> grpc.StatusCode:
        import grpc

        return getattr(grpc.StatusCode, TABLE[self.reason].code)

    @property
    def outcome(self) -> Outcome:
        return TABLE[self.reason].outcome

    def __repr__(self) -> str:
        return f"TandemError({self.reason}, {self.message!r}, metadata={dict(self.metadata)})"


def invalid_field(field: str, description: str, reason: Reason = Reason.INVALID_REQUEST) -> TandemError:
    """The error for one bad field: a message for people and the violation that names the field."""
    return TandemError(reason, f"{field}: {description}", violations=(FieldViolation(field, description),))


def to_status(error: TandemError) -> status_pb2.Status:
    """The google.rpc.Status of an error: code, message, ErrorInfo, and RetryInfo, BadRequest and others where they apply."""
    from tandem.error_details import encode

    return encode(error)


def from_rpc_error(error: grpc.RpcError) -> TandemError:
    """The TandemError that a peer raised; an error without our ErrorInfo gets a reason by its code. Inverse of `to_status`."""
    from tandem.error_details import decode

    return decode(error)
