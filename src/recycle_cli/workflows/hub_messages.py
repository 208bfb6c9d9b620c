"""What the Hub's client says while it waits, told to the user: a limit can mean minutes."""

import contextlib
import logging
import re
import time
from collections.abc import Iterator

from recycle_cli.progress import Progress

LOGGER = "huggingface_hub"
WAITING = re.compile(r"Rate limited\. Waiting (?P<seconds>[\d.]+)s")
QUIET_S = 5.0


@contextlib.contextmanager
def waits_told(progress: Progress) -> Iterator[None]:
    """Has waits for the Hub's rate limit said, and its other troubles with `-v`."""
    logger = logging.getLogger(LOGGER)
    before = logger.level, logger.handlers[:], logger.propagate
    logger.handlers[:] = [_Teller(progress)]
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield
    finally:
        level, logger.handlers[:], logger.propagate = before
        logger.setLevel(level)


class _Teller(logging.Handler):
    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.WARNING)
        self._progress = progress
        self._said = -QUIET_S

    def emit(self, record: logging.LogRecord) -> None:
        match = WAITING.match(record.getMessage())
        if match is None:
            self._progress.detail(record.getMessage())
        elif time.monotonic() - self._said >= QUIET_S:  # all workers wait for the same limit
            self._said = time.monotonic()
            seconds = float(match["seconds"])
            self._progress.message(f"the Hub's rate limit is reached: waiting {seconds:.0f} s")
