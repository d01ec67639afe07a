"""The task: documents write values to keys, later writes win, some writes only name a key of an earlier document.

A document that is encoded alone cannot know what such an alias holds: that is what modular reuse loses. A write is one
token, so the model learns to look keys up in minutes; its embeddings start as sums of a key's and a value's vector.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvstore.adapters.kvlink import LinkTokens
from kvstore.adapters.kvlink.layout import UNSCORED, lay_out

KINDS = ("single", "overwritten", "alias")
SPREAD = 0.3  # of the embeddings that the model starts from


@dataclass(frozen=True)
class Size:
    """How large tasks and models are, and how long they train."""

    symbols: int = 32  # keys, and values
    documents: int = 4
    writes: int = 4  # a document
    distinct: int = 11  # keys a prompt; the other writes overwrite
    queries: int = 8
    aliases: float = 0.3  # of the writes that an earlier document has a key for
    links: int = 2  # a document
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    batch: int = 32
    steps: int = 2000
    rate: float = 3e-3
    tuning_steps: int = 1200
    tuning_rate: float = 1e-3
    prompts: int = 512  # held out

    @property
    def plain(self) -> LinkTokens:
        """The layout without links."""
        return LinkTokens(self.vocabulary - self.links * self.documents, 0, self.documents)

    @property
    def linked(self) -> LinkTokens:
        """The layout with links."""
        return LinkTokens(self.plain.start, self.links, self.documents)

    @property
    def vocabulary(self) -> int:
        """Values, keys, the mark of a document, writes, aliases, links."""
        return 2 * self.symbols + 1 + 2 * self.symbols**2 + self.links * self.documents

    def key(self, key: int) -> int:
        """The id that asks for a key. A value's id is its number."""
        return self.symbols + key

    @property
    def mark(self) -> int:
        """The id that begins a document."""
        return 2 * self.symbols

    def write(self, key: int, value: int) -> int:
        """The id that writes a value."""
        return self.mark + 1 + key * self.symbols + value

    def alias(self, key: int, other: int) -> int:
        """The id that writes what another key holds."""
        return self.write(key, other) + self.symbols**2


@dataclass(frozen=True)
class Prompt:
    """Documents and queries, with what is right."""

    documents: list[list[int]]
    held: list[list[int]]  # per document token, the value that an alias comes to; -100 for others
    queries: list[int]
    answers: list[int]
    kinds: list[str]


@dataclass(frozen=True, eq=False)
class Batch:
    """Prompts of one layout, int64 [rows, tokens]. Labels are those of the token itself, not of the next."""

    ids: torch.Tensor
    segments: torch.Tensor
    labels: torch.Tensor


def prompt(size: Size, source: random.Random) -> Prompt:
    """One prompt; all of its keys are written, the queries ask different ones."""
    keys = source.sample(range(size.symbols), size.distinct)
    written = keys + source.choices(keys, k=size.documents * size.writes - size.distinct)
    source.shuffle(written)
    holds: dict[int, int] = {}
    kinds: dict[int, str] = {}
    documents, held = [], []
    for start in range(0, len(written), size.writes):
        earlier = sorted(holds)
        document, values = [size.mark], [UNSCORED]
        here = written[start : start + size.writes]
        others = [one for one in earlier if one not in here]
        for key in here:
            if others and source.random() < size.aliases:
                other = source.choice(others)
                holds[key], kinds[key] = holds[other], "alias"
                document.append(size.alias(key, other))
                values.append(holds[key])
            else:
                kinds[key] = "overwritten" if key in holds else "single"
                holds[key] = source.randrange(size.symbols)
                document.append(size.write(key, holds[key]))
                values.append(UNSCORED)
        documents.append(document)
        held.append(values)
    asked = source.sample(sorted(holds), size.queries)
    answers = [holds[key] for key in asked]
    return Prompt(documents, held, [size.key(key) for key in asked], answers, [kinds[key] for key in asked])


def prompts(size: Size, count: int, seed: str) -> list[Prompt]:
    """So many, the same for the same seed."""
    source = random.Random(seed)
    return [prompt(size, source) for _ in range(count)]


def batch(made: Sequence[Prompt], links: LinkTokens, aliases: bool = False) -> Batch:
    """Prompts side by side. ``aliases``: label aliases too, with the value that they come to."""
    rows = []
    for one in made:
        laid = lay_out(links, one.documents, one.queries)
        labels = [UNSCORED] * (len(laid) - len(one.answers)) + one.answers
        if aliases:
            behind = [UNSCORED] * links.per_document
            labels[: -len(one.answers)] = [label for values in one.held for label in values + behind]
        rows.append((laid.token_ids, laid.segments, labels))
    return Batch(*(torch.tensor(column) for column in zip(*rows, strict=True)))


def build(size: Size, seed: int) -> Any:
    """The model as it starts: a plain Llama whose embeddings of writes are sums."""
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=2 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        keys, values, others = SPREAD * torch.randn(3, size.symbols, size.hidden)
    rows, answers = model.get_input_embeddings().weight.data, model.get_output_embeddings().weight.data
    rows[: size.symbols] = answers[: size.symbols] = values
    rows[size.key(0) : size.mark] = keys
    rows[size.write(0, 0) : size.alias(0, 0)] = (keys[:, None] + values).flatten(0, 1)
    rows[size.alias(0, 0) : size.plain.start] = (keys[:, None] + others).flatten(0, 1)
    return model
