"""Loops over one head of one page, compiled: rows of a block from or to the tokens of a page, however it is ordered.

Only for ``pages_cpu``. ``tiles`` gives the code for what is moved at once.
"""

from __future__ import annotations

from typing import Any

from numba import njit, types
from numba.extending import intrinsic

from kvstore.tensors import tiles
from kvstore.tensors.lanes import AHEAD, LINE
from kvstore.tensors.paging import COLUMNS, ROWS, UNITS, WORD, ZIPPED
from kvstore.tensors.rope_cpu import copy, prefetch
from kvstore.tensors.tiles import PART

PLACES = [types.int64] * 4


@intrinsic(prefer_literal=True)
def transpose(
    context: Any, unit: Any, parts: Any, past: Any, source: Any, source_step: Any, target: Any, target_step: Any
) -> Any:
    """``tiles.transpose``."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> None:
        tiles.transpose(builder, unit.literal_value, parts.literal_value, bool(past.literal_value), args[3:])

    return types.void(unit, parts, past, *PLACES), emit


@intrinsic(prefer_literal=True)
def zip_rows(context: Any, item: Any, past: Any, source: Any, step: Any, target: Any) -> Any:
    """``tiles.zip_rows``."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> None:
        tiles.zip_rows(builder, item.literal_value, bool(past.literal_value), *args[2:])

    return types.void(item, past, *PLACES[1:]), emit


@intrinsic(prefer_literal=True)
def unzip_rows(context: Any, item: Any, source: Any, target: Any, step: Any) -> Any:
    """``tiles.unzip_rows``."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> None:
        tiles.unzip_rows(builder, item.literal_value, *args[1:])

    return types.void(item, *PLACES[1:]), emit


@intrinsic(prefer_literal=True)
def move_unit(context: Any, unit: Any, target: Any, source: Any) -> Any:
    """``tiles.move_unit``."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> None:
        tiles.move_unit(builder, unit.literal_value, *args[1:])

    return types.void(unit, *PLACES[2:]), emit


def scatter_for(unit: int, take: bool) -> Any:
    """What moves units ``first`` to ``last`` of ``rows`` rows, one by one, where ``page`` is of the first token."""

    @njit(nogil=True)
    def scatter(side: Any, dims: Any, rows_at: int, rows: int, page: int, first: int, last: int) -> None:
        for i in range(rows):
            at, row = page + i * unit, rows_at + i * side.row
            for d in range(first, last):
                if take:
                    move_unit(unit, row + d * unit, at + dims[d])
                else:
                    move_unit(unit, at + dims[d], row + d * unit)

    return scatter


def put_columns_for(unit: int) -> Any:
    """What makes columns of rows: tokens that lie one behind the other in the page, ``unit`` bytes of each."""
    part, scatter = PART // unit, scatter_for(unit, False)

    @njit(nogil=True)
    def put(side: Any, dims: Any, rows_at: int, rows: int, page: int, streams: bool) -> None:
        whole, row, step, done = dims.size // part * part, side.row, side.step, 0
        past = streams and page % LINE == 0 and step % LINE == 0
        while done + 4 * part <= rows:
            for d in range(0, whole, part):
                at, to = rows_at + done * row + d * unit, page + done * unit + d * step
                if past:
                    for line in range(0, 4 * part * PART, LINE):
                        prefetch(rows_at + done * row + d * 4 * PART + line)
                    transpose(unit, 4, True, at, row, to, step)
                else:
                    transpose(unit, 4, False, at, row, to, step)
            done += 4 * part
        if done + 2 * part <= rows:
            at, to = rows_at + done * row, page + done * unit
            past = streams and to % LINE == 0 and step == 2 * PART
            for d in range(0, whole, part):
                if past:
                    for line in range(0, 2 * part * PART, LINE):
                        prefetch(at + d * 2 * PART + line)
                    transpose(unit, 2, True, at + d * unit, row, to + d * step, step)
                else:
                    transpose(unit, 2, False, at + d * unit, row, to + d * step, step)
            done += 2 * part
        if done + part <= rows:
            for d in range(0, whole, part):
                transpose(unit, 1, False, rows_at + done * row + d * unit, row, page + done * unit + d * step, step)
            done += part
        scatter(side, dims, rows_at, done, page, whole, dims.size)
        scatter(side, dims, rows_at + done * row, rows - done, page + done * unit, 0, dims.size)

    return put


