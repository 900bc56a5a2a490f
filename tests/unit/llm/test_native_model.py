"""The native step against the model of torch operations: odd shapes, mixed batches, every instruction set that runs here."""

import contextlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm.batch import Batch, SequenceSlice, build_batch
from llm.config import ModelConfig
from llm.kv.pool import blocks_in
from llm.model import Model
from llm.ops.cpu.native import library
from llm.ops.cpu.native.model import NativeModel, refusal
from llm.ops.cpu.native.seats import Seats
from llm.ops.operations import TorchOperations
from llm.weights_plan import ROPE, plan_tensors
from tandem.models import cache_directory
from tests.fakes import int8_kv

pytestmark = pytest.mark.skipif(library.compiler() is None, reason="no C++ compiler")

SETS = library.supported_sets()
BLOCKS = 80
TINY = 4
"""A norm over fewer values has rows of next to nothing now and then, where a rounding before it is larger than the tolerance."""


def make_config(**changes: Any) -> ModelConfig:
    shape = {"num_layers": 2, "hidden_size": 40, "intermediate_size": 56, "num_heads": 3, "num_kv_heads": 1, "head_dim": 16}
    return ModelConfig(**({"architecture": "llama", "vocab_size": 70, "context_tokens": 2048, **shape} | changes))


