"""Tokenizers for tests of the markup: bytes, one that merges letters across what is joined, and one with chats."""

from __future__ import annotations

from typing import Any

from kvstore.composition import Composition, Placement
from kvstore.keys import token_bytes
from kvstore.pml import Schema

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Bytes:
    """A token is a byte of UTF-8."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


class Pairs:
    """A token is two equal letters, or one byte: "aa" is one token, but two that were encoded apart stay two."""

    unk_token_id = None
    pad_token_id = 7

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        previous = ""
        for letter in text:
            if letter == previous:
                ids[-1] += 1000
                previous = ""
            else:
                ids.append(ord(letter))
                previous = letter
        return ids


def chats(template: str | None = CHATML) -> Any:
    """A Hugging Face tokenizer, one token a character, with the marks of ChatML as special tokens."""
    from tokenizers import Regex, Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, **{chr(one): one for one in range(1, 256)}}
    tokenizer = Tokenizer(kinds.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", additional_special_tokens=["<|im_start|>", "<|im_end|>"]
    )
    fast.chat_template = template
    return fast


def schema(inside: str, **options: Any) -> Schema:
    """The schema "s" with this in it."""
    return Schema.parse(f'<schema name="s">{inside}</schema>', **{"tokenizer": Bytes(), **options})


def prompt(of: Schema, inside: str) -> Composition:
    """The prompt of the schema "s" with this in it."""
    return of.prompt(f'<prompt schema="s">{inside}</prompt>')


def letters(tokens: bytes) -> str:
    """Tokens that are bytes, as text."""
    return tokens[::4].decode()


def shown(composition: Composition) -> str:
    """Each part with its position: ``=`` what is placed, ``+`` what is computed."""
    signs = ["=" if isinstance(part, Placement) else "+" for part in composition.parts]
    return "|".join(
        f"{part.position}{sign}{letters(part.token_ids)}" for part, sign in zip(composition.parts, signs, strict=True)
    )


def tokens(text: str) -> bytes:
    """As ``Bytes`` has them."""
    return token_bytes(list(text.encode()))
