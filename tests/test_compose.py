"""Prompts put together from segments: what is served equals one masked forward pass over the whole prompt."""

from collections.abc import Iterator

import pytest
import torch
from composed import (
    FIRST,
    HEAD,
    MODULES,
    PARTS,
    QUESTION,
    SECOND,
    close,
    composition,
    joined,
    masked,
    read,
    tokens,
)
from devices import CUDA
from hf_models import FAMILIES, build
from hf_runs import leases_left
from transformers import DynamicCache

import kvstore
from kvstore.adapters.transformers import Reuse
from kvstore.composition import Chain, Composition, Placement, Text
from kvstore.errors import Unsupported
from kvstore.local import LocalStore
from kvstore.walk import chains_of


@pytest.fixture
def store() -> Iterator[LocalStore]:
    with kvstore.open(host="64MiB") as store:
        yield store
        assert leases_left(store) == 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_modules_equal_one_masked_forward_pass(family: str, attention: str, store: LocalStore) -> None:
    model = build(family, attention=attention)
    reuse, windows = joined(model, store)
    prompt, owners = composition(PARTS)
    wanted = masked(build(family), prompt, owners, windows)
    hit = reuse.load(prompt)
    assert (hit.cached_tokens, hit.exact) == (sum(map(len, MODULES)), False)
    assert sum(hit.cached_by_tier.values()) == hit.cached_tokens
    close(read(model, hit), wanted[[place for place, owner in enumerate(owners) if not owner]])
    # What was computed is found again, behind the same composition, and only the last token is left.
    assert reuse.save([prompt.token_ids], hit.cache).tokens == len(QUESTION)
    again = reuse.load(prompt)
    assert again.cached_tokens == len(prompt) - 1
    close(read(model, again)[-1], wanted[-1])


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"mistral", "gemma3"}))
def test_gaps_between_positions_are_kept(family: str, store: LocalStore) -> None:
    model = build(family)
    reuse, windows = joined(model, store)
    prompt, owners = composition(PARTS, gaps=[3, 11, 0, 60, 1, 25])
    wanted = masked(model, prompt, owners, windows)
    hit = reuse.load(prompt)
    close(read(model, hit), wanted[[place for place, owner in enumerate(owners) if not owner]])
    reuse.save([prompt.token_ids], hit.cache)
    # A turn goes on behind the last position, with the same cache or loaded again, without being told where.
    more = tokens(7, 6)
    longer = Composition((*prompt.parts, Text(Chain.of(more).token_ids, prompt.end)))
    wanted = masked(model, longer, [*owners, *[0] * len(more)], windows)[-len(more) :]
    with torch.no_grad():
        close(model(input_ids=torch.tensor([more]), past_key_values=hit.cache).logits[0], wanted)
    assert reuse.save([longer.token_ids], hit.cache).tokens == len(QUESTION) + len(more)
    later = reuse.load(longer)
    assert later.cached_tokens == len(longer) - 1
    close(read(model, later)[-1], wanted[-1])


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_gaps_are_refused_where_windows_count_tokens(family: str, store: LocalStore) -> None:
    reuse, _ = joined(build(family), store)
    with pytest.raises(Unsupported, match="sliding windows"):
        reuse.load(composition(PARTS, gaps=[0, 0, 0, 1, 0, 0])[0])


def test_exact_is_never_taken_for_modular_nor_the_other_way(store: LocalStore) -> None:
    model = build("llama")
    reuse, _ = joined(model, store)
    prompt, _ = composition([(1, FIRST), (2, SECOND), (0, QUESTION)])
    hit = reuse.load(prompt)
    read(model, hit)
    reuse.save([prompt.token_ids], hit.cache)
    # The first module is a prefix of the whole, computed from position 0: that much of it is exact.
    exact = reuse.load(prompt, mode="exact")
    assert (exact.cached_tokens, exact.exact) == (len(FIRST), True)
    assert reuse.load(torch.tensor([prompt.token_ids])).cached_tokens == len(FIRST)
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([prompt.token_ids])).logits[0, -1]
    close(read(model, exact)[-1], wanted)
    reuse.save([prompt.token_ids], exact.cache)
    # What is exact is preferred from now on, because it costs no more.
    after = reuse.load(prompt)
    assert (after.cached_tokens, after.exact) == (len(prompt) - 1, True)
    close(read(model, after)[-1], wanted)


