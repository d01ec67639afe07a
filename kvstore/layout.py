"""What the bytes of a block mean: stored layers, heads, dims, dtype, and where each piece lies.

Payload of a block that has room for ``stride`` tokens: ``[layer][K then V][head][stride][dim]``, each layer padded to
``alignment``. A layer is one known byte range, so it can be moved and checked alone.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from kvstore.errors import BadInput

DTYPE_BYTES = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float64": 8,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "uint8": 1,
}
BLOCK_TOKENS = 256
ALIGNMENT = 4096
MAX_LAYERS = 4096
MAX_HEADS = 4096
MAX_DIM = 65536
MAX_BLOCK_TOKENS = 65536
# The header area holds token ids, piece table and checksums; see block.py.
HEADER_FIXED = 2048
PIECE_BYTES = 32
RUN_BYTES = 24


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Shape of one token's cache in one stored layer."""

    heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Byte range of one (layer, K or V, head) in a payload."""

    kind: int  # 0: K, 1: V
    layer: int
    head: int
    offset: int
    length: int


@dataclass(frozen=True)
class Layout:
    """Shape of one token's cache per stored layer, its dtype and the block size. Hashable; equal means same bytes."""

    layers: tuple[LayerShape, ...]
    dtype: str
    block_tokens: int = BLOCK_TOKENS
    alignment: int = ALIGNMENT

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise BadInput(f"dtype {self.dtype!r} is not one of {', '.join(DTYPE_BYTES)}")
        if not 1 <= len(self.layers) <= MAX_LAYERS:
            raise BadInput(f"a layout has 1 to {MAX_LAYERS} stored layers, not {len(self.layers)}")
        for shape in self.layers:
            dims = max(shape.key_dim, shape.value_dim)
            if not (
                1 <= shape.heads <= MAX_HEADS and 0 <= min(shape.key_dim, shape.value_dim) and 1 <= dims <= MAX_DIM
            ):
                raise BadInput(f"{shape} is not a possible layer shape")
        if not 1 <= self.block_tokens <= MAX_BLOCK_TOKENS:
            raise BadInput(f"block_tokens must be 1 to {MAX_BLOCK_TOKENS}, not {self.block_tokens}")
        if self.alignment < 512 or self.alignment & (self.alignment - 1):
            raise BadInput(f"alignment must be a power of two of at least 512, not {self.alignment}")

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Taken once: layouts are keys of small caches on every block's way."""
        return (self.layers, self.dtype, self.block_tokens, self.alignment).__hash__()

    @classmethod
    def uniform(cls, layers: int, heads: int, dim: int, dtype: str, block_tokens: int = BLOCK_TOKENS) -> Layout:
        """Layout of ``layers`` equal layers with ``heads`` KV heads of ``dim`` for keys and values."""
        return cls((LayerShape(heads, dim, dim),) * layers, dtype, block_tokens)

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return DTYPE_BYTES[self.dtype]

    @cached_property
    def token_payload(self) -> int:
        """Bytes that one token takes in all stored layers, without padding."""
        return sum(s.heads * (s.key_dim + s.value_dim) for s in self.layers) * self.itemsize

    @cached_property
    def runs(self) -> tuple[tuple[int, LayerShape], ...]:
        """The layers as runs of equal shape: how many, and the shape."""
        return tuple((len(list(same)), shape) for shape, same in groupby(self.layers))

    @cached_property
    def header_bytes(self) -> int:
        """Size of a slot's header area: enough for any block of this layout, a multiple of the alignment."""
        pieces = sum(2 * shape.heads for shape in self.layers)
        need = HEADER_FIXED + RUN_BYTES * len(self.runs) + 4 * self.block_tokens + (PIECE_BYTES + 8) * pieces
        return _up(need, self.alignment)

    def layer_offsets(self, stride: int) -> Sequence[int]:
        """Payload offset of each layer, and the payload's size as the last item, for room for ``stride`` tokens."""
        offsets = self._offsets.get(stride)
        if offsets is None:
            offsets = self._offsets[stride] = _layer_offsets(self, stride)
        return offsets

    def payload_bytes(self, stride: int) -> int:
        """Bytes of a payload with room for ``stride`` tokens, padding included."""
        return self.layer_offsets(stride)[-1]

    def gaps(self, stride: int) -> Sequence[tuple[int, int]]:
        """Where padding lies in a payload: (first byte, last + 1)."""
        gaps = self._gaps.get(stride)
        if gaps is None:
            offsets = self.layer_offsets(stride)
            ends = (
                offsets[layer] + self.key_bytes(layer, stride) + self.value_bytes(layer, stride)
                for layer in range(len(self.layers))
            )
            gaps = self._gaps[stride] = tuple(
                (end, start) for end, start in zip(ends, offsets[1:], strict=True) if end < start
            )
        return gaps

    def slot_bytes(self, stride: int) -> int:
        """Bytes of header area and payload."""
        return self.header_bytes + self.payload_bytes(stride)

    @cached_property
    def full_slot_bytes(self) -> int:
        """Bytes of a slot that holds a full block."""
        return self.slot_bytes(self.block_tokens)

    def class_bytes(self, stride: int) -> int:
        """Size class of a slot for ``stride`` tokens: a full block's exact size, or a half, quarter or eighth of it."""
        need, size = self.slot_bytes(stride), self.full_slot_bytes
        for shift in (3, 2, 1):
            if need <= (smaller := _up(size >> shift, self.alignment)):
                return smaller
        return size

    def pieces(self, stride: int) -> Sequence[Piece]:
        """The pieces of a payload in order of offset."""
        table = self._tables.get(stride)
        if table is None:
            table = self._tables[stride] = _pieces(self, stride)
        return table

    def spans(self, stride: int) -> array[int]:
        """Offset and length of each piece, int64, one after the other: ``pieces`` as kernels read them."""
        spans = self._spans.get(stride)
        if spans is None:
            spans = array("q", [number for piece in self.pieces(stride) for number in (piece.offset, piece.length)])
            self._spans[stride] = spans
        return spans

    def key_bytes(self, layer: int, stride: int) -> int:
        """Bytes of all heads' keys in one layer."""
        shape = self.layers[layer]
        return shape.heads * shape.key_dim * stride * self.itemsize

    def value_bytes(self, layer: int, stride: int) -> int:
        """Bytes of all heads' values in one layer."""
        shape = self.layers[layer]
        return shape.heads * shape.value_dim * stride * self.itemsize

    # Small tables by stride; a race of two threads computes the same value twice, no more.
    @cached_property
    def _gaps(self) -> dict[int, tuple[tuple[int, int], ...]]:
        return {}

    @cached_property
    def _offsets(self) -> dict[int, tuple[int, ...]]:
        return {}

    @cached_property
    def _tables(self) -> dict[int, tuple[Piece, ...]]:
        return {}

    @cached_property
    def _spans(self) -> dict[int, array[int]]:
        return {}


