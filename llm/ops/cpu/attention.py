# mypy: allow-untyped-decorators
# ruff: noqa: PLR0917
"""Attention on CPUs: one kernel for sequences with one new token, one for chunks of new tokens."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from llm.ops.cpu.intrinsics import accumulate, exp, multiply_tile, prefetch, widen

_ZERO, _ONE = np.float32(0), np.float32(1)
SPLIT_TOKENS = 512
"""A sequence is split at fixed places, whatever the batch or the threads, so that its sums never change their order."""
TILE_ROWS = 48
"""Query rows (token times head of a group) computed together in a chunk; a multiple of multiply_tile's 6."""


@numba.njit(fastmath=True, error_model="numpy")
def _score_block(query: Any, head: int, top: int, keys: Any, count: int, scale: Any, scores: Any, start: int) -> None:
    """scores[i, start + t] = scale * query[head + i] . keys[t] for three heads, those beyond `top` repeated."""
    second, third = min(head + 1, top), min(head + 2, top)
    for t in range(0, count, 4):
        u, v, w = min(t + 1, count - 1), min(t + 2, count - 1), min(t + 3, count - 1)
        a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = c0 = c1 = c2 = c3 = _ZERO
        for index in range(keys.shape[1]):
            a, b, c = query[head, index], query[second, index], query[third, index]
            key = widen(keys[t, index])
            a0 += a * key
            b0 += b * key
            c0 += c * key
            key = widen(keys[u, index])
            a1 += a * key
            b1 += b * key
            c1 += c * key
            key = widen(keys[v, index])
            a2 += a * key
            b2 += b * key
            c2 += c * key
            key = widen(keys[w, index])
            a3 += a * key
            b3 += b * key
            c3 += c * key
        d, e, f, g = start + t, start + u, start + v, start + w
        scores[0, d], scores[0, e], scores[0, f], scores[0, g] = a0 * scale, a1 * scale, a2 * scale, a3 * scale
        scores[1, d], scores[1, e], scores[1, f], scores[1, g] = b0 * scale, b1 * scale, b2 * scale, b3 * scale
        scores[2, d], scores[2, e], scores[2, f], scores[2, g] = c0 * scale, c1 * scale, c2 * scale, c3 * scale


@numba.njit(fastmath=True, error_model="numpy")
def _soften(scores: Any, row: int, count: int, padded: int) -> Any:
    """exp(score - highest) in place, zero in the padding; returns the highest score and the sum."""
    highest = scores[row, 0]
    for index in range(1, count):
        highest = max(highest, scores[row, index])
    total = _ZERO
    for index in range(count):
        weight = exp(scores[row, index] - highest)
        scores[row, index] = weight
        total += weight
    for index in range(count, padded):
        scores[row, index] = _ZERO
    return highest, total


@numba.njit(fastmath=True, error_model="numpy")
def _add_block(sums: Any, values: Any, count: int, s: Any, start: int) -> None:
    """sums[i] += s[i, start + t] * values[t] for three heads. Repeated rows meet weights that are zero."""
    for t in range(0, count, 4):
        rows = (t, min(t + 1, count - 1), min(t + 2, count - 1), min(t + 3, count - 1))
        a, b, c, d = start + t, start + t + 1, start + t + 2, start + t + 3
        first = (s[0, a], s[0, b], s[0, c], s[0, d])
        second = (s[1, a], s[1, b], s[1, c], s[1, d])
        accumulate(sums, values, rows, first + second + (s[2, a], s[2, b], s[2, c], s[2, d]))


@numba.njit(parallel=True, fastmath=True, error_model="numpy", cache=True)
def decode_splits(query: Any, pool: Any, layer: int, tasks: Any, block_ids: Any, scores: Any, sums: Any, partial: Any) -> None:
    """Attention of each task: one sequence, one kv head, up to SPLIT_TOKENS tokens; K and V are read where they lie.

    query [n, heads + 2 kv, d], q before k and v. tasks [parts, m, 5] int64: row of query, kv head, first block in block_ids,
    tokens (0: none), row of partial. block_tokens must be a multiple of 4.
    scores [parts, 3, tokens of a split + 4] and sums [parts, 3, d] are scratch.
    partial [rows, group, d + 2] float32: unscaled sums, then the highest score and the sum of weights.
    """
    group, block_tokens, size = query.shape[1] // pool.shape[3] - 2, pool.shape[4], pool.shape[5]
    scale = _ONE / np.sqrt(np.float32(size))
    for part in numba.prange(tasks.shape[0]):
        for task in range(tasks.shape[1]):
            row, kv_head, first = tasks[part, task, 0], tasks[part, task, 1], tasks[part, task, 2]
            count, place = tasks[part, task, 3], tasks[part, task, 4]
            num_blocks = (count + block_tokens - 1) // block_tokens
            if count > 0:
                for head in range(0, group, 3):
                    start = 0
                    for index in range(num_blocks):
                        if index + 1 < num_blocks:
                            following = pool[block_ids[first + index + 1], layer, 0, kv_head]
                            prefetch(following, following.size * following.itemsize)
                        keys = pool[block_ids[first + index], layer, 0, kv_head]
                        have = min(block_tokens, count - start)
                        _score_block(
                            query[row], kv_head * group + head, kv_head * group + group - 1, keys, have, scale, scores[part], start
                        )
                        start += block_tokens
                    padded = num_blocks * block_tokens + 4
                    for index in range(min(3, group - head)):
                        highest, total = _soften(scores[part], index, count, padded)
                        partial[place, head + index, size] = highest
                        partial[place, head + index, size + 1] = total
                    sums[part, :, :] = _ZERO
                    start = 0
                    for index in range(num_blocks):
                        if index + 1 < num_blocks:
                            following = pool[block_ids[first + index + 1], layer, 1, kv_head]
                            prefetch(following, following.size * following.itemsize)
                        values = pool[block_ids[first + index], layer, 1, kv_head]
                        _add_block(sums[part], values, min(block_tokens, count - start), scores[part], start)
                        start += block_tokens
                    for index in range(min(3, group - head)):
                        for column in range(size):
                            partial[place, head + index, column] = sums[part, index, column]


