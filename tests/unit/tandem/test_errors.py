"""The error table, and errors to statuses and back."""

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc.aio import Metadata
from hypothesis import example, given
from hypothesis import strategies as st

from tandem.error_details import MAX_VIOLATIONS, TRAILER
from tandem.errors import TABLE, FieldViolation, Reason, TandemError, from_rpc_error, invalid_field, to_status

C = grpc.StatusCode
CODES = {
    Reason.INVALID_REQUEST: C.INVALID_ARGUMENT,
    Reason.PROMPT_TOO_LONG: C.INVALID_ARGUMENT,
    Reason.MESSAGE_MALFORMED: C.INVALID_ARGUMENT,
    Reason.UNKNOWN_MODEL: C.NOT_FOUND,
    Reason.POOL_TOO_SMALL: C.INVALID_ARGUMENT,
    Reason.ALREADY_EXISTS: C.ALREADY_EXISTS,
    Reason.REQUEST_QUARANTINED: C.INTERNAL,
    Reason.QUEUE_FULL: C.RESOURCE_EXHAUSTED,
    Reason.KV_BLOCKS_EXHAUSTED: C.RESOURCE_EXHAUSTED,
    Reason.SLOW_READER: C.RESOURCE_EXHAUSTED,
    Reason.NO_WORKER: C.UNAVAILABLE,
    Reason.WORKER_LOST: C.UNAVAILABLE,
    Reason.DRAINING: C.UNAVAILABLE,
    Reason.LOADING: C.UNAVAILABLE,
    Reason.MODEL_MISMATCH: C.FAILED_PRECONDITION,
    Reason.KV_LAYOUT_MISMATCH: C.FAILED_PRECONDITION,
    Reason.TICKET_NOT_FOUND: C.NOT_FOUND,
    Reason.KV_CHECKSUM_MISMATCH: C.DATA_LOSS,
    Reason.TRANSFER_INTERRUPTED: C.UNAVAILABLE,
    Reason.DEADLINE_EXCEEDED: C.DEADLINE_EXCEEDED,
    Reason.CANCELLED: C.CANCELLED,
    Reason.STREAM_BROKEN: C.ABORTED,
    Reason.ENGINE_FAILED: C.INTERNAL,
    Reason.INTERNAL: C.INTERNAL,
}


def as_rpc_error(status: status_pb2.Status) -> grpc.aio.AioRpcError:
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    return rpc_error(code, status.message, status.SerializeToString())


def rpc_error(code: grpc.StatusCode, message: str = "", trailer: bytes | None = None) -> grpc.aio.AioRpcError:
    trailers = Metadata() if trailer is None else Metadata((TRAILER, trailer))
    return grpc.aio.AioRpcError(code, Metadata(), trailers, message)


def details_of(error: TandemError, kind: type) -> list:
    found = []
    for packed in to_status(error).details:
        detail = kind()
        if packed.Unpack(detail):
            found.append(detail)
    return found


def test_every_reason_is_in_the_table_and_fits_the_wire():
    assert set(TABLE) == set(Reason)
    assert all(len(reason) <= 63 and reason == reason.upper() == reason.name for reason in Reason)


@pytest.mark.parametrize(("reason", "code"), CODES.items())
def test_codes_are_the_documented_ones(reason, code):
    assert TandemError(reason, "").code is code


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
errors = st.builds(
    TandemError,
    st.sampled_from(Reason),
    texts,
    metadata=st.dictionaries(st.from_regex("[a-z_]{1,10}", fullmatch=True), texts, max_size=4),
    retry_after_s=st.none() | st.integers(0, 3_600_000).map(lambda milliseconds: milliseconds / 1000),
    violations=st.lists(st.builds(FieldViolation, texts, texts), max_size=MAX_VIOLATIONS),
)


