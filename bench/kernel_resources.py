"""What the compiler makes of each kernel for Hopper GPUs (sm_90): `python -m bench.kernel_resources`. Needs Triton, but no GPU.

Registers, spills, shared memory and the instructions of the longest loop decide much of a kernel's speed before it is ever timed;
and a kernel that the interpreter runs may still be one that the compiler refuses.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.options import new_parser
from decode_svc.kernels import paged_attention
from llm.ops.gpu import (
    argmax,
    block_copy,
    checksum,
    draw,
    embed,
    rms_norm,
    rope,
    silu_mul,
    skinny_linear,
    weight_threshold,
    whole_rows,
)
from prefill_svc.kernels import chunk_attention

_TARGET = GPUTarget("cuda", 90, 32)
_TYPES = {
    "x_ptr": "*bf16", "delta_ptr": "*bf16", "weight_ptr": "*bf16", "norm_ptr": "*fp32", "bias_ptr": "*bf16", "out_ptr": "*bf16",
    "qkv_ptr": "*bf16", "pool_ptr": "*bf16", "gate_up_ptr": "*bf16", "table_ptr": "*bf16", "partial_ptr": "*fp32",
    "weights_ptr": "*fp32", "cos_ptr": "*fp32", "sin_ptr": "*fp32", "query_norm_ptr": "*fp32", "key_norm_ptr": "*fp32",
    "logits_ptr": "*fp32", "temperatures_ptr": "*fp32", "top_ps_ptr": "*fp64", "min_ps_ptr": "*fp32", "uniforms_ptr": "*fp64",
    "keys_ptr": "*i64", "data_ptr": "*i64", "sums_ptr": "*i64", "scale": "fp32", "eps": "fp32",
}  # fmt: skip
"""By parameter name; other pointers are to int32, other numbers int32."""
_ALIGNED = ("width", "height", "span", "words")


@dataclass(frozen=True)
class Build:
    """One kernel with the constants of one use. Strides and widths are taken to be multiples of 16, as real models' are."""

    name: str
    kernel: Any
    constants: Mapping[str, Any]
    num_warps: int
    types: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Resources:
    """Per thread and per block; spills are stack bytes of a thread."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    loop: Counter[str]
    """Instructions of the longest loop, by opcode."""


def builds() -> Iterator[Build]:
    """The shapes in use on Llama-3.1-8B, and candidates beside them."""
    yield from _attention()
    yield from _products()
    yield from _whole_rows()
    types = {"weight_ptr": "*fp32", "delta_ptr": "*fp32"}
    yield Build("add_rms_norm, two parts", rms_norm._rms_norm_kernel, {"ADDS": 2, "BLOCK": 4096}, 8, types)
    yield Build("head_norm", rms_norm._head_norm_kernel, {"HEAD_DIM": 128, "BLOCK": 128}, 1)
    yield Build("silu_mul", silu_mul._silu_mul_kernel, {"BLOCK": 2048}, 4)
    yield Build("embed", embed._embed_kernel, {"BLOCK": 2048}, 4)
    rotation = {"HALF": 64, "BLOCK_HALF": 64, "HEADS": 16, "LOOKS_UP": True}
    yield Build("rotate_and_write", rope._rotate_and_write_kernel, rotation, 4)
    yield Build("copy_blocks", block_copy._copy_blocks_kernel, {"FROM_IDS": True, "TO_IDS": True, "BLOCK": 4096}, 8)
    tables = {"table_ptr": "*i64", "out_ptr": "*i64"}
    for name, copies in (("checksum, sums", False), ("checksum, copy and sums", True)):
        constants = {"COPIES": copies, "FROM_IDS": True, "LAST_KEYS": 24, "STRETCHES": 8}
        yield Build(name, checksum._sum_stretches_kernel, constants, 4, tables | {"target_ptr": "*i64"})
    finish = {"SCRAMBLE_KEYS": 32, "MERGE_KEYS": 40, "STARTS": 48, "AHEAD": 32}
    yield Build("checksum, end", checksum._finish_kernel, finish, 1, tables)
    yield Build("argmax", argmax._argmax_kernel, {"PARTS": 32, "BLOCK": 4096}, 8, {"out_ptr": "*i32"})
    yield from _drawing()


def _drawing() -> Iterator[Build]:
    """A vocabulary of 128k tokens, with top_k and top_p."""
    names = ("sums", "first_counts", "first_sums", "counts", "equals", "totals", "kept_equals", "kept_sums")
    types = {f"{name}_ptr": "*i64" for name in names} | {"highest_ptr": "*fp32", "out_ptr": "*i32"}
    shape, scale, low = {"PARTS": 32, "PART": 4096}, {"SCALE": float(1 << 42)}, {"LOW_BITS": 22}
    digits, which = {**shape, **scale, **low, "LANES": 256}, {"KIND": 1, "TOP_K": 0}
    yield Build("draw, weigh", draw._weigh_kernel, digits, 4, types)
    yield Build("draw, narrow", weight_threshold.narrow_kernel, {**digits, **which}, 4, types)
    yield Build("draw, collect", weight_threshold.collect_kernel, {**shape, **low, **which}, 4, types)
    yield Build("draw, settle", weight_threshold.settle_kernel, {**scale, **low, **which, "PARTS": 32, "BISECTED": 1024}, 4, types)
    yield Build("draw, kept", draw._kept_kernel, {"PART": 4096, **scale}, 4, types)
    yield Build("draw, pick", draw._pick_kernel, {**shape, **scale}, 4, types)


def _attention() -> Iterator[Build]:
    model = {"GROUP": 4, "HEAD_DIM": 128, "COLUMNS": 128, "PAGE": 16}
    for rows, tokens, warps, stages in ((128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3), (16, 64, 4, 3)):
        constants = model | {"ROWS": rows, "TOKENS": tokens, "STAGES": stages}
        yield Build(f"chunk_attention {rows}x{tokens}", chunk_attention._chunk_attention_kernel, constants, warps)
    for kept, tokens, stages in ((4, 64, 3), (4, 64, 5), (4, 32, 4), (64, 64, 3)):
        constants = model | {"ROWS": max(16, kept), "KEPT": kept, "TOKENS": tokens, "SPLITS": 8, "STAGES": stages}
        chunk = {"CHUNK": max(1, min(8, 8192 // (kept * 128)))}
        name = f"paged_attention {kept} rows, {tokens} tokens, {stages} stages"
        yield Build(name, paged_attention._paged_attention_kernel, constants | chunk, 4)
    constants = model | {"ROWS": 16, "KEPT": 4, "TOKENS": 64, "STAGES": 3}
    for splits in (8, 32):
        chunk = {"SPLITS": splits, "CHUNK": min(splits, 16)}
        yield Build(f"next_token, {splits} splits", paged_attention._next_token_kernel, constants | chunk, 2)


def _products() -> Iterator[Build]:
    """As in llm.gpu.few_rows."""
    one = {"norm, silu": (4096, 14336), "norm, float32": (4096, 128_256)}
    several = {"plain": (4096, 6144), "parts": (14336, 4096), "silu": (4096, 14336), "float32": (4096, 128_256)}
    for rows, kernel, kinds in (
        (1, skinny_linear._vector_kernel, one),
        (16, skinny_linear._skinny_kernel, several),
        (64, skinny_linear._skinny_kernel, several),
    ):
        for name, (width, height) in kinds.items():
            tile = skinny_linear.choose_tile(rows, width, height, silu_mul="silu" in name)
            flags = {"NORMS": "norm" in name, "ADDS": name == "residual", "SILU": "silu" in name, "BIAS": False, "EVEN": True}
            sizes = {"ROWS": max(16, rows), "OUTPUTS": tile.outputs, "INPUTS": tile.inputs, "STAGES": tile.num_stages}
            types = {"out_ptr": "*fp32"} if name == "parts" or "float32" in name else {}
            yield Build(f"skinny {rows} rows, {name}", kernel, flags | sizes, tile.num_warps, types)


def _whole_rows() -> Iterator[Build]:
    for name, (width, height) in {
        "qkv, norm": (4096, 6144),
        "output, residual": (4096, 4096),
        "down, residual": (14336, 4096),
    }.items():
        whole = whole_rows.choose_whole_rows(width, height, 2)
        assert whole is not None, "in use"
        padded = triton.next_power_of_2(width)
        flags = {"NORMS": "norm" in name, "ADDS": "residual" in name, "BIAS": False, "FULL": padded == width}
        sizes = {"OUTPUTS": whole.outputs, "WIDTH": padded, "STAGES": whole.num_stages}
        yield Build(f"whole rows, {name}", whole_rows._whole_rows_kernel, flags | sizes, whole.num_warps)


def examine(build: Build) -> Resources:
    """Compiles to machine code. Raises triton's CompilationError."""
    build = _as_launched(build)
    names = build.kernel.arg_names
    types = {name: _type_of(name, build) for name in names}
    aligned = [name for name in names if types[name].startswith("*") or name in _ALIGNED or "stride" in name]
    source = ASTSource(
        fn=build.kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in build.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(source, target=_TARGET, options={"num_warps": build.num_warps})
    usage, code = _disassemble(compiled.asm["cubin"])
    used = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    return Resources(int(used["REG"]), int(used["STACK"]), compiled.metadata.shared, _longest_loop(code))


def _as_launched(build: Build) -> Build:
    """With the constants that every launch on a Hopper has."""
    return replace(build, constants=build.constants | {"EARLY": True}) if "EARLY" in build.kernel.arg_names else build


def _type_of(name: str, build: Build) -> str:
    if name in build.constants:
        return "constexpr"
    return build.types.get(name) or _TYPES.get(name) or ("*i32" if name.endswith("_ptr") else "i32")


def _disassemble(cubin: bytes) -> tuple[str, str]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        outputs = [
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True) for flag in ("-res-usage", "-sass")
        ]
    return outputs[0].stdout, outputs[1].stdout


