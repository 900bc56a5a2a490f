"""What must hold after every run, whatever was done to the suite: invariants I1 to I10 as pure checks over what was recorded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tests.faults.memory import MAX_GROWTH_MIB, SOAK_REQUESTS, Sample, growths

DOCUMENTED_CODES = frozenset(
    {
        "OK",
        "INVALID_ARGUMENT",
        "NOT_FOUND",
        "RESOURCE_EXHAUSTED",
        "UNAVAILABLE",
        "ABORTED",
        "DEADLINE_EXCEEDED",
        "CANCELLED",
        "FAILED_PRECONDITION",
        "ALREADY_EXISTS",
        "UNAUTHENTICATED",
        "PERMISSION_DENIED",
    }
)
GRACE_S = 1.0
# Channels come and go with the processes at their other end. What is to close by itself is waited for before.
SPARE_DESCRIPTORS, SPARE_TASKS = 4, 6


@dataclass(frozen=True)
class Expected:
    """The undisturbed completion of a request."""

    tokens: tuple[int, ...]
    text: str | None
    """None if it is not known."""
    finish: str


@dataclass
class Record:
    """One request as its client saw it. Moments are of the client's monotonic clock, seconds; `code` is None while it runs."""

    number: int
    kind: str
    """plain, sampled, stop, logprobs, cancel, deadline or bad."""
    num_prompt_tokens: int
    deadline_s: float
    expected: Expected | None
    began: float = 0.0
    ended: float = 0.0
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    wrong_indexes: list[tuple[int, int]] = field(default_factory=list)
    """(index given, tokens that were there)."""
    num_endings: int = 0
    num_events_after_the_end: int = 0
    num_logprobs: int = 0
    smallest_lead: float = math.inf
    """Of the likeliest token over the next, in log-probability, if these were asked for."""
    finish: str = ""
    usage: tuple[int, int] | None = None
    """Prompt and completion tokens."""
    code: str | None = None
    reason: str = ""
    message: str = ""
    has_retry_info: bool = False
    longest_gap_s: float = 0.0

    @property
    def is_client_error(self) -> bool:
        """The client asked for nothing unusual, and did not get it."""
        return self.kind not in ("cancel", "deadline", "bad") and self.code != "OK"


@dataclass(frozen=True)
class Fault:
    """Something done to the suite. `detected_s`: until the gateway's view showed it, None if it needs no showing or never did."""

    kind: str
    target: str
    moment: float
    in_flight: int
    detected_s: float | None = None
    recovered_s: float | None = None


@dataclass(frozen=True)
class Holdings:
    """What a process held while idle. `descriptors`: how many of each kind."""

    tasks: int
    descriptors: Mapping[str, int]

    @property
    def num_descriptors(self) -> int:
        return sum(self.descriptors.values())


@dataclass
class Run:
    """Everything that the invariants are judged by."""

    records: list[Record] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    before: dict[str, Holdings] = field(default_factory=dict)
    after: dict[str, Holdings] = field(default_factory=dict)
    idle_after_s: float | None = None
    """From the last request's end until every block was free and nothing ran; None: never."""
    unplanned_deaths: list[str] = field(default_factory=list)
    bad_log_lines: list[str] = field(default_factory=list)
    stamp_errors: int = 0
    counters: dict[str, Mapping[str, int]] = field(default_factory=dict)
    """By process that lived through the run: received, ok, cancelled, rejected, failed."""
    failover: Mapping[str, int] = field(default_factory=dict)
    """Retries, migrations and so on, as the gateway counts them."""
    samples: list[Sample] = field(default_factory=list)
    flips_sent: int = 0
    flips_caught: int = 0
    planned_load: int = 0
    """Requests that the trace holds for the run."""


@dataclass(frozen=True)
class Verdict:
    """One invariant: held, broken, or (None) not judged in this run, and why."""

    name: str
    about: str
    held: bool | None
    detail: str = ""


def judge(run: Run) -> list[Verdict]:
    """All invariants in order."""
    return [
        _verdict("I1", "every request ends exactly once, within deadline + 1 s", _endings(run.records)),
        _verdict("I2", "tokens in order, without gap or repeat, those of an undisturbed run", _streams(run.records)),
        _verdict("I3", "blocks, tasks and descriptors are back at the baseline", _leaks(run)),
        _integrity(run),
        _verdict("I5", "no request ever read another's KV", [f"{run.stamp_errors} stamps did not match"] * bool(run.stamp_errors)),
        _verdict("I6", "no process ended unasked, no exception in a log", [*run.unplanned_deaths, *run.bad_log_lines]),
        _counted(run),
        _memory(run),
        _verdict("I9", "only documented status codes", _codes(run.records)),
        _verdict("I10", "the load was there", _load(run)),
    ]


def _verdict(name: str, about: str, broken: Sequence[str]) -> Verdict:
    more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
    return Verdict(name, about, not broken, f"{broken[0]}{more}" if broken else "")


def _endings(records: Sequence[Record]) -> list[str]:
    return [f"request {record.number} {problem}" for record in records if (problem := _ending_problem(record))]


def _ending_problem(record: Record) -> str:
    if record.code is None:
        return "never ended"
    if record.num_events_after_the_end or record.num_endings > 1:
        return "went on after its end"
    if record.code == "OK" and record.num_endings != 1:
        return "ended with OK and without its last message"
    if record.ended - record.began > record.deadline_s + GRACE_S:
        return f"took {record.ended - record.began:.1f} s with a deadline of {record.deadline_s:.1f} s"
    return ""


