"""Files that hold secrets."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from kvstore.errors import BadInput

MIN_SECRET, MAX_SECRET = 16, 64 << 10  # bytes


def read_secret(path: Path, name: str) -> bytes:
    """The bytes of a secret file, without the line break at its end. ``name``: the setting that names it.

    Raises ``BadInput`` for one that others than its owner can read, that is empty, or too short to be a secret.
    """
    try:
        with open(path, "rb", opener=lambda file, flags: os.open(file, flags | os.O_CLOEXEC | os.O_NONBLOCK)) as file:
            complaint = too_open(path, name, os.fstat(file.fileno()))
            secret = b"" if complaint else file.read(MAX_SECRET + 1).rstrip(b"\r\n")
    except OSError as error:
        raise BadInput(f"{name}: cannot read {path}: {error.strerror}") from error
    if complaint:
        raise BadInput(complaint)
    if not MIN_SECRET <= len(secret) <= MAX_SECRET:
        raise BadInput(f"{name}: {path} must hold {MIN_SECRET} bytes or more, and no more than {MAX_SECRET}")
    return secret


def too_open(path: Path, name: str, found: os.stat_result) -> str | None:
    """What is wrong with a secret file or folder, in a sentence, if it lets in others than its owner.

    One that is root's, when we are not root, may be read by its group: service managers and orchestrators hand secrets
    over so, and only root could have chosen the group.
    """
    folder = stat.S_ISDIR(found.st_mode)
    if not folder and not stat.S_ISREG(found.st_mode):
        return f"{name}: {path} is no plain file"
    handed = not folder and found.st_uid == 0 != os.geteuid()
    mode = stat.S_IMODE(found.st_mode)
    if mode & (0o037 if handed else 0o077):
        closed = "700" if folder else "600"
        return f"{name}: others than its owner have access to {path} (mode {mode:04o}); chmod {closed} {path}"
    return None
