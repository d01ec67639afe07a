"""What is recorded on a device and leaves on a side stream is, bit for bit, what is recorded in host memory.

Where there is no GPU the device is the CPU, its side stream a thread; the same tests run on CUDA where it is there.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hf_models import build, prompt
from hf_runs import BLOCK
from staged import DEVICES, Hold, refusing, staging_of

import kvstore
from kvstore import Namespace
from kvstore.adapters.transformers import Reuse
from kvstore.adapters.transformers.staging import Staging
from kvstore.local import LocalStore

NEW = 24


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Both ways add in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def read(model: Any, hit: Any, ids: torch.Tensor) -> None:
    """Another forward pass with a hit's cache."""
    model(input_ids=ids, past_key_values=hit.cache, use_cache=True)


def in_steps(model: Any, reuse: Any, steps: list[int], device: str, seed: int) -> Any:
    """Forward passes over so many tokens each (fewer than none: crop); the hit and all ids."""
    first, *others = steps
    ids = prompt(first, seed).to(device)
    hit = reuse.load(ids)
    model(**hit.forward_inputs)
    for number, step in enumerate(others):
        if step < 0:
            hit.cache.crop(step)
            ids = ids[:, :step]
        else:
            new = prompt(step, seed + number).to(device)
            read(model, hit, new)
            ids = torch.cat((ids, new), 1)
    return hit, ids


STEPS = {
    "decode": [20, *[1] * 45],
    "chunks": [7, 40, 3, 33, 16, 16, 1],
    "whole blocks": [64],
    "rejected": [30, 4, -3, 9, -8, 5, -1, 1, 2],
    "into a block that left": [45, -20, 30, 1, 1],
    "out of blocks that left": [20, *[1] * 30, -34, 1, 1, 40],
    "to an edge": [40, 1, -9, 1, 20, -21, 17, 1],
}


def steps(name: str) -> Callable[..., list[Any]]:
    def run(model: Any, reuse: Any, device: str, seed: int) -> list[Any]:
        hit, ids = in_steps(model, reuse, STEPS[name], device, seed)
        assert reuse.save(ids, hit.cache).tokens == ids.shape[1]
        return [ids]

    return run


def turns(model: Any, reuse: Any, device: str, seed: int) -> list[Any]:
    """One cache over several turns, saved after each, then loaded and gone on with."""
    hit, history = in_steps(model, reuse, [20], device, seed)
    for turn in range(4):
        assert reuse.save(history, hit.cache).tokens == history.shape[1]
        new = prompt(9 + 7 * turn, seed + turn).to(device)
        read(model, hit, new)
        history = torch.cat((history, new), 1)
    assert reuse.save(history, hit.cache).tokens == history.shape[1]
    history = torch.cat((history, prompt(21, seed).to(device)), 1)
    again = reuse.load(history)
    assert again.cached_tokens == history.shape[1] - 21
    model(**again.forward_inputs)
    reuse.save(history, again.cache)
    return [history]


def two_rows(model: Any, reuse: Any, device: str, seed: int) -> list[Any]:
    """Rows of different lengths, of which one has a hit where windows allow it."""
    rows = [prompt(length, seed + length)[0].tolist() for length in (50, 23)]
    hit = reuse.load(rows[1][:9])
    model(**hit.forward_inputs)
    reuse.save(rows[1][:9], hit.cache)
    hit = reuse.load(rows)
    out = model.generate(**hit.inputs, max_new_tokens=NEW, do_sample=False)
    assert reuse.save(out, hit.cache).tokens == [50 + NEW - 1, 23 + NEW - 1]
    return [row + new[-NEW:].tolist() for row, new in zip(rows, out, strict=True)]


def lookup(model: Any, reuse: Any, device: str, seed: int) -> list[Any]:
    """Assisted generation: it crops what was rejected after every step."""
    ids = prompt(6, seed).repeat(1, 6).to(device)
    return [reuse.generate(ids, max_new_tokens=NEW, do_sample=False, prompt_lookup_num_tokens=5)]


SCENARIOS = {**{name: steps(name) for name in STEPS}, "turns": turns, "two rows": two_rows, "lookup": lookup}
WINDOWED = ("decode", "chunks", "turns", "two rows")  # transformers itself does not crop behind a window
CASES = [("llama", name) for name in SCENARIOS] + [("gemma3", name) for name in WINDOWED]


