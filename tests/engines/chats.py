"""Turns of real chats, as the OpenAI protocol has them: each with the log's own history."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvstore.bench.conversation import Chat
from kvstore.bench.encoders import spoken
from kvstore.bench.logs import read

ROOT = Path(__file__).resolve().parents[2]
TAU = ROOT.parent / "shared" / "traces" / "tau_airline_gpt4o_trajectories.json"  # not part of the project
DEMO = ROOT / "bench" / "data" / "demo.json"
LOG = TAU if TAU.is_file() else DEMO


@dataclass(frozen=True)
class Turn:
    """One prompt: the conversation it belongs to, and its messages."""

    conversation: str
    messages: tuple[dict[str, str], ...]


def turns(count: int, each: int, path: Path = LOG) -> list[Turn]:
    """The first turns of conversations, ``each`` of one at most, one conversation behind the other."""
    found: list[Turn] = []
    for conversation in read(path):
        for turn in conversation.turns[:each]:
            assert isinstance(turn.prompt, Chat)
            said = [{"role": message.role, "content": spoken(message)} for message in turn.prompt.messages]
            found.append(Turn(conversation.id, tuple(said)))
    return found[:count]


def texts(path: Path = LOG) -> list[str]:
    """All that is said in the log."""
    last = [conversation.turns[-1].prompt for conversation in read(path)[:40]]
    return [spoken(message) for prompt in last if isinstance(prompt, Chat) for message in prompt.messages]


def ids(tokenizer: Any, turn: Turn) -> list[int]:
    """A turn's prompt in tokens."""
    text = tokenizer.apply_chat_template(list(turn.messages), tokenize=False, add_generation_prompt=True)
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found
