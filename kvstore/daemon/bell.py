"""What wakes a thread: rung from anywhere, finalizers too, without a lock."""

from __future__ import annotations

import os


class Bell:
    """Closed when nobody can ring it any more, and not before: its number might be another file's by then."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def __del__(self) -> None:
        os.close(self._fd)

    def fileno(self) -> int:
        """For ``select.poll``."""
        return self._fd

    def ring(self) -> None:
        """Any thread."""
        os.eventfd_write(self._fd, 1)

    def heard(self) -> None:
        """It has rung, however often, and is silent again."""
        os.eventfd_read(self._fd)
