"""`python -m tests.simulation`: many seeds and a verdict, or one seed with its log."""

import argparse
import os
import sys

from tests.simulation import campaign, worker


def main() -> int:
    """The exit status; see `campaign.run`."""
    arguments = _arguments()
    if arguments.serve:
        worker.serve(arguments.without)
        return 0
    if arguments.seed is not None:
        return _replay(arguments.seed, arguments.without)
    plan = campaign.Plan(
        first=arguments.first,
        num_seeds=arguments.seeds,
        num_processes=max(1, arguments.processes),
        limit_s=arguments.limit_s,
        stop_after=arguments.stop_after,
        without=arguments.without,
    )
    return campaign.run(plan)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description="Deterministic simulation of the suite.")
    parser.add_argument("--seeds", type=int, default=2000, help="how many seeds to run")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--processes", type=int, default=1, help="how many processes run them")
    parser.add_argument("--limit-s", type=float, help="begin no further seeds after so many seconds")
    parser.add_argument("--seed", type=int, help="replay one seed with its log")
    parser.add_argument("--without", default="", help="take a protection away, by its name in mutations.py")
    parser.add_argument("--stop-after", type=int, default=10, help="failing seeds after which to stop")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _replay(seed: int, without: str) -> int:
    if os.environ.get("PYTHONHASHSEED") != "0":
        # Sets of strings would be in another order in every process.
        os.execve(sys.executable, [sys.executable, "-m", "tests.simulation", *sys.argv[1:]], {**os.environ, "PYTHONHASHSEED": "0"})
    outcome = worker.replay(seed, without)
    requests, faults = campaign.counts(outcome.requests), campaign.counts(outcome.injected)
    print(f"\nseed {seed}: {outcome.num_events} events, digest {outcome.digest:016x}; requests: {requests}; faults: {faults}")
    for violation in outcome.violations:
        print(f"  violated {violation}")
    return 1 if outcome.violations else 0


if __name__ == "__main__":
    raise SystemExit(main())
