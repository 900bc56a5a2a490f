"""`python -m tests.simulation`: many seeds and a verdict, or one scenario with its log."""

import argparse
import os
import sys

from tests.simulation import campaign, regressions, worker
from tests.simulation.regressions import Regression
from tests.simulation.scenario import Scenario


def main() -> int:
    """The exit status; see `campaign.run`."""
    arguments = _arguments()
    if arguments.serve:
        worker.serve(arguments.without)
        return 0
    if arguments.seed is not None or arguments.regression or arguments.regressions or arguments.noticed:
        _with_sets_in_order()
        return _run_here(arguments)
    plan = campaign.Plan(
        first=arguments.first,
        num_seeds=arguments.seeds,
        num_processes=max(1, arguments.processes),
        limit_s=arguments.limit_s,
        stop_after=arguments.stop_after,
        without=arguments.without,
    )
    return campaign.run(plan)


def _run_here(arguments: argparse.Namespace) -> int:
    """Few scenarios in this very process. Only here is the product loaded: a campaign leaves that, which takes seconds, to the
    processes that it starts."""
    from tests.simulation import checks
    from tests.simulation.draw import scenario

    if arguments.seed is not None:
        return _replay(scenario(arguments.seed), arguments.without, arguments.record)
    if arguments.regression:
        return max(_replay(each, arguments.without) for each in regressions.load(arguments.regression).scenarios)
    return checks.regressions_hold() if arguments.regressions else checks.noticed(arguments.noticed)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description="Deterministic simulation of the suite.")
    parser.add_argument("--seeds", type=int, default=2000, help="how many seeds to run")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--processes", type=int, default=1, help="how many processes run them")
    parser.add_argument("--limit-s", type=float, help="begin no further seeds after so many seconds")
    parser.add_argument("--seed", type=int, help="replay one seed with its log")
    parser.add_argument(
        "--record", metavar="NAME", help="with --seed, if it fails: keep what it asks for as a regression of that name"
    )
    parser.add_argument("--regression", metavar="NAME", help="replay a regression with its log")
    parser.add_argument("--regressions", action="store_true", help="run all regressions, a line for each")
    parser.add_argument(
        "--noticed", nargs="+", metavar="NAME=SEED", help="take each protection away: does a seed from that on notice?"
    )
    parser.add_argument("--without", default="", help="take a protection away, by its name in mutations.py")
    parser.add_argument("--stop-after", type=int, default=10, help="failing seeds after which to stop")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _with_sets_in_order() -> None:
    """Sets of strings would be in another order in every process."""
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.execve(sys.executable, [sys.executable, "-m", "tests.simulation", *sys.argv[1:]], {**os.environ, "PYTHONHASHSEED": "0"})


def _replay(wanted: Scenario, without: str, record: str = "") -> int:
    outcome = worker.replay(wanted, without)
    requests, faults = campaign.counts(outcome.requests), campaign.counts(outcome.injected)
    print(
        f"\nseed {wanted.seed}: {outcome.num_events} events, digest {outcome.digest:016x}; requests: {requests}; faults: {faults}"
    )
    for violation in outcome.violations:
        print(f"  violated {violation}")
    if record and outcome.violations:
        print(f"recorded in {regressions.record(record, Regression(outcome.violations[0], (wanted.seed,), wanted))}")
    return 1 if outcome.violations else 0


if __name__ == "__main__":
    raise SystemExit(main())
