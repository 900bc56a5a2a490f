"""What torch's own products of a weight format take."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator

import torch

from bench.cpu_kernel_library import Layers

Product = Callable[[torch.Tensor], torch.Tensor]
_SECONDS = 0.4


def torch_best(layers: Layers, rows: int, threads: int) -> str:
    """Milliseconds of the fastest that this torch and processor have, and its name; "-" if there is none."""
    torch.set_num_threads(threads)
    found = []
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, make in _MAKERS[layers.format].items():
            try:
                products = [(make(outputs, depth), torch.randn(rows, depth)) for outputs, depth in layers.shapes]
                found.append((_seconds(products), name))
            except (RuntimeError, AttributeError, NotImplementedError):
                continue  # not in this build of torch, or not for this processor
    return f"{1e3 * min(found)[0]:.2f} {min(found)[1]}" if found else "-"


def _seconds(products: list[tuple[Product, torch.Tensor]]) -> float:
    best, end = float("inf"), time.perf_counter() + _SECONDS
    for run in _until(end):
        start = time.perf_counter()
        for product, x in products:
            product(x)
        best = min(best, time.perf_counter() - start) if run else best
    return best


def _until(end: float) -> Iterator[int]:
    """Run 0 warms up; one more at least is timed."""
    run = 0
    while run < 2 or time.perf_counter() < end:
        yield run
        run += 1


def _float32(outputs: int, depth: int) -> Product:
    weight = torch.randn(outputs, depth)
    return lambda x: torch.nn.functional.linear(x, weight)


def _bfloat16(outputs: int, depth: int) -> Product:
    weight = torch.randn(outputs, depth).bfloat16()
    return lambda x: torch.nn.functional.linear(x.bfloat16(), weight)


def _dynamic_int8(outputs: int, depth: int) -> Product:
    weight = torch.quantize_per_tensor(torch.randn(outputs, depth), 0.02, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(weight, None)
    return lambda x: torch.ops.quantized.linear_dynamic(x, packed)


def _int_mm(outputs: int, depth: int) -> Product:
    """Without quantising x or scaling the result, and only where VNNI makes it worth while."""
    if not torch.cpu._is_vnni_supported():
        raise NotImplementedError
    weight = torch.randint(-127, 128, (outputs, depth), dtype=torch.int8).t()
    return lambda x: torch._int_mm(x.to(torch.int8), weight)


def _grouped_int4(outputs: int, depth: int) -> Product:
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, (outputs, depth), dtype=torch.int32), 2)
    scales = torch.rand(depth // 32, outputs, 2).bfloat16()
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, 32, scales)


_MAKERS: dict[str, dict[str, Callable[[int, int], Product]]] = {
    "fp32": {"F.linear": _float32},
    "bf16": {"F.linear": _bfloat16},
    "int8": {"quantized.linear_dynamic": _dynamic_int8, "_int_mm": _int_mm},
    "int4": {"_weight_int4pack_mm_for_cpu": _grouped_int4},
}
