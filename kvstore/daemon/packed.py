"""What goes over the wire, as values of msgpack, and back. Whatever does not fit raises ``BadInput``."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import msgpack

from kvstore.block import pack_layout, unpack_layout
from kvstore.composition import Chain, Composition, Context, Part, Placement, Text
from kvstore.daemon.wire import few
from kvstore.errors import BadInput, Corrupt
from kvstore.keys import Fingerprint, Namespace, check_names
from kvstore.kinds import Origin
from kvstore.layout import Layout, Shard
from kvstore.match import Match, Miss
from kvstore.policies.cost import Line
from kvstore.policies.split import Portion, Prospect

T = TypeVar("T")
TIERS = ("device", "host", "disk", "remote")
MANY, SHORT = 4096, 4096  # namespaces that are known without being read again, and bytes of the longest such
FEW = 64  # and layouts, which may have thousands of layers
MOST = 32768  # values that a namespace or a layout is made of


def pack_namespace(space: Namespace) -> bytes:
    """A namespace, components and all."""
    packed: bytes = msgpack.packb([dict(space.fingerprint.components), space.tenant])
    return packed


def namespace_of(packed: bytes) -> Namespace:
    """The namespace that ``pack_namespace`` packed."""
    return _namespace(packed) if len(packed) <= SHORT else _namespace.__wrapped__(packed)


@lru_cache(maxsize=MANY)
def _namespace(packed: bytes) -> Namespace:
    components, tenant = _read(packed, lambda value: (dict(value[0]), value[1]))
    texts = [*components, *components.values(), tenant]
    if not all(isinstance(text, str) for text in texts):
        raise BadInput("a namespace is made of strings")
    return Namespace(Fingerprint(components), tenant)


@lru_cache(maxsize=FEW)
def layout_of(packed: bytes) -> Layout:
    """The layout that ``block.pack_layout`` packed."""
    try:
        if not few(packed, MOST):
            raise Corrupt(f"a layout has more than {MOST} values, or ends too soon")
        return unpack_layout(packed)
    except Corrupt as error:
        raise BadInput(str(error)) from error


@lru_cache(maxsize=FEW)
def packed_layout(layout: Layout) -> bytes:
    """``block.pack_layout``, remembered."""
    return pack_layout(layout)


def pack_shard(shard: Shard | None, whole: Layout) -> list[object] | None:
    """What a worker has of blocks. Raises ``BadInput`` where it has none of such blocks."""
    if shard is None:
        return None
    shard.check(whole)
    check_names(shard.group, "", "")
    return [packed_layout(shard.layout), shard.first_head, shard.group]


def shard_of(packed: object, whole: Layout) -> Shard:
    """What ``pack_shard`` packed."""
    layout, first_head, group = checked(packed, (bytes, int, str))
    check_names(group, "", "")
    shard = Shard(layout_of(layout), first_head, group)
    shard.check(whole)
    return shard


def pack_match(match: Match, number: int) -> list[object]:
    """A match under the number by which the daemon knows it, without its tokens."""
    numbers, counts = array("q", (n for n, _ in match.blocks)), array("I", (used for _, used in match.blocks))
    tiers, miss = bytes(map(TIERS.index, match.tiers)), match.miss
    why = [miss.kind, miss.position, miss.text, miss.field]
    lacking, origins = array("I", match.lacking).tobytes(), dict.fromkeys(match.origins)
    places = {origin: place for place, origin in enumerate(origins)}
    of_blocks = array("I", map(places.__getitem__, match.origins)).tobytes()
    made = [list(map(list, origins)), of_blocks]
    return [number, match.tokens, match.skipped, numbers.tobytes(), counts.tobytes(), tiers, why, lacking, made]


def match_fields(
    packed: Any,
) -> tuple[int, int, int, list[tuple[int, int]], list[str], Miss, array[int], list[Origin]]:
    """Number, tokens, skipped tokens, blocks, tiers, miss, what is lacking, and origins, of a packed match."""
    number, tokens, skipped, numbers, counts, tiers, why, lacking, (made, of_blocks) = packed
    blocks, known = list(zip(_ints("q", numbers), _ints("I", counts), strict=True)), [Origin(*each) for each in made]
    origins = [known[place] for place in _ints("I", of_blocks)]
    return number, tokens, skipped, blocks, [TIERS[tier] for tier in tiers], Miss(*why), _ints("I", lacking), origins


def _ints(code: str, data: bytes) -> array[int]:
    values = array(code)
    values.frombytes(data)
    return values


def pack_prospect(prospect: Prospect) -> list[object]:
    """What loading would take."""
    rows = [[[p.tokens, TIERS.index(p.tier), p.bytes] for p in row] for row in prospect.rows]
    line = None if prospect.disk is None else list(prospect.disk)
    steps = [list(step) for step in prospect.steps]
    remote = None if prospect.remote is None else list(prospect.remote)
    own = [rows, line, prospect.queued, steps, prospect.token_bytes, prospect.layers]
    return [*own, remote, prospect.remote_queued]


def prospect_of(packed: Any) -> Prospect:
    """The prospect that ``pack_prospect`` packed."""
    rows, line, queued, steps, token_bytes, layers, remote, remote_queued = packed
    portions = [[Portion(tokens, TIERS[tier], size) for tokens, tier, size in row] for row in rows]
    disk, others = (None if each is None else Line(*each) for each in (line, remote))
    spans = [(first, last) for first, last in steps]
    return Prospect(portions, disk, queued, spans, token_bytes, layers, others, remote_queued)


def pack_composition(composition: Composition) -> list[object]:
    """A prompt in parts. Contexts are packed by their roots: a store that discovers knows no more of them."""
    parts: list[object] = []
    for part in composition.parts:
        if isinstance(part, Text):
            parts.append([part.token_ids, part.position])
        else:
            chain = part.chain
            parts.append([chain.token_ids, part.position, chain.context.known, part.start, part.stop])
    return [parts, composition.mark]


def composition_of(packed: Any) -> Composition:
    """The composition that ``pack_composition`` packed."""
    parts: list[Part] = []
    for part in packed[0]:
        if len(part) == 2:
            parts.append(Text(*part))
        else:
            tokens, position, known, start, stop = part
            parts.append(Placement(Chain(tokens, Context(known=known)), start, stop, position))
    return Composition(tuple(parts), packed[1])


def _read(packed: bytes, make: Callable[[Any], T]) -> T:
    try:
        if not few(packed, MOST):
            raise ValueError(f"it has more than {MOST} values, or ends too soon")
        return make(msgpack.unpackb(packed))
    except (ValueError, TypeError, LookupError, msgpack.exceptions.UnpackException) as error:
        raise BadInput(f"what was sent cannot be read: {error}") from error


def checked(values: object, kinds: Sequence[Any]) -> Sequence[Any]:
    """The arguments of a request, each of one of the types wanted of it. Whole numbers are never below 0."""
    if not isinstance(values, list):
        raise BadInput(f"a list is wanted, not a {type(values).__name__}")
    if len(values) != len(kinds):
        raise BadInput(f"{len(kinds)} arguments are wanted, not {len(values)}")
    for place, (value, kind) in enumerate(zip(values, kinds, strict=True)):
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            raise BadInput(f"argument {place} cannot be a {type(value).__name__}")
        if kind is int and not 0 <= value < 1 << 63:
            raise BadInput(f"argument {place} cannot be {value}")
    return values
