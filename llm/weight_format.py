"""The formats that weights are held and multiplied in. Needs no torch."""

from typing import Literal

WeightFormat = Literal["fp32", "bf16", "int8", "int4", "w4a8"]
"""`w4a8`: the weights of int4, multiplied with rows in 8 bits instead of 16: faster prompts, predictions change a little."""
WeightWish = Literal["auto", "fp32", "bf16", "int8", "int4", "w4a8"]
"""`auto`: as `dtype` says, and where that is left open too, the fastest that passes the quality check."""
Dtype = Literal["auto", "float32", "bfloat16"]
"""What a whole model computes in: "float32" is exact, weights and KV; the others have bfloat16 KV."""

FORMATS: tuple[WeightFormat, ...] = ("fp32", "bf16", "int8", "int4", "w4a8")
_BY_DTYPE: dict[Dtype, WeightFormat] = {"float32": "fp32", "bfloat16": "bf16"}


def told_format(weights: WeightWish, dtype: Dtype) -> WeightFormat | None:
    """The format that settings name; None leaves it to measurement."""
    return _BY_DTYPE.get(dtype) if weights == "auto" else weights


def has_rows_in_bytes(format: WeightFormat) -> bool:
    """Whether rows are multiplied in 8 bits."""
    return format == "w4a8"


def stored_format(format: WeightFormat) -> WeightFormat:
    """The format whose converted file holds the weights."""
    return "int4" if format == "w4a8" else format
