"""A small HTTP server that speaks as much of OpenAI's completions API as a load generator meets, well and badly."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class OpenAiServer:
    """`refused` names fields that it answers with 400. `fault` breaks every stream: "status", "error", "cut", "short"."""

    refused: frozenset[str] = frozenset()
    fault: str = ""
    tokens_per_chunk: int = 1
    requests: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next(
                    int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
                )
                await self._answer(json.loads(await reader.readexactly(length)), writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self.requests.append(body)
        if unknown := self.refused & body.keys():
            await _plain(writer, "400 Bad Request", {"error": {"message": f"unknown field {sorted(unknown)[0]}"}})
        elif self.fault == "status":
            await _plain(writer, "503 Service Unavailable", {})
        else:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
            for event in self._events(body):
                await _chunk(writer, event)
            await _chunk(writer, b"") if self.fault != "cut" else writer.close()

    def _events(self, body: dict[str, Any]) -> list[bytes]:
        """Pieces as they are written: an event in two pieces, two events in one, and a comment between."""
        count = body["max_tokens"] - (self.fault == "short")
        texts = [f" w{number}" for number in range(count)]
        groups = [texts[start : start + self.tokens_per_chunk] for start in range(0, count, self.tokens_per_chunk)]
        chunks = [{"choices": [{"text": "".join(group), "token_ids": list(range(len(group)))}]} for group in groups]
        if "return_token_ids" not in body:
            chunks = [{"choices": [{"text": choice["text"]} for choice in chunk["choices"]]} for chunk in chunks]
        chunks.append({"choices": [{"text": "", "finish_reason": "length"}]})
        if "stream_options" in body:
            size = len(body["prompt"]) if isinstance(body["prompt"], list) else len(body["prompt"].split())
            chunks.append({"choices": [], "usage": {"prompt_tokens": size, "completion_tokens": count}})
        if self.fault == "error":
            chunks.insert(1, {"error": {"type": "engine_dead", "message": "sorry"}})
        stream = (
            b": hello\n\n" + b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n"
        )
        end = len(stream) if self.fault != "cut" else len(stream) // 2
        return [stream[start : min(start + 50, end)] for start in range(0, end, 50)]


@asynccontextmanager
async def openai_server(**options: Any) -> AsyncIterator[OpenAiServer]:
    server = OpenAiServer(**options)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listening.close()


async def _plain(writer: asyncio.StreamWriter, status: str, body: dict[str, Any]) -> None:
    content = json.dumps(body).encode()
    writer.write(
        f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content
    )
    await writer.drain()


async def _chunk(writer: asyncio.StreamWriter, content: bytes) -> None:
    writer.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")
    await writer.drain()
