"""The process that sends: `python -m bench.generator_process`, started by `bench.generator_pool`.

Reads lines of JSON from standard input: first a target, then shares; answers each with one line, `{}` once it is connected and then
a measurement a share. Ends at the end of its input.
"""

import asyncio
import json
import sys
from typing import Any

from bench.generator import Client, Share, run_share
from tandem.pauses import avoid_pauses
from tandem.server import loop_factory


async def serve() -> None:
    loop = asyncio.get_running_loop()
    client = make_client(json.loads(await loop.run_in_executor(None, sys.stdin.readline)))
    avoid_pauses()
    try:
        answer({})
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            message = json.loads(line)
            measurement = await run_share(client, Share.from_json(message["share"]), message["begin_ns"])
            answer(measurement.to_json())
    finally:
        await client.close()


def make_client(target: dict[str, Any]) -> Client:
    if "address" in target:
        from bench.tandem_client import TandemClient

        return TandemClient(target["address"])
    from bench.openai_client import OpenAiClient, OpenAiTarget

    return OpenAiClient(OpenAiTarget(**target))


def answer(value: dict[str, Any]) -> None:
    print(json.dumps(value, separators=(",", ":")), flush=True)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(serve())
