"""Computing and storing what prompts will be composed of, before they come."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from kvstore.adapters.transformers.attach import undisturbed
from kvstore.adapters.transformers.composed import Composed
from kvstore.adapters.transformers.hit import SavedTurn
from kvstore.adapters.transformers.joined import Joined
from kvstore.composition import Chain, Composition, Text
from kvstore.errors import BadInput
from kvstore.keys import Namespace
from kvstore.match import Match
from kvstore.walk import chains_of

TIERS = ("host", "disk")  # where what was encoded can be pinned


class Encoded:
    """What ``encode`` has stored. ``tokens`` are in the store, ``new_tokens`` of them were computed for this.

    ``left_out``: tokens that the store had no memory to record.
    """

    def __init__(self) -> None:
        self.tokens = self.new_tokens = self.left_out = 0
        self._saved: list[SavedTurn] = []
        self._pinned: list[Any] = []

    def wait(self, timeout: float | None = None) -> Encoded:
        """Blocks until what can be durable is; itself."""
        for saved in self._saved:
            saved.wait(timeout)
        return self

    def release(self) -> None:
        """What was pinned may be evicted again. Also happens when this is dropped."""
        for pinned in self._pinned:
            pinned.release()
        self._pinned.clear()


def encodings(given: Any, segments: Sequence[Any] | None) -> list[Composition]:
    """What a caller wants encoded, each alone. Raises ``BadInput`` for what is neither schema, composition nor ids."""
    if (given is None) == (segments is None):
        raise BadInput("encode needs a schema (or compositions), or segments=[ids, ids, ...]; give one of them")
    if segments is not None:
        return [Composition((Text(Chain.of(segment).token_ids, 0),)) for segment in segments]
    if isinstance(given, Composition):
        return [given]
    made: Iterable[Any] = given.encodings() if hasattr(given, "encodings") else given
    compositions = list(made)
    if not all(isinstance(each, Composition) for each in compositions):
        raise BadInput("encode takes a schema, compositions, or segments=[ids, ids, ...]")
    return compositions


def encode(
    joined: Joined,
    compositions: Sequence[Composition],
    tenant: str,
    owner: str,
    ttl: float | None,
    pin: str | None,
    progress: Callable[[int, int], None] | None,
) -> Encoded:
    """Compute and store each composition (texts only) by itself; what is stored already is left as it is."""
    if pin is not None and pin not in TIERS:
        raise BadInput(f"pin={pin!r} is no tier to pin in; choose one of {', '.join(TIERS)}")
    done, total = Encoded(), sum(map(len, compositions))
    namespace = Namespace(joined.fingerprint, tenant)
    for each in compositions:
        start = each.parts[0].position
        composition = Composition(tuple(part.moved(-start) for part in each.parts))
        matches, size = _stored(joined, namespace, composition), len(composition)
        if matches is None:
            done._saved.append(_compute(joined, composition, namespace, owner, ttl))
            matches = _stored(joined, namespace, composition)
            done.new_tokens += size if matches is not None else 0
        if matches is None:
            done.left_out += size
        else:
            done.tokens += size
            done._pinned += [joined.store.load(match) if pin == "host" else match for match in matches if pin]
        if progress is not None:
            progress(done.tokens + done.left_out, total)
    return done


def _stored(joined: Joined, namespace: Namespace, composition: Composition) -> list[Match] | None:
    """Matches of all chains that a composition is made of; None when one is not stored whole."""
    matches = []
    for placed in chains_of(composition):
        chain = placed.chain
        root = chain.context.root(namespace)
        match = joined.store.match(namespace, joined.layout, chain.token_ids, root=root, first=placed.start, whole=True)
        if match.tokens < len(chain):
            return None
        matches.append(match)
    return matches


def _compute(
    joined: Joined, composition: Composition, namespace: Namespace, owner: str, ttl: float | None
) -> SavedTurn:
    assembly, loads = joined.assembled(namespace, composition, apart=False)
    hit = joined.composed(Composed(assembly), loads, namespace.tenant, joined.stamp)
    decoder = joined.decoder
    leaving = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(decoder.forward).parameters else {}
    with undisturbed(decoder), torch.no_grad():
        decoder(**hit.forward_inputs, **leaving)
    return joined.save(hit.cache, namespace, owner, ttl)
