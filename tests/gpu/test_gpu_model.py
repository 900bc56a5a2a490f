"""The whole model on a GPU: logits against transformers' Llama, graphs against plain launches, overlapped steps."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from llm.batch import SequenceSlice
from llm.config import load_model_config
from llm.gpu.settings import GpuSettings
from llm.runner import RunnerSettings
from llm.sampling import SampleRow, sample
from llm.sampling_params import SamplingParams
from llm.weights import WeightRequest, load_tensors
from tests.fakes.paged_batches import relative_error

runners = pytest.importorskip("llm.gpu.runner")
chunks = pytest.importorskip("prefill_svc.kernels.chunk_attention")
paged = pytest.importorskip("decode_svc.kernels.paged_attention")
block_copy = pytest.importorskip("llm.ops.gpu.block_copy")
device_lane = pytest.importorskip("llm.kv.device_lane")

pytestmark = pytest.mark.gpu

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1000,
    "rope_theta": 500_000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Files:
    name: str = "random:gpu-test"
    format: str = "random"
    path: Path | None = None
    digest: str = "d"
    random_config: dict | None = None


@dataclass
class Pool:
    tensor: torch.Tensor


@pytest.fixture
def config():
    return load_model_config("random", None, CONFIG)


@pytest.fixture
def tensors(config, device, tmp_path):
    return load_tensors(WeightRequest(Files(), config, "bf16", str(device), tmp_path), lambda fraction, text: None)


def make_runner(config, tensors, attention, max_batch=0, max_tokens=0):
    gpu = GpuSettings(attention, max_batch, max_tokens, max_rows=8)
    settings = RunnerSettings("decode" if max_batch else "prefill", "cuda", gpu=gpu)
    runner = runners.GpuModelRunner(config, tensors, settings)
    shape = (96, config.num_layers, 2, config.num_kv_heads, 16, config.head_dim)
    runner.attach(Pool(torch.full(shape, torch.nan, dtype=torch.bfloat16, device="cuda")))
    return runner


def transformers_llama(config, tensors, dtype):
    transformers = pytest.importorskip("transformers")
    rope = {"rope_type": "default", "rope_theta": CONFIG["rope_theta"]}
    shape = {key: value for key, value in CONFIG.items() if key not in ("architectures", "rope_theta")}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, rope_theta=CONFIG["rope_theta"], rope_parameters=rope))
    state = {"model.embed_tokens.weight": "embedding", "model.norm.weight": "norm", "lm_head.weight": "head"}
    weights = {name: tensors[ours] for name, ours in state.items()}
    for index in range(config.num_layers):
        theirs, ours = f"model.layers.{index}.", f"layers.{index}."
        q, k, v = tensors[ours + "qkv"].split([config.query_size, config.kv_size, config.kv_size])
        gate, up = tensors[ours + "gate_up"].chunk(2)
        attention = {"q_proj": q, "k_proj": k, "v_proj": v, "o_proj": tensors[ours + "output"]}
        mlp = {"gate_proj": gate, "up_proj": up, "down_proj": tensors[ours + "down"]}
        weights |= {f"{theirs}self_attn.{name}.weight": value for name, value in attention.items()}
        weights |= {f"{theirs}mlp.{name}.weight": value for name, value in mlp.items()}
        weights[theirs + "input_layernorm.weight"] = tensors[ours + "attention_norm"]
        weights[theirs + "post_attention_layernorm.weight"] = tensors[ours + "ffn_norm"]
    model.load_state_dict(weights, strict=False)
    return model.to("cuda", dtype).eval()


@torch.inference_mode()
def reference_logits(config, tensors, tokens):
    """In float32 from the same weights, and how far bfloat16 throws transformers itself off."""
    ids = torch.tensor([tokens], device="cuda")
    exact = transformers_llama(config, tensors, torch.float32)(ids).logits[0].float()
    rounded = transformers_llama(config, tensors, torch.bfloat16)(ids).logits[0].float()
    return exact, relative_error(rounded, exact)


def test_teacher_forced_logits_are_those_of_transformers(config, tensors, device):
    """All positions: in one piece; in chunks; and split, with the pool's blocks copied to a decode runner with graphs."""
    tokens = torch.randint(3, 1000, (400,)).tolist()
    exact, allowed = reference_logits(config, tensors, tokens)
    blocks = torch.randperm(96).tolist()[:26]
    prefill = make_runner(config, tensors, chunks.ChunkAttention())
    whole = prefill.forward([SequenceSlice(tokens, 0, blocks, "all")])
    parts = [prefill.forward([SequenceSlice(tokens[start : start + 90], start, blocks, "all")]) for start in range(0, 270, 90)]
    decode = make_runner(config, tensors, paged.PagedAttention(), max_batch=4)
    decode.warm_up()
    ids = torch.tensor(blocks, dtype=torch.int32, device="cuda")
    block_copy.copy_blocks(prefill._pool, decode._pool, ids, ids.flip(0).contiguous())
    steps = [decode.forward([SequenceSlice([tokens[at]], at, blocks[::-1])]).clone() for at in range(270, 400)]
    limit = max(1.5 * allowed, 1e-2)
    assert relative_error(whole, exact) < limit
    assert relative_error(torch.cat([*parts, *steps]), exact) < limit


