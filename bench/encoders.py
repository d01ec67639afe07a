"""Encoders: prompts become token ids. Two that need nothing downloaded, and one for a real tokenizer.

Ours encode message by message, so a turn's ids are always a prefix of the next turn's.
"""

from __future__ import annotations

import json
import re
import zlib
from functools import lru_cache
from typing import Any, Protocol

from kvstore.bench.conversation import Chat, HashIds, Message, TokenIds
from kvstore.bench.traces import drawn_token_ids
from kvstore.errors import BadInput

Prompt = Chat | TokenIds | HashIds
ROLES = ("system", "user", "assistant", "tool")
MARKS = len(ROLES) + 1  # one for the beginning of each role's message, one for the end of any
WORD = re.compile(r" ?\w+| ?[^\w\s]+|\s")


class Encoder(Protocol):
    """What turns messages into ids below `vocabulary`."""

    @property
    def vocabulary(self) -> int:
        """How many ids there are."""

    @property
    def tokenizer(self) -> Any:
        """What turns plain text into the same ids: `encode(text)`."""

    def encode(self, messages: tuple[Message, ...]) -> list[int]:
        """The ids of a chat, up to where the reply begins."""


def token_ids(encoder: Encoder, prompt: Prompt, where: str) -> list[int]:
    """The ids of any prompt. Raises BadInput, naming `where`, for an id outside the vocabulary."""
    if isinstance(prompt, HashIds):
        return drawn_token_ids(prompt, encoder.vocabulary)
    ids = list(prompt.ids) if isinstance(prompt, TokenIds) else encoder.encode(prompt.messages)
    largest = max(ids, default=0)
    if not ids:
        raise BadInput(f"{where}: the prompt has no token; remove the conversation from the log")
    if largest >= encoder.vocabulary:
        raise BadInput(
            f"{where}: token {largest} is outside the model's vocabulary of {encoder.vocabulary}; "
            f"replay with --model set to the model that the log was made with"
        )
    return ids


def spoken(message: Message) -> str:
    """All that a message says, calls of tools included."""
    calls = [json.dumps({"name": call.name, "arguments": call.arguments}) for call in message.tool_calls]
    return "\n".join(part for part in (message.content, *calls) if part)


class Bytes:
    """A tokenizer of UTF-8 bytes."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


class Words:
    """A tokenizer of words, hashed to ids from `first` to below `stop`."""

    def __init__(self, first: int, stop: int) -> None:
        self._first, self._room = first, stop - first

    def encode(self, text: str) -> list[int]:
        return [zlib.crc32(word.encode()) % self._room + self._first for word in WORD.findall(text)]


class ByteEncoder:
    """UTF-8 bytes between marks: any text, a vocabulary of 261, nothing to download."""

    vocabulary = 256 + MARKS
    tokenizer = Bytes()

    def encode(self, messages: tuple[Message, ...]) -> list[int]:
        ids: list[int] = []
        for message in messages:
            ids += (256 + ROLES.index(message.role), *self.tokenizer.encode(spoken(message)), 256 + len(ROLES))
        return [*ids, 256 + ROLES.index("assistant")]


class WordEncoder:
    """Words hashed into a small vocabulary: a fifth of the tokens, for logs that are long in bytes."""

    def __init__(self, vocabulary: int = 4096) -> None:
        self.vocabulary = vocabulary
        self.tokenizer = Words(MARKS, vocabulary)
        self._ids = lru_cache(maxsize=4096)(self._message_ids)

    def encode(self, messages: tuple[Message, ...]) -> list[int]:
        ids = [one for message in messages for one in self._ids(message)]
        return [*ids, ROLES.index("assistant")]

    def _message_ids(self, message: Message) -> tuple[int, ...]:
        return (ROLES.index(message.role), *self.tokenizer.encode(spoken(message)), len(ROLES))


class TemplateEncoder:
    """A Hugging Face tokenizer with its chat template; one without a template gets plain "role: text" lines."""

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self.tokenizer, self.vocabulary = tokenizer, vocabulary

    def encode(self, messages: tuple[Message, ...]) -> list[int]:
        if self.tokenizer.chat_template:
            chat = [message.as_dict() for message in messages]
            text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        else:
            text = "".join(f"{message.role}: {spoken(message)}\n" for message in messages) + "assistant:"
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
