"""Prompts that wait for a model: what they will be read from is in memory when they are loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import PARTS, QUESTION, composition, joined, read
from gates import fetches_are_over, only_on_disk
from hf_models import build, prompt
from hf_runs import leases_left
from queues import nobody_waits, states

import kvstore
from kvstore import BadInput, Job, Namespace
from kvstore.adapters.transformers import Reuse
from kvstore.composition import Composition
from kvstore.local import LocalStore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    with kvstore.open(tmp_path / "cache", host="16MiB", disk="64MiB") as opened:
        yield opened
        nobody_waits(opened)
        assert leases_left(opened) == 0


def test_prompts_that_wait_are_loaded_from_memory(store: LocalStore) -> None:
    model = build("llama")
    reuse = Reuse(model, store, block_tokens=16)
    turns = [prompt(40 + seed, seed) for seed in range(3)]
    for ids in turns[:2]:
        hit = reuse.load(ids)
        read(model, hit)
        assert reuse.save(ids, hit.cache).wait().tokens == ids.shape[1]
    only_on_disk(store)
    waiting = [turns[0], turns[1][0].tolist(), turns[2], turns[0]]  # two that are alike
    answers = reuse.schedule(waiting)
    assert states(answers) == ["prefetching", "prefetching", "unknown", "prefetching"]
    assert [(answer.name, answer.tokens) for answer in answers] == [(0, 39), (1, 40), (2, 0), (3, 39)]
    fetches_are_over(store)
    assert states(reuse.schedule(waiting)) == ["resident", "resident", "unknown", "resident"]
    hit = reuse.load(turns[0])
    assert hit.cached_by_tier == {"device": 0, "host": 39, "disk": 0, "remote": 0}
    assert states(reuse.schedule(waiting, tenant="other")) == ["unknown"] * 4


def test_all_runs_of_a_composition_count(store: LocalStore) -> None:
    model = build("llama")
    reuse, _ = joined(model, store)
    whole, _ = composition(PARTS)
    hit = reuse.load(whole)
    read(model, hit)
    assert reuse.save([whole.token_ids], hit.cache).wait().tokens == len(QUESTION)
    only_on_disk(store)
    loaded: Any = reuse.load(whole).cached_tokens
    fetches_are_over(store)
    assert leases_left(store) == 0
    only_on_disk(store)
    (answer,) = reuse.schedule([whole])
    assert (answer.state, answer.name) == ("prefetching", 0) and answer.tokens == answer.tokens_by_tier["disk"]
    assert answer.tokens <= loaded <= answer.tokens + 5  # of each run at least one token is left to compute
    fetches_are_over(store)
    assert states(reuse.schedule([whole])) == ["resident"]
    assert reuse.load(whole).cached_by_tier == {"device": 0, "host": loaded, "disk": 0, "remote": 0}


def test_what_the_model_is_not_any_more_is_unknown(store: LocalStore) -> None:
    model = build("llama")
    reuse = Reuse(model, store, block_tokens=16)
    ids = prompt(40, 1)
    hit = reuse.load(ids)
    read(model, hit)
    reuse.save(ids, hit.cache).wait()
    assert states(reuse.schedule([ids])) == ["resident"]
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    assert states(reuse.schedule([ids])) == ["unknown"]


def test_jobs_of_the_callers_own_pass_as_they_are(store: LocalStore) -> None:
    model = build("llama")
    reuse = Reuse(model, store, block_tokens=16)
    own = Job("mine", namespace=Namespace(reuse.fingerprint), layout=reuse.layout, token_ids=[1, 2, 3], priority=1)
    assert [answer.name for answer in reuse.schedule([own, [1, 2, 3]])] == ["mine", 1]
    refused: list[Any] = ["text", [], Composition(()), [[]]]
    for wrong in refused:
        with pytest.raises(BadInput):
            reuse.schedule([wrong])
