"""Puts a prefill worker together and serves until told to stop."""

import asyncio
import logging
import uuid
from collections.abc import Callable
from dataclasses import replace

from kvtransfer.producer import KvProducer, ProducerIdentity
from kvtransfer.service import add_transfer_service
from kvtransfer.wire import layout_to_proto, tickets_to_proto
from llm.device import choose_device
from llm.errors import DeviceError, UnsupportedModelError, WeightsError
from llm.kv.device_memory import DeviceMemoryError
from llm.runner import RunnerSettings
from llm.startup import LoadedModel, load_model
from prefill_svc.batcher import BatcherLimits, PrefillBatcher
from prefill_svc.engine import PrefillEngine
from prefill_svc.kernels.choice import gpu_settings
from prefill_svc.service import PrefillServicer
from prefill_svc.settings import PrefillSettings
from tandem.addresses import advertised_host, free_port, target
from tandem.api.v1 import operations_pb2
from tandem.compute import num_threads
from tandem.cores import num_usable_cores
from tandem.engine_thread import Courier, run_and_end_thread
from tandem.logs import LoadLog
from tandem.models import ModelError, ModelFiles, loading_failure, resolve_model, writable_cache_directory
from tandem.pauses import avoid_pauses
from tandem.progress import ProgressWatch, Work
from tandem.server import Server, StartError
from tandem.status import StatusServicer, WorkerIdentity, WorkerSnapshot, condition
from tandem.watchdog import leave_wedged, loop_guarded
from tandem.worker.v1 import prefill_pb2_grpc, status_pb2_grpc
from tandem.worker_requests import ModelLimits

logger = logging.getLogger(__name__)


async def serve(settings: PrefillSettings) -> None:
    """Loads the model, then serves; returns after an ordered shutdown, raises if the engine failed."""
    files, loaded = await run_and_end_thread(lambda: load(settings))
    port = settings.server.port or free_port(settings.server.host)
    worker = PrefillWorker(replace(settings, server=replace(settings.server, port=port)), files, loaded, leave_wedged)
    avoid_pauses()
    await worker.start()
    async with loop_guarded(settings.watchdog.stalled_limit_s):
        await worker.run_until_stopped()


def load(settings: PrefillSettings) -> tuple[ModelFiles, LoadedModel]:
    """The model's files and the model in memory. Blocks; StartError if it cannot be had."""
    weights = settings.weights
    try:
        device = choose_device(weights.device)
        runner_settings = RunnerSettings(
            role="prefill",
            cache_directory=writable_cache_directory(),
            device=device,
            dtype=weights.dtype,
            weights=weights.weights,
            kv_dtype=settings.kv.kv_dtype,
            threads=num_threads(weights),
            cores=num_usable_cores(),
            gpu=gpu_settings(device, settings.max_prompts),
        )
        files = resolve_model(settings.model)
        return files, load_model(files, runner_settings, settings.kv, LoadLog(logger))
    except (ModelError, DeviceError, DeviceMemoryError, UnsupportedModelError, WeightsError) as error:
        raise StartError(str(error)) from error
    except OSError as error:
        raise StartError(loading_failure(error)) from error


