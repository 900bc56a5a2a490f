"""OpenVINO GenAI behind as much of OpenAI's completions API as bench.cpu asks for.

`python openvino_front.py MODEL PORT THREADS SLOTS`, in the peer's own Python, so it imports nothing of ours. Prompts are token ids,
answers too; all requests share one pipeline with continuous batching, whose steps run on a thread of their own. Text is not made,
which spares this peer work that others do.
"""

import json
import queue
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import openvino
import openvino_genai

CACHE_GIB = 2

Tokens = queue.SimpleQueue[list[int] | None]


class Engine:
    """`submit` gives a queue of lists of tokens as they come; None is the end."""

    def __init__(self, model: str, threads: int, slots: int) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_seqs, scheduler.cache_size = slots, CACHE_GIB
        # Without the number of threads a step takes twice as long here.
        properties = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)
        self._arrived: queue.SimpleQueue[tuple[list[int], int, Tokens]] = queue.SimpleQueue()
        self._running: dict[int, tuple[Any, Tokens]] = {}
        self._count = 0

    def submit(self, prompt: Sequence[int], num_tokens: int) -> Tokens:
        tokens: Tokens = queue.SimpleQueue()
        self._arrived.put((list(prompt), num_tokens, tokens))
        return tokens

    def run(self) -> None:
        while True:
            while not self._running or not self._arrived.empty():
                self._admit(*self._arrived.get())
            self._pipeline.step()
            for number in list(self._running):
                self._deliver(number)

    def _admit(self, prompt: list[int], num_tokens: int, tokens: Tokens) -> None:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = num_tokens, True, False
        self._count += 1
        ids = openvino.Tensor(np.array([prompt], np.int64))
        self._running[self._count] = self._pipeline.add_request(self._count, ids, config), tokens

    def _deliver(self, number: int) -> None:
        handle, tokens = self._running[number]
        while handle.can_read():
            tokens.put([token for output in handle.read().values() for token in output.generated_ids])
        if handle.get_status() != openvino_genai.GenerationStatus.RUNNING:
            tokens.put(None)
            del self._running[number]


class Handler(BaseHTTPRequestHandler):
    """POST /v1/completions, streamed or not."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    engine: Engine

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        tokens = self.engine.submit(body["prompt"], body["max_tokens"])
        if body.get("stream"):
            self._stream(tokens, len(body["prompt"]))
        else:
            self._send_whole(tokens)

    def _stream(self, tokens: Tokens, prompt_tokens: int) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        count = 0
        while (ids := tokens.get()) is not None:
            count += len(ids)
            self._send_event(json.dumps({"choices": [{"text": "", "token_ids": ids}]}))
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": count}
        self._send_event(json.dumps({"choices": [], "usage": usage}))
        self._send_event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def _send_event(self, text: str) -> None:
        data = f"data: {text}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def _send_whole(self, tokens: Tokens) -> None:
        found = []
        while (ids := tokens.get()) is not None:
            found += ids
        content = json.dumps({"choices": [{"text": "", "token_ids": found}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing a request."""


class Front(ThreadingHTTPServer):
    """Keeps what connects during a step, in which no other thread gets on; beyond the queue the kernel resets connections."""

    request_queue_size = 128


def main() -> None:
    model, port, threads, slots = sys.argv[1], *map(int, sys.argv[2:])
    Handler.engine = Engine(model, threads, slots)
    threading.Thread(target=Handler.engine.run, daemon=True).start()
    Front(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
