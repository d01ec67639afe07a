"""Keys that another engine has turned, at other positions, in models and modes that cannot use them, and before what
is recorded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from another import ENGINE, KNOWN, TAIL, UNKNOWN, WHOLE, forms, held, memory_of, seen, stores
from composed import QUESTION, close, read
from hf_models import DTYPES, build, prompt
from hf_runs import BLOCK, SECOND, attach, go_on, second_turn

import kvstore
from kvstore.adapters.transformers import Reuse
from kvstore.adapters.transformers.joined import WRITER
from kvstore.composition import Chain, Composition, Placement, Text
from kvstore.local import LocalStore
from kvstore.policies.overflow import Window
from kvstore.tensors.carrier import Carrier
from kvstore.tensors.rope import Turn
from kvstore.tensors.runs import Target
from kvstore.tensors.transfer import transfer

# -- elsewhere --------------------------------------------------------------------------------------------------------


def turned_by(turn: Turn, keys: torch.Tensor) -> torch.Tensor:
    """Keys [heads, tokens, dim], by the kernel."""
    made, runs = torch.empty_like(keys), np.array([[keys.data_ptr()] * 2 + [keys.shape[1], 0, keys.shape[1], 0, 0]])
    transfer(runs, turn, Target(made, torch.empty_like(keys)))
    return made


def pieces(reuse: Reuse, hit: Any, first: int, count: int) -> torch.Tensor:
    """Turned keys of some columns, of all layers one behind the other."""
    specs = reuse._joined.attached.specs
    made = [spec.exchanged(*held(hit, slot))[0][0, :, first : first + count] for slot, spec in enumerate(specs)]
    return torch.cat([keys.flatten() for keys in made])


@pytest.mark.parametrize(("start", "position"), [(0, 5), (0, 400), (BLOCK + 3, 0), (BLOCK, 5)])
@pytest.mark.parametrize("family", [family for family in KNOWN if family not in ("mistral", "gemma3")])
def test_elsewhere_they_are_turned_by_the_difference(
    family: str, start: int, position: int, store: LocalStore, seed: int
) -> None:
    """Beside what the adapter itself would have stored of the same prompt; up and down."""
    model, reuse = attach(family, store)
    module = prompt(WHOLE + TAIL, seed)
    chain = Chain.of(module[0].tolist())
    count, head = len(chain) - start, [Text(Chain.of(prompt(5, seed + 1)[0].tolist()).token_ids, 0)]
    head, column = (head, 5) if position == 5 else ([], 0)
    question = Text(Chain.of(QUESTION).token_ids, position + count)
    asked = Composition((*head, Placement(chain, start, len(chain), position), question))
    stores(reuse, module)
    hit = reuse.load(asked)
    assert (hit.cached_tokens, hit.writers, hit.exact) == (count, (ENGINE,), False)
    with kvstore.open(host="16MiB") as other:
        twin = Reuse(model, other, block_tokens=BLOCK)
        twin.encode(segments=[module[0].tolist()])
        expected = twin.load(asked)
        logits, wanted = read(model, hit), read(model, expected)
        close(logits, wanted)
        got, right = (pieces(reuse, each, column, count) for each in (hit, expected))
    torch.testing.assert_close(got, right, atol=1e-5, rtol=1e-5)
    as_stored = torch.cat([
        spec.exchanged(*pair)[0][0, :, start:].flatten()
        for spec, pair in zip(reuse._joined.attached.specs, seen(model, module), strict=True)
    ])  # fmt: skip
    assert (as_stored - right).abs().max() > 0.1 and not torch.equal(got, as_stored)


def test_elsewhere_by_way_of_the_device(seed: int) -> None:
    streams = Carrier(torch.device("cpu"))
    with kvstore.open(host="64MiB", device="64MiB", device_name="cpu") as store:
        model, reuse = attach("llama", store)
        module = prompt(WHOLE + TAIL, seed)
        stores(reuse, module)
        chain = Chain.of(module[0].tolist())
        asked = Composition((Placement(chain, 3, len(chain), 0), Text(Chain.of(QUESTION).token_ids, len(chain) - 3)))
        expected = read(model, reuse.load(asked))
        reuse._joined.carrier = streams
        for tier in ("host", "device"):
            hit = reuse.load(asked)
            assert hit.cached_by_tier[tier] == hit.cached_tokens == len(chain) - 3
            assert torch.equal(read(model, hit), expected)
    streams.close()


@pytest.mark.parametrize("family", ["llama", "yarn", "llama3", "phi3", "fusedkv", "deepseek_v2"])
@pytest.mark.parametrize("dtype", [*DTYPES, "float16"])
def test_the_difference_is_as_exact_far_away(family: str, dtype: str, store: LocalStore, seed: int) -> None:
    """The quotient of the model's own tables, whatever they are scaled by, and however they are rounded."""
    kind = {**DTYPES, "float16": torch.float16}[dtype]
    reuse = Reuse(build(family, "float32").to(kind), store, block_tokens=BLOCK)
    spec, rotation = reuse._joined.attached.specs[0], reuse._joined.attached.rotations[0]
    assert rotation.form is not None
    keys = torch.randn((spec.heads, 24, spec.key_dim), generator=torch.Generator().manual_seed(seed)).to(kind)
    for stored, position in ((0, 1), (0, 30_000), (30_000, 5), (90_001, 100_000)):
        turned, wanted = (rotation.rotate(keys[None], at)[0] for at in (stored, position))
        turn = rotation.form.between(stored, position, 24, keys)
        got = turned_by(turn, turned)
        limit = 8 * torch.finfo(kind).eps * float(wanted.float().abs().max())
        assert float((got.float() - wanted.float()).abs().max()) < limit
        assert float((turned.float() - wanted.float()).abs().max()) > limit


