"""Chat logs as traces: their words in blocks, and arrivals that are drawn, as such logs have no times."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from kvstore.bench import logs
from kvstore.bench.conversation import Chat, Conversation, HashIds, Turn
from kvstore.bench.encoders import WordEncoder, token_ids
from kvstore.bench.simulate.arrivals import Arrivals
from kvstore.bench.simulate.blocks import Blocks
from kvstore.bench.simulate.requests import Request, Trace
from kvstore.errors import BadInput

CHAT = "chat"
BLOCK_TOKENS = 64
VOCABULARY = 1 << 32  # so large that different words are different tokens


def read_chats(path: Path, block_tokens: int | None, seed: int) -> Trace:
    """The conversations of a log that ``bench.logs`` reads. Raises ``BadInput``."""
    arrivals, reader = Arrivals(seed), _Reader(path, block_tokens or BLOCK_TOKENS)
    requests: list[Request] = []
    for conversation in logs.read(path):
        time = arrivals.begin()
        for tokens, output in reader.turns(conversation):
            blocks = reader.blocks.of(tokens)
            requests.append(Request(time, len(tokens), blocks, output, conversation.id))
            time += arrivals.think()
    requests.sort(key=lambda request: request.time)
    return Trace(path.name, CHAT, reader.block_tokens, tuple(requests), arrivals=arrivals.said)


class _Reader:
    """One encoder and one numbering of blocks for all conversations."""

    def __init__(self, path: Path, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.blocks = Blocks(block_tokens)
        self._path = path
        self._encoder = WordEncoder(VOCABULARY)

    def turns(self, conversation: Conversation) -> Iterator[tuple[list[int], int]]:
        """The tokens of each prompt, and how many the log's reply to it has: 0 for the last, which no prompt repeats.

        Raises ``BadInput``.
        """
        for turn, following in pairwise([*conversation.turns, None]):
            assert turn is not None
            where = f"{self._path}, conversation {conversation.id}"
            if isinstance(turn.prompt, HashIds):
                raise BadInput(f"{where}: a trace of hash ids must have one request on each line; write it as JSONL")
            yield token_ids(self._encoder, turn.prompt, where), self._replied(turn, following)

    def _replied(self, turn: Turn, following: Turn | None) -> int:
        if following is None or not isinstance(turn.prompt, Chat) or not isinstance(following.prompt, Chat):
            return 0
        said = following.prompt.messages[len(turn.prompt.messages)]
        return len(self._encoder.encode((said,))) - 2  # without the marks at its beginning and behind it
