"""The gateway as a whole: what it is made of, and when it is ready."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import asdict

from gateway.admission import Admission
from gateway.capacity import Capacity, capacity_of
from gateway.ejection import Ejector
from gateway.fleet import Fleet
from gateway.links import Links
from gateway.model_service import ModelServicer, TokenizerServicer
from gateway.operations_service import GatewayCounts, OperationsServicer
from gateway.quarantine import Quarantine
from gateway.relay import Relay
from gateway.routing import PlacementLedger, RequestCounts, Role, usable
from gateway.served_model import ServedModel, load_served_model
from gateway.service import GenerationServicer
from gateway.settings import GatewaySettings
from gateway.workers import WorkerDirectory
from tandem.api.v1 import (
    generation_pb2_grpc,
    model_pb2_grpc,
    operations_pb2_grpc,
    tokenizer_pb2_grpc,
)
from tandem.models import ModelError, cache_directory, resolve_model
from tandem.pauses import avoid_pauses
from tandem.server import Server, StartError

logger = logging.getLogger(__name__)

GENERATE = "/tandem.api.v1.GenerationService/Generate"


class Gateway:
    """The gateway of one model. Made, started and closed on the event loop. `clock` gives monotonic seconds."""

    def __init__(self, model: ServedModel, settings: GatewaySettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._model = model
        self._ledger = PlacementLedger()
        self._admission = Admission(settings.admission, clock, self._capacity)
        self._ejector = Ejector(clock)
        self._quarantine = Quarantine(clock)
        self.directory = WorkerDirectory(settings.targets, self._on_worker, lost=self._ejector.lost)
        self._fleet = Fleet(self.directory, self._ledger, self._ejector, Links(clock))
        self._relay = Relay(self._fleet, self._quarantine, settings.patience, clock)
        self._generation = GenerationServicer(model, self._admission, self._relay, settings.requests, clock)
        self.server = Server("gateway", settings.server)
        self._add_services()

    async def start(self) -> int:
        """Listens and looks for workers; returns the port. Ready as soon as there are both kinds of worker."""
        port = await self.server.start()
        self.directory.start()
        return port

    @property
    def num_running(self) -> int:
        """Requests that run or wait."""
        return self._admission.num_running + self._admission.num_queued

    @property
    def draining(self) -> bool:
        return self._generation.draining

    def counts(self) -> GatewayCounts:
        """How requests have ended, and what lost workers have led to."""
        return GatewayCounts(
            requests=RequestCounts(**asdict(self.server.counts_of(GENERATE))),
            num_retries=self._relay.counts.num_retries,
            num_migrations=self._relay.counts.num_migrations,
            num_quarantined=self._quarantine.num_added,
            num_ejections=self._ejector.num_ejections,
        )

    async def stop(self) -> None:
        """Ends a gateway that was started but does not wait for signals."""
        self.server.stop()
        await self.run_until_stopped()

    async def run_until_stopped(self) -> None:
        """Serves until told to stop, then ends in order."""
        await self.server.run_until_stopped(self.drain, self.close)

    async def drain(self) -> None:
        """Refuses new requests and waits for the present ones."""
        self._generation.draining = True
        await self._admission.wait_idle()

    async def close(self) -> None:
        """After the server has stopped: requests that it cancelled end their legs first."""
        await self._admission.wait_idle()
        await self._fleet.close()
        await self.directory.close()

    def _add_services(self) -> None:
        package = "tandem.api.v1"
        operations = OperationsServicer(self._admission, self.directory, self.counts)
        add = self.server.add
        add(generation_pb2_grpc.add_GenerationServiceServicer_to_server, self._generation, f"{package}.GenerationService")
        add(
            tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server, TokenizerServicer(self._model), f"{package}.TokenizerService"
        )
        add(model_pb2_grpc.add_ModelServiceServicer_to_server, ModelServicer(self._model), f"{package}.ModelService")
        add(operations_pb2_grpc.add_OperationsServiceServicer_to_server, operations, f"{package}.OperationsService")

    def _capacity(self) -> Capacity | None:
        return capacity_of(self.directory.workers, self._model.digest)

    def _on_worker(self, address: str) -> None:
        self._ledger.heard(address)
        self._admission.capacity_changed()
        self._fleet.follow(address)
        ready = not self.draining and all(
            usable(self.directory.workers, role, self._model.digest) for role in (Role.PREFILL, Role.DECODE)
        )
        if ready != self.server.ready:
            logger.info("gateway is %s", "ready" if ready else "not ready")
            self.server.set_ready(ready)


async def serve(settings: GatewaySettings) -> None:
    """Loads the model's tokenizer and serves until told to stop. StartError if the model cannot be had."""
    try:
        model = await asyncio.to_thread(_load, settings.model)
    except ModelError as error:
        raise StartError(str(error)) from error
    gateway = Gateway(model, settings)
    avoid_pauses()
    port = await gateway.start()
    logger.info("gateway for %s listens on %s:%d", model.name, settings.server.host, port)
    await gateway.run_until_stopped()


def _load(name: str) -> ServedModel:
    return load_served_model(resolve_model(name), cache_directory())
