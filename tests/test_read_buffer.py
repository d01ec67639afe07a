"""How far ahead layers are loaded: the formula on the paper's own figures, its limits, and a simulation."""

import random

import pytest

from kvstore.policies.read_buffer import layers_ahead, read_buffer


def test_the_papers_figures() -> None:
    # LLaMA-65B on four GPUs: 2K tokens are 5 GB, which load in 192 ms at 26 GB/s, and take 360 ms to prefill.
    load, prefill, history = 0.192 / 2048, 0.360 / 2048, 2048
    total = 5 * 10**9
    assert read_buffer(load, history, prefill, 2048, total) == 0  # perfect overlap
    # 100 new tokens behind 1K of history: B * (T_load * L_hist - T_pref * L_new)
    bandwidth, half = total / 0.192, total // 2
    expected = bandwidth * (load * 1024 - prefill * 100)
    assert read_buffer(load, 1024, prefill, 100, half) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("load", "history", "prefill", "new", "expected"),
    [
        (0.0, 100, 1.0, 1, 0),  # not measured yet
        (1.0, 0, 1.0, 1, 0),  # nothing to load
        (1.0, 100, 0.0, 1, 1000),  # not measured yet: all of it, never more
        (1.0, 100, 1.0, 1000, 0),  # never below nothing
        (2.0, 100, 1.0, 100, 500),
    ],
)
def test_clamped_to_what_there_is(load: float, history: int, prefill: float, new: int, expected: int) -> None:
    assert read_buffer(load, history, prefill, new, 1000) == expected


def test_whole_layers() -> None:
    assert layers_ahead(0, 1000, 10) == 1  # the next one, always
    assert layers_ahead(1, 1000, 10) == 1
    assert layers_ahead(401, 1000, 10) == 5
    assert layers_ahead(5000, 1000, 10) == 10
    assert layers_ahead(0, 0, 10) == 1


def stalled(layers: int, load: float, compute: float, ahead: int) -> float:
    """Seconds that a forward pass waits whose first ``ahead`` layers are there when it begins."""
    now = waited = 0.0
    for layer in range(layers):
        there = max(0, layer + 1 - ahead) * load
        waited += max(0.0, there - now)
        now = max(now, there) + compute
    return waited


def test_with_the_buffer_the_model_does_not_wait(seed: int) -> None:
    source = random.Random(seed)
    waits = 0
    for _ in range(300):
        layers = source.randrange(2, 80)
        load, compute = source.uniform(0.1, 5), source.uniform(0.1, 5)
        buffer = read_buffer(load * layers, 1, compute * layers, 1, layers * 1000)
        ahead = layers_ahead(buffer, layers * 1000, layers)
        # One layer more than the formula's: it counts all compute as cover, but nothing covers the first layer.
        assert stalled(layers, load, compute, min(layers, ahead + 1)) < 1e-9 * layers
        waits += stalled(layers, load, compute, max(0, ahead - 2)) > 0
    assert waits > 100  # a smaller one is not enough
