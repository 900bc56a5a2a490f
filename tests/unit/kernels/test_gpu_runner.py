"""The GPU runner, its kernels interpreted where there is no GPU, against the reference runner."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from llm.batch import SequenceSlice, build_batch
from llm.config import load_model_config
from llm.errors import UnsupportedModelError
from llm.gpu.settings import GpuSettings
from llm.model import Model
from llm.ops.operations import TorchOperations
from llm.runner import RunnerSettings
from llm.sampling import SampleRow, sample
from llm.sampling_params import SamplingParams
from llm.weights import WeightRequest, load_tensors
from tandem.random_models import RANDOM_MODELS
from tests.fakes.paged_batches import relative_error

runners = pytest.importorskip("llm.gpu.runner")
draw_graphs = pytest.importorskip("llm.gpu.draw_graphs")
operations = pytest.importorskip("llm.ops.gpu.operations")
draws = pytest.importorskip("llm.ops.gpu.draw")
chunks = pytest.importorskip("prefill_svc.kernels.chunk_attention")
paged = pytest.importorskip("decode_svc.kernels.paged_attention")


@dataclass(frozen=True)
class Files:
    name: str = "random:tiny"
    format: str = "random"
    path: Path | None = None
    digest: str = "d"
    random_config: dict | None = None


@dataclass
class FakePool:
    tensor: torch.Tensor


class Reference:
    """The model on torch's operations on the CPU, with a pool of its own."""

    def __init__(self, config, tensors, device):
        copies = {name: tensor.cpu() for name, tensor in tensors.items()}
        self._model, self._pool, self._device = Model(config, copies, TorchOperations()), make_pool(config, "cpu").tensor, device

    @torch.inference_mode()
    def forward(self, slices):
        return self._model.forward(build_batch(slices, 16), self._pool).to(self._device)


def make_pool(config, device):
    return FakePool(torch.full((12, config.num_layers, 2, config.num_kv_heads, 16, config.head_dim), torch.nan, device=device))


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 70}


@pytest.fixture(params=["llama", "llama of one layer", "with Qwen's biases and head norms"])
def config(request):
    config = load_model_config("random", None, {**RANDOM_MODELS["tiny"], **SMALL})
    qwen = "Qwen" in request.param
    return replace(config, attention_bias=qwen, qk_norm=qwen, num_layers=1 if "one layer" in request.param else 2)


@pytest.fixture
def tensors(config, device, tmp_path):
    tensors = load_tensors(WeightRequest(Files(), config, "fp32", str(device), tmp_path), lambda fraction, text: None)
    return {name: tensor * 4 if tensor.dim() == 2 else tensor + 0.1 * torch.rand_like(tensor) for name, tensor in tensors.items()}


@pytest.fixture
def reference(config, tensors, device):
    return Reference(config, tensors, device)


def make_runner(config, tensors, device, attention, max_batch=0, *, max_rows=1, max_tokens=0):
    role = "decode" if max_batch else "prefill"
    gpu = GpuSettings(attention, max_batch, max_tokens, max_rows)
    settings = RunnerSettings(role, str(device), "float32", gpu=gpu)
    runner = runners.GpuModelRunner(config, tensors, settings)
    runner.attach(make_pool(config, device))
    return runner


@pytest.mark.parametrize("kv_dtype", ["int8", "float32"])
def test_another_kind_of_kv_than_it_computes_in_is_refused(device, tmp_path, kv_dtype):
    gpu = GpuSettings(paged.PagedAttention(), 1, 0, 1)
    settings = RunnerSettings("decode", str(device), "bfloat16", kv_dtype=kv_dtype, cache_directory=tmp_path, gpu=gpu)
    files = Files(random_config=RANDOM_MODELS["tiny"])
    with pytest.raises(UnsupportedModelError, match=f"--kv-dtype {kv_dtype}: on a GPU"):
        runners.GpuModelRunner.load(files, settings)


PROMPTS = [SequenceSlice(list(range(3, 19)), 0, [5, 2]), SequenceSlice([9, 8, 7], 0, [0], "all")]
LATER = [SequenceSlice([40, 41], 16, [5, 2], "all"), SequenceSlice([30], 3, [0])]


