"""The device tier: slots in one pool, events before reuse, and what happens where there is less than was wanted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from devices import CUDA, KIB, MIB, TIERS, Reader, contents, fill_up, put, stream_for, tensor, write

import kvstore
from kvstore import BadInput
from kvstore.tensors.streams import CudaStream, Stream
from kvstore.tiers.base import DeviceSlots
from kvstore.tiers.device import DeviceTier
from kvstore.tiers.naive import NaiveDevice


@pytest.fixture(params=["naive", "cpu", pytest.param("cuda", marks=CUDA)])
def tier(request: pytest.FixtureRequest) -> Iterator[DeviceSlots]:
    made = TIERS[request.param](16 * MIB)
    yield made
    made.close()


@pytest.fixture
def stream(tier: DeviceSlots) -> Iterator[Stream]:
    """One beside the test's own thread."""
    made = stream_for(tier)
    yield made
    made.close()


def test_slots_are_apart_and_within_the_budget(tier: DeviceSlots) -> None:
    sizes = [96 * KIB, 512 * KIB, 4 * KIB, 3 * MIB, 4 * KIB]
    addresses = [address for size in sizes * 3 if (address := tier.reserve(size)) is not None]
    assert len(addresses) == len(sizes) * 3
    for value, address in enumerate(addresses):
        memory = tensor(tier.memory(address))
        assert (len(memory), memory.data_ptr()) == (sizes[value % 5], tier.pointer(address))
        put(tier, address, value)
    assert [contents(tier, address) for address in addresses] == [{value} for value in range(15)]
    fill_up(tier, 4 * KIB)
    assert sum(sizes) * 3 < tier.used <= tier.capacity == 16 * MIB


def test_room_comes_back(tier: DeviceSlots) -> None:
    addresses = fill_up(tier, 600 * KIB)
    assert len(addresses) * 600 * KIB > 0.9 * tier.capacity
    tier.free(addresses[3])
    assert tier.same_class(addresses[4], 600 * KIB)
    assert tier.reserve(600 * KIB) is not None
    assert tier.reserve(600 * KIB) is None


@pytest.mark.parametrize("other", [4 * KIB, 900 * KIB])
def test_neighbours_make_room_for_another_class(tier: DeviceSlots, other: int) -> None:
    addresses = fill_up(tier, 100 * KIB)
    for address in tier.neighbours(addresses[7]):
        tier.free(address)
    assert tier.reserve(other) is not None


def test_holes_beside_each_other_are_one(tier: DeviceSlots) -> None:
    for address in fill_up(tier, 100 * KIB):
        tier.free(address)
    assert tier.reserve(12 * MIB) is not None
    assert tier.reserve(5 * MIB) is None


def test_what_is_erased_is_gone_and_the_others_stay(tier: DeviceSlots) -> None:
    addresses = fill_up(tier, MIB)[:4]
    for value, address in enumerate(addresses):
        put(tier, address, value + 1)
    tier.erase(addresses[1:3]).wait()
    assert [contents(tier, address) for address in addresses] == [{1}, {0}, {0}, {4}]


def test_memory_outlives_the_tier_for_who_holds_it() -> None:
    tier = DeviceTier(MIB, "cpu")
    address = tier.reserve(4096)
    assert address is not None
    put(tier, address, 7)
    memory = tier.memory(address)
    tier.close()
    tier.close()
    assert int(memory.min()) == 7


def test_who_takes_a_slot_again_waits_for_its_readers(tier: DeviceSlots, stream: Stream) -> None:
    for address in (addresses := fill_up(tier, MIB)):
        put(tier, address, 1)
    reader = Reader(tier)
    reader.reads(addresses[5])
    tier.free(addresses[5])
    again = tier.reserve(MIB)
    assert again is not None
    write(tier, stream, again, 2)
    event = stream.record()
    assert not event.done() or isinstance(stream, CudaStream)
    assert reader.saw() == [{1}]
    event.wait()
    assert contents(tier, again) == {2}


