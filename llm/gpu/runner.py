"""The model on a GPU, behind the interface of llm.runner.ModelRunner, and decode steps that leave their tokens on the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from llm.batch import Integers, Ints, SequenceSlice, build_batch
from llm.config import ModelConfig, load_model_config
from llm.errors import UnsupportedModelError
from llm.gpu import quiet_calls
from llm.gpu.decode_batch import decode_arrays, is_decode
from llm.gpu.device_batch import DeviceBatch, host_arrays, make_device_batch, upload
from llm.gpu.draw_graphs import DrawGraphs
from llm.gpu.few_rows import FewRowsModel
from llm.gpu.step import DrawnStep, StepMemories, StepMemory, draw_rows
from llm.gpu.step_graphs import Fitted, GraphInputs, GraphSize, StepGraphs, bucket_sizes, decode_size, prompt_size, prompt_sizes
from llm.kv.copying import Event
from llm.model import Model
from llm.ops.gpu.argmax import Argmax
from llm.ops.gpu.operations import GpuOperations
from llm.ops.gpu.skinny_linear import MAX_ROWS
from llm.runner import ModelRunner, Pool, RunnerSettings
from llm.sampling import SampleRow
from llm.sampling_params import SamplingParams
from llm.weights import DTYPES, ModelFiles, Progress, WeightRequest, load_tensors


class GpuModelRunner(ModelRunner):
    """One model on one GPU. Not thread-safe: one engine thread owns it, and all its work is on one stream."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, torch.Tensor], settings: RunnerSettings) -> None:
        gpu = settings.gpu
        assert gpu is not None, "the service gives its attention kernel"
        operations = GpuOperations(gpu.attention)
        self.config = config
        self.weight_format, self.weight_format_reason = settings.format_and_reason
        self.kv_dtype = settings.told_kv_dtype
        self.device = torch.device(settings.device)
        self._stream = _make_stream(self.device)
        self._gpu = gpu
        self._model: Model = Model(config, tensors, operations)
        self._few_rows = FewRowsModel(config, tensors, operations)
        max_rows = max(gpu.max_batch, gpu.max_rows)
        self._argmax = Argmax(max_rows, config.vocab_size, self.device)
        self._drawn = torch.zeros(max_rows, dtype=torch.int32, device=self.device)
        self._memories = StepMemories(self._drawn)
        self._forwarded: deque[DrawnStep] = deque()
        self._graphs: StepGraphs | None = None
        self._pool: torch.Tensor | None = None

    @classmethod
    def load(cls, files: ModelFiles, settings: RunnerSettings, progress: Progress | None = None) -> GpuModelRunner:
        """Loads, and converts at the first start. Raises UnsupportedModelError, WeightsError."""
        if torch.device(settings.device).type == "cuda":
            torch.cuda.set_device(settings.device)
        report = progress or (lambda fraction, text: None)
        config = load_model_config(files.format, files.path, files.random_config)
        format, _ = settings.format_and_reason
        if format not in DTYPES:
            raise UnsupportedModelError(f"--weights {format}: a GPU computes with {' and '.join(DTYPES)}")
        if settings.told_kv_dtype != replace(settings, kv_dtype="auto").told_kv_dtype:
            raise UnsupportedModelError(f"--kv-dtype {settings.kv_dtype}: on a GPU KV is kept as --dtype says; take auto")
        tensors = load_tensors(WeightRequest(files, config, format, settings.device, settings.cache_directory), report)
        return cls(config, tensors, settings)

    @property
    def max_batch(self) -> int:
        """Sequences of the largest decode step; 0 for a runner that prefills."""
        return self._gpu.max_batch

    @property
    def num_graphs(self) -> int:
        """Captured steps."""
        return 0 if self._graphs is None else self._graphs.num_captured

    def adopt_thread(self) -> None:
        if self._stream is not None:
            torch.cuda.set_device(self.device)
            torch.cuda.synchronize()  # whatever another thread launched, on whatever stream, is complete
            torch.cuda.set_stream(self._stream)

    @property
    def device_description(self) -> str:
        """For people: "cuda:0 (NVIDIA H200)"."""
        if self.device.type != "cuda":
            return f"{self.device} (interpreted kernels)"
        return f"{self.device} ({torch.cuda.get_device_name(self.device)})"

    def attach(self, pool: Pool) -> None:
        """Sets the KV pool that the following calls write to and read from. Graphs captured over another are dropped."""
        self._pool, self._graphs = pool.tensor, None
        self._memories.clear()
        self._forwarded.clear()

    def detach(self) -> None:
        """Lets go of the pool and the graphs captured over it."""
        self._pool = self._graphs = None

    @torch.inference_mode()
    def forward(self, slices: Sequence[SequenceSlice]) -> torch.Tensor:
        """Computes the slices' tokens and writes their K and V into the pool.

        Returns float32 logits [rows, vocab] on the device: the rows that the slices ask for, in order of slices and positions;
        valid until the next call.
        """
        captured = self._captured(slices, None)
        if captured is None:
            return self._compute(slices, None, lambda: None)
        if len(self._forwarded) > 1:
            self._forwarded.popleft().token_ids()  # its inputs have been read, so that their memory is free
        memory = self._memories.take()
        logits = self._replay(captured, memory)
        self._forwarded.append(memory.fetch(0))
        return logits[: sum(item.logits == "last" for item in slices)]

    @torch.inference_mode()
    def start_step(
        self, slices: Sequence[SequenceSlice], sources: Sequence[int], rows: Sequence[SampleRow], after: Sequence[Event] = ()
    ) -> DrawnStep:
        """Launches a step and returns at once; `rows` say how the next tokens of the slices that ask for logits are drawn.

        Where sources[i] is not -1, slice i's one token is that which row sources[i] of the step before drew, whatever the slice
        says; so a step may be launched before the one before it has ended. Rows that do not fit the device are left to the caller,
        who gets their logits; what is drawn of them here is of no use. The step begins when the device has passed `after`.
        """
        assert len(rows) <= self._drawn.shape[0], "more rows than the runner was made for"
        for event in after:
            quiet_calls.wait_for(event)
        memory, captured = self._memories.take(), self._captured(slices, sources)
        positions = [item.start + len(item.token_ids) for item in slices if item.logits == "last"]
        if captured is not None and self._graphs is not None:
            logits = self._replay(captured, memory)
            self._graphs.drawing.replay(logits, rows, positions, memory)
        else:
            logits = self._compute(slices, sources, memory.note_filled)
            if rows:
                self._argmax(logits, self._drawn[: len(rows)])
            draw_rows(logits, rows, positions, self._drawn)
        kept = [index for index, row in enumerate(rows) if not row.fits_device]
        if kept:
            memory.keep(logits, kept)
        return memory.fetch(len(rows), len(kept))

    def warm_up(self, progress: Progress | None = None) -> None:
        """Compiles kernels and captures graphs. Overwrites the pool's first blocks: call it before any is handed out."""
        report = progress or (lambda fraction, text: None)
        report(0.0, "compiling kernels")
        for slices in _warm_up_batches(self.config, self._pool_tensor(), self._gpu.max_batch > 0):
            self.forward(slices)
        if self.device.type == "cuda":
            if self._gpu.max_batch or self._gpu.max_tokens:
                self._capture(report)
            _lock_pages()
            self.start_step([SequenceSlice([0], 0, range(1))], [-1], [_SAMPLED]).token_ids()
        report(1.0, "ready")

    def _pool_tensor(self) -> torch.Tensor:
        assert self._pool is not None, "attach a pool first"
        return self._pool

    def _captured(self, slices: Sequence[SequenceSlice], sources: Sequence[int] | None) -> Fitted | None:
        """The inputs of a step, if it is one of those that were captured."""
        if self._graphs is None:
            return None
        arrays: Mapping[str, Ints] | None = None
        if not self._gpu.max_batch:
            arrays = self._prompt_arrays(slices, sources)
        elif is_decode(slices):
            arrays = decode_arrays(slices, sources, self._pool_tensor().shape[4])
        return None if arrays is None else self._graphs.fit(arrays)

    def _prompt_arrays(self, slices: Sequence[SequenceSlice], sources: Sequence[int] | None) -> dict[str, Integers] | None:
        """None for a step that is surely none of those captured."""
        num_tokens = sum(len(item.token_ids) for item in slices)
        if num_tokens > self._gpu.max_tokens or any(item.logits == "all" for item in slices):
            return None
        return host_arrays(
            build_batch(slices, self._pool_tensor().shape[4]), _by_row(slices, sources), self._gpu.attention.tile_tokens
        )

    def _replay(self, step: Fitted, memory: StepMemory) -> torch.Tensor:
        """Logits of at least as many rows as were asked for; the likeliest tokens are drawn too."""
        assert self._graphs is not None, "captured"
        return self._graphs.replay(step, memory)

    def _compute(self, slices: Sequence[SequenceSlice], sources: Sequence[int] | None, filled: Callable[[], None]) -> torch.Tensor:
        """`sources`: one a slice. `filled` as in llm.model."""
        pool = self._pool_tensor()
        batch = build_batch(slices, pool.shape[4])
        attention = self._gpu.attention
        whole = attention.whole_tokens(batch, pool)
        arrays = host_arrays(batch, _by_row(slices, sources), attention.tile_tokens, whole)
        tensors = upload(arrays, self.device)
        largest = int(arrays["tile_counts"].max(initial=0))
        return self._forward(make_device_batch(batch, tensors, self._drawn, largest, whole), filled)

    def _forward(self, batch: DeviceBatch, filled: Callable[[], None]) -> torch.Tensor:
        """`filled` is called by steps of prompts alone: others' K and V are nobody's business, and short ones are over soon."""
        if self._is_few(batch):
            return self._few_rows.forward(batch, self._pool_tensor())
        return self._model.forward(batch, self._pool_tensor(), (lambda: None) if self._gpu.max_batch else filled)

    def _is_few(self, batch: DeviceBatch) -> bool:
        rows = batch.tensors["positions"].shape[0]
        return rows <= MAX_ROWS and len(batch.logits_rows) > 0

    def _capture(self, report: Progress) -> None:
        pool, sizes = self._pool_tensor(), self._graph_sizes()
        largest = max(sizes, key=lambda size: size.rows)
        per_sequence = -(-self.config.context_tokens // pool.shape[4])
        max_block_ids = min(largest.sequences * per_sequence, 4 * pool.shape[0] + largest.sequences)
        max_count = 1 if self._gpu.max_batch else self._gpu.attention.tile_tokens
        graphs = StepGraphs(GraphInputs(largest, max_block_ids, self._drawn, max_count), self._step, DrawGraphs(self._drawn))
        done: list[int] = []
        with torch.inference_mode():
            graphs.capture(sizes, lambda size: _count(done, size, len(sizes), report))
        self._graphs = graphs

    def _graph_sizes(self) -> list[GraphSize]:
        gpu = self._gpu
        if gpu.max_batch:
            return [decode_size(sequences) for sequences in bucket_sizes(gpu.max_batch)]
        pool, tokens = self._pool_tensor(), min(gpu.max_tokens, self.config.context_tokens)
        tokens = min(tokens, pool.shape[0] * pool.shape[4])
        return [prompt_size(size, gpu.attention.tile_tokens, self._drawn.shape[0]) for size in prompt_sizes(tokens)]

    def _step(self, batch: DeviceBatch, filled: Callable[[], None]) -> torch.Tensor:
        logits = self._forward(batch, filled)
        self._argmax(logits, self._drawn[: logits.shape[0]])
        return logits


def _make_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream of the runner's own: transfers run beside it, and none of them waits for torch's default stream."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def _by_row(slices: Sequence[SequenceSlice], sources: Sequence[int] | None) -> Sequence[int] | None:
    """`sources` one a slice -> one a token. None stays None."""
    if sources is None:
        return None
    counts = [len(item.token_ids) for item in slices]
    repeated: list[int] = np.repeat(np.asarray(sources, np.int32), counts).tolist()
    return repeated


def _count(done: list[int], size: GraphSize, total: int, report: Progress) -> None:
    done.append(size.rows)
    report(len(done) / total, f"capturing graphs of steps: {size.rows} tokens")


_SAMPLED = SampleRow(SamplingParams(temperature=1.0, top_k=2, top_p=0.9, seed=0), (), 0)
"""Compiles the kernel that draws."""


def _lock_pages() -> None:
    """Has torch keep page-locked memory of every size that steps use: to get more, the driver stops the device for a while.

    After all captures, at each of which torch gives back what it keeps.
    """
    sizes = [1 << power for power in range(9, 23)]
    held = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in sizes for _ in range(4)]
    del held


def _warm_up_batches(config: ModelConfig, pool: torch.Tensor, decodes: bool) -> list[list[SequenceSlice]]:
    """Steps of many sizes, so that no request waits for a compiler, or for the driver to load one of the library's kernels."""
    capacity = min(config.context_tokens, pool.shape[0] * pool.shape[4])
    blocks = range(pool.shape[0])
    sizes: tuple[int, ...] = (1, 2, 32) if decodes else (1, 8, 128, 2048)
    counts: tuple[int, ...] = ()
    if pool.is_cuda and not decodes:
        sizes, counts = (1, 8, 32, 64, *range(128, 2049, 128)), (2, 20)
    single = [[SequenceSlice([0] * tokens, 0, blocks)] for tokens in sizes if tokens <= capacity]
    return single + [[SequenceSlice([0] * min(100, capacity), 0, blocks)] * count for count in counts]
