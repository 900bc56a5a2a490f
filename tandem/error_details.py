"""TandemError to google.rpc.Status and back, after AIP-193."""

from collections.abc import Callable
from typing import TypeVar

import grpc
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]
from google.rpc import error_details_pb2 as details_pb2
from google.rpc import status_pb2

from tandem.errors import DOMAIN, REASON_OF_FOREIGN_CODE, TABLE, Extra, FieldViolation, Reason, TandemError

TRAILER = "grpc-status-details-bin"

# The message travels twice (grpc-message percent-encoded, and in the details in base64) and peers drop calls whose trailers pass
# 8 KiB, so everything that a request can inflate is cut.
MESSAGE_BYTES = 512
VIOLATION_BYTES = 192
MAX_VIOLATIONS = 8
METADATA_BYTES = 128

DetailT = TypeVar("DetailT", bound=Message)


def encode(error: TandemError) -> status_pb2.Status:
    """The status of `error`; its texts are cut so that the trailers stay under 8 KiB."""
    status = status_pb2.Status(code=error.code.value[0], message=_cut(error.message, MESSAGE_BYTES))
    for detail in _details(error):
        status.details.add().Pack(detail)
    return status


def decode(error: grpc.RpcError) -> TandemError:
    """The TandemError in an RpcError's trailers, or the one that its bare code stands for."""
    status = _status_of(error)
    info = _find(status, details_pb2.ErrorInfo)
    if info is None or info.domain != DOMAIN or info.reason not in Reason.__members__:
        return _foreign(error, info)
    return TandemError(
        Reason(info.reason),
        status.message,
        metadata=dict(info.metadata),
        retry_after_s=_retry_after_s(status),
        violations=_violations(status),
    )


def trailers(status: status_pb2.Status) -> tuple[tuple[str, bytes], ...]:
    """The trailing metadata that carries `status` beside the plain code and message."""
    return ((TRAILER, status.SerializeToString()),)


def _details(error: TandemError) -> list[Message]:
    metadata = {key: _cut(value, METADATA_BYTES) for key, value in error.metadata.items()}
    details: list[Message] = [details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)]
    if error.retry_after_s is not None:
        details.append(_retry_info(error.retry_after_s))
    if error.violations:
        details.append(_bad_request(error))
    extra = TABLE[error.reason].extra
    if extra is not None:
        details.append(_EXTRAS[extra](error))
    return details


def _retry_info(retry_after_s: float) -> details_pb2.RetryInfo:
    info = details_pb2.RetryInfo()
    info.retry_delay.FromMilliseconds(round(retry_after_s * 1000))
    return info


def _bad_request(error: TandemError) -> details_pb2.BadRequest:
    request = details_pb2.BadRequest()
    for violation in error.violations[:MAX_VIOLATIONS]:
        field, description = _cut(violation.field, VIOLATION_BYTES), _cut(violation.description, VIOLATION_BYTES)
        request.field_violations.add(field=field, description=description)
    return request


def _resource_info(error: TandemError) -> details_pb2.ResourceInfo:
    return details_pb2.ResourceInfo(resource_type="model", resource_name=_cut(error.metadata.get("model", ""), METADATA_BYTES))


def _quota_failure(error: TandemError) -> details_pb2.QuotaFailure:
    failure = details_pb2.QuotaFailure()
    failure.violations.add(subject=error.reason.lower(), description=_cut(error.message, VIOLATION_BYTES))
    return failure


def _precondition_failure(error: TandemError) -> details_pb2.PreconditionFailure:
    failure = details_pb2.PreconditionFailure()
    failure.violations.add(type=error.reason, subject=DOMAIN, description=_cut(error.message, VIOLATION_BYTES))
    return failure


_EXTRAS: dict[Extra, Callable[[TandemError], Message]] = {
    "resource": _resource_info,
    "quota": _quota_failure,
    "precondition": _precondition_failure,
}


def _cut(text: str, num_bytes: int) -> str:
    """At most `num_bytes` of UTF-8, ending on a whole code point; lone surrogates, which no message can carry, become '?'."""
    encoded = text.encode("utf-8", "replace")
    return encoded[:num_bytes].decode("utf-8", "ignore")


def _status_of(error: grpc.RpcError) -> status_pb2.Status:
    for key, value in error.trailing_metadata() or ():
        if key == TRAILER:
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                break
    return status_pb2.Status()


def _find(status: status_pb2.Status, kind: type[DetailT]) -> DetailT | None:
    """The first detail of that kind; None if there is none, or if it is malformed."""
    detail = kind()
    try:
        found = any(packed.Unpack(detail) for packed in status.details)
    except DecodeError:
        return None
    return detail if found else None


def _foreign(error: grpc.RpcError, info: details_pb2.ErrorInfo | None) -> TandemError:
    code = error.code()
    metadata = {"grpc_code": code.name}
    if info is not None:
        metadata |= {"foreign_domain": info.domain, "foreign_reason": info.reason}
    return TandemError(REASON_OF_FOREIGN_CODE.get(code.name, Reason.INTERNAL), error.details() or code.name, metadata=metadata)


def _retry_after_s(status: status_pb2.Status) -> float | None:
    info = _find(status, details_pb2.RetryInfo)
    return None if info is None else info.retry_delay.ToMilliseconds() / 1000


def _violations(status: status_pb2.Status) -> tuple[FieldViolation, ...]:
    request = _find(status, details_pb2.BadRequest)
    return () if request is None else tuple(FieldViolation(each.field, each.description) for each in request.field_violations)
