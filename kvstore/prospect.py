"""What loading matches would take: which bytes are where, and how the disk and the remote tier are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvstore.fetch import Fetch, parts_of
from kvstore.match import Match
from kvstore.policies.cost import Line
from kvstore.policies.split import Portion
from kvstore.policies.split import Prospect as Prospect
from kvstore.residency import Residency
from kvstore.room import tier_of


def prospect(
    matches: Sequence[Match],
    device: bool,
    residency: Residency,
    fetches: Mapping[int, Fetch],
    speeds: tuple[Line | None, Line | None],
    writing: int,
    part_bytes: int,
) -> Prospect:
    """Of matches of one layout that are loaded together; a block that several have is read once. Locked.

    ``speeds``: of the disk, and of the remote tier. ``writing``: bytes of writes to disk that are under way.
    ``part_bytes``: that are read from it at once.
    """
    layout, seen = matches[0].layout, set[int]()

    def portion(number: int, tokens: int) -> Portion:
        again = number in seen
        seen.add(number)
        if device and residency.hot is not None and number in residency.hot:
            return Portion(tokens, "device", 0)
        if number in residency.residents:
            return Portion(tokens, "host", 0)
        fetch, tier = fetches.get(number), tier_of(residency, number)
        stride = layout.block_tokens if tier == "remote" else residency.index.stride[number]
        size = fetch.left if fetch is not None else layout.slot_bytes(stride)
        return Portion(tokens, tier, 0 if again else size)

    rows = [[portion(number, tokens) for number, tokens in match.blocks] for match in matches]
    before = {"disk": writing, "remote": 0}
    for number, fetch in fetches.items():
        if number not in seen:
            before[fetch.tier] += fetch.ahead
    layers = len(layout.layers)
    parts = parts_of(layout.layer_offsets(layout.block_tokens), part_bytes)
    steps = [(first / layers, last / layers) for first, last in parts]
    disk, remote = speeds
    return Prospect(rows, disk, before["disk"], steps, layout.token_payload, layers, remote, before["remote"])