def take_columns_for(unit: int) -> Any:
    """What makes rows of columns."""
    part, scatter = PART // unit, scatter_for(unit, True)

    @njit(nogil=True)
    def take(side: Any, dims: Any, rows_at: int, rows: int, page: int, streams: bool) -> None:
        whole, row, step, d = rows // part * part, side.row, side.step, 0
        past = streams and rows_at % LINE == 0 and row % LINE == 0
        ahead = max(4 * part * step, AHEAD) - AHEAD  # beyond the columns that a group of tiles reads at once
        while d + 4 * part <= dims.size:
            for t in range(0, whole, part):
                at, to = page + t * unit + d * step, rows_at + t * row + d * unit
                if past:
                    for line in range(0, 4 * part * PART, LINE):
                        prefetch(page + d * step + ahead + t * 4 * PART + line)
                    transpose(unit, 4, True, at, step, to, row)
                else:
                    transpose(unit, 4, False, at, step, to, row)
            d += 4 * part
        while d + part <= dims.size:
            for t in range(0, whole, part):
                transpose(unit, 1, False, page + t * unit + d * step, step, rows_at + t * row + d * unit, row)
            d += part
        scatter(side, dims, rows_at, whole, page, d, dims.size)
        scatter(side, dims, rows_at + whole * row, rows - whole, page + whole * unit, 0, dims.size)

    return take


def columns_for(unit: int, take: bool) -> Any:
    """What moves rows from token ``inside`` on, of a page whose head begins at ``page``; or such that are scattered."""
    columns, scatter = take_columns_for(unit) if take else put_columns_for(unit), scatter_for(unit, take)

    @njit(nogil=True)
    def move(side: Any, tokens: Any, dims: Any, rows_at: int, rows: int, page: int, inside: int, streams: bool) -> None:
        end = inside + rows
        while inside < end:
            size = min(end - inside, side.stretch - inside % side.stretch)
            if side.mode == COLUMNS:
                columns(side, dims, rows_at, size, page + tokens[inside], streams)
            else:
                scatter(side, dims, rows_at, size, page + tokens[inside], 0, dims.size)
            inside, rows_at = inside + size, rows_at + size * side.row

    return move


def zipped_for(item: int, take: bool) -> Any:
    """The same, where as many tokens as have room in a word share it."""
    group, scatter = WORD // item, scatter_for(item, take)

    @njit(nogil=True)
    def move(side: Any, tokens: Any, dims: Any, rows_at: int, rows: int, page: int, inside: int, streams: bool) -> None:
        end = inside + rows
        while inside < end:
            size, place = 1, page + tokens[inside]
            if inside % group == 0 and inside + group <= end:
                size = group
                for d in range(0, dims.size, LINE // WORD):
                    row, at = rows_at + d * item, place + dims[d]
                    if take:
                        unzip_rows(item, at, row, side.row)
                    elif streams and at % LINE == 0:
                        zip_rows(item, True, row, side.row, at)
                    else:
                        zip_rows(item, False, row, side.row, at)
            else:
                scatter(side, dims, rows_at, 1, place, 0, dims.size)
            inside, rows_at = inside + size, rows_at + size * side.row

    return move


@njit(nogil=True)
def copy_runs(
    side: Any, tokens: Any, rows_at: int, rows: int, page: int, inside: int, streams: bool, take: bool
) -> None:
    """Rows that are rows in the page too; those that follow each other there go at once."""
    end = inside + rows
    while inside < end:
        size = 1
        while inside + size < end and tokens[inside + size] == tokens[inside + size - 1] + side.row:
            size += 1
        at = page + tokens[inside]
        if take:
            copy(rows_at, at, size * side.row, streams)
        else:
            copy(at, rows_at, size * side.row, streams)
        inside, rows_at = inside + size, rows_at + size * side.row


def move_for(take: bool) -> Any:
    """What moves ``rows`` rows at ``rows_at`` to, or from, token ``inside`` and after of the head at ``page``."""
    one, two, four = (columns_for(unit, take) for unit in UNITS)
    bytes_zipped, halves_zipped = (zipped_for(item, take) for item in (1, 2))

    @njit(nogil=True)
    def move(side: Any, tokens: Any, dims: Any, rows_at: int, rows: int, page: int, inside: int, streams: bool) -> None:
        if side.mode == ROWS:
            copy_runs(side, tokens, rows_at, rows, page, inside, streams, take)
        elif side.mode == ZIPPED and side.unit == 1:
            bytes_zipped(side, tokens, dims, rows_at, rows, page, inside, streams)
        elif side.mode == ZIPPED:
            halves_zipped(side, tokens, dims, rows_at, rows, page, inside, streams)
        elif side.unit == 1:
            one(side, tokens, dims, rows_at, rows, page, inside, streams)
        elif side.unit == 2:
            two(side, tokens, dims, rows_at, rows, page, inside, streams)
        else:
            four(side, tokens, dims, rows_at, rows, page, inside, streams)

    return move


put_rows, take_rows = move_for(take=False), move_for(take=True)
