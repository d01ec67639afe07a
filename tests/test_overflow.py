"""What stays of a conversation that has outgrown its context: a function of its length, and within its bounds."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.policies.overflow import Window, streaming, truncation


@st.composite
def windows(draw: st.DrawFn) -> Window:
    sinks, step = draw(st.integers(0, 6)), draw(st.integers(1, 12))
    return Window(sinks + step + draw(st.integers(0, 30)), sinks, step)


def indexes(window: Window, tokens: int) -> list[int]:
    return [index for first, stop in window.kept(tokens) for index in range(first, stop)]


def one_by_one(window: Window) -> Iterator[list[int]]:
    """A cache that reads one token after the other: what it holds behind each."""
    cache: list[int] = []
    index = 0
    while True:
        if len(cache) == window.context:
            del cache[window.sinks : window.sinks + window.step]
        cache.append(index)
        yield list(cache)
        index += 1


@given(windows())
def test_equal_to_a_cache_that_drops_when_it_is_full(window: Window) -> None:
    assert indexes(window, 0) == []
    for tokens, cache in zip(range(1, 4 * window.context), one_by_one(window), strict=False):
        assert indexes(window, tokens) == cache


@given(windows(), st.integers(0, 10**6))
def test_bounds(window: Window, tokens: int) -> None:
    kept = indexes(window, tokens)
    assert len(kept) == tokens - window.dropped(tokens) <= window.context
    assert len(kept) > window.context - window.step or len(kept) == tokens
    sinks = min(window.sinks, tokens)
    assert kept[:sinks] == list(range(sinks))
    assert kept[sinks:] == list(range(tokens - len(kept) + sinks, tokens))  # the latest, up to the very last
    assert window.dropped(tokens) <= window.dropped(tokens + 1)
    assert window.dropped(tokens) % window.step == 0


@given(windows(), st.integers(0, 10**6))
def test_nothing_goes_before_the_boundary(window: Window, tokens: int) -> None:
    boundary = window.boundary(tokens)
    assert boundary > tokens
    gone = window.dropped(tokens + 1)
    assert [window.dropped(length) for length in range(tokens + 1, boundary + 1)] == [gone] * (boundary - tokens)
    assert window.dropped(boundary + 1) == gone + window.step
    assert boundary - gone == window.context  # so that no piece overfills the cache


@given(windows(), st.lists(st.integers(1, 40), min_size=1, max_size=20))
def test_reading_in_pieces_never_overfills(window: Window, pieces: list[int]) -> None:
    """However turns fall: each piece is cut at boundaries, and room is made before each part."""
    read = held = 0
    for piece in pieces:
        end = read + piece
        while read < end:
            stop = min(end, window.boundary(read))
            held = read - window.dropped(stop) + stop - read
            assert held <= window.context
            read = stop
        assert held == len(indexes(window, end))


def test_the_papers_shapes() -> None:
    assert streaming(8, sinks=2, step=1).kept(12) == [(0, 2), (6, 12)]
    assert streaming(8, sinks=2, step=1).boundary(12) == 13
    half = truncation(8)
    assert half == Window(8, 0, 4)
    assert [half.kept(tokens) for tokens in (8, 9, 12, 13)] == [[(0, 8)], [(4, 9)], [(4, 12)], [(8, 13)]]
    assert truncation(10, ratio=0.3, sinks=2).kept(11) == [(0, 2), (5, 11)]
    assert Window(5, 2, 3).kept(6) == [(0, 2), (5, 6)]  # all but the sinks goes


@pytest.mark.parametrize(
    ("context", "sinks", "step"), [(19, 4, 16), (0, 0, 1), (8, -1, 1), (8, 4, 0), (8, 0, -2), (8, 9, 1)]
)
def test_what_cannot_be_is_refused(context: int, sinks: int, step: int) -> None:
    with pytest.raises(ValueError, match=f"context of {context} tokens is full|sinks={sinks} and step={step}"):
        Window(context, sinks, step)
    Window(20, 4, 16)


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.1, float("nan")])
def test_a_ratio_is_a_share(ratio: float) -> None:
    with pytest.raises(ValueError, match="no share"):
        truncation(64, ratio)


def test_a_ratio_that_drops_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="step=0"):
        truncation(3, 0.1)
    with pytest.raises(ValueError, match="context of 4"):
        truncation(4, 0.5, sinks=3)
