"""What is wrong with settings, as who gave them is told."""

import re
from pathlib import Path

import pytest

from kvstore.errors import BadInput
from kvstore.settings import load

PASSWORD = "hunter2-and-more"


def refused(
    file: Path | None = None, flags: dict[str, object] | None = None, environ: dict[str, str] | None = None
) -> list[str]:
    """What is wrong, a sentence each. What is not a sentence for one who mends it fails here."""
    with pytest.raises(BadInput) as caught:
        load(file, flags, environ or {}, serve=False)
    said = str(caught.value).split("\n  ")
    counted = re.match(r"(\d+) things are wrong with the settings:$", said[0])
    sentences = said[1:] if counted else said
    assert not counted or len(sentences) == int(counted[1]) > 1
    assert PASSWORD not in str(caught.value)
    return sentences


def file(folder: Path, text: str, name: str = "kvstore.toml", mode: int = 0o600) -> Path:
    path = folder / name
    path.write_text(text)
    path.chmod(mode)
    return path
