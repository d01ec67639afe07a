"""Models that test modules share, made once: a plugin of pytest that they name."""

from pathlib import Path

import chats
import models
import pytest


@pytest.fixture(scope="session")
def spoken() -> list[str]:
    """What the tokenizer is made of."""
    return chats.texts()


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory, spoken: list[str]) -> Path:
    """A model of float32 that chats."""
    return models.llama(tmp_path_factory.mktemp("llama"), spoken)
