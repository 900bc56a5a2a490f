"""The request's root span, with the attributes that OpenTelemetry's conventions for generative AI name."""

from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.util.types import AttributeValue

from gateway.job import Ending, GenerationJob
from gateway.routing import Placement
from gateway.served_model import ServedModel
from gateway.validate import CheckedRequest
from tandem.clock import wall_ns
from tandem.errors import TandemError
from tandem.tracing import record_span, tracer


@contextmanager
def request_span(request_id: str, model: ServedModel) -> Iterator[Span]:
    """Lasts as long as the request; its name is completed once the kind of request is known."""
    attributes: dict[str, AttributeValue] = {
        "gen_ai.provider.name": "tandem",
        "gen_ai.request.model": model.name,
        "gen_ai.response.model": model.name,
        "gen_ai.response.id": request_id,
        "tandem.request_id": request_id,
    }
    with tracer().start_as_current_span(
        f"generate {model.name}",
        kind=SpanKind.SERVER,
        attributes=attributes,
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        try:
            yield span
        except TandemError as error:
            span.set_attribute("error.type", error.reason.value)
            span.set_status(Status(StatusCode.ERROR, error.reason.value))
            raise


def note_request(span: Span, checked: CheckedRequest, model: ServedModel) -> None:
    """No text of the prompt, ever."""
    operation = "text_completion" if checked.prompt.messages is None else "chat"
    sampling = checked.sampling
    span.update_name(f"{operation} {model.name}")
    span.set_attributes(
        {
            "gen_ai.operation.name": operation,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.top_k": sampling.top_k,
            "gen_ai.request.presence_penalty": sampling.presence_penalty,
            "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
        }
    )


def note_job(span: Span, job: GenerationJob) -> None:
    # Span attributes are signed 64-bit integers; half of all seeds are larger.
    span.set_attributes(
        {
            "gen_ai.request.max_tokens": job.stopping.max_tokens,
            "gen_ai.request.seed": str(job.sampling.seed),
            "gen_ai.usage.input_tokens": len(job.token_ids),
        }
    )


def record_tokenizing(began: float, ended: float, num_tokens: int | None) -> None:
    """`began` and `ended` are on the monotonic clock, in seconds. None: the request was refused before it had tokens."""
    attributes: dict[str, AttributeValue] = {} if num_tokens is None else {"gen_ai.usage.input_tokens": num_tokens}
    record_span("gateway.tokenize", None, wall_ns(int(began * 1e9)), wall_ns(int(ended * 1e9)), attributes)


def record_route(placement: Placement, attempt: int, began: float, ended: float) -> None:
    """`began` and `ended` are on the monotonic clock, in seconds."""
    attributes: dict[str, AttributeValue] = {
        "tandem.attempt": attempt,
        "tandem.prefill.address": placement.prefill.address,
        "tandem.decode.address": placement.decode.address,
    }
    record_span("gateway.route", None, wall_ns(int(began * 1e9)), wall_ns(int(ended * 1e9)), attributes)


def note_ending(span: Span, ending: Ending) -> None:
    span.set_attributes(
        {
            "gen_ai.response.finish_reasons": (ending.reason.value,),
            "gen_ai.usage.output_tokens": ending.num_completion_tokens,
            "gen_ai.usage.cache_read.input_tokens": ending.num_cached_tokens,
        }
    )
