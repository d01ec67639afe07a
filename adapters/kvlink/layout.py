"""The order of a prompt with links: system, each document with its links behind it, question, answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvstore.adapters.kvlink.links import LinkTokens
from kvstore.composition import Chain, Composition, Part, Placement, Text
from kvstore.errors import BadInput
from kvstore.keys import token_bytes

SHARED = 0  # the segment of all that sees everything: system, links, question, answer
PADDING = -1
UNSCORED = -100  # a label that counts for no loss


@dataclass(frozen=True)
class Laid:
    """A prompt as the model reads it in one pass: per token its id, its segment and its label."""

    token_ids: list[int]
    segments: list[int]  # 0: shared; i: the i-th document, from 1
    labels: list[int]  # the token's own id where it is answered, -100 elsewhere

    def __len__(self) -> int:
        return len(self.token_ids)


def pieces(
    links: LinkTokens, documents: Sequence[Sequence[int]], question: Sequence[int], system: Sequence[int] = ()
) -> Iterator[tuple[int, Sequence[int]]]:
    """Segment and tokens of each piece, in order; none is empty.

    Raises ``BadInput`` for a document without tokens, and for more documents than the links have slots.
    """
    if system:
        yield SHARED, system
    for slot, document in enumerate(documents):
        if not len(document):
            raise BadInput(f"document {slot} has no tokens; leave it out")
        behind = links.of(slot)
        yield slot + 1, document
        if behind:
            yield SHARED, behind
    if question:
        yield SHARED, question


def compose(
    links: LinkTokens, documents: Sequence[Sequence[int]], question: Sequence[int], system: Sequence[int] = ()
) -> Composition:
    """A prompt for the store: each document is looked for as it was encoded alone, all else is computed.

    Documents are chains of their own tokens: nothing before them, no links. Positions are contiguous, and links take
    theirs. Raises ``BadInput`` as ``pieces`` does, and for what is no token id.
    """
    parts: list[Part] = []
    position = 0
    for segment, tokens in pieces(links, documents, question, system):
        chain = Chain.of(tokens)
        whole = Placement(chain, 0, len(chain), position)
        parts.append(Text(token_bytes(tokens), position) if segment == SHARED else whole)
        position += len(chain)
    return Composition(tuple(parts))


def lay_out(
    links: LinkTokens,
    documents: Sequence[Sequence[int]],
    question: Sequence[int],
    answer: Sequence[int] = (),
    system: Sequence[int] = (),
) -> Laid:
    """The same prompt in one piece, for a masked pass, with its answer behind it. Raises as ``pieces`` does."""
    ids: list[int] = []
    segments: list[int] = []
    for segment, tokens in pieces(links, documents, question, system):
        ids += tokens
        segments += [segment] * len(tokens)
    labels = [UNSCORED] * len(ids) + list(answer)
    return Laid([*ids, *answer], segments + [SHARED] * len(answer), labels)
