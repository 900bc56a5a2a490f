"""`python -m tests.simulation`: many seeds and a verdict, or one seed with its log."""

import argparse
import gc
import logging
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from tests.simulation.seams import Seams, simulated_modules
from tests.simulation.simulation import Result, run


def main() -> int:
    """0 if nothing was violated."""
    if os.environ.get("PYTHONHASHSEED") != "0":
        # Sets of strings would be in another order in every process.
        os.execve(sys.executable, [sys.executable, "-m", "tests.simulation", *sys.argv[1:]], {**os.environ, "PYTHONHASHSEED": "0"})
    # What a killed process had not begun is none of its failures.
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)
    sys.unraisablehook = lambda _: None
    arguments = _arguments()
    with simulation_modules(arguments.without):
        if arguments.seed is not None:
            return _replay(arguments.seed)
        return _campaign(range(arguments.first, arguments.first + arguments.seeds), arguments.stop_after, arguments.without)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Deterministic simulation of the suite.")
    parser.add_argument("--seeds", type=int, default=2000, help="how many seeds to run")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="replay one seed with its log")
    parser.add_argument("--without", default="", help="take a protection away, by its name in mutations.py")
    parser.add_argument("--stop-after", type=int, default=10, help="failing seeds after which to stop")
    return parser.parse_args()


@contextmanager
def simulation_modules(without: str = "") -> Iterator[None]:
    """The product's modules as the simulation needs them, and without one of their protections if it is named."""
    from tests.simulation import mutations, product

    def further(seams: Seams) -> None:
        product.replace(seams)
        if without:
            mutations.MUTATIONS[without](seams)

    with simulated_modules(further):
        yield


def _replay(seed: int) -> int:
    logging.disable(logging.NOTSET)
    for name in ("tandem", "gateway", "prefill_svc", "decode_svc", "kvtransfer", "llm"):
        logging.getLogger(name).setLevel(logging.DEBUG)
    result = run(seed, verbose=print)
    print(f"\nseed {seed}: {result.num_events} events; requests: {_counts(result.outcomes)}; faults: {_counts(result.injected)}")
    for violation in result.violations:
        print(f"  violated {violation}")
    return 1 if result.violations else 0


def _campaign(seeds: range, stop_after: int, without: str) -> int:
    logging.disable(logging.WARNING)
    gc.disable()
    started, failed, totals, injected, outcomes = (
        time.perf_counter(),
        list[Result](),
        Counter[str](),
        Counter[str](),
        Counter[str](),
    )
    for number, seed in enumerate(seeds, start=1):
        result = run(seed)
        totals["events"] += result.num_events
        totals["seeds"] += 1
        injected += result.injected
        outcomes += result.outcomes
        if result.violations:
            failed.append(result)
            _print_failure(result, without)
            if len(failed) >= stop_after:
                break
        if number % 20 == 0:
            gc.collect()
        if sys.stderr.isatty() and number % 10 == 0:
            print(f"\r{number} of {len(seeds)} seeds", end="", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - started
    rate = f"{totals['seeds'] / seconds:.0f} seeds/s"
    print(f"\nSimulation: {totals['seeds']} seeds, {totals['events']} events in {seconds:.1f} s, {rate}")
    print(f"  faults    {_counts(injected)}")
    print(f"  requests  {_counts(outcomes)}")
    print(f"  invariants {'held in every seed' if not failed else f'violated in {len(failed)} seeds'}")
    return 1 if failed else 0


def _print_failure(result: Result, without: str) -> None:
    arguments = f" ARGS='--without {without}'" if without else ""
    print(f"seed {result.seed} failed; replay it with: make sim SEED={result.seed}{arguments}")
    for violation in result.violations[:4]:
        print(f"    {violation[:300]}")


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counter.items(), key=lambda item: -item[1])) or "none"


if __name__ == "__main__":
    raise SystemExit(main())
