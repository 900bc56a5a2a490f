"""`python -m tests.faults.launch ROLE [flags of the service]`: the real service, made ready to be harmed.

ROLE is gateway, prefill_svc or decode_svc. Read from the environment, by this program only:
FAULTS_POINTS   failpoints, see failpoints.py
FAULTS_MODEL    "fake": the model of tests/fakes/runner.py in place of the real one; give the service `--model random:tiny`
FAULTS_STEP_MS, FAULTS_TOKEN_US   how long a step of the fake model takes, and each token of it
FAULTS_CENSUS   a file to write what the process holds to, as one line of JSON, at each SIGUSR1
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import runpy
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.faults import failpoints

ROLES = ("gateway", "prefill_svc", "decode_svc")

_pullers: list[Any] = []
"""Of this process, so that a census can tell what they counted."""


def main() -> None:
    run(sys.argv[1], sys.argv[2:], os.environ)


def run(role: str, argv: Sequence[str], environ: Mapping[str, str]) -> None:
    """Runs the service's own program in this process; returns or raises SystemExit as it does."""
    assert role in ROLES, f"{role!r} is none of {ROLES}"
    points = failpoints.parse(environ.get(failpoints.VARIABLE, ""), role)
    if role != "gateway":
        _arm_worker(role, points, environ)
    if path := environ.get("FAULTS_CENSUS"):
        _answer_census(Path(path))
    sys.argv = [role, *argv]
    runpy.run_module(role, run_name="__main__")


def _arm_worker(role: str, points: Sequence[failpoints.Failpoint], environ: Mapping[str, str]) -> None:
    """Once the service has prepared its environment: importing the worker, and torch with it, any sooner would be too early."""
    from tandem import compute

    prepare = compute.prepare_compute

    def prepare_and_arm(*arguments: Any) -> None:
        prepare(*arguments)
        from tests.faults import seams

        seams.install(role, points)
        seams.remember_pullers(_pullers)
        module = __import__(f"{role}.worker", fromlist=["worker"])
        load = _load_fake(environ) if environ.get("FAULTS_MODEL") == "fake" else module.load_model

        def load_and_wrap(*parts: Any, **options: Any) -> Any:
            loaded = load(*parts, **options)
            seams.wrap_runner(loaded.runner, points)
            return loaded

        module.load_model = load_and_wrap

    compute.prepare_compute = prepare_and_arm


def _load_fake(environ: Mapping[str, str]) -> Any:
    """Stands for llm.startup.load_model."""
    import torch

    from llm.kv.allocator import BlockAllocator
    from llm.kv.pool import KvPool
    from llm.kv.settings import KvSettings
    from llm.startup import LoadedModel
    from tests.fakes.runner import LAYOUT, FakeRunner, next_letter

    step_s, token_s = float(environ.get("FAULTS_STEP_MS", "0")) / 1e3, float(environ.get("FAULTS_TOKEN_US", "0")) / 1e6

    class PacedRunner(FakeRunner):
        def forward(self, slices: Sequence[Any]) -> Any:
            time.sleep(step_s + token_s * sum(len(piece.token_ids) for piece in slices))
            self.sizes.clear()  # or a soak would seem to leak
            return super().forward(slices)

    def load(*parts: Any, **_: Any) -> LoadedModel:
        torch.set_num_threads(1)
        kv = next(part for part in parts if isinstance(part, KvSettings))
        num_blocks = kv.kv_blocks or 2048
        pool = KvPool.create(LAYOUT, num_blocks)
        allocator = BlockAllocator(num_blocks, LAYOUT.block_tokens, kv.prefix_cache, pool.generations.bump)
        return LoadedModel(PacedRunner(pool, next_letter), pool, allocator, LAYOUT)  # type: ignore[arg-type]

    return load


def _answer_census(path: Path) -> None:
    """From the moment the server starts, since only then there is a loop."""
    from tandem import server

    start = server.Server.start

    async def start_and_answer(self: server.Server) -> int:
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, lambda: _write_census(path))
        return await start(self)

    server.Server.start = start_and_answer  # type: ignore[method-assign]


def descriptors_by_kind() -> dict[str, int]:
    """How many there are of each: files by name, connections by the end of them that stays the same."""
    connections = {each.fd: each for each in psutil.Process().net_connections("inet")}
    listening = {each.laddr.port for each in connections.values() if each.status == psutil.CONN_LISTEN}
    found: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that lists them
            link = os.readlink(f"/proc/self/fd/{name}")
            found[_kind(link) if int(name) not in connections else _connection_kind(connections[int(name)], listening)] += 1
    return dict(sorted(found.items()))


def _kind(link: str) -> str:
    return link.partition(":[")[0]


def _connection_kind(connection: Any, listening: set[int]) -> str:
    if not connection.raddr:
        return f"{connection.status} {connection.laddr.port}"
    host, own = connection.raddr.ip, connection.laddr.port
    return f"{connection.status} {host} to {own}" if own in listening else f"{connection.status} to {host}:{connection.raddr.port}"


def _write_census(path: Path) -> None:
    descriptors = descriptors_by_kind()
    census: dict[str, Any] = {"pid": os.getpid(), "tasks": len(asyncio.all_tasks()), "descriptors": descriptors}
    census["fds"] = sum(descriptors.values())
    rows = [row for puller in _pullers for row in puller.counters()]
    census |= {name: sum(getattr(row, name) for row in rows) for name in ("pulled", "refetched", "checksum_failures")}
    with path.open("a") as file:
        file.write(json.dumps(census) + "\n")


if __name__ == "__main__":
    main()
