"""How a move between blocks and pages is put to a compiled kernel: how an engine's memory is ordered, in numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# How one head of one page is ordered, as far as something can be moved at once.
ROWS = 0  # the dims of a token lie together, in order
COLUMNS = 1  # units of a token lie ``step`` apart, and beside each the same unit of the next token
ZIPPED = 2  # so many tokens that their items fill a word have them side by side, and word follows word over 16 dims
SCATTERED = 3  # none of these: item by item
WORD = 4  # bytes
ZIP = 16  # dims: words that fill a line of the caches
UNITS = (1, 2, 4)  # bytes
STAGE = 8192  # bytes: keys that are turned before they are put
TAKE = 64  # a form of kernel, as those of ``geometry``: from pages to blocks, nothing turns


class Side(NamedTuple):
    """Keys or values: address of page 0 and its head 0, and steps and sizes in bytes; ``stretch`` counts tokens."""

    address: int
    page: int  # step from page to page
    head: int
    row: int  # size of one token of a head
    mode: int
    unit: int  # bytes of a token that always lie together
    step: int  # from unit to unit, if that is the same for all
    stretch: int  # groups of so many tokens, counted from the page's first, lie one behind the other


class Paging(NamedTuple):
    """What else there is to know of a move."""

    heads: int
    page: int  # count of tokens
    pages: int  # count
    first: int  # count of dims before those that turn
    pairs: int
    cos: int  # address
    sin: int
    positions: int  # count of rows of the tables
    angles: int  # step from row to row of the tables
    turner: int  # address of what turns keys, which a kernel knows; 0: they stay as they are
    batch: int  # count of keys that are turned at a time, a power of two
    stream_from: int  # size of a move from which on it is written past the caches


# Takes the runs, the pages of their columns and the numbers; of keys and then of values, the side and where each token
# and each unit lies in a page. Returns -1, or the number of the first run that is out of bounds: nothing was moved.
PagingKernel = Callable[
    [np.ndarray, np.ndarray, Paging, Side, np.ndarray, np.ndarray, Side, np.ndarray, np.ndarray], int
]


def ordered(tokens: np.ndarray, dims: np.ndarray, item: int) -> tuple[int, int, int, int]:
    """Mode, unit, step and stretch of a page whose tokens and dims lie so, in bytes; ``item`` is the size of one."""
    if _even(dims, item):
        return ROWS, item, item, 1
    group = WORD // item
    if group > 1 and _stretch(tokens, item) >= group and dims.size % (ZIP) == 0:
        lines = dims.reshape(-1, ZIP)
        if all(_even(line, WORD) for line in lines) and tokens.size % group == 0:
            return ZIPPED, item, WORD, group
    unit = item
    while unit < UNITS[-1] and dims.size % (2 * unit // item) == 0 and _even_groups(dims, 2 * unit // item, item):
        unit *= 2
    starts = dims[:: unit // item]
    step = int(starts[1] - starts[0]) if starts.size > 1 else unit
    stretch = _stretch(tokens, unit)
    if unit in UNITS and _even(starts, step) and stretch > 1:
        return COLUMNS, unit, step, stretch
    return SCATTERED, item, 0, 1


def _even(offsets: np.ndarray, step: int) -> bool:
    return bool((np.diff(offsets) == step).all())


def _even_groups(offsets: np.ndarray, size: int, step: int) -> bool:
    """Whether groups of ``size`` are ``step`` apart, each in itself."""
    return bool((np.diff(offsets.reshape(-1, size), axis=1) == step).all())


def _stretch(tokens: np.ndarray, unit: int) -> int:
    """The most tokens, a power of two of them or all, of which every group lies one behind the other."""
    if _even(tokens, unit):
        return int(tokens.size)
    size = 1
    while tokens.size % (2 * size) == 0 and _even_groups(tokens, 2 * size, unit):
        size *= 2
    return size