@pytest.mark.parametrize("config", ["llama", "with Qwen's biases and head norms"], indirect=True)
@pytest.mark.parametrize("attention", [chunks.ChunkAttention(chunks.Shape(16, 16, 4)), paged.PagedAttention()], ids=type)
def test_chunks_then_tokens_give_the_reference_logits(config, tensors, reference, device, attention):
    """The second call goes on from the K and V that the first wrote."""
    runner = make_runner(config, tensors, device, attention)
    for slices in (PROMPTS, LATER):
        assert relative_error(runner.forward(slices), reference.forward(slices)) < 1e-4


@pytest.mark.parametrize(
    ("config", "tokens"),
    [(config, tokens) for config in ("llama of one layer", "with Qwen's biases and head norms") for tokens in (1, 5, 20)]
    + [("llama of one layer", 33), ("llama of one layer", 65)],
    indirect=["config"],
)
def test_any_number_of_rows_gives_the_reference_logits(config, tensors, reference, device, tokens):
    """One row, several, those for which the library takes part, the most, and too many for the kernels of few rows."""
    runner = make_runner(config, tensors, device, paged.PagedAttention())
    slices = [SequenceSlice(list(range(tokens)), 0, [5, 2, 0, 7, 1])]
    assert relative_error(runner.forward(slices), reference.forward(slices)) < 1e-4


@pytest.mark.parametrize("config", ["llama", "with Qwen's biases and head norms"], indirect=True)
def test_decode_steps_turn_write_and_attend_in_one_launch(config, tensors, reference, device, monkeypatch):
    runner = make_runner(config, tensors, device, paged.PagedAttention())
    for each in (runner, reference):
        each.forward(PROMPTS)
    monkeypatch.setattr(operations, "rotate_and_write", lambda *_: pytest.fail("a launch of its own"))
    for slices in ([SequenceSlice([40], 16, [5, 2]), SequenceSlice([30], 3, [0])], [SequenceSlice([41], 17, [5, 2])]):
        assert relative_error(runner.forward(slices), reference.forward(slices)) < 1e-4


@pytest.mark.parametrize("config", ["llama"], indirect=True)
def test_layers_of_a_long_step_are_reported(config, tensors, device):
    runner, layers = make_runner(config, tensors, device, chunks.ChunkAttention(chunks.Shape(16, 16, 4))), []
    runner.report_layers(lambda: layers.append(1))
    runner.forward([SequenceSlice(list(range(70)), 0, [5, 2, 0, 7, 1], "none")])
    assert len(layers) == config.num_layers


@pytest.mark.parametrize("config", ["llama of one layer"], indirect=True)
def test_no_rows_wanted_gives_no_rows(config, tensors, device):
    runner = make_runner(config, tensors, device, paged.PagedAttention())
    assert runner.forward([SequenceSlice([1, 2, 3], 0, [0], "none")]).shape == (0, config.vocab_size)


class FakeGraph:
    """Replays by running the step again into the same logits."""

    current = None

    def __init__(self, keep_graph):
        assert keep_graph
        self.again = lambda: None

    def __enter__(self):
        FakeGraph.current = self

    def __exit__(self, *exception):
        FakeGraph.current = None

    def replay(self):
        self.again()


def record(step):
    """`step`, which a graph that is being captured remembers."""

    def recorded(batch, cut):
        logits = step(batch, cut)
        if FakeGraph.current is not None:
            FakeGraph.current.again = lambda: logits.copy_(step(batch, lambda: None))
            logits.fill_(torch.nan)
        return logits

    return recorded


def recorded_draw(logits, parameters, out):
    """Remembers itself in place of drawing, and nothing is drawn before it is replayed."""
    if FakeGraph.current is not None:
        FakeGraph.current.again = lambda: draws.draw(logits, parameters, out)