class PrefillWorker:
    """The engine, the ticket producer and the gRPC server of one process."""

    def __init__(
        self,
        settings: PrefillSettings,
        files: ModelFiles,
        loaded: LoadedModel,
        leave: Callable[[str], object] = lambda why: None,
    ) -> None:
        self._leave = leave
        self._settings = settings
        self._loaded = loaded
        self._failure: Exception | None = None
        self._loop = asyncio.get_running_loop()
        self._server = Server("prefill", settings.server)
        token_budget = settings.token_budget or loaded.step_tokens
        limits = BatcherLimits(token_budget, settings.max_prompts, settings.max_queued_tokens)
        batcher = PrefillBatcher(loaded.allocator, limits)
        courier = Courier(self._loop)
        self._engine = PrefillEngine(
            loaded.runner, loaded.allocator, batcher, courier, on_failure=self._fail, on_change=self._changed
        )
        self._producer = self._make_producer(files)
        config = loaded.runner.config
        model_limits = ModelLimits(config.vocab_size, config.context_tokens)
        self._prefill = PrefillServicer(self._engine, self._producer, files.digest, model_limits)
        self._status = StatusServicer(self._identity(files), self._snapshot)
        self._progress = ProgressWatch(self._works, self._judged, self._wedged, settings.watchdog.wedged_s)
        loaded.runner.report_layers(self._engine.thread.beat)
        self._add_services()

    async def start(self) -> str:
        """Serves; returns host:port."""
        await self._producer.start()
        self._engine.start()
        port = await self._server.start()
        self._server.set_ready(True)
        self._progress.start()
        address = target(self._settings.server.host, port)
        logger.info("serving on %s, %s", address, self._loaded.runner.device_description)
        return address

    async def run_until_stopped(self) -> None:
        """Returns after an ordered shutdown; raises what broke the engine."""
        await self._server.run_until_stopped(self._drain, self._close)
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Begins the shutdown."""
        self._server.stop()

    def _make_producer(self, files: ModelFiles) -> KvProducer:
        transfer, server = self._settings.transfer, self._settings.server
        host = advertised_host(server.host, transfer.advertised_host)
        identity = ProducerIdentity(uuid.uuid4().hex, files.digest, files.tokenizer_digest, target(host, server.port))
        return KvProducer(
            self._loaded.pool,
            identity,
            lease_s=transfer.lease_s,
            free=self._engine.free,
            transports=transfer.transports,
            kv_host=transfer.kv_host,
            kv_advertised_host=advertised_host(transfer.kv_host, transfer.advertised_host),
        )

    def _add_services(self) -> None:
        server = self._server
        server.add(prefill_pb2_grpc.add_PrefillServiceServicer_to_server, self._prefill, "tandem.worker.v1.PrefillService")
        add_transfer_service(server, self._producer)
        server.add(status_pb2_grpc.add_WorkerStatusServiceServicer_to_server, self._status, "tandem.worker.v1.WorkerStatusService")

    def _identity(self, files: ModelFiles) -> WorkerIdentity:
        return WorkerIdentity(
            worker_id=self._producer.identity.producer_id,
            role=operations_pb2.WORKER_ROLE_PREFILL,
            model_digest=files.digest,
            tokenizer_digest=files.tokenizer_digest,
            layout=layout_to_proto(self._loaded.layout),
            device=self._loaded.runner.device_description,
            weight_format=self._loaded.runner.weight_format,
            weight_format_reason=self._loaded.runner.weight_format_reason,
            transports=self._producer.transports,
        )

    def _snapshot(self) -> WorkerSnapshot:
        load = self._engine.load()
        return WorkerSnapshot(
            role=operations_pb2.WORKER_ROLE_PREFILL,
            condition=condition(self._server),
            queued_requests=load.num_waiting,
            queued_tokens=load.num_queued_tokens,
            running_requests=load.num_running,
            max_requests=self._settings.max_prompts,
            total_blocks=self._loaded.allocator.num_blocks,
            free_blocks=load.num_free_blocks,
            tokens_per_second=load.tokens_per_second,
            requests=self._server.counts_of("/tandem.worker.v1.PrefillService/Prefill"),
            handoff=tickets_to_proto(self._producer.counters()),
        )

    async def _drain(self) -> None:
        """Refuses new prompts; waits until all present ones are computed, which grants the last tickets, and until decode workers
        have pulled what is granted; the server bounds it by the grace."""
        self._prefill.draining = True
        self._status.changed()
        await self._prefill.wait_idle()
        await self._producer.wait_idle()

    async def _close(self) -> None:
        await self._progress.close()
        await self._producer.close()
        if await asyncio.to_thread(self._engine.stop):
            self._loaded.pool.close()  # else a step still computes there, and the memory ends with the process

    def _works(self) -> dict[str, Work]:
        load = self._engine.load()
        held_up = load.num_waiting > 0 and load.num_running == 0
        # Tickets keep blocks from others, each for one lease after its consumer's last word.
        num_moves = load.num_admitted + self._producer.num_moves
        admission = Work(held_up, num_moves, excused_s=self._settings.transfer.lease_s + 1.0)
        return {"engine": self._engine.thread.work(), "admission": admission, "hand-off": self._producer.work()}

    def _wedged(self, why: str) -> None:
        """One that is leaving anyway has its grace."""
        if not self._server.stopping:
            self._leave(why)

    def _judged(self, healthy: bool) -> None:
        self._server.set_ready(healthy)
        self._status.changed()

    def _changed(self) -> None:
        self._status.changed()

    def _fail(self, error: Exception) -> None:
        """On the engine thread. The process ends, and whoever supervises it starts a new one."""
        self._failure = error
        self._loop.call_soon_threadsafe(self._server.stop)
