"""The events between the engine's stream and the side stream: each is needed, and nobody waits who need not."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from staged import CUDA, Hasty, HastyOnCuda, Hold, Rash, RashOnCuda, refusing, staging_of

import kvstore
from kvstore import Layout
from kvstore.adapters.transformers.buffers import LayerSpec, payload_of
from kvstore.adapters.transformers.row import Row
from kvstore.adapters.transformers.staging import TOO_SLOW, Staging
from kvstore.layout import LayerShape
from kvstore.local import LocalStore
from kvstore.tensors.streams import CudaStream, Stream, ThreadStream, current

LAYERS, HEADS, DIM, BLOCK = 3, 2, 8, 4
LAYOUT = Layout.uniform(LAYERS, HEADS, DIM, "float32", BLOCK)


@pytest.fixture
def store() -> Iterator[LocalStore]:
    with kvstore.open(host="16MiB") as store:
        yield store
        assert store.stats()["drafts"] == 0


class Engine:
    """What a model does to a row, in a stream that may lag behind the host: token by token, or a prompt at once."""

    def __init__(self, row: Row, stream: Stream, device: str, seed: int) -> None:
        self.row, self.stream, self.device = row, stream, device
        draws = torch.Generator().manual_seed(seed)
        self.states = torch.randn(LAYERS, 2, HEADS, 200, DIM, generator=draws)  # of all tokens there will be
        self.given = self.states.to(device)

    def tokens(self, count: int) -> None:
        """Decode."""
        for _ in range(count):
            if self.row.ended is None and self.row.prepare(1):
                place = len(self.row.ids)
                whole = self.row._blocks[place // BLOCK].whole
                assert whole is not None
                target, source = whole.select(3, place % BLOCK), self.given.select(3, place)
                self.stream.run(lambda target=target, source=source: target.copy_(source))  # type: ignore[misc]
                self.row.extend([place])

    def prompt(self, count: int) -> None:
        """Read so many tokens in one pass."""
        place, room = len(self.row.ids), self.row.prepare(count)
        for layer in range(LAYERS if room else 0):
            self.row.write(layer, *self.given[layer].narrow(2, place, room))
        self.row.extend(range(place, place + room))

    def saved(self, tokens: int) -> torch.Tensor:
        """The states that the drafts hold, laid out as ``states``."""
        payload, blocks = payload_of(LAYOUT, torch.float32), []
        for _, draft in sorted(self.row.take(tokens).items()):
            flat = torch.frombuffer(bytearray(draft.payload), dtype=torch.float32)
            whole = payload.whole(flat)
            assert whole is not None
            blocks.append(whole)
            draft.discard()
        return torch.cat(blocks, 3)[:, :, :, :tokens]

    def is_right(self, tokens: int) -> bool:
        return torch.equal(self.saved(tokens), self.states[:, :, :, :tokens])


def engine_of(store: LocalStore, staging: Staging, stream: Stream, seed: int) -> Engine:
    specs = [LayerSpec(HEADS, DIM, DIM, torch.device("cpu"))] * LAYERS
    row = Row([], specs, torch.float32, BLOCK, lambda: store.draft(LAYOUT), staging)
    return Engine(row, stream, "cpu", seed)


@pytest.mark.parametrize("right", [True, False], ids=["waits", "negative control"])
def test_a_block_leaves_behind_what_the_engine_has_yet_to_write(store: LocalStore, right: bool, seed: int) -> None:
    side = ThreadStream("kvstore-leaving") if right else Hasty("kvstore-hasty")
    with Hold() as hold:
        staging = staging_of(LAYOUT, torch.float32, "cpu", side, engine=lambda: hold.stream, allocate=torch.zeros)
        engine = engine_of(store, staging, hold.stream, seed=seed)
        engine.tokens(9)  # the engine has written none of them, and the host is through
        left = side.record()
        if right:
            assert not left.done()
        else:
            left.wait()
        hold.open()
        assert engine.is_right(9) is right
        staging.close()


@pytest.mark.parametrize("right", [True, False], ids=["waits", "negative control"])
def test_a_buffer_is_written_again_when_it_has_left(store: LocalStore, right: bool, seed: int) -> None:
    with Hold(ThreadStream("kvstore-leaving") if right else Rash("kvstore-rash")) as hold:
        staging = staging_of(LAYOUT, torch.float32, "cpu", hold.stream)
        engine = engine_of(store, staging, current("cpu"), seed=seed)
        engine.tokens(25)  # nothing has left yet, and all of it is recorded
        assert engine.row.ended is None
        assert len(staging._leaving) == (6 if right else 0)
        hold.open()
        assert engine.is_right(25) is right
        staging.close()


class Pinned:
    """A draft in memory that a device writes to while the host goes on."""

    def __init__(self) -> None:
        self.layout = LAYOUT
        self.payload = torch.empty(LAYOUT.payload_bytes(BLOCK), dtype=torch.uint8, pin_memory=True).numpy().data

    def discard(self) -> None:
        """Nobody wants it back."""


@pytest.mark.parametrize("fault", [None, "reads too soon", "writes too soon"])
@pytest.mark.parametrize("device", [CUDA])
def test_on_a_busy_device(device: str, fault: str | None, seed: int) -> None:
    """The two tests above where the streams are the device's own, which no test can hold: they are kept busy."""
    faults: dict[str | None, Any] = {"reads too soon": HastyOnCuda, "writes too soon": RashOnCuda}
    side = faults.get(fault, CudaStream)(device)
    staging = staging_of(LAYOUT, torch.float32, device, side, allocate=torch.zeros)
    specs = [LayerSpec(HEADS, DIM, DIM, torch.device(device))] * LAYERS
    engine = Engine(Row([], specs, torch.float32, BLOCK, Pinned, staging), current(device), device, seed)
    engine.tokens(1)
    torch.cuda.synchronize()
    busy = side.stream if fault == "writes too soon" else torch.cuda.current_stream()
    with torch.cuda.stream(busy):
        sleep: Any = torch.cuda._sleep
        sleep(400_000_000)  # cycles: a fifth of a second
    engine.tokens(16)
    assert engine.is_right(17) is (fault is None)
    staging.close()


