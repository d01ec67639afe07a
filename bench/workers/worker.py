"""One worker: a process with a model of its own that answers turns when it is told to. ``python -m`` runs it."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch

import kvstore
from kvstore.adapters.transformers import Reuse
from kvstore.bench import logs, models
from kvstore.bench.encoders import token_ids
from kvstore.bench.measure import answer, difference, recompute
from kvstore.bench.replay import place_of


def work(url: str, log: str, model: str, tokens: int) -> None:
    """Reads "conversation turn" from stdin, a line for each, and answers with a line of JSON."""
    torch.set_num_threads(1)
    subject, conversations = models.load(model), logs.read(Path(log))
    with kvstore.connect(url, timeout=5.0) as store:
        reuse = Reuse(subject.model, store)
        print(json.dumps({"pid": os.getpid()}), flush=True)
        for line in sys.stdin:
            conversation, number = map(int, line.split())
            chosen = conversations[conversation]
            ids = torch.tensor([token_ids(subject.encoder, chosen.turns[number].prompt, place_of(chosen, number))])
            print(json.dumps(_turn(subject.model, reuse, ids, tokens)), flush=True)


@torch.inference_mode()
def _turn(model: torch.nn.Module, reuse: Reuse, ids: torch.Tensor, tokens: int) -> dict[str, object]:
    started = time.perf_counter()
    hit = reuse.load(ids)
    reused = answer(model, hit.forward_inputs, hit.cache, tokens, (), started)
    if tokens > 1:
        hit.cache.crop(1 - tokens)  # the log's reply comes next, not what the model just said
    saved = reuse.save(ids, hit.cache)
    plain = recompute(model, ids, tokens, reused.fed)
    apart = difference(plain, reused)
    return {
        "prompt": ids.shape[1],
        "cached": hit.cached_tokens,
        "tiers": hit.cached_by_tier,
        "saved": saved.wait(10.0).tokens,
        "ttft": reused.ttft_seconds,
        "ttft_recompute": plain.ttft_seconds,
        "differ": len(apart.gaps),
        "largest": apart.largest,
    }


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
