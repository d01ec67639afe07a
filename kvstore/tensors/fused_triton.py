"""The Triton kernels of ``fused_gpu``: attention over weighted sums of sources, which are never made.

The weights of keys go into the queries, one product of matrices for each source; those of values into what comes out:
so tiles of sources go from memory to the tensor cores as they are. A program has some rows of one kv head, that is
query tokens by query heads, heads running faster; so each source is read once for all query heads. Addresses, and
strides in bytes, are integers. Annotations are Triton's own.
"""

import triton
import triton.language as tl

from kvstore.tensors.fused_tiles import dims_of, narrow, product, state_of, tile_of, weights_of

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _weighted(q: tl.tensor, weights: tl.tuple, source: tl.constexpr, KIND: tl.constexpr) -> tl.tensor:
    """Queries for one source, from float32 ones; for a source that is not there, nothing that is used."""
    return narrow(q * weights[source], KIND)


@triton.jit
def _scores(
    queries: tl.tuple,
    keys: tl.tuple,
    start: tl.tensor,
    live: tl.tensor,
    DIM: tl.constexpr,
    SOURCES: tl.constexpr,
    ALIGNED: tl.constexpr,
    WHOLE: tl.constexpr,
) -> tl.tensor:
    """[rows, columns]: of each source its own queries times a tile of its keys."""
    KIND: tl.constexpr = queries[0].dtype
    step = keys[4]
    scores = tl.zeros([queries[0].shape[0], live.shape[0]], tl.float32)
    k = tile_of(keys[0] + start * step, step, live, DIM, KIND, ALIGNED, WHOLE)
    scores = product(queries[0], tl.trans(k), scores)
    if SOURCES > 1:
        k = tile_of(keys[1] + start * step, step, live, DIM, KIND, ALIGNED, WHOLE)
        scores = product(queries[1], tl.trans(k), scores)
    if SOURCES > 2:
        k = tile_of(keys[2] + start * step, step, live, DIM, KIND, ALIGNED, WHOLE)
        scores = product(queries[2], tl.trans(k), scores)
    if SOURCES > 3:
        k = tile_of(keys[3] + start * step, step, live, DIM, KIND, ALIGNED, WHOLE)
        scores = product(queries[3], tl.trans(k), scores)
    return scores


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
def _span(first: tl.tensor, size: tl.tuple, ROWS: tl.constexpr, MASK: tl.constexpr, TILE: tl.constexpr) -> tl.tuple:
    """The columns that this program looks at: its split, but for what its last row does not see; up to the second
    number they are whole tiles that all rows see. ``first``: of its rows."""
    tokens, context, groups, split_tokens = size[0], size[1], size[2], size[3]
    begin = tl.program_id(2) * split_tokens
    end = tl.minimum(context, begin + split_tokens)
    whole = begin
    if MASK == "causal":
        before = context - tokens
        end = tl.minimum(end, before + tl.minimum(tokens, (first + ROWS - 1) // groups + 1))
        seen_by_all = tl.minimum(end, before + first // groups + 1)
        whole = begin + tl.maximum(0, seen_by_all - begin) // TILE * TILE
    return begin, whole, end


@triton.jit
def _swept(
    state: tl.tuple,
    begin: tl.tensor,
    end: tl.tensor,
    queries: tl.tuple,
    keys: tl.tuple,
    values: tl.tuple,
    mask: tl.tuple,
    size: tl.tuple,
    token: tl.tensor,
    DIMS: tl.constexpr,
    SOURCES: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASK: tl.constexpr,
    TILE: tl.constexpr,
    WHOLE: tl.constexpr,
) -> tl.tuple:
    """``state`` with what is found in some columns: the highest score, the sum of weights, and of each source of values
    the weighted sum. ``WHOLE``: these are whole tiles that all rows see.

    ``keys`` and ``values``: addresses of this kv head in each source, and the step from token to token. ``mask``: see
    ``_masked``. ``size``: counts of tokens, of columns, of query heads of this kv head, and of columns of a split.
    """
    KIND: tl.constexpr = queries[0].dtype
    highest, total, one, two, three, four = state[0], state[1], state[2], state[3], state[4], state[5]
    step = values[4]
    for start in range(begin, end, TILE):
        columns = start + tl.arange(0, TILE)
        live = columns < end
        scores = _scores(queries, keys, start, live, DIMS[0], SOURCES[0], ALIGNED, WHOLE)
        if WHOLE:
            top = tl.maximum(highest, tl.max(scores, 1))
            base = top
        else:
            scores = _masked(scores, mask, token, columns, size, MASK)
            top = tl.maximum(highest, tl.max(scores, 1))
            base = tl.where(top == -float("inf"), 0.0, top)  # of rows that see nothing yet, to take nothing from
        seen = tl.exp2(scores - base[:, None])
        fade = tl.exp2(highest - base)
        total, highest = total * fade + tl.sum(seen, 1), top
        seen = narrow(seen, KIND)
        v = tile_of(values[0] + start * step, step, live, DIMS[1], KIND, ALIGNED, WHOLE)
        one = product(seen, v, one * fade[:, None])
        if SOURCES[1] > 1:
            v = tile_of(values[1] + start * step, step, live, DIMS[1], KIND, ALIGNED, WHOLE)
            two = product(seen, v, two * fade[:, None])
        if SOURCES[1] > 2:
            v = tile_of(values[2] + start * step, step, live, DIMS[1], KIND, ALIGNED, WHOLE)
            three = product(seen, v, three * fade[:, None])
        if SOURCES[1] > 3:
            v = tile_of(values[3] + start * step, step, live, DIMS[1], KIND, ALIGNED, WHOLE)
            four = product(seen, v, four * fade[:, None])
    return highest, total, one, two, three, four


@triton.jit
def _summed(state: tl.tuple, weights: tl.tuple, SOURCES: tl.constexpr) -> tl.tensor:
    """The weighted sum of what was found in the sources of values."""
    made = state[2] * weights[0]
    if SOURCES > 1:
        made += state[3] * weights[1]
    if SOURCES > 2:
        made += state[4] * weights[2]
    if SOURCES > 3:
        made += state[5] * weights[3]
    return made


@triton.jit
def _written(
    out: tl.tensor,
    weighs: tl.tensor,
    made: tl.tensor,
    sums: tl.tensor,
    place: tl.tensor,
    there: tl.tensor,
    DIM: tl.constexpr,
    KIND: tl.constexpr,
    SPLIT: tl.constexpr,
) -> None:
    """Rows ``place`` of what was found; of a split in float32, with the log2 of all that it weighs."""
    dims = dims_of(DIM)
    targets = place[:, None] * DIM + dims[None, :]
    wanted = there[:, None] & (dims < DIM)[None, :]
    if SPLIT:
        tl.store(made.to(tl.pointer_type(tl.float32)) + targets, out, mask=wanted)
        tl.store(sums.to(tl.pointer_type(tl.float32)) + place, weighs, mask=there)
    else:
        tl.store(made.to(tl.pointer_type(KIND)) + targets, narrow(out, KIND), mask=wanted)


@triton.jit(do_not_specialize=range(30))  # all but the constants: no length of a context is worth seconds of compiling
def attend(
    queries: tl.int64,
    k0: tl.int64, k1: tl.int64, k2: tl.int64, k3: tl.int64, v0: tl.int64, v1: tl.int64, v2: tl.int64, v3: tl.int64,
    key_weights: tl.int64, value_weights: tl.int64, mask: tl.int64, made: tl.int64, sums: tl.int64,
    key_batch: tl.int64, key_head: tl.int64, key_token: tl.int64,
    value_batch: tl.int64, value_head: tl.int64, value_token: tl.int64,
    mask_batch: tl.int64, mask_token: tl.int64, mask_column: tl.int64,
    batches: tl.int32, heads: tl.int32, groups: tl.int32, tokens: tl.int32, context: tl.int32, split_tokens: tl.int32,
    scale: tl.float32,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_SOURCES: tl.constexpr, VALUE_SOURCES: tl.constexpr,
    KIND: tl.constexpr, ALIGNED: tl.constexpr, MASK: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """Programs: tiles of rows, those that see most first, by sequences and kv heads, by splits of the context."""
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    rows = first + tl.arange(0, ROWS)
    token, own = rows // groups, head * groups + rows % groups
    steps = ((batch * heads * groups + own) * tokens + token) * (KEY_DIM * KIND.primitive_bitwidth // 8)
    q = state_of(queries, steps, token < tokens, KEY_DIM, KIND, ALIGNED).to(tl.float32) * scale
    a = weights_of(key_weights, head, heads, KEY_DIM, KEY_SOURCES)
    qs = _weighted(q, a, 0, KIND), _weighted(q, a, 1, KIND), _weighted(q, a, 2, KIND), _weighted(q, a, 3, KIND)
    key, value = batch * key_batch + head * key_head, batch * value_batch + head * value_head
    keys = k0 + key, k1 + key, k2 + key, k3 + key, key_token
    values = v0 + value, v1 + value, v2 + value, v3 + value, value_token
    seen, size = (mask + batch * mask_batch, mask_token, mask_column), (tokens, context, groups, split_tokens)
    DIMS: tl.constexpr = (KEY_DIM, VALUE_DIM)
    SOURCES: tl.constexpr = (KEY_SOURCES, VALUE_SOURCES)
    nothing = tl.zeros([ROWS, dims_of(VALUE_DIM).shape[0]], tl.float32)
    state = (
        tl.full([ROWS], -float("inf"), tl.float32),
        tl.zeros([ROWS], tl.float32),
        nothing,
        nothing,
        nothing,
        nothing,
    )
    begin, whole, end = _span(first, size, ROWS, MASK, TILE)
    if MASK == "causal":
        state = _swept(
            state, begin, whole, qs, keys, values, seen, size, token, DIMS, SOURCES, ALIGNED, MASK, TILE, True
        )
    state = _swept(state, whole, end, qs, keys, values, seen, size, token, DIMS, SOURCES, ALIGNED, MASK, TILE, False)
    total = tl.where(state[1] == 0, 1.0, state[1])  # of rows that saw nothing
    b = weights_of(value_weights, head, heads, VALUE_DIM, VALUE_SOURCES)
    out = _summed(state, b, VALUE_SOURCES) / total[:, None]
    place = ((tl.program_id(2) * batches + batch) * tokens + token) * (heads * groups) + own
    _written(out, state[0] + tl.log2(total), made, sums, place, token < tokens, VALUE_DIM, KIND, SPLIT)
