"""What saving a long prompt in the background costs each token that is generated meanwhile."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import DynamicCache

from kvstore.adapters.transformers import Reuse
from kvstore.bench.gpu.setting import Figure, Setting


@torch.inference_mode()
def measure(setting: Setting) -> Iterator[Figure]:
    """Milliseconds of a token and how much slower it is, as the median over pairs that are run in turns.

    Both sides have read a new prompt and decode behind it. One decodes with its cache as it is; the other has just
    called ``save``, records what it generates, and the blocks of the prompt go to the host and are checked meanwhile.
    """
    model, slower, plain = setting.model, [], []
    with setting.store() as store:
        reuse = Reuse(model, store, fingerprint="bench", block_tokens=setting.block_tokens)
        for number in range(setting.pairs + 1):
            ids = setting.ids(setting.saved, 100 + number, model)
            times = {}
            for saving in (False, True) if number % 2 else (True, False):
                times[saving] = side(setting, reuse, ids, saving)
            if number:  # the first pair warms up
                slower.append(times[True] / times[False] - 1)
                plain.append(times[False])
    low, middle, high = statistics.quantiles(slower, n=4)
    noise = statistics.median(abs(after / before - 1) for before, after in itertools.pairwise(plain))
    yield Figure("decode_step", statistics.median(plain) * 1e3, "ms")
    yield Figure("decode_slowed_by_saves", middle * 100, "%", setting.goal(2.0), at_most=True)
    yield Figure("decode_slowed_low_quarter", low * 100, "%")
    yield Figure("decode_slowed_high_quarter", high * 100, "%")
    yield Figure("decode_noise", noise * 100, "% between two without saves")


def side(setting: Setting, reuse: Reuse, ids: torch.Tensor, saving: bool) -> float:
    """Seconds per token behind a new prompt."""
    model = reuse.model
    if saving:
        hit = reuse.load(ids)
        cache, inputs = hit.cache, hit.forward_inputs
        return decoded(setting, model, inputs, cache, lambda: reuse.save(ids, cache))
    plain = DynamicCache(config=model.config)
    return decoded(setting, model, {"input_ids": ids, "past_key_values": plain}, plain, lambda: None)


def decoded(setting: Setting, model: Any, inputs: dict[str, Any], cache: Any, save: Callable[[], Any]) -> float:
    """Reads the prompt, calls ``save``, and times greedy decoding from there.

    Waits for the model's own stream only, so that copies on others go on while it decodes.
    """
    logits = model(**(inputs | {"use_cache": True}), logits_to_keep=1).logits
    token = logits[:, -1:].argmax(-1)
    int(token)
    begin = time.perf_counter()
    saved = save()
    for _ in range(setting.decoded):
        token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    int(token)
    seconds = (time.perf_counter() - begin) / setting.decoded
    if saved is not None:
        saved.wait()
    setting.settle()
    return seconds
