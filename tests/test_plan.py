"""Layer plans: what each name stands for, what blocks then hold, and plans that are refused."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore import BadInput, LayerShape
from kvstore.plan import PLANS, LayerPlan, Rebuilt, named, read

SHAPE = LayerShape(2, 16, 16)

WANTED = {
    "standard": (None,) * 6,
    "cla": (None, Rebuilt((0,), (0,)), None, Rebuilt((2,), (2,)), None, Rebuilt((4,), (4,))),
    "yoco": (None, None, None, *(Rebuilt((2,), (2,)),) * 3),
    "fusedkv-lite": (None, None, None, *(Rebuilt((2,), (0,)),) * 3),
    "fusedkv-lite-reversed": (None, None, None, *(Rebuilt((0,), (2,)),) * 3),
    "fusedkv": (None, None, None, *(Rebuilt((0, 2), (0, 2), weighted=True),) * 3),
}


def test_what_each_name_stands_for() -> None:
    assert {name: named(name, 6).layers for name in PLANS} == WANTED


@pytest.mark.parametrize("layers", [3, 4, 7, 16, 61])
@pytest.mark.parametrize("name", PLANS)
def test_blocks_hold_stored_layers_only(name: str, layers: int) -> None:
    plan = named(name, layers)
    layout = plan.layout([SHAPE] * layers, "bfloat16", 64)
    whole = named("standard", layers).layout([SHAPE] * layers, "bfloat16", 64)
    assert len(layout.layers) == len(plan.stored) == (layers if name == "standard" else (layers + 1) // 2)
    assert layout.token_payload * layers == whole.token_payload * len(plan.stored)
    assert plan.is_standard is (name == "standard")


def test_sources_are_needed_until_the_last_layer_that_reads_them() -> None:
    assert named("cla", 6).sources == {0: 1, 2: 3, 4: 5}
    assert named("fusedkv", 6).sources == {0: 5, 2: 5}
    assert named("yoco", 6).sources == {2: 5}
    assert named("standard", 6).sources == {}


def test_layers_of_a_block_keep_their_own_shapes() -> None:
    """Stored layers that nobody is rebuilt from may have other heads than those that somebody is."""
    shapes = [SHAPE, LayerShape(4, 16, 16), SHAPE, SHAPE, SHAPE, SHAPE]
    assert named("fusedkv", 6).layout(shapes, "float32", 16).layers == tuple(shapes[:3])


@pytest.mark.parametrize("name", PLANS)
def test_plans_are_read_back_from_what_files_hold(name: str) -> None:
    plan = named(name, 8)
    again = read(plan.to_list(), 8)
    assert again.layers == plan.layers
    assert again.text == plan.text


def test_texts_of_different_plans_differ() -> None:
    """They are part of fingerprints."""
    assert len({named(name, layers).text for name in PLANS for layers in (4, 6)}) == 2 * (len(PLANS) - 1) + 1
    assert named("standard", 4).text == named("standard", 6).text == "standard"


FUSED = {"keys": [0, 1], "values": [0, 1], "weighted": True}
BAD: dict[str, tuple[Any, str]] = {
    "a source above": ([None, {"keys": [2], "values": [0]}, None], "keys of layer 1 come from layer 2; .* below"),
    "a source that is itself": ([None, {"keys": [0], "values": [1]}, None], "values of layer 1 come from layer 1"),
    "the first layer": ([{"keys": [0], "values": [0]}, None, None], "keys of layer 0 come from layer 0"),
    "a negative source": ([None, {"keys": [-1], "values": [0]}, None], "layer -1"),
    "a source that is rebuilt": (
        [None, {"keys": [0], "values": [0]}, {"keys": [1], "values": [0]}],
        "layer 2 come from layer 1, which is rebuilt itself",
    ),
    "several without weights": ([None, None, {"keys": [0, 1], "values": [0]}], "one source, or a weighted sum"),
    "no source": ([None, None, {"keys": [], "values": [0]}], "they have 0"),
    "a source twice": ([None, None, {**FUSED, "keys": [1, 1]}], "name a source twice"),
    "another number of layers": ([None, None], "lists 2 layers; the model has 3"),
    "an unknown field": ([None, None, {**FUSED, "queries": [0]}], "layer 2: give null"),
    "a field too few": ([None, None, {"keys": [0]}], "layer 2: give null"),
    "no list": ([None, None, {"keys": 0, "values": [0]}], "layer 2: keys must be a list of layer numbers, not 0"),
    "no numbers": ([None, None, {"keys": ["0"], "values": [True]}], "list of layer numbers"),
    "no plan at all": (7, "a list of one item per layer; not 7"),
    "an unknown name": ("fused", "no layer plan 'fused'; choose from standard, cla"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_plans_are_refused(case: str) -> None:
    given, words = BAD[case]
    with pytest.raises(BadInput, match=words):
        read(given, 3)


@pytest.mark.parametrize("name", sorted(set(PLANS) - {"standard", "cla"}))
def test_halves_need_layers(name: str) -> None:
    with pytest.raises(BadInput, match="at least 3 layers, not 2"):
        named(name, 2)


def test_a_plan_without_layers_is_refused() -> None:
    with pytest.raises(BadInput, match="no layers"):
        LayerPlan("empty", ())


@pytest.mark.parametrize(
    ("layer", "shape", "words"),
    [
        (
            0,
            LayerShape(4, 16, 16),
            "layer 3 has 2 key-value heads of 16 dims, and its keys come from layer 0, which has 4",
        ),
        (2, LayerShape(2, 32, 16), "its keys come from layer 2, which has 2 of 32"),
        (2, LayerShape(2, 16, 8), "its values come from layer 2, which has 2 of 8"),
    ],
)
def test_sources_of_another_shape_are_refused(layer: int, shape: LayerShape, words: str) -> None:
    shapes = [SHAPE] * 6
    shapes[layer] = shape
    with pytest.raises(BadInput, match=words):
        named("fusedkv", 6).layout(shapes, "float32", 16)
    named("standard", 6).check(shapes)


def test_shapes_of_another_model_are_refused() -> None:
    with pytest.raises(BadInput, match="for 6 layers; the model has 5"):
        named("cla", 6).check([SHAPE] * 5)


@given(st.data())
def test_any_plan_is_read_back_or_refused(data: st.DataObject) -> None:
    """Whatever a configuration file holds: a plan whose sources are stored layers below, or one clear error."""
    layers = data.draw(st.integers(1, 6))
    numbers = st.lists(st.integers(-1, layers), max_size=3)
    item = st.none() | st.fixed_dictionaries({"keys": numbers, "values": numbers}, optional={"weighted": st.booleans()})
    given = data.draw(st.lists(item, min_size=layers, max_size=layers))
    try:
        plan = read(given, layers)
    except BadInput as error:
        assert str(error)
        return
    assert read(plan.to_list(), layers).text == plan.text
    for number, layer in enumerate(plan.layers):
        for source in () if layer is None else (*layer.keys, *layer.values):
            assert source < number
            assert source in plan.stored
