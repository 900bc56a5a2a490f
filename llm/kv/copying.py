"""Blocks that a device copies while the host goes on."""

from typing import Protocol

from llm.kv.block_arrays import Sums


class Event(Protocol):
    """A place in a device's work behind which other work of the device can be ordered: a torch.cuda.Event that was recorded."""

    @property
    def cuda_event(self) -> int: ...


class Copying(Protocol):
    """Blocks on their way. For the thread that began it, but for `wait`. The sums must be asked for once, when it is done."""

    @property
    def event(self) -> Event | None:
        """After it the blocks are in place; None where they are already."""

    def done(self) -> bool: ...

    def wait(self) -> None:
        """Returns when it is done."""

    def sums(self) -> Sums:
        """The checksums of what came, as it was stored."""
