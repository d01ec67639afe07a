"""Replay of chat logs through a real model: every turn once from nothing and once from the store, side by side.

Each turn's prompt is the log's own history. The model says a few tokens, which are compared and thrown away; what the
store keeps of the turn is its prompt. The next turn's prompt holds the reply of the log and starts from there.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from kvstore.adapters.transformers import Reuse
from kvstore.bench.conversation import Conversation, TokenIds
from kvstore.bench.encoders import Encoder, token_ids
from kvstore.bench.measure import answer, chunk_noise, difference, recompute
from kvstore.bench.models import Subject
from kvstore.bench.timeline import Timed
from kvstore.keys import common_tokens, token_bytes
from kvstore.store import Store

NOISE_SAMPLES = 6  # turns on which the noise of other chunks is measured, besides those whose tokens differ
NOISE_SAMPLES_ON_DOUBT = 8


@dataclass(frozen=True)
class Row:
    """One turn, measured. Holds no token and no text."""

    conversation: str
    turn: int
    prompt_tokens: int
    cached_tokens: int
    tokens_by_tier: dict[str, int]
    ttft_recompute: float
    ttft_reuse: float
    tpot_recompute: float
    tpot_reuse: float
    save_seconds: float
    logit_difference: float
    gaps: tuple[float, ...]  # of the tokens that differ: how close the two best logits were
    noise: float | None  # what other chunks alone make of this prompt; None where it was not measured
    prefix_tokens: int = 0  # what a prefix cache of any size would have had of it; 0 where nothing was looked for
    exact: bool = True  # nothing was reused out of its context
    divergence: float = 0.0  # of the output's distribution from that of a recompute, in nats a token


@dataclass
class Replay:
    """A replay in progress: `run` yields a row for every turn. `timed` is the turn that most tokens were loaded for."""

    subject: Subject
    store: Store
    reuse: Reuse
    tokens: int = 8
    interleave: bool = False
    discover: int = 0  # also reuse runs of so many tokens that stand anywhere; 0: only what a prompt begins with
    rows: list[Row] = field(default_factory=list)
    noise_samples: Counter[str] = field(default_factory=Counter)
    timed: Timed | None = None
    seen: list[bytes] = field(default_factory=list)  # prompts, where something is looked for

    def run(self, conversations: Sequence[Conversation]) -> Iterator[Row]:
        """Measures every turn, conversation by conversation or in rounds over all of them."""
        schedule = ordered(conversations, self.interleave)
        every = max(1, len(schedule) // NOISE_SAMPLES)
        warm = torch.zeros((1, 32), dtype=torch.long, device=self.subject.model.device)
        with torch.inference_mode():
            recompute(self.subject.model, warm, 2)
        for place, (conversation, number) in enumerate(schedule):
            row = self._turn(conversation, number, place, measure_noise=(place + 1) % every == 0)
            self.rows.append(row)
            yield row

    def _begun(self, listed: list[int]) -> int:
        """How many tokens an earlier prompt began with in the same way; one is left to compute."""
        tokens = token_bytes(listed)
        most = max((common_tokens(tokens, earlier) for earlier in self.seen), default=0)
        self.seen.append(tokens)
        return min(most, len(listed) - 1)

    @torch.inference_mode()
    def _turn(self, conversation: Conversation, number: int, place: int, measure_noise: bool) -> Row:
        prompt = conversation.turns[number].prompt
        listed = token_ids(self.subject.encoder, prompt, place_of(conversation, number))
        model = self.subject.model
        ids = torch.tensor([listed], device=model.device)
        plain = None if place % 2 else recompute(model, ids, self.tokens)

        started = time.perf_counter()
        hit = self.reuse.load(ids, discover=self.discover)
        cached = hit.cached_tokens
        assert isinstance(cached, int)  # one prompt, not a batch
        reused = answer(model, hit.forward_inputs, hit.cache, self.tokens, plain.fed if plain else (), started)
        spans = hit.timeline
        if spans and cached > (self.timed.cached_tokens if self.timed else 0):
            self.timed = Timed(conversation.id, number + 1, cached, spans)
        saving = time.perf_counter()
        if self.tokens > 1:
            hit.cache.crop(1 - self.tokens)  # the log's reply comes next, not what the model just said
        self.reuse.save(ids, hit.cache)
        saved = time.perf_counter()

        plain = plain or recompute(model, ids, self.tokens, reused.fed)
        apart = difference(plain, reused)
        doubt = bool(apart.gaps) and hit.exact and self.noise_samples["doubt"] < NOISE_SAMPLES_ON_DOUBT
        self.noise_samples["doubt"] += doubt
        noise = chunk_noise(model, ids, plain, cached) if hit.exact and (measure_noise or doubt) else None
        return Row(
            conversation=conversation.id,
            turn=number + 1,
            prompt_tokens=len(listed),
            cached_tokens=cached,
            tokens_by_tier=hit.cached_by_tier,
            ttft_recompute=plain.ttft_seconds,
            ttft_reuse=reused.ttft_seconds,
            tpot_recompute=plain.tpot_seconds,
            tpot_reuse=reused.tpot_seconds,
            save_seconds=saved - saving,
            logit_difference=apart.largest,
            gaps=apart.gaps,
            noise=noise,
            prefix_tokens=self._begun(listed) if self.discover else 0,
            exact=hit.exact,
            divergence=apart.divergence,
        )


def check(conversations: Sequence[Conversation], encoder: Encoder) -> None:
    """Raises BadInput for token ids of the log that the model does not know, before anything is run."""
    for conversation in conversations:
        for number, turn in enumerate(conversation.turns):
            if isinstance(turn.prompt, TokenIds):
                token_ids(encoder, turn.prompt, place_of(conversation, number))


def place_of(conversation: Conversation, number: int) -> str:
    """Where in the log a turn is, for people."""
    return f"conversation {conversation.id}, turn {number + 1}"


def ordered(conversations: Sequence[Conversation], interleave: bool) -> list[tuple[Conversation, int]]:
    """Every turn in the order of the replay; interleaved, each round takes the next turn of every conversation."""
    turns = [(conversation, number) for conversation in conversations for number in range(len(conversation.turns))]
    return sorted(turns, key=lambda turn: turn[1]) if interleave else turns