# -- where they cannot be used ----------------------------------------------------------------------------------------


def test_a_model_whose_rotation_no_kernel_knows_computes_them(store: LocalStore, seed: int) -> None:
    model, reuse = attach(UNKNOWN, store)
    assert not reuse._joined.attached.turnable
    ids = prompt(WHOLE, seed)
    stores(reuse, ids[:, :BLOCK], form="pre")  # would be wrong, but is not looked at here
    stores(reuse, ids)
    assert forms(reuse, ids) == ["pre", "rotated", "rotated"]
    hit = reuse.load(ids)
    assert (hit.cached_tokens, hit.miss.kind, hit.miss.position) == (BLOCK, "rotated", BLOCK)
    module = prompt(WHOLE, seed + 1)
    stores(reuse, module)
    chain = Chain.of(module[0].tolist())
    asked = Composition((Placement(chain, 0, WHOLE, 0), Text(Chain.of(QUESTION).token_ids, WHOLE)))
    hit = reuse.load(asked)
    assert (hit.cached_tokens, hit.writers) == (0, ())
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([asked.token_ids])).logits[0]
    close(read(model, hit), wanted)


def test_a_blend_of_them_is_made_again_every_time(store: LocalStore, seed: int) -> None:
    """Its own chain would need what there is no way back to."""
    model, reuse = attach("llama", store)
    module, other = prompt(WHOLE + TAIL, seed), prompt(WHOLE, seed + 1)
    stores(reuse, module)
    reuse.encode(segments=[other[0].tolist()])
    chains = [Chain.of(ids[0].tolist()) for ids in (module, other)]
    places = Placement(chains[1], 0, WHOLE, 0), Placement(chains[0], 0, len(chains[0]), WHOLE)
    asked = Composition((*places, Text(Chain.of(QUESTION).token_ids, WHOLE + len(chains[0]))))
    with kvstore.open(host="16MiB") as elsewhere:
        twin = Reuse(model, elsewhere, block_tokens=BLOCK)
        twin.encode(segments=[module[0].tolist(), other[0].tolist()])
        wanted = read(model, twin.load(asked, mode="blend", recompute=0.3))
    computed = -(-3 * (WHOLE + TAIL) // 10)
    for left in (len(QUESTION), 1):  # the question is stored behind it, and found again
        hit = reuse.load(asked, mode="blend", recompute=0.3)
        assert hit.cached_tokens == len(asked) - computed - left
        close(read(model, hit)[-1], wanted[-1])
        reuse.save([asked.token_ids], hit.cache)


def test_a_window_needs_what_they_were_before(store: LocalStore, seed: int) -> None:
    model, reuse = attach("llama", store)
    ids = prompt(WHOLE, seed)
    stores(reuse, ids)
    policy = Window(64, sinks=4, step=8)
    hit = reuse.load(ids, overflow=policy)
    assert (hit.cached_tokens, hit.writers) == (0, ())
    out = reuse.generate(ids, overflow=policy, max_new_tokens=4, do_sample=False)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert torch.equal(out, expected)


# -- what is recorded behind them -------------------------------------------------------------------------------------


def test_what_is_cropped_into_them_is_not_recorded(store: LocalStore, seed: int) -> None:
    model, reuse = attach("llama", store)
    ids = prompt(WHOLE, seed)
    stores(reuse, ids)
    longer = torch.cat((ids, prompt(SECOND, seed + 1)), 1)
    hit = reuse.load(longer)
    hit.cache.crop(-9)
    more = prompt(SECOND, seed + 2)
    cropped = torch.cat((ids[:, : WHOLE - 9], more), 1)
    with torch.no_grad():
        logits = model(input_ids=more, past_key_values=hit.cache).logits
    memory = memory_of(model, ids)
    memory.crop(-9)
    assert torch.equal(logits, go_on(model, memory, more, 1)[0])
    assert "rotated" in hit.cache.recorder.rows[0].ended
    reuse.save(cropped, hit.cache)
    assert forms(reuse, cropped) == ["rotated"] * 3 and reuse.match(cropped).tokens == WHOLE - 9


def test_a_tail_that_another_engine_has_stored_meanwhile_is_not_gone_on_from(store: LocalStore, seed: int) -> None:
    model, reuse = attach("llama", store)
    ids = prompt(WHOLE, seed)
    hit = reuse.load(ids[:, :40])
    with torch.no_grad():
        model(**hit.forward_inputs)
    stores(reuse, ids)
    saved = reuse.save(ids[:, :40], hit.cache)
    assert (saved.tokens, saved.new_tokens) == (40, 0)  # all is stored, as the other engine has it
    more = prompt(SECOND, seed + 1)
    with torch.no_grad():
        model(input_ids=more, past_key_values=hit.cache)
    assert "rotated" in hit.cache.recorder.rows[0].ended
    said = torch.cat((ids[:, :40], more), 1)
    assert reuse.save(said, hit.cache).tokens == 40
    assert reuse.match(said).tokens == 40 and forms(reuse, said) == ["rotated"] * 3


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_rows_of_a_batch(family: str, store: LocalStore, seed: int) -> None:
    """Where all rows are cut at one column, that may be inside of a block: of that row alone nothing more is stored."""
    model, reuse = attach(family, store)
    first, second = prompt(WHOLE + 9, seed), prompt(WHOLE + 9, seed + 1)
    stores(reuse, first[:, :WHOLE])
    hit = reuse.load(second[:, :35])
    with torch.no_grad():
        model(**hit.forward_inputs)
    reuse.save(second[:, :35], hit.cache)
    batch = torch.cat((first, second))
    hit = reuse.load(batch)
    assert hit.cached_tokens == ([WHOLE, 35] if family == "llama" else [35, 35])
    assert hit.writers == (ENGINE, WRITER)
    with torch.no_grad():
        model(**hit.forward_inputs)
    reuse.save(hit.plan.ids, hit.cache)
    stored = [reuse.load(torch.cat((row[None], first[:, :1]), 1)).cached_tokens for row in batch]
    assert stored == ([WHOLE + 9] * 2 if family == "llama" else [WHOLE, WHOLE + 9])
    for row in batch:
        cached, logits, tokens = second_turn(model, reuse, row[None], seed)
        expected = go_on(model, memory_of(model, row[None]), prompt(SECOND, seed + 1))
        close(logits[:, -1], expected[0][:, -1])
        assert cached >= WHOLE and torch.equal(tokens, expected[1])
