"""The Triton kernel of ``rope_gpu``: from raw addresses to raw addresses, in one pass.

A program moves some tokens of one run, keys or values, of one head or several. Annotations are Triton's own.
"""

import triton
import triton.language as tl

from kvstore.tensors.runs import COLUMN, KEYS, POSITION, STRIDE, TOKEN, TOKENS, VALUES

_COLUMNS = tl.constexpr(7)
_KEYS, _VALUES, _STRIDE = tl.constexpr(KEYS), tl.constexpr(VALUES), tl.constexpr(STRIDE)
_TOKEN, _TOKENS = tl.constexpr(TOKEN), tl.constexpr(TOKENS)
_POSITION, _COLUMN = tl.constexpr(POSITION), tl.constexpr(COLUMN)
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def _wide(bits: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """The numbers that the integers ``bits`` hold, as float32."""
    if KIND == "bfloat16":
        # Not by a cast: the compiler would see that both operands were bfloat16 and compute in it, which rounds the
        # smallest numbers once where torch rounds them twice.
        return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif KIND == "float16":
        return bits.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def _narrow(number: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """The bits of float32 numbers, rounded to nearest even."""
    if KIND == "bfloat16":
        if _INTERPRETED:  # its cast cuts off
            bits = number.to(tl.int32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            return tl.where(number != number, 0x7FC0, rounded).to(tl.int16)
        else:
            return number.to(tl.bfloat16).to(tl.int16, bitcast=True)
    elif KIND == "float16":
        return number.to(tl.float16).to(tl.int16, bitcast=True)
    else:
        return number.to(tl.int32, bitcast=True)


@triton.jit
def _product(one: tl.tensor, other: tl.tensor, TABLE: tl.constexpr) -> tl.tensor:
    """A product in float32; rounded as the keys are if the tables have their kind."""
    return _wide(_narrow(one * other, TABLE), TABLE)


@triton.jit
def _copied(source: tl.tensor, target: tl.tensor, live: tl.tensor, BEGIN: tl.constexpr, END: tl.constexpr) -> None:
    """Dims ``BEGIN`` to ``END`` of rows: ``source`` and ``target`` are pointers to their starts."""
    if BEGIN < END:
        dims = BEGIN + tl.arange(0, triton.next_power_of_2(END - BEGIN))
        mask = live[:, None] & (dims < END)[None, :]
        numbers = tl.load(source[:, None] + dims[None, :], mask=mask)
        tl.store(target[:, None] + dims[None, :], numbers, mask=mask)


@triton.jit
def _turned(
    source: tl.tensor,
    target: tl.tensor,
    live: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    FIRST: tl.constexpr,
    PAIRS: tl.constexpr,
    PAIRED: tl.constexpr,
    KIND: tl.constexpr,
    TABLE: tl.constexpr,
    WORD: tl.constexpr,
) -> None:
    """The dims of rows that turn. ``cos`` and ``sin`` are tiles of float32; the rest as for ``_copied``."""
    pairs = tl.arange(0, triton.next_power_of_2(PAIRS))
    mask = live[:, None] & (pairs < PAIRS)[None, :]
    TWO_WORDS: tl.constexpr = tl.int64 if WORD.primitive_bitwidth == 32 else tl.int32
    if PAIRED == "words":
        SHIFT: tl.constexpr = WORD.primitive_bitwidth
        words = source.to(tl.pointer_type(TWO_WORDS), bitcast=True)[:, None] + (FIRST // 2 + pairs)[None, :]
        both = tl.load(words, mask=mask, other=0)
        x, y = both.to(WORD), (both >> SHIFT).to(WORD)
    else:
        STEP: tl.constexpr = 1 if PAIRED == "half" else 2
        GAP: tl.constexpr = PAIRS if PAIRED == "half" else 1
        dims = FIRST + pairs * STEP
        x = tl.load(source[:, None] + dims[None, :], mask=mask, other=0)
        y = tl.load(source[:, None] + (dims + GAP)[None, :], mask=mask, other=0)
    x, y = _wide(x, KIND), _wide(y, KIND)
    one = _narrow(_product(x, cos, TABLE) - _product(y, sin, TABLE), KIND)
    two = _narrow(_product(y, cos, TABLE) + _product(x, sin, TABLE), KIND)
    if PAIRED == "words":
        ONES: tl.constexpr = (1 << SHIFT) - 1
        both = (two.to(TWO_WORDS) << SHIFT) | (one.to(TWO_WORDS) & ONES)
        words = target.to(tl.pointer_type(TWO_WORDS), bitcast=True)[:, None] + (FIRST // 2 + pairs)[None, :]
        tl.store(words, both, mask=mask)
    else:
        tl.store(target[:, None] + dims[None, :], one, mask=mask)
        tl.store(target[:, None] + (dims + GAP)[None, :], two, mask=mask)


@triton.jit
def _table(
    address: tl.tensor,
    position: tl.tensor,
    rows: tl.tensor,
    live: tl.tensor,
    PAIRS: tl.constexpr,
    TABLE: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tl.tensor:
    """Rows of cos or sin, as float32; nothing when nothing turns."""
    if PAIRS:
        WORD: tl.constexpr = tl.int32 if TABLE == "float32" else tl.int16
        start = (address + position * (PAIRS * WORD.primitive_bitwidth // 8)).to(tl.pointer_type(WORD))
        pairs = tl.arange(0, triton.next_power_of_2(PAIRS))
        numbers = tl.multiple_of(start, ALIGNED) + rows[:, None] * PAIRS + pairs[None, :]
        return _wide(tl.load(numbers, mask=live[:, None] & (pairs < PAIRS)[None, :], other=0), TABLE)
    else:
        return 0.0


@triton.jit
def _rows(address: tl.tensor, steps: tl.tensor, WORD: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tensor:
    """Pointers to the starts of rows, at ``steps`` bytes from an address."""
    return tl.multiple_of((address + steps).to(tl.pointer_type(WORD)), ALIGNED)


@triton.jit
def _steps(
    pages: tl.tensor,
    columns: tl.tensor,
    live: tl.tensor,
    row_step: tl.tensor,
    page_step: tl.tensor,
    PAGE_TOKENS: tl.constexpr,
) -> tl.tensor:
    """Bytes from the first row of a head to those of ``columns``."""
    if PAGE_TOKENS:
        page = tl.load(pages.to(tl.pointer_type(tl.int64)) + columns // PAGE_TOKENS, mask=live, other=0)
        return page * page_step + columns % PAGE_TOKENS * row_step
    else:
        return columns * row_step


@triton.jit
def _run(runs: tl.tensor, number: tl.tensor, side: tl.tensor, start: tl.tensor) -> tl.tuple:
    """One run, from its token ``start`` on; of the addresses, the one of the side. All is asked for at once."""
    run = runs.to(tl.pointer_type(tl.int64)) + number.to(tl.int64) * _COLUMNS
    source, stride = tl.load(run + _KEYS + side * (_VALUES - _KEYS)), tl.load(run + _STRIDE)
    token, tokens = tl.load(run + _TOKEN) + start, tl.load(run + _TOKENS) - start
    return source, stride, token, tokens, tl.load(run + _POSITION) + start, tl.load(run + _COLUMN) + start


@triton.jit(do_not_specialize=range(16))  # all but the constants: no size of a load is worth seconds of compiling
def move(
    runs: tl.int64,
    cos: tl.int64,
    sin: tl.int64,
    keys: tl.int64,
    values: tl.int64,
    pages: tl.int64,
    chunks: tl.int32,
    groups: tl.int32,
    heads_each: tl.int32,
    heads: tl.int32,
    key_head: tl.int64,
    key_row: tl.int64,
    key_page: tl.int64,
    value_head: tl.int64,
    value_row: tl.int64,
    value_page: tl.int64,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    WORD: tl.constexpr,
    ALIGNED: tl.constexpr,
    FIRST: tl.constexpr,
    PAIRS: tl.constexpr,
    PAIRED: tl.constexpr,
    KIND: tl.constexpr,
    TABLE: tl.constexpr,
    TABLES_ALIGNED: tl.constexpr,
) -> None:
    """All runs of a layer. Neighbouring programs have neighbouring tokens, then heads, then values after keys."""
    program = tl.program_id(0)
    start = (program % chunks) * TILE
    side = program // (chunks * groups) % 2
    source, stride, token, tokens, position, column = _run(runs, program // (chunks * groups * 2), side, start)
    if tokens <= 0:
        return
    rows = tl.arange(0, TILE)
    live = rows < tokens
    first = (program // chunks % groups * heads_each).to(tl.int64)
    last = tl.minimum(first + heads_each, heads)
    if side == 0:
        cosines = _table(cos, position, rows, live, PAIRS, TABLE, TABLES_ALIGNED)
        sines = _table(sin, position, rows, live, PAIRS, TABLE, TABLES_ALIGNED)
        steps = _steps(pages, column + rows, live, key_row, key_page, PAGE_TOKENS)
        for head in range(first, last):
            of = _rows(source, (head * stride + token + rows) * (KEY_DIM * WORD.primitive_bitwidth // 8), WORD, ALIGNED)
            to = _rows(keys + head * key_head, steps, WORD, ALIGNED)
            if PAIRS:
                _turned(of, to, live, cosines, sines, FIRST, PAIRS, PAIRED, KIND, TABLE, WORD)
            _copied(of, to, live, 0, FIRST)
            _copied(of, to, live, FIRST + 2 * PAIRS, KEY_DIM)
    else:
        steps = _steps(pages, column + rows, live, value_row, value_page, PAGE_TOKENS)
        for head in range(first, last):
            of = _rows(
                source, (head * stride + token + rows) * (VALUE_DIM * WORD.primitive_bitwidth // 8), WORD, ALIGNED
            )
            to = _rows(values + head * value_head, steps, WORD, ALIGNED)
            _copied(of, to, live, 0, VALUE_DIM)
