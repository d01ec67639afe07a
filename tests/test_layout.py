"""Layout: where each piece lies. Pieces never overlap, layers are aligned, and the numbers are pinned."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.errors import BadInput
from kvstore.layout import DTYPE_BYTES, LayerShape, Layout

shapes = st.builds(LayerShape, st.integers(1, 4), st.integers(1, 33), st.integers(0, 33))
layouts = st.builds(
    Layout,
    st.lists(shapes, min_size=1, max_size=5).map(tuple),
    st.sampled_from(sorted(DTYPE_BYTES)),
    st.integers(1, 70),
    st.sampled_from([512, 4096, 16384]),
)


@given(layouts, st.data())
@settings(max_examples=200)
def test_pieces_lie_one_behind_the_other(layout: Layout, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, layout.block_tokens))
    pieces, offsets = layout.pieces(stride), layout.layer_offsets(stride)
    end = 0
    for piece in pieces:
        shape = layout.layers[piece.layer]
        assert piece.length == (shape.value_dim if piece.kind else shape.key_dim) * stride * layout.itemsize
        assert piece.offset >= end
        assert offsets[piece.layer] <= piece.offset
        assert piece.offset + piece.length <= offsets[piece.layer + 1]
        end = piece.offset + piece.length
    assert [(p.layer, p.kind, p.head) for p in pieces] == [
        (layer, kind, head)
        for layer, shape in enumerate(layout.layers)
        for kind in (0, 1)
        for head in range(shape.heads)
    ]
    assert all(offset % layout.alignment == 0 for offset in offsets)
    assert layout.payload_bytes(stride) - sum(p.length for p in pieces) < layout.alignment * len(layout.layers)
    assert sum(layout.key_bytes(n, stride) + layout.value_bytes(n, stride) for n in range(len(layout.layers))) == (
        layout.token_payload * stride
    )


@given(layouts, st.data())
@settings(max_examples=100)
def test_a_class_holds_its_slot_and_wastes_little(layout: Layout, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, layout.block_tokens))
    size = layout.class_bytes(stride)
    assert layout.slot_bytes(stride) <= size <= layout.full_slot_bytes
    assert size % layout.alignment == 0
    assert layout.class_bytes(layout.block_tokens) == layout.full_slot_bytes
    eighth = -(-(layout.full_slot_bytes >> 3) // layout.alignment) * layout.alignment
    assert size <= max(2 * (layout.slot_bytes(stride) + layout.alignment), eighth)


def test_pinned_numbers() -> None:
    """They are what is on the disks."""
    llama = Layout.uniform(32, 8, 128, "bfloat16")
    assert (llama.header_bytes, llama.payload_bytes(256)) == (24576, 32 << 20)
    assert llama.layer_offsets(256)[:3] == (0, 1 << 20, 2 << 20)
    assert [llama.class_bytes(n) for n in (1, 31, 40, 100, 200, 256)] == [
        4198400,
        4198400,
        8396800,
        16789504,
        33579008,
        33579008,
    ]
    mixed = Layout((LayerShape(2, 3, 5), LayerShape(1, 0, 7)), "float32", block_tokens=4)
    assert mixed.header_bytes == 4096
    assert [(p.kind, p.layer, p.head, p.offset, p.length) for p in mixed.pieces(4)] == [
        (0, 0, 0, 0, 48),
        (0, 0, 1, 48, 48),
        (1, 0, 0, 96, 80),
        (1, 0, 1, 176, 80),
        (0, 1, 0, 4096, 0),
        (1, 1, 0, 4096, 112),
    ]
    assert [(count, shape.heads) for count, shape in llama.runs] == [(32, 8)]


@pytest.mark.parametrize(
    "bad",
    [
        lambda: Layout((), "float32"),
        lambda: Layout((LayerShape(1, 1, 1),) * 4097, "float32"),
        lambda: Layout((LayerShape(0, 1, 1),), "float32"),
        lambda: Layout((LayerShape(1, 0, 0),), "float32"),
        lambda: Layout((LayerShape(1, -1, 1),), "float32"),
        lambda: Layout((LayerShape(1, 1, 1 << 17),), "float32"),
        lambda: Layout((LayerShape(1, 1, 1),), "int3"),
        lambda: Layout((LayerShape(1, 1, 1),), "float32", 0),
        lambda: Layout((LayerShape(1, 1, 1),), "float32", 1 << 17),
        lambda: Layout((LayerShape(1, 1, 1),), "float32", 16, 256),
        lambda: Layout((LayerShape(1, 1, 1),), "float32", 16, 5000),
    ],
)
def test_impossible_layouts(bad: object) -> None:
    assert callable(bad)
    with pytest.raises(BadInput):
        bad()
