"""Schemas through a model: modules are encoded once, and prompts of them equal one masked forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from composed import close, masked
from hf_models import build
from hf_runs import leases_left
from pml_words import prompt, schema

import kvstore
from kvstore.adapters.transformers import Reuse
from kvstore.composition import Composition, Placement
from kvstore.local import LocalStore

TRIP = (
    'You plan trips.<module name="plan">Plan <parameter name="days" length="6"/></module>'
    '<union><module name="miami">Miami is <module name="beach">beaches, </module>hot and far.</module>'
    '<module name="oslo">Oslo is not.</module></union><module name="end" cache="false"> now</module>'
)
# What a schema has, how it is laid out, what a prompt wants, and of each part its module, or 0 for what is computed.
PROMPTS: dict[str, tuple[str, Any, str, list[int]]] = {
    "gaps": (TRIP, "paper", '<plan days="3"/><oslo/>Go', [1, 2, 0, 3, 0]),
    "text between": (TRIP, "paper", 'Now <plan days="3"/> go <oslo/><end/>!', [1, 0, 2, 0, 0, 3, 0, 0]),
    "packed": (TRIP, "packed", '<plan days="3"/> go <oslo/><end/>!', [1, 2, 0, 0, 3, 0, 0]),
    "text on both sides of a module": (TRIP + "Be short.", "paper", "<miami><beach/></miami>!", [1, 2, 3, 2, 1, 0]),
    "a module that is left out": (TRIP + "Be short.", "paper", "<miami/>!", [1, 2, 2, 1, 0]),
    "a scaffold": (
        TRIP + '<scaffold modules="miami miami.beach"/>',
        "paper",
        '<plan days="3"/><miami><beach/></miami>Go',
        [1, 2, 0, 3, 3, 3, 0],
    ),
}


@pytest.fixture
def store() -> Iterator[LocalStore]:
    with kvstore.open(host="64MiB") as store:
        yield store
        assert leases_left(store) == 0


def logits(model: Any, reuse: Reuse, said: Composition) -> torch.Tensor:
    hit = reuse.load(said)
    with torch.no_grad():
        read: torch.Tensor = model(**hit.forward_inputs).logits[0]
    assert hit.cached_tokens == sum(len(part) for part in said.parts if isinstance(part, Placement))
    return read


@pytest.mark.parametrize("case", PROMPTS)
def test_a_prompt_equals_a_masked_forward_pass(case: str, store: LocalStore) -> None:
    """In which a module sees itself, and what is computed sees all that is before it."""
    inside, layout, wanted, modules = PROMPTS[case]
    model = build("llama")
    reuse, made = Reuse(model, store, block_tokens=16), schema(inside, layout=layout)
    encoded = reuse.encode(made)
    assert encoded.tokens == sum(map(len, made.encodings())) and reuse.encode(made).new_tokens == 0
    said = prompt(made, wanted)
    owners = [module for part, module in zip(said.parts, modules, strict=True) for _ in range(len(part))]
    computed = [place for place, owner in enumerate(owners) if not owner]
    whole = masked(model, said, owners, [None] * model.config.num_hidden_layers)
    close(logits(model, reuse, said), whole[computed])
