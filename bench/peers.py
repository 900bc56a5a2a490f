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
    """`command` starts it; `installed` says whether it can be started by that Python; `hint` how to get it. Of several ways to the
    same `engine` the first that is installed is taken."""

    name: str
    engine: str
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


def _openvino(place: Place) -> Sequence[str]:
    numbers = map(str, (place.port, place.threads, SLOTS))
    return (place.python, str(Path(__file__).with_name("openvino_front.py")), str(place.model), *numbers)


PEERS = (
    Peer(
        "llama.cpp", "llama.cpp", lambda python: shutil.which("llama-server") is not None, _llama_server, "llama-server on the PATH"
    ),
    Peer("llama.cpp (xllamacpp)", "llama.cpp", _has_module("xllamacpp"), _xllamacpp, "pip install xllamacpp"),
    Peer("OpenVINO", "OpenVINO", _has_module("openvino_genai"), _openvino, "pip install openvino-genai"),
)


def installed(peers: Sequence[Peer], python: str) -> list[Peer]:
    """Of each engine the first that `python` can start; what cannot be had is said. SystemExit if there is no such Python."""
    if shutil.which(python) is None:
        raise SystemExit(f"--peer-python {python}: there is no such program")
    found: dict[str, Peer] = {}
    for peer in peers:
        if peer.engine not in found and peer.installed(python):
            found[peer.engine] = peer
    for engine in dict.fromkeys(peer.engine for peer in peers):
        if engine not in found:
            hints = " or ".join(peer.hint for peer in peers if peer.engine == engine)
            print(f"left out: {engine} is not installed ({hints}; another Python: --peer-python)", flush=True)
    return list(found.values())


@dataclass(frozen=True)
class RunningPeer:
    """A peer that was started here, and how long it took to its first answer."""

    url: str
    process_id: int
    start_s: float


@contextlib.contextmanager
def running(peer: Peer, place: Place, log: Path) -> Iterator[RunningPeer]:
    """The peer while it serves. SystemExit if it does not come up; its own words are in `log`."""
    with log.open("wb") as output:
        began = time.monotonic()
        child = subprocess.Popen(peer.command(place), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            url = f"http://127.0.0.1:{place.port}"
            _wait_until_serving(url, child, peer.name, log)
            yield RunningPeer(url, child.pid, time.monotonic() - began)
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
        time.sleep(0.1)


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
