"""Host tier: loads into a given buffer and saves from one, beside memcpy of the same bytes with as many threads."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from typing import Any

import kvstore
from kvstore import Fingerprint, Layout, Namespace, Store
from kvstore.bench.micro.limits import Timing, compare, copy, in_threads, memory
from kvstore.checksum import KERNELS
from kvstore.save import Saved

LAYOUTS = {
    "32": Layout.uniform(layers=32, heads=8, dim=128, dtype="bfloat16"),
    "2": Layout.uniform(layers=8, heads=4, dim=64, dtype="bfloat16"),
}
NAMESPACE = Namespace(Fingerprint({"model": "micro"}))
TOTAL = 256 << 20  # payload bytes per measurement and thread
VOCABULARY = 1 << 17


def prompt(seed: int, tokens: int) -> array[int]:
    """Token ids of a prompt, in a buffer as engines hold them."""
    return array("I", random.Random(seed).choices(range(VOCABULARY), k=tokens))


def save_chain(store: Store, layout: Layout, ids: array[int], source: memoryview, check: bool = False) -> Saved:
    """Saves a chain of whole blocks whose payloads lie one after the other in ``source``."""
    size = layout.payload_bytes(layout.block_tokens)
    drafts = store.drafts(layout, len(ids) // layout.block_tokens)
    assert len(drafts) == len(ids) // layout.block_tokens, "the host tier is too small for the benchmark"
    for i, draft in enumerate(drafts):
        draft.fill(source[i * size : (i + 1) * size], check=check)
    return store.save(NAMESPACE, layout, ids, dict(enumerate(drafts)))


def load_chain(store: Store, layout: Layout, ids: array[int], target: memoryview, check: bool = False) -> None:
    """Loads all of a chain's blocks into ``target``."""
    load = store.load(store.match(NAMESPACE, layout, ids + array("I", [0])))
    written = load.read_into(target, check=check)
    assert written == len(target), f"{written} of {len(target)} bytes came back"
    load.release()


def measure(size: str, threads: int, repeats: int) -> dict[str, Timing]:
    """``host_load`` and ``host_save``, without and with checksums."""
    KERNELS.wait()  # as in a store that has run for a while
    layout = LAYOUTS[size]
    block = layout.payload_bytes(layout.block_tokens)
    blocks = TOTAL // block
    total = blocks * block
    sources, targets = [memory(total) for _ in range(threads)], [memory(total) for _ in range(threads)]
    limit = _each(threads, lambda i: copy(targets[i], sources[i], block))
    capacity = (2 * threads + 1) * (blocks + 4) * layout.full_slot_bytes
    tokens = blocks * layout.block_tokens
    result = {}
    with kvstore.open(host=capacity) as store:
        chains = [prompt(i, tokens) for i in range(threads)]
        for i, ids in enumerate(chains):
            save_chain(store, layout, ids, sources[i], check=True)
        result["host_load"] = compare(
            limit, _each(threads, lambda i: load_chain(store, layout, chains[i], targets[i])), repeats
        )
        result["host_load_checked"] = compare(
            limit, _each(threads, lambda i: load_chain(store, layout, chains[i], targets[i], check=True)), repeats
        )
        for i in range(threads):
            assert targets[i] == sources[i], "the bytes that came back are not those that were saved"
        for name, check in (("host_save", False), ("host_save_checked", True)):
            fresh: list[array[int]] = []

            def new_prompts(fresh: list[array[int]] = fresh) -> None:
                fresh[:] = [prompt(random.randrange(1 << 60), tokens) for _ in range(threads)]

            def save(i: int, check: bool = check, fresh: list[array[int]] = fresh) -> Any:
                return save_chain(store, layout, fresh[i], sources[i], check=check)

            result[name] = compare(limit, _each(threads, save), repeats, prepare=new_prompts)
    return result


def _each(threads: int, work: Callable[[int], object]) -> Callable[[], None]:
    return lambda: in_threads([lambda i=i: work(i) for i in range(threads)])  # type: ignore[misc]
