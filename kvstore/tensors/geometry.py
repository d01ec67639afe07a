"""How a transfer is put to a compiled kernel: its form, for which a kernel is compiled, and its numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# A form is a dtype of keys, with what applies added. NO_TURN stands alone: bytes are copied, whatever they are.
BFLOAT16, FLOAT16, FLOAT32 = range(3)
INTERLEAVED, ROUNDED, NO_TURN = 4, 8, 16
PAST_CACHES = 32  # only inside kernels: this vector goes straight to memory


class Geometry(NamedTuple):
    """Where one layer goes and what its keys are turned by. Addresses, and steps and sizes in bytes, but for counts.

    A head-major target is one page that holds all columns.
    """

    keys: int
    key_page: int  # step from page to page
    key_head: int
    key_column: int
    key_bytes: int  # of one head of one token
    values: int
    value_page: int
    value_head: int
    value_column: int
    value_bytes: int
    heads: int  # count
    page: int  # count of columns
    pages: int  # count
    first: int  # count of dims before those that turn
    pairs: int  # count
    cos: int
    sin: int
    positions: int  # count of rows of the tables
    stream_from: int  # size of a layer from which on it is written past the caches


# Takes the runs, the pages and the geometry. Returns -1, or the number of the first run that is out of bounds; then
# nothing was written.
Kernel = Callable[[np.ndarray, np.ndarray, Geometry], int]
