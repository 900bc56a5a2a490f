"""Matrices packed for the integer kernels, as plain tensors: NAME.values, NAME.scales and what else the format has.

What the bytes mean is the kernels' affair (llm/ops/cpu/packed.py); here is which matrix gets which format.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from llm.ops.cpu import packed
from llm.weight_format import WeightFormat

GROUP = 32
"""Weights that share a scale in a four-bit format."""


@dataclass(frozen=True)
class FourBitBlocks:
    """A matrix [out, in] as value = scale * nibble + minimum, by groups of 32 along a row."""

    nibbles: npt.NDArray[np.uint8]
    """[out, in], 0 to 15"""
    scales: npt.NDArray[np.float16]
    """[out, in / 32]"""
    minima: npt.NDArray[np.float16]
    """[out, in / 32]"""


@dataclass(frozen=True)
class EightBitBlocks:
    """A matrix [out, in] as value = scale * integer, by groups of 32 along a row."""

    integers: npt.NDArray[np.int8]
    """[out, in]"""
    scales: npt.NDArray[np.float16]
    """[out, in / 32]"""


Blocks = FourBitBlocks | EightBitBlocks


def join_blocks(parts: Sequence[Blocks | None]) -> Blocks | None:
    """Stacked along the rows; None if the parts are not all of one kind."""
    kinds = {type(part) for part in parts}
    if len(kinds) != 1 or parts[0] is None:
        return None
    names = [field.name for field in fields(parts[0])]
    return type(parts[0])(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def packing_version() -> str:
    """Another text whenever the code that packs changes."""
    return hashlib.blake2b(Path(packed.__file__).read_bytes(), digest_size=6).hexdigest()


def pack_matrix(name: str, weight: torch.Tensor, format: WeightFormat, blocks: Blocks | None) -> Iterator[tuple[str, torch.Tensor]]:
    """The parts of `weight` [out, in] float32, from `blocks` unchanged where they are given and suit the format.

    The head takes eight bits at least. A matrix that cannot have the format gets eight bits, else bfloat16 under its own name.
    """
    shape = (int(weight.shape[0]), int(weight.shape[1]))
    if format == "int4" and name != "head" and packed.refusal("int4", shape) is None:
        yield from _parts(name, _pack_four_bits(weight, blocks).arrays())
    elif packed.refusal("int8", shape) is None:
        yield from _parts(name, _pack_eight_bits(weight, blocks).arrays())
    else:
        yield name, weight.to(torch.bfloat16)


def _pack_four_bits(weight: torch.Tensor, blocks: Blocks | None) -> packed.PackedInt4:
    if isinstance(blocks, FourBitBlocks):
        return packed.pack_nibbles(blocks.nibbles, blocks.scales, blocks.minima)
    return packed.pack_int4(weight.numpy())


def _pack_eight_bits(weight: torch.Tensor, blocks: Blocks | None) -> packed.PackedInt8:
    return (
        packed.pack_bytes(blocks.integers, blocks.scales)
        if isinstance(blocks, EightBitBlocks)
        else packed.pack_int8(weight.numpy())
    )


def _parts(name: str, arrays: Mapping[str, npt.NDArray[np.generic]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Copied, so that they begin where torch has its memory begin."""
    for part, array in arrays.items():
        yield f"{name}.{part}", torch.from_numpy(array).clone()


def packed_format(tensors: Mapping[str, torch.Tensor], name: str) -> WeightFormat | None:
    """What a matrix is packed as; None for a plain tensor."""
    if name in tensors:
        return None
    return "int4" if tensors[f"{name}.scales"].dim() == 4 else "int8"
