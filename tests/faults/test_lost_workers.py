"""Workers that die, freeze or cannot be reached while they hold requests: real processes, real sockets, a fake model.

Every test also ends with the checks of the `patient` fixture: all blocks free, all idle, no unasked death, no complaint in a log.
"""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.faults.conftest import Patient, machine
from tests.faults.oracle import Record

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]

DETECTION_S = 2.0
SLACK_S = 1.0  # for a machine that does other things, too


@pytest.mark.parametrize(
    ("name", "points"),
    [
        pytest.param("prefill-0", "step.before=crash", id="A1-prefill-at-its-first-step"),
        pytest.param("prefill-0", "finish=crash", id="A1-prefill-at-its-last-step"),
        pytest.param("prefill-1", "blocks.before=crash", id="A2-prefill-before-the-first-block"),
        pytest.param("prefill-1", "blocks.after@2=crash", id="A3-prefill-after-a-block"),
        pytest.param("decode-0", "pull.before=crash", id="A5-decode-without-a-token"),
        pytest.param("decode-1", "step.before@8=crash", id="A5-decode-mid-stream"),
        pytest.param("decode-1", "step.after@23=crash", id="A5-decode-at-its-last-token"),
    ],
)
async def test_a_crash_costs_a_pause_and_no_token(patient: Patient, name: str, points: str) -> None:
    await patient.suite.restart_armed(points, name)
    await patient.served(await patient.send_until_crash(name))


@pytest.mark.parametrize("name", [pytest.param("prefill-0", id="A4-prefill"), pytest.param("decode-0", id="A6-decode")])
async def test_a_frozen_worker_is_left_and_fenced_when_it_wakes(patient: Patient, name: str) -> None:
    records = patient.send(8, completion_tokens=40)
    await patient.until_flowing(records, 1 if name.startswith("prefill") else 4)
    late = patient.send(8)
    patient.suite.freeze(name)
    try:
        assert await patient.seconds_until_lost(name) < DETECTION_S + SLACK_S
        await patient.served([*records, *late])
    finally:
        patient.suite.thaw(name)
    assert sum(record.num_events_after_the_end for record in records) == 0


@pytest.mark.parametrize(
    ("name", "ways"),
    [
        pytest.param("decode-1", ("forth",), id="C1-to-decode"),
        pytest.param("decode-1", ("back",), id="C1-from-decode"),
        pytest.param("prefill-1", ("forth", "back"), id="C1-prefill-both-ways"),
    ],
)
async def test_a_black_hole_is_noticed_and_gone_round(patient: Patient, name: str, ways: tuple[str, ...]) -> None:
    link = patient.suite.members[name].link
    assert link is not None
    records = patient.send(8, completion_tokens=40)
    await patient.until_flowing(records)
    for way in ways:
        link.hold(way)
    try:
        assert await patient.seconds_until_lost(name) < DETECTION_S + SLACK_S
        await patient.served(records)
    finally:
        for way in ways:
            link.let(way)


async def test_c2_a_storm_of_resets_passes(patient: Patient) -> None:
    """Every connection between gateway and workers is reset again and again; afterwards all is well within 5 s."""
    links = [member.link for member in patient.suite.members.values() if member.link is not None]
    records = patient.send(4)
    for _ in range(5):
        for link in links:
            link.reset()
        await asyncio.sleep(0.05)
    healed = time.monotonic()
    await patient.suite.wait_ready(5.0 + SLACK_S)
    assert time.monotonic() - healed < 5.0 + SLACK_S
    await patient.finish(records)
    assert {record.code for record in records} <= {"OK", "UNAVAILABLE", "ABORTED"}
    await patient.served(patient.send(8))


async def test_a7_workers_cancel_the_orphans_of_a_killed_gateway(patient: Patient) -> None:
    """Their completions would take ten seconds more."""
    suite = patient.suite
    records = patient.send(8, completion_tokens=1200)
    await patient.until_flowing(records)
    births = suite.members["gateway"].births
    suite.kill("gateway")
    killed = time.monotonic()
    await patient.finish(records, 5.0)
    assert {record.code for record in records} == {"UNAVAILABLE"}
    await patient.back("gateway", births)
    await suite.wait_idle(5.0)
    assert time.monotonic() - killed < 5.0 + SLACK_S
    await patient.served(patient.send(4))


@pytest.mark.parametrize("kind", ["prefill", "decode"])
async def test_a8_without_workers_of_a_kind_requests_fail_fast(patient: Patient, kind: str) -> None:
    suite = patient.suite
    members = suite.of_kind(kind)
    for member in members:
        member.wanted = False
        suite.kill(member.name)
    for member in members:
        await patient.seconds_until_lost(member.name)
    began = time.monotonic()
    records = patient.send(10)
    await patient.finish(records, DETECTION_S + SLACK_S)
    assert time.monotonic() - began < DETECTION_S + SLACK_S
    assert {record.code for record in records} == {"UNAVAILABLE"}
    for member in members:
        await suite.start(member.name)
    await suite.wait_ready()
    await patient.served(patient.send(4))


async def test_a9_a_crash_loop_costs_next_to_nothing(patient: Patient) -> None:
    """One worker dies at its first step, every time it comes back."""
    suite = patient.suite
    suite.expected_crashes.add("decode-0")
    suite.arm("decode-0", "step.before=crash")
    births = suite.members["decode-0"].births
    suite.kill("decode-0")
    records = []
    for _ in range(60):
        records += patient.send(2, completion_tokens=10)
        await asyncio.sleep(0.05)
    await patient.finish(records)
    suite.arm("decode-0", "")
    assert suite.members["decode-0"].births > births + 1, "it did not loop"
    assert sum(record.code == "OK" for record in records) >= 0.99 * len(records)
    suite.kill("decode-0")


async def test_g1_poison_fails_alone_after_at_most_two_deaths(patient: Patient) -> None:
    """A prompt that kills whoever computes it, among others that do no harm."""
    for _ in range(TRIES):
        async with machine() as late_s:
            good, bad, num_deaths = await poisoned(patient)
        if late_s() < TOO_LATE_S:
            break
    else:
        pytest.skip(
            f"void: the machine did not run this process for {late_s():.2f} s; a gateway that stands still cannot tell deaths"
        )
    await patient.served(good)
    assert {record.reason for record in bad} == {"REQUEST_QUARANTINED"}
    assert 1 <= num_deaths <= 2


TRIES = 3
TOO_LATE_S = 0.1
"""Workers speak twice a second. Who was silent for longer than twice that when its connection broke has not died, as far as a
gateway can know; and what it takes for alive may kill a third worker."""


async def poisoned(patient: Patient) -> tuple[list[Record], list[Record], int]:
    """The harmless requests, the same poison twice, and how many workers died of it."""
    suite, names = patient.suite, [member.name for member in patient.suite.of_kind("prefill")]
    poison = patient.ask(completion_tokens=12)
    point = f"prompt@{','.join(str(token) for token in poison.request.token_ids.ids[:8])}=crash"
    await suite.restart_armed(point, *names)
    for name in names:
        suite.arm(name, point)
    suite.expected_crashes |= set(names)
    num_deaths = len(suite.deaths)
    good = patient.send(6)
    bad = [patient.client.send(poison)]
    good += patient.send(6)
    await patient.finish([*good, *bad])
    bad.append(patient.client.send(poison))
    await patient.finish(bad)
    num_deaths = len(suite.deaths) - num_deaths
    for name in names:
        suite.arm(name, "")
    await suite.wait_ready()
    return good, bad, num_deaths
