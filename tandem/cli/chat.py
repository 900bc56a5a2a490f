"""`tandem chat`: a conversation in the terminal."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Callable

import grpc
import grpc.aio
from rich.text import Text

from tandem.api.v1 import model_pb2
from tandem.channels import open_channel
from tandem.cli.client import QUICK_S, Gateway, exit_on_error, explain
from tandem.cli.requests import SamplingOptions, Turn, make_request
from tandem.cli.streaming import Answer, stream_answer, summary
from tandem.cli.terminal import CommandError, lenient_input, notes, output, print_error, write_text

_HELP = """\
/system TEXT  give the model instructions, and start anew; without TEXT: remove them
/reset        forget the conversation
/exit         end; so does Ctrl-D
/help         this list
A line that ends in \\ goes on in the next one. Ctrl-C stops an answer."""


def run_chat(address: str, sampling: SamplingOptions, system: str | None) -> None:
    with exit_on_error(), asyncio.Runner() as runner:
        gateway, channel = runner.run(_open(address))
        try:
            ChatSession(gateway, sampling, system, runner).run(read_line)
        finally:
            runner.run(channel.close())


async def _open(address: str) -> tuple[Gateway, grpc.aio.Channel]:
    channel = open_channel(address)
    return Gateway(channel, address), channel


class ChatSession:
    """A conversation's history, and the loop that extends it. Lives on the main thread; `runner` runs one answer at a time."""

    def __init__(self, gateway: Gateway, sampling: SamplingOptions, system: str | None, runner: asyncio.Runner) -> None:
        self._gateway = gateway
        self._sampling = sampling
        self._runner = runner
        self._system = system
        self._turns: list[Turn] = []
        self._console = output()

    @property
    def turns(self) -> list[Turn]:
        """The conversation, instructions first."""
        return [Turn("system", self._system), *self._turns] if self._system else list(self._turns)

    def run(self, read: Callable[[], str]) -> None:
        """Read and answer until the end of input or /exit."""
        self._greet()
        lenient_input()
        with contextlib.suppress(EOFError):
            while True:
                try:
                    line = read().strip()
                except KeyboardInterrupt:
                    self._note("Ctrl-D or /exit ends the chat.")
                    continue
                if line and not self._take(line):
                    break
        self._note("Bye.")

    def _greet(self) -> None:
        model = self._runner.run(self._describe())
        if not model.chat_capable:
            raise CommandError(f"The model {model.name} has no chat template.", 'Use `tandem generate --raw "…"`.')
        self._note(f"{model.name} at {self._gateway.address} · /help lists commands, Ctrl-D ends")

    async def _describe(self) -> model_pb2.Model:
        try:
            response = await self._gateway.models.GetModel(model_pb2.GetModelRequest(), timeout=QUICK_S)
        except grpc.aio.AioRpcError as error:
            raise explain(error, self._gateway.address) from error
        model: model_pb2.Model = response.model
        return model

    def _take(self, line: str) -> bool:
        """Obey a command or answer; False ends the chat."""
        command, _, rest = line.partition(" ")
        if command in ("/exit", "/quit"):
            return False
        if command == "/system":
            self._system = rest.strip() or None
            self._reset("Instructions set." if self._system else "Instructions removed.")
        elif command == "/reset":
            self._reset("Forgotten.")
        elif command == "/help":
            self._console.print(Text(_HELP))
        elif command.startswith("/") and command[1:].isalpha():
            self._note(f"No command {command}; /help lists them.")
        else:
            self._answer(line)
        return True

    def _reset(self, note: str) -> None:
        self._turns.clear()
        self._note(note)

    def _answer(self, line: str) -> None:
        """Ask and stream. A stopped or broken answer stays in the history as far as it came."""
        self._turns.append(Turn("user", line))
        answer = Answer(time.monotonic())
        try:
            self._runner.run(self._stream(answer))
        except KeyboardInterrupt:
            self._note("\n(stopped)")
        except CommandError as error:
            self._console.out("\n" if answer.text else "", end="")
            print_error(error)
        if answer.text:
            self._turns.append(Turn("assistant", answer.text))
        else:
            self._turns.pop()

    async def _stream(self, answer: Answer) -> None:
        try:
            call = self._gateway.generation.Generate(make_request(self.turns, self._sampling))
            await stream_answer(call, answer, lambda text: write_text(self._console, text))
        except grpc.aio.AioRpcError as error:
            raise explain(error, self._gateway.address) from error
        self._console.out()
        self._note(summary(answer))

    def _note(self, text: str) -> None:
        notes().print(Text(text, style="dim"), soft_wrap=True)


def read_line() -> str:
    """One entry of the person, with history and editing where the terminal can; EOFError at the end."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (its import gives input() editing and history)
    line = input(_prompt("> "))
    while line.endswith("\\"):
        line = line[:-1] + "\n" + input(_prompt("… "))
    return line


def _prompt(sign: str) -> str:
    """The invisible parts are marked so that readline counts the width right."""
    return f"\001\033[1;36m\002{sign}\001\033[0m\002" if sys.stdin.isatty() and sys.stdout.isatty() else ""
