"""One turn, measured twice: from nothing and from the store, with the outputs of both compared.

The comparison is in float32. Recomputing a prompt in other chunks gives other low bits (matrix products sum in
another order), so a reuse that is exact still differs from a full recompute by that much. `chunk_noise` measures how
much, and a token may differ only where the two best logits are closer than that: a tie, which is counted apart.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from kvstore.adapters.transformers.running import Running

CHUNKS = (128,)  # tokens a chunk, when a prompt is recomputed to measure noise


@dataclass(frozen=True)
class Answer:
    """What a model said after a prompt: the logits before each token, and the seconds it took."""

    logits: torch.Tensor  # [tokens, vocabulary], float32, on the CPU
    fed: tuple[int, ...]  # the token that each step went on with
    ttft_seconds: float
    tpot_seconds: float


@dataclass(frozen=True)
class Difference:
    """How far two answers to one prompt, fed with the same tokens, lie apart."""

    largest: float
    gaps: tuple[float, ...]  # where the best tokens differ: how close the two best logits were
    divergence: float  # mean over the tokens of how far the other's distribution is from the one's, in nats


def answer(model: Any, first: dict[str, Any], cache: Any, tokens: int, script: Sequence[int], started: float) -> Answer:
    """Feeds the inputs `first`, then one token at a time: those of `script`, or the best ones where it is empty.

    `started` is when the request came in: the time to the first token counts from there.
    """
    steps: list[torch.Tensor] = []
    chosen: list[int] = []
    running, ended = Running(model, first, cache), 0.0
    for step in range(tokens):
        logits = running.read()
        best = int(logits.argmax())  # waits for the device
        if step == 0:
            ended = time.perf_counter()
        steps.append(logits)
        chosen.append(script[step] if script else best)
        running.say(chosen[-1])
    decoding = time.perf_counter() - ended
    stacked = torch.stack(steps).to("cpu", torch.float32)
    return Answer(stacked, tuple(chosen), ended - started, decoding / (tokens - 1) if tokens > 1 else 0.0)


def recompute(model: Any, ids: torch.Tensor, tokens: int, script: Sequence[int] = ()) -> Answer:
    """The answer with no cache at all before it."""
    started = time.perf_counter()
    return answer(model, {"input_ids": ids}, DynamicCache(config=model.config), tokens, script, started)


def difference(one: Answer, other: Answer) -> Difference:
    """Compares two answers that were fed the same tokens."""
    assert one.fed == other.fed
    largest = float((one.logits - other.logits).abs().max())
    best = one.logits.topk(2, dim=-1).values
    differs = one.logits.argmax(dim=-1) != other.logits.argmax(dim=-1)
    gaps = (best[:, 0] - best[:, 1])[differs]
    apart = torch.nn.functional.kl_div(
        other.logits.log_softmax(-1), one.logits.log_softmax(-1), log_target=True, reduction="none"
    )
    divergence = float(apart.sum(-1).mean())
    return Difference(largest if largest == largest else float("inf"), tuple(gaps.tolist()), divergence)


def chunk_noise(model: Any, ids: torch.Tensor, whole: Answer, cached_tokens: int) -> float:
    """The largest difference that recomputing this prompt in other chunks makes, with no store in play.

    The chunks are a few fixed sizes, and the two parts that the reuse of `cached_tokens` makes.
    """
    length = ids.shape[1]
    splits = [list(range(0, length, size)) for size in CHUNKS if size < length]
    splits += [[0, cut] for cut in {length // 2, length - 1, cached_tokens} if 0 < cut < length]
    largest = 0.0
    for starts in splits:
        cache = DynamicCache(config=model.config)
        for begin, end in itertools.pairwise(starts):
            model(input_ids=ids[:, begin:end], past_key_values=cache, use_cache=True, logits_to_keep=1)
        last = {"input_ids": ids[:, starts[-1] :]}
        again = answer(model, last, cache, len(whole.fed), whole.fed, time.perf_counter())
        largest = max(largest, difference(whole, again).largest)
    return largest
