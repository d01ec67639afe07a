"""How quickly a chat log is served with Redis as it may be, and without."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from statistics import median
from typing import Any

import torch

import kvstore
from kvstore.adapters.transformers import Reuse
from kvstore.bench.conversation import Conversation
from kvstore.bench.encoders import token_ids
from kvstore.bench.measure import answer
from kvstore.bench.models import Subject
from kvstore.bench.remote.proxy import Apart
from kvstore.bench.remote.server import Server
from kvstore.bench.replay import ordered, place_of
from kvstore.remote.options import RemoteOptions

TOKENS = 4  # that the model says in each turn
WAYS = ("without", "beside", "refused", "black hole", "500 ms")


def serve(subject: Subject, ids: torch.Tensor, reuse: Reuse) -> float:
    """Serves one turn from a store; seconds."""
    begin = time.perf_counter()
    with torch.inference_mode():
        hit = reuse.load(ids)
        answer(subject.model, hit.forward_inputs, hit.cache, TOKENS, (), begin)
        hit.cache.crop(1 - TOKENS)
        reuse.save(ids, hit.cache)
    return time.perf_counter() - begin


@contextmanager
def opened(server: Server, way: str, turn: int) -> Iterator[Any]:
    """A store with Redis in one of the ``WAYS``, under a prefix that nobody has used."""
    if way == "without":
        with kvstore.open(host="256MiB") as store:
            yield store
        return
    with closing(Apart(server.port)) as proxy:
        proxy.mode = "as it is" if way in ("beside", "refused") else way
        url = "redis://127.0.0.1:1/0" if way == "refused" else proxy.url if way != "beside" else server.url
        how = RemoteOptions(url, prefix=f"{way.replace(' ', '-')}-{turn}")
        with kvstore.open(host="256MiB", redis=how) as store:
            yield store


def measure(server: Server, subject: Subject, conversations: list[Conversation], rounds: int) -> dict[str, Any]:
    """Prompt tokens a second by way, and ratios to those without Redis. Each turn is served in all ways one right after
    the other, in changing order, so that what else the machine does meets them alike."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    prompts = [
        torch.tensor([token_ids(subject.encoder, chat.turns[number].prompt, place_of(chat, number))])
        for chat, number in ordered(conversations, True)
    ]
    for turn in range(-1, rounds):  # the first round warms everything up
        with ExitStack() as stack:
            stores = {way: stack.enter_context(opened(server, way, turn)) for way in WAYS}
            reuses = {way: Reuse(subject.model, store, block_tokens=64) for way, store in stores.items()}
            spent = dict.fromkeys(WAYS, 0.0)
            for at, ids in enumerate(prompts):
                for way in (*WAYS[at % len(WAYS) :], *WAYS[: at % len(WAYS)]):
                    spent[way] += serve(subject, ids, reuses[way])
        for way, taken in spent.items() if turn >= 0 else ():
            seconds[way].append(taken)
    tokens = sum(ids.shape[1] for ids in prompts)
    plain = seconds["without"]
    return {
        way: {
            "tokens_per_second": tokens / median(taken),
            "ratio": sum(plain) / sum(taken),
        }
        for way, taken in seconds.items()
    }