@given(errors)
def test_status_and_back_gives_the_same_error(error):
    back = from_rpc_error(as_rpc_error(to_status(error)))
    assert (back.reason, back.message, back.code) == (error.reason, error.message, error.code)
    assert (back.metadata, back.retry_after_s, back.violations) == (error.metadata, error.retry_after_s, error.violations)


def test_retry_advice_is_the_tables_unless_the_error_has_its_own():
    assert TandemError(Reason.QUEUE_FULL, "").retry_after_s == 1.0
    assert TandemError(Reason.QUEUE_FULL, "", retry_after_s=0.25).retry_after_s == 0.25
    assert TandemError(Reason.STREAM_BROKEN, "").retry_after_s is None
    [info] = details_of(TandemError(Reason.QUEUE_FULL, "", retry_after_s=0.25), error_details_pb2.RetryInfo)
    assert info.retry_delay.ToMilliseconds() == 250


def test_user_facing_details():
    [resource] = details_of(TandemError(Reason.UNKNOWN_MODEL, "", metadata={"model": "gpt"}), error_details_pb2.ResourceInfo)
    assert (resource.resource_type, resource.resource_name) == ("model", "gpt")
    [quota] = details_of(TandemError(Reason.QUEUE_FULL, "full"), error_details_pb2.QuotaFailure)
    assert [(each.subject, each.description) for each in quota.violations] == [("queue_full", "full")]
    [broken] = details_of(TandemError(Reason.KV_LAYOUT_MISMATCH, "no"), error_details_pb2.PreconditionFailure)
    assert [(each.type, each.description) for each in broken.violations] == [("KV_LAYOUT_MISMATCH", "no")]
    [bad] = details_of(invalid_field("sampling.top_p", "must be in (0, 1]", Reason.INVALID_SAMPLING), error_details_pb2.BadRequest)
    assert [(each.field, each.description) for each in bad.field_violations] == [("sampling.top_p", "must be in (0, 1]")]


@given(st.text(max_size=5000), st.lists(st.text(max_size=2000), max_size=50))
@example("é" * 5000, ["é" * 2000] * 50)
def test_trailers_stay_below_8_kib_whatever_the_request_put_in(message, texts):
    violations = [FieldViolation(text, text) for text in texts]
    error = TandemError(Reason.INVALID_REQUEST, message, metadata={"model": message}, violations=violations)
    status = to_status(error)
    on_the_wire = 3 * len(status.message.encode()) + len(status.SerializeToString()) * 4 // 3
    assert on_the_wire < 8192


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (C.UNAVAILABLE, Reason.WORKER_LOST),
        (C.DEADLINE_EXCEEDED, Reason.DEADLINE_EXCEEDED),
        (C.CANCELLED, Reason.CANCELLED),
        (C.UNIMPLEMENTED, Reason.UNIMPLEMENTED),
        (C.UNKNOWN, Reason.INTERNAL),
        (C.PERMISSION_DENIED, Reason.INTERNAL),
    ],
)
def test_an_error_without_details_gets_a_reason_by_its_code(code, reason):
    error = from_rpc_error(rpc_error(code, "why"))
    assert (error.reason, error.message, error.metadata["grpc_code"]) == (reason, "why", code.name)


def test_details_that_are_garbage_or_of_a_newer_peer_fall_back_to_the_code():
    assert from_rpc_error(rpc_error(C.UNAVAILABLE, "", b"\xff\xff")).reason is Reason.WORKER_LOST
    status = status_pb2.Status(code=C.UNAVAILABLE.value[0], message="later")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="FROM_THE_FUTURE", domain="tandem"))
    error = from_rpc_error(as_rpc_error(status))
    assert (error.reason, error.message, error.metadata["foreign_reason"]) == (Reason.WORKER_LOST, "later", "FROM_THE_FUTURE")


def test_another_domains_reason_is_not_taken_for_ours():
    status = status_pb2.Status(code=C.INVALID_ARGUMENT.value[0])
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="QUEUE_FULL", domain="example.com"))
    assert from_rpc_error(as_rpc_error(status)).reason is Reason.INVALID_REQUEST
