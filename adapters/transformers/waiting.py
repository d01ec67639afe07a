"""Prompts that wait for the model, as the store's jobs: one for each chain that a prompt is read from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

from kvstore.adapters.transformers.batch import read_prompts
from kvstore.adapters.transformers.joined import Joined
from kvstore.composition import Chain, Composition
from kvstore.errors import BadInput
from kvstore.job import Answer, Job, State
from kvstore.keys import Namespace
from kvstore.walk import chains_read

WORST_LAST: tuple[State, ...] = ("unknown", "resident", "prefetching", "too far", "over budget")


class Run(NamedTuple):
    """The name of a job: a run of a prompt that some caller waits with, the first, second, ... one with this prompt."""

    prompt: bytes
    copy: int
    number: int


def schedule(joined: Joined, namespace: Namespace, waiting: Sequence[Any], padding: int | None) -> list[Answer]:
    """See ``Reuse.schedule``."""
    jobs: list[Job] = []
    places: list[int] = []
    copies: Counter[bytes] = Counter()
    for place, prompt in enumerate(waiting):
        made = [prompt]
        if not isinstance(prompt, Job):
            runs = list(_runs(joined, prompt, padding))
            digest = _digest(namespace, runs)
            made = [
                Job(
                    Run(digest, copies[digest], number),
                    namespace=namespace,
                    layout=joined.layout,
                    token_ids=chain.token_ids,
                    root=chain.context.root(namespace),
                    first=first,
                )
                for number, (chain, first) in enumerate(runs)
            ]
            copies[digest] += 1
        jobs += made
        places += [place] * len(made)
    answers: list[list[Answer]] = [[] for _ in waiting]
    for place, answer in zip(places, joined.store.schedule(jobs), strict=True):
        answers[place].append(answer)
    return [
        several[0] if isinstance(prompt, Job) else _together(place, several)
        for place, (prompt, several) in enumerate(zip(waiting, answers, strict=True))
    ]


def _runs(joined: Joined, prompt: Any, padding: int | None) -> Iterator[tuple[Chain, int]]:
    """The chains that a prompt is read from, and the first token of each that it needs."""
    if isinstance(prompt, Composition):
        if not prompt.parts:
            raise BadInput("a waiting prompt has no tokens; leave it out")
        yield from chains_read(prompt)
    else:
        for row in read_prompts(prompt, None, padding, joined.config.vocab_size).rows:
            yield Chain.of(row), 0


def _digest(namespace: Namespace, runs: Sequence[tuple[Chain, int]]) -> bytes:
    """The same whenever the same prompt waits."""
    parts = [(chain.digest(len(chain)), first.to_bytes(8, "little")) for chain, first in runs]
    return blake2b(b"".join(part for pair in parts for part in pair), key=namespace.digest, digest_size=16).digest()


def _together(place: int, answers: Sequence[Answer]) -> Answer:
    """The answer for a prompt, whose worst run decides."""
    tiers: dict[str, int] = {}
    for answer in answers:
        for tier, tokens in answer.tokens_by_tier.items():
            tiers[tier] = tiers.get(tier, 0) + tokens
    state = max((answer.state for answer in answers), key=WORST_LAST.index)
    return Answer(place, state, sum(answer.tokens for answer in answers), tiers)
