"""What went wrong lately: the latest warnings of the "kvstore" logger, for people who look at the daemon."""

from __future__ import annotations

import logging
from collections import deque

KEPT = 100
LONGEST = 500  # characters of a sentence


class Failures(logging.Handler):
    """Keeps the latest warnings and errors, each as one line. Belongs to a logger between ``attach`` and ``close``."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._kept: deque[tuple[float, str]] = deque(maxlen=KEPT)  # guarded by the handler's own lock
        self._logger: logging.Logger | None = None

    def attach(self, logger: str = "kvstore") -> None:
        """From now on it hears this logger and all below."""
        self._logger = logging.getLogger(logger)
        self._logger.addHandler(self)

    def close(self) -> None:
        """Hears nothing more; what it kept stays. Again is no error."""
        if self._logger is not None:
            self._logger.removeHandler(self)
            self._logger = None
        super().close()

    def emit(self, record: logging.LogRecord) -> None:
        """See ``logging.Handler``."""
        try:
            text = " ".join(record.getMessage().split())
        except (TypeError, ValueError):  # the arguments do not fit the text; who logged it must not suffer
            text = str(record.msg)
        if record.exc_info and record.exc_info[0] is not None:
            text = f"{text}: {record.exc_info[0].__name__}"
        self._kept.append((record.created, text[:LONGEST]))

    def recent(self) -> list[tuple[float, str]]:
        """Oldest first: when (Unix seconds), and the sentence. Any thread."""
        self.acquire()
        try:
            return list(self._kept)
        finally:
            self.release()
