"""Other servers of the same model file, started here if they are installed: each is a program of its own, measured over HTTP.

A peer may live in another Python's environment, since their requirements seldom agree with ours: --peer-python names it.
"""

import contextlib
import importlib.util
import json
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tandem.addresses import free_port

START_LIMIT_S = 180.0
SLOTS = 16
SLOT_TOKENS = 1536

# Runs in the peer's Python.
_XLLAMACPP = """
import sys, threading, xllamacpp
model, port, threads, slots, context = sys.argv[1], *map(int, sys.argv[2:])
params = xllamacpp.CommonParams()
params.model.path, params.hostnames, params.port = model, ["127.0.0.1"], port
params.n_parallel, params.n_ctx = slots, context
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
server = xllamacpp.Server(params)
threading.Event().wait()
"""


@dataclass(frozen=True)
class Place:
    """What a peer is to serve, where, and with how many threads."""

    python: str
    model: Path
    port: int
    threads: int


@dataclass(frozen=True)
class Peer:
    """`command` starts it; `installed` says whether it can be started by that Python; `hint` how to get it."""

    name: str
    installed: Callable[[str], bool]
    command: Callable[[Place], Sequence[str]]
    hint: str


def _has_module(name: str) -> Callable[[str], bool]:
    def look(python: str) -> bool:
        if python == sys.executable:
            return importlib.util.find_spec(name) is not None
        program = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is None)"
        return subprocess.run((python, "-c", program), capture_output=True, check=False).returncode == 0

    return look


def _llama_server(place: Place) -> Sequence[str]:
    context = str(SLOTS * SLOT_TOKENS)
    slots = ("--parallel", str(SLOTS), "--ctx-size", context, "--threads", str(place.threads))
    return ("llama-server", "--model", str(place.model), "--host", "127.0.0.1", "--port", str(place.port), *slots)


def _xllamacpp(place: Place) -> Sequence[str]:
    numbers = map(str, (place.port, place.threads, SLOTS, SLOTS * SLOT_TOKENS))
    return (place.python, "-c", _XLLAMACPP, str(place.model), *numbers)


PEERS = (
    Peer("llama.cpp", lambda python: shutil.which("llama-server") is not None, _llama_server, "llama-server on the PATH"),
    Peer("llama.cpp (xllamacpp)", _has_module("xllamacpp"), _xllamacpp, "pip install xllamacpp"),
)


@contextlib.contextmanager
def running(peer: Peer, place: Place, log: Path) -> Iterator[str]:
    """The URL of the peer while it serves. SystemExit if it does not come up; its own words are in `log`."""
    with log.open("wb") as output:
        child = subprocess.Popen(peer.command(place), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            url = f"http://127.0.0.1:{place.port}"
            _wait_until_serving(url, child, peer.name, log)
            yield url
        finally:
            child.terminate()
            try:
                child.wait(10.0)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _wait_until_serving(url: str, child: subprocess.Popen[bytes], name: str, log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while not _answers(url):
        if child.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"{name} did not start; {log} says why")
        time.sleep(0.3)


def _answers(url: str) -> bool:
    body = json.dumps({"prompt": [200, 201], "max_tokens": 1}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=START_LIMIT_S) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def place_for(python: str, model: Path, threads: int) -> Place:
    return Place(python, model, free_port("127.0.0.1"), threads)