def test_events_stay_with_the_bytes_when_these_are_cut_anew(tier: DeviceSlots, stream: Stream) -> None:
    for address in (addresses := fill_up(tier, 512 * KIB)):
        put(tier, address, 1)
    reader = Reader(tier)
    for address in addresses:
        reader.reads(address)
        tier.free(address)
    for address in (large := fill_up(tier, 3 * MIB)):
        write(tier, stream, address, 2)
    assert large
    for address in large:
        tier.free(address)
    small = [slot for _ in range(9) if (slot := tier.reserve(4 * KIB)) is not None]
    for address in small:
        write(tier, stream, address, 3)
    assert reader.saw() == [{1}] * len(addresses)
    stream.record().wait()
    assert [contents(tier, address) for address in small] == [{3}] * 9


def test_erasing_waits_for_readers(tier: DeviceSlots) -> None:
    addresses = fill_up(tier, MIB)[:2]
    for address in addresses:
        put(tier, address, 1)
    reader = Reader(tier)
    reader.reads(addresses[0])
    if isinstance(tier, NaiveDevice):
        reader.go_on()  # it blocks
    event = tier.erase(addresses)
    assert reader.saw() == [{1}]
    event.wait()
    assert [contents(tier, address) for address in addresses] == [{0}, {0}]


def test_who_opens_it_in_inference_mode_can_write_outside_of_it() -> None:
    with torch.inference_mode():
        tier = DeviceTier(MIB, "cpu")
        address = tier.reserve(4096)
        assert address is not None
        memory = tier.memory(address)
    memory.fill_(7)
    put(tier, address, 8)
    assert contents(tier, address) == {8}
    tier.close()


def test_events_that_are_over_are_not_kept(stream: Stream) -> None:
    tier = DeviceTier(MIB, "cpu")
    address = tier.reserve(4096)
    assert address is not None
    for value in range(1000):
        write(tier, stream, address, value % 256)
        stream.record().wait()
    assert len(tier._events[address]) < 20
    tier.close()


# -- less than was wanted --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", range(6))
def test_a_pool_that_does_not_fit_is_halved_until_it_does(step: int, caplog: pytest.LogCaptureFixture) -> None:
    asked: list[int] = []

    def take(size: int, device: torch.device) -> torch.Tensor:
        asked.append(size)
        if len(asked) <= step:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.empty(size, dtype=torch.uint8, device=device)

    tier = DeviceTier(16 * MIB, "cpu", take)
    capacity = 16 * MIB >> step if step <= 4 else 0
    assert tier.capacity == capacity
    assert tier.gauges() == {"device_capacity": capacity, "device_missing_bytes": 16 * MIB - capacity}
    assert len(caplog.records) == (step > 0)
    assert (tier.reserve(4096) is None) is (capacity == 0)
    tier.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is CUDA")
def test_without_cuda_there_is_no_tier(caplog: pytest.LogCaptureFixture) -> None:
    with kvstore.open(host="4MiB", device="2MiB", device_name="cuda") as store:
        said = store.stats()
    assert said["tiers"]["device"] == {"bytes": 0, "blocks": 0, "capacity": 0, "used": 0}
    assert (said["gauges"]["device_capacity"], said["gauges"]["device_missing_bytes"]) == (0, 2 * MIB)
    assert [record.message for record in caplog.records] == ["there is no device cuda: nothing is kept on it"]


def test_a_device_that_is_not_there_is_none(caplog: pytest.LogCaptureFixture) -> None:
    tier = DeviceTier(MIB, "cuda:63")
    assert (tier.capacity, tier.reserve(4096)) == (0, None)
    tier.close()


def test_nonsense_is_refused() -> None:
    for device, name in (("much", "cpu"), (-1, "cpu"), (4096, "cpu"), (True, "cpu"), (MIB, "gpu"), (MIB, "cuda:x")):
        with pytest.raises(BadInput):
            kvstore.open(host="4MiB", device=device, device_name=name)
    with kvstore.open(host="4MiB", device=0, device_name="cpu") as store:
        assert store.stats()["gauges"]["device_missing_bytes"] == 0
    with kvstore.open(host="4MiB") as store:
        assert "device" not in store.stats()["tiers"]
