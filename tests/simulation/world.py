"""One simulated suite: the real gateway and workers, each in a process of its own, and the clients that call them."""

import asyncio
import traceback
from collections import Counter
from collections.abc import Callable, Sequence

from decode_svc.settings import DecodeSettings
from decode_svc.worker import DecodeWorker
from gateway.app import Gateway
from gateway.served_model import ServedModel
from gateway.settings import GatewayServerSettings, GatewaySettings
from gateway.tokenizer import byte_level_tokenizer
from llm.kv.pool import KvPool
from llm.runner import SequenceSlice
from llm.startup import LoadedModel
from prefill_svc.settings import PrefillSettings
from prefill_svc.worker import PrefillWorker
from tandem.models import ModelFiles
from tandem.server import ServerSettings
from tandem.worker_settings import TransferSettings
from tests.simulation.executor import SimulatedExecutor
from tests.simulation.loop import SimulatedLoop
from tests.simulation.model import BLOCK_TOKENS, CONTEXT_TOKENS, END_TOKEN, LAYOUT, VOCABULARY_SIZE, DeviceRunner, StampedRunner
from tests.simulation.network import Network
from tests.simulation.node import Node, WatchedAllocator
from tests.simulation.rpc import Rpc
from tests.simulation.scenario import POISON, Scenario
from tests.simulation.sockets import SocketLayer
from tests.simulation.until import until

FILES = ModelFiles("simulated", "random", None, "model-digest", "tokenizer-digest", {})
MODEL = ServedModel(
    name="simulated",
    digest=FILES.digest,
    tokenizer_digest=FILES.tokenizer_digest,
    context_tokens=CONTEXT_TOKENS,
    vocabulary_size=VOCABULARY_SIZE,
    end_token_ids=(END_TOKEN,),
    tokenizer=byte_level_tokenizer(),
    template=None,
)
PORT = 50051
GRACE_S = 2.0
MAX_DEADLINE_S = 20.0
STALL_LIMIT_S = 3.0
RESTART_S = (0.3, 2.0)
WORKERS_START_FIRST = 0.8


