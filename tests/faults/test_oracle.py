"""The oracle sees every kind of breach: each test breaks one thing in a run that is otherwise in order."""

from collections.abc import Callable

import pytest

from tests.faults.memory import Sample
from tests.faults.oracle import Expected, Fault, Holdings, Record, Run, judge, leaked

EXPECTED = Expected((7, 8, 9), "abc", "length")


def record(**changes: object) -> Record:
    values: dict[str, object] = {
        "number": 1,
        "kind": "plain",
        "num_prompt_tokens": 2,
        "deadline_s": 10.0,
        "expected": EXPECTED,
        "began": 100.0,
        "ended": 101.0,
        "tokens": [7, 8, 9],
        "text": "abc",
        "num_endings": 1,
        "finish": "length",
        "usage": (2, 3),
        "code": "OK",
    }
    return Record(**{**values, **changes})  # type: ignore[arg-type]


def sound_run(*records: Record) -> Run:
    held = {"gateway": Holdings(20, {"pipe": 10, "socket": 15})}
    return Run(records=list(records or [record()]), before=dict(held), after=dict(held), idle_after_s=0.1, planned_load=1)


def broken(run: Run) -> list[str]:
    return [verdict.name for verdict in judge(run) if verdict.held is False]


def test_a_sound_run_breaks_nothing() -> None:
    assert broken(sound_run()) == []


@pytest.mark.parametrize(
    ("changes", "invariant"),
    [
        ({"code": None}, "I1"),
        ({"num_endings": 0}, "I1"),
        ({"num_endings": 2}, "I1"),
        ({"num_events_after_the_end": 1}, "I1"),
        ({"ended": 111.5}, "I1"),
        ({"wrong_indexes": [(2, 1)]}, "I2"),
        ({"tokens": [7, 9, 9]}, "I2"),
        ({"tokens": [7, 8], "usage": (2, 2)}, "I2"),
        ({"tokens": [7, 8, 9, 9]}, "I2"),
        ({"text": "abd"}, "I2"),
        ({"text": "ab"}, "I2"),
        ({"finish": "stop"}, "I2"),
        ({"usage": (2, 4)}, "I2"),
        ({"kind": "logprobs", "num_logprobs": 2}, "I2"),
        ({"code": "UNKNOWN", "num_endings": 0}, "I9"),
        ({"code": "INTERNAL", "num_endings": 0}, "I9"),
    ],
)
def test_one_bad_stream_is_seen(changes: dict[str, object], invariant: str) -> None:
    assert broken(sound_run(record(), record(), record(number=2, **changes))) == [invariant]


def test_a_stream_that_failed_may_be_short_but_not_wrong() -> None:
    failed = {"code": "UNAVAILABLE", "num_endings": 0, "finish": "", "usage": None}
    assert broken(sound_run(record(), record(tokens=[7], text="a", **failed))) == []
    assert broken(sound_run(record(), record(tokens=[8], text="", **failed))) == ["I2"]


def _leak(run: Run) -> None:
    run.after["gateway"] = Holdings(20, {"pipe": 10, "socket": 21})


def _pile_up(run: Run) -> None:
    run.after["gateway"] = Holdings(60, run.before["gateway"].descriptors)


def _hang(run: Run) -> None:
    run.idle_after_s = None


def _die(run: Run) -> None:
    run.unplanned_deaths.append("decode-0 ended with -11")


def _raise(run: Run) -> None:
    run.bad_log_lines.append("gateway: Traceback (most recent call last):")


def _mix_up(run: Run) -> None:
    run.stamp_errors = 1


def _let_through(run: Run) -> None:
    run.flips_sent, run.flips_caught = 3, 2


def _lose_count(run: Run) -> None:
    run.counters["decode-0"] = {"received": 5, "ok": 2, "cancelled": 1, "rejected": 0, "failed": 1}


def _grow(run: Run) -> None:
    run.samples = [Sample("gateway", 1, 50 * step, (100 + step) << 20) for step in range(150)]


def _idle_load(run: Run) -> None:
    run.planned_load = 100


def _miss(run: Run) -> None:
    run.faults = [Fault("kill-decode", "decode-0", 1.0, in_flight=0)]


@pytest.mark.parametrize(
    ("harm", "invariant"),
    [
        (_leak, "I3"),
        (_pile_up, "I3"),
        (_hang, "I3"),
        (_let_through, "I4"),
        (_mix_up, "I5"),
        (_die, "I6"),
        (_raise, "I6"),
        (_lose_count, "I7"),
        (_grow, "I8"),
        (_idle_load, "I10"),
        (_miss, "I10"),
    ],
)
def test_each_breach_of_the_suite_is_seen(harm: Callable[[Run], None], invariant: str) -> None:
    run = sound_run()
    harm(run)
    assert broken(run) == [invariant]


def test_what_is_held_on_to_is_named() -> None:
    before, after = Holdings(20, {"pipe": 4, "LISTEN 7000": 1}), Holdings(20, {"pipe": 6, "ESTABLISHED 10.0.0.3 to 7000": 8})
    (told,) = leaked({"prefill-0": before}, {"prefill-0": after})
    assert told == "prefill-0: 5 descriptors became 14; new are 8 ESTABLISHED 10.0.0.3 to 7000, 2 pipe"
    assert leaked({"prefill-0": before}, {}) == ["prefill-0 could not be asked"]
    assert leaked({"prefill-0": before}, {"prefill-0": before, "decode-0": after}) == []