def _longest_loop(code: str) -> Counter[str]:
    """From the target of a backward branch to the branch."""
    found = [(int(line[1], 16), line[2]) for line in re.finditer(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", code)]
    index = {address: place for place, (address, _) in enumerate(found)}
    longest: list[str] = []
    for place, (address, text) in enumerate(found):
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if target and int(target[1], 16) < address and place - index[int(target[1], 16)] > len(longest):
            longest = [words for _, words in found[index[int(target[1], 16)] : place + 1]]
    return Counter(re.sub(r"^@!?U?P\w+ ", "", text).split()[0].split(".")[0] for text in longest)


def main(argv: Sequence[str] | None = None) -> None:
    new_parser("kernel_resources", "What the compiler makes of each GPU kernel for Hopper (sm_90); needs no GPU.").parse_args(argv)
    table = Table(title="kernels for sm_90")
    for heading in ("kernel", "warps", "registers", "spilled bytes", "shared bytes", "loop", "of which"):
        table.add_column(heading, justify="left" if heading in ("kernel", "of which") else "right")
    for build in builds():
        found = examine(build)
        shown = {code: found.loop[code] for code in ("HGMMA", "HMMA", "LDGSTS", "LDG", "BAR", "MUFU") if found.loop[code]}
        numbers = (build.num_warps, found.registers, found.spill_bytes, found.shared_bytes, sum(found.loop.values()))
        table.add_row(build.name, *map(str, numbers), " ".join(f"{code} {count}" for code, count in shown.items()))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
