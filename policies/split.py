"""Load or recompute: how much of what is cached to load, and how much to compute again, for the earliest first token.

Layers are loaded while those before them compute. So a load whose last layers come late holds up little but these,
and what is computed meanwhile costs nothing: often it is quickest to load some, and to compute the rest beside it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from kvstore.policies.cost import Costs, Line

# A cut must win by both: else all is loaded, which spares the machine, and is right where little is known.
CLEAR_SECONDS, CLEAR_SHARE = 0.025, 0.05
MOST_CUTS = 512  # that are compared


class Portion(NamedTuple):
    """One block of a match: tokens used of it, where they are, and bytes to be read for it."""

    tokens: int
    tier: str  # "device", "host", "disk" or "remote"
    bytes: int


@dataclass(frozen=True)
class Prospect:
    """What loading would take: for each row its blocks, and how the disk and the remote tier are.

    ``disk``: its speed, None when it is not known. ``queued``: bytes that it has to move before. ``steps``: of what
    comes from disk, which layers come together: shares of them all, (first, behind the last). ``token_bytes``: of one
    token in all layers. ``layers``: how many there are. ``remote``, ``remote_queued``: as of the disk.
    """

    rows: Sequence[Sequence[Portion]]
    disk: Line | None
    queued: int
    steps: Sequence[tuple[float, float]]
    token_bytes: int
    layers: int
    remote: Line | None = None
    remote_queued: int = 0

    def seconds(self, disk: int, remote: int) -> float:
        """What reading so many bytes from each takes; both are read at once. What is not measured counts nothing."""
        own = self.disk.seconds(self.queued + disk) if self.disk and disk else 0.0
        others = self.remote.seconds(self.remote_queued + remote) if self.remote and remote else 0.0
        return max(own, others)

    def unmeasured(self) -> str:
        """What has to be read from without being measured yet; empty: nothing."""
        tiers = {portion.tier for row in self.rows for portion in row if portion.bytes}
        if "disk" in tiers and self.disk is None:
            return "the disk"
        return "the remote tier" if "remote" in tiers and self.remote is None else ""


@dataclass(frozen=True)
class Decision:
    """How many of the ``matched`` tokens are ``loaded``, and what was expected. ``str`` gives the reason.

    Seconds are None where nothing is known. ``cuts``: tokens loaded of each row. ``first_token_seconds`` counts from
    the decision to the end of the first forward pass, and so do ``all_loaded_seconds`` and ``all_computed_seconds``,
    which are what it would be if everything, or nothing, were loaded. ``disk_seconds``: what the disk's own speed lets
    expect of the reads. ``opening``: the share of it until the pass can begin; None when nothing is read. ``figures``:
    bytes in a second by tier, bytes queued, and by how much each expectation was corrected.
    """

    matched: int
    loaded: int
    cuts: tuple[int, ...]
    reason: str
    load_seconds: float | None = None
    prefill_seconds: float | None = None
    first_token_seconds: float | None = None
    all_loaded_seconds: float | None = None
    all_computed_seconds: float | None = None
    disk_seconds: float | None = None
    opening: float | None = None
    figures: Mapping[str, float] | None = None

    def __str__(self) -> str:
        return self.reason


class _Option(NamedTuple):
    """One way to begin, and what is expected of it."""

    cuts: tuple[int, ...]  # tokens loaded of each row
    disk: float  # seconds, as all below: what the disk's own speed lets expect of the reads
    load: float
    prefill: float
    first_token: float
    doubt: float  # how much longer computing may well take
    reads: int  # bytes from disk and the remote tier

    @property
    def loaded(self) -> int:
        return sum(self.cuts)


class _Ways:
    """All ways to begin one batch."""

    def __init__(self, tokens: Sequence[int], prospect: Prospect, costs: Costs) -> None:
        self._tokens, self._prospect, self._costs = tokens, prospect, costs
        self._ends = [list(accumulate((p.tokens for p in row), initial=0)) for row in prospect.rows]
        self._bytes = {
            tier: [list(accumulate((p.bytes * (p.tier == tier) for p in row), initial=0)) for row in prospect.rows]
            for tier in ("disk", "remote")
        }

    def all_loaded(self) -> _Option:
        """Everything that there is."""
        return self._option([len(row) for row in self._prospect.rows])

    def all_computed(self) -> _Option:
        """Nothing of it."""
        return self._option([0] * len(self._tokens))

    def between(self) -> Iterator[_Option]:
        """With fewer and fewer tokens left to compute: of each row no more is loaded than that takes."""
        pairs = list(zip(self._tokens, self._ends, strict=True))
        least = max(tokens - ends[-1] for tokens, ends in pairs)
        widths = sorted({width for tokens, ends in pairs for end in ends if (width := tokens - end) >= least})
        for width in widths[:: -(-len(widths) // MOST_CUTS)]:
            yield self._option([bisect_left(ends, tokens - width) for tokens, ends in pairs])

    def _option(self, blocks: Sequence[int]) -> _Option:
        """So many blocks of each row are loaded."""
        prospect, costs = self._prospect, self._costs
        cuts = tuple(ends[count] for ends, count in zip(self._ends, blocks, strict=True))
        sums = (zip(sizes, blocks, strict=True) for sizes in self._bytes.values())
        own, others = (sum(sizes[count] for sizes, count in pairs) for pairs in sums)
        size = own + others
        new = max(tokens - cut for tokens, cut in zip(self._tokens, cuts, strict=True))
        shape = len(cuts), new, max(cuts)
        disk = prospect.seconds(own, others) / costs.hope
        load = disk * costs.load_correction
        if costs.host.line and any(cuts):
            load += costs.host.line.seconds(sum(cuts) * prospect.token_bytes)
        prefill = costs.prefill.seconds(*shape)
        steps = prospect.steps if size else ((0.0, 1 / prospect.layers), (1 - 1 / prospect.layers, 1.0))
        first_token = max(load * last + prefill * (1 - first) for first, last in steps)
        return _Option(cuts, disk, load, prefill, first_token, costs.prefill.error(*shape), size)


def split(tokens: Sequence[int], prospect: Prospect, costs: Costs, limit: float) -> Decision:
    """What to load for prompts of so many ``tokens``. A load that would take longer than ``limit`` is not begun.

    Microseconds for a block; where no more than a moment can be won, less.
    """
    whole = tuple(sum(portion.tokens for portion in row) for row in prospect.rows)
    if not costs.prefill.known:
        reason = f"all {sum(whole)} tokens are loaded: it is not known yet how quickly the model reads"
        return Decision(sum(whole), sum(whole), whole, reason)
    ways = _Ways(tokens, prospect, costs)
    everything, nothing = ways.all_loaded(), ways.all_computed()
    chosen = everything
    reads = any(portion.bytes for row in prospect.rows for portion in row)
    if unmeasured := prospect.unmeasured():
        reason = f"all {sum(whole)} tokens are loaded: it is not known yet how quick {unmeasured} is"
        return _decision(reason, everything, None, nothing, prospect, costs)
    if everything.first_token > CLEAR_SECONDS:
        possible = [nothing, *(way for way in ways.between() if way.load <= limit)]
        if everything.load > limit or any(_is_clear(way, everything) for way in possible):
            best = min(possible, key=lambda way: way.first_token)
            chosen = best if _is_clear(best, nothing) else nothing
    if reads:
        costs.decided(from_disk=chosen.disk > 0)
    kept = f"all {sum(whole)} tokens are loaded"
    if chosen.loaded < sum(whole):
        kept = f"{chosen.loaded} of {sum(whole)} tokens are loaded and the others computed again"
    reason = (
        f"{kept}: a first token after {chosen.first_token:.3g} s (all loaded {everything.first_token:.3g} s, all "
        f"computed {nothing.first_token:.3g} s)"
    )
    return _decision(reason, chosen, everything, nothing, prospect, costs)


def _is_clear(way: _Option, other: _Option) -> bool:
    """Whether one is clearly quicker; even if computing, of which it has more, takes longer than expected."""
    won = other.first_token - way.first_token - (way.doubt if way.loaded < other.loaded else 0.0)
    return won > max(CLEAR_SECONDS, CLEAR_SHARE * other.first_token)


def _decision(
    reason: str, chosen: _Option, everything: _Option | None, nothing: _Option, prospect: Prospect, costs: Costs
) -> Decision:
    """``everything`` is None when it is not known what loading takes; ``chosen`` is everything then."""
    figures = {
        "queued_bytes": float(prospect.queued),
        "load_correction": costs.load_correction,
        "prefill_correction": costs.prefill.correction,
    }
    for tier, line in (("host", costs.host.line), ("disk", prospect.disk), ("remote", prospect.remote)):
        if line is not None and line.per_byte:
            figures[f"{tier}_bytes_per_second"] = 1 / line.per_byte
    known, opening = everything is not None, None
    if chosen.reads:
        queued = prospect.queued + prospect.remote_queued
        opening = (queued + prospect.steps[0][1] * chosen.reads) / (queued + chosen.reads)
    return Decision(
        matched=sum(portion.tokens for row in prospect.rows for portion in row),
        loaded=chosen.loaded,
        cuts=chosen.cuts,
        reason=reason,
        load_seconds=chosen.load if known else None,
        prefill_seconds=chosen.prefill,
        first_token_seconds=chosen.first_token if known else None,
        all_loaded_seconds=None if everything is None else everything.first_token,
        all_computed_seconds=nothing.first_token,
        disk_seconds=chosen.disk if known else None,
        opening=opening,
        figures=figures,
    )
