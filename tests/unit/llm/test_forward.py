"""The whole forward pass against a plain dense model, however the tokens are fed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llm.config import load_model_config
from llm.errors import UnsupportedModelError
from llm.host_model import SteppedModel, choose_operations, make_host_model
from llm.kv.layout import KvLayout
from llm.kv.pool import KvPool
from llm.ops.operations import TorchOperations
from llm.runner import ModelRunner, RunnerSettings, SequenceSlice
from llm.weights import WeightRequest, load_tensors
from tandem.models import cache_directory
from tests.unit.llm.dense_model import dense_logits

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "untied head": {"tie_word_embeddings": False},
    "no grouping": {"num_key_value_heads": 4},
    "one kv head": {"num_key_value_heads": 1},
    "odd head": {"head_dim": 24},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 32},
    "llama3 scaling": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}
TOKENS = [(7 * index * index + 3 * index) % 128 for index in range(90)]


def by_default(config: Any, tensors: Any) -> Any:
    return make_host_model(config, tensors, 2, cache_directory())


MODELS = {
    "default": by_default,
    "kernels": lambda config, tensors: SteppedModel(config, tensors, choose_operations(2)),
    "references": lambda config, tensors: SteppedModel(config, tensors, TorchOperations()),
}


def make_runner(
    files: Any, dtype: str = "float32", block_tokens: int = 16, make_model: Any = None
) -> tuple[ModelRunner, torch.Tensor]:
    """A runner with a poisoned pool, and the dense model's logits. Weights are made large, so that layers matter."""
    settings = RunnerSettings("decode", dtype=dtype, threads=2, cache_directory=cache_directory())  # type: ignore[arg-type]
    config = load_model_config(files.format, None, files.random_config)
    runner = ModelRunner.load(files, settings)
    tensors = load_tensors(WeightRequest(files, config, runner.weight_format, "cpu", cache_directory()), lambda *_: None)
    tensors = {
        name: tensor * 10 if tensor.ndim == 2 else tensor + 0.1 * torch.arange(len(tensor)).cos()
        for name, tensor in tensors.items()
    }
    runner._model = (make_model or by_default)(config, tensors)
    pool = KvPool.create(KvLayout(config.num_layers, config.num_kv_heads, config.head_dim, block_tokens, runner.kv_dtype), 60)
    pool.tensor.fill_(float("nan"))
    runner.attach(pool)
    return runner, dense_logits(config, tensors, TOKENS)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-4) -> None:
    assert actual.dtype == torch.float32
    assert (actual.double() - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_prompt_at_once(random_files: Any, variant: str, model: str) -> None:
    runner, expected = make_runner(random_files(**VARIANTS[variant]), make_model=MODELS[model])
    close(runner.forward([SequenceSlice(TOKENS, 0, range(5, 15), "all")]), expected)


@pytest.mark.parametrize("model", ["default", "kernels"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chunk", [1, 2, 7, 16, 64])
def test_any_chunk_size(random_files: Any, variant: str, chunk: int, model: str) -> None:
    runner, expected = make_runner(random_files(**VARIANTS[variant]), make_model=MODELS[model])
    blocks = [9, 4, 30, 2, 17, 50, 1]
    parts = [runner.forward([SequenceSlice(TOKENS[at : at + chunk], at, blocks, "all")]) for at in range(0, len(TOKENS), chunk)]
    close(torch.cat(parts), expected)


@pytest.mark.parametrize("block_tokens", [2, 4, 6, 16, 32])
def test_any_block_size(random_files: Any, block_tokens: int) -> None:
    runner, expected = make_runner(random_files(), block_tokens=block_tokens)
    runner.forward([SequenceSlice(TOKENS[:50], 0, range(59, 0, -1), "none")])
    close(runner.forward([SequenceSlice(TOKENS[50:51], 50, range(59, 0, -1))]), expected[50:51])
    close(runner.forward([SequenceSlice(TOKENS[51:60], 51, range(59, 0, -1))]), expected[59:60])


def test_prompts_and_single_tokens_in_one_batch(random_files: Any) -> None:
    runner, expected = make_runner(random_files())
    runner.forward([SequenceSlice(TOKENS[:33], 0, [3, 1, 2], "none"), SequenceSlice(TOKENS[:9], 0, [10], "none")])
    logits = runner.forward(
        [
            SequenceSlice(TOKENS[33:34], 33, [3, 1, 2]),
            SequenceSlice(TOKENS[:40], 0, [20, 21, 22], "all"),
            SequenceSlice(TOKENS[9:10], 9, [10], "none"),
            SequenceSlice(TOKENS[:1], 0, [30]),
            SequenceSlice(TOKENS[:12], 0, [31], "last"),
        ]
    )
    close(logits, torch.cat((expected[33:34], expected[:40], expected[:1], expected[11:12])))


def test_blocks_of_a_cached_prefix(random_files: Any) -> None:
    runner, expected = make_runner(random_files())
    runner.forward([SequenceSlice(TOKENS[:32], 0, [7, 8], "none")])
    close(runner.forward([SequenceSlice(TOKENS[32:], 32, [7, 8, 11, 12, 13, 14], "all")]), expected[32:])


def test_long_sequences_are_split_without_a_seam(random_files: Any) -> None:
    runner, _ = make_runner(random_files(max_position_embeddings=2048), block_tokens=32)
    tokens = (TOKENS * 20)[:1300]
    blocks = list(range(50, 0, -1))
    at_once = runner.forward([SequenceSlice(tokens, 0, blocks, "last")])
    runner.forward([SequenceSlice(tokens[:-1], 0, blocks, "none")])
    alone = runner.forward([SequenceSlice(tokens[-1:], 1299, blocks)])
    close(alone, at_once.double())


def test_a_row_alone_or_among_others_has_equal_attention(random_files: Any) -> None:
    runner, expected = make_runner(random_files())
    runner.forward([SequenceSlice(TOKENS[:33], 0, [3, 1, 2], "none")])
    among = [SequenceSlice(TOKENS[33:34], 33, [3, 1, 2])] + [SequenceSlice([5], 0, [20 + index]) for index in range(15)]
    close(runner.forward(among)[:1], expected[33:34])


def test_no_logits_asked_for(random_files: Any) -> None:
    runner, _ = make_runner(random_files())
    assert runner.forward([SequenceSlice(TOKENS[:3], 0, [1], "none")]).shape == (0, 128)


def test_logits_are_the_callers_to_keep(random_files: Any) -> None:
    runner, expected = make_runner(random_files())
    first = runner.forward([SequenceSlice(TOKENS[:1], 0, [1])])
    runner.forward([SequenceSlice(TOKENS[1:2], 1, [1])])
    close(first, expected[:1])


@pytest.mark.parametrize("chunk", [1, 45])
def test_bfloat16_stays_near(random_files: Any, chunk: int) -> None:
    runner, expected = make_runner(random_files(), dtype="bfloat16")
    assert (runner.kv_dtype, runner.weight_format) == ("bfloat16", "bf16")
    parts = [runner.forward([SequenceSlice(TOKENS[at : at + chunk], at, range(6), "all")]) for at in range(0, len(TOKENS), chunk)]
    close(torch.cat(parts), expected, tolerance=0.03)


def test_a_runner_that_is_told_nothing_takes_bf16(random_files: Any, tmp_path: Path) -> None:
    runner = ModelRunner.load(random_files(), RunnerSettings("decode", threads=2, cache_directory=tmp_path))
    assert (runner.weight_format, runner.kv_dtype) == ("bf16", "bfloat16")
    told = ModelRunner.load(random_files(), RunnerSettings("decode", weights="fp32", threads=2, cache_directory=tmp_path))
    assert (told.weight_format, told.weight_format_reason, told.kv_dtype) == ("fp32", "set by --weights", "bfloat16")


@pytest.mark.parametrize(
    "wish, dtype, kept",
    [
        ("auto", "auto", "bfloat16"),
        ("auto", "float32", "float32"),
        ("int8", "float32", "int8"),
        ("float32", "bfloat16", "float32"),
    ],
)
def test_kv_is_kept_as_told_and_else_as_the_model_computes(wish: Any, dtype: Any, kept: str) -> None:
    assert RunnerSettings("decode", dtype=dtype, kv_dtype=wish).told_kv_dtype == kept


@pytest.mark.parametrize("chunk", [1, 45])
def test_int8_kv_stays_near(random_files: Any, tmp_path: Path, chunk: int) -> None:
    def logits(kv_dtype: Any) -> torch.Tensor:
        settings = RunnerSettings("decode", dtype="float32", kv_dtype=kv_dtype, threads=2, cache_directory=cache_directory())
        runner = ModelRunner.load(random_files(), settings)
        config = runner.config
        runner.attach(KvPool.create(KvLayout(config.num_layers, config.num_kv_heads, config.head_dim, 16, runner.kv_dtype), 8))
        parts = [runner.forward([SequenceSlice(TOKENS[at : at + chunk], at, range(6), "all")]) for at in range(0, 90, chunk)]
        return torch.cat(parts)

    close(logits("int8"), logits("float32").double(), tolerance=0.03)


def test_int8_kv_without_the_native_step_is_refused(random_files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = RunnerSettings("decode", kv_dtype="int8", threads=2, cache_directory=cache_directory())
    with pytest.raises(UnsupportedModelError, match=r"--kv-dtype int8 needs the native step.*24.*take bfloat16"):
        ModelRunner.load(random_files(head_dim=24), settings)
    monkeypatch.setattr("llm.runner.native_library", lambda directory: None)
    with pytest.raises(UnsupportedModelError, match="--kv-dtype int8: there are no kernels for it here"):
        ModelRunner.load(random_files(), settings)


def test_warm_up_reports_its_way(random_files: Any, tmp_path: Path) -> None:
    seen: list[tuple[float, str]] = []
    runner = ModelRunner.load(random_files(), RunnerSettings("prefill", dtype="float32", threads=2, cache_directory=tmp_path))
    runner.attach(KvPool.create(KvLayout(2, 2, 16, 16, "float32"), 8))
    runner.warm_up(lambda fraction, text: seen.append((fraction, text)))
    assert seen[0] == (0.0, "preparing kernels")
    assert seen[-1] == (1.0, "ready")


def test_an_unattached_runner_says_so(random_files: Any, tmp_path: Path) -> None:
    runner = ModelRunner.load(random_files(), RunnerSettings("decode", dtype="float32", threads=2, cache_directory=tmp_path))
    with pytest.raises(AssertionError, match="attach a pool"):
        runner.forward([SequenceSlice([1], 0, [0])])
