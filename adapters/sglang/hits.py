"""How much of a prefix can be restored, when several pools must have what belongs to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

ALL, TRAILING, GROUPS = "all_pages", "trailing_pages", "block_groups"  # as SGLang names its hit policies
Present = Callable[[str, Sequence[object]], Sequence[bool]]  # of a pool: which of these pages are stored


def restorable(keys: Sequence[object], kv: int, transfers: Sequence[Any], present: Present) -> tuple[list[int], Any]:
    """Which lengths of the prefix can be restored, ascending, where ``kv`` pages of it are stored; and by pool, how far
    it goes. ``transfers``: SGLang's ``PoolTransfer`` of each pool beside."""
    lengths, hits = list(range(1, kv + 1)), dict[Any, int]()
    for transfer in transfers:
        name, policy = named(transfer.name), named(transfer.hit_policy)
        if policy == GROUPS:
            hits[transfer.name] = _groups(keys, transfer, partial(present, name))
            continue
        if not lengths:
            continue
        found = present(name, keys[:kv])
        if policy == ALL:
            good = list(range(1, _leading(found) + 1))
        elif policy == TRAILING:
            good = _ends(found, max(1, len(transfer.keys or ())))
        else:
            raise ValueError(f"{policy!r} is no hit policy that is known here")
        if good:
            hits[transfer.name] = good[-1]
        lengths = sorted(set(lengths) & set(good))
    return lengths, hits


def named(name: Any) -> str:
    """The text of a member of SGLang's enumerations, or of a plain name."""
    return str(getattr(name, "value", name))


def _leading(found: Sequence[bool]) -> int:
    return list(found).index(False) if not all(found) else len(found)


def _ends(found: Sequence[bool], window: int) -> list[int]:
    """The lengths before which the last ``window`` pages, or all that there are, are stored."""
    good, run = list[int](), 0
    for length, there in enumerate(found, 1):
        run = run + 1 if there else 0
        if run >= min(window, length):
            good.append(length)
    return good


def _groups(keys: Sequence[object], transfer: Any, present: Callable[[Sequence[object]], Sequence[bool]]) -> int:
    """Pages that whole groups cover, from the start. Each stands for a block of ``block_pages`` pages, and its keys are
    the transfer's own, or else those of the block's last pages."""
    block, group = int(transfer.block_pages), int(transfer.group_pages)
    if not 0 < group <= block:
        raise ValueError(f"blocks of {block} pages cannot have groups of {group}")
    blocks = [keys[end - group : end] for end in range(block, len(keys) + 1, block)]
    if transfer.keys:
        own = transfer.keys
        blocks = [own[start : start + group] for start in range(0, len(own) - group + 1, group)][: len(blocks)]
    found = present([key for each in blocks for key in each])
    return _leading([all(found[start : start + group]) for start in range(0, len(found), group)]) * block