class World:
    """See the module. `nodes` holds who lives, by name; a supervisor starts again who has died."""

    def __init__(self, scenario: Scenario, loop: SimulatedLoop, note: Callable[[str], None]) -> None:
        self.scenario = scenario
        self.loop = loop
        self.note = note
        self.simulator = loop.current
        self.network = Network(loop)
        self.rpc = Rpc(self.network)
        self.sockets = SocketLayer(self.network)
        loop.world, loop.rpc, loop.sockets, loop.new_executor = self, self.rpc, self.sockets, SimulatedExecutor
        self.sockets.mangle = self._mangle
        self.nodes: dict[str, Node] = {}
        self.deaths: Counter[str] = Counter()
        self.injected: Counter[str] = Counter()
        self.poison_deaths = 0
        self.corruptions_due = 0
        self.freezes_due: dict[str, float] = {}
        """Seconds for which the worker of that name will be frozen as soon as it reads another's memory."""
        self._restarts: set[str] = set()
        self._pools: list[KvPool] = []

    async def start(self) -> None:
        """Returns once the gateway knows all workers, which seldom start as late as it does."""
        async with asyncio.timeout(20):
            for name in self.scenario.workers:
                self.start_process(name)
            if self.loop.random.random() < WORKERS_START_FIRST:
                await until(lambda: all(node.ready for node in self.nodes.values()))
            self.start_process("gateway")
            await until(lambda: self.all_ready)

    @property
    def gateway(self) -> Gateway | None:
        node = self.nodes.get("gateway")
        return None if node is None else node.service

    @property
    def all_ready(self) -> bool:
        gateway = self.gateway
        if gateway is None or len(self.nodes) != len(self.scenario.workers) + 1:
            return False
        if any(node.leaving for node in self.nodes.values()):
            return False
        known = {worker.worker_id for worker in gateway.directory.workers if worker.ready}
        return known == {node.worker_id for node in self.nodes.values() if node.worker is not None}

    def start_process(self, name: str) -> None:
        self._restarts.discard(name)
        process = self.loop.process(name)
        node = self.nodes[name] = Node(process)
        process.on_death.append(lambda: self._died(node))
        process.spawn(self._main(name, node))

    def kill(self, name: str) -> None:
        """As SIGKILL. The supervisor starts another in a while."""
        node = self.nodes.get(name)
        if node is not None:
            node.process.kill()

    def freeze(self, name: str, frozen: bool) -> None:
        """As SIGSTOP and SIGCONT."""
        node = self.nodes.get(name)
        if node is not None and node.process.frozen != frozen:
            node.process.frozen = frozen
            self.network.impaired()

    def freeze_for(self, name: str, seconds: float) -> None:
        """The very process; another in its place goes on."""
        self.freeze(name, True)
        self.loop.deliver(self.simulator, self.loop.time() + seconds, self._thaw, name, self.nodes.get(name))

    def step_clock(self, name: str, seconds: float) -> None:
        """The wall clock of a process's host is set."""
        node = self.nodes.get(name)
        if node is not None:
            node.process.wall_offset_s += seconds

    def drain(self, name: str) -> None:
        """As SIGTERM."""
        node = self.nodes.get(name)
        if node is not None and node.service is not None:
            stop = node.service.server.stop if name == "gateway" else node.service.stop
            node.process.run(stop)

    def close(self) -> None:
        """Ends every process and gives all memory back."""
        for process in list(self.loop.processes):
            if process is not self.simulator:
                process.on_death.clear()
                process.kill()
        for pool in self._pools:
            pool.close()

    def violated(self, text: str) -> None:
        self.loop.violations.append(text)
        self.note(f"VIOLATION {text}")

    def _thaw(self, name: str, node: Node | None) -> None:
        if self.nodes.get(name) is node:
            self.freeze(name, False)

    async def _main(self, name: str, node: Node) -> None:
        """A process from its start to its end, whatever ends it."""
        try:
            node.service = self._gateway() if name == "gateway" else self._worker(name, node)
            await node.service.start()
            node.ready = True
            await node.service.run_until_stopped()
            self.note(f"{name} ended in order")
        except Exception as error:
            self.note(f"{name} ended: {error!r}")
            if node.process.alive and not (self.poison_deaths and str(error) == "poison"):
                self.loop.violations.append(f"I6: {name} ended with {''.join(traceback.format_exception(error)[-2:])}")
        finally:
            self.loop.deliver(self.simulator, self.loop.time(), node.process.kill)

    def _died(self, node: Node) -> None:
        name = node.process.name
        self.deaths[name] += 1
        self.note(f"{name} is dead")
        if self.nodes.get(name) is node:
            del self.nodes[name]
        node.process.frozen = False
        self.network.died(node.process)
        if node.process in self.loop.processes:
            self.loop.processes.remove(node.process)
        if node.runner is not None:
            node.runner.close()
        if node.pool is not None:
            node.pool.close()
        if name not in self._restarts:
            self._restarts.add(name)
            delay_s = self.loop.random.uniform(*RESTART_S)
            self.loop.deliver(self.simulator, self.loop.time() + delay_s, self.start_process, name)

    def _gateway(self) -> Gateway:
        scenario = self.scenario
        settings = GatewaySettings(
            model="simulated",
            prefill_targets=tuple(f"{name}:{PORT}" for name in scenario.prefills),
            decode_targets=tuple(f"{name}:{PORT}" for name in scenario.decodes),
            max_running=scenario.max_running,
            max_queued=scenario.max_queued,
            max_deadline_s=MAX_DEADLINE_S,
            stall_limit_s=STALL_LIMIT_S,
            server=GatewayServerSettings(host="gateway", port=PORT, grace_s=GRACE_S, reflection=False),
        )
        return Gateway(MODEL, settings)

    def _worker(self, name: str, node: Node) -> PrefillWorker | DecodeWorker:
        scenario, prefills = self.scenario, name in self.scenario.prefills
        num_blocks = scenario.prefill_blocks if prefills else scenario.decode_blocks
        node.pool = pool = KvPool.create(LAYOUT, num_blocks)
        self._pools.append(pool)
        prefix_cache = prefills and scenario.prefix_cache
        node.allocator = WatchedAllocator(num_blocks, BLOCK_TOKENS, prefix_cache, pool.generations.bump)
        runner = DeviceRunner if scenario.device else StampedRunner
        node.runner = runner(pool, node.process, self._step_s, lambda slices: self._harm(node, slices))
        loaded = LoadedModel(node.runner, pool, node.allocator, LAYOUT)  # type: ignore[arg-type]
        server = ServerSettings(host=name, port=PORT, grace_s=GRACE_S, reflection=False)
        transfer = TransferSettings(transports=scenario.transports, lease_s=scenario.lease_s, kv_host=name)
        if prefills:
            settings = PrefillSettings(
                token_budget=scenario.token_budget, max_prompts=scenario.max_prompts, transfer=transfer, server=server
            )
            node.worker = PrefillWorker(settings, FILES, loaded)
        else:
            node.worker = DecodeWorker(
                DecodeSettings(
                    max_batch=scenario.max_batch, max_sequences=scenario.max_sequences, transfer=transfer, server=server
                ),
                FILES,
                loaded,
            )
        return node.worker

    def reads(self) -> None:
        """The current process is in the middle of a copy out of another's memory."""
        name = self.loop.current.name
        if name in self.freezes_due and self.nodes[name].process is self.loop.current:
            self.freeze_for(name, self.freezes_due.pop(name))
            self.note(f"{name} is frozen as it reads")

    def damage(self, block: memoryview) -> None:
        """Turns a bit of a block that is being copied, if one is due."""
        if self.corruptions_due > 0:
            self.corruptions_due -= 1
            block[self.loop.random.randrange(len(block))] ^= 1 << self.loop.random.randrange(8)

    def _mangle(self, port: int, data: bytes) -> bytes:
        """Turns a bit of what a socket sends."""
        if self.corruptions_due == 0 or self.loop.random.random() < 0.7:
            return data
        mangled = bytearray(data)
        self.damage(memoryview(mangled))
        return bytes(mangled)

    def _step_s(self, slices: Sequence[SequenceSlice]) -> float:
        num_tokens = sum(len(piece.token_ids) for piece in slices)
        return self.scenario.step_s * self.loop.random.uniform(0.5, 1.5) * (1 + num_tokens / 32)

    def _harm(self, node: Node, slices: Sequence[SequenceSlice]) -> None:
        """What a poisonous prompt does to the worker that computes it: its engine fails, or its process dies on the spot."""
        if not any(POISON in piece.token_ids for piece in slices):
            return
        self.poison_deaths += 1
        self.injected["poison"] += 1
        if self.loop.random.random() < 0.5:
            self.note(f"poison kills {node.process}")
            self.loop.deliver(self.simulator, self.loop.time(), node.process.kill)
        raise RuntimeError("poison")
