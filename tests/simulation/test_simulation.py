"""The simulation in `make test`: many seeds, what failed before, and whether a seed means the same every time."""

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulation import campaign

SEEDS = 2000
REGRESSIONS = {
    13: "a producer that ended before its pool was mapped was taken for one of another suite, and the request failed with that",
    259: "so was one whose process and file numbers had been given to another",
    4117: "a prompt that waited for blocks whose ticket was pulled late and never released counted as an admission that hangs",
    20243: "a task of a killed gateway counted as one whose failure nobody asked for (a defect of the simulation)",
    592: "a prompt that ended at its deadline had its blocks, by then another's, granted as a ticket",
    1006141: "a worker that was drained as all was over counted as ready until it said otherwise (a defect of the simulation)",
    1002912: "an engine that was frozen in its first step paused for as long before the next one, not ready meanwhile",
}
"""Seeds that failed, and what they found. A later change of the product or the scenarios may lead them past it."""
WITHOUT = {
    "blocks_kept_under_a_step": 468,
    "resume_after_the_last_token": 15,
    "blocks_freed_after_a_cancel": 14,
    "checksums": 2,
    "generations": 61,
    "short_prompts_first": 56,
    "leases_by_the_monotonic_clock": 8,
    "cancelled_calls_are_counted": 1,
}
"""Protections, and a seed that fails without them; see mutations.py."""


DIGEST = re.compile(r"digest +([0-9a-f]{16})")


def simulate(repository: Path, *arguments: str, hash_seed: str = "0") -> subprocess.CompletedProcess[str]:
    """In a process of its own: the simulation changes modules, and other tests leave theirs running."""
    command = [sys.executable, "-m", "tests.simulation", *arguments]
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    return subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=1800, check=False)


@pytest.mark.timeout(1800)
def test_every_seed_keeps_the_invariants(repository: Path) -> None:
    done = simulate(repository, "--seeds", str(SEEDS), "--processes", str(os.cpu_count() or 1))
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{SEEDS} seeds" in done.stdout


@pytest.mark.parametrize("seed", REGRESSIONS)
def test_what_failed_before_holds_now(repository: Path, seed: int) -> None:
    done = simulate(repository, "--seed", str(seed))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr


@pytest.mark.parametrize("protection", WITHOUT)
def test_a_protection_taken_away_is_noticed(repository: Path, protection: str) -> None:
    """Within a few seeds from one that is known to: other changes may move what happens in it."""
    first = max(0, WITHOUT[protection] - 10)
    done = simulate(repository, "--first", str(first), "--seeds", "100", "--stop-after", "1", "--without", protection)
    assert done.returncode == 1, done.stdout
    assert "failed; replay it with" in done.stdout


def test_a_seed_means_the_same_in_every_process(repository: Path) -> None:
    logs = [simulate(repository, "--seed", "12", hash_seed=hash_seed).stdout for hash_seed in ("0", "1")]
    assert len(logs[0].splitlines()) > 20
    assert logs[0] == logs[1]


def test_processes_share_the_seeds_and_give_the_same(repository: Path) -> None:
    """The digest stands for all events of all seeds, and when they came."""
    found = [simulate(repository, "--first", "100", "--seeds", "30", "--processes", count).stdout for count in ("1", "3")]
    assert "30 seeds" in found[0] and "30 seeds" in found[1]
    digests = {DIGEST.search(each).group(1) for each in found}  # type: ignore[union-attr]
    assert len(digests) == 1, found


def test_the_count_is_honest_when_time_is_out(repository: Path) -> None:
    done = simulate(repository, "--seeds", "100000", "--limit-s", "0")
    assert done.returncode == 3
    assert "Simulation: 0 of 100000 seeds" in done.stdout
    assert "time was out" in done.stdout


def test_a_seed_that_ends_its_process_has_failed_and_the_others_go_on() -> None:
    plan = campaign.Plan(first=0, num_seeds=15, num_processes=2, limit_s=None, stop_after=5, without="")
    tally = asyncio.run(Crashing(plan, campaign.Progress(15, lambda _: None, terminal=False)).run())
    assert [outcome.seed for outcome in tally.failed] == [3]
    assert "ended with status 9" in tally.failed[0].violations[0]
    assert tally.num_seeds == 15


class Crashing(campaign.Campaign):
    """Its processes do nothing, and do not survive seed 3."""

    async def _spawn(self) -> asyncio.subprocess.Process:
        program = """
import sys
from tests.simulation.worker import READY, Outcome
print(READY, end="", flush=True)
for line in sys.stdin:
    first, count = map(int, line.split())
    for seed in range(first, first + count):
        if seed == 3:
            sys.exit(9)
        print(Outcome(seed).to_json(), flush=True)
"""
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", program), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
