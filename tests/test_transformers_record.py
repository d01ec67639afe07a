"""What is recorded is what the model read with this cache, and nothing else is saved."""

import pytest
import torch
from hf_models import prompt
from hf_runs import attach

from kvstore import BadInput
from kvstore.local import LocalStore

FAMILIES = ["llama", "gemma3", "deepseek_v2", "deepseek_v3", "fusedkv"]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_cache_over_several_turns_is_saved_each_time(store: LocalStore, family: str, seed: int) -> None:
    model, reuse = attach(family, store)
    history = prompt(20, seed)
    hit = reuse.load(history)
    with torch.no_grad():
        model(**hit.forward_inputs)
        for turn in range(4):
            saved = reuse.save(history, hit.cache)
            assert saved.tokens == history.shape[1]
            assert reuse.save(history, hit.cache).new_tokens == 0  # again is no error
            new = prompt(9 + turn, seed + turn)
            model(input_ids=new, past_key_values=hit.cache, use_cache=True)
            history = torch.cat((history, new), 1)
        again = reuse.load(history)
        assert again.cached_tokens == saved.tokens
        got, expected = model(**again.forward_inputs).logits, model(history).logits[:, saved.tokens :]
    assert torch.allclose(got, expected, atol=1e-3)


def test_gradients_and_inference_mode_record_the_same(store: LocalStore, seed: int) -> None:
    model, reuse = attach("llama", store)
    ids, more = prompt(30, seed), prompt(6, seed + 1)
    hit = reuse.load(ids)
    model(**hit.forward_inputs).logits.sum().backward()
    with torch.inference_mode():
        model(input_ids=more, past_key_values=hit.cache, use_cache=True)
        saved = reuse.save(torch.cat((ids, more), 1), hit.cache)
        assert saved.tokens == 36
        hit = reuse.load(torch.cat((ids, more, more), 1))
        model(**hit.forward_inputs)
    hit = reuse.load(torch.cat((ids, more, more), 1))
    assert hit.cached_tokens == 36
    logits = model(**hit.forward_inputs).logits
    assert torch.allclose(logits, model(torch.cat((ids, more, more), 1)).logits[:, 36:], atol=1e-3)


def test_wrong_ids_at_save_are_refused_and_nothing_is_stored(store: LocalStore, seed: int) -> None:
    model, reuse = attach("llama", store)
    ids = prompt(40, seed)
    hit = reuse.load(ids)
    out = model.generate(**hit.inputs, max_new_tokens=8, do_sample=False)
    for place in (0, 25, 44):
        wrong = out.clone()
        wrong[0, place] = wrong[0, place] % 200 + 1
        with pytest.raises(BadInput, match=f"differs at token {place}"):
            reuse.save(wrong, hit.cache)
    with pytest.raises(BadInput, match="rows"):
        reuse.save([], hit.cache)
    with pytest.raises(BadInput, match="tenant"):
        reuse.save(out, hit.cache, tenant="someone else")
    assert store.stats()["tiers"]["host"]["blocks"] == 0
    # The right ones are still taken, shorter ones too.
    assert reuse.save(out[:, :44], hit.cache).tokens == 44
    assert reuse.load(out).cached_tokens == 44


def test_ids_that_passed_unseen_end_the_recording(store: LocalStore, seed: int) -> None:
    model, reuse = attach("llama", store)
    ids = prompt(20, seed)
    embeddings = model.get_input_embeddings()(prompt(4, seed + 1))
    hit = reuse.load(ids)
    with torch.no_grad():
        model(**hit.forward_inputs)
        model(inputs_embeds=embeddings, past_key_values=hit.cache, use_cache=True)
        model(input_ids=ids[:, :3], past_key_values=hit.cache, use_cache=True)
    assert "token ids" in hit.cache.recorder.rows[0].ended
    assert reuse.save(ids, hit.cache).tokens == 20


def test_positions_and_masks_of_the_callers_own_are_not_stored(store: LocalStore, seed: int) -> None:
    model, reuse = attach("llama", store)
    ids = prompt(20, seed)
    for change in (
        {"position_ids": torch.arange(5, 25)[None]},
        {"attention_mask": torch.ones(1, 20).index_fill(1, torch.tensor([3]), 0)},
        {"attention_mask": torch.zeros(1, 1, 20, 20)},
    ):
        hit = reuse.load(ids)
        with torch.no_grad():
            model(**{**hit.forward_inputs, **change})
        assert reuse.save(ids, hit.cache).tokens == 0
    hit = reuse.load(ids)
    with torch.no_grad():
        model(**hit.forward_inputs)
    assert reuse.save(ids, hit.cache).tokens == 20  # and without the change they are
