"""The model that is measured: a small Llama, trained here, so that its sinks are learnt and not made up."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvstore.bench.train_plans import training
from kvstore.bench.train_plans.arms import Size
from kvstore.bench.train_plans.corpus import END, VOCABULARY, Corpus

BEGIN = END[0]  # what every sequence starts with: the end of what was before
SIZES = {
    "smoke": Size(hidden=32, layers=2, heads=2, context=48, batch=4, steps=12, rate=2e-3, held_out=4, evaluations=2),
    "small": Size(hidden=128, layers=4, heads=4, context=512, batch=8, steps=2000, rate=2e-3, held_out=32),
}
SETTING = "setting.json"


class Begun(Corpus):
    """Text of which every piece starts with ``BEGIN``."""

    @classmethod
    def of(cls, text: Corpus) -> Begun:
        """The same text."""
        return cls(text.train, text.validation, text.files, text.name)

    def batch(self, rows: int, context: int, source: torch.Generator) -> torch.Tensor:
        """As ``Corpus``."""
        return begun(super().batch(rows, context, source))

    def held_out(self, rows: int, context: int) -> torch.Tensor:
        """As ``Corpus``."""
        return begun(super().held_out(rows, context))

    def stream(self, tokens: int) -> torch.Tensor:
        """The start of the validation text in one piece, [1, ``tokens`` + 1]."""
        return torch.cat((torch.tensor([BEGIN]), self.validation[:tokens].long()))[None]


def begun(ids: torch.Tensor) -> torch.Tensor:
    """``ids`` [rows, tokens] with ``BEGIN`` in the place of each first token."""
    ids[:, 0] = BEGIN
    return ids


def build(size: Size, seed: int) -> LlamaForCausalLM:
    """The model as it starts."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 8 // 3,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=size.context,
        tie_word_embeddings=True,
        bos_token_id=BEGIN,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def trained(folder: Path, text: Begun, size: Size, seed: int) -> Iterator[int | LlamaForCausalLM]:
    """Trains a model, or takes it from ``folder``; yields the number of each step, and last the model."""
    setting: dict[str, Any] = {**dataclasses.asdict(size), "seed": seed, "digest": text.digest}
    noted = folder / SETTING
    if noted.is_file() and json.loads(noted.read_text("utf-8"))["setting"] == setting:
        yield LlamaForCausalLM.from_pretrained(folder).eval()
        return
    model, curve = build(size, seed), []
    for step in training.train(model, text, size, seed, torch.device("cpu")):
        if isinstance(step, int):
            yield step
        else:
            curve.append(step.as_json())
    model.save_pretrained(folder)
    noted.write_text(json.dumps({"setting": setting, "curve": curve}, indent=1) + "\n", "utf-8")
    yield model.eval()