def test_a_link_that_is_too_slow_ends_the_recording(store: LocalStore, seed: int) -> None:
    with Hold() as hold:
        staging = staging_of(LAYOUT, torch.float32, "cpu", hold.stream, leaving_bytes=0)
        engine = engine_of(store, staging, current("cpu"), seed=seed)
        engine.tokens(25)
        assert engine.row.ended == TOO_SLOW
        assert engine.row.ids == list(range(12))  # three are leaving, and two may
        assert staging.counters.snapshot() == {"recordings_cut": 1}
        hold.open()
        assert engine.is_right(12)
        staging.close()


@pytest.mark.parametrize("held", [True, False])
def test_a_long_prompt_goes_through_few_buffers(store: LocalStore, held: bool, seed: int) -> None:
    with Hold() as hold:
        staging = staging_of(LAYOUT, torch.float32, "cpu", hold.stream, leaving_bytes=0)
        engine = engine_of(store, staging, current("cpu"), seed=seed)
        engine.tokens(3)
        if not held:
            hold.open()
            # The link keeps up: it waits here for each layer, because nothing else makes this CPU slower than a thread.
            row: Any = engine.row
            write = row.write

            def layer(*states: Any) -> None:
                write(*states)
                hold.stream.record().wait()

            row.write = layer
        engine.prompt(190)
        if held:  # nothing of the forward pass counts
            assert (engine.row.ended, len(engine.row.ids)) == (TOO_SLOW, 3)
            hold.open()
            assert engine.is_right(3)
        else:
            assert engine.row.ended is None
            assert len(staging._leaving) + len(staging._written) <= 5  # beside 8
            assert engine.is_right(193)
        staging.close()


def test_a_host_that_is_ahead_of_the_device_waits_for_the_device(store: LocalStore, seed: int) -> None:
    stream = ThreadStream("kvstore-engine")
    staging = staging_of(LAYOUT, torch.float32, "cpu", engine=lambda: stream, leaving_bytes=0)
    engine = engine_of(store, staging, stream, seed=seed)
    row: Any = engine.row
    write, holds = row.write, [Hold(stream)]

    def layer(number: int, *states: torch.Tensor) -> None:
        """The device is a layer behind the host all the time."""
        write(number, *states)
        holds.append(Hold(stream))
        holds[-1].begin()
        holds[-2].open()

    row.write = layer
    engine.prompt(150)
    assert engine.row.ended is None
    assert len(staging._leaving) == 3  # and it took five of them
    holds[-1].open()
    assert engine.is_right(150)
    staging.close()
    stream.close()


