"""Two workers without a model, for measuring the gateway alone: `python -m bench.relay_workers DIGEST STEP_MS FOLLOW`.

Prints both addresses and serves until its input ends. All streams get a token at the same moment, as from an engine's step. With
FOLLOW 0 the decode worker knows no Follow calls, so that each token is a message of its own.
"""

import asyncio
import sys
import uuid
from collections.abc import AsyncIterator

import grpc.aio

from tandem.api.v1 import generation_pb2, operations_pb2
from tandem.engine_thread import Mailbox
from tandem.server import loop_factory, server_options
from tandem.worker.v1 import (
    decode_pb2,
    decode_pb2_grpc,
    kv_pb2,
    kv_pb2_grpc,
    prefill_pb2,
    prefill_pb2_grpc,
    status_pb2,
    status_pb2_grpc,
)

BLOCK_TOKENS = 16
LAYOUT = kv_pb2.KvLayout(
    num_layers=2, num_kv_heads=2, head_dim=16, block_tokens=BLOCK_TOKENS, dtype=kv_pb2.KV_DTYPE_FLOAT32, tensor_parallel_size=1
)
# A letter of the byte-level vocabulary of random models.
TOKEN_ID = 3 + ord("a")
TOKENS = [prefill_pb2.SampledToken(token_id=TOKEN_ID)]


class Status(status_pb2_grpc.WorkerStatusServiceServicer):
    """Always ready, with room for everything."""

    def __init__(self, role: operations_pb2.WorkerRole, model_digest: str) -> None:
        self._state = status_pb2.WatchResponse(
            worker_id=str(uuid.uuid4()),
            role=role,
            ready=True,
            model_digest=model_digest,
            tokenizer_digest="none",
            layout=LAYOUT,
            device="none",
            weight_format="none",
            transports=["tcp"],
            max_requests=10_000,
            total_blocks=1_000_000,
            free_blocks=1_000_000,
            tokens_per_second=1e6,
        )

    async def Watch(
        self, request: status_pb2.WatchRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[status_pb2.WatchResponse]:
        while True:
            self._state.sequence_number += 1
            yield self._state
            await asyncio.sleep(0.5)


class Prefill(prefill_pb2_grpc.PrefillServiceServicer, kv_pb2_grpc.KvTransferServiceServicer):
    """Grants a ticket and has its first token at once."""

    async def Prefill(
        self, request: prefill_pb2.PrefillRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[prefill_pb2.PrefillResponse]:
        ticket = kv_pb2.KvTicket(
            ticket_id=uuid.uuid4().hex,
            epoch=request.attempt,
            producer_id="none",
            model_digest=request.model_digest,
            layout=LAYOUT,
            num_tokens=len(request.token_ids),
            block_ids=range(-(-len(request.token_ids) // BLOCK_TOKENS)),
            lease_ms=5000,
            address="none",
        )
        yield prefill_pb2.PrefillResponse(admitted=prefill_pb2.Admitted(ticket=ticket))
        yield prefill_pb2.PrefillResponse(first_token=prefill_pb2.FirstToken(token=TOKENS[0]))
        yield prefill_pb2.PrefillResponse(done=prefill_pb2.PrefillDone())

    async def Release(self, request: kv_pb2.ReleaseRequest, context: grpc.aio.ServicerContext) -> kv_pb2.ReleaseResponse:
        return kv_pb2.ReleaseResponse()


class Decode(decode_pb2_grpc.DecodeServiceServicer):
    """Gives every stream a token at each step."""

    def __init__(self, step_s: float, follow: bool) -> None:
        self._step_s = step_s
        self._follow = follow
        self._step = asyncio.Event()
        self._followers: dict[str, Mailbox[tuple[int, int, int]]] = {}

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._step_s)
            step, self._step = self._step, asyncio.Event()
            step.set()

    async def Decode(
        self, request: decode_pb2.DecodeRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[decode_pb2.DecodeResponse]:
        yield decode_pb2.DecodeResponse(reserved=decode_pb2.Reserved())
        yield decode_pb2.DecodeResponse(kv_ready=decode_pb2.KvReady(transport=generation_pb2.TRANSPORT_TCP))
        follower, max_tokens = self._followers.get(request.follower_id), request.stop_rule.max_tokens
        for index in range(len(request.token_ids) - request.num_prompt_tokens + 1, max_tokens):
            await self._step.wait()
            if follower is None:
                yield decode_pb2.DecodeResponse(delta=decode_pb2.TokenDelta(index=index, tokens=TOKENS))
            else:
                follower.put((request.stream_number, index, TOKEN_ID))
        finished = decode_pb2.DecodeFinished(reason=generation_pb2.FINISH_REASON_LENGTH, num_tokens=max_tokens)
        yield decode_pb2.DecodeResponse(finished=finished)

    async def Follow(
        self, request: decode_pb2.FollowRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[decode_pb2.FollowResponse]:
        if not self._follow:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "as told")
        mailbox = self._followers[request.follower_id] = Mailbox()
        yield decode_pb2.FollowResponse()
        while True:
            numbers, indexes, token_ids = zip(*await mailbox.take(), strict=True)
            plain = decode_pb2.PlainTokens(stream_numbers=numbers, indexes=indexes, token_ids=token_ids)
            yield decode_pb2.FollowResponse(plain_tokens=plain)


async def serve(model_digest: str, step_s: float, follow: bool) -> None:
    prefill, decode = Prefill(), Decode(step_s, follow)
    servers = [grpc.aio.server(options=server_options(10_000)) for _ in range(2)]
    prefill_pb2_grpc.add_PrefillServiceServicer_to_server(prefill, servers[0])
    kv_pb2_grpc.add_KvTransferServiceServicer_to_server(prefill, servers[0])
    decode_pb2_grpc.add_DecodeServiceServicer_to_server(decode, servers[1])
    roles = (operations_pb2.WORKER_ROLE_PREFILL, operations_pb2.WORKER_ROLE_DECODE)
    for server, role in zip(servers, roles, strict=True):
        status_pb2_grpc.add_WorkerStatusServiceServicer_to_server(Status(role, model_digest), server)
    print(*(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}" for server in servers), flush=True)
    for server in servers:
        await server.start()
    stepping = asyncio.create_task(decode.run())
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    stepping.cancel()
    for server in servers:
        await server.stop(None)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(serve(sys.argv[1], float(sys.argv[2]) / 1e3, sys.argv[3] == "1"))
