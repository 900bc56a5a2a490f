"""grpc.health.v1. Own servicer: the library's forgets all watchers of a service when one of them leaves."""

import asyncio
from collections.abc import AsyncIterator

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.errors import Reason, TandemError

SERVICE_NAME: str = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Says per name whether it serves; the name "" is the process itself. Used on the event loop only."""

    def __init__(self) -> None:
        self._serving: dict[str, bool] = {"": True}
        self._changed = asyncio.Event()

    def set(self, service: str, serving: bool) -> None:
        """Takes effect at once, and wakes every watcher."""
        self._serving[service] = serving
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        """NOT_FOUND if nothing of that name is served here."""
        if request.service not in self._serving:
            raise TandemError(Reason.UNKNOWN_SERVICE, f"no service {request.service!r} here")
        return self._response(request.service)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The present status, then each new one; a status that changed twice in between is sent once."""
        last = None
        while True:
            changed, response = self._changed, self._response(request.service)
            if response != last:
                yield response
            last = response
            await changed.wait()

    def _response(self, service: str) -> health_pb2.HealthCheckResponse:
        statuses = {True: "SERVING", False: "NOT_SERVING", None: "SERVICE_UNKNOWN"}
        return health_pb2.HealthCheckResponse(status=statuses[self._serving.get(service)])
