"""The driver calls of a captured step that keep the interpreter.

Each call of torch lets other threads have it, and takes it back when they please: behind an event loop that is in C code, or a
garbage collection, that costs an engine thread milliseconds. None of these calls waits for the device. Handles of the runtime are
the driver's, too.
"""

from __future__ import annotations

import ctypes
import weakref
from functools import cache

import torch

from llm.errors import DeviceError
from llm.kv.copying import Event

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t
_NOT_READY = 600
_PARAMETERS = {
    "cuMemcpyHtoDAsync_v2": (_POINTER, _POINTER, _SIZE, _POINTER),
    "cuMemcpyDtoHAsync_v2": (_POINTER, _POINTER, _SIZE, _POINTER),
    "cuEventRecord": (_POINTER, _POINTER),
    "cuEventQuery": (_POINTER,),
    "cuStreamWaitEvent": (_POINTER, _POINTER, ctypes.c_uint),
    "cuGraphInstantiateWithFlags": (ctypes.POINTER(_POINTER), _POINTER, ctypes.c_ulonglong),
    "cuGraphLaunch": (_POINTER, _POINTER),
    "cuGraphExecDestroy": (_POINTER,),
}


def to_device(onto: torch.Tensor, source: torch.Tensor, num_values: int) -> None:
    """Begins to copy the first values from locked memory, on the current stream."""
    _call("cuMemcpyHtoDAsync_v2", onto.data_ptr(), source.data_ptr(), num_values * source.element_size(), _stream())


def to_host(onto: torch.Tensor, source: torch.Tensor) -> None:
    """Begins to copy all values to locked memory, on the current stream."""
    _call("cuMemcpyDtoHAsync_v2", onto.data_ptr(), source.data_ptr(), source.numel() * source.element_size(), _stream())


def record(event: torch.cuda.Event) -> None:
    """On the current stream. The event must have been recorded by torch before, for that makes it."""
    _call("cuEventRecord", event.cuda_event, _stream())


def wait_for(event: Event) -> None:
    """Has the current stream wait for what was last recorded."""
    _call("cuStreamWaitEvent", _stream(), event.cuda_event, 0)


def passed(event: Event) -> bool:
    """Whether the device has come to what was last recorded."""
    status = _function("cuEventQuery")(event.cuda_event)
    if status not in (0, _NOT_READY):
        raise _refused("cuEventQuery", status)
    return status == 0  # type: ignore[no-any-return]


class QuietGraph:
    """A captured graph, made ready to be launched."""

    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        """`graph` was captured with keep_graph=True; it owns the memory that the launches use."""
        self._graph = graph
        handle = _POINTER()
        _call("cuGraphInstantiateWithFlags", ctypes.byref(handle), graph.raw_cuda_graph(), 0)
        self._handle = handle.value
        weakref.finalize(self, _call, "cuGraphExecDestroy", self._handle).atexit = False

    def replay(self) -> None:
        """Launches it on the current stream."""
        _call("cuGraphLaunch", self._handle, _stream())


def _stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


def _call(name: str, *arguments: object) -> None:
    status = _function(name)(*arguments)
    if status:
        raise _refused(name, status)


def _refused(name: str, status: int) -> DeviceError:
    return DeviceError(f"the GPU's driver refused {name} with status {status}; its log may say why, and the worker must restart")


@cache
def _function(name: str) -> ctypes._NamedFuncPointer:
    function = getattr(_library(), name)
    function.argtypes, function.restype = _PARAMETERS[name], ctypes.c_int
    return function  # type: ignore[no-any-return]


@cache
def _library() -> ctypes.PyDLL:
    return ctypes.PyDLL("libcuda.so.1")
