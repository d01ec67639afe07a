"""Queues of waiting jobs, and stores whose chains are only on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blocks import NS, SMALL, found, ids, recount, save
from gates import MIB, PATIENCE, GatedTier, fetches_are_over, gated, only_on_disk

from kvstore import Answer, Job, Layout
from kvstore.local import LocalStore

SLOTS, SHARE = 85, 64  # blocks of SMALL that a MiB of memory holds, and that leases and prefetch may hold of it
CHAINS = [ids(seed, 64) for seed in range(1, 30)]  # of four blocks each


def job(name: object, tokens: Sequence[int], layout: Layout = SMALL, **more: Any) -> Job:
    """A job that reads all of these tokens."""
    return Job(name, namespace=NS, layout=layout, token_ids=[*tokens, 0], **more)


def jobs(chains: Sequence[Sequence[int]], layout: Layout = SMALL) -> list[Job]:
    """One for each chain, named by its first token."""
    return [job(tokens[0], tokens, layout) for tokens in chains]


def states(answers: Sequence[Answer]) -> list[str]:
    """What the store says of each job."""
    return [answer.state for answer in answers]


def counter(store: LocalStore, name: str) -> int:
    """One of the store's counters."""
    return int(store.stats()["counters"].get(name, 0))


def flags(store: LocalStore, chains: Sequence[Sequence[int]]) -> list[bool]:
    """Of each block of these chains, whether it is in host memory."""
    matches = [found(store, tokens) for tokens in chains]
    with store._residency.lock:
        residents = store._residency.residents
        return [number in residents for match in matches for number, _ in match.blocks]


@contextmanager
def scheduled(path: Path, chains: Sequence[Sequence[int]], host: int = MIB) -> Iterator[tuple[LocalStore, GatedTier]]:
    """A store whose chains are only on disk; its accounts must be right at the end."""
    with gated(path, host=host) as (store, tier):
        for tokens in chains:
            assert save(store, tokens).wait(PATIENCE).tokens == len(tokens)
        only_on_disk(store)
        yield store, tier
        if not store._closed:
            nobody_waits(store)
            assert recount(store) == [] and not store._loader.ahead
            assert counter(store, "failed_jobs") == 0


def nobody_waits(store: LocalStore) -> None:
    """The queue is empty, and has been for a while; nothing is under way."""
    store.schedule([])
    fetches_are_over(store)
    for _ in range(2):
        store.schedule([])
    assert store.flush(PATIENCE)
