"""The live view of the workers: one WorkerStatusService.Watch stream per address."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import grpc

from gateway.calls import cancel_and_wait, end, read
from gateway.losses import SUDDEN_S, Losses
from gateway.routing import Condition, Role, Worker
from gateway.silence import Silence
from gateway.targets import Target, look_up, turns_away
from gateway.wire import worker_from
from tandem.api.v1 import operations_pb2
from tandem.channels import open_internal_channel
from tandem.errors import Reason, TandemError
from tandem.worker.v1 import status_pb2, status_pb2_grpc

logger = logging.getLogger(__name__)

# A message of decode holds at most one step's tokens; one of prefill may hold the log-probabilities of a long prompt.
MAX_RECEIVE_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class WatchTimes:
    """Seconds: between look-ups of names, from the first to the longest pause before connecting again, and until a silent worker
    counts as lost. It speaks at least every half second, and is to be missed within two seconds of its last word."""

    look_up_s: float = 2.0
    first_pause_s: float = 0.1
    longest_pause_s: float = 0.25
    silence_s: float = 1.8


@dataclass
class _Watched:
    """One address: its channel, the last that was heard from it, and the task that listens."""

    worker: Worker
    channel: grpc.aio.Channel
    task: "asyncio.Task[None] | None" = None
    sequence_number: int = 0
    heard_at: float = 0.0
    lost_id: str = ""
    """The worker that was lost here last."""
    named_by: set[Target] = field(default_factory=set)
    holders: list[Callable[[], object]] = field(default_factory=list)
    handoff: operations_pb2.HandoffCounts | None = None
    """What it said last of its hand-offs; passed on to operators as it is."""


class WorkerDirectory:
    """Knows every worker behind the targets. Used on the event loop; `start` and `close` once.

    `changed` is called after each word of a worker with its address, `lost` with what was last known of a worker that has gone.
    """

    def __init__(
        self,
        targets: Sequence[tuple[Role, Target]],
        changed: Callable[[str], None],
        *,
        lost: Callable[[Worker], None] = lambda worker: None,
        times: WatchTimes = WatchTimes(),
        open_channel: Callable[[str], grpc.aio.Channel] | None = None,
        resolve: Callable[[Target], Awaitable[Sequence[str]]] = look_up,
    ) -> None:
        self._targets = targets
        self._changed = changed
        self._lost = lost
        self._times = times
        self._open_channel = open_channel or (lambda address: open_internal_channel(address, max_receive_bytes=MAX_RECEIVE_BYTES))
        self._resolve = resolve
        self.losses = Losses()
        self._watched: dict[str, _Watched] = {}
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def workers(self) -> Sequence[Worker]:
        """Every known worker, by role and address."""
        return [watched.worker for watched in self._watched.values()]

    def channel(self, address: str) -> grpc.aio.Channel:
        """The channel to a known worker. KeyError if it has gone from the targets."""
        return self._watched[address].channel

    @contextmanager
    def while_known(self, worker: Worker, on_loss: Callable[[], object]) -> Iterator[None]:
        """Calls `on_loss` should this very worker be lost meanwhile. WORKER_LOST if it is already."""
        watched = self._watched.get(worker.address)
        if watched is None or watched.worker.worker_id != worker.worker_id:
            raise TandemError(Reason.WORKER_LOST, f"worker {worker.address} is lost")
        watched.holders.append(on_loss)
        try:
            yield
        finally:
            if on_loss in watched.holders:
                watched.holders.remove(on_loss)

    def doubt(self, worker: Worker) -> None:
        """Until it speaks again this worker is not ready."""
        watched = self._watched.get(worker.address)
        if watched is not None and watched.worker.worker_id == worker.worker_id:
            watched.worker = replace(watched.worker, ready=False)
            self._changed(worker.address)

    def handoff(self, address: str) -> operations_pb2.HandoffCounts | None:
        """What a worker said last of its hand-offs."""
        return self._watched[address].handoff

    def start(self) -> None:
        for role, target in self._targets:
            if target.by_name:
                self._tasks.append(asyncio.create_task(self._follow_name(role, target)))
            else:
                self._add(role, target.address, target)

    async def close(self) -> None:
        await cancel_and_wait(*self._tasks)
        for address in list(self._watched):
            await self._remove(address)

    async def _follow_name(self, role: Role, target: Target) -> None:
        while True:
            await self._update(role, target, set(await self._resolve(target)))
            await asyncio.sleep(self._times.look_up_s)

    async def _update(self, role: Role, target: Target, present: set[str]) -> None:
        """An address that a name no longer gives is dropped once its worker cannot be reached: running requests use its channel."""
        for address in present:
            self._add(role, address, target)
        for address, watched in list(self._watched.items()):
            if target in watched.named_by and address not in present and not watched.worker.worker_id:
                watched.named_by.discard(target)
                if not watched.named_by:
                    await self._remove(address)

    def _add(self, role: Role, address: str, target: Target) -> None:
        if address not in self._watched:
            watched = _Watched(Worker(address, role), self._open_channel(address))
            found = [*self._watched.values(), watched]
            found.sort(key=lambda each: (each.worker.role is Role.DECODE, each.worker.address))
            self._watched = {each.worker.address: each for each in found}
            watched.task = asyncio.create_task(self._watch(watched))
        self._watched[address].named_by.add(target)

    async def _remove(self, address: str) -> None:
        watched = self._watched.pop(address)
        if watched.task is not None:
            await cancel_and_wait(watched.task)
        _let_go(watched)
        await watched.channel.close()
        self._changed(address)

    async def _watch(self, watched: _Watched) -> None:
        pause_s = self._times.first_pause_s
        while True:
            if await self._listen(watched):
                pause_s = self._times.first_pause_s
            if self.losses.open(watched.lost_id) and await turns_away(watched.worker.address):
                self.losses.ended(watched.lost_id)
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(pause_s * 2, self._times.longest_pause_s)

    async def _listen(self, watched: _Watched) -> bool:
        """Follows a worker until it is lost; says whether anything was heard."""
        call = status_pb2_grpc.WorkerStatusServiceStub(watched.channel).Watch(status_pb2.WatchRequest())  # type: ignore[no-untyped-call]
        heard = False
        watched.sequence_number = 0
        silence = Silence(self._times.silence_s, call.cancel)
        try:
            while (response := await read(call)) is not None:
                heard = True
                silence.heard()
                self._take(watched, response)
            reason = "it ended the stream"
        except TandemError as error:
            reason = f"silent for {self._times.silence_s} s" if silence.too_long else error.message
        finally:
            silence.close()
            await end(call)
        self._lose(watched, reason, suddenly=not silence.too_long)
        return heard

    def _take(self, watched: _Watched, response: status_pb2.WatchResponse) -> None:
        if response.sequence_number <= watched.sequence_number:
            return
        if not watched.worker.worker_id:
            logger.info("%s worker at %s is here", watched.worker.role.value, watched.worker.address)
        if watched.worker.worker_id not in ("", response.worker_id):
            self._lose(watched, "another worker has taken its place")
        if watched.lost_id != response.worker_id:
            self.losses.ended(watched.lost_id)
        self.losses.heard(response.worker_id)
        watched.heard_at = asyncio.get_running_loop().time()
        watched.sequence_number = response.sequence_number
        watched.handoff = response.handoff
        watched.worker = worker_from(watched.worker, response)
        if watched.worker.condition is Condition.STALLED and self._has_another(watched.worker):
            _let_go(watched)
        self._changed(watched.worker.address)

    def _has_another(self, worker: Worker) -> bool:
        """Whether others can do its work: what a stalled worker holds may still end well, but not soon."""
        return any(other.ready and other.role is worker.role for other in self.workers)

    def _lose(self, watched: _Watched, reason: str, *, suddenly: bool = True) -> None:
        worker = watched.worker
        watched.worker = replace(worker, worker_id="", ready=False)
        if worker.worker_id:
            logger.warning("%s worker at %s is lost: %s", worker.role.value, worker.address, reason)
            since_s = asyncio.get_running_loop().time() - watched.heard_at
            serving = worker.condition not in (Condition.STALLED, Condition.DRAINING)
            watched.lost_id = worker.worker_id
            self.losses.lost(worker.worker_id, suddenly=suddenly and serving and since_s < SUDDEN_S)
            self._lost(worker)
        _let_go(watched)
        self._changed(worker.address)


def _let_go(watched: _Watched) -> None:
    """Tells whoever holds something at a lost worker."""
    holders, watched.holders = watched.holders, []
    for on_loss in holders:
        on_loss()
