"""Tensors over recycled memory: never shared while somebody looks, handed on afterwards, bounded."""

import gc
import random
import threading

import pytest
import torch

from kvstore.tensors.memory import LARGE, Recycler


def test_memory_comes_back_when_the_last_view_is_gone() -> None:
    recycler = Recycler()
    first = recycler.empty((4, LARGE), torch.float32)
    address, view = first.data_ptr(), first[1:2, 5:]
    del first
    gc.collect()
    assert recycler.idle_bytes == 0
    other = recycler.empty((4, LARGE), torch.float32)
    assert other.data_ptr() != address
    del view
    gc.collect()
    assert recycler.idle_bytes >= 16 * LARGE
    assert recycler.empty((4, LARGE - 100), torch.float32).data_ptr() == address


def test_small_tensors_are_torchs_own() -> None:
    recycler = Recycler()
    del (small := [recycler.empty((LARGE // 8,), torch.float32)])[:]
    gc.collect()
    assert recycler.idle_bytes == 0 and small == []


def test_a_buffer_twice_too_large_is_left_alone() -> None:
    recycler = Recycler()
    large = recycler.empty((16 * LARGE,), torch.uint8)
    address = large.data_ptr()
    del large
    gc.collect()
    assert recycler.empty((4 * LARGE,), torch.uint8).data_ptr() != address


def test_idle_memory_is_bounded() -> None:
    recycler = Recycler(max_idle=5 * LARGE)
    tensors = [recycler.empty((size * LARGE,), torch.uint8) for size in (1, 2, 3, 4)]
    del tensors
    gc.collect()
    assert recycler.idle_bytes <= 5 * LARGE


def test_usable_in_and_out_of_inference_mode() -> None:
    recycler = Recycler()
    with torch.inference_mode():
        tensor = recycler.empty((LARGE,), torch.float32)
    tensor.zero_()
    assert not tensor.is_inference()
    assert not bool(tensor.any())


@pytest.mark.parametrize("threads", [4])
def test_no_two_tensors_share_memory(threads: int, seed: int) -> None:
    recycler = Recycler(max_idle=64 * LARGE)
    wrong: list[int] = []

    def work(number: int) -> None:
        source = random.Random(seed + number)
        held: list[tuple[torch.Tensor, int]] = []
        for step in range(60):
            tensor = recycler.empty((source.randrange(LARGE, 3 * LARGE),), torch.uint8)
            mark = (number * 60 + step) % 251
            tensor[:: 1 << 16] = mark
            held.append((tensor, mark))
            if len(held) > 3:
                kept, expected = held.pop(source.randrange(len(held)))
                if not bool((kept[:: 1 << 16] == expected).all()):
                    wrong.append(step)
            del tensor

    workers = [threading.Thread(target=work, args=(number,), name=f"test-{number}") for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
