"""Memory of the moment, through which layers pass on their way to a device: nobody reads it when it is gone."""

from __future__ import annotations

import ctypes
import gc
import threading
import weakref
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from blocks import WIDE, found, ids, save
from gates import PATIENCE

import kvstore
from kvstore.load import Load
from kvstore.local import LocalStore
from kvstore.tensors import carrier
from kvstore.tensors.carrier import Carried, Carrier
from kvstore.tensors.runs import Blocks
from kvstore.tensors.streams import Stream

TOKENS = ids(1, 3 * 32 + 7)
LAYERS = range(len(WIDE.layers))


class Spoiling(Carrier):
    """Memory that nobody refers to any more is overwritten, as the next copy would."""

    def empty(self, stream: Stream, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        memory = bytearray(max(shape[0], 1))
        lent = (ctypes.c_char * len(memory)).from_buffer(memory)
        weakref.finalize(lent, spoil, memory)
        return torch.frombuffer(lent, dtype=dtype)[: shape[0]]


SPOILT: list[bytearray] = []  # it does not go away: an address in it can be read


def spoil(memory: bytearray) -> None:
    memory[:] = b"\xee" * len(memory)
    SPOILT.append(memory)


@pytest.fixture
def streams() -> Iterator[Carrier]:
    gc.collect()  # of earlier tests
    SPOILT.clear()
    made = Spoiling(torch.device("cpu"))
    yield made
    made.close()


@pytest.fixture(params=[None, "1MiB"], ids=["no tier", "a tier"])
def load(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    for limit in ("COPY_BYTES", "FIRST_BYTES", "MOST_BYTES"):
        monkeypatch.setattr(carrier, limit, 1)  # every layer by itself
    with kvstore.open(host="8MiB", device=request.param, device_name="cpu") as store:
        save(store, TOKENS, layout=WIDE).wait()
        yield asked(store)


def asked(store: LocalStore) -> Load:
    return store.load(found(store, TOKENS, layout=WIDE), device=True)


def differing(load: Load, layer: int, places: Blocks) -> list[int]:
    """Blocks whose bytes at ``places`` are not what the store holds."""
    wrong = []
    both = zip(places.keys.tolist(), places.values.tolist(), load.pieces(layer), strict=True)
    for number, (keys, values, piece) in enumerate(both):
        for address, view in ((keys, piece.keys), (values, piece.values)):
            if ctypes.string_at(address, len(view)) != view:
                wrong.append(number)
    return wrong


def rest(streams: Carrier) -> None:
    """Everything that was asked for is over, and no thread refers to it any more."""
    for stream in (streams.copies, streams.turns):
        stream.run(lambda: None)
        stream.record().wait()


@pytest.mark.parametrize("together", [1, 2], ids=["layer by layer", "two at a time"])
def test_a_layer_can_be_asked_for_again(
    load: Load, streams: Carrier, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    """As beam search does, when the first layers have been brought for one sequence already."""
    monkeypatch.setattr(carrier, "COPY_BYTES", together * load.layout.payload_bytes(32) // len(LAYERS))
    carried = Carried(streams, load)
    for _ in range(3):
        for layer in LAYERS:
            assert carried.wait(layer, 1.0)
            places = carried.places(layer)
            rest(streams)
            assert differing(load, layer, places) == []
            carried.used(layer, streams.turns.record())
            rest(streams)
    carried.over(len(TOKENS))
    load.release()


def test_a_layer_stays_while_somebody_has_yet_to_read_it(load: Load, streams: Carrier) -> None:
    """One thread knows where a layer is, and has not asked for its reading; others go on."""
    carried = Carried(streams, load)
    places = carried.places(0)
    carried.places(0)
    carried.used(0, streams.turns.record())  # the other one
    for layer in LAYERS[1:]:
        carried.places(layer)
        rest(streams)
        carried.used(layer, streams.turns.record())
    rest(streams)
    assert differing(load, 0, places) == []
    carried.used(0, streams.turns.record())
    carried.over(len(TOKENS))
    load.release()


def test_a_layer_stays_until_it_is_read_though_the_load_is_over(load: Load, streams: Carrier) -> None:
    gate, wrong = threading.Event(), list[int]()
    carried = Carried(streams, load)
    last = LAYERS[-1]
    places = carried.places(last)
    pieces = load.pieces(last)
    held = [(bytes(piece.keys), bytes(piece.values)) for piece in pieces]
    del pieces

    def read() -> None:
        gate.wait(PATIENCE)
        for number, (*place, both) in enumerate(zip(places.keys.tolist(), places.values.tolist(), held, strict=True)):
            for address, right in zip(place, both, strict=True):
                if ctypes.string_at(address, len(right)) != right:
                    wrong.append(number)

    streams.turns.run(read)
    carried.used(last, streams.turns.record())
    streams.copies.run(lambda: None)
    streams.copies.record().wait()
    carried.over(len(TOKENS))
    load.release()
    del carried
    gate.set()
    rest(streams)
    assert wrong == []


def test_memory_of_the_moment_goes_once_it_is_read(load: Load, streams: Carrier) -> None:
    carried = Carried(streams, load)
    passing = [place.slot is None for place in load.places(0)]
    carried.places(0)
    carried.used(0, streams.turns.record())
    rest(streams)
    carried.places(1)
    rest(streams)
    carried.used(1, streams.turns.record())
    assert any(len(memory) > 1 for memory in SPOILT) == any(passing)
    carried.over(len(TOKENS))
    load.release()


def test_what_is_begun_before_anybody_asks_is_copied_once(load: Load, streams: Carrier) -> None:
    copied: list[int] = []
    ask = streams.copy

    def noted(targets: np.ndarray, sources: np.ndarray, sizes: np.ndarray) -> None:
        copied.append(int(sizes.sum()))
        ask(targets, sources, sizes)

    streams.copy = noted  # type: ignore[method-assign]
    carried = Carried(streams, load)
    carried.begin()
    assert sum(copied) == sum(load.layout.payload_bytes(source.stride) for source in load.sources)
    for layer in LAYERS:
        places = carried.places(layer)
        rest(streams)
        assert differing(load, layer, places) == []
        carried.used(layer, streams.turns.record())
    assert len(copied) == len(LAYERS)
    carried.over(len(TOKENS))
    load.release()


def test_little_passes_through_at_a_time(load: Load, streams: Carrier, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who wants more waits until what was there first has been read; what nobody has been told of does not count."""
    monkeypatch.setattr(carrier, "PASSING_BYTES", 1)
    passing = any(place.slot is None for place in load.places(0))
    carried, gate = Carried(streams, load), threading.Event()
    carried.places(0)
    streams.turns.run(lambda: none(gate.wait(PATIENCE)))
    assert carried.free(1)  # who was told of layer 0 has not asked for its reading: waiting for that could be for ever
    carried.used(0, streams.turns.record())
    assert carried.free(0) and carried.free(1) != passing
    waiting = threading.Thread(target=carried.places, args=(1,))
    waiting.start()
    gate.set()
    waiting.join()
    rest(streams)
    assert differing(load, 1, carried.places(1)) == []
    carried.over(len(TOKENS))
    load.release()


def none(*_: object) -> None:
    """What work gives back."""
