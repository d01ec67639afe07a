"""Comparing what a caller says was generated with what the recorder saw the model read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvstore.adapters.transformers.hit import sequences_of
from kvstore.adapters.transformers.recorder import Recorder
from kvstore.errors import BadInput


def agreed_tokens(number: int, out: Sequence[int], columns: Sequence[bool], recorded: Sequence[int]) -> int:
    """How many of the ``recorded`` tokens row ``number`` of the output confirms; refuses it when one differs.

    ``out`` may be laid out as the model was given it (``columns`` says which of its columns are tokens) or hold the
    tokens alone. It may go on behind what was recorded (the last generated token was never read), or stop before.
    """
    laid_out = [token for token, valid in zip(out, columns, strict=False) if valid] + list(out[len(columns) :])
    best = 0
    for candidate in (laid_out, list(out)):
        size = min(len(candidate), len(recorded))
        equal = _common(candidate, recorded)
        if equal == size:
            return size
        best = max(best, equal)
    raise BadInput(
        f"row {number} of the output differs at token {best} from what the model read with this cache; nothing was "
        "saved: give the output that was generated with this hit"
    )


def agreed_rows(out: Any, recorder: Recorder, ends: Sequence[int], padding: int | None) -> list[int]:
    """How many tokens of each row's chain the output confirms, as ``generate`` returns it. Raises ``BadInput``."""
    sequences = sequences_of(out)
    if not sequences or len(sequences) % len(recorder.rows):
        raise BadInput(f"the output has {len(sequences)} rows, the cache {len(recorder.rows)}")
    each = len(sequences) // len(recorder.rows)
    agreed = []
    for number, row in enumerate(recorder.rows):
        ids = without_trailing_padding(sequences[number * each], ends, padding)
        read = [*row.seat.before, *row.ids[row.seat.first :]]
        tokens = agreed_tokens(number, ids, recorder.columns[number].tolist(), read)
        agreed.append(max(0, tokens - len(row.seat.before) + row.seat.first))
    return agreed


def without_trailing_padding(out: Sequence[int], ends: Sequence[int], padding: int | None) -> list[int]:
    """A finished row without the padding that ``generate`` puts behind its end-of-sequence token."""
    stop = len(out)
    while stop > 1 and out[stop - 1] == padding and (out[stop - 2] in ends or out[stop - 2] == padding):
        stop -= 1
    return list(out[:stop]) if stop and out[stop - 1] in ends else list(out)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))
