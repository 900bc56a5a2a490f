"""How many threads a worker takes by itself, on machines and in containers of all sizes."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from tandem.cores import num_usable_cores


def _machine(root: Path, cores: int, files: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


_GROUP = "proc/self/cgroup"
_TOP = "sys/fs/cgroup"
_MADE_UP = {
    "a laptop": (2, {}, 2),
    "a workstation": (8, {_GROUP: "0::/user.slice\n", f"{_TOP}/user.slice/cpu.max": "max 100000\n"}, 8),
    "one node of two, by numactl": (32, {_GROUP: "0::/\n"}, 32),
    "a container of two cores on 64": (64, {_GROUP: "0::/\n", f"{_TOP}/cpu.max": "200000 100000\n"}, 2),
    "one and a half": (64, {_GROUP: "0::/\n", f"{_TOP}/cpu.max": "150000 100000\n"}, 2),
    "a tenth": (64, {_GROUP: "0::/\n", f"{_TOP}/cpu.max": "10000 100000\n"}, 1),
    "more time than cores": (4, {_GROUP: "0::/\n", f"{_TOP}/cpu.max": "800000 100000\n"}, 4),
    "a pod's limit above the container's": (
        64,
        {
            _GROUP: "0::/pods/pod/container\n",
            f"{_TOP}/pods/pod/cpu.max": "400000 100000\n",
            f"{_TOP}/pods/pod/container/cpu.max": "max 100000\n",
        },
        4,
    ),
    "the first version, seen from within": (
        64,
        {
            _GROUP: "3:memory:/docker/c\n2:cpu,cpuacct:/docker/c\n",
            f"{_TOP}/cpu/cpu.cfs_quota_us": "300000\n",
            f"{_TOP}/cpu/cpu.cfs_period_us": "100000\n",
        },
        3,
    ),
    "the first version without a limit": (
        8,
        {_GROUP: "1:cpu:/\n", f"{_TOP}/cpu/cpu.cfs_quota_us": "-1\n", f"{_TOP}/cpu/cpu.cfs_period_us": "100000\n"},
        8,
    ),
    "nonsense": (8, {_GROUP: "what\n0::/\n", f"{_TOP}/cpu.max": "1 2 3\n"}, 8),
    "a period of nothing": (8, {_GROUP: "0::/\n", f"{_TOP}/cpu.max": "100000 0\n"}, 8),
}


@pytest.mark.parametrize("name", _MADE_UP)
def test_threads_are_as_many_as_can_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cores, files, expected = _MADE_UP[name]
    assert num_usable_cores(_machine(tmp_path, cores, files, monkeypatch)) == expected
