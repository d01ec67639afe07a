"""Text as token ids, and what stands around a turn of each role, both as the model's own tokenizer has it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from kvstore.errors import BadInput
from kvstore.keys import TOKEN_BYTES, token_bytes

ROLES = ("system", "user", "assistant")
OWN = "give roles={{{role!r}: (text before, text behind)}}"


@dataclass(frozen=True, slots=True)
class Turn:
    """The texts before and behind what a role says, and the one that stands for an empty tag of the role."""

    before: str
    behind: str
    empty: str


class Words:
    """A tokenizer: every piece of text is encoded alone and without special tokens."""

    def __init__(self, tokenizer: Any, roles: Mapping[str, Sequence[str]] | None = None) -> None:
        """``roles``: for a role its texts before and behind, and if need be the one of an empty tag.

        Raises ``BadInput`` for what has no ``encode``, and for roles that there are not.
        """
        if not callable(getattr(tokenizer, "encode", None)):
            raise BadInput(f"{type(tokenizer).__name__} has no encode(); give a tokenizer")
        self._tokenizer = tokenizer
        plain = "add_special_tokens" in inspect.signature(tokenizer.encode).parameters
        self._options = {"add_special_tokens": False} if plain else {}
        self._turns = {role: _given(role, texts) for role, texts in (roles or {}).items()}

    def encode(self, text: str) -> bytes:
        """Little-endian uint32. Raises ``BadInput`` if the tokenizer gives anything but token ids."""
        return token_bytes(self._tokenizer.encode(text, **self._options)) if text else b""

    def placeholder(self) -> bytes:
        """The token that stands where an argument will: unknown, else padding, else what a space begins with."""
        for name in ("unk_token_id", "pad_token_id"):
            token = getattr(self._tokenizer, name, None)
            if isinstance(token, int):
                return token_bytes([token])
        space = self.encode(" ")[:TOKEN_BYTES]
        if not space:
            raise BadInput("the tokenizer has no token for a parameter's place: no unk_token_id, pad_token_id or space")
        return space

    def turn(self, role: str) -> Turn:
        """What the chat template writes around a role's turn. Raises ``BadInput`` where there is none to be had."""
        if role not in self._turns:
            if not getattr(self._tokenizer, "chat_template", None):
                raise BadInput(f"role tags need a tokenizer with a chat template; or {OWN.format(role=role)}")
            self._turns[role] = self._derived(role)
        return self._turns[role]

    def _derived(self, role: str) -> Turn:
        """From conversations of sentinels. A turn behind another is taken for every turn but a system's."""
        if role == "user":
            for earlier in (("user", "assistant"), ("system",)):
                start, parts = self._parts(*earlier), self._parts(*earlier, "user")
                if start and parts and parts[:-2] == start[:-1] and parts[-2].startswith(start[-1]):
                    before = parts[-2].removeprefix(start[-1])
                    return Turn(before, parts[-1], before + parts[-1])
            self._none(role)
        user = self.turn("user")
        if role == "system":
            parts, empty = self._parts("system", "user"), self._parts("user")
            if parts is None or empty is None or not parts[1].endswith(user.before):
                self._none(role)
            return Turn(parts[0], parts[1].removesuffix(user.before), empty[0].removesuffix(user.before))
        parts, opened = self._parts("user", "assistant", "user"), self._parts("user", opens=True)
        if parts is None or not parts[1].startswith(user.behind) or not parts[2].endswith(user.before):
            self._none(role)
        before = parts[1].removeprefix(user.behind)
        reply = opened[-1].removeprefix(user.behind) if opened else ""
        return Turn(before, parts[2].removesuffix(user.before), reply or before)

    def _parts(self, *roles: str, opens: bool = False) -> list[str] | None:
        """What the template writes before, between and behind such turns; None for conversations that it refuses."""
        said = [f"\ue000{number}\ue001" for number in range(len(roles))]
        messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
        try:
            left: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens)
        except BaseException as error:
            if not type(error).__module__.startswith("jinja2"):  # how templates refuse a conversation
                raise
            return None
        parts = []
        for text in said:
            before, found, left = left.partition(text)
            if not found:
                return None
            parts.append(before)
        return [*parts, left]

    def _none(self, role: str) -> NoReturn:
        raise BadInput(f"the chat template has no text of its own around {role} turns; {OWN.format(role=role)}")


def _given(role: str, texts: Sequence[str]) -> Turn:
    if role not in ROLES:
        raise BadInput(f"roles has {role!r}; the roles are {', '.join(ROLES)}")
    if isinstance(texts, str) or len(texts) not in (2, 3) or not all(isinstance(text, str) for text in texts):
        raise BadInput(f"roles[{role!r}] must be the texts before and behind a turn, and if need be an empty one's")
    before, behind = texts[:2]
    usual = {"system": "", "user": before + behind, "assistant": before}
    return Turn(before, behind, texts[2] if len(texts) == 3 else usual[role])
