"""How well a model answers over documents, by how it is given them: in one piece, apart, with links, blended."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvstore.adapters.kvlink import reference
from kvstore.adapters.kvlink.data import Example
from kvstore.adapters.kvlink.layout import UNSCORED
from kvstore.adapters.kvlink.links import LinkTokens
from kvstore.adapters.kvlink.training import Padded, losses, padded
from kvstore.errors import BadInput

SHARE = 0.15


@dataclass(frozen=True)
class Answered:
    """One way over all examples. ``exact``: the share whose greedy answer is the right one, token by token."""

    way: str
    examples: int
    nats: float  # per answered token
    exact: float


def evaluate(
    model: Any,
    links: LinkTokens,
    examples: Iterable[Example],
    share: float = SHARE,
    told: Callable[[int], None] | None = None,
) -> list[Answered]:
    """Each example in every way, by masked passes of the whole prompt with its answer.

    "apart": documents that see only themselves, no links; "links": the same with links, as a model trained for them is
    served; "blend": apart, but for the ``share`` of their tokens that deviates most. Documents are the same tokens in
    all. ``told`` is called with the examples done. Raises ``BadInput`` for none at all, and for one without documents.
    """
    plain = replace(links, per_document=0)
    ways: dict[str, tuple[LinkTokens, Callable[[Padded], torch.Tensor]]] = {
        "full": (plain, lambda some: reference.full(model, some.ids, some.segments)),
        "apart": (plain, lambda some: reference.modular(model, some.ids, some.segments)[0]),
        f"blend {share:.0%}": (plain, lambda some: reference.blend(model, some.ids, some.segments, share)[0]),
    }
    if links.per_document:
        ways["links"] = links, lambda some: reference.modular(model, some.ids, some.segments)[0]
    model.eval()
    found: dict[str, list[tuple[float, int, bool]]] = {way: [] for way in ways}
    for done, example in enumerate(examples, 1):
        if not example.documents:
            raise BadInput(f"example {done} has no documents; evaluate on questions with documents")
        for way, (layout, logits) in ways.items():
            some = padded([example.laid(layout)], model.device)
            found[way].append(_scored(logits(some), some))
        if told is not None:
            told(done)
    if not found["full"]:
        raise BadInput("there are no examples to evaluate")
    return [
        Answered(
            way=way,
            examples=len(each),
            nats=sum(nats for nats, _, _ in each) / sum(tokens for _, tokens, _ in each),
            exact=sum(right for _, _, right in each) / len(each),
        )
        for way, each in found.items()
    ]


def _scored(logits: torch.Tensor, some: Padded) -> tuple[float, int, bool]:
    """Nats and number of answered tokens, and whether each was the likeliest."""
    labels = some.labels[:, 1:]
    scored = labels != UNSCORED
    right = logits[:, :-1].argmax(-1) == labels
    return float(losses(logits[:, :-1], labels).sum()), int(scored.sum()), bool(right[scored].all())
