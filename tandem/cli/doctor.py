"""`tandem doctor`: what this machine can do, and what is missing for the rest."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tandem.cli.devices import TorchReport, cpu_features, torch_report
from tandem.cli.handoff_check import handoff_reports
from tandem.cli.terminal import output
from tandem.cli.versions import DISTRIBUTION, installed
from tandem.cores import num_usable_cores
from tandem.models import ModelError, ModelFiles, NotFetchedError, cache_directory, resolve_model

Mark = Literal["ok", "warn", "missing"]

_STYLES: dict[Mark, tuple[str, str]] = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "missing": ("✗", "red")}
_REQUIRED = (
    *("torch", "numpy", "numba", "safetensors", "tokenizers", "gguf", "huggingface_hub", "jinja2"),
    *("grpcio", "grpcio-health-checking", "grpcio-reflection", "grpcio-status", "protobuf", "msgpack", "uvloop", "xxhash"),
    *("opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-grpc", "psutil", "rich", "typer"),
)
_FOR_GPUS = ("triton", "cupy-cuda13x")
_MIN_FREE_BYTES = 1 << 30
_MIN_MEMORY_BYTES = 4 << 30


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `needed`: without it the suite does not run here."""

    mark: Mark
    subject: str
    detail: str
    needed: bool = False


Section = tuple[str, Callable[[], Iterator[Finding]]]


def run_doctor(model: str, port: int, verify: str | None = None, kv_dtype: str = "auto") -> None:
    """Print all findings; exit status 1 if something needed is missing.

    `verify`: the model to try a hand-off with, of KV in `kv_dtype`.
    """
    console, torch = output(), torch_report()
    sections: Sequence[Section] = (
        ("Devices", lambda: _devices(torch)),
        ("Transports between workers", lambda: _transports(torch)),
        ("Packages", _packages),
        ("Files", lambda: _files(model)),
        ("Network", lambda: _network(port)),
        *([] if verify is None else [(f"Hand-off of {verify}", lambda: _handoff(verify, kv_dtype))]),
    )
    findings = [finding for title, look in sections for finding in _print_section(console, title, list(look()))]
    broken = [finding.subject for finding in findings if finding.mark == "missing" and finding.needed]
    verdict = f"Not ready: {', '.join(broken)}." if broken else "Ready: `tandem up` will run here."
    console.print(Text(f"\n{verdict}", style="bold red" if broken else "bold green"), soft_wrap=True)
    raise SystemExit(1 if broken else 0)


def _print_section(console: Console, title: str, findings: list[Finding]) -> list[Finding]:
    console.print(Text(f"\n{title}", style="bold"))
    table = Table.grid(padding=(0, 2, 0, 0))
    for finding in findings:
        sign, style = _STYLES[finding.mark]
        table.add_row(Text(f"  {sign}", style=style), Text(finding.subject), Text(finding.detail, style="dim", overflow="fold"))
    console.print(table)
    return findings


def _devices(torch: TorchReport) -> Iterator[Finding]:
    features = ", ".join(cpu_features()) or "no vector extensions known"
    yield Finding("ok", "CPU", f"{num_usable_cores()} cores usable, {platform.machine()}: {features}")
    yield _compiler()
    yield _memory()
    if torch.error:
        yield Finding("missing", "torch", torch.error, needed=True)
        return
    yield Finding("ok", "torch on CPU", f"{torch.version}, kernels for {torch.cpu_capability}, {torch.num_threads} threads")
    if not torch.gpus:
        why = "no GPU visible to CUDA" if torch.cuda_version else "this torch is built for CPUs only"
        yield Finding("warn", "GPU", f"{why}; the suite computes on the CPU")
    for number, gpu in enumerate(torch.gpus):
        yield Finding("ok", f"GPU {number}", gpu)


