"""Every way of generating gives with reuse what it gives without, and saves what it read."""

from itertools import product
from typing import Any

import pytest
import torch
from hf_models import build, prompt
from hf_runs import attach, stored_prompt
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from kvstore.local import LocalStore

FAMILIES = ["llama", "gemma3"]
PAIRS = [(family, mode) for family in ("deepseek_v2", "fusedkv") for mode in ("chunked", "beam", "lookup")]
NEW = 24


def plain(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """What transformers gives without us."""
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    out: torch.Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return out


class Collecting(BaseStreamer):  # type: ignore[misc,unused-ignore]
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.reshape(-1).tolist()

    def end(self) -> None:
        self.ended = True


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "chunked": {"prefill_chunk_size": 7},
    "beam": {"num_beams": 3},
    "beams returned": {"num_beams": 4, "num_return_sequences": 2},
    "lookup": {"prompt_lookup_num_tokens": 4},
    "penalty": {"repetition_penalty": 1.3},
}


@pytest.mark.parametrize(("family", "mode"), [*product(FAMILIES, MODES), *PAIRS])
def test_modes_give_the_same_tokens(store: LocalStore, family: str, mode: str, seed: int) -> None:
    model, reuse = attach(family, store)
    first = stored_prompt(model, reuse, 45, seed)
    ids = torch.cat((first, prompt(19, seed + 1)), 1)
    expected = plain(model, ids, **MODES[mode])
    hit = reuse.load(ids)
    assert hit.cached_tokens == 45
    out = model.generate(**hit.inputs, max_new_tokens=NEW, do_sample=False, **MODES[mode])
    assert torch.equal(out, expected)
    saved = reuse.save(out, hit.cache)
    # Beams part after the prompt; everything else is read up to the token before the last.
    assert saved.tokens == (64 if "beam" in mode else out.shape[1] - 1)
    assert reuse.load(out[:1]).cached_tokens == min(saved.tokens, out.shape[1] - 1)
    again = reuse.generate(ids, max_new_tokens=NEW, do_sample=False, **MODES[mode])
    assert torch.equal(again, expected)


@pytest.mark.parametrize("sequences", [1, 3])
def test_sampling_draws_the_same_tokens(store: LocalStore, sequences: int, seed: int) -> None:
    model, reuse = attach("llama", store)
    first = stored_prompt(model, reuse, 30, seed)
    ids = torch.cat((first, prompt(9, seed + 1)), 1)
    options = {"do_sample": True, "temperature": 1.3, "num_return_sequences": sequences}
    torch.manual_seed(seed)
    expected = plain(model, ids, **options)
    hit = reuse.load(ids)
    torch.manual_seed(seed)
    out = model.generate(**hit.inputs, max_new_tokens=NEW, **options)
    assert torch.equal(out, expected)
    assert reuse.save(out, hit.cache).tokens == (39 if sequences > 1 else 39 + NEW - 1)


@pytest.mark.parametrize("family", [*FAMILIES, "deepseek_v3", "cla"])
def test_an_assistant_and_its_rejected_tokens(store: LocalStore, family: str, seed: int) -> None:
    model, reuse = attach(family, store)
    assistant = build(family, seed=0)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    first = stored_prompt(model, reuse, 30, seed)
    ids = torch.cat((first, prompt(9, seed + 1)), 1)
    expected = plain(model, ids)
    hit = reuse.load(ids)
    out = model.generate(**hit.inputs, max_new_tokens=NEW, do_sample=False, assistant_model=assistant)
    assert torch.equal(out, expected)
    saved = reuse.save(out, hit.cache)
    assert saved.tokens == out.shape[1] - 1
    more = torch.cat((out, prompt(5, seed + 2)), 1)
    hit = reuse.load(more)
    with torch.no_grad():
        logits = model(**hit.forward_inputs).logits
        assert torch.allclose(logits, model(more).logits[:, hit.cached_tokens :], atol=1e-3)


def test_a_streamer_sees_the_same(store: LocalStore, seed: int) -> None:
    model, reuse = attach("llama", store)
    ids = stored_prompt(model, reuse, 33, seed)
    mine, theirs = Collecting(), Collecting()
    reuse.generate(ids, max_new_tokens=NEW, do_sample=False, streamer=mine)
    plain(model, ids, streamer=theirs)
    assert mine.tokens == theirs.tokens
    assert mine.ended


