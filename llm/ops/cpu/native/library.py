"""Compiles the C++ of this folder for this processor, once, and loads it.

Built at the first start like other kernels, so that an installation needs no compiler and one library suits the processor that runs
it; it is kept in the cache directory under a name that tells sources, compiler and instruction set.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent
FLAGS = ("-std=c++20", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-pthread")
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi2")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mprefer-vector-width=512")
INSTRUCTION_SETS = {"portable": (), "avx2": _AVX2, "avx512vnni": _AVX512}
"""Compiler flags of each, worst first. A processor that lacks what the others need gets "portable"."""
_NEEDED = {
    "portable": set[str](),
    "avx2": {"avx2", "fma", "f16c", "bmi2"},
    "avx512vnni": {"avx2", "fma", "f16c", "bmi2", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"},
}
_COMPILE_TIMEOUT_S = 300.0


class NativeUnavailableError(Exception):
    """There is no library; the message says why, for people."""


@cache
def supported_sets() -> tuple[str, ...]:
    """What this processor can run, worst first."""
    flags = set(_processor_flags())
    return tuple(name for name, needed in _NEEDED.items() if needed <= flags)


_loaded: dict[str, ctypes.CDLL] = {}


def load(cache_directory: Path, instruction_set: str | None = None) -> ctypes.CDLL:
    """The library for the best instruction set, or for the one named; compiles it if need be. Raises NativeUnavailableError.

    A process loads each once. Processes that start together should take turns: two that compile at once waste time, nothing else.
    """
    name = instruction_set or supported_sets()[-1]
    if name not in _loaded:
        path = build(cache_directory, name)
        try:
            _loaded[name] = _declare(ctypes.CDLL(str(path)))
        except OSError as error:
            raise NativeUnavailableError(f"{path} cannot be loaded: {error}") from error
    return _loaded[name]


def loaded() -> ctypes.CDLL | None:
    """The library that this process has loaded last, if any."""
    return next(reversed(_loaded.values()), None)


def build(cache_directory: Path, instruction_set: str) -> Path:
    """The library's file, for any instruction set that the compiler knows. Raises NativeUnavailableError."""
    path = cache_directory / "native" / f"{_digest(instruction_set)}-{instruction_set}.so"
    if not path.exists():
        _compile(path, instruction_set)
    return path


def compiler() -> str | None:
    """The C++ compiler: $CXX, else c++, g++ or clang++."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _compile(path: Path, instruction_set: str) -> None:
    program = compiler()
    if program is None:
        raise NativeUnavailableError("no C++ compiler was found (c++, g++, clang++ or $CXX)")
    written = path.with_suffix(f".{os.getpid()}")
    command = [program, *FLAGS, *INSTRUCTION_SETS[instruction_set], str(FOLDER / "library.cpp"), "-o", str(written)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S, check=False)
        if done.returncode:
            raise NativeUnavailableError(f"{' '.join(command)} failed: {done.stderr.strip()[:2000]}")
        with written.open("rb") as file:
            os.fsync(file.fileno())  # else a power cut may leave the name and nothing behind it
        written.replace(path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailableError(f"{program} could not make {path}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            written.unlink(missing_ok=True)


def _digest(instruction_set: str) -> str:
    parts = [compiler() or "", *FLAGS, *INSTRUCTION_SETS[instruction_set], platform.machine()]
    sources = [path.read_bytes() for path in sorted(FOLDER.iterdir()) if path.suffix in {".h", ".cpp"}]
    return hashlib.blake2b(b"\0".join([*(part.encode() for part in parts), *sources]), digest_size=10).hexdigest()


def _processor_flags() -> Iterator[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return
    yield from next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    signatures = {
        "tandem_create": (pointer, [pointer, number]),
        "tandem_destroy": (None, [pointer]),
        "tandem_begin": (number, [pointer, pointer, pointer]),
        "tandem_use_threads": (None, [pointer, number]),
        "tandem_run_layers": (None, [pointer, number, number]),
        "tandem_finish": (None, [pointer, pointer]),
        "tandem_row_bytes": (ctypes.c_int64, [pointer]),
        "tandem_prepare": (None, [pointer, pointer, number, pointer]),
        "tandem_multiply": (number, [pointer, pointer, number, pointer, number, number]),
        "tandem_take_phases": (None, [pointer, pointer]),
        "tandem_weigh": (None, [pointer, number, ctypes.c_float, pointer, pointer]),
        "tandem_open_seats": (pointer, [ctypes.c_char_p]),
        "tandem_close_seats": (None, [pointer]),
        "tandem_take_seat": (number, [pointer]),
        "tandem_leave_seat": (None, [pointer, number]),
        "tandem_count_others": (number, [pointer, number]),
        "tandem_sum_blocks": (None, [pointer, pointer, number, size, pointer, pointer]),
        "tandem_copy_blocks": (None, [pointer, pointer, pointer, pointer, number, size, pointer, pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
