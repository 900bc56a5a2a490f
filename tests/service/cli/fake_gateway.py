"""A gateway that speaks the real protocol and makes its answers up. It also runs as a process: `python fake_gateway.py ROLE PORT`.

The answer to a prompt is its words in reverse. Words of the prompt direct it: `fail:REASON` ends with that error, `break:REASON`
the same after one token, `hang` sends one token and then nothing, `lose` drops a token.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from tandem.api.v1 import generation_pb2, generation_pb2_grpc, model_pb2, model_pb2_grpc, operations_pb2, operations_pb2_grpc
from tandem.errors import Reason, TandemError, to_status

SERVICES = {
    "gateway": "tandem.api.v1.GenerationService",
    "prefill": "tandem.worker.v1.PrefillService",
    "decode": "tandem.worker.v1.DecodeService",
}


def abort(context: grpc.ServicerContext, error: TandemError) -> None:
    context.abort_with_status(rpc_status.to_status(to_status(error)))


def prompt_of(request: generation_pb2.GenerateRequest) -> str:
    return request.text or request.chat.messages[-1].content


class FakeGeneration(generation_pb2_grpc.GenerationServiceServicer):
    """Remembers requests; `hung` is set when one waits for its end, `cancelled` when the client left it."""

    def __init__(self) -> None:
        self.requests: list[generation_pb2.GenerateRequest] = []
        self.trace_parents: list[str] = []
        self.hung, self.cancelled = threading.Event(), threading.Event()

    def Generate(
        self, request: generation_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[generation_pb2.GenerateResponse]:
        self.requests.append(request)
        self.trace_parents += [value for key, value in context.invocation_metadata() if key == "traceparent"]
        words = prompt_of(request).split()[::-1]
        directives = dict(word.partition(":")[::2] for word in words if ":" in word or word in ("hang", "lose"))
        if "fail" in directives:
            abort(context, TandemError(Reason(directives["fail"]), "refused by the fake"))
        for index, word in enumerate(words):
            yield self._delta(index + (1 if "lose" in directives and index else 0), word, request)
            if "break" in directives:
                abort(context, TandemError(Reason(directives["break"]), "broken by the fake"))
            if "hang" in directives:
                self._hang(context)
        yield generation_pb2.GenerateResponse(request_id="r", finished=self._finished(len(words), request))

    def _delta(self, index: int, word: str, request: generation_pb2.GenerateRequest) -> generation_pb2.GenerateResponse:
        text = word if index == 0 else f" {word}"
        logprobs = []
        if request.output.HasField("logprobs"):
            top = [generation_pb2.TopLogprob(token_id=7, token="seven", logprob=-0.5)]
            logprobs = [generation_pb2.TokenLogprob(token_id=index, token=text, logprob=-1.25, top=top)]
        delta = generation_pb2.Delta(index=index, text=text, token_ids=[index], logprobs=logprobs)
        return generation_pb2.GenerateResponse(request_id="r", delta=delta)

    def _finished(self, count: int, request: generation_pb2.GenerateRequest) -> generation_pb2.Finished:
        return generation_pb2.Finished(
            reason=generation_pb2.FINISH_REASON_STOP,
            usage=generation_pb2.Usage(
                prompt_tokens=len(request.chat.messages) or 1, cached_prompt_tokens=0, completion_tokens=count
            ),
            timings=generation_pb2.Timings(handoff_us=2500, handoff_bytes=1_500_000, transport=generation_pb2.TRANSPORT_SHM),
        )

    def _hang(self, context: grpc.ServicerContext) -> None:
        ended = threading.Event()
        context.add_callback(ended.set)
        self.hung.set()
        ended.wait(60)
        self.cancelled.set()


class FakeModels(model_pb2_grpc.ModelServiceServicer):
    def __init__(self) -> None:
        self.chat_capable = True

    def GetModel(self, request: model_pb2.GetModelRequest, context: grpc.ServicerContext) -> model_pb2.GetModelResponse:
        model = model_pb2.Model(name="fake", digest="d", context_tokens=128, vocabulary_size=9, chat_capable=self.chat_capable)
        return model_pb2.GetModelResponse(model=model)


def worker(role: operations_pb2.WorkerRole, **changes: object) -> operations_pb2.WorkerSummary:
    values = {"address": "127.0.0.1:1", "worker_id": "w", "role": role, "ready": True, "device": "cpu (2 threads)", **changes}
    values |= {"weight_format": "float32", "total_blocks": 100, "free_blocks": 90, "transports": ["shm", "tcp"]}
    return operations_pb2.WorkerSummary(**values)


class FakeOperations(operations_pb2_grpc.OperationsServiceServicer):
    """Its trace becomes whole at the second question, as a real one does."""

    def __init__(self) -> None:
        self.workers = [worker(operations_pb2.WORKER_ROLE_PREFILL), worker(operations_pb2.WORKER_ROLE_DECODE)]
        self.num_trace_calls = 0

    def GetSuite(self, request: operations_pb2.GetSuiteRequest, context: grpc.ServicerContext) -> operations_pb2.GetSuiteResponse:
        return operations_pb2.GetSuiteResponse(running_requests=3, queued_requests=4, workers=self.workers)

    def GetTrace(self, request: operations_pb2.GetTraceRequest, context: grpc.ServicerContext) -> operations_pb2.GetTraceResponse:
        self.num_trace_calls += 1
        if self.num_trace_calls == 1:
            abort(context, TandemError(Reason.TRACE_NOT_FOUND, "not yet"))
        spans = [_span("generate", "root", ""), *(_span(name, name, "root") for name in ("prefill.run", "kv.pull", "decode.run"))]
        return operations_pb2.GetTraceResponse(spans=spans)


def _span(name: str, span_id: str, parent: str) -> operations_pb2.Span:
    times = {"start_time": Timestamp(nanos=0), "end_time": Timestamp(nanos=5_000_000)}
    return operations_pb2.Span(name=name, span_id=span_id, parent_span_id=parent, service="fake", **times)


class FakeGateway:
    """A listening server with all of it."""

    def __init__(self, port: int = 0, role: str = "gateway") -> None:
        self.generation, self.models, self.operations = FakeGeneration(), FakeModels(), FakeOperations()
        self.server = grpc.server(ThreadPoolExecutor(8), options=(("grpc.so_reuseport", 0),))
        self.health = health.HealthServicer()
        self.health.set(SERVICES[role], health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(self.generation, self.server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(self.models, self.server)
        operations_pb2_grpc.add_OperationsServiceServicer_to_server(self.operations, self.server)
        self.port = self.server.add_insecure_port(f"127.0.0.1:{port}")
        self.address = f"127.0.0.1:{self.port}"
        self.server.start()

    def stop(self) -> None:
        self.server.stop(None).wait()


def main() -> None:
    """Serve until SIGTERM or the end of standard input; a mark of the process's life lies in the current directory."""
    role, port = sys.argv[1], int(sys.argv[2])
    print("12:00:00 INFO fake: loading  50 %: half way", file=sys.stderr, flush=True)
    gateway, ended = FakeGateway(port, role), threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    ended.wait()
    with open(os.environ["FAKE_RECORD"], "a") as record:
        record.write(f"{role} {time.monotonic_ns()}\n")
    gateway.stop()
    os._exit(0)


if __name__ == "__main__":
    main()