def _streams(records: Sequence[Record]) -> list[str]:
    return [f"request {record.number} ({record.kind}) {problem}" for record in records if (problem := stream_problem(record))]


def stream_problem(record: Record) -> str:
    """What is wrong with the tokens of a stream; empty if nothing is."""
    if record.wrong_indexes:
        index, there = record.wrong_indexes[0]
        return f"got index {index} after {there} tokens"
    if record.expected is None:
        return ""
    tokens = tuple(record.tokens)
    if tokens != record.expected.tokens[: len(tokens)]:
        return f"got a wrong token within its first {len(tokens)}"
    text = record.text if record.expected.text is None else record.expected.text
    if not text.startswith(record.text):
        return "got a wrong text"
    return _ending_of_stream_problem(record, record.expected, text) if record.code == "OK" else ""


def _ending_of_stream_problem(record: Record, expected: Expected, text: str) -> str:
    num_tokens = len(record.tokens)
    if num_tokens != len(expected.tokens) or record.text != text:
        return f"ended after {num_tokens} of {len(expected.tokens)} tokens"
    if record.finish != expected.finish:
        return f"ended with {record.finish} instead of {expected.finish}"
    if record.usage is not None and record.usage != (record.num_prompt_tokens, num_tokens):
        return f"counts {record.usage} tokens instead of {(record.num_prompt_tokens, num_tokens)}"
    if record.kind == "logprobs" and record.num_logprobs != num_tokens:
        return f"has {record.num_logprobs} log-probabilities for {num_tokens} tokens"
    return ""


def _leaks(run: Run) -> list[str]:
    found = ["the suite did not become idle, with all blocks free, within 10 s"] if run.idle_after_s is None else []
    return found + leaked(run.before, run.after)


def leaked(before: Mapping[str, Holdings], after: Mapping[str, Holdings]) -> list[str]:
    """Who holds more than before, and more of what."""
    found = []
    for name, was in before.items():
        if name not in after:
            found.append(f"{name} could not be asked")
        elif (tasks := after[name].tasks) > was.tasks + SPARE_TASKS:
            found.append(f"{name}: {was.tasks} tasks became {tasks}")
        elif (count := after[name].num_descriptors) > was.num_descriptors + SPARE_DESCRIPTORS:
            more = Counter(after[name].descriptors) - Counter(was.descriptors)
            kinds = ", ".join(f"{number} {kind}" for kind, number in more.most_common(4))
            found.append(f"{name}: {was.num_descriptors} descriptors became {count}; new are {kinds}")
    return found


def _integrity(run: Run) -> Verdict:
    about = "no KV block is used unless length, checksum, ticket and epoch match"
    if not run.flips_sent:
        return Verdict("I4", about, None, "no block was damaged in this run; see I2 and I5")
    caught = run.flips_caught >= run.flips_sent
    return Verdict("I4", about, caught, f"{run.flips_sent} damaged, {run.flips_caught} caught")


def _counted(run: Run) -> Verdict:
    about = "received = ok + cancelled + rejected + failed"
    if not run.counters:
        return Verdict("I7", about, None, "nobody counted")
    wrong = [f"{name}: {dict(counts)}" for name, counts in run.counters.items() if not adds_up(counts)]
    return _verdict("I7", about, wrong)


def adds_up(counts: Mapping[str, int]) -> bool:
    return counts["received"] == sum(counts[how] for how in ("ok", "cancelled", "rejected", "failed"))


def _memory(run: Run) -> Verdict:
    about = f"memory grows by less than {MAX_GROWTH_MIB:.0f} MB per 1,000 requests"
    found = growths(run.samples)
    judged = [(growth.mib_per_1000, growth.name, growth.pid) for growth in found if growth.mib_per_1000 is not None]
    lives = f"{len(judged)} of {len(found)} lives long enough to judge"
    if not judged:
        return Verdict("I8", about, None, lives)
    worst, name, pid = max(judged)
    return Verdict("I8", about, worst < MAX_GROWTH_MIB, f"{lives}; worst: {name} ({pid}), {worst:+.2f} MB")


def _codes(records: Sequence[Record]) -> list[str]:
    odd = [record for record in records if record.code is not None and record.code not in DOCUMENTED_CODES]
    return [f"request {record.number}: {record.code} {record.reason}: {record.message}" for record in odd]


def _load(run: Run) -> list[str]:
    """A fault that met no request proves nothing."""
    problems = []
    if len(run.records) < 0.95 * run.planned_load:
        problems.append(f"{len(run.records)} requests of {run.planned_load} were sent")
    if len(run.records) >= SOAK_REQUESTS and _memory(run).held is None:
        problems.append("no process lived long enough for its memory to be judged")
    met = sum(fault.in_flight > 0 for fault in run.faults)
    if met < 0.8 * len(run.faults):
        problems.append(f"only {met} of {len(run.faults)} faults met requests in flight")
    wanted = [record for record in run.records if record.kind not in ("cancel", "deadline", "bad")]
    if sum(record.code == "OK" for record in wanted) < 0.5 * len(wanted) or not run.records:
        problems.append("less than half of the requests that wanted an answer got it")
    return problems


def tally(records: Sequence[Record], key: Callable[[Record], str]) -> dict[str, int]:
    """How many records there are of each kind, by name."""
    counts: dict[str, int] = {}
    for record in records:
        counts[key(record)] = counts.get(key(record), 0) + 1
    return dict(sorted(counts.items()))
