"""What tests ask of an engine through the ``openai`` client, and how answers are compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import openai
from chats import Turn
from serving import NAME, PAGE, Engine

REPLY = 16  # tokens
TIE = 2 * 2.0**-5  # nats: two roundings of bfloat16 for logits of 4 to 8


@dataclass(frozen=True)
class Said:
    """One reply. ``gaps``: nats between the two best tokens, for each token of it."""

    tokens: tuple[str, ...]
    gaps: tuple[float, ...]
    prompt: int
    cached: int
    told: dict[str, Any]


@contextmanager
def client(engine: Engine, timeout: float = 120.0) -> Iterator[openai.OpenAI]:
    """A client of its server, closed afterwards."""
    with openai.OpenAI(base_url=f"{engine.url}/v1", api_key="none", timeout=timeout, max_retries=0) as made:
        yield made


def say(made: openai.OpenAI, turn: Turn, tokens: int = REPLY, **extra: Any) -> Said:
    """The greedy reply to a turn. ``extra``: fields of vLLM's own."""
    reply = made.chat.completions.create(
        model=NAME,
        messages=list(turn.messages),
        temperature=0.0,
        max_completion_tokens=tokens,
        logprobs=True,
        top_logprobs=2,
        extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True, **extra},
    )
    found = reply.choices[0].logprobs
    assert found is not None and found.content and reply.usage is not None
    details = reply.usage.prompt_tokens_details
    return Said(
        tuple(one.token for one in found.content),
        tuple(abs(one.top_logprobs[0].logprob - one.top_logprobs[1].logprob) for one in found.content),
        reply.usage.prompt_tokens,
        (details.cached_tokens or 0) if details is not None else 0,
        (reply.model_extra or {}).get("kv_transfer_params") or {},
    )


def say_all(engine: Engine, turns: Iterable[Turn], **extra: Any) -> list[Said]:
    """The replies to turns, one after the other."""
    with client(engine) as made:
        return [say(made, turn, **extra) for turn in turns]


def full_pages(prompt: int) -> int:
    """Tokens of the full pages of a prompt, whose last token is always computed."""
    return (prompt - 1) // PAGE * PAGE


@dataclass(frozen=True)
class Compared:
    """How many replies are the same, differ first where the best two tokens tie, and differ."""

    same: int
    ties: int
    others: tuple[str, ...]


def compare(expected: Sequence[Said], got: Sequence[Said]) -> Compared:
    """Reply by reply. What comes after a tie is another text and is not compared."""
    same, ties, others = 0, 0, list[str]()
    assert len(expected) == len(got)
    for number, (left, right) in enumerate(zip(expected, got, strict=True)):
        assert left.prompt == right.prompt
        places = zip(left.tokens, right.tokens, left.gaps, strict=True)
        first = next(((at, gap) for at, (mine, other, gap) in enumerate(places) if mine != other), None)
        if first is None:
            same += 1
        elif first[1] <= TIE:
            ties += 1
        else:
            others.append(f"reply {number} differs at token {first[0]}, where the best two are {first[1]:.4f} apart")
    return Compared(same, ties, tuple(others))
