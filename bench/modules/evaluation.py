"""How many queries are answered rightly, under every way to reuse documents; and the same through a real store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from kvstore import open as open_store
from kvstore.adapters.kvlink import LinkTokens, reference
from kvstore.adapters.kvlink.layout import SHARED, UNSCORED, compose
from kvstore.adapters.transformers import Reuse
from kvstore.bench.modules.retrieval import KINDS, Batch, Prompt, Size, batch, prompts

SHARES = (0.05, 0.15, 0.3, 0.5)
ROWS = 128  # evaluated at a time

# Logits [rows, tokens, vocabulary], and which documents' tokens were computed: bool [rows, tokens], or all or none.
Answer = Callable[[Batch], tuple[torch.Tensor, torch.Tensor | bool]]


@dataclass(frozen=True)
class Score:
    """Shares of queries that one arm answered rightly.

    ``share`` is what was asked for, of the documents behind the first; ``recomputed`` what it came to, of all.
    """

    arm: str
    share: float
    recomputed: float
    all: float
    single: float
    overwritten: float
    alias: float


def held_out(size: Size) -> list[Prompt]:
    """What every model is asked; no model was trained on it but by chance."""
    return prompts(size, size.prompts, "held out")


def of_base(model: Any, size: Size, seed: int) -> Iterator[Score]:
    """The model of ordinary attention, whose documents were encoded apart."""
    asked = held_out(size)
    answered = Answered(asked, size.plain)

    def modular(made: Batch) -> tuple[torch.Tensor, bool]:
        return reference.modular(model, made.ids, made.segments)[0], False

    def apart(made: Batch) -> tuple[torch.Tensor, bool]:
        return reference.modular(model, made.ids, made.segments, local_positions(made.segments))[0], False

    def blend(share: float, source: torch.Generator | None) -> Answer:
        return lambda made: reference.blend(model, made.ids, made.segments, share, source)

    yield answered.score("full", 1.0, lambda made: (reference.full(model, made.ids, made.segments), True))
    yield answered.score("modular", 0.0, modular)
    yield answered.score("not re-encoded", 0.0, apart)
    for share in SHARES:
        yield answered.score("blend", share, blend(share, None))
        yield answered.score("random", share, blend(share, torch.Generator().manual_seed(seed)))


def of_tuned(model: Any, size: Size, links: LinkTokens) -> Iterator[Score]:
    """The model that was trained for documents encoded apart: served so, and under ordinary attention."""
    answered = Answered(held_out(size), links)
    name = "tuned, links" if links.per_document else "tuned"
    yield answered.score(name, 0.0, lambda made: (reference.modular(model, made.ids, made.segments)[0], False))
    yield answered.score(f"{name}, full", 1.0, lambda made: (reference.full(model, made.ids, made.segments), True))


def local_positions(segments: torch.Tensor) -> torch.Tensor:
    """Positions [rows, tokens] when every document's keys are left as if it stood first in the prompt."""
    column = torch.arange(segments.shape[1]).expand_as(segments)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    first = torch.where(begins, column, 0).cummax(1).values
    return torch.where(segments == SHARED, column, column - first)


class Answered:
    """Prompts in one layout, and what kind of query each answer is to."""

    def __init__(self, asked: list[Prompt], links: LinkTokens) -> None:
        self.batches = [batch(asked[start : start + ROWS], links) for start in range(0, len(asked), ROWS)]
        kinds = [KINDS.index(kind) for one in asked for kind in one.kinds]
        self.kinds = torch.tensor(kinds)

    def score(self, arm: str, share: float, answer: Answer) -> Score:
        """How an arm does on all of them."""
        found, anew = [], []
        for made in self.batches:
            scored = made.labels != UNSCORED
            logits, recomputed = answer(made)
            found.append(logits[scored].argmax(-1) == made.labels[scored])
            anew.append(torch.as_tensor(recomputed).expand_as(scored)[made.segments > SHARED])
        right = torch.cat(found).float()
        kinds = (float(right[self.kinds == kind].mean()) for kind in range(len(KINDS)))
        return Score(arm, share, float(torch.cat(anew).float().mean()), float(right.mean()), *kinds)


@dataclass(frozen=True)
class Choice:
    """What blending computed anew. Shares are of tokens."""

    share: float
    aliases: float  # of the chosen
    aliases_found: float  # of all aliases


def choices(model: Any, size: Size) -> list[Choice]:
    """Whether deviation finds what depends on other documents: how many of the chosen tokens are aliases."""
    made = batch(held_out(size)[:ROWS], size.plain)
    aliases = made.ids >= size.alias(0, 0)
    found = []
    for share in SHARES:
        chosen = reference.blend(model, made.ids, made.segments, share)[1]
        both = float((chosen & aliases).sum())
        found.append(Choice(share, both / float(chosen.sum()), both / float(aliases.sum())))
    return found


@dataclass(frozen=True)
class Served:
    """One arm through a real store, beside the reference, on the same prompts."""

    arm: str
    share: float
    prompts: int
    cached: float  # share of the documents' tokens that were not computed
    largest_difference: float  # of any logit at a query
    answers_equal: bool
    all: float


def through_store(model: Any, size: Size, links: LinkTokens, count: int) -> list[Served]:
    """Prompts served by ``Reuse`` from documents that were encoded before, modular and blended."""
    asked = held_out(size)[:count]
    made = batch(asked, links)
    modes = [0.0, *SHARES[:3]] if not links.per_document else [0.0]
    served = []
    with open_store() as store:
        reuse = Reuse(model, store, fingerprint=f"{size} {links}")
        reuse.encode(segments=[document for one in asked for document in one.documents]).wait()
        for share in modes:
            got, cached = _served(model, reuse, asked, links, share)
            if share:
                wanted = reference.blend(model, made.ids, made.segments, share)[0]
            else:
                wanted = reference.modular(model, made.ids, made.segments)[0]
            wanted = wanted[:, -size.queries :]
            answers = got.argmax(-1)
            name = "blend" if share else "tuned, links" if links.per_document else "modular"
            served.append(
                Served(
                    arm=name,
                    share=share,
                    prompts=count,
                    cached=cached,
                    largest_difference=float((got - wanted).abs().max()),
                    answers_equal=torch.equal(answers, wanted.argmax(-1)),
                    all=float((answers == made.labels[:, -size.queries :]).float().mean()),
                )
            )
    return served


@torch.no_grad()
def _served(
    model: Any, reuse: Reuse, asked: list[Prompt], links: LinkTokens, share: float
) -> tuple[torch.Tensor, float]:
    """Logits at the queries [prompts, queries, vocabulary], and the share of documents' tokens that were cached."""
    logits, cached, tokens = [], 0, 0
    for one in asked:
        composition = compose(links, one.documents, one.queries)
        blending: dict[str, Any] = {"mode": "blend", "recompute": share} if share else {"mode": "modular"}
        hit = reuse.load(composition, **blending)
        logits.append(model(**hit.forward_inputs).logits[0, -len(one.queries) :])
        cached += hit.cached_tokens if isinstance(hit.cached_tokens, int) else sum(hit.cached_tokens)
        tokens += sum(map(len, one.documents))
    return torch.stack(logits), cached / tokens
