"""The Triton kernels of ``fused_gpu``: attention over weighted sums of sources, which exist a tile at a time only.

A program has some rows of one kv head, that is query tokens by query heads, heads running faster; so each source is
read once for all query heads. Addresses, and strides in bytes, are integers. Annotations are Triton's own.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def _narrow(number: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """float32 numbers, rounded to nearest even."""
    if _INTERPRETED and KIND == tl.bfloat16:  # its cast cuts off
        bits = number.to(tl.int32, bitcast=True)
        number = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return number.to(KIND)


@triton.jit
def _product(one: tl.tensor, other: tl.tensor, before: tl.tensor) -> tl.tensor:
    """``before + one @ other`` in float32."""
    if _INTERPRETED:  # it would take the bits of bfloat16 for integers
        one, other = one.to(tl.float32), other.to(tl.float32)
    return tl.dot(one, other, before, input_precision="ieee")


@triton.jit
def _dims(DIM: tl.constexpr) -> tl.tensor:
    """Channels, as many as products of matrices need."""
    return tl.arange(0, max(16, triton.next_power_of_2(DIM)))


@triton.jit
def _rows(address: tl.tensor, steps: tl.tensor, KIND: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tensor:
    """Pointers to the starts of rows, at ``steps`` bytes from an address."""
    return tl.multiple_of((address + steps).to(tl.pointer_type(KIND)), ALIGNED)


@triton.jit
def _weight(
    start: tl.tensor, source: tl.constexpr, step: tl.tensor, live: tl.tensor, SOURCES: tl.constexpr
) -> tl.tensor:
    """Of one source, [1, dim], ``source`` steps behind pointers; of a source that is not there, nothing."""
    if source < SOURCES:
        return tl.load(start + source * step, mask=live, other=0)[None, :]
    else:
        return 0.0


@triton.jit
def _weights(
    address: tl.tensor, head: tl.tensor, heads: tl.tensor, DIM: tl.constexpr, SOURCES: tl.constexpr
) -> tl.tuple:
    """Of all sources, four at most, for one kv head. ``address``: of [sources, kv heads, dim] of float32."""
    dims = _dims(DIM)
    start, step, live = address.to(tl.pointer_type(tl.float32)) + head * DIM + dims, heads * DIM, dims < DIM
    one, two = _weight(start, 0, step, live, SOURCES), _weight(start, 1, step, live, SOURCES)
    return one, two, _weight(start, 2, step, live, SOURCES), _weight(start, 3, step, live, SOURCES)


@triton.jit
def _state(
    address: tl.tensor,
    steps: tl.tensor,
    live: tl.tensor,
    DIM: tl.constexpr,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tl.tensor:
    """Some rows, [rows, dim]: zero where they are not live, and behind their ``DIM`` numbers."""
    dims = _dims(DIM)
    rows = _rows(address, steps, KIND, ALIGNED)[:, None] + dims[None, :]
    return tl.load(rows, mask=live[:, None] & (dims < DIM)[None, :], other=0)


@triton.jit
def _summed(
    sources: tl.tuple,
    weights: tl.tuple,
    steps: tl.tensor,
    live: tl.tensor,
    DIM: tl.constexpr,
    SOURCES: tl.constexpr,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tl.tensor:
    """The weighted sum of a tile of each source; rounded once, to their kind."""
    made = _state(sources[0], steps, live, DIM, KIND, ALIGNED).to(tl.float32) * weights[0]
    if SOURCES > 1:
        made += _state(sources[1], steps, live, DIM, KIND, ALIGNED).to(tl.float32) * weights[1]
    if SOURCES > 2:
        made += _state(sources[2], steps, live, DIM, KIND, ALIGNED).to(tl.float32) * weights[2]
    if SOURCES > 3:
        made += _state(sources[3], steps, live, DIM, KIND, ALIGNED).to(tl.float32) * weights[3]
    return _narrow(made, KIND)


@triton.jit
def _masked(
    scores: tl.tensor, mask: tl.tuple, token: tl.tensor, columns: tl.tensor, size: tl.tuple, MASK: tl.constexpr
) -> tl.tensor:
    """Scores [rows, columns] with -inf where a row does not see a column.

    ``mask``: this sequence's address, and its steps from token to token and from column to column. ``size``: counts of
    tokens and of columns.
    """
    tokens, context = size[0], size[1]
    inside = (columns < context)[None, :] & (token < tokens)[:, None]
    if MASK == "causal":
        shown = inside & (columns[None, :] <= (token + context - tokens)[:, None])
        return tl.where(shown, scores, -float("inf"))
    else:
        places = mask[0] + token[:, None] * mask[1] + columns[None, :] * mask[2]
        if MASK == "bool":
            shown = tl.load(places.to(tl.pointer_type(tl.int8)), mask=inside, other=0)
            return tl.where(shown != 0, scores, -float("inf"))
        else:
            added = tl.load(places.to(tl.pointer_type(tl.float32)), mask=inside, other=-float("inf"))
            return scores + added * LOG2_E


@triton.jit
def _span(size: tl.tuple, ROWS: tl.constexpr, MASK: tl.constexpr) -> tl.tuple:
    """The columns that this program looks at: its split, but for what its last row does not see."""
    tokens, context, groups, split_tokens = size[0], size[1], size[2], size[3]
    begin = tl.program_id(2) * split_tokens
    end = tl.minimum(context, begin + split_tokens)
    if MASK == "causal":
        past = (tl.program_id(0) * ROWS + ROWS - 1) // groups + 1
        end = tl.minimum(end, context - tokens + tl.minimum(tokens, past))
    return begin, end


@triton.jit
def _attended(
    q: tl.tensor,
    keys: tl.tuple,
    key_weights: tl.tuple,
    values: tl.tuple,
    value_weights: tl.tuple,
    mask: tl.tuple,
    size: tl.tuple,
    scale: tl.tensor,
    DIMS: tl.constexpr,
    SOURCES: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASK: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tuple:
    """What rows find in this program's columns: an average, the highest score, and the sum of weights beside it.

    ``keys`` and ``values``: addresses of this kv head in each source, and the step from token to token. ``mask``: see
    ``_masked``. ``size``: counts of tokens, of columns, of query heads of this kv head, and of columns of a split.
    """
    ROWS: tl.constexpr = q.shape[0]
    KIND: tl.constexpr = q.dtype
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)) // size[2]
    highest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, _dims(DIMS[1]).shape[0]], tl.float32)
    begin, end = _span(size, ROWS, MASK)
    for start in range(begin, end, TILE):
        columns = start + tl.arange(0, TILE)
        live = columns < end
        k = _summed(keys, key_weights, columns * keys[4], live, DIMS[0], SOURCES[0], KIND, ALIGNED)
        scores = _product(q, tl.trans(k), tl.zeros([ROWS, TILE], tl.float32)) * scale
        scores = _masked(scores, mask, token, columns, size, MASK)
        top = tl.maximum(highest, tl.max(scores, 1))
        base = tl.where(top == -float("inf"), 0.0, top)  # of rows that see nothing yet, to take nothing from
        seen = tl.exp2(scores - base[:, None])
        fade = tl.exp2(highest - base)
        v = _summed(values, value_weights, columns * values[4], live, DIMS[1], SOURCES[1], KIND, ALIGNED)
        out = _product(_narrow(seen, KIND), v, out * fade[:, None])
        total, highest = total * fade + tl.sum(seen, 1), top
    total = tl.where(total == 0, 1.0, total)  # of rows that saw nothing
    return out / total[:, None], highest, total


@triton.jit
def _written(
    found: tl.tuple,
    made: tl.tensor,
    sums: tl.tensor,
    place: tl.tensor,
    there: tl.tensor,
    DIM: tl.constexpr,
    KIND: tl.constexpr,
    SPLIT: tl.constexpr,
) -> None:
    """What ``_attended`` found, to rows ``place``; of a split in float32, with the log2 of all that it weighs."""
    dims = _dims(DIM)
    targets = place[:, None] * DIM + dims[None, :]
    wanted = there[:, None] & (dims < DIM)[None, :]
    if SPLIT:
        tl.store(made.to(tl.pointer_type(tl.float32)) + targets, found[0], mask=wanted)
        tl.store(sums.to(tl.pointer_type(tl.float32)) + place, found[1] + tl.log2(found[2]), mask=there)
    else:
        tl.store(made.to(tl.pointer_type(KIND)) + targets, _narrow(found[0], KIND), mask=wanted)


@triton.jit(do_not_specialize=range(30))  # all but the constants: no length of a context is worth seconds of compiling
def attend(
    queries: tl.int64,
    k0: tl.int64,
    k1: tl.int64,
    k2: tl.int64,
    k3: tl.int64,
    v0: tl.int64,
    v1: tl.int64,
    v2: tl.int64,
    v3: tl.int64,
    key_weights: tl.int64,
    value_weights: tl.int64,
    mask: tl.int64,
    made: tl.int64,
    sums: tl.int64,
    key_batch: tl.int64,
    key_head: tl.int64,
    key_token: tl.int64,
    value_batch: tl.int64,
    value_head: tl.int64,
    value_token: tl.int64,
    mask_batch: tl.int64,
    mask_token: tl.int64,
    mask_column: tl.int64,
    batches: tl.int32,
    heads: tl.int32,
    groups: tl.int32,
    tokens: tl.int32,
    context: tl.int32,
    split_tokens: tl.int32,
    scale: tl.float32,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_SOURCES: tl.constexpr,
    VALUE_SOURCES: tl.constexpr,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASK: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Programs: tiles of rows, by sequences and kv heads, by splits of the context."""
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, own = rows // groups, head * groups + rows % groups
    steps = ((batch * heads * groups + own) * tokens + token) * (KEY_DIM * KIND.primitive_bitwidth // 8)
    q = _state(queries, steps, token < tokens, KEY_DIM, KIND, ALIGNED)
    key, value = batch * key_batch + head * key_head, batch * value_batch + head * value_head
    keys = k0 + key, k1 + key, k2 + key, k3 + key, key_token
    values = v0 + value, v1 + value, v2 + value, v3 + value, value_token
    a = _weights(key_weights, head, heads, KEY_DIM, KEY_SOURCES)
    b = _weights(value_weights, head, heads, VALUE_DIM, VALUE_SOURCES)
    seen, size = (mask + batch * mask_batch, mask_token, mask_column), (tokens, context, groups, split_tokens)
    DIMS: tl.constexpr = (KEY_DIM, VALUE_DIM)
    SOURCES: tl.constexpr = (KEY_SOURCES, VALUE_SOURCES)
    found = _attended(q, keys, a, values, b, seen, size, scale, DIMS, SOURCES, ALIGNED, MASK, TILE)
    place = (tl.program_id(2) * batches + batch) * tokens + token
    _written(found, made, sums, place * (heads * groups) + own, token < tokens, VALUE_DIM, KIND, SPLIT)


@triton.jit(do_not_specialize=range(5))
def combine(
    parts: tl.int64,
    sums: tl.int64,
    made: tl.int64,
    rows: tl.int64,
    splits: tl.int32,
    DIM: tl.constexpr,
    KIND: tl.constexpr,
) -> None:
    """One row of all splits: each part weighs as much as what it saw. ``sums``: log2 of that, [splits, rows]."""
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, triton.next_power_of_2(DIM))
    highest, total = -float("inf"), 0.0
    out = tl.zeros([dims.shape[0]], tl.float32)
    for split in range(splits):
        seen = tl.load(sums.to(tl.pointer_type(tl.float32)) + split * rows + row)
        top = tl.maximum(highest, seen)
        base = tl.where(top == -float("inf"), 0.0, top)
        fade, weight = tl.exp2(highest - base), tl.exp2(seen - base)
        start = parts.to(tl.pointer_type(tl.float32)) + (split * rows + row) * DIM
        out = out * fade + tl.load(start + dims, mask=dims < DIM, other=0) * weight
        total, highest = total * fade + weight, top
    out = out / tl.where(total == 0, 1.0, total)
    tl.store(made.to(tl.pointer_type(KIND)) + row * DIM + dims, _narrow(out, KIND), mask=dims < DIM)
