# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: PLR0917
"""Rows of the embedding table for token ids that come from the host, or from the step before without a visit to the host."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llm.ops.gpu.dependent_launch import dependent_launch, wait_for_inputs


@triton.jit
def _embed_kernel(table_ptr, ids_ptr, sources_ptr, drawn_ptr, out_ptr, width, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    wait_for_inputs(EARLY)
    source = tl.load(sources_ptr + row)
    token = tl.load(ids_ptr + row).to(tl.int64)
    drawn = tl.load(drawn_ptr + tl.maximum(source, 0)).to(tl.int64)
    token = tl.where(source >= 0, drawn, token)
    values = tl.load(table_ptr + token * width + columns, mask=inside, other=0.0)
    tl.store(out_ptr + row * width + columns, values.to(out_ptr.dtype.element_ty), mask=inside)


def embed(table: torch.Tensor, token_ids: torch.Tensor, sources: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """table [vocab, d]; token_ids, sources [n] int32; drawn [m] int32 -> [n, d].

    Row i is that of token drawn[sources[i]] where sources[i] >= 0, and of token_ids[i] elsewhere.
    """
    rows, width = token_ids.shape[0], table.shape[1]
    out = torch.empty(rows, width, dtype=table.dtype, device=table.device)
    block = min(2048, triton.next_power_of_2(width))
    if rows:
        _embed_kernel[(rows, triton.cdiv(width, block))](
            table, token_ids, sources, drawn, out, width, BLOCK=block, num_warps=4, **dependent_launch()
        )
    return out


def embed_reference(table: torch.Tensor, token_ids: torch.Tensor, sources: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """The same in torch."""
    return table[torch.where(sources >= 0, drawn[sources.clamp(min=0).long()], token_ids).long()]
