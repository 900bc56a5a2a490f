# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: PLR0917
"""Copies whole KV blocks between places in one launch: gather for sending, scatter for receiving, or pool to pool.

One copy call per block leaves most of a link unused; one kernel over all of them does not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llm.ops.gpu.compiled import launch

_WORDS = 4096


@triton.jit
def _copy_blocks_kernel(
    source_ptr, target_ptr, source_ids_ptr, target_ids_ptr, words, FROM_IDS: tl.constexpr, TO_IDS: tl.constexpr, BLOCK: tl.constexpr
):
    index = tl.program_id(0)
    source, target = index.to(tl.int64), index.to(tl.int64)
    if FROM_IDS:
        source = tl.load(source_ids_ptr + index).to(tl.int64)
    if TO_IDS:
        target = tl.load(target_ids_ptr + index).to(tl.int64)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = places < words
    values = tl.load(source_ptr + source * words + places, mask=inside, other=0)
    tl.store(target_ptr + target * words + places, values, mask=inside)


def copy_blocks(
    source: torch.Tensor, target: torch.Tensor, source_ids: torch.Tensor | None, target_ids: torch.Tensor | None
) -> None:
    """target[target_ids[i]] = source[source_ids[i]] for all i; ids are [n] int32, None counts up from 0 over the other's length.

    Both tensors are contiguous, of equal shape after the first dimension, blocks of whole 4-byte words; target ids do not repeat.
    """
    ids = source_ids if source_ids is not None else target_ids
    assert ids is not None and source.shape[1:] == target.shape[1:] and source.dtype == target.dtype
    count, words = ids.shape[0], source.stride(0) * source.element_size() // 4
    if count:
        from_ids, to_ids = source_ids is not None, target_ids is not None
        tensors = [
            _words(source),
            _words(target),
            ids if source_ids is None else source_ids,
            ids if target_ids is None else target_ids,
        ]
        launch(_copy_blocks_kernel, (count, triton.cdiv(words, _WORDS)), tensors, (words, from_ids, to_ids, _WORDS), num_warps=8)


def copy_blocks_reference(
    source: torch.Tensor, target: torch.Tensor, source_ids: torch.Tensor | None, target_ids: torch.Tensor | None
) -> None:
    """The same in torch."""
    ids = source_ids if source_ids is not None else target_ids
    assert ids is not None
    counted = torch.arange(ids.shape[0], device=ids.device)
    target[counted if target_ids is None else target_ids.long()] = source[counted if source_ids is None else source_ids.long()]


def _words(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32)
