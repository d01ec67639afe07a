"""Time to the first token of ten documents in random order: composed, by prefix caching, and computed."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import DynamicCache

import kvstore
from kvstore import compiled
from kvstore.adapters.transformers import Reuse
from kvstore.bench.micro.limits import copy, memory
from kvstore.bench.micro.ttft import build_model

DOCUMENTS, TOKENS, QUESTION = 10, 500, 32
SYSTEM = 64  # tokens that every prompt begins with: what prefix caching finds
COMPILING = 120.0  # seconds that a kernel may take to be compiled
BLEND = 0.15


def segment(number: int, tokens: int) -> list[int]:
    """Token ids of a document."""
    generator = torch.Generator().manual_seed(1000 + number)
    found: list[int] = torch.randint(0, 32_000, (tokens,), generator=generator).tolist()
    return found


@torch.inference_mode()
def measure(folder: Path, repeats: int, documents: int = DOCUMENTS, tokens: int = TOKENS) -> dict[str, float]:
    """Median seconds of ``recompute``, ``prefix``, ``modular`` (host), ``modular_disk``, ``blend``, ``blend_again`` and
    ``floor``.

    Every round shuffles the documents anew and asks another question, so that no prompt was seen before. ``floor``:
    memcpy of the documents' bytes, and the question's forward pass behind a cache of as many tokens in memory.
    """
    model = build_model()
    system, docs = segment(-1, SYSTEM), [segment(number, tokens) for number in range(documents)]
    times: dict[str, list[float]] = {}
    with kvstore.open(folder / "composed", host="1GiB", disk="4GiB") as store:
        reuse = Reuse(model, store)
        reuse.encode(segments=[system, *docs]).wait()
        _first(model, reuse.load(segments=[system, *docs, segment(500, QUESTION)]))
        compiled.idle(COMPILING)  # the first load asked for the kernel; from here on it is there
        floor = _floor(model, reuse, SYSTEM + documents * tokens)
        for number in range(repeats + 1):
            order = random.Random(number).sample(docs, len(docs))
            segments = [system, *order, segment(600 + number, QUESTION)]
            ids = torch.tensor([[token for part in segments for token in part]])
            arms: dict[str, Callable[[], Any]] = {
                "recompute": lambda ids=ids: _recompute(model, ids),  # type: ignore[misc]
                "prefix": lambda ids=ids: _first(model, reuse.load(ids), SYSTEM),  # type: ignore[misc]
                "modular": lambda s=segments: _first(model, reuse.load(segments=s), SYSTEM + documents * tokens),  # type: ignore[misc]
                "blend": lambda s=segments: _first(model, reuse.load(segments=s, mode="blend", recompute=BLEND)),  # type: ignore[misc]
                "floor": floor,
            }
            arms["blend_again"] = arms["blend"]  # the first one is stored meanwhile
            for name, work in arms.items():
                seconds, hit = _timed(work)
                if name == "blend":
                    reuse.save(ids, hit.cache)
                if number:  # the first round warms up
                    times.setdefault(name, []).append(seconds)
    for number in range(max(3, repeats // 2)):
        with kvstore.open(folder / "composed", host="1GiB", disk="4GiB") as store:
            reuse = Reuse(model, store)
            segments = [system, *random.Random(100 + number).sample(docs, len(docs)), segment(700 + number, QUESTION)]
            seconds, _ = _timed(lambda s=segments, r=reuse: _first(model, r.load(segments=s)))  # type: ignore[misc]
            times.setdefault("modular_disk", []).append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def table(row: dict[str, float]) -> Table:
    """The seconds, and how many times faster than computing the prompt each way is."""
    shown = Table("first token of a prompt of documents", "s", "of recompute", "times faster")
    shown.title = f"{DOCUMENTS} documents of {TOKENS} tokens, stored, in random order, and a question"
    for name, seconds in row.items():
        part = seconds / row["recompute"]
        shown.add_row(name.replace("_", " "), f"{seconds:.4f}", f"{part:.1%}", f"{1 / part:.1f}")
    return shown


def _first(model: Any, hit: Any, cached: int | None = None) -> Any:
    assert cached is None or hit.cached_tokens == cached, f"{hit.cached_tokens} tokens were cached: {hit.miss}"
    model(**hit.forward_inputs, logits_to_keep=1)
    return hit


def _recompute(model: Any, ids: torch.Tensor) -> None:
    model(input_ids=ids, past_key_values=DynamicCache(config=model.config), use_cache=True, logits_to_keep=1)


def _floor(model: Any, reuse: Reuse, tokens: int) -> Callable[[], None]:
    size = reuse.layout.token_payload * tokens
    source, target = memory(size), memory(size)
    cache = DynamicCache(config=model.config)
    _fill(model, cache, tokens)
    question = torch.tensor([segment(800, QUESTION)])

    def run() -> None:
        copy(target, source, size)
        model(input_ids=question, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.crop(-QUESTION)

    return run


def _fill(model: Any, cache: DynamicCache, tokens: int) -> None:
    ids = torch.tensor([segment(900, tokens)])
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    made = work()
    return time.perf_counter() - begin, made