def test_graphs_compute_what_launches_compute(config, tensors, device):
    captured, plain = (make_runner(config, tensors, paged.PagedAttention(), max_batch=24) for _ in range(2))
    captured.warm_up()
    prompts = [SequenceSlice(torch.randint(3, 1000, (9 + 3 * i,)).tolist(), 0, [3 * i, 3 * i + 1, 3 * i + 2]) for i in range(9)]
    for runner in (captured, plain):
        runner.forward(prompts)
    for count in (9, 1, 3, 8):
        step = [SequenceSlice([7 * i + 3], len(prompts[i].token_ids), prompts[i].block_ids) for i in range(count)]
        assert relative_error(captured.forward(step), plain.forward(step)) < 2e-2


def test_captured_prompts_are_computed_as_launched_ones(config, tensors, device):
    """Fresh, behind a prefix, and several at once; their K and V too, which the next step reads."""
    captured, plain = (make_runner(config, tensors, chunks.ChunkAttention(), max_tokens=size) for size in (640, 0))
    captured.warm_up()
    assert captured.num_graphs > 5
    plain.warm_up()
    tokens = torch.randint(3, 1000, (900,)).tolist()
    for runner in (captured, plain):
        runner._pool.fill_(torch.nan)
    for slices in (
        [SequenceSlice(tokens[:600], 0, range(60))],
        [SequenceSlice(tokens[600:640], 600, range(60)), SequenceSlice(tokens[:300], 0, range(60, 96), "none")],
        [SequenceSlice(tokens[300:331], 300, range(60, 96)), SequenceSlice(tokens[640:900], 640, range(60))],
        [SequenceSlice([9], 331, range(60, 96))],
    ):
        assert relative_error(captured.forward(slices), plain.forward(slices)) < 2e-2


@pytest.mark.parametrize("max_tokens", [0, 640])
def test_prompts_are_in_the_pool_when_they_say_so(config, tensors, device, max_tokens):
    """Launched and captured; a step launched ahead writes elsewhere meanwhile."""
    runner = make_runner(config, tensors, chunks.ChunkAttention(), max_tokens=max_tokens)
    runner.warm_up()
    row, beside = SampleRow(SamplingParams(temperature=0.0), (), 0), torch.cuda.Stream()
    for turn in range(20):
        runner._pool.fill_(torch.nan)
        torch.cuda.synchronize()
        prompts = [torch.randint(3, 1000, (560 + turn,)).tolist() for _ in range(2)]
        first = runner.start_step([SequenceSlice(prompts[0], 0, range(40))], [-1], [row])
        second = runner.start_step([SequenceSlice(prompts[1], 0, range(40, 80))], [-1], [row])
        copies = []
        for step, blocks in ((first, slice(0, 40)), (second, slice(40, 80))):
            step.wait_filled()
            with torch.cuda.stream(beside):
                copies.append((runner._pool[blocks].clone(), blocks))
                beside.synchronize()
        for step in (first, second):
            step.token_ids()
        for copy, blocks in copies:
            assert torch.equal(copy.view(torch.int16), runner._pool[blocks].view(torch.int16))
            assert not copy[:35].isnan().any()


