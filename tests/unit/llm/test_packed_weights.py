"""Which matrix is packed how, and that a file's own four-bit numbers are kept."""

import contextlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from llm.batch import SequenceSlice
from llm.config import load_model_config
from llm.kv.layout import KvLayout
from llm.kv.pool import KvPool
from llm.ops.cpu import packed
from llm.runner import ModelRunner, RunnerSettings
from llm.weight_format import WeightFormat
from llm.weights import WeightRequest, load_tensors
from llm.weights_gguf import GgufSource
from llm.weights_packed import packed_format
from tests.unit.llm.conftest import Files, tiny_config
from tests.unit.llm.test_weights import checkpoint, write_directory, write_gguf

FOUR_BITS: tuple[WeightFormat, ...] = ("int4", "w4a8")
MATRICES = {"layers.0.qkv": (128, 64), "layers.1.output": (64, 64), "layers.1.gate_up": (192, 64), "layers.0.down": (64, 96)}


def load(files: Files, cache: Path, format: Any) -> dict[str, torch.Tensor]:
    config = load_model_config(files.format, files.path, files.random_config)
    return load_tensors(WeightRequest(files, config, format, "cpu", cache), lambda *_: None)


def widened(tensors: dict[str, torch.Tensor], name: str, shape: tuple[int, int]) -> torch.Tensor:
    parts = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
    kind = packed.PackedInt4 if packed_format(tensors, name) == "int4" else packed.PackedInt8
    return torch.from_numpy(kind.from_arrays(shape, {part: tensor.numpy() for part, tensor in parts.items()}).widened())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("format", "tolerance"), [("int8", 0.005), ("int4", 0.07)])
def test_matrices_are_packed_and_the_embedding_is_looked_up(tmp_path: Path, format: str, tolerance: float, tied: bool) -> None:
    config = tiny_config(tie_word_embeddings=tied)
    source = checkpoint(config)
    files = write_directory(tmp_path, config, source)
    exact, tensors = load(files, tmp_path / "cache", "fp32"), load(files, tmp_path / "cache", format)
    assert tensors["embedding"].dtype == torch.bfloat16 and tensors["layers.0.ffn_norm"].dtype == torch.float32
    head = exact["embedding" if tied else "head"]
    for name, matrix in [("head", head), *((name, exact[name]) for name in MATRICES)]:
        assert packed_format(tensors, name) == ("int8" if name == "head" else format)
        assert name not in tensors
        found = widened(tensors, name, tuple(matrix.shape))
        assert (found - matrix).abs().max() <= tolerance * matrix.abs().max()


def test_parts_are_mapped_at_cache_lines(tmp_path: Path) -> None:
    files = write_directory(tmp_path, tiny_config(), checkpoint(tiny_config()))
    tensors = load(files, tmp_path / "cache", "int4")
    assert all(tensor.data_ptr() % 64 == 0 for name, tensor in tensors.items() if name.endswith(".values"))


@pytest.mark.parametrize(
    ("kind", "format"),
    [
        (gguf.GGMLQuantizationType.Q4_0, "int4"),
        (gguf.GGMLQuantizationType.Q4_1, "int4"),
        (gguf.GGMLQuantizationType.Q8_0, "int8"),
    ],
)
def test_a_files_own_integers_are_kept(tmp_path: Path, kind: Any, format: str) -> None:
    """The packed matrix is the dequantised one, up to the last bit of a sum."""
    config = tiny_config()
    files = write_gguf(tmp_path / "model.gguf", config, checkpoint(config), kind)
    exact, tensors = load(files, tmp_path / "cache", "fp32"), load(files, tmp_path / "cache", format)
    for name, shape in MATRICES.items():
        assert packed_format(tensors, name) == format
        assert (widened(tensors, name, shape) - exact[name]).abs().max() <= 1e-6 * exact[name].abs().max()
    if format == "int8":
        assert torch.equal(widened(tensors, "head", (128, 64)), exact["embedding"])


def test_blocks_of_other_types_are_left_to_the_packing(tmp_path: Path) -> None:
    from llm.gguf_file import open_gguf

    config = tiny_config()
    files = write_gguf(tmp_path / "model.gguf", config, checkpoint(config), gguf.GGMLQuantizationType.Q5_1)
    assert files.path is not None
    source = GgufSource(open_gguf(files.path), load_model_config("gguf", files.path, None))
    assert source.read_blocks("layers.0.q") is None and source.read_blocks("norm") is None
    assert packed_format(load(files, tmp_path / "cache", "int4"), "layers.0.down") == "int4"


def test_what_suits_no_group_of_32_has_eight_bits(tmp_path: Path) -> None:
    config = tiny_config(intermediate_size=80)
    tensors = load(Files("random:odd", "random", random_config=config), tmp_path, "int4")
    assert packed_format(tensors, "layers.0.down") == "int8"
    assert packed_format(tensors, "layers.0.gate_up") == "int4"
    assert np.isfinite(widened(tensors, "layers.0.down", (64, 80)).numpy()).all()


def test_a_change_of_the_packing_makes_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_directory(tmp_path, tiny_config(), checkpoint(tiny_config()))
    load(files, tmp_path / "cache", "int8")
    monkeypatch.setattr("llm.weights.packing_version", lambda: "another")
    load(files, tmp_path / "cache", "int8")
    assert len(list((tmp_path / "cache" / "converted").glob("*-int8-*.safetensors"))) == 2


def test_rows_in_bytes_take_the_converted_file_of_int4_and_are_the_same_in_every_batch(tmp_path: Path) -> None:
    files = write_directory(tmp_path, tiny_config(), checkpoint(tiny_config()))
    runners = [
        ModelRunner.load(files, RunnerSettings("decode", weights=format, cache_directory=tmp_path / "cache"))
        for format in FOUR_BITS
    ]
    assert len(list((tmp_path / "cache" / "converted").glob("*.safetensors"))) == 1
    config = runners[0].config
    layout = KvLayout(config.num_layers, config.num_kv_heads, config.head_dim, 16, "float32")
    found: dict[str, list[torch.Tensor]] = {}
    for format, runner in zip(FOUR_BITS, runners, strict=True):
        with contextlib.closing(KvPool.create(layout, 12)) as pool:
            runner.attach(pool)
            slices = [SequenceSlice([number + 1], 0, [number], "all") for number in range(12)]
            found[format] = [runner.forward(slices), torch.cat([runner.forward([each]) for each in slices])]
    assert torch.equal(*found["w4a8"])
    assert 0 < (found["w4a8"][0] - found["int4"][0]).abs().max() < 0.1 * found["int4"][0].abs().max()
