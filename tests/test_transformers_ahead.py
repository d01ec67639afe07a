"""Layers that are brought ahead are the ones the model uses, and what goes wrong beside it never reaches the model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hf_models import prompt
from hf_runs import attach, go_on, in_memory, stored_prompt

from kvstore.adapters.transformers import joined
from kvstore.adapters.transformers.loaded import Loaded
from kvstore.local import LocalStore

LAYERS = 3
STORED, MORE = 70, 5


class AtOnce:
    """A worker that is always quicker than the model."""

    def run(self, work: Callable[[], None]) -> None:
        work()


@pytest.fixture
def hits(monkeypatch: pytest.MonkeyPatch) -> list[Loaded]:
    """What every load gives, in order; layers are brought at once when they are asked for."""
    made: list[Loaded] = []
    plain = Loaded.__init__

    def noted(self: Loaded, *args: Any, **kwargs: Any) -> None:
        made.append(self)
        plain(self, *args, **kwargs)

    monkeypatch.setattr(Loaded, "__init__", noted)
    monkeypatch.setattr(joined, "worker_for", lambda *_: AtOnce())
    return made


# -- what was prepared is used ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek_v3", "cla"])  # the second has sliding windows
def test_a_forward_pass_takes_what_was_brought(store: LocalStore, hits: list[Loaded], family: str, seed: int) -> None:
    model, reuse = attach(family, store)
    ids, more = stored_prompt(model, reuse, STORED, seed), prompt(MORE, seed + 1)
    hit = reuse.load(torch.cat((ids, more), 1))
    with torch.no_grad():
        assert torch.equal(model(**hit.forward_inputs).logits, in_memory(model, ids, more))
    assert hits[-1].brought_ahead == LAYERS


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_generate_takes_what_was_brought(store: LocalStore, hits: list[Loaded], family: str, seed: int) -> None:
    model, reuse = attach(family, store)
    ids = torch.cat((stored_prompt(model, reuse, STORED, seed), prompt(MORE, seed + 1)), 1)
    hit = reuse.load(ids)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(**hit.inputs, max_new_tokens=6, do_sample=False), expected)
    assert hits[-1].brought_ahead == LAYERS
    assert torch.equal(reuse.generate(ids, max_new_tokens=6, do_sample=False), expected)
    assert hits[-1].brought_ahead == LAYERS


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_padded_batch_takes_what_was_brought(store: LocalStore, hits: list[Loaded], family: str, seed: int) -> None:
    _, reuse = attach(family, store)
    rows = [prompt(length, seed + length)[0].tolist() for length in (40, 9, 25)]
    first = reuse.generate(rows, max_new_tokens=4, do_sample=False)
    assert hits[-1].brought_ahead == 0  # there was nothing
    assert torch.equal(reuse.generate(rows, max_new_tokens=4, do_sample=False), first)
    assert hits[-1].columns > 0 and hits[-1].brought_ahead == LAYERS


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_beams_cost_no_more_than_the_first_layer(store: LocalStore, hits: list[Loaded], family: str, seed: int) -> None:
    """Nobody can know before the forward pass that there are beams; from its first layer on it is known."""
    model, reuse = attach(family, store)
    ids = torch.cat((stored_prompt(model, reuse, STORED, seed), prompt(MORE, seed + 1)), 1)
    beams: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(reuse.generate(ids, **beams), model.generate(ids, **beams))
    assert hits[-1].brought_ahead == LAYERS - 1


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_prompt_in_pieces_costs_no_more_than_the_first_layer(
    store: LocalStore, hits: list[Loaded], family: str, seed: int
) -> None:
    model, reuse = attach(family, store)
    ids, more = stored_prompt(model, reuse, STORED, seed), prompt(MORE, seed + 1)
    hit = reuse.load(torch.cat((ids, more), 1))
    logits, _ = go_on(model, hit.cache, more[:, :2], 1)
    assert torch.allclose(logits, in_memory(model, ids, more)[:, :2], atol=1e-4)
    assert hits[-1].brought_ahead >= LAYERS - 1  # windows have no room for what is new


@pytest.mark.parametrize("change", ["crop to nothing", "reset"])
def test_a_cache_that_forgets_everything_brings_nothing_more(
    store: LocalStore, hits: list[Loaded], change: str, seed: int
) -> None:
    model, reuse = attach("llama", store)
    ids = torch.cat((stored_prompt(model, reuse, STORED, seed), prompt(MORE, seed + 1)), 1)
    hit = reuse.load(ids)
    if change == "reset":
        hit.cache.reset()
    else:
        hit.cache.crop(-STORED)
    assert store.stats()["leases"] == 0
    with torch.no_grad():
        got = model(input_ids=ids, past_key_values=hit.cache, use_cache=True).logits
        assert torch.allclose(got, model(ids).logits, atol=1e-4)
    assert hits[-1].timeline.spans()[-1].kind == "compute"
    assert sum(span.kind == "load" for span in hits[-1].timeline.spans()) == 1


# -- the figures that say how far ahead -------------------------------------------------------------------------------


def test_the_pace_is_measured(store: LocalStore, hits: list[Loaded], seed: int) -> None:
    model, reuse = attach("llama", store)
    ids = stored_prompt(model, reuse, STORED, seed)
    assert reuse._pace._prefill > 0 and reuse._pace._load == 0  # the first prompt loaded nothing
    hit = reuse.load(torch.cat((ids, prompt(MORE, seed + 1)), 1))
    with torch.no_grad():
        model(**hit.forward_inputs)
    spans = {kind: [s for s in hit.timeline if s.kind == kind] for kind in ("load", "compute")}
    assert [len(each) for each in spans.values()] == [LAYERS, LAYERS]
    loading = sum(span.end - span.begin for span in spans["load"])
    assert loading <= reuse._pace._load * STORED < loading + 0.5
    assert 1 <= reuse._pace.depth(STORED, MORE, LAYERS) <= LAYERS


def test_a_forward_pass_that_broke_off_says_nothing_of_the_pace(
    store: LocalStore, hits: list[Loaded], seed: int
) -> None:
    model, reuse = attach("llama", store)
    ids = stored_prompt(model, reuse, STORED, seed)
    before = reuse._pace._load, reuse._pace._prefill
    hit = reuse.load(torch.cat((ids, prompt(MORE, seed + 1)), 1))

    def fails(*_: Any) -> None:
        raise RuntimeError("the engine's own")

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fails)
    with torch.no_grad(), pytest.raises(RuntimeError, match="own"):
        model(**hit.forward_inputs)
    handle.remove()
    assert (reuse._pace._load, reuse._pace._prefill) == before


def test_the_pace_counts_the_tokens_that_were_read(store: LocalStore, hits: list[Loaded], seed: int) -> None:
    """A prompt that is read in pieces: the first one's time is the first one's."""
    model, reuse = attach("llama", store)
    counted: list[int] = []
    reuse._pace.computed = lambda _, work: counted.append(work.new)
    hit = reuse.load(prompt(40, seed))
    with torch.no_grad():
        model(input_ids=prompt(40, seed)[:, :8], past_key_values=hit.cache, use_cache=True)
    assert counted == [8]
