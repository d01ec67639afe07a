"""Conversations as a replay reads them: turns, each with the prompt that the model reads before one reply."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SESSION_FIELDS = ("session_id", "conversation_id", "chat_id", "id")


@dataclass(frozen=True)
class ToolCall:
    """One call that the assistant made: the function's name and its arguments, as the log spells them."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Message:
    """One message of a chat: `role` is system, user, assistant or tool."""

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    name: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The message as chat templates want it."""
        found: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.name:
            found["name"] = self.name
        if self.tool_calls:
            calls = [{"name": call.name, "arguments": call.arguments} for call in self.tool_calls]
            found["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        return found


@dataclass(frozen=True)
class Chat:
    """A prompt in words: all messages up to the reply."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class TokenIds:
    """A prompt that the log gives as token ids."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class HashIds:
    """A prompt of which a trace tells only its length and which of its blocks equal those of other prompts.

    `hash_ids` has one id per `block_tokens` tokens; equal ids stand for equal tokens behind an equal prefix.
    """

    hash_ids: tuple[int, ...]
    tokens: int
    block_tokens: int


@dataclass(frozen=True)
class Turn:
    """One prompt of a conversation."""

    prompt: Chat | TokenIds | HashIds


@dataclass(frozen=True)
class Conversation:
    """The turns of one session, in order."""

    id: str
    turns: tuple[Turn, ...]


def session_of(record: dict[str, Any]) -> str:
    """The name that the log gives to the session of a record; empty where it gives none."""
    return next((str(record[name]) for name in SESSION_FIELDS if isinstance(record.get(name), str | int)), "")
