"""Where commands write: answers to standard output, everything about them to standard error."""

from __future__ import annotations

import sys
from io import TextIOWrapper
from typing import TextIO

from rich.console import Console
from rich.text import Text

# C0 and C1 control characters but tab and newline: generated text must not steer the terminal.
_CONTROLS = {code: None for code in (*range(32), 127, *range(128, 160)) if chr(code) not in "\t\n"}


class CommandError(Exception):
    """A command failed; `advice` tells the person what to do about it."""

    def __init__(self, message: str, advice: str = "") -> None:
        super().__init__(message)
        self.advice = advice


def output() -> Console:
    """Standard output as it is now (tests replace it)."""
    return Console(highlight=False)


def notes() -> Console:
    """Standard error as it is now."""
    return Console(stderr=True, highlight=False)


def lenient_input() -> TextIO:
    """Standard input. Bytes that are no text do not fail when they are read; `make_request` refuses what they become. Raises
    CommandError if it is closed."""
    if sys.stdin is None:
        raise CommandError(
            "there is no standard input to read from", "Open one, or give `tandem generate` the prompt as an argument."
        )
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    return sys.stdin


def write_text(console: Console, text: str) -> None:
    """Write a piece of a streamed text, at once and unwrapped; on a terminal without control characters."""
    console.file.write(text.translate(_CONTROLS) if console.is_terminal else text)
    console.file.flush()


def print_error(error: CommandError) -> None:
    console = notes()
    console.print(Text("error: ", style="bold red").append(str(error), style="default not bold"), soft_wrap=True)
    if error.advice:
        console.print(Text(error.advice), soft_wrap=True)