def make_tensors(config: ModelConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    def make(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape).mul(0.2).to(dtype) if len(shape) == 2 else torch.rand(shape) + 0.5

    tensors = {item.name: make(item.shape) for item in plan_tensors(config)}
    return tensors | {ROPE: torch.rand(config.head_dim // 2)}


def make_batch(sequences: Sequence[tuple[int, int, str]], block_tokens: int) -> Batch:
    """(start, new tokens, logits) of each sequence, over scattered blocks."""
    order = torch.randperm(BLOCKS).tolist()
    slices = []
    for start, count, logits in sequences:
        blocks = [order.pop() for _ in range(-(-(start + count) // block_tokens))]
        slices.append(SequenceSlice(torch.randint(70, (count,)).tolist(), start, blocks, logits))  # type: ignore[arg-type]
    return build_batch(slices, block_tokens)


def make_pool(config: ModelConfig, block_tokens: int, dtype: torch.dtype) -> torch.Tensor:
    pool = torch.randn(BLOCKS, config.num_layers, 2, config.num_kv_heads, block_tokens, config.head_dim)
    if dtype != torch.int8:
        return pool.to(dtype)
    layout = int8_kv.layout_of(pool)
    kept = blocks_in(torch.zeros(BLOCKS * layout.block_bytes, dtype=torch.uint8), layout)
    int8_kv.store(kept, (), pool)
    return kept


def check(
    config: ModelConfig, batch: Batch, dtype: torch.dtype, *, block_tokens: int = 16, threads: int = 2, name: str = SETS[-1]
) -> None:
    """`dtype` of the pool; weights are float32 where it is int8."""
    tensors = make_tensors(config, torch.float32 if dtype == torch.int8 else dtype)
    pool, expected_pool = (make_pool(config, block_tokens, dtype) for _ in range(2))
    expected_pool.copy_(pool)
    untouched = pool.clone()
    operations = int8_kv.Int8KvOperations() if dtype == torch.int8 else TorchOperations()
    expected = Model(config, tensors, operations).forward(batch, expected_pool)
    actual = NativeModel(config, tensors, library.load(cache_directory(), name), threads).forward(batch, pool)
    assert actual.shape == expected.shape
    unsure = 0.0
    if config.hidden_size < TINY and dtype == torch.float32 and expected.numel():
        unsure = float((Model(config, _nudged(tensors), operations).forward(batch, untouched) - expected).abs().max())
    close(actual, expected, 2e-5 if dtype == torch.float32 else 3e-2, unsure)
    close(_floats(pool), _floats(expected_pool), 2e-5 if dtype == torch.float32 else 3e-2)


def _floats(pool: torch.Tensor) -> torch.Tensor:
    return int8_kv.widened(pool) if pool.dtype == torch.int8 else pool.float()


def _nudged(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each number off by a rounding."""
    return {name: tensor * (1 + 2**-23 * (torch.randint(3, tensor.shape) - 1)) for name, tensor in tensors.items()}


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, unsure: float = 0.0) -> None:
    """`unsure` is how far the expected values themselves move for a rounding of what they come from."""
    if expected.numel():
        assert (actual - expected).abs().max() <= tolerance * expected.abs().max() + 4 * unsure


SEQUENCES = st.tuples(st.integers(0, 130), st.integers(1, 70) | st.just(1), st.sampled_from(["none", "last", "all"]))


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_odd_shapes(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    kv_heads = data.draw(st.integers(1, 3))
    config = make_config(
        num_layers=data.draw(st.integers(1, 3)),
        hidden_size=data.draw(st.integers(1, 70)),
        intermediate_size=data.draw(st.integers(1, 110)),
        num_kv_heads=kv_heads,
        num_heads=kv_heads * data.draw(st.integers(1, 5)),
        head_dim=data.draw(st.sampled_from([16, 32, 48, 64, 80])),
        tie_embeddings=data.draw(st.booleans()),
        attention_bias=data.draw(st.booleans()),
        qk_norm=data.draw(st.booleans()),
    )
    block_tokens = data.draw(st.sampled_from([1, 4, 7, 16]))
    sequences = data.draw(st.lists(SEQUENCES, min_size=1, max_size=BLOCKS * block_tokens // 201 or 1))
    if block_tokens == 1:
        sequences = [(min(sequences[0][0], 40), min(sequences[0][1], 30), sequences[0][2])]
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int8]))
    batch = make_batch(sequences, block_tokens)
    threads, name = data.draw(st.integers(1, 3)), data.draw(st.sampled_from(SETS))
    check(config, batch, dtype, block_tokens=block_tokens, threads=threads, name=name)


MIXED = [(0, 1, "last"), (300, 1, "last"), (511, 1, "none"), (40, 90, "last"), (0, 5, "all")]


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_mixed_batch(name: str, threads: int, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    config = make_config(hidden_size=96, intermediate_size=200, num_heads=9, num_kv_heads=3, head_dim=64)
    check(config, make_batch(MIXED, 16), dtype, threads=threads, name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("sequences", [[(1000, 200, "last")], [(0, 700, "none")], [(700, 1, "last")] * 1, [(30, 1, "last")] * 20])
def test_long_and_many(sequences: list[tuple[int, int, str]], dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    check(make_config(num_heads=4, num_kv_heads=2, head_dim=32), make_batch(sequences, 16), dtype)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_row_is_the_same_to_the_bit_alone_and_among_others(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    config = make_config(hidden_size=100, intermediate_size=203, num_heads=6, num_kv_heads=2, head_dim=32)
    weights = torch.float32 if dtype == torch.int8 else dtype
    model = NativeModel(config, make_tensors(config, weights), library.load(cache_directory(), name), 2)
    pool = make_pool(config, 16, dtype)
    row = SequenceSlice([9], 600, list(range(38)))
    others = [SequenceSlice([5], 2 * index - 1, [38 + index, 54 + index]) for index in range(1, 17)]
    alone = model.forward(build_batch([row], 16), pool)
    for count in (1, 2, 3, 12, 16):
        assert torch.equal(model.forward(build_batch([*others[: count - 1], row, others[-1]], 16), pool)[count - 1 : count], alone)
    chunk = SequenceSlice([3] * 70, 0, list(range(71, 76)), "none")
    assert torch.equal(model.forward(build_batch([row, chunk], 16), pool), alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_a_prompt_is_the_same_to_the_bit_in_any_chunks(dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    config = make_config(num_heads=4, num_kv_heads=2, head_dim=32)
    model = NativeModel(config, make_tensors(config, torch.float32), library.load(cache_directory()), 2)
    tokens, pool = torch.randint(70, (600,)).tolist(), make_pool(config, 16, dtype)
    whole = model.forward(build_batch([SequenceSlice(tokens, 0, range(38), "last")], 16), pool)
    kept = pool.clone()
    for start, end in [(0, 130), (130, 520), (520, 600)]:
        parts = model.forward(build_batch([SequenceSlice(tokens[start:end], start, range(38), "last")], 16), pool)
    assert torch.equal(parts, whole)
    assert torch.equal(pool, kept)


def test_a_step_gives_cores_away_in_its_middle_and_stays_the_same_to_the_bit(tmp_path: Path) -> None:
    config, native = make_config(num_layers=3), library.load(cache_directory())
    mine, theirs = (Seats(native, tmp_path / "seats", 2) for _ in range(2))
    model, shares = NativeModel(config, make_tensors(config, torch.float32), native, 2, mine), []
    batch, pool = make_batch([(0, 200, "last")], 16), make_pool(config, 16, torch.float32)
    alone = model.forward(batch, pool)
    with contextlib.ExitStack() as beside:

        def layer_done() -> None:
            shares.append(mine.share())
            if len(shares) == 1:
                beside.enter_context(theirs.taken())

        model.layer_done = layer_done
        assert torch.equal(model.forward(batch, pool), alone)
    assert shares == [2, 1, 1]


def test_layers_are_told() -> None:
    config = make_config(num_layers=3)
    model, told = NativeModel(config, make_tensors(config, torch.float32), library.load(cache_directory()), 2), []
    model.layer_done = lambda: told.append(1)
    pool = make_pool(config, 16, torch.float32)
    model.forward(make_batch([(0, 1, "last")], 16), pool)
    assert len(told) == 1
    model.forward(make_batch([(0, 200, "last")], 16), pool)
    assert len(told) == 1 + 3


def test_models_that_it_cannot_run_are_refused() -> None:
    def asked(**changes: Any) -> str | None:
        config = make_config(**changes)
        return refusal(config, make_tensors(config, torch.float32))

    assert asked() is None
    assert "24" in str(asked(head_dim=24))


@pytest.mark.parametrize("name", library.INSTRUCTION_SETS)
def test_every_instruction_set_compiles(name: str) -> None:
    assert library.build(cache_directory(), name).exists()


def test_without_a_compiler_it_says_so(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(library.NativeUnavailableError, match="no C\\+\\+ compiler"):
        library.build(tmp_path, "portable")


def test_a_compiler_that_fails_is_quoted(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no such flag >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(library.NativeUnavailableError, match="no such flag"):
        library.build(tmp_path, "portable")
    assert not list((tmp_path / "native").iterdir())


def test_a_cache_that_cannot_be_written_to_is_said(tmp_path: Path) -> None:
    taken = tmp_path / "cache"
    taken.write_text("no directory")
    with pytest.raises(library.NativeUnavailableError, match="could not make"):
        library.build(taken, SETS[-1])


_MANY_THREADS = """
import ctypes, resource, sys
from pathlib import Path
from llm.ops.cpu.native import library, structures
native = library.load(Path(sys.argv[1]))
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
print(native.tandem_create(ctypes.byref(structures.Model()), 200))
"""


def test_threads_that_cannot_be_made_end_no_process() -> None:
    """Each wants memory for a stack, and there is too little."""
    command = (sys.executable, "-c", _MANY_THREADS, str(cache_directory()))
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "None"), done.stderr
