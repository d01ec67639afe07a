"""Examples to train on: one JSON object a line, of one kind a file.

Earlier turns of a conversation, or the documents that a question is about, become documents that see only themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvstore.adapters.kvlink.layout import Laid, lay_out
from kvstore.adapters.kvlink.links import LinkTokens
from kvstore.errors import BadInput

PIECE_TOKENS = 128  # of a text that is cut into documents

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Words:
    """What stands around the parts of an example: for a model with a chat template, that template's pieces."""

    system: str = ""
    document: str = "{text}\n"
    role: str = "\n{role}: "  # before what somebody says
    summarize: str = "Summarize the documents above."


@dataclass(frozen=True)
class Example:
    """Token ids of one example; the answer is what is learned."""

    answer: list[int]
    question: list[int]
    documents: tuple[list[int], ...] = ()
    system: tuple[int, ...] = ()

    def laid(self, links: LinkTokens) -> Laid:
        """As the model reads it. Raises ``BadInput`` for more documents than slots."""
        return lay_out(links, self.documents, self.question, self.answer, self.system)

    def fitted(self, links: LinkTokens, tokens: int) -> Example:
        """The same in at most so many tokens.

        Its longest documents are cut to one length; without documents the question loses its beginning, and an answer
        that alone is too long its end. Raises ``BadInput`` where nothing of a document would be left.
        """
        over = len(self.laid(links)) - tokens
        if over <= 0:
            return self
        if not self.documents:
            answer = self.answer[: max(1, tokens - len(self.system))]
            kept = max(0, tokens - len(self.system) - len(answer))
            return replace(self, answer=answer, question=self.question[len(self.question) - kept :])
        room = sum(map(len, self.documents)) - over
        if room < len(self.documents):
            raise BadInput(f"all but its documents takes {tokens - room} of {tokens} tokens; allow more, or shorten it")
        return replace(self, documents=tuple(document[: _cap(self.documents, room)] for document in self.documents))


def _cap(documents: Sequence[Sequence[int]], room: int) -> int:
    """The largest length that all documents can be cut to so that they have room."""
    left, lengths = room, sorted(map(len, documents))
    for number, length in enumerate(lengths):
        share = left // (len(lengths) - number)
        if length > share:
            return share
        left -= length
    return lengths[-1]


class Reader:
    """Makes examples of parsed lines. ``end``: what ends a message (the model's end-of-sequence id)."""

    def __init__(self, encode: Encode, links: LinkTokens, words: Words | None = None, end: Sequence[int] = ()) -> None:
        self.encode, self.links, self.words, self.end = encode, links, words or Words(), list(end)

    def example(self, kind: str, fields: dict[str, Any]) -> Example:
        """Of a line that ``checked`` has passed. Raises ``BadInput`` for what has no tokens."""
        if kind == "text":
            return Example(self._some(fields["text"], "text"), [])
        if kind in ("chat", "chat_memory"):
            return self._chat(fields["messages"], memory=kind == "chat_memory")
        if kind == "summary":
            question, answer = self.words.summarize, fields["summary"]
        else:
            question, answer = fields["question"], fields["answer"]
        documents = [self.words.document.replace("{text}", text) for text in fields.get("documents", ())]
        ids = [self._some(text, f"document {number}") for number, text in enumerate(documents)]
        return Example(
            answer=self._some(answer, "answer") + self.end,
            question=self._said("user", question) + self._said("assistant"),
            documents=tuple(ids) if kind != "summary" or documents else self._pieces(fields["text"]),
            system=tuple(self.encode(self.words.system)),
        )

    def _chat(self, messages: list[dict[str, str]], memory: bool) -> Example:
        """The last reply is the answer. In memory, each exchange before the last question is a document."""
        system = "".join(one["content"] for one in messages if one["role"] == "system") or self.words.system
        spoken = [one for one in messages[:-1] if one["role"] != "system"]
        exchanges: list[list[int]] = []
        for one in spoken:
            if one["role"] == "user" or not exchanges:
                exchanges.append([])
            exchanges[-1] += self._said(one["role"], one["content"]) + self.end
        asked = exchanges.pop() if memory else [token for exchange in exchanges for token in exchange]
        return Example(
            answer=self._some(messages[-1]["content"], "last message") + self.end,
            question=asked + self._said("assistant"),
            documents=tuple(exchanges[-self.links.documents :]) if memory else (),
            system=tuple(self.encode(system)),
        )

    def _said(self, role: str, text: str = "") -> list[int]:
        return list(self.encode(self.words.role.replace("{role}", role) + text))

    def _some(self, text: str, what: str) -> list[int]:
        ids = list(self.encode(text))
        if not ids:
            raise BadInput(f"its {what} has no tokens; leave the line out")
        return ids

    def _pieces(self, text: str) -> tuple[list[int], ...]:
        """A text in documents of equal length, no more than there are slots."""
        ids = self._some(text, "text")
        length = max(PIECE_TOKENS, -(-len(ids) // max(1, self.links.documents)))
        return tuple(ids[start : start + length] for start in range(0, len(ids), length))


def checked(kind: str, line: bytes) -> dict[str, Any]:
    """A line, parsed. Raises ``BadInput`` with what is missing or of another type than it should be."""
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise BadInput(f"is no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise BadInput("is no JSON object")
    if kind == "summary" and "documents" not in fields:
        kind = "summary of a text"
    for name, test, wanted in FIELDS[kind]:
        if name not in fields:
            raise BadInput(f'lacks "{name}"')
        if not test(fields[name]):
            raise BadInput(f'"{name}" is not {wanted}')
    return fields


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _is_chat(value: Any) -> bool:
    """Messages in which somebody asks and the assistant has the last word."""
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        return False
    if not all(isinstance(one.get("content"), str) and isinstance(one.get("role"), str) for one in value):
        return False
    return bool(value) and value[-1]["role"] == "assistant" and any(one["role"] == "user" for one in value[:-1])


TEXT, TEXTS = (_is_text, "a text"), (_are_texts, "a list of texts")
CHAT = (_is_chat, 'a list of {"role", "content"} with a user\'s question and, last, an assistant\'s reply')
# By kind: the fields of a line, with a test and its words.
FIELDS: dict[str, tuple[tuple[str, Callable[[Any], bool], str], ...]] = {
    "text": (("text", *TEXT),),
    "chat": (("messages", *CHAT),),
    "chat_memory": (("messages", *CHAT),),
    "qa": (("question", *TEXT), ("answer", *TEXT)),
    "qa_memory": (("documents", *TEXTS), ("question", *TEXT), ("answer", *TEXT)),
    "summary": (("documents", *TEXTS), ("summary", *TEXT)),
    "summary of a text": (("text", *TEXT), ("summary", *TEXT)),
}
