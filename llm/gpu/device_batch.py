"""A batch whose index arrays lie on the device, brought there in one copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from llm.batch import Batch, Integers
from llm.gpu.tiles import Tiles, cut_tiles, whole_rows

PER_ROW = ("token_ids", "sources", "positions", "row_blocks", "row_offsets", "logits_rows")
PER_TILE = ("tile_sequences", "tile_rows", "tile_counts", "tile_positions")


@dataclass(frozen=True)
class DeviceBatch(Batch):
    """The arrays on the host describe the same tokens; operations on the device read `on_device` and `tiles` only."""

    on_device: Mapping[str, torch.Tensor]
    """int32 by name: those of PER_ROW, and `drawn`, the tokens that the step before has drawn."""
    tiles: Tiles

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:  # type: ignore[override]
        return self.on_device


def host_arrays(
    batch: Batch, sources: Sequence[int] | None, tile_tokens: int, whole: Integers | None = None
) -> dict[str, Integers]:
    """All that a device needs of a batch, `block_ids` last; `sources` as in llm.ops.gpu.embed, the rest as in `cut_tiles`."""
    rows = len(batch.token_ids)
    arrays: dict[str, Integers] = {
        "token_ids": batch.token_ids.astype(np.int32),
        "sources": np.full(rows, -1, np.int32) if sources is None else np.asarray(sources, np.int32),
        "positions": batch.positions,
        "row_blocks": batch.row_blocks,
        "row_offsets": batch.row_offsets,
        "logits_rows": batch.logits_rows.astype(np.int32),
    }
    return arrays | cut_tiles(batch, tile_tokens, whole) | {"block_starts": batch.block_starts, "block_ids": batch.block_ids}


def make_device_batch(
    batch: Batch, tensors: Mapping[str, torch.Tensor], drawn: torch.Tensor, max_count: int, whole: Integers | None = None
) -> DeviceBatch:
    """Views of tensors that are on the device already, by the names of `host_arrays`."""
    tiles = Tiles(
        sequences=tensors["tile_sequences"],
        rows=tensors["tile_rows"],
        counts=tensors["tile_counts"],
        positions=tensors["tile_positions"],
        block_starts=tensors["block_starts"],
        block_ids=tensors["block_ids"],
        num_tiles=tensors["tile_rows"].shape[0],
        max_count=max_count,
        whole=() if whole is None else whole_rows(batch, whole),
    )
    on_device = {name: tensors[name] for name in PER_ROW} | {"drawn": drawn}
    return DeviceBatch(**{item.name: getattr(batch, item.name) for item in fields(Batch)}, on_device=on_device, tiles=tiles)


def pack(arrays: Sequence[Integers], device: torch.device) -> torch.Tensor:
    """One host tensor of all arrays in order; pinned where that lets the copy run beside the device's work."""
    size = sum(len(array) for array in arrays)
    staged = torch.empty(size, dtype=torch.int32, pin_memory=device.type == "cuda")
    np.concatenate(list(arrays), out=staged.numpy())
    return staged


def upload(arrays: Mapping[str, Integers], device: torch.device) -> dict[str, torch.Tensor]:
    """The arrays as views of one tensor on the device."""
    packed = pack(list(arrays.values()), device).to(device, non_blocking=True)
    starts = np.cumsum([0, *(len(array) for array in arrays.values())]).tolist()
    return {name: packed[start:end] for name, start, end in zip(arrays, starts, starts[1:], strict=False)}
