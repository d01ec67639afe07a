"""Turns of a log, each read with a store and without one, one right after the other."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import kvstore
from kvstore import Store, compiled
from kvstore.adapters.transformers import Reuse
from kvstore.bench.conversation import Conversation
from kvstore.bench.encoders import Encoder, token_ids
from kvstore.bench.measure import answer, recompute
from kvstore.bench.never_slower.throttled import ThrottledFiles
from kvstore.bench.replay import place_of

COMPILING = 120.0  # seconds that a kernel may take to be compiled
WARM_TOKENS = 300
MB = 10**6


@dataclass(frozen=True)
class Prompt:
    """One turn."""

    conversation: str
    turn: int
    ids: list[int]


@dataclass(frozen=True)
class Pair:
    """One turn, measured. Seconds; ``expected`` and its like are None where nothing matched, or nothing was known."""

    conversation: str
    turn: int
    prompt_tokens: int
    without: float
    with_store: float
    store_first: bool
    matched: int
    cached: int
    cached_by_tier: dict[str, int]
    expected: float | None
    all_loaded: float | None
    all_computed: float | None
    reason: str
    recomputed_layers: int  # that came too late, in mid-pass
    save_seconds: float
    same_token: bool


def prompts(
    conversations: Sequence[Conversation], encoder: Encoder, count: int, turns: int, longest: int
) -> list[Prompt]:
    """Up to ``turns`` of each of ``count`` conversations, in rounds, so that none finds memory as it left it.

    Turns are spread over what of a conversation is no longer than ``longest`` tokens; those with fewer are left out.
    """
    chosen: list[list[Prompt]] = []
    for conversation in conversations:
        made = [
            Prompt(conversation.id, number + 1, token_ids(encoder, turn.prompt, place_of(conversation, number)))
            for number, turn in enumerate(conversation.turns)
        ]
        short = [prompt for prompt in made if len(prompt.ids) <= longest]
        if len(short) >= turns:
            places = [round(place * (len(short) - 1) / max(1, turns - 1)) for place in range(turns)]
            chosen.append([short[place] for place in places])
        if len(chosen) == count:
            break
    return [prompt for together in zip(*chosen, strict=True) for prompt in together]


@torch.inference_mode()
def warm_up(model: Any) -> None:
    """Has all that is compiled or touched once per process done."""
    ids = torch.randint(1, 100, (1, WARM_TOKENS), generator=torch.Generator().manual_seed(0))
    with kvstore.open(host="64MiB") as store:
        reuse = Reuse(model, store)
        for _ in range(3):
            hit = reuse.load(ids)
            model(**hit.forward_inputs, logits_to_keep=1)
            reuse.save(ids, hit.cache)
            compiled.idle(COMPILING)
    recompute(model, ids, 1)


def open_store(folder: Path, host: str, rate: float | None) -> Store:
    """An empty store on a disk of ``rate`` bytes a second; None: as quick as it is."""
    return kvstore.open(folder, host=host, disk="8GiB", files=ThrottledFiles(rate) if rate else None)


@torch.inference_mode()
def measure(model: Any, reuse: Reuse, asked: Sequence[Prompt]) -> Iterator[Pair]:
    """Every prompt in both ways; which comes first alternates. What a save leaves to be written runs beside both.

    Every conversation is a tenant of its own: nothing is shared, so that the disk has to serve.
    """
    for place, prompt in enumerate(asked):
        ids = torch.tensor([prompt.ids])
        plain = None if place % 2 else recompute(model, ids, 1)
        started = time.perf_counter()
        hit = reuse.load(ids, tenant=prompt.conversation)
        reused = answer(model, hit.forward_inputs, hit.cache, 1, (), started)
        saving = time.perf_counter()
        reuse.save(ids, hit.cache, tenant=prompt.conversation)
        saved = time.perf_counter()
        plain = plain or recompute(model, ids, 1)
        decision = hit.decision
        cached = hit.cached_tokens
        assert isinstance(cached, int)  # one prompt, not a batch
        yield Pair(
            conversation=prompt.conversation,
            turn=prompt.turn,
            prompt_tokens=len(prompt.ids),
            without=plain.ttft_seconds,
            with_store=reused.ttft_seconds,
            store_first=bool(place % 2),
            matched=decision.matched if decision else 0,
            cached=cached,
            cached_by_tier=hit.cached_by_tier,
            expected=decision.first_token_seconds if decision else None,
            all_loaded=decision.all_loaded_seconds if decision else None,
            all_computed=decision.all_computed_seconds if decision else None,
            reason=str(decision) if decision else "nothing matched",
            recomputed_layers=hit.cache.loaded.recomputed,
            save_seconds=saved - saving,
            same_token=plain.fed == reused.fed,
        )
        del hit
