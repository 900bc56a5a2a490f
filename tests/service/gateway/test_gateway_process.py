"""The gateway as a process: how it starts, and how it ends before it has."""

import subprocess
import sys

# A gateway whose model takes longer to load than anyone waits.
ENDLESS_LOAD = """
import sys, threading
import gateway.app
from gateway.__main__ import main

def load(name):
    print("loading", flush=True)
    threading.Event().wait()

gateway.app._load = load
sys.argv[1:] = ["--exit-with-parent", "--port", "0"]
main()
"""


def test_a_gateway_that_loads_leaves_with_its_parent() -> None:
    with subprocess.Popen((sys.executable, "-c", ENDLESS_LOAD), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            assert process.stdout.readline() == b"loading\n"
            process.stdin.close()
            process.wait(10)
        finally:
            process.kill()


def test_a_model_that_cannot_be_had_is_said_in_one_line_and_not_tried_again() -> None:
    command = (sys.executable, "-m", "gateway", "--model", "no-such-model", "--port", "0")
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert "no-such-model" in ended.stderr
    assert "Traceback" not in ended.stderr