def test_another_order_or_another_distance_is_another_composition(store: LocalStore) -> None:
    model = build("llama")
    reuse, _ = joined(model, store)
    prompt, _ = composition([(0, HEAD), (1, FIRST), (2, SECOND), (0, QUESTION)])
    hit = reuse.load(prompt)
    read(model, hit)
    reuse.save([prompt.token_ids], hit.cache)
    modules = len(FIRST) + len(SECOND)
    assert reuse.load(prompt).cached_tokens == len(prompt) - 1
    swapped, _ = composition([(0, HEAD), (2, SECOND), (1, FIRST), (0, QUESTION)])
    assert reuse.load(swapped).cached_tokens == len(HEAD) + modules
    apart, _ = composition([(0, HEAD), (1, FIRST), (2, SECOND), (0, QUESTION)], gaps=[0, 0, 0, 1])
    assert reuse.load(apart).cached_tokens == len(HEAD) + modules


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3", "fusedkv", "deepseek_v2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_encoded_together_comes_back_bit_for_bit(family: str, dtype: str, store: LocalStore) -> None:
    """A scaffold: runs with their gaps, computed in one pass; loaded whole it is what that pass left in its cache."""
    model = build(family, dtype)
    reuse = Reuse(model, store, block_tokens=16)
    gap = 0 if family == "gemma3" else 13
    texts = [Text(Chain.of(FIRST).token_ids, 0), Text(Chain.of(SECOND).token_ids, len(FIRST) + gap)]
    together = Composition(tuple(texts))
    assert reuse.encode(together).new_tokens == len(together)
    assert reuse.encode(together).new_tokens == 0
    memory = DynamicCache(config=model.config)
    with torch.no_grad():
        model(
            input_ids=torch.tensor([together.token_ids]),
            position_ids=torch.tensor([together.position_ids]),
            past_key_values=memory,
        )
        wanted = model(
            input_ids=torch.tensor([QUESTION]),
            position_ids=torch.arange(together.end, together.end + len(QUESTION))[None],
            past_key_values=memory,
        ).logits[0]
    placed = chains_of(together)
    hit = reuse.load(Composition((*placed, Text(Chain.of(QUESTION).token_ids, together.end))))
    assert (hit.cached_tokens, hit.exact) == (len(together), True)
    assert torch.equal(read(model, hit), wanted)


@pytest.mark.parametrize("family", ["llama", "phi3", "neox", "deepseek_v3"])
def test_turning_twenty_times_over_leaves_the_bytes_of_the_first_time(family: str, store: LocalStore) -> None:
    """Keys are always turned from the stored original: the last time gives the bits of the first."""
    model = build(family, "bfloat16")
    reuse, _ = joined(model, store)

    def keys(position: int) -> list[torch.Tensor]:
        parts = (Text(Chain.of(HEAD).token_ids, 0), Placement(Chain.of(FIRST), 0, len(FIRST), position))
        hit = reuse.load(Composition((*parts, Text(Chain.of(QUESTION).token_ids, 400))))
        read(model, hit)
        found = [layer.keys[:, :, len(HEAD) : len(HEAD) + len(FIRST)].clone() for layer in hit.cache._stored]
        found += [layer.values[:, :, len(HEAD) : len(HEAD) + len(FIRST)].clone() for layer in hit.cache._stored]
        return found

    first = keys(7)
    for position in range(20, 220, 10):
        last = keys(position)
    assert any(not torch.equal(one, other) for one, other in zip(first, last, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(first, keys(7), strict=True))


@CUDA
def test_on_a_gpu_it_is_what_it_is_on_a_cpu() -> None:
    model = build("llama").to("cuda")
    with kvstore.open(host="64MiB", device="64MiB") as store:
        reuse, windows = joined(model, store)
        prompt, owners = composition(PARTS)
        wanted = masked(build("llama"), prompt, owners, windows)[
            [place for place, owner in enumerate(owners) if not owner]
        ]
        for _ in range(2):  # from memory, then from the device
            torch.testing.assert_close(read(model, reuse.load(prompt)).cpu(), wanted, atol=1e-3, rtol=1e-3)
        hit = reuse.load(prompt, mode="blend", recompute=1.0)
        with torch.no_grad():
            whole = build("llama")(input_ids=torch.tensor([prompt.token_ids])).logits[0]
        torch.testing.assert_close(read(model, hit).cpu(), whole, atol=1e-3, rtol=1e-3)
        reuse.save([prompt.token_ids], hit.cache).wait()
