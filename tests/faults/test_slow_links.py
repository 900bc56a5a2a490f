"""B4: hand-offs over a link of 1 Mbit/s that they fill, with everything else that passes there: a pause, and no wrong token."""

from pathlib import Path

import pytest

from tests.faults import network
from tests.faults.conftest import Patient
from tests.faults.members import Shape
from tests.faults.suite import Suite
from tests.faults.traffic import Client

RATE = "1mbit"
NUM_PROMPTS, PROMPT_TOKENS = 4, 1800
FULL_S = 3.0
"""Each prompt has 115 KB of KV. One of several connections may starve for as long as a stall lasts, and is then resumed, or its
request prefilled again."""
SHAPE = Shape(
    num_prefill=1,
    num_decode=1,
    step_ms=2.0,
    token_us=10.0,
    kv_blocks=8192,
    flags={"prefill": ("--token-budget", "8192")},
)


@pytest.mark.timeout(120)
@pytest.mark.skipif(not network.available(), reason="this machine lets us make no network namespaces")
async def test_b4_hand_offs_over_a_slow_link_are_completed(tmp_path: Path) -> None:
    with network.network() as net:
        async with Suite(SHAPE, tmp_path, net) as suite:
            assert suite.channel is not None
            patient = Patient(suite, Client(suite.channel))
            await patient.served(patient.send(2))
            net.slow("prefill-0", RATE)
            records = patient.send(NUM_PROMPTS, prompt_tokens=PROMPT_TOKENS, completion_tokens=4)
            await patient.served(records)
            assert max(record.ended - record.began for record in records) > FULL_S, "the link was not slow"
            await suite.wait_idle()
            assert patient.bad_lines() == []
