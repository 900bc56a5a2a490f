"""Where the failpoints sit: wraps the named places of the workers' classes, in this process only."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

from kvtransfer.connection import Connection
from kvtransfer.frames import NewsFrame
from kvtransfer.outbox import Reading
from kvtransfer.producer import KvProducer
from kvtransfer.puller import KvPuller
from tests.faults.failpoints import Failpoint, gate_of

logger = logging.getLogger(__name__)


def install(role: str, points: Sequence[Failpoint]) -> None:
    """Wraps every place of the role that some point names."""
    for place in {point.place for point in points}:
        if place == "wire":
            _flip_on_the_wire([point for point in points if point.place == place])
            continue
        _INSTALLERS[role][place](gate_of(points, place))


def remember_pullers(pullers: list[Any]) -> None:
    """Lists every KvPuller of this process as it is made."""
    make = KvPuller.__init__

    def wrapped(self: KvPuller, *arguments: Any, **options: Any) -> None:
        make(self, *arguments, **options)
        pullers.append(self)

    KvPuller.__init__ = wrapped  # type: ignore[method-assign]


def wrap_runner(runner: Any, points: Sequence[Failpoint]) -> None:
    """The engine's steps: before and after the model runs, and at the sight of a prompt."""
    before, after, prompt = (gate_of(points, place) for place in ("step.before", "step.after", "prompt"))
    forward = runner.forward

    def wrapped(slices: Sequence[Any], *rest: Any, **options: Any) -> Any:
        for piece in slices:
            prompt(piece.token_ids)
        before(())
        logits = forward(slices, *rest, **options)
        after(())
        return logits

    runner.forward = wrapped


def _method(owner: type, name: str, *, after: bool = False) -> Callable[[Any], None]:
    def install_at(gate: Callable[[], None]) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if not after:
                gate()
            result = original(*arguments, **options)
            if after:
                gate()
            return result

        setattr(owner, name, wrapped)

    return install_at


def _pull(*, after: bool) -> Callable[[Any], None]:
    def install_at(gate: Callable[[], None]) -> None:
        original = KvPuller.pull

        async def wrapped(*arguments: Any, **options: Any) -> Any:
            if not after:
                gate()
            result = await original(*arguments, **options)
            if after:
                gate()
            return result

        KvPuller.pull = wrapped  # type: ignore[method-assign]

    return install_at


def _told(*, after: bool) -> Callable[[Any], None]:
    """Counts runs of blocks on their way to a consumer: before one is sent, or after it was."""

    def install_at(gate: Callable[[], None]) -> None:
        name = "told" if after else "news"
        original = getattr(Reading, name)

        @functools.wraps(original)
        def wrapped(self: Reading, *frame: NewsFrame) -> NewsFrame | None:
            found: NewsFrame | None = original(self, *frame)
            if (found or frame[0]).num_blocks:
                gate()
            return found

        setattr(Reading, name, wrapped)

    return install_at


def _engine(module: str, name: str) -> Callable[[Any], None]:
    """After a method of a worker's engine, which is imported only where it is wanted."""

    def install_at(gate: Callable[[], None]) -> None:
        engine = importlib.import_module(f"{module}.engine")
        owner = engine.PrefillEngine if module == "prefill_svc" else engine.DecodeEngine
        _method(owner, name, after=True)(gate)

    return install_at


def _flip_on_the_wire(points: Sequence[Failpoint]) -> None:
    """A consumer gets one wrong bit in a run of blocks; the producer's pool and its checksums stay as they are."""
    flush, send_blocks = Connection.flush, Connection.send_blocks
    headers = ContextVar("headers", default=False)

    async def wrapped_flush(self: Connection) -> None:
        """A message's own bytes may take the same way as blocks, and are left alone."""
        token = headers.set(True)
        try:
            await flush(self)
        finally:
            headers.reset(token)

    async def wrapped_blocks(self: Connection, blocks: Sequence[memoryview], check: Callable[[], None]) -> None:
        if not headers.get() and any([point.due() for point in points]):
            damaged = bytearray(blocks[0])
            damaged[len(damaged) // 2] ^= 0x10
            blocks = [memoryview(damaged), *blocks[1:]]
            logger.warning("failpoint wire: a bit of a block was flipped")
        await send_blocks(self, blocks, check)

    Connection.flush = wrapped_flush  # type: ignore[method-assign]
    Connection.send_blocks = wrapped_blocks  # type: ignore[method-assign]


def _in_runner(gate: Any) -> None:
    """Installed by `wrap_runner`, once there is a runner."""


_STEPS = {"step.before": _in_runner, "step.after": _in_runner, "prompt": _in_runner}
_INSTALLERS: dict[str, dict[str, Callable[[Any], None]]] = {
    "gateway": {},
    "prefill_svc": {
        **_STEPS,
        "admit": _engine("prefill_svc", "submit"),
        "blocks.before": _told(after=False),
        "blocks.after": _told(after=True),
        "finish": _method(KvProducer, "finish"),
        "first_token": _method(KvProducer, "finish", after=True),
    },
    "decode_svc": {
        **_STEPS,
        "reserve": _engine("decode_svc", "reserve"),
        "pull.before": _pull(after=False),
        "pull.after": _pull(after=True),
        "activate": _engine("decode_svc", "activate"),
    },
}
