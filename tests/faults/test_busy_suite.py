"""What real processes do with clients that come, go and change their minds, and with orderly restarts under load."""

from __future__ import annotations

import asyncio
import random

import grpc
import psutil
import pytest

from tandem.channels import open_channel
from tests.faults.conftest import Patient
from tests.faults.oracle import SPARE_DESCRIPTORS, SPARE_TASKS

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]


@pytest.mark.parametrize("name", ["prefill-0", "decode-0"])
async def test_f1_a_worker_drains_under_load_without_an_error(patient: Patient, name: str) -> None:
    suite, records = patient.suite, []
    draining = asyncio.create_task(suite.drain(name))
    while not draining.done():
        records += patient.send(2)
        await asyncio.sleep(0.05)
    assert draining.result() == 0
    await suite.wait_ready()
    await patient.served([*records, *patient.send(4)])


async def test_f1_the_gateway_finishes_what_it_has(patient: Patient) -> None:
    records = patient.send(8, completion_tokens=40)
    await patient.until_flowing(records)
    births = patient.suite.members["gateway"].births
    assert await patient.suite.drain("gateway") == 0
    await patient.served(records)
    await patient.back("gateway", births)


async def test_d1_cancels_at_any_moment_leave_nothing_behind(patient: Patient) -> None:
    """Clients go away while queued, prefilled, handed over, decoded: all blocks are free half a second after the last."""
    chance = random.Random(1)
    for _ in range(40):
        asked = [patient.ask(completion_tokens=40) for _ in range(3)]
        tasks = [(patient.client.send(each), chance.uniform(0.0, 0.12)) for each in asked]
        sending = list(patient.client.running)
        await asyncio.sleep(max(wait for _, wait in tasks))
        for task in sending:
            task.cancel()
        await asyncio.gather(*sending, return_exceptions=True)
    await patient.suite.wait_idle(2.0)


async def test_d6_a_thousand_connections_leave_no_descriptor_and_no_memory(patient: Patient) -> None:
    before, process = await patient.suite.census("gateway"), patient.suite.process("gateway")
    for number in range(20):
        if number == 4:  # what is allocated once is by now
            rss = process.memory_info().rss
        channels = [open_channel(patient.suite.address) for _ in range(50)]
        await asyncio.gather(*(channel.channel_ready() for channel in channels))
        await asyncio.gather(*(channel.close() for channel in channels))
    async with asyncio.timeout(10):
        while (await patient.suite.census("gateway"))["fds"] > before["fds"] + SPARE_DESCRIPTORS:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    assert (await patient.suite.census("gateway"))["tasks"] <= before["tasks"] + SPARE_TASKS
    assert process.memory_info().rss - rss < MOST_GROWTH_BYTES


MOST_GROWTH_BYTES = 8 << 20
"""By 800 connections: 10 KB for each. One that is kept costs some 30 KB."""


async def test_e3_a_worker_out_of_descriptors_costs_nobody_an_answer(patient: Patient) -> None:
    """It has never had a connection for blocks, and can open none: others take its requests."""
    suite = patient.suite
    await suite.restart_armed("", "decode-0")
    process = suite.process("decode-0")
    limits = process.rlimit(psutil.RLIMIT_NOFILE)
    process.rlimit(psutil.RLIMIT_NOFILE, (process.num_fds(), limits[1]))
    try:
        records = patient.send(16, completion_tokens=12)
        await patient.finish(records)
        failover = (await suite.view()).failover
    finally:
        process.rlimit(psutil.RLIMIT_NOFILE, limits)
    await patient.served(records)
    assert failover.retries + failover.migrations > 0, "it got its blocks all the same"
    await patient.served(patient.send(8))


async def test_b2_bits_that_flip_on_the_wire_never_reach_a_token(patient: Patient) -> None:
    """Every second run of blocks arrives damaged: each is seen, and fetched again."""
    suite = patient.suite
    producers, consumers = ([member.name for member in suite.of_kind(kind)] for kind in ("prefill", "decode"))
    await suite.restart_armed("wire@%2=flip", *producers)
    before = sum([(await suite.census(name))["checksum_failures"] for name in consumers])
    await patient.served(patient.send(30))
    flips = sum(suite.log(name).count("a bit of a block was flipped") for name in producers)
    seen = sum([(await suite.census(name))["checksum_failures"] for name in consumers]) - before
    assert seen == flips >= 5
    await suite.restart_armed("", *producers)


async def test_g3_refused_requests_cost_nothing_and_are_named(patient: Patient) -> None:
    records = patient.send(20, "bad")
    await patient.finish(records)
    assert {(record.code, record.reason) for record in records} == {("INVALID_ARGUMENT", "INVALID_SAMPLING")}


async def test_the_census_sees_a_channel_that_stays(patient: Patient) -> None:
    """The instrument of I3 works: forty open connections show."""
    before = await patient.suite.census("gateway")
    channels: list[grpc.aio.Channel] = [open_channel(patient.suite.address) for _ in range(40)]
    await asyncio.gather(*(channel.channel_ready() for channel in channels))
    assert (await patient.suite.census("gateway"))["fds"] >= before["fds"] + 40 - SPARE_DESCRIPTORS
    await asyncio.gather(*(channel.close() for channel in channels))
