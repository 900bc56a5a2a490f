"""What the product logs."""

import logging
from collections.abc import Callable

from tests.simulation.loop import Violation
from tests.simulation.world import World


class Records(logging.Handler):
    """Log lines of the product: errors are violations (I6) unless an engine was broken on purpose."""

    def __init__(self, world: World, tell: Callable[[str], None] | None) -> None:
        super().__init__()
        self._world = world
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        world = self._world
        if not world.loop.current.alive:
            return
        if self._tell is not None:
            self._tell(f"{world.loop.current}: {record.getMessage()}")
        if record.levelno >= logging.ERROR and not (world.poison_deaths and "engine failed" in record.getMessage()):
            error = record.exc_info[1] if record.exc_info else None
            if not isinstance(error, Violation):
                world.loop.violations.append(f"I6: {world.loop.current} logged: {record.getMessage()} {error!r}")