def _compiler() -> Finding:
    """Native steps are compiled at the first start, with what llm.ops.cpu.native.library finds."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    kinds = "weights in int8 and int4, KV in int8 (--kv-dtype)"
    lost = f"none found (c++, g++, clang++ or $CXX): no {kinds}, and slower steps on the CPU"
    return Finding("ok", "C++ compiler", f"{found}, for {kinds}") if found else Finding("warn", "C++ compiler", lost)


def _memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    mark: Mark = "ok" if memory.available > _MIN_MEMORY_BYTES else "warn"
    return Finding(mark, "memory", f"{_gib(memory.available)} of {_gib(memory.total)} available")


def _transports(torch: TorchReport) -> Iterator[Finding]:
    yield _shm()
    yield Finding("ok", "tcp", "works between any two hosts")
    uses = {"cuda_ipc": "the fastest way between workers of one host's GPUs", "nccl": "between two GPUs of hosts without cuda_ipc"}
    for name, use in uses.items():
        missing = [] if torch.gpus else ["a CUDA GPU"]
        missing += [part for part in _FOR_GPUS if installed(part) is None]
        yield Finding("warn", name, f"needs {', '.join(missing)}") if missing else Finding("ok", name, use)


def _shm() -> Finding:
    """Tries what the transport does: a memory file, opened through another descriptor's path."""
    if not hasattr(os, "memfd_create"):
        return Finding("warn", "shm", "needs Linux; workers of one host use tcp instead")
    descriptor = os.memfd_create("tandem-doctor")
    try:
        os.close(os.open(f"/proc/{os.getpid()}/fd/{descriptor}", os.O_RDONLY))
    except OSError as error:
        return Finding("warn", "shm", f"/proc/PID/fd cannot be opened ({error.strerror}); workers use tcp instead")
    finally:
        os.close(descriptor)
    return Finding("ok", "shm", "memory files can be mapped; the fastest way between workers of one host")


def _packages() -> Iterator[Finding]:
    yield Finding("ok", "Python", platform.python_version())
    for name in (DISTRIBUTION, *_REQUIRED):
        version = installed(name)
        yield Finding("ok" if version else "missing", name, version or "not installed", needed=True)
    for name in _FOR_GPUS:
        version = installed(name)
        yield Finding("ok" if version else "warn", name, version or "not installed; only GPUs need it")


def _files(model: str) -> Iterator[Finding]:
    cache = cache_directory()
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    writable = os.access(existing, os.W_OK)
    advice = "" if writable else "; not writable, set TANDEM_CACHE_DIR"
    yield Finding("ok" if writable else "missing", "cache", f"{cache}{advice}", needed=True)
    free = shutil.disk_usage(existing).free
    yield Finding("ok" if free > _MIN_FREE_BYTES else "warn", "free disk", _gib(free))
    try:
        files = resolve_model(model, download=False)
    except NotFetchedError as error:
        yield Finding("warn", "model", str(error).splitlines()[0])
    except ModelError as error:
        yield Finding("missing", "model", str(error).splitlines()[0], needed=True)
    else:
        yield Finding("ok", "model", f"{files.name} at {files.path}" if files.path else files.name)
        yield from _weights(files)


def _weights(files: ModelFiles) -> Iterator[Finding]:
    """The formats that workers have chosen for this model here, latest first; they leave their choices in the cache."""
    prefix = files.digest.replace(":", "-")[:40]
    for role in ("prefill", "decode"):
        found = sorted((cache_directory() / "formats").glob(f"{role}-{prefix}-*.json"), key=lambda path: path.stat().st_mtime)
        try:
            choice = json.loads(found[-1].read_text())
            yield Finding("ok", f"{role} weights", f"{choice['format']}: {choice['reason']}")
        except (IndexError, OSError, ValueError, KeyError, TypeError):
            yield Finding("ok", f"{role} weights", "chosen at the first start, by measurement; --weights says otherwise")


def _network(port: int) -> Iterator[Finding]:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError as error:
        yield _taken(port, error)
    else:
        yield Finding("ok", f"port {port}", "free")


def _handoff(model: str, kv_dtype: str) -> Iterator[Finding]:
    for report in handoff_reports(model, kv_dtype):
        found = f"{report.num_positions} positions, logits deviate by {report.max_deviation:.1e} of the largest"
        detail = report.error or (found if report.passed else f"{found}: what arrived is not what was computed")
        yield Finding("ok" if report.passed else "missing", report.transport, detail, needed=True)


def _taken(port: int, error: OSError) -> Finding:
    from tandem.probe import probe

    if probe(f"127.0.0.1:{port}", "tandem.api.v1.GenerationService") == "SERVING":
        return Finding("ok", f"port {port}", "a Tandem gateway serves there")
    return Finding("warn", f"port {port}", f"{error.strerror}; use `tandem up --port`")


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.1f} GiB"
