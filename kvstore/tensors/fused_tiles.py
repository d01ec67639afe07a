"""What the Triton kernels of ``fused_gpu`` read, multiply and round: tiles of sources, their weights, some rows.

Addresses, and strides in bytes, are integers. Annotations are Triton's own.
"""

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def narrow(number: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """float32 numbers, rounded to nearest even."""
    if _INTERPRETED and KIND == tl.bfloat16:  # its cast cuts off
        bits = number.to(tl.int32, bitcast=True)
        number = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return number.to(KIND)


@triton.jit
def product(one: tl.tensor, other: tl.tensor, before: tl.tensor) -> tl.tensor:
    """``before + one @ other`` in float32."""
    if _INTERPRETED:  # it would take the bits of bfloat16 for integers
        one, other = one.to(tl.float32), other.to(tl.float32)
    return tl.dot(one, other, before, input_precision="ieee")


@triton.jit
def dims_of(DIM: tl.constexpr) -> tl.tensor:
    """Channels, as many as products of matrices need."""
    return tl.arange(0, max(16, triton.next_power_of_2(DIM)))


@triton.jit
def rows_at(address: tl.tensor, steps: tl.tensor, KIND: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tensor:
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
def weights_of(
    address: tl.tensor, head: tl.tensor, heads: tl.tensor, DIM: tl.constexpr, SOURCES: tl.constexpr
) -> tl.tuple:
    """Of all sources, four at most, for one kv head. ``address``: of [sources, kv heads, dim] of float32."""
    dims = dims_of(DIM)
    start, step, live = address.to(tl.pointer_type(tl.float32)) + head * DIM + dims, heads * DIM, dims < DIM
    one, two = _weight(start, 0, step, live, SOURCES), _weight(start, 1, step, live, SOURCES)
    return one, two, _weight(start, 2, step, live, SOURCES), _weight(start, 3, step, live, SOURCES)


@triton.jit
def state_of(
    address: tl.tensor,
    steps: tl.tensor,
    live: tl.tensor,
    DIM: tl.constexpr,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tl.tensor:
    """Some rows, [rows, dim]: zero where they are not live, and behind their ``DIM`` numbers."""
    dims = dims_of(DIM)
    rows = rows_at(address, steps, KIND, ALIGNED)[:, None] + dims[None, :]
    return tl.load(rows, mask=live[:, None] & (dims < DIM)[None, :], other=0)


@triton.jit
def tile_of(
    address: tl.tensor,
    step: tl.tensor,
    live: tl.tensor,
    DIM: tl.constexpr,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    WHOLE: tl.constexpr,
) -> tl.tensor:
    """Tokens that follow each other, [tokens, dim]; as ``_state``, but not ``live`` is looked at if they are ``WHOLE``.

    The places in a tile are the same for all tiles and sources, which saves registers.
    """
    ITEM: tl.constexpr = KIND.primitive_bitwidth // 8
    dims = dims_of(DIM)
    apart = tl.multiple_of((step // ITEM).to(tl.int32), ALIGNED // ITEM)
    start = tl.multiple_of(address.to(tl.pointer_type(KIND)), ALIGNED)
    places = start + (tl.arange(0, live.shape[0])[:, None] * apart + dims[None, :])
    if not WHOLE:
        return tl.load(places, mask=live[:, None] & (dims < DIM)[None, :], other=0)
    elif DIM < dims.shape[0]:
        return tl.load(places, mask=(dims < DIM)[None, :], other=0)
    else:
        return tl.load(places)
