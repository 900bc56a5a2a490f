"""What a request leaves behind: nothing that waits for the garbage collector, which looks seldom.

Cancelled and moved ones may, since asyncio's cancelled tasks hold the frames that hold them.
"""

import asyncio
import gc
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator

import pytest

from gateway.attempt import Attempt
from gateway.completion import Completion
from gateway.failover import HopFailed, Recovery
from gateway.job import GenerationJob
from gateway.pending import PendingOutput
from gateway.timeline import Timeline
from tandem.errors import Reason, TandemError
from tandem.interceptor import Call
from tests.service.gateway.conftest import MakeSuite, Suite

OF_A_REQUEST = (GenerationJob, Attempt, Completion, PendingOutput, Recovery, Timeline, Call, HopFailed)
FIELDS = {"text": "hello", "stopping": {"max_tokens": 10}}


@pytest.fixture
def cycles() -> Iterator[Callable[[], Counter[str]]]:
    """Gives what to call for the objects of a request that only the garbage collector has found since."""
    gc.disable()

    def found() -> Counter[str]:
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        gc.set_debug(0)
        kinds = Counter(type(each).__name__ for each in gc.garbage if isinstance(each, OF_A_REQUEST))
        gc.garbage.clear()
        gc.collect()  # what is only saved is found again
        return kinds

    yield found
    gc.enable()
    gc.set_debug(0)


async def served(suite: Suite) -> None:
    assert (await suite.generate(**FIELDS)).error is None


async def refused(suite: Suite) -> None:
    assert (await suite.generate(text="")).error is not None


@pytest.mark.parametrize("request_of_a_kind", [served, refused], ids=lambda each: each.__name__)
async def test_a_request_leaves_no_cycle(
    make_suite: MakeSuite, cycles: Callable[[], Counter[str]], request_of_a_kind: Callable[[Suite], Awaitable[None]]
) -> None:
    suite = await make_suite(2, 2)
    await served(suite)
    cycles()
    for _ in range(3):
        await request_of_a_kind(suite)
        await suite.all_idle()
    await asyncio.sleep(0)
    assert cycles() == {}


async def test_what_failed_is_remembered_without_what_held_it(make_suite: MakeSuite, cycles: Callable[[], Counter[str]]) -> None:
    """A request that every decode worker turns away. Its calls do not count: the fake workers' ones, cancelled, are among them."""
    suite = await make_suite(2, 2)
    await served(suite)
    for prefill in suite.prefills:
        prefill.gates.close("run")
    for decode in suite.decodes:
        decode.gates.faults["reserve"] = TandemError(Reason.POOL_TOO_SMALL, "never fits")
    cycles()
    for _ in range(3):
        assert (await suite.generate(**FIELDS)).error is not None
        await suite.all_idle()
    await asyncio.sleep(0)
    assert cycles().keys() <= {"Call"}