def test_rows_that_fill_their_blocks_in_the_same_step_all_go_on(store: LocalStore, seed: int) -> None:
    with Hold() as hold:
        staging = staging_of(LAYOUT, torch.float32, "cpu", hold.stream, leaving_bytes=0)
        engines = [engine_of(store, staging, current("cpu"), seed=seed + number) for number in range(7)]
        for _ in range(BLOCK + 1):
            for engine in engines:
                engine.tokens(1)
        assert [engine.row.ended for engine in engines] == [None] * 7
        hold.open()
        assert all(engine.is_right(5) for engine in engines)
        staging.close()


def test_buffers_of_a_batch_that_is_gone_are_let_go(store: LocalStore, seed: int) -> None:
    staging = staging_of(LAYOUT, torch.float32, "cpu", leaving_bytes=0)
    engines = [engine_of(store, staging, current("cpu"), seed=seed + number) for number in range(7)]
    for engine in engines:
        engine.tokens(2)
    assert all(engine.is_right(2) for engine in engines)
    assert len(staging._leaving) == 7
    engines[0] = engine_of(store, staging, current("cpu"), seed=seed)
    engines[0].tokens(2)
    assert len(staging._leaving) == 2
    assert engines[0].is_right(2)
    staging.close()


def test_the_device_is_asked_for_memory_once_too_often_and_no_more(store: LocalStore, seed: int) -> None:
    asked: list[int] = []
    limited = refusing(1)

    def allocate(*shape: int, **options: object) -> torch.Tensor:
        asked.append(1)
        return limited(*shape, **options)

    with Hold() as hold:
        staging = staging_of(LAYOUT, torch.float32, "cpu", hold.stream, allocate=allocate)
        engine = engine_of(store, staging, current("cpu"), seed=seed)
        engine.tokens(21)
        assert (len(asked), staging.short, engine.row.ended) == (2, True, None)
        assert staging.counters.snapshot() == {"blocks_recorded_directly": 5}
        hold.open()
        assert engine.is_right(21)
        staging.close()


LAYERS_UNLIKE = (LayerShape(2, 8, 8), LayerShape(1, 24, 8), LayerShape(4, 4, 12))


@pytest.mark.parametrize("steps", [[1] * 11, [3, 6, 1, 9, 2], [24, 1]])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_layers_of_different_shapes(store: LocalStore, device: str, steps: Sequence[int], seed: int) -> None:
    layout, draws = Layout(LAYERS_UNLIKE, "bfloat16", BLOCK), torch.Generator().manual_seed(seed)
    staging = staging_of(layout, torch.bfloat16, device)
    specs = [LayerSpec(s.heads, s.key_dim, s.value_dim, torch.device(device)) for s in LAYERS_UNLIKE]
    row = Row([], specs, torch.bfloat16, BLOCK, lambda: store.draft(layout), staging)
    assert not row.alike
    total = sum(steps)
    states = [
        [torch.randn(s.heads, total, dim, generator=draws).bfloat16() for dim in (s.key_dim, s.value_dim)]
        for s in LAYERS_UNLIKE
    ]
    for step in steps:
        start = len(row.ids)
        assert row.prepare(step) == step
        for layer, pair in enumerate(states):
            row.write(layer, *(part.narrow(1, start, step).to(device) for part in pair))
        row.extend(range(start, start + step))
    payload, found = payload_of(layout, torch.bfloat16), []
    for _, draft in sorted(row.take(total).items()):
        found.append(torch.frombuffer(bytearray(draft.payload), dtype=torch.bfloat16))
        draft.discard()
    for layer, pair in enumerate(states):
        got = zip(*(payload.layer(flat, layer) for flat in found), strict=True)
        for parts, expected in zip(got, pair, strict=True):
            assert torch.equal(torch.cat(parts, 1)[:, :total], expected)
    staging.close()
