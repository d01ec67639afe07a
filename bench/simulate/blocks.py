"""Ids of blocks of tokens, for logs that hold the tokens or the words themselves."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

_ITEM = 4  # bytes of a token
ROOT = -1


class Blocks:
    """Numbers for blocks: equal ones for equal tokens behind equal tokens, exactly, from 0 on."""

    def __init__(self, block_tokens: int) -> None:
        self._bytes = block_tokens * _ITEM
        self._numbers: dict[tuple[int, bytes], int] = {}

    def of(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """The blocks of a prompt, root first; the last one may be shorter. Tokens are below 2**32."""
        text, found, block = array("I", tokens).tobytes(), [], ROOT
        for start in range(0, len(text), self._bytes):
            block = self._numbers.setdefault((block, text[start : start + self._bytes]), len(self._numbers))
            found.append(block)
        return tuple(found)