@numba.njit(fastmath=True, error_model="numpy", cache=True)
def combine_splits(partial: Any, places: Any, rows: Any, num_kv_heads: int, out: Any) -> None:
    """Joins the splits of each sequence.

    places [s + 1]: first row of partial of each sequence, kv heads within a split adjacent; rows [s] of out [n, heads, d].
    """
    group, size = partial.shape[1], partial.shape[2] - 2
    for sequence in range(len(rows)):
        for head in range(out.shape[1]):
            kv_head, index = head // group, head % group
            highest = np.float32(-np.inf)
            for place in range(places[sequence] + kv_head, places[sequence + 1], num_kv_heads):
                highest = max(highest, partial[place, index, size])
            total = _ZERO
            for column in range(size):
                out[rows[sequence], head, column] = _ZERO
            for place in range(places[sequence] + kv_head, places[sequence + 1], num_kv_heads):
                factor = exp(partial[place, index, size] - highest)
                total += factor * partial[place, index, size + 1]
                for column in range(size):
                    out[rows[sequence], head, column] += factor * partial[place, index, column]
            for column in range(size):
                out[rows[sequence], head, column] /= total


@numba.njit(parallel=True, fastmath=True, error_model="numpy", cache=True)
def gather_chunk(pool: Any, layer: int, block_ids: Any, length: int, keys: Any, values: Any) -> None:
    """One sequence's K transposed into keys [kv, d, padded], V into values [kv, padded, d], float32; the padding is zeroed."""
    num_kv_heads, block_tokens, size = pool.shape[3], pool.shape[4], pool.shape[5]
    padded = values.shape[1]
    for task in numba.prange(num_kv_heads * ((padded + block_tokens - 1) // block_tokens)):
        head, index = task % num_kv_heads, task // num_kv_heads
        start = index * block_tokens
        for t in range(start, min(start + block_tokens, padded)):
            if t < length:
                block = block_ids[index]
                for column in range(size):
                    keys[head, column, t] = widen(pool[block, layer, 0, head, t - start, column])
                    values[head, t, column] = widen(pool[block, layer, 1, head, t - start, column])
            else:
                for column in range(size):
                    keys[head, column, t] = _ZERO
                    values[head, t, column] = _ZERO


@numba.njit(parallel=True, fastmath=True, error_model="numpy", cache=True)
def attend_chunk(query: Any, start: int, keys: Any, values: Any, scratch: Any, scores: Any, out: Any) -> None:
    """Attention of a chunk that begins at position `start`; keys and values from gather_chunk.

    query [m, heads + 2 kv, d], out [m, heads, d];
    scratch [parts, 2, TILE_ROWS, d] and scores [parts, TILE_ROWS, padded] hold a tile's queries, results and weights.
    """
    num_tokens, num_kv_heads, size = query.shape[0], keys.shape[0], query.shape[2]
    group = out.shape[1] // num_kv_heads
    num_rows, parts = num_tokens * group, scores.shape[0]
    num_tiles = (num_rows + TILE_ROWS - 1) // TILE_ROWS
    scale = _ONE / np.sqrt(np.float32(size))
    for part in numba.prange(parts):
        queries, sums, weights = scratch[part, 0], scratch[part, 1], scores[part]
        for task in range(part, num_tiles * num_kv_heads, parts):
            kv_head, first = task % num_kv_heads, task // num_kv_heads * TILE_ROWS
            used = min(TILE_ROWS, num_rows - first)
            for row in range(used):
                token, head = (first + row) // group, kv_head * group + (first + row) % group
                for column in range(size):
                    queries[row, column] = query[token, head, column] * scale
            length = start + (first + used - 1) // group + 1
            padded = (length + 15) // 16 * 16
            for column in range(0, padded, 16):
                for row in range(0, used, 6):
                    multiply_tile(weights, queries, keys[kv_head], row, column, size)
            for row in range(used):
                _, total = _soften(weights, row, start + (first + row) // group + 1, padded)
                queries[row, 0] = _ONE / total
            for column in range(0, size, 16):
                for row in range(0, used, 6):
                    multiply_tile(sums, weights, values[kv_head], row, column, length)
            for row in range(used):
                token, head = (first + row) // group, kv_head * group + (first + row) % group
                for column in range(size):
                    out[token, head, column] = sums[row, column] * queries[row, 0]
