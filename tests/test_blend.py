"""Blending: how much is computed anew, which tokens, what is found again afterwards; and calls that mean nothing."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from composed import FIRST, HEAD, MIDDLE, PARTS, QUESTION, SECOND, THIRD, close, composition, joined, read, tokens
from hf_models import build
from hf_runs import leases_left

import kvstore
from kvstore.adapters.transformers import Reuse
from kvstore.composition import Chain, Composition, Text
from kvstore.errors import BadInput
from kvstore.local import LocalStore
from kvstore.policies.overflow import truncation
from kvstore.tensors.carrier import Carrier


@pytest.fixture
def store() -> Iterator[LocalStore]:
    with kvstore.open(host="64MiB") as store:
        yield store
        assert leases_left(store) == 0


@pytest.mark.parametrize("family", ["llama", "gemma3", "neox", "deepseek_v3"])
def test_everything_recomputed_is_the_whole_forward_pass(family: str, store: LocalStore) -> None:
    model = build(family)
    reuse, _ = joined(model, store)
    ids = [token for _, part in PARTS for token in part]
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([ids])).logits[0]
    hit = reuse.load(composition(PARTS)[0], mode="blend", recompute=1.0)
    assert (hit.cached_tokens, hit.exact) == (0, False)
    close(read(model, hit), wanted)


def test_a_blend_comes_closer_the_more_it_recomputes_and_chance_does_not(store: LocalStore) -> None:
    """The chosen tokens are those that deviate: the same number of others leaves a larger error."""
    model = build("llama")
    reuse, _ = joined(model, store)
    prompt, _ = composition([(1, FIRST), (2, SECOND), (3, THIRD), (0, QUESTION)])
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([prompt.token_ids])).logits[0, -1]
    errors = []
    for share in (0.0, 0.3, 0.6, 1.0):
        hit = reuse.load(prompt, mode="blend", recompute=share)
        computed = math.ceil(share * (len(SECOND) + len(THIRD)))
        assert hit.cached_tokens == len(prompt) - len(QUESTION) - computed
        errors.append(float((read(model, hit)[-1] - wanted).norm()))
    assert errors[0] > errors[2] > errors[3]
    assert errors[3] < 1e-3


def test_a_blend_is_found_by_the_same_modules_and_share_only(store: LocalStore) -> None:
    model = build("qwen3")
    reuse, _ = joined(model, store)
    prompt, _ = composition([(1, FIRST), (2, SECOND), (0, QUESTION)])
    found: dict[Any, Any] = {}
    for mode, share in (("blend", 0.2), ("blend", 0.4), ("modular", 0.0)):
        hit = reuse.load(prompt, mode=mode, recompute=share)
        found[mode, share] = hit.cached_tokens
        read(model, hit)
        reuse.save([prompt.token_ids], hit.cache)
    computed = [len(prompt) - cached - len(QUESTION) for cached in found.values()]
    assert computed == [6, 12, 0]  # nobody found what another mode had stored
    for share in (0.2, 0.4):
        again = reuse.load(prompt, mode="blend", recompute=share)
        assert (again.cached_tokens, again.exact) == (len(prompt) - 1, False)
    # Which tokens are chosen depends on all modules, so with one more behind them it is another blend.
    longer, _ = composition([(1, FIRST), (2, SECOND), (3, THIRD), (0, QUESTION)])
    assert reuse.load(longer, mode="blend", recompute=0.2).cached_tokens == len(longer) - len(QUESTION) - 12
    assert reuse.load(prompt, mode="exact").cached_tokens == len(FIRST)


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "deepseek_v2", "fusedkv"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("by_way", ["host", "device"])
def test_what_was_blended_once_goes_on_bit_for_bit(family: str, dtype: str, by_way: str) -> None:
    """What was computed anew and what was taken as it was is one chain: a later turn computes nothing of it again."""
    model = build(family, dtype)
    streams = Carrier(torch.device("cpu"))
    with kvstore.open(host="64MiB", device="64MiB" if by_way == "device" else None, device_name="cpu") as store:
        reuse, _ = joined(model, store)
        reuse._joined.carrier = streams if by_way == "device" else None
        prompt, _ = composition([(0, HEAD), (1, FIRST), (0, MIDDLE), (2, SECOND), (0, QUESTION)])
        hit = reuse.load(prompt, mode="blend", recompute=0.3)
        assert hit.cached_tokens == len(FIRST) + len(SECOND) - 22
        read(model, hit)
        assert reuse.save([prompt.token_ids], hit.cache).tokens == len(prompt) - len(HEAD)
        more = tokens(70, 11)
        with torch.no_grad():
            wanted = model(input_ids=torch.tensor([more]), past_key_values=hit.cache).logits[0]
        turn = Composition((*prompt.parts, Text(Chain.of(more).token_ids, len(prompt))))
        later = reuse.load(turn, mode="blend", recompute=0.3)
        assert (later.cached_tokens, later.exact) == (len(prompt), False)
        assert torch.equal(read(model, later), wanted)
        assert reuse.save([turn.token_ids], later.cache).tokens == len(turn) - len(HEAD)
        assert reuse.load(turn, mode="blend", recompute=0.3).cached_tokens == len(turn) - 1
        del hit, later
    streams.close()


def test_a_blend_with_gaps_is_made_again_every_time(store: LocalStore) -> None:
    """It is no chain, so only what follows it is stored."""
    model = build("llama")
    reuse, _ = joined(model, store)
    prompt, _ = composition([(1, FIRST), (2, SECOND), (3, THIRD), (0, QUESTION)], gaps=[0, 0, 5, 0])
    for cached in (len(prompt) - len(QUESTION) - 12, len(prompt) - 1 - 12):
        hit = reuse.load(prompt, mode="blend", recompute=0.2)
        assert hit.cached_tokens == cached
        read(model, hit)
        reuse.save([prompt.token_ids], hit.cache)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda reuse: reuse.load(), "give a prompt"),
        (lambda reuse: reuse.load(torch.tensor([HEAD]), segments=[HEAD]), "not both"),
        (lambda reuse: reuse.load(segments=[HEAD, []]), "segment 1"),
        (lambda reuse: reuse.load(segments=[]), "no tokens"),
        (lambda reuse: reuse.load(segments=[HEAD, [1000]]), "vocabulary"),
        (lambda reuse: reuse.load(segments=[HEAD, HEAD], mode="fast"), "exact, modular, blend, link"),
        (lambda reuse: reuse.load(segments=[HEAD, HEAD], mode="blend", recompute=1.5), "share"),
        (lambda reuse: reuse.load(torch.tensor([HEAD]), mode="blend"), "compositions"),
        (lambda reuse: reuse.load(segments=[HEAD, HEAD], mode="link"), "LinkTokens"),
        (lambda reuse: reuse.load(segments=[HEAD, HEAD], discover=64), "plain token ids"),
        (lambda reuse: reuse.load(torch.tensor([HEAD]), overflow=truncation(64), discover=64), "leave discover out"),
        (lambda reuse: reuse.load(torch.tensor([HEAD]), discover=3), "too short"),
        (lambda reuse: reuse.load(torch.tensor([HEAD, HEAD]), discover=64), "one prompt"),
        (lambda reuse: reuse.encode(), "give one of them"),
        (lambda reuse: reuse.encode(segments=[HEAD], pin="gpu"), "host, disk"),
        (lambda reuse: reuse.encode([HEAD]), "compositions"),
    ],
)
def test_what_cannot_be_meant_is_said(call: Any, says: str, store: LocalStore) -> None:
    with pytest.raises(BadInput, match=says):
        call(Reuse(build("llama"), store, block_tokens=16))
