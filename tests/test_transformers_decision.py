"""Load or recompute, with a real model: what is cut is computed again to the bit, and what was measured decides."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gates import MIB, fetches_are_over, gated, only_on_disk
from hf_models import build, prompt
from hf_runs import BLOCK, go_on, in_memory, leases_left

from kvstore import BadInput
from kvstore.adapters.transformers import Reuse, choice
from kvstore.local import LocalStore
from kvstore.policies.cost import ENOUGH

STORED, MORE = 70, 9
LAYERS = 3


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    with gated(tmp_path / "cache", host=16 * MIB) as (opened, _):
        yield opened
        fetches_are_over(opened)
        assert leases_left(opened) == 0
        assert opened.stats()["drafts"] == 0


def joined(store: LocalStore, family: str = "llama", **options: Any) -> tuple[Any, Any]:
    """A model and its reuse, which has seen no forward pass yet."""
    model = build(family)
    return model, Reuse(model, store, block_tokens=BLOCK, **options)


def know_model(reuse: Any, base: float = 1e-3, token: float = 1e-4) -> None:
    """As if passes had taken so long; those of the tests themselves take as long, about."""
    for _ in range(8):
        for new in (1, 10, 40, 100, 1000):
            for cached in (0, 50):
                reuse._pace._costs.prefill.took(1, new, cached, base + token * new)


def know_disk(store: LocalStore, rate: float, kind: Any = "read") -> None:
    """As if the disk had moved so many bytes a second."""
    for size in (ENOUGH, ENOUGH // 100, ENOUGH // 10_000) * 8:
        store._mover.rates._speeds[kind].moved(size, size / rate)


def stored(store: LocalStore, model: Any, reuse: Any, seed: int, tokens: int = STORED) -> torch.Tensor:
    """A prompt that is only on disk."""
    ids = prompt(tokens, seed)
    hit = reuse.load(ids)
    with torch.no_grad():
        model(**hit.forward_inputs)
    assert reuse.save(ids, hit.cache).wait().tokens == tokens
    del hit
    only_on_disk(store)
    return ids


def asked(model: Any, reuse: Any, ids: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor, Any, torch.Tensor]:
    """(the longer prompt, its new tokens, the hit, the logits that it gives)."""
    more = prompt(MORE, seed + 1)
    whole = torch.cat((ids, more), 1)
    hit = reuse.load(whole)
    with torch.no_grad():
        return whole, more, hit, model(**hit.forward_inputs).logits


# -- nothing is loaded ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek_v3", "fusedkv"])
def test_what_would_come_too_slowly_is_computed_again(store: LocalStore, family: str, seed: int) -> None:
    model, reuse = joined(store, family)
    ids = stored(store, model, reuse, seed)
    know_model(reuse)
    know_disk(store, 10_000)
    whole, _, hit, logits = asked(model, reuse, ids, seed)
    assert (hit.cached_tokens, hit.cached_by_tier) == (0, {"device": 0, "host": 0, "disk": 0, "remote": 0})
    assert (hit.miss.kind, hit.miss.position) == ("recompute", 0)
    assert str(hit.miss) == f"from token 0 on, recomputing {STORED} tokens is quicker than loading them"
    decision = hit.decision
    assert (decision.matched, decision.loaded) == (STORED, 0)
    assert decision.first_token_seconds == decision.all_computed_seconds < 0.1 < 1 < decision.all_loaded_seconds
    assert decision.figures["disk_bytes_per_second"] == pytest.approx(10_000, rel=0.1)
    assert f"0 of {STORED} tokens are loaded" in str(decision)
    with torch.no_grad():
        assert torch.equal(logits, model(input_ids=whole, attention_mask=torch.ones_like(whole)).logits)


def test_what_was_computed_again_is_in_memory_from_then_on(store: LocalStore, seed: int) -> None:
    model, reuse = joined(store)
    ids = stored(store, model, reuse, seed)
    know_model(reuse)
    know_disk(store, 10_000)
    before = store.stats()
    whole, more, hit, _ = asked(model, reuse, ids, seed)
    saved = reuse.save(whole, hit.cache)
    tail = STORED % BLOCK
    assert (saved.tokens, saved.new_tokens) == (STORED + MORE, tail + MORE)  # the last block is stored with its tail
    assert saved.wait().tokens == STORED + MORE
    after = store.stats()
    written = [stats["counters"]["disk_written_blocks"] for stats in (before, after)]
    assert written[1] - written[0] == 1  # and no block that was on disk
    assert after["counters"]["host_adopted_blocks"] == STORED // BLOCK
    assert after["tiers"]["host"]["blocks"] == STORED // BLOCK + 1
    del hit
    again = reuse.load(torch.cat((whole, more), 1))
    assert again.cached_by_tier == {"device": 0, "host": STORED + MORE, "disk": 0, "remote": 0}
    with torch.no_grad():
        assert torch.equal(model(**again.forward_inputs).logits, in_memory(model, whole, more))


# -- some is loaded ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "neox"])
def test_some_is_loaded_and_the_rest_computed_beside_it(store: LocalStore, family: str, seed: int) -> None:
    model, reuse = joined(store, family)
    ids = stored(store, model, reuse, seed)
    store._mover.rates.part_bytes = 1  # so that layers come one by one
    know_model(reuse, base=1e-3, token=0.05)
    know_disk(store, reuse.layout.slot_bytes(BLOCK) / BLOCK / 0.05)  # a block takes as long to read as to compute
    whole, more, hit, logits = asked(model, reuse, ids, seed)
    kept = hit.cached_tokens
    assert 0 < kept < STORED and kept % BLOCK == 0
    assert hit.cached_by_tier == {"device": 0, "host": 0, "disk": kept, "remote": 0}
    assert (hit.miss.kind, hit.miss.position) == ("recompute", kept)
    assert hit.decision.loaded == kept
    spared = hit.decision.all_computed_seconds - hit.decision.first_token_seconds
    assert store.stats()["counters"]["saved_prefill_seconds"] == pytest.approx(spared) and spared > 0
    with torch.no_grad():
        assert torch.equal(logits, in_memory(model, whole[:, :kept], whole[:, kept:]))
    saved = reuse.save(whole, hit.cache)
    assert (saved.tokens, saved.new_tokens) == (STORED + MORE, STORED % BLOCK + MORE)
    del hit
    know_disk(store, 10**9)
    full = reuse.load(torch.cat((whole, more), 1))
    assert full.cached_tokens == STORED + MORE
    with torch.no_grad():
        logits = model(**full.forward_inputs).logits
    # Two pieces computed the prompt, as one did in memory: the low bits may differ.
    assert torch.allclose(logits, in_memory(model, whole, more), atol=1e-3)


def test_rows_of_a_batch_are_cut_together(store: LocalStore, seed: int) -> None:
    model, reuse = joined(store)
    first = stored(store, model, reuse, seed)[0].tolist()
    second = stored(store, model, reuse, seed + 1, 40)[0].tolist()
    rows = [[*first, 1, 2, 3], [*second, 4, 5]]
    expected = model.generate(**padded(rows), max_new_tokens=6, do_sample=False)[:, -6:]
    loaded = reuse.load(rows)
    assert loaded.cached_tokens == [STORED, 40] and loaded.decision.matched == STORED + 40
    del loaded
    assert leases_left(store) == 0  # of layers that were on their way
    only_on_disk(store)
    know_model(reuse)
    know_disk(store, 10_000)
    hit = reuse.load(rows)
    assert hit.cached_tokens == [0, 0]
    assert [miss.kind for miss in hit.miss] == ["recompute", "recompute"]
    assert (hit.decision.cuts, hit.decision.loaded) == ((0, 0), 0)
    assert torch.equal(model.generate(**hit.inputs, max_new_tokens=6, do_sample=False)[:, -6:], expected)


def padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Inputs of ``generate`` for a batch, padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


# -- everything is loaded ---------------------------------------------------------------------------------------------


def test_who_always_wants_what_is_cached_gets_it(store: LocalStore, seed: int) -> None:
    model, reuse = joined(store, decide="always")
    ids = stored(store, model, reuse, seed)
    know_model(reuse)
    know_disk(store, 10_000)
    _, more, hit, logits = asked(model, reuse, ids, seed)
    assert (hit.cached_tokens, hit.decision, hit.miss.kind) == (STORED, None, "parts")
    assert torch.equal(logits, in_memory(model, ids, more))
    with pytest.raises(BadInput, match="decide='never' is not known; choose 'measured' or 'always'"):
        Reuse(model, store, decide="never")


def test_without_measurements_everything_is_loaded(store: LocalStore, seed: int) -> None:
    model, reuse = joined(store)
    assert not reuse._pace._costs.prefill.known  # the attach test is no measurement
    fresh = reuse.load(prompt(STORED, seed))
    assert fresh.decision is None  # nothing matched
    del fresh
    ids = stored(store, model, reuse, seed)
    know_disk(store, 10_000)
    _, _, hit, _ = asked(model, reuse, ids, seed)
    assert hit.cached_tokens == STORED and "how quickly the model reads" in str(hit.decision)
    del hit
    store._mover.rates._speeds["read"] = type(store._mover.rates._speeds["read"])()
    only_on_disk(store)
    know_model(reuse)
    _, _, hit, _ = asked(model, reuse, ids, seed)
    assert hit.cached_tokens == STORED and "how quick the disk is" in str(hit.decision)
    del hit
    only_on_disk(store)
    know_disk(store, 10_000, "write")  # which is how it reads, for all that is known
    _, _, hit, _ = asked(model, reuse, ids, seed)
    assert hit.cached_tokens == 0


def test_where_a_moment_is_all_that_can_be_won_everything_is_loaded(store: LocalStore, seed: int) -> None:
    model, reuse = joined(store)
    ids = stored(store, model, reuse, seed)
    know_model(reuse, base=1e-5, token=1e-6)
    know_disk(store, 20_000_000)
    _, more, hit, logits = asked(model, reuse, ids, seed)
    assert hit.decision.all_computed_seconds < hit.decision.all_loaded_seconds
    assert hit.cached_tokens == STORED
    assert torch.equal(logits, in_memory(model, ids, more))


# -- a disk that is not what it was -----------------------------------------------------------------------------------


def test_a_load_whose_first_layer_is_late_is_given_up(
    store: LocalStore, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, reuse = joined(store)
    ids = stored(store, model, reuse, seed)
    store._mover.rates.part_bytes = 1
    know_model(reuse)
    know_disk(store, 10**9)
    times = iter([0.0, 5.0])  # the decision, and the first layer

    class Clock:
        @staticmethod
        def perf_counter() -> float:
            return next(times)

    monkeypatch.setattr(choice, "time", Clock)
    whole, _, hit, logits = asked(model, reuse, ids, seed)
    assert hit.decision.loaded == STORED and 0 < hit.decision.opening < 1
    assert (hit.cached_tokens, hit.miss.kind) == (0, "recompute")
    assert str(hit.miss) == f"loading took longer than expected, and recomputing all {STORED} tokens is quicker"
    with torch.no_grad():
        assert torch.equal(logits, model(input_ids=whole, attention_mask=torch.ones_like(whole)).logits)
    assert reuse._pace._costs.load_correction > 1.2
    saved = reuse.save(whole, hit.cache)
    assert saved.tokens == STORED + MORE


def test_a_load_is_not_waited_for_longer_than_computing_takes(store: LocalStore, seed: int) -> None:
    model, reuse = joined(store)
    ids = stored(store, model, reuse, seed)
    know_model(reuse)
    know_disk(store, 10**9)
    _, _, hit, _ = asked(model, reuse, ids, seed)
    loaded = hit.cache.loaded
    assert choice.GRACE < loaded._patience < choice.GRACE + 1 < reuse._patience
    del hit, loaded
    only_on_disk(store)
    model, reuse = joined(store, patience=0.5)
    know_model(reuse, base=1e-3, token=1.0)  # minutes to compute, so that a load of a second would be worth it
    know_disk(store, 100_000)  # 16 KiB for a block
    _, _, hit, _ = asked(model, reuse, ids, seed)
    assert hit.decision.load_seconds <= choice.TAKEN * 0.5 < 0.8  # but it would be given up
    assert 0 < hit.cached_tokens < STORED


def test_passes_and_loads_are_measured(store: LocalStore, seed: int) -> None:
    model, reuse = joined(store)
    for number in range(3):
        hit = reuse.load(prompt(30 + number, seed + number))
        with torch.no_grad():
            model(**hit.forward_inputs)
            go_on(model, hit.cache, prompt(1, seed), 2)  # only the first pass counts
        del hit
    costs = reuse._pace._costs
    assert costs.prefill.known and costs.prefill._fit._count == 3
    ids = stored(store, model, reuse, seed)
    know_model(reuse, token=0.1)
    seen = costs.prefill._fit._count
    know_disk(store, 10**5)
    _, _, hit, _ = asked(model, reuse, ids, seed)
    assert costs.prefill._fit._count == seen + 1
    assert hit.cached_tokens == STORED and hit.decision.disk_seconds > 0.5
    assert costs.load_correction < 1  # it was quicker than was said
    assert costs.host._bytes == STORED * reuse.layout.token_payload
