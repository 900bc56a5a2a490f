"""The C structures of matrix.h, model.h and batch.h. Whoever fills in a pointer keeps its memory alive."""

from __future__ import annotations

from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p

PHASES = ("embed", "norm", "qkv", "rope, KV write", "attention", "prepare", "output", "gate, up, SiLU", "down", "head")
"""In the order of phases.h."""
FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3, "w4a8": 4}
"""Numbers of matrix.h's Format."""


class Matrix(Structure):
    _fields_ = [
        ("format", c_int32),
        ("outputs", c_int32),
        ("depth", c_int32),
        ("unused", c_int32),
        ("values", c_void_p),
        ("scales", c_void_p),
        ("extra", c_void_p),
    ]


class Layer(Structure):
    _fields_ = [
        ("attention_norm", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("qkv_bias", c_void_p),
        ("ffn_norm", c_void_p),
        ("qkv", Matrix),
        ("output", Matrix),
        ("gate_up", Matrix),
        ("down", Matrix),
    ]


class Model(Structure):
    _fields_ = [
        ("num_layers", c_int32),
        ("hidden", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("ffn", c_int32),
        ("eps", c_float),
        ("embedding_format", c_int32),
        ("embedding", c_void_p),
        ("frequencies", c_void_p),
        ("norm", c_void_p),
        ("layers", POINTER(Layer)),
        ("head", Matrix),
    ]


BATCH_ARRAYS = (
    "token_ids",
    "positions",
    "row_blocks",
    "row_offsets",
    "row_starts",
    "lengths",
    "block_ids",
    "block_starts",
    "logits_rows",
)


class Batch(Structure):
    _fields_ = [
        ("num_rows", c_int32),
        ("num_sequences", c_int32),
        ("num_logits", c_int32),
        ("unused", c_int32),
        *((name, c_void_p) for name in BATCH_ARRAYS),
    ]


class Pool(Structure):
    _fields_ = [
        ("format", c_int32),
        ("layers", c_int32),
        ("kv_heads", c_int32),
        ("block_tokens", c_int32),
        ("head_dim", c_int32),
        ("token_bytes", c_int32),
        ("block_bytes", c_int64),
        ("values", c_void_p),
    ]