def bits(store: LocalStore, reuse: Any, chains: list[Any]) -> list[torch.Tensor]:
    """Every layer's keys and values of all tokens that are stored of these chains, [heads, tokens, dim]."""
    found = []
    for ids in chains:
        ids = ids[0].tolist() if isinstance(ids, torch.Tensor) else ids
        load = store.load(store.match(Namespace(reuse.fingerprint), reuse.layout, [*ids, 0]))
        assert load.tokens >= len(ids) - 1
        for layer, shape in enumerate(reuse.layout.layers):
            assert load.wait(layer)
            for which in (0, 1):
                parts = []
                for piece in load.pieces(layer):
                    flat = torch.frombuffer(bytearray(piece[which]), dtype=reuse._joined.attached.dtype)
                    parts.append(flat.view(shape.heads, piece.stride, -1)[:, : piece.tokens])
                found.append(torch.cat(parts, 1))
        load.release()
    return found


def run(scenario: Callable[..., list[Any]], model: Any, device: str, seed: int, staged: Any) -> list[torch.Tensor]:
    """What is stored after a scenario. ``staged``: makes the staging from the Reuse; None: there is none."""
    with kvstore.open(host="64MiB") as store:
        reuse = Reuse(model, store, block_tokens=BLOCK)
        reuse._joined.staging = None if staged is None else staged(reuse)
        with torch.no_grad():
            chains = scenario(model, reuse, device, seed)
        found = bits(store, reuse, chains)
        if reuse._joined.staging is not None:
            reuse._joined.staging.close()
        assert store.stats()["drafts"] == 0
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("family", "name"), CASES)
def test_every_bit_is_that_of_the_direct_way(family: str, name: str, device: str, seed: int) -> None:
    model, stagings = build(family).to(device), list[Staging]()

    def staged(reuse: Any) -> Staging:
        stagings.append(staging_of(reuse.layout, reuse._joined.attached.dtype, device))
        return stagings[0]

    got = run(SCENARIOS[name], model, device, seed, staged)
    expected = run(SCENARIOS[name], model, device, seed, None)
    assert stagings[0]._leaving, "nothing was staged"
    assert stagings[0].counters.snapshot() == {}
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("buffers", [0, 1, 2])
@pytest.mark.parametrize("name", ["decode", "chunks", "turns"])
def test_without_device_memory_it_is_slower_but_right(
    name: str, buffers: int, device: str, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    model, stagings = build("llama").to(device), list[Staging]()

    def staged(reuse: Any) -> Staging:
        stagings.append(staging_of(reuse.layout, reuse._joined.attached.dtype, device, allocate=refusing(buffers)))
        return stagings[0]

    got = run(SCENARIOS[name], model, device, seed, staged)
    expected = run(SCENARIOS[name], model, device, seed, None)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    lines = [record for record in caplog.records if "no memory" in record.message]
    assert len(lines) == stagings[0].short
    if not buffers:
        assert stagings[0].short
        assert stagings[0].counters.snapshot()["blocks_recorded_directly"] > 0


def test_generation_goes_on_while_nothing_leaves(seed: int) -> None:
    model = build("llama")
    with kvstore.open(host="64MiB") as store, Hold() as hold:
        reuse = Reuse(model, store, block_tokens=BLOCK)
        staging = reuse._joined.staging = staging_of(reuse.layout, torch.float32, "cpu", hold.stream)
        ids = prompt(40, seed)
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        hit = reuse.load(ids)
        out = model.generate(**hit.inputs, max_new_tokens=40, do_sample=False)
        assert torch.equal(out, expected)
        assert not any(leaving.left.done() for leaving in staging._leaving)  # and yet:
        assert hit.cache.recorder.rows[0].ids == out[0, :-1].tolist()
        hold.open()
        assert reuse.save(out, hit.cache).tokens == 79
        got = bits(store, reuse, [out[:, :-1]])
        staging.close()
    # The prompt was read, and each token generated, in the same steps: so even the bits are the same.
    direct = run(lambda model, reuse, *_: [reuse.generate(ids, max_new_tokens=40)[:, :-1]], model, "cpu", seed, None)
    assert all(torch.equal(one, other) for one, other in zip(got, direct, strict=True))


def test_a_hit_that_is_dropped_keeps_its_drafts_until_nothing_writes_to_them(seed: int) -> None:
    model = build("llama")
    with kvstore.open(host="64MiB") as store, Hold() as hold:
        reuse = Reuse(model, store, block_tokens=BLOCK)
        staging = reuse._joined.staging = staging_of(reuse.layout, torch.float32, "cpu", hold.stream)
        with torch.no_grad():
            hit, _ = in_steps(model, reuse, [20, *[1] * 30], "cpu", seed)
            assert store.stats()["drafts"] == 4
            del hit
            assert store.stats()["drafts"] == 3  # the open one is free, the others are still to be copied to
            hold.open()
            hold.stream.record().wait()
            hit, _ = in_steps(model, reuse, [3], "cpu", seed)
        assert store.stats()["drafts"] == 1
        del hit
        assert store.stats()["drafts"] == 0
        staging.close()