@pytest.fixture
def without_device(monkeypatch):
    """Lets graphs be captured where there is no device to capture them on."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: graph)
    monkeypatch.setattr(runners, "bucket_sizes", lambda largest: (largest,))
    monkeypatch.setattr(draw_graphs, "draw", recorded_draw)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu captures real graphs")
@pytest.mark.parametrize("config", ["llama of one layer"], indirect=True)
def test_replayed_steps_are_padded_to_the_captured_sizes(config, tensors, reference, device, without_device):
    runner = make_runner(config, tensors, device, paged.PagedAttention(), max_batch=4)
    runner._step = record(runner._step)
    reports = []
    runner._capture(lambda fraction, text: reports.append(text))
    assert [text.split()[4] for text in reports] == ["4"]
    prompts = [SequenceSlice([4, 5], 0, [3 * i, 3 * i + 1]) for i in range(3)]
    for each in (runner, reference):
        each.forward(prompts)
    slices = [SequenceSlice([10 + i], 2, prompts[i].block_ids) for i in range(3)]
    expected = reference.forward(slices)
    assert relative_error(runner.forward(slices), expected) < 1e-5
    assert runner._drawn[:3].tolist() == expected.argmax(dim=-1).tolist()
    for filters in ({}, {"top_k": 9, "top_p": 0.8}):
        params = [SamplingParams(temperature=3.0, seed=i, **filters) for i in range(2)]
        rows = [SampleRow(each, (), 0) for each in (params[0], SamplingParams(temperature=0.0), params[1])]
        known = [SampleRow(row.params, [1] * 3, 1) for row in rows]
        drawn = runner.start_step(slices, [-1] * 3, rows).token_ids()
        assert drawn == [token.token_id for token in sample(expected.cpu(), known)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu captures real graphs")
@pytest.mark.parametrize("config", ["llama of one layer"], indirect=True)
@pytest.mark.usefixtures("without_device")
def test_prompts_are_padded_to_the_captured_sizes(config, tensors, reference, device, monkeypatch):
    """One that fits few rows, then two that fit only more, of which one has a prefix and one goes on: its graph is cut."""
    memory, graph = type(runners.StepMemories(torch.zeros(1)).take()), FakeGraph
    order, note_filled, replay = [], memory.note_filled, graph.replay
    monkeypatch.setattr(memory, "note_filled", lambda self: (order.append("filled"), note_filled(self)))
    monkeypatch.setattr(graph, "replay", lambda self: (order.append("graph"), replay(self)))
    monkeypatch.setattr(runners, "prompt_sizes", lambda tokens: (64, 80))
    attention = chunks.ChunkAttention(chunks.Shape(16, 16, 4))
    runner = make_runner(config, tensors, device, attention, max_rows=9, max_tokens=80)
    runner._step = record(runner._step)
    runner._capture(lambda fraction, text: None)
    greedy = SampleRow(SamplingParams(temperature=0.0), (), 0)
    launched = []
    monkeypatch.setattr(runner, "_compute", lambda *_: pytest.fail("not captured"))
    for slices in (
        [SequenceSlice(list(range(3, 23)), 0, [5, 2])],
        [SequenceSlice(list(range(4, 34)), 20, [5, 2, 7, 8]), SequenceSlice(list(range(5, 45)), 0, [9, 1, 3], "none")],
        [SequenceSlice([60, 61], 40, [9, 1, 3])],
    ):
        expected = reference.forward(slices)
        launched.append((runner.start_step(slices, [-1] * len(slices), [greedy]), expected.argmax(dim=-1).tolist()))
    assert [step.token_ids() for step, _ in launched] == [tokens for _, tokens in launched]
    assert order == ["graph", *("graph", "filled", "graph"), "graph"]


@pytest.mark.parametrize("last", ["last", "none"])
@pytest.mark.parametrize("config", ["llama"], indirect=True)
def test_prompts_say_when_nothing_more_is_written(config, tensors, device, last):
    """Before the tokens are drawn; and what is in the pool then is what is in it in the end."""
    runner = make_runner(config, tensors, device, chunks.ChunkAttention(chunks.Shape(16, 16, 4)), max_rows=2)
    memories, seen = [], []
    take = runner._memories.take

    def noting():
        memories.append(take())
        memory, note_filled = memories[-1], memories[-1].note_filled
        memory.note_filled = lambda: (note_filled(), memory.wait_filled(), seen.append(runner._pool.clone()))
        return memory

    runner._memories.take = noting
    slices = [SequenceSlice(list(range(3, 70)), 0, [5, 2, 8, 9, 1], last), SequenceSlice([5], 0, [3], "none")]
    rows = [SampleRow(SamplingParams(temperature=0.0), (), 0)] if last == "last" else []
    step = runner.start_step(slices, [-1, -1], rows)
    (filled,) = seen
    step.token_ids()
    step.wait_filled()
    assert torch.equal(filled.view(torch.int32), runner._pool.view(torch.int32))
    assert not filled[[5, 2, 8, 9]].isnan().any()


@pytest.mark.parametrize("config", ["llama of one layer"], indirect=True)
def test_decode_steps_do_not_say_it(config, tensors, device, monkeypatch):
    """To cut their graphs would cost them time, and nobody would be told."""
    prefill = make_runner(config, tensors, device, chunks.ChunkAttention(chunks.Shape(16, 16, 4)), max_rows=2)
    decode = make_runner(config, tensors, device, paged.PagedAttention(), max_batch=2)
    cuts = []
    monkeypatch.setattr(Model, "forward", lambda model, batch, pool, filled: filled())
    for runner in (prefill, decode):
        slices = [SequenceSlice(list(range(3, 70)), 0, [5, 2, 8, 9, 1])]
        runner._compute(slices, None, lambda runner=runner: cuts.append(runner))
    assert cuts == [prefill]


@pytest.mark.parametrize("config", ["llama of one layer"], indirect=True)
def test_steps_follow_each_other_without_the_host_seeing_tokens(config, tensors, reference, device):
    """Rows change places between steps, and one row is sampled; the tokens are those that the host would have drawn."""
    runner = make_runner(config, tensors, device, paged.PagedAttention(), max_batch=4)
    runner.forward(PROMPTS)
    reference.forward(PROMPTS)
    params = [SamplingParams(temperature=0.0), SamplingParams(temperature=0.9, top_k=20, seed=5)]
    history = [[*PROMPTS[0].token_ids, 50], [*PROMPTS[1].token_ids, 60]]
    blocks = [[5, 2], [0]]
    order, sources = [0, 1], [-1, -1]
    for _ in range(2):
        slices = [SequenceSlice(history[i][-1:], len(history[i]) - 1, blocks[i]) for i in order]
        rows = [SampleRow(params[i], history[i], 1) for i in order]
        expected = sample(reference.forward(slices), rows)
        hidden = [SequenceSlice([0], item.start, item.block_ids) for item in slices]
        step = runner.start_step(hidden if sources[0] >= 0 else slices, sources, rows)
        assert step.token_ids() == [token.token_id for token in expected]
        for place, token in zip(order, expected, strict=True):
            history[place].append(token.token_id)
        order, sources = order[::-1], [1, 0]


@pytest.mark.parametrize("config", ["llama of one layer"], indirect=True)
def test_rows_for_the_host_come_with_their_logits(config, tensors, reference, device):
    """Beside others, which are drawn as ever; and the next step does not touch them while they are read."""
    runner = make_runner(config, tensors, device, chunks.ChunkAttention(chunks.Shape(16, 16, 4)), max_rows=3)
    slices = [SequenceSlice([9 + i, 8, 7], 0, [i]) for i in range(3)]
    greedy, penalised = SamplingParams(temperature=0.0), SamplingParams(temperature=0.7, presence_penalty=1.0)
    rows = [SampleRow(penalised, (), 0), SampleRow(greedy, (), 0), SampleRow(greedy, (), 0, num_logprobs=1)]
    expected = reference.forward(slices).cpu()
    step = runner.start_step(slices, [-1] * 3, rows)
    later = runner.start_step([SequenceSlice([3], 3, [0])], [-1], [rows[0]])
    assert step.token_ids()[1] == expected[1].argmax()
    assert relative_error(step.host_logits(), expected[[0, 2]]) < 1e-4
    later.token_ids()
    assert later.host_logits().shape == (1, config.vocab_size)


@pytest.mark.parametrize("config", ["llama of one layer"], indirect=True)
def test_chunks_draw_where_a_prompt_ends(config, tensors, reference, device):
    """One prompt ends, one goes on, one is a single token that follows the step before."""
    runner = make_runner(config, tensors, device, chunks.ChunkAttention(chunks.Shape(16, 16, 4)), max_rows=3)
    first = [SequenceSlice([9, 8, 7], 0, [0]), SequenceSlice(list(range(3, 19)), 0, [5, 2], "none")]
    greedy = SampleRow(SamplingParams(temperature=0.0), (), 0)
    drawn = reference.forward(first).argmax(dim=-1).tolist()
    assert runner.start_step(first, [-1, -1], [greedy]).token_ids() == drawn
    hidden = [SequenceSlice([40, 41], 16, [5, 2]), SequenceSlice([0], 3, [0])]
    known = [hidden[0], SequenceSlice(drawn, 3, [0])]
    expected = reference.forward(known).argmax(dim=-1).tolist()
    assert runner.start_step(hidden, [-1, 0], [greedy, greedy]).token_ids() == expected
    assert runner.start_step([SequenceSlice([1], 18, [5, 2], "none")], [-1], []).token_ids() == []