def test_the_result_object_of_generate_works_as_well(store: LocalStore, seed: int) -> None:
    model, reuse = attach("llama", store)
    ids = prompt(40, seed)
    out = reuse.generate(ids, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_scores=True)
    expected = plain(model, ids)
    assert torch.equal(out.sequences, expected)
    assert len(out.scores) == NEW
    hit = reuse.load(expected)
    assert hit.cached_tokens == 40 + NEW - 1
    result = model.generate(**hit.inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert reuse.save(result, hit.cache).tokens == 40 + NEW + 3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_that_is_cached_whole_leaves_one_token(store: LocalStore, family: str, seed: int) -> None:
    model, reuse = attach(family, store)
    ids = stored_prompt(model, reuse, 48, seed)
    hit = reuse.load(ids)
    assert hit.cached_tokens == 47
    assert hit.forward_inputs["input_ids"].shape == (1, 1)
    out = model.generate(**hit.inputs, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(out, plain(model, ids))


@pytest.mark.parametrize("family", ["llama", "deepseek_v2", "fusedkv"])
def test_the_whole_prompt_given_again_is_read_once(store: LocalStore, family: str, seed: int) -> None:
    model, reuse = attach(family, store)
    ids = torch.cat((stored_prompt(model, reuse, 40, seed), prompt(7, seed + 1)), 1)
    with torch.no_grad():
        hit, again = reuse.load(ids), reuse.load(ids)
        expected = model(**hit.forward_inputs).logits
        assert torch.equal(model(**again.inputs, use_cache=True).logits, expected)
    assert again.cache.get_seq_length() == 47
    assert reuse.save(ids, again.cache).tokens == 47


CROPPED = [("llama", True), ("llama", False), ("gemma3", False)]
CROPPED += [(family, read) for family in ("deepseek_v2", "fusedkv") for read in (True, False)]


@pytest.mark.parametrize(("family", "read"), CROPPED)
def test_crop_before_and_after_the_layers_are_read(store: LocalStore, family: str, read: bool, seed: int) -> None:
    model, reuse = attach(family, store)
    ids = stored_prompt(model, reuse, 40, seed)
    hit = reuse.load(torch.cat((ids, prompt(3, seed + 1)), 1))
    with torch.no_grad():
        if read:
            model(**hit.forward_inputs)
            hit.cache.crop(-3)
        # Now into what was loaded, into the middle of a block and out of the block where recording began.
        for tokens in (2, 9, 11):
            hit.cache.crop(-tokens)
        assert hit.cache.get_seq_length() == 18
        other = torch.cat((ids[:, :18], prompt(12, seed + 2)), 1)
        got = model(input_ids=other[:, 18:], past_key_values=hit.cache, use_cache=True).logits
        assert torch.allclose(got, model(other).logits[:, 18:], atol=1e-3)
    saved = reuse.save(other, hit.cache)
    # What was read of the block that is cropped into is gone, so nothing can be recorded behind it.
    assert saved.tokens == (18 if read else 30)
    again = reuse.load(torch.cat((other, ids[:, :1]), 1))
    with torch.no_grad():
        logits = model(**again.forward_inputs).logits[:, -1]
        expected = model(torch.cat((other, ids[:, :1]), 1)).logits[:, -1]
    assert torch.allclose(logits, expected, atol=1e-3)


def test_a_plain_loop_over_several_turns(store: LocalStore, seed: int) -> None:
    model, reuse = attach("qwen3", store)
    history, memory, seen = prompt(20, seed), DynamicCache(config=model.config), 0
    with torch.no_grad():
        for turn in range(4):
            hit = reuse.load(history)
            assert hit.cached_tokens == seen
            logits = model(**hit.forward_inputs).logits
            rest = history[:, memory.get_seq_length() :]
            assert torch.equal(logits, model(input_ids=rest, past_key_values=memory, use_cache=True).logits)
            for _ in range(6):
                token = logits[:, -1:].argmax(-1)
                history = torch.cat((history, token), 1)
                logits = model(input_ids=token, past_key_values=hit.cache, use_cache=True).logits
                assert torch.equal(logits, model(input_ids=token, past_key_values=memory, use_cache=True).logits)
            seen = reuse.save(history, hit.cache).tokens
            assert seen == history.shape[1]
            history = torch.cat((history, prompt(11, seed + turn)), 1)
