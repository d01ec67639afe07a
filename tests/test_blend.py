"""Blending: how much is computed anew, which tokens, what is found again afterwards; and calls that mean nothing."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from composed import FIRST, HEAD, PARTS, QUESTION, SECOND, THIRD, close, composition, joined, read
from hf_models import build
from hf_runs import leases_left

import kvstore
from kvstore.adapters.transformers import Reuse
from kvstore.errors import BadInput
from kvstore.policies.overflow import truncation
from kvstore.store import Store


@pytest.fixture
def store() -> Iterator[Store]:
    with kvstore.open(host="64MiB") as store:
        yield store
        assert leases_left(store) == 0


@pytest.mark.parametrize("family", ["llama", "gemma3", "neox", "deepseek_v3"])
def test_everything_recomputed_is_the_whole_forward_pass(family: str, store: Store) -> None:
    model = build(family)
    reuse, _ = joined(model, store)
    ids = [token for _, part in PARTS for token in part]
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([ids])).logits[0]
    hit = reuse.load(composition(PARTS)[0], mode="blend", recompute=1.0)
    assert (hit.cached_tokens, hit.exact) == (0, False)
    close(read(model, hit), wanted)


def test_a_blend_comes_closer_the_more_it_recomputes_and_chance_does_not(store: Store) -> None:
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


def test_what_follows_a_blend_is_found_behind_the_same_blend_only(store: Store) -> None:
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
    assert computed == [6, 12, 0]  # nobody found the question that another mode had stored
    assert reuse.load(prompt, mode="blend", recompute=0.2).cached_tokens == len(prompt) - 1 - 6


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
def test_what_cannot_be_meant_is_said(call: Any, says: str, store: Store) -> None:
    with pytest.raises(BadInput, match=says):
        call(Reuse(build("llama"), store, block_tokens=16))
