"""The kit's own parts: failpoints, the trace, what is asked, and proxies."""

import asyncio
import contextlib
import itertools
import socket
from collections import Counter

import pytest

from tests.faults.failpoints import Failpoint, gate_of, parse
from tests.faults.injector import KINDS, plan_of
from tests.faults.launch import descriptors_by_kind
from tests.faults.proxy import Link
from tests.faults.questions import fake_question
from tests.faults.traffic import KINDS as REQUEST_KINDS
from tests.faults.traffic import Arrival, Scale, arrivals


def test_failpoints_are_read_as_written() -> None:
    assert parse("step.before@3=crash; prompt@1,2=raise;finish@2+=sleep:0.5;wire@%4=flip", "prefill_svc") == [
        Failpoint("step.before", "crash", first=3),
        Failpoint("prompt", "raise", tokens=(1, 2)),
        Failpoint("finish", "sleep", 0.5, first=2, lasting=True),
        Failpoint("wire", "flip", first=4, every=True),
    ]


@pytest.mark.parametrize("text", ["nowhere=crash", "step.before=explode", "step.before", "reserve=crash"])
def test_a_failpoint_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="prefill_svc"):
        parse(text, "prefill_svc")


def test_a_failpoint_fires_when_it_is_due() -> None:
    def fired(text: str, times: int) -> list[int]:
        gate, found = gate_of(parse(text, "prefill_svc"), "admit"), []
        for number in range(1, times + 1):
            try:
                gate(())
            except RuntimeError:
                found.append(number)
        return found

    assert fired("admit=raise", 3) == [1]
    assert fired("admit@2=raise", 4) == [2]
    assert fired("admit@2+=raise", 4) == [2, 3, 4]
    assert fired("admit@%2=raise", 5) == [2, 4]
    assert fired("finish=raise", 3) == []


def test_a_prompt_fires_wherever_its_tokens_are() -> None:
    (point,) = parse("prompt@4,5=crash", "decode_svc")
    assert [point.due(tokens) for tokens in ([4, 5], [1, 4, 5, 6], [4], [5, 4], [])] == [True, True, False, False, False]


def test_descriptors_are_counted_by_what_stays_the_same_of_them() -> None:
    before = Counter(descriptors_by_kind())
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as opened:
        port = listener.getsockname()[1]
        for _ in range(3):
            opened.enter_context(socket.create_connection(("127.0.0.1", port)))
            opened.enter_context(listener.accept()[0])
        found = Counter(descriptors_by_kind()) - before
    assert found == {f"LISTEN {port}": 1, f"ESTABLISHED to 127.0.0.1:{port}": 3, f"ESTABLISHED 127.0.0.1 to {port}": 3}
    assert Counter(descriptors_by_kind()) == before


def test_the_trace_keeps_its_arrivals_and_goes_round() -> None:
    found = arrivals(400.0, Scale(pace=1.0))
    assert 1500 < len(found) < 2000
    assert all(earlier.at_s <= later.at_s for earlier, later in itertools.pairwise(found))
    assert len(arrivals(200.0, Scale(pace=2.0))) == len(found)
    assert max(arrival.prompt_tokens for arrival in found) <= Scale().longest_prompt


def test_every_kind_of_request_is_a_function_of_seed_and_number() -> None:
    asked = [fake_question(number, Arrival(0.0, 12, 10), seed=1) for number in range(200)]
    again = [fake_question(number, Arrival(0.0, 12, 10), seed=1) for number in range(200)]
    assert [each.request.SerializeToString() for each in asked if each.kind != "bad"] == [
        each.request.SerializeToString() for each in again if each.kind != "bad"
    ]
    assert {each.kind for each in asked} == {kind for kind, _ in REQUEST_KINDS}


def test_faults_are_chosen_by_name_or_first_word() -> None:
    assert set(plan_of(["kill", "freeze-decode"]).kinds) == {"kill-prefill", "kill-decode", "freeze-decode"}
    assert set(plan_of([kind.partition("-")[0] for kind in KINDS]).kinds) == set(KINDS)
    with pytest.raises(ValueError, match="no kinds"):
        plan_of(["flood"])


async def test_a_link_goes_dead_one_way_and_heals() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    link = Link("127.0.0.1", server.sockets[0].getsockname()[1])
    await link.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
    writer.write(b"one")
    assert await reader.readexactly(3) == b"one"
    link.hold("back")
    writer.write(b"two")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await reader.readexactly(3)
    link.let("back")
    assert await reader.readexactly(3) == b"two"
    link.reset()
    with pytest.raises(ConnectionResetError):
        await reader.readexactly(1)
    writer.close()
    await link.close()
    server.close()