@dataclass(frozen=True, slots=True)
class Shard:
    """What one of several workers has of each block: all layers, and of their heads those from ``first_head`` on, as
    many as its own ``layout`` has. ``group``: which workers compute together, of one engine that runs."""

    layout: Layout
    first_head: int
    group: str

    @property
    def heads(self) -> int:
        """How many it has."""
        return self.layout.layers[0].heads

    def check(self, whole: Layout) -> None:
        """Raises ``BadInput`` if blocks of that layout are not put together from such."""
        heads = whole.layers[0].heads
        shapes = tuple(LayerShape(self.heads, shape.key_dim, shape.value_dim) for shape in whole.layers)
        like = Layout(shapes, whole.dtype, whole.block_tokens, whole.alignment)
        if any(shape.heads != heads for shape in whole.layers) or self.layout != like:
            raise BadInput("a shard's layout must be that of whole blocks, but for fewer heads, as many in each layer")
        if not 0 <= self.first_head <= heads - self.heads:
            last = self.first_head + self.heads - 1
            raise BadInput(f"a shard of heads {self.first_head} to {last} is none of blocks with {heads}")


def _up(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _layer_offsets(layout: Layout, stride: int) -> tuple[int, ...]:
    offsets = [0]
    for shape in layout.layers:
        size = shape.heads * (shape.key_dim + shape.value_dim) * stride * layout.itemsize
        offsets.append(_up(offsets[-1] + size, layout.alignment))
    return tuple(offsets)


def _pieces(layout: Layout, stride: int) -> tuple[Piece, ...]:
    pieces: list[Piece] = []
    for layer, (shape, start) in enumerate(zip(layout.layers, _layer_offsets(layout, stride), strict=False)):
        offset = start
        for kind, dim in enumerate((shape.key_dim, shape.value_dim)):
            length = dim * stride * layout.itemsize
            for head in range(shape.heads):
                pieces.append(Piece(kind, layer, head, offset, length))
                offset += length
    return tuple(pieces)
