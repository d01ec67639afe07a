"""How fast blocks become an engine's cache, keys turned on the way: from the host tier and from the device tier.

Beside them, in the same run, what a plain copy does: from pinned memory to the device, and within the device.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from kvstore.adapters.transformers import Reuse
from kvstore.bench.gpu.exactness import tables
from kvstore.bench.gpu.setting import Figure, Setting
from kvstore.layout import Layout
from kvstore.tensors.rope import HALF
from kvstore.tensors.runs import COLUMN, KEYS, POSITION, STRIDE, TOKENS, VALUES, Target
from kvstore.tensors.transfer import GPU, transfer

GB = 1e9


def measure(setting: Setting) -> Iterator[Figure]:
    """Rates in GB/s of bytes moved, and the ratios that have goals."""
    yield Figure("pinned_copy", setting.pinned_copy / GB, "GB/s")
    yield Figure("device_copy", setting.device_copy / GB, "GB/s")
    rates = kernel_rates(setting)
    for name, goal in (("resident_kernel", 0.8), ("resident_transfer", None)):
        yield Figure(name, rates[name] / GB, "GB/s")
        ratio = rates[name] / setting.device_copy
        yield Figure(f"{name}_ratio", ratio, "of a device copy", goal and setting.goal(goal))
    yield from loads(setting, "host", 0, setting.pinned_copy, 0.9)
    if setting.cuda:
        yield from loads(setting, "device", setting.pool, setting.device_copy, None)
    else:
        setting.notes.append("bandwidth: loads from the device tier are skipped, they need CUDA")
    setting.free("thin_model")


def kernel_rates(setting: Setting) -> dict[str, float]:
    """Bytes per second from blocks that lie on the device to a Hugging Face cache, all layers of a prompt.

    ``resident_kernel``: the kernel alone, launched by a graph, its runs on the device already. ``resident_transfer``:
    as a load does it, the host sends the runs of each layer and launches the kernel.
    """
    config = setting.thin_model.config
    layers, heads, dim = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    layout = Layout.uniform(layers, heads, dim, "bfloat16", setting.block_tokens)
    count = setting.prompt // layout.block_tokens
    tokens = count * layout.block_tokens
    payload = layout.payload_bytes(layout.block_tokens)
    blocks = torch.empty((count, payload // 2), dtype=torch.bfloat16, device=setting.device).normal_()
    shape = (layers, heads, tokens, dim)
    keys, values = (torch.zeros(shape, dtype=torch.bfloat16, device=setting.device) for _ in range(2))
    turn = tables(setting, torch.bfloat16, HALF, True, dim // 2, tokens)
    runs = whole_blocks(layout, blocks.data_ptr() + payload * np.arange(count))
    targets = [Target(keys[layer], values[layer]) for layer in range(layers)]

    def by_layer() -> None:
        for layer, target in enumerate(targets):
            transfer(runs[layer], turn, target)

    if setting.cuda:
        GPU.wait()  # else plain torch serves until it is there
    moved = count * payload
    rates = {"resident_transfer": moved / setting.seconds(by_layer)}
    if not setting.triton:
        return rates | {"resident_kernel": rates["resident_transfer"]}
    from kvstore.tensors import rope_gpu

    ready = rope_gpu.prepare(runs, setting.device)

    def launched() -> None:
        for layer, target in enumerate(targets):
            rope_gpu.transfer(ready.layer(layer), turn, target)

    return rates | {"resident_kernel": moved / setting.seconds(setting.graphed(launched))}


def whole_blocks(layout: Layout, starts: np.ndarray) -> np.ndarray:
    """Runs [layers, blocks, 7] of whole blocks one after the other, whose payloads are at the addresses ``starts``."""
    offsets = layout.layer_offsets(layout.block_tokens)[:-1]
    runs = np.zeros((len(offsets), len(starts), 7), dtype=np.int64)
    runs[:, :, STRIDE] = runs[:, :, TOKENS] = layout.block_tokens
    runs[:, :, POSITION] = runs[:, :, COLUMN] = layout.block_tokens * np.arange(len(starts))
    for layer, offset in enumerate(offsets):
        runs[layer, :, KEYS] = starts + offset
        runs[layer, :, VALUES] = starts + offset + layout.key_bytes(layer, layout.block_tokens)
    return runs


@torch.inference_mode()
def loads(setting: Setting, tier: str, pool: str | int, limit: float, goal: float | None) -> Iterator[Figure]:
    """``<tier>_load``: a whole prompt from the store to the model's cache, from ``load`` to the last layer."""
    model = setting.thin_model
    ids = setting.ids(setting.prompt, 5, model)
    with setting.store(pool) as store:
        reuse = Reuse(model, store, fingerprint="bench", block_tokens=setting.block_tokens)
        hit = reuse.load(ids)
        model(**hit.forward_inputs, logits_to_keep=1)
        original = [(layer.keys, layer.values) for layer in hit.cache.layers]
        reuse.save(ids, hit.cache).wait()
        setting.pin(store)
        del hit
        loaded: list[Any] = []

        def load() -> None:
            loaded.clear()
            loaded.append(reuse.load(ids))
            loaded[0].cache.fetch()

        for _ in range(3):  # kernels are compiled, memory is taken, what is hot goes to the device
            load()
        setting.settle()
        tokens = loaded[0].cached_by_tier.get(tier, 0)
        if tokens != setting.prompt - 1:
            setting.notes.append(f"bandwidth: only {tokens} of {setting.prompt - 1} tokens came from the {tier} tier")
        equal = all(
            torch.equal(mine.keys, keys[:, :, :-1]) and torch.equal(mine.values, values[:, :, :-1])
            for mine, (keys, values) in zip(loaded[0].cache.layers, original, strict=True)
        )
        seconds = statistics.median(setting.clocked(load) for _ in range(setting.repeats))
        moved = reuse.layout.token_payload * (setting.prompt - 1)
        loaded.clear()
    yield Figure(f"{tier}_load_bit_equal", equal)
    yield Figure(f"{tier}_load", moved / seconds / GB, "GB/s")
    kind = "pinned" if tier == "host" else "device"
    yield Figure(f"{tier}_load_ratio", moved / seconds / limit, f"of a {kind} copy", goal and setting.goal(goal))
