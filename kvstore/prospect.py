"""What loading matches would take: which bytes are where, and how the disk is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvstore.fetch import Fetch, parts_of
from kvstore.match import Match
from kvstore.policies.cost import Line
from kvstore.policies.split import Portion
from kvstore.policies.split import Prospect as Prospect
from kvstore.residency import Residency


def prospect(
    matches: Sequence[Match],
    device: bool,
    residency: Residency,
    fetches: Mapping[int, Fetch],
    disk: Line | None,
    writing: int,
    part_bytes: int,
) -> Prospect:
    """Of matches of one layout that are loaded together; a block that several have is read once. Locked.

    ``disk``: its speed. ``writing``: bytes of writes that are under way. ``part_bytes``: that are read at once.
    """
    layout, seen = matches[0].layout, set[int]()

    def portion(number: int, tokens: int) -> Portion:
        again = number in seen
        seen.add(number)
        if device and residency.hot is not None and number in residency.hot:
            return Portion(tokens, "device", 0)
        if number in residency.residents:
            return Portion(tokens, "host", 0)
        fetch = fetches.get(number)
        size = fetch.left if fetch is not None else layout.slot_bytes(residency.index.stride[number])
        return Portion(tokens, "disk", 0 if again else size)

    rows = [[portion(number, tokens) for number, tokens in match.blocks] for match in matches]
    queued = writing + sum(fetch.ahead for number, fetch in fetches.items() if number not in seen)
    layers = len(layout.layers)
    parts = parts_of(layout.layer_offsets(layout.block_tokens), part_bytes)
    steps = [(first / layers, last / layers) for first, last in parts]
    return Prospect(rows, disk, queued, steps, layout.token_payload, layers)