def test_steps_are_launched_ahead(config, tensors, device):
    """Eight greedy tokens of three streams, each step launched before the one before is read, are those drawn one by one."""
    runners_ = [make_runner(config, tensors, paged.PagedAttention(), max_batch=4) for _ in range(2)]
    prompts = [SequenceSlice(list(range(5 + i, 40 + 2 * i)), 0, [4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3]) for i in range(3)]
    rows = [SampleRow(SamplingParams(temperature=0.0), [1], 1)] * 3
    for runner in runners_:
        runner.warm_up()
        runner.forward(prompts)
    ahead, behind = runners_
    lengths = [len(item.token_ids) for item in prompts]
    tokens, launched = [11, 12, 13], []
    for step in range(8):
        slices = [SequenceSlice([tokens[i]], lengths[i] + step, prompts[i].block_ids) for i in range(3)]
        given = (slices, [-1, -1, -1]) if step == 0 else ([_hide(item) for item in slices], [0, 1, 2])
        started = ahead.start_step(*given, rows)
        tokens = behind.forward(slices).argmax(dim=-1).tolist()
        launched.append((started, tokens))
    assert [step.token_ids() for step, _ in launched] == [expected for _, expected in launched]


@pytest.mark.parametrize("filters", [{}, {"top_k": 40}, {"top_p": 0.9}])
def test_captured_draws_are_those_of_launched_ones(config, tensors, device, filters):
    """Among them a greedy row, and one that the host draws, whose logits come along."""
    captured = make_runner(config, tensors, paged.PagedAttention(), max_batch=8)
    captured.warm_up()
    prompts = [SequenceSlice(list(range(5 + i, 40 + 2 * i)), 0, [4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3]) for i in range(5)]
    captured.forward(prompts)
    params = [SamplingParams(temperature=0.8, seed=i, **filters) for i in range(3)]
    rows = [SampleRow(each, (), 0) for each in (*params, SamplingParams(temperature=0.0))]
    rows.append(SampleRow(SamplingParams(temperature=0.0), (), 0, num_logprobs=1))
    step = [SequenceSlice([7 * i + 3], len(prompts[i].token_ids), prompts[i].block_ids) for i in range(5)]
    steps = [captured.start_step(step, [-1] * 5, rows) for _ in range(2)]
    logits = captured.forward(step).clone()
    known = [SampleRow(row.params, [1] * (len(item.token_ids) + 1), 1) for row, item in zip(rows, prompts, strict=True)]
    expected = [token.token_id for token in sample(logits.cpu(), known)]
    for started in steps:
        assert started.token_ids()[:4] == expected[:4]
        assert started.host_logits()[0].argmax() == expected[4]


@pytest.mark.parametrize("captured", [True, False])
def test_a_step_begins_when_its_kv_is_copied(config, tensors, device, captured):
    """It is launched before the copy begins, beside another sequence whose KV is here, and nobody waits."""
    reader, writer = (make_runner(config, tensors, paged.PagedAttention(), max_batch=4) for _ in range(2))
    prompts = [SequenceSlice(list(range(5 + i, 60 + 3 * i)), 0, range(5 * i, 5 * i + 5)) for i in range(2)]
    for runner in (reader, writer) if captured else ():
        runner.warm_up()
    writer.forward(prompts)
    reader.forward(prompts[:1])
    lane, ids = device_lane.Lane(reader._pool), np.arange(5, 10, dtype=np.int32)
    lane.warm_up()
    step = [SequenceSlice([7 * i + 3], len(prompts[i].token_ids), prompts[i].block_ids) for i in range(2)]
    rows = [SampleRow(SamplingParams(temperature=0.0), (), 0)] * 2
    expected = writer.start_step(step, [-1, -1], rows).token_ids()
    reader.start_step(step, [-1, -1], rows).token_ids()  # what is compiled or made at first
    for _ in range(3):
        reader._pool[5:10].fill_(torch.nan)
        torch.cuda.synchronize()
        with torch.cuda.stream(lane._stream):
            torch.cuda._sleep(100_000_000)
        copying = lane.begin_fetch(writer._pool, ids, ids)
        started = reader.start_step(step, [-1, -1], rows, [copying.event])
        assert not copying.done()
        assert started.token_ids() == expected
        assert copying.done()
        copying.sums()


def _hide(item):
    return SequenceSlice([0], item.start, item.block_ids)
