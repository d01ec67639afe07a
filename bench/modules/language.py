"""The same ways of reuse on running text: how well the last of some segments is predicted, byte by byte.

Cut text is a poor test of what modules lose, so the last segment is also scored alone: where that is no worse, nothing
that stands in other segments matters, and no way to reuse them can show a loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from kvstore.adapters.kvlink import reference
from kvstore.bench.modules.evaluation import SHARES, local_positions
from kvstore.bench.train_plans import training
from kvstore.bench.train_plans.arms import Size as Training
from kvstore.bench.train_plans.corpus import VOCABULARY, Corpus

ROWS = 16  # scored at a time

Answer = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # ids and segments [rows, tokens] to logits


@dataclass(frozen=True)
class Size:
    """How the text is cut, and how large the model is and how long it trains."""

    segments: int = 4  # the last one is scored
    tokens: int = 128  # a segment
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    batch: int = 4
    steps: int = 500
    rate: float = 2e-3
    texts: int = 64  # held out

    @property
    def training(self) -> Training:
        """As the training of layer plans takes it."""
        return Training(
            hidden=self.hidden,
            layers=self.layers,
            heads=self.heads,
            context=self.segments * self.tokens,
            batch=self.batch,
            steps=self.steps,
            rate=self.rate,
            held_out=self.batch,
            evaluations=1,
        )


@dataclass(frozen=True)
class Loss:
    """Nats per byte of the last segment under one arm. ``share``: of the other segments' tokens computed anew."""

    arm: str
    share: float
    nats: float


def trained(text: Corpus, size: Size, seed: int, stepped: Callable[[], None]) -> Any:
    """A plain Llama that has read the text. ``stepped`` is called after every step."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden,
        intermediate_size=3 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=size.segments * size.tokens,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    for step in training.train(model, text, size.training, seed, torch.device("cpu")):
        if isinstance(step, int):
            stepped()
    return model.eval()


def losses(model: Any, text: Corpus, size: Size, seed: int) -> Iterator[Loss]:
    """Every arm on the same held-out texts."""
    ids = text.held_out(size.texts, size.segments * size.tokens)
    segments = torch.arange(1, size.segments + 1).repeat_interleave(size.tokens)
    segments[-size.tokens :] = 0
    cut = segments.expand_as(ids)

    def scored(answer: Answer) -> float:
        parts = zip(ids.split(ROWS), cut.split(ROWS), strict=True)
        found = [_nats(answer(rows, how), rows, size.tokens) for rows, how in parts]
        return float(torch.cat(found).mean())

    def apart(rows: torch.Tensor, how: torch.Tensor) -> torch.Tensor:
        return reference.modular(model, rows, how, local_positions(how))[0]

    def alone(rows: torch.Tensor, how: torch.Tensor) -> torch.Tensor:
        return reference.full(model, rows[:, -size.tokens :], how[:, -size.tokens :])

    def blend(share: float, source: torch.Generator | None) -> Answer:
        return lambda rows, how: reference.blend(model, rows, how, share, source)[0]

    yield Loss("full", 1.0, scored(lambda rows, how: reference.full(model, rows, how)))
    yield Loss("modular", 0.0, scored(lambda rows, how: reference.modular(model, rows, how)[0]))
    yield Loss("not re-encoded", 0.0, scored(apart))
    for share in SHARES:
        yield Loss("blend", share, scored(blend(share, None)))
        yield Loss("random", share, scored(blend(share, torch.Generator().manual_seed(seed))))
    yield Loss("last segment alone", 0.0, scored(alone))


def _nats(logits: torch.Tensor, ids: torch.Tensor, last: int) -> torch.Tensor:
    """Of each byte of the last segment but its first, which the segment before it predicts; [rows * (last - 1)]."""
    return cross_entropy(logits[:, -last:-1].flatten(0, 1).float(), ids[:, 1 - last :].flatten(), reduction="none")
