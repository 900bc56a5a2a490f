"""The timed C++ of bench.cpu_kernels, and made-up weights for it."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llm.ops.cpu.native import library, structures
from llm.ops.cpu.packed import aligned, int4_shapes, int8_shapes

FORMATS = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8", "int4": "int4", "w4a8": "w4a8"}
_READ_BYTES = 400 << 20
_SECONDS = 0.5


class Layers:
    """Matrices [outputs, inputs] of one format with random contents; only their sizes matter."""

    def __init__(self, format: str, shapes: Sequence[tuple[int, int]]) -> None:
        self.format, self.shapes = format, shapes
        self._arrays = [_random_arrays(format, shape) for shape in shapes]
        self.num_bytes = sum(array.nbytes for arrays in self._arrays for array in arrays)
        self.multiply_adds = sum(outputs * depth for outputs, depth in shapes)

    def matrices(self) -> ctypes.Array[structures.Matrix]:
        number = structures.FORMATS[FORMATS[self.format]]
        made = (structures.Matrix * len(self.shapes))()
        for place, ((outputs, depth), arrays) in enumerate(zip(self.shapes, self._arrays, strict=True)):
            scales = arrays[1].ctypes.data if len(arrays) > 1 else None
            made[place] = structures.Matrix(number, outputs, depth, values=arrays[0].ctypes.data, scales=scales)
        return made


class Kernels:
    """Timed calls, on `threads` threads."""

    def __init__(self, threads: int, instruction_set: str | None) -> None:
        name = instruction_set or library.supported_sets()[-1]
        self._threads, self._library = threads, _compiled(name)
        memory = np.ones(_READ_BYTES // 4, np.float32)
        self.read_rate: float = self._library.bench_read(memory.ctypes.data, _READ_BYTES, threads)
        ceilings = ", ".join(f"{format} {2e-9 * self.ceiling(format):.0f} GOP/s" for format in FORMATS)
        self.description = f"{name}, {threads} threads: reads {1e-9 * self.read_rate:.1f} GB/s; inner loops: {ceilings}"

    @cache  # noqa: B019
    def ceiling(self, format: str) -> float:
        """Multiply-adds a second of the format's inner loop; bf16 is computed in float32."""
        return float(self._library.bench_ceiling(structures.FORMATS[FORMATS[format]], self._threads))

    def seconds(self, layers: Layers, rows: int) -> float:
        matrices = layers.matrices()
        made = {depth: self._prepared(layers, depth, rows) for _, depth in layers.shapes}
        inputs = (ctypes.c_void_p * len(matrices))(*(made[depth].ctypes.data for _, depth in layers.shapes))
        out = np.empty(rows * max(outputs for outputs, _ in layers.shapes), np.float32)
        return float(self._library.bench_products(matrices, len(matrices), inputs, rows, out.ctypes.data, self._threads, _SECONDS))

    def prepare_seconds(self, layers: Layers, rows: int) -> float:
        """All inputs made ready, on one thread."""
        each = {depth: self._prepare(layers, depth, rows, 0.05)[1] for _, depth in layers.shapes}
        return sum(each[depth] for _, depth in layers.shapes)

    def _prepared(self, layers: Layers, depth: int, rows: int) -> npt.NDArray[np.uint8]:
        return self._prepare(layers, depth, rows, 0.0)[0]

    def _prepare(self, layers: Layers, depth: int, rows: int, budget_s: float) -> tuple[npt.NDArray[np.uint8], float]:
        index = next(place for place, shape in enumerate(layers.shapes) if shape[1] == depth)
        matrix = layers.matrices()[index]
        x = np.random.default_rng(depth).standard_normal((rows, depth)).astype(np.float32)
        made = aligned(np.zeros(rows * self._library.bench_row_bytes(ctypes.byref(matrix)), np.uint8))
        return made, self._library.bench_prepare(ctypes.byref(matrix), x.ctypes.data, rows, made.ctypes.data, budget_s)


def _random_arrays(format: str, shape: tuple[int, int]) -> list[npt.NDArray[np.generic]]:
    random = np.random.default_rng(shape[0])
    if format in {"int8", "int4", "w4a8"}:
        sizes = (int8_shapes if format == "int8" else int4_shapes)(shape)
        values = aligned(random.integers(0, 256, sizes["values"][0], np.uint8))
        return [values, np.full(sizes["scales"][0], 0.01, np.float16)]
    weight = random.standard_normal(shape, np.float32)
    return [weight if format == "fp32" else aligned((weight.view(np.uint32) >> 16).astype(np.uint16))]


def _compiled(instruction_set: str) -> ctypes.CDLL:
    program = library.compiler()
    if program is None:
        raise SystemExit("no C++ compiler was found (c++, g++, clang++ or $CXX)")
    source = Path(__file__).with_name("cpu_kernels.cpp")
    with tempfile.TemporaryDirectory() as directory:
        made = Path(directory) / "cpu_kernels.so"
        flags = [*library.FLAGS, *library.INSTRUCTION_SETS[instruction_set], f"-I{library.FOLDER}"]
        subprocess.run([program, *flags, str(source), "-o", str(made)], check=True)
        loaded = ctypes.CDLL(str(made))
    return _declare(loaded)


def _declare(loaded: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_double
    loaded.bench_products.argtypes = [pointer, number, pointer, number, pointer, number, real]
    loaded.bench_prepare.argtypes = [pointer, pointer, number, pointer, real]
    loaded.bench_row_bytes.argtypes, loaded.bench_row_bytes.restype = [pointer], ctypes.c_int64
    loaded.bench_ceiling.argtypes = [number, number]
    loaded.bench_read.argtypes = [pointer, ctypes.c_int64, number]
    for name in ("bench_products", "bench_prepare", "bench_ceiling", "bench_read"):
        getattr(loaded, name).restype = real
    return loaded
