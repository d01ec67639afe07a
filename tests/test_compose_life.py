"""What becomes of a composed prompt: generation, failures, pins, and what cannot be done with it."""

import copy
from collections.abc import Iterator

import pytest
import torch
from composed import (
    FIRST,
    HEAD,
    MIDDLE,
    MODULES,
    PARTS,
    QUESTION,
    SECOND,
    THIRD,
    close,
    composition,
    joined,
    masked,
    read,
    tokens,
)
from hf_models import build
from hf_runs import leases_left
from staged import staging_of
from test_transformers_faults import LateStore

import kvstore
from kvstore.adapters.transformers import Reuse
from kvstore.composition import Chain, Composition, Placement, Text
from kvstore.errors import BadInput, Unsupported
from kvstore.local import LocalStore
from kvstore.tensors.carrier import Carrier


@pytest.fixture
def store() -> Iterator[LocalStore]:
    with kvstore.open(host="64MiB") as store:
        yield store
        assert leases_left(store) == 0


@pytest.mark.parametrize("family", ["llama", "gemma3", "fusedkv"])
def test_generation_goes_on_as_a_loop_would(family: str, store: LocalStore) -> None:
    model = build(family)
    reuse, _ = joined(model, store)
    prompt, _ = composition(PARTS)
    out = reuse.generate(prompt, max_new_tokens=12, do_sample=False)
    assert out[0, : len(prompt)].tolist() == prompt.token_ids
    hit = reuse.load(prompt, tenant="other")
    assert hit.cached_tokens == 0
    hit = reuse.load(prompt)
    said, current = [], read(model, hit)[-1:].argmax(-1)
    for _ in range(12):
        said.append(int(current))
        with torch.no_grad():
            current = model(input_ids=current[None], past_key_values=hit.cache).logits[0, -1:].argmax(-1)
    assert out[0, len(prompt) :].tolist() == said
    both = reuse.generate(prompt, max_new_tokens=5, num_beams=2, num_return_sequences=2, do_sample=False)
    assert both.shape == (2, len(prompt) + 5)
    segments = [FIRST, SECOND, THIRD, [*QUESTION, *out[0, len(prompt) :].tolist(), *MIDDLE]]
    assert reuse.generate(segments=segments, max_new_tokens=3).shape == (1, sum(map(len, segments)) + 3)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_layer_that_is_late_is_computed_and_nothing_is_stored(family: str, layer: int, store: LocalStore) -> None:
    model, late = build(family), LateStore(store)
    reuse, _ = joined(model, late)  # type: ignore[arg-type]
    prompt, _ = composition(PARTS)
    late.layer = layer
    reuse._joined.patience = 0.01
    hit = reuse.load(prompt)
    assert torch.isfinite(read(model, hit)).all()
    assert hit.cache.loaded.recomputed > 0
    late.layer = None
    reuse.save([prompt.token_ids], hit.cache)
    assert reuse.load(prompt).cached_tokens == sum(map(len, MODULES))  # no text was kept


def test_by_way_of_the_device() -> None:
    model = build("llama")
    streams = Carrier(torch.device("cpu"))
    with kvstore.open(host="64MiB", device="64MiB", device_name="cpu") as store:
        reuse, windows = joined(model, store)
        reuse._joined.carrier = streams
        prompt, owners = composition(PARTS)
        wanted = masked(model, prompt, owners, windows)
        for tier in ("host", "device"):
            hit = reuse.load(prompt)
            assert hit.cached_by_tier[tier] == sum(map(len, MODULES))
            close(read(model, hit), wanted[[place for place, owner in enumerate(owners) if not owner]])
        blended = reuse.load(prompt, mode="blend", recompute=0.3)
        read(model, blended)
    streams.close()


def test_after_its_weights_changed_a_model_reuses_and_stores_nothing(store: LocalStore) -> None:
    model = build("llama")
    reuse, _ = joined(model, store)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    prompt, _ = composition(PARTS)
    hit = reuse.load(prompt)
    assert hit.cached_tokens == 0
    with torch.no_grad():
        close(read(model, hit)[-1], model(input_ids=torch.tensor([prompt.token_ids])).logits[0, -1])
    assert reuse.save([prompt.token_ids], hit.cache).refused
    with pytest.raises(Unsupported, match="refresh"):
        reuse.encode(segments=[FIRST])


