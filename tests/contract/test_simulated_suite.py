"""The simulation's stand-ins for model, sockets and gRPC still have what the product asks of them."""

import subprocess
import sys
from pathlib import Path


def test_a_few_simulated_suites_serve(repository: Path) -> None:
    """tests/simulation runs many more; these say within seconds that a change here needs one there."""
    command = [sys.executable, "-m", "tests.simulation", "--seeds", "4", "--stop-after", "1"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
