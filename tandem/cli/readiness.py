"""Waits until a process serves."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.channels import open_channel
from tandem.cli.plan import Member

_POLL_S = 0.1
_CALL_S = 2.0


async def wait_serving(member: Member) -> None:
    """Return when the member's service is SERVING. Never gives up: whoever waits watches the process too."""
    while True:
        await _wait_listening(member.address)
        if await _serves_soon(member):
            return
        await asyncio.sleep(_POLL_S)


async def _wait_listening(address: str) -> None:
    """Plain connects, since gRPC's own attempts are seconds apart after the first."""
    host, _, port = address.rpartition(":")
    while True:
        try:
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        except OSError:
            await asyncio.sleep(_POLL_S)
        else:
            writer.close()
            return


async def _serves_soon(member: Member) -> bool:
    """Ask on one channel until it serves (True) or the connection fails (False)."""
    channel = open_channel(member.address)
    try:
        # Polled, not watched: a watch that a dying process leaves open would hang.
        while not await _serves(channel, member.service):  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)
    except grpc.aio.AioRpcError:
        return False
    finally:
        await channel.close()
    return True


async def _serves(channel: grpc.aio.Channel, service: str) -> bool:
    request = health_pb2.HealthCheckRequest(service=service)
    response = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=_CALL_S)
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)