def test_a_module_of_which_an_end_is_missing_is_computed_where_it_stands(store: LocalStore) -> None:
    """Used as far as it goes, what follows would be found no more as soon as another module begins like it."""
    model = build("llama")
    reuse = Reuse(model, store, block_tokens=16)
    reuse.encode(segments=[FIRST[:32]])
    prompt, owners = composition([(0, HEAD), (1, FIRST), (0, QUESTION)])
    hit = reuse.load(prompt)
    assert (hit.cached_tokens, hit.exact) == (0, True)
    close(read(model, hit)[-1], masked(model, prompt, [0] * len(owners), [None])[-1])
    reuse.save([prompt.token_ids], hit.cache)
    reuse.encode(segments=[FIRST])
    again = reuse.load(prompt)
    assert (again.cached_tokens, again.exact) == (len(prompt) - 1, True)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_scattered_prompt_is_whole_only_after_it_was_read(family: str, store: LocalStore) -> None:
    model = build(family)
    reuse, _ = joined(model, store)
    prompt, _ = composition(PARTS)
    hit = reuse.load(prompt)
    for early in (lambda: copy.deepcopy(hit.cache), lambda: list(hit.cache), lambda: hit.cache.crop(-1)):
        with pytest.raises(Unsupported, match="before the model has read it"):
            early()
    with pytest.raises(BadInput, match="in one forward pass"), torch.no_grad():
        inputs = {**hit.forward_inputs, "input_ids": hit.plan.ids[:, :11], "position_ids": hit.plan.positions[:, :11]}
        model(**inputs)
    hit = reuse.load(prompt)
    read(model, hit)
    plain = copy.deepcopy(hit.cache)
    more = {"input_ids": torch.tensor([MIDDLE]), "attention_mask": torch.ones(1, len(prompt) + len(MIDDLE))}
    with torch.no_grad():
        assert torch.equal(model(**more, past_key_values=plain).logits, model(**more, past_key_values=hit.cache).logits)


def test_a_part_of_a_chain_is_counted_without_what_shares_its_block(store: LocalStore) -> None:
    model = build("llama")
    reuse, _ = joined(model, store)
    parts = (Text(Chain.of(HEAD).token_ids, 0), Placement(Chain.of(FIRST), 21, 38, len(HEAD)))
    prompt = Composition((*parts, Text(Chain.of(QUESTION).token_ids, len(HEAD) + 17)))
    hit = reuse.load(prompt)
    assert hit.cached_tokens == hit.cached_by_tier["host"] == 17


def test_a_prompt_that_ends_with_a_module_leaves_its_last_token(store: LocalStore) -> None:
    model = build("llama")
    reuse, windows = joined(model, store)
    prompt, owners = composition([(0, HEAD), (1, FIRST)])
    hit = reuse.load(prompt)
    assert hit.cached_tokens == len(FIRST) - 1
    owners[-1] = 0
    close(read(model, hit)[-1], masked(model, prompt, owners, windows)[-1])


def test_what_memory_has_no_room_for_is_not_said_to_be_stored() -> None:
    with kvstore.open(host="1MiB") as store:
        reuse = Reuse(build("llama"), store, block_tokens=16)
        encoded = reuse.encode(segments=[FIRST, tokens(90, 3000)])
        assert (encoded.tokens, encoded.new_tokens, encoded.left_out) == (len(FIRST), len(FIRST), 3000)


def test_what_is_pinned_stays_until_it_is_released() -> None:
    model = build("llama")
    with kvstore.open(host="2MiB") as store:
        reuse = Reuse(model, store, block_tokens=16)
        pinned = reuse.encode(segments=[FIRST], pin="host")
        others = [tokens(100 + number, 160) for number in range(24)]
        reuse.encode(segments=others)
        prompt, _ = composition([(0, HEAD), (1, FIRST), (0, QUESTION)])
        assert reuse.load(prompt).cached_tokens == len(FIRST)
        pinned.release()
        reuse.encode(segments=[tokens(200 + number, 160) for number in range(24)])
        assert reuse.load(prompt).cached_tokens == 0


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_recorded_by_way_of_a_devices_buffers(family: str, store: LocalStore) -> None:
    """Texts that end inside the prompt, and the one that goes on, leave by a side stream; blends are not kept so."""
    model = build(family)
    reuse, _ = joined(model, store)
    staging = reuse._joined.staging = staging_of(reuse.layout, torch.float32, "cpu")
    prompt, _ = composition([(0, HEAD), (1, FIRST), (0, tokens(71, 50)), (2, SECOND), (0, QUESTION)])
    hit = reuse.load(prompt)
    first = read(model, hit)[-1]
    reuse.save([prompt.token_ids], hit.cache)
    again = reuse.load(prompt)
    assert again.cached_tokens == len(prompt) - 1
    close(read(model, again)[-1], first)
    found = []
    for _ in range(2):
        blended = reuse.load(prompt, mode="blend", recompute=0.3)
        found.append(blended.cached_tokens)
        read(model, blended)
        reuse.save([prompt.token_ids], blended.cache)
    # The text in front is exact and was stored before; the second time the other texts are there, too.
    assert found == [len(HEAD) + len(FIRST) + len(SECOND) - 22, len(prompt) - 1 - 22]
    del hit, again, blended
    staging.close()
