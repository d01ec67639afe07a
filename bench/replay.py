"""Replay of chat logs through a real model: every turn once from nothing and once from the store, side by side.

Each turn's prompt is the log's own history. The model says a few tokens, which are compared and thrown away; what the
store keeps of the turn is its prompt. The next turn's prompt holds the reply of the log and starts from there.

With a queue, the turns that come next wait in it as requests wait in a server's, so that the store sees them.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from kvstore.adapters.transformers import Reuse
from kvstore.adapters.transformers.queue import Queue
from kvstore.adapters.transformers.request import Request
from kvstore.adapters.transformers.tempo import Tempo
from kvstore.bench.conversation import Conversation, TokenIds
from kvstore.bench.encoders import Encoder, token_ids
from kvstore.bench.measure import answer, chunk_noise, difference, recompute
from kvstore.bench.models import Subject
from kvstore.bench.timeline import Timed
from kvstore.keys import TOKEN_BYTES, common_tokens
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
    queue: int = 0  # turns that wait behind the one that runs, which the store is told; 0: it is told nothing
    rows: list[Row] = field(default_factory=list)
    noise_samples: Counter[str] = field(default_factory=Counter)
    timed: Timed | None = None
    seen: list[bytes] = field(default_factory=list)  # prompts, where something is looked for

    def run(self, conversations: Sequence[Conversation]) -> Iterator[Row]:
        """Measures every turn, conversation by conversation or in rounds over all of them."""
        turns = ordered(conversations, self.interleave)
        every = max(1, len(turns) // NOISE_SAMPLES)
        warm = torch.zeros((1, 32), dtype=torch.long, device=self.subject.model.device)
        with torch.inference_mode():
            recompute(self.subject.model, warm, 2)
        line = Line(self.reuse, map(self._request, turns), self.queue)
        for place, turn in enumerate(turns):
            row = self._turn(turn, line, place, measure_noise=(place + 1) % every == 0)
            self.rows.append(row)
            yield row

    def _request(self, turn: tuple[Conversation, int]) -> Request:
        conversation, number = turn
        ids = token_ids(self.subject.encoder, conversation.turns[number].prompt, place_of(conversation, number))
        return Request(ids, self.tokens)

    def _begun(self, tokens: bytes) -> int:
        """How many tokens an earlier prompt began with in the same way; one is left to compute."""
        most = max((common_tokens(tokens, earlier) for earlier in self.seen), default=0)
        self.seen.append(tokens)
        return min(most, len(tokens) // TOKEN_BYTES - 1)

    @torch.inference_mode()
    def _turn(self, turn: tuple[Conversation, int], line: Line, place: int, measure_noise: bool) -> Row:
        (conversation, number), request, model = turn, line.head(), self.subject.model
        ids = torch.tensor([request.token_ids], device=model.device)
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
        line.served(request)

        plain = plain or recompute(model, ids, self.tokens, reused.fed)
        apart = difference(plain, reused)
        doubt = bool(apart.gaps) and hit.exact and self.noise_samples["doubt"] < NOISE_SAMPLES_ON_DOUBT
        self.noise_samples["doubt"] += doubt
        noise = chunk_noise(model, ids, plain, cached) if hit.exact and (measure_noise or doubt) else None
        return Row(
            conversation=conversation.id,
            turn=number + 1,
            prompt_tokens=request.prompt_tokens,
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
            prefix_tokens=self._begun(request.prompt) if self.discover else 0,
            exact=hit.exact,
            divergence=apart.divergence,
        )


class Line:
    """The turns of a replay as requests in a queue: the one that runs, and at most ``room`` that wait behind it."""

    def __init__(self, reuse: Reuse, turns: Iterator[Request], room: int) -> None:
        self._queue, self._turns, self._room = Queue(reuse, room + 1), turns, room
        self._tempo, self._since = Tempo(), time.perf_counter()
        self._fill()

    def head(self) -> Request:
        """The turn that runs."""
        request = self._queue.head()
        assert request is not None
        return request

    def served(self, request: Request) -> None:
        """It was loaded, answered and saved: all move up, and the store is told."""
        now = time.perf_counter()
        self._tempo.first(now - self._since)
        self._since = now
        self._queue.remove(request)
        self._fill()

    def _fill(self) -> None:
        for request in itertools.islice(self._turns, self._room + 1 - len(self._queue)):
            self._queue.add(request)
        if self._room:
            self._queue.tell(self._tempo, (), active=1)


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
