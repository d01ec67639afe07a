"""Link tokens: a few learned tokens behind each document, which read all that stands before them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kvstore.errors import BadInput

FILE = "kvlink.json"  # beside a model's weights
NOISE = 0.02  # of the spread of the rows that are there


@dataclass(frozen=True)
class LinkTokens:
    """Which token ids link documents: ``start + per_document * slot + k`` for the document in a slot.

    Ids differ from slot to slot, and slots go by the order of the prompt, so links belong to the prompt and never to
    a document. ``per_document=0`` is a layout without links. Immutable; any thread.
    """

    start: int
    per_document: int = 5
    documents: int = 40

    def __post_init__(self) -> None:
        if min(self.start, self.per_document, self.documents) < 0:
            raise BadInput(f"{self} has a negative number; give ids and counts from 0")

    @property
    def stop(self) -> int:
        """The id behind the last one."""
        return self.start + self.per_document * self.documents

    def of(self, slot: int) -> list[int]:
        """The ids behind the document number ``slot``. Raises ``BadInput`` when there is no such slot."""
        if not 0 <= slot < self.documents:
            raise BadInput(f"document {slot} has no links: there are {self.documents} slots; give fewer documents")
        first = self.start + self.per_document * slot
        return list(range(first, first + self.per_document))

    def save(self, folder: Path) -> None:
        """Writes them beside a model's weights."""
        (folder / FILE).write_text(json.dumps(asdict(self)) + "\n", "utf-8")

    @classmethod
    def load(cls, folder: Path) -> LinkTokens:
        """Those of a model that was trained with links. Raises ``BadInput`` when the folder says nothing of them."""
        try:
            return cls(**json.loads((folder / FILE).read_text("utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise BadInput(f"{folder / FILE} does not say which tokens are links: {error}") from None


def add_links(model: Any, links: LinkTokens, seed: int = 0) -> int:
    """Makes room for the links in the model's embeddings; says how many rows are new.

    New rows are the mean of the old ones with a little noise, in the output layer too. Ids that the model has already
    (reserved tokens) keep theirs. Raises ``BadInput`` for ids that would leave a gap.
    """
    old = int(model.get_input_embeddings().weight.shape[0])
    if links.start > old:
        raise BadInput(f"links start at {links.start}, but the model's ids end at {old}; use start={old}")
    if links.stop <= old:
        return 0
    model.resize_token_embeddings(links.stop, mean_resizing=False)
    source = torch.Generator().manual_seed(seed)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    for weight in {id(end.weight): end.weight for end in ends if end is not None}.values():
        rows = weight.data[:old].float().cpu()
        noise = torch.randn(links.stop - old, rows.shape[1], generator=source)
        weight.data[old:] = (rows.mean(0) + NOISE * rows.std(0) * noise).to(weight)
    return links.stop - old
