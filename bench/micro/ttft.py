"""Time to the first token on a 12-layer, 1024-wide Llama: recompute, reuse from host and from cold disk, the floor.

And what recording and saving in the background cost each generated token.
"""

from __future__ import annotations

import statistics
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import kvstore
from kvstore import Namespace, Store, compiled
from kvstore.adapters.transformers import Reuse
from kvstore.bench.micro import host
from kvstore.bench.micro.limits import PlainFile, copy, memory

PROMPTS = (256, 1024, 4096, 8192)
COLD = 5  # loads from cold disk behind a median
STEP = 1 << 20  # bytes of one plain read
COMPILING = 120.0  # seconds that a kernel may take to be compiled
DECODE = 48  # tokens of one side of a TPOT pair


def build_model(dtype: torch.dtype = torch.float32) -> Any:
    """A seeded 12-layer, 1024-wide Llama with grouped queries."""
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=1 << 17,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return LlamaForCausalLM(config).to(dtype).eval()


def prompt(tokens: int) -> torch.Tensor:
    """Token ids [1, tokens]."""
    return torch.randint(0, 32_000, (1, tokens), generator=torch.Generator().manual_seed(tokens))


@torch.inference_mode()
def measure(folder: Path, repeats: int, lengths: tuple[int, ...] = PROMPTS) -> dict[str, dict[str, float]]:
    """Per prompt length the median seconds of ``recompute``, ``host``, ``disk_cold``, ``floor`` and ``disk_limit``.

    ``disk_limit`` is the floor, or plain reads of the same bytes where those take longer. ``host_ratio`` and
    ``disk_ratio`` say how many times as long as their limits the host's and the disk's first token took.
    """
    model = build_model()
    result: dict[str, dict[str, float]] = {}
    with kvstore.open(folder / "ttft", host="3GiB", disk="4GiB") as store:
        reuse = Reuse(model, store)
        token_payload = reuse.layout.token_payload
        for length in lengths:
            ids = prompt(length)
            hit = reuse.load(ids)
            model(**hit.forward_inputs)
            reuse.save(ids, hit.cache).wait()
            _reuse(reuse, model, ids)
            compiled.idle(COMPILING)  # the first load asked for the kernel; from here on it is there
            times: dict[str, list[float]] = {"recompute": [], "host": [], "floor": []}
            floor = _floor(model, length, reuse)
            few = max(2, repeats // 2) if length > 2048 else repeats
            for _ in range(few):
                times["recompute"].append(_seconds(lambda ids=ids: _recompute(model, ids)))  # type: ignore[misc]
                times["host"].append(_seconds(lambda ids=ids: _reuse(reuse, model, ids)))  # type: ignore[misc]
                times["floor"].append(_seconds(floor))
            result[str(length)] = {name: statistics.median(values) for name, values in times.items()}
    longest = max(lengths)
    # Memory for the longest prompt and half of it again, and in use: as in a store that has run for a while.
    with kvstore.open(folder / "ttft", host=int(1.6 * token_payload * longest) + (16 << 20), disk="4GiB") as store:
        reuse = Reuse(model, store)
        others = [_other_chain(store, reuse, longest, seed) for seed in (1, 2)]
        for length in lengths:
            row = result[str(length)]

            def load_cold(length: int = length) -> float:
                for ids in others:
                    _flush(store, reuse, ids)
                return _seconds(lambda: _reuse(reuse, model, prompt(length), "disk"))

            row |= _from_disk(folder, load_cold, token_payload * (length - 1), row["floor"])
            row["host_ratio"] = row["host"] / row["floor"]
            row["disk_ratio"] = row["disk_cold"] / row["disk_limit"]
    return result


def _other_chain(store: Store, reuse: Reuse, tokens: int, seed: int) -> array[int]:
    """Saves a chain of so many tokens; its bytes are what the memory held."""
    ids = host.prompt(seed, tokens)
    drafts = store.drafts(reuse.layout, tokens // reuse.layout.block_tokens)
    store.save(Namespace(reuse.fingerprint), reuse.layout, ids, dict(enumerate(drafts))).wait()
    return ids


def _flush(store: Store, reuse: Reuse, ids: array[int]) -> None:
    """Has the chain brought to memory, so that what was there before goes."""
    load = store.load(store.match(Namespace(reuse.fingerprint), reuse.layout, ids))
    assert load.wait(len(reuse.layout.layers) - 1), "another chain could not be loaded"
    load.release()


def _from_disk(folder: Path, load_cold: Callable[[], float], size: int, floor: float) -> dict[str, float]:
    """``disk_cold`` and ``disk_limit``, measured in turns."""
    buffers = [memory(STEP) for _ in range(-(-size // STEP))]
    plain = PlainFile(folder / "plain", STEP * len(buffers), COLD)
    cold = []
    reads: dict[int, list[float]] = {1: [], 4: []}
    try:
        for _ in range(COLD):
            plain.write(buffers, 4)  # so that there is something to read
        for _ in range(COLD):
            cold.append(load_cold())
            for flight, seconds in reads.items():
                seconds.append(_seconds(lambda flight=flight: plain.read(buffers, flight)))  # type: ignore[misc]
    finally:
        plain.close()
    read = min(statistics.median(seconds) for seconds in reads.values())
    return {"disk_cold": statistics.median(cold), "disk_limit": max(read, floor)}


def _recompute(model: Any, ids: torch.Tensor) -> None:
    model(input_ids=ids, past_key_values=DynamicCache(config=model.config), use_cache=True, logits_to_keep=1)


def _reuse(reuse: Reuse, model: Any, ids: torch.Tensor, tier: str = "host") -> None:
    hit = reuse.load(ids)
    cached = hit.cached_by_tier[tier]
    assert cached == ids.shape[1] - 1, f"only {cached} tokens were cached on {tier}: {hit.miss}"
    model(**hit.forward_inputs, logits_to_keep=1)


def _floor(model: Any, length: int, reuse: Reuse) -> Callable[[], None]:
    """memcpy of the cached bytes, then one token's forward pass behind as many: nothing can be faster."""
    size = reuse.layout.token_payload * (length - 1)
    source, target = memory(size), memory(size)
    cache = DynamicCache(config=model.config)
    _recompute_into(model, prompt(length)[:, :-1], cache)
    last = prompt(length)[:, -1:]

    def run() -> None:
        copy(target, source, size)
        model(input_ids=last, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.crop(-1)

    return run


def _recompute_into(model: Any, ids: torch.Tensor, cache: DynamicCache) -> None:
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


@torch.inference_mode()
def measure_tpot(folder: Path, pairs: int, tokens: int = 1024) -> dict[str, float]:
    """What recording and saving cost a generated token: ``overhead`` is the median over interleaved pairs.

    One side decodes behind a prompt with the model's own cache; the other loads the prompt, records, and has the turn
    before it written to disk meanwhile.
    """
    model = build_model()
    ratios, plain_times = [], []
    with kvstore.open(folder / "tpot", host="1GiB", disk="2GiB") as store:
        reuse = Reuse(model, store)
        for number in range(pairs + 1):
            ids = torch.randint(0, 32_000, (1, tokens), generator=torch.Generator().manual_seed(number))
            cache = DynamicCache(config=model.config)
            plain = _decode(model, model(input_ids=ids, past_key_values=cache, use_cache=True), cache)
            hit = reuse.load(ids)
            out = model(**hit.forward_inputs)
            recorded = _decode(model, out, hit.cache, lambda hit=hit, ids=ids: reuse.save(ids, hit.cache))  # type: ignore[misc]
            if number:  # the first pair warms up
                ratios.append(recorded / plain - 1)
                plain_times.append(plain)
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"overhead": middle, "low": low, "high": high, "tpot": statistics.median(plain_times), "pairs": pairs}


def _decode(model: Any, out: Any, cache: Any, save: Callable[[], object] = lambda: None) -> float:
    """Seconds per token of greedy decoding; ``save`` is called before, so that its writing runs meanwhile."""
    save()
    token = out.logits[:, -1:].argmax(-1)
    begin = time.perf_counter()
    for _ in range(DECODE):
        token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    return (time.perf_counter() - begin) / DECODE
