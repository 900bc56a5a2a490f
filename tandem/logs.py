"""Log lines for people, on stderr."""

import logging
import sys


def configure_logging(process: str) -> None:
    """One line per event: time, level, process, message; warnings and above from libraries, everything from ours."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {process}: %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for package in ("tandem", "llm", "gateway", "prefill_svc", "decode_svc", "kvtransfer"):
        logging.getLogger(package).setLevel(logging.INFO)


class LoadLog:
    """A progress callback that logs each stage once, when it begins."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._stage = ""

    def __call__(self, fraction: float, stage: str) -> None:
        """`fraction` of the whole load is done, in [0, 1]; `stage` says what is being done now."""
        if stage != self._stage:
            self._stage = stage
            self._logger.info("loading %3.0f %%: %s", 100 * fraction, stage)
