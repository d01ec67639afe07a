"""What another engine has stored with its keys turned: given as it is, or turned to where it is wanted, never as it is
not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from another import ENGINE, KNOWN, NEW, TAIL, WHOLE, forms, held, memory_of, same_as, seen, stores
from composed import close
from hf_models import DTYPES, build, prompt
from hf_runs import BLOCK, SECOND, attach, go_on, second_turn
from hosted import hosted

import kvstore
from kvstore import Namespace
from kvstore.adapters.transformers import Reuse
from kvstore.adapters.transformers.buffers import view
from kvstore.adapters.transformers.joined import WRITER
from kvstore.local import LocalStore
from kvstore.tensors.carrier import Carrier


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", KNOWN)
def test_going_on_gives_the_bits_of_going_on_in_memory(family: str, dtype: str, store: LocalStore, seed: int) -> None:
    model = build(family, dtype)
    reuse, ids = Reuse(model, store, block_tokens=BLOCK), prompt(WHOLE, seed)
    assert stores(reuse, ids).tokens == WHOLE
    hit = reuse.load(torch.cat((ids, prompt(SECOND, seed + 1)), 1))
    assert (hit.cached_tokens, hit.writers, hit.exact) == (WHOLE, (ENGINE,), True)
    expected = go_on(model, memory_of(model, ids), prompt(SECOND, seed + 1), NEW)
    logits, tokens = go_on(model, hit.cache, hit.forward_inputs["input_ids"], NEW)
    assert torch.equal(logits, expected[0]) and torch.equal(tokens, expected[1])


@pytest.mark.parametrize("family", KNOWN)
def test_turned_twice_is_noticed(family: str, store: LocalStore, seed: int) -> None:
    """The negative control: the same bytes, of which the engine says that they are before rotation."""
    model, reuse = attach(family, store)
    ids = prompt(WHOLE, seed)
    stores(reuse, ids, form="pre")
    hit = reuse.load(torch.cat((ids, prompt(SECOND, seed + 1)), 1))
    assert hit.cached_tokens == WHOLE
    logits, tokens = go_on(model, hit.cache, hit.forward_inputs["input_ids"], NEW)
    expected = go_on(model, memory_of(model, ids), prompt(SECOND, seed + 1), NEW)
    assert not torch.equal(logits, expected[0]) and not torch.equal(tokens, expected[1])


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek_v2"])
def test_by_way_of_the_device(family: str, seed: int) -> None:
    streams = Carrier(torch.device("cpu"))
    with kvstore.open(host="64MiB", device="64MiB", device_name="cpu") as store:
        model, reuse = attach(family, store)
        reuse._joined.carrier = streams
        ids = prompt(WHOLE, seed)
        stores(reuse, ids)
        expected = go_on(model, memory_of(model, ids), prompt(SECOND, seed + 1), NEW)
        for tier in ("host", "device"):
            hit = reuse.load(torch.cat((ids, prompt(SECOND, seed + 1)), 1))
            assert hit.cached_by_tier[tier] == WHOLE
            logits, _ = go_on(model, hit.cache, hit.forward_inputs["input_ids"], NEW)
            assert torch.equal(logits, expected[0])
    streams.close()


def test_nothing_is_done_to_them(store: LocalStore, seed: int) -> None:
    """Not even to what comes out of arithmetic otherwise than it went in: zeros below zero, infinities, no numbers."""
    _, reuse = attach("llama", store)
    ids, spec = prompt(WHOLE, seed), reuse._joined.attached.specs[0]
    source = torch.Generator().manual_seed(seed)
    noise = torch.randint(-(2**31), 2**31, (3, spec.heads, BLOCK, spec.key_dim), generator=source).to(torch.int32)
    noise[..., :2], noise[..., 2:4], noise[..., 4:6] = -(2**31), 0x7F800000, 0x7FC00001
    drafts = store.drafts(reuse.layout, 3)
    for block, draft in enumerate(drafts):
        for slot in range(3):
            for memory in draft.layer(slot):
                view(memory, torch.int32, noise[block].shape).copy_(noise[block])
    space, given = Namespace(reuse.fingerprint), dict(enumerate(drafts))
    store.save(space, reuse.layout, ids[0].tolist(), given, form="rotated")
    hit = reuse.load(torch.cat((ids, ids[:, :1]), 1))
    hit.cache.fetch()
    for slot in range(3):
        for state in held(hit, slot):
            assert torch.equal(state[0].view(torch.int32), torch.cat(list(noise), 1))


def test_from_disk_and_from_a_daemon(quick: Path, seed: int) -> None:
    model, ids = build("llama"), prompt(WHOLE, seed)
    expected = go_on(model, memory_of(model, ids), prompt(SECOND, seed + 1))
    with kvstore.open(quick / "cache", host="16MiB", disk="64MiB") as store:
        stores(Reuse(model, store, block_tokens=BLOCK), ids)
    with kvstore.open(quick / "cache", host="16MiB", disk="64MiB") as store:
        reuse = Reuse(model, store, block_tokens=BLOCK)
        hit = reuse.load(torch.cat((ids, prompt(SECOND, seed + 1)), 1))
        assert hit.cached_by_tier["disk"] == WHOLE and hit.writers == (ENGINE,)
        assert torch.equal(go_on(model, hit.cache, hit.forward_inputs["input_ids"])[0], expected[0])
    with hosted(quick / "cache") as daemon, daemon.connect() as client:
        reuse = Reuse(model, client, block_tokens=BLOCK)
        for _ in range(2):
            cached, logits, _ = second_turn(model, reuse, ids, seed)
            assert cached == WHOLE and torch.equal(logits, expected[0])
        assert reuse.load(ids).writers == (ENGINE,)


# -- chains that both wrote -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", KNOWN)
def test_a_conversation_goes_on_behind_another_engine(family: str, store: LocalStore, seed: int) -> None:
    """The part of a block is computed again, so that the block can be stored; all of it comes back bit for bit."""
    model, reuse = attach(family, store)
    ids = prompt(WHOLE + TAIL, seed)
    stores(reuse, ids)
    longer = torch.cat((ids, prompt(SECOND, seed + 1)), 1)
    hit = reuse.load(longer)
    assert (hit.cached_tokens, hit.miss.kind, hit.miss.position) == (WHOLE, "rotated", WHOLE)
    memory = memory_of(model, ids[:, :WHOLE])
    expected = go_on(model, memory, longer[:, WHOLE:], 4)
    logits, tokens = go_on(model, hit.cache, hit.forward_inputs["input_ids"], 4)
    assert torch.equal(logits, expected[0])
    said = torch.cat((longer, tokens[:, :3]), 1)
    assert reuse.save(said, hit.cache).tokens == said.shape[1]
    assert forms(reuse, said) == ["rotated"] * 3 + ["pre"] * 2
    more = prompt(SECOND, seed + 2)
    again = reuse.load(torch.cat((said, more), 1))
    assert (again.cached_tokens, again.writers) == (said.shape[1], (ENGINE, WRITER))
    expected = go_on(model, memory, more, NEW)
    logits, tokens = go_on(model, again.cache, again.forward_inputs["input_ids"], NEW)
    assert torch.equal(logits, expected[0]) and torch.equal(tokens, expected[1])


@pytest.mark.parametrize("family", ["llama", "neox", "fusedkv", "deepseek_v2"])
def test_another_engine_goes_on_behind_it(family: str, store: LocalStore, seed: int) -> None:
    model, reuse = attach(family, store)
    ids = prompt(WHOLE + TAIL, seed)
    hit = reuse.load(ids[:, :40])
    with torch.no_grad():
        model(**hit.forward_inputs)
    assert reuse.save(ids[:, :40], hit.cache).tokens == 40
    assert stores(reuse, ids).tokens == WHOLE + TAIL
    assert forms(reuse, ids) == ["pre", "pre", "rotated", "rotated"]
    hit = reuse.load(torch.cat((ids, ids[:, :1]), 1))
    assert (hit.cached_tokens, hit.writers) == (WHOLE, (WRITER, ENGINE))
    ours, theirs = seen(model, ids[:, :40]), seen(model, ids)
    same_as(hit, [
        tuple(torch.cat((one[:, :, :32], other[:, :, 32:]), 2) for one, other in zip(*pairs, strict=True))  # type: ignore[misc]
        for pairs in zip(ours, theirs, strict=True)
    ])  # fmt: skip


@pytest.mark.parametrize("parted", [WHOLE, WHOLE - 1, 2 * BLOCK + 1])
def test_a_block_that_matches_in_part_is_left(parted: int, store: LocalStore, seed: int) -> None:
    model, reuse = attach("llama", store)
    ids = prompt(WHOLE, seed)
    stores(reuse, ids)
    other = torch.cat((ids[:, :parted], prompt(SECOND, seed + 1)), 1) if parted < WHOLE else ids
    hit = reuse.load(other)
    assert hit.cached_tokens == 2 * BLOCK
    with torch.no_grad():
        model(**hit.forward_inputs)
    assert reuse.save(other, hit.cache).tokens == other.shape[1]
    again = reuse.load(torch.cat((other, ids[:, :3]), 1))
    assert again.cached_tokens == other.shape[1]
    again.cache.fetch()
    close(torch.cat([held(again, slot)[0] for slot in range(3)]), torch.cat([keys for keys, _ in seen(model, other)]))
