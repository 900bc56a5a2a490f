"""Requests to a Tandem gateway, over gRPC."""

from collections.abc import Sequence

import grpc

from bench.generator import Clock
from bench.records import Record
from tandem.api.v1 import generation_pb2, generation_pb2_grpc
from tandem.channels import open_channel
from tandem.errors import from_rpc_error

TIMEOUT_S = 600.0
PHASES = ("gateway_queue_us", "prefill_queue_us", "prefill_us", "handoff_us", "decode_queue_us", "decode_us")


class TandemClient:
    """One channel to a gateway. Greedy, exactly as many tokens as asked for."""

    exact = True

    def __init__(self, address: str) -> None:
        self._channel = open_channel(address)
        self._stub = generation_pb2_grpc.GenerationServiceStub(self._channel)

    async def send(self, prompt: Sequence[int], completion_tokens: int, record: Record, clock: Clock) -> None:
        request = generation_pb2.GenerateRequest(
            token_ids=generation_pb2.TokenIds(ids=prompt),
            sampling=generation_pb2.SamplingParams(temperature=0),
            stopping=generation_pb2.StoppingParams(max_tokens=completion_tokens, ignore_eos=True),
        )
        try:
            async for response in self._stub.Generate(request, timeout=TIMEOUT_S):
                if response.HasField("finished"):
                    _note_finished(record, response.finished)
                elif response.delta.token_ids:
                    record.note_arrival(clock.now_us(), len(response.delta.token_ids))
        except grpc.aio.AioRpcError as error:
            record.error = from_rpc_error(error).reason.value

    async def close(self) -> None:
        await self._channel.close()


def _note_finished(record: Record, finished: generation_pb2.Finished) -> None:
    record.completion_tokens = sum(record.counts)
    record.cached_tokens = finished.usage.cached_prompt_tokens
    record.phases_us = {name: getattr(finished.timings, name) for name in PHASES}
