"""The parts of the remote tier, each alone: URLs, options, seals, cuts, the breaker, sockets with bounds."""

from __future__ import annotations

import logging
import socket
import threading
import time
from itertools import pairwise

import pytest
from blocks import WIDE
from hypothesis import given
from hypothesis import strategies as st

from kvstore import BadInput
from kvstore.errors import Corrupt, TierError
from kvstore.remote.breaker import LIMIT, Breaker
from kvstore.remote.cutting import cut, parts_of
from kvstore.remote.options import RemoteOptions
from kvstore.tiers.bounded import BoundedSocket, bounded, time_left
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.redis_client import target
from kvstore.tiers.seal import Envelope, Seal, parts_in, unpack

PASSWORD = "s3cr3t-word"


@pytest.mark.parametrize(
    ("url", "kind", "place"),
    [
        ("redis://localhost:6380/2", "single", "localhost:6380"),
        (f"redis://ann:{PASSWORD}@cache.example", "single", "cache.example:6379"),
        (f"rediss://:{PASSWORD}@[::1]:7000?ssl_cert_reqs=none", "single", "::1:7000"),
        (f"unix://ann@/run/redis.sock?db=1&password={PASSWORD}", "single", "/run/redis.sock"),
        (f"redis+sentinel://ann:{PASSWORD}@a:1,b/main/3", "sentinel", "a:1,b:26379"),
        (f"rediss+sentinel://a/main?sentinel_password={PASSWORD}", "sentinel", "a:26379"),
        (f"redis+cluster://:{PASSWORD}@a,b:7001", "cluster", "a:6379,b:7001"),
        ("rediss+cluster://a?ssl_ca_certs=/x", "cluster", "a:6379"),
    ],
)
def test_urls_are_read_and_secrets_not_shown(url: str, kind: str, place: str) -> None:
    found = target(url)
    assert (found.kind, found.place, found.tls) == (kind, place, url.startswith("rediss"))
    assert PASSWORD not in repr(found) and PASSWORD not in repr(RemoteOptions(url)) and "ann" not in repr(found)


@pytest.mark.parametrize(
    "url",
    [
        f"http://ann:{PASSWORD}@host",
        "redis://",
        f"redis://ann:{PASSWORD}@host:port",
        f"redis://ann:{PASSWORD}@host?no_such_option=1",
        f"redis+sentinel://ann:{PASSWORD}@a:1",
        f"redis+sentinel://ann:{PASSWORD}@a:1/main/x",
        f"redis+cluster://ann:{PASSWORD}@a:1/3",
        f"redis+cluster://ann:{PASSWORD}@a,,b",
        f"redis://ann:{PASSWORD}@host?socket_timeout=soon",
        f"{PASSWORD}",
    ],
)
def test_bad_urls_are_refused_without_quoting_them(url: str) -> None:
    with pytest.raises(BadInput) as caught:
        RedisTier(url, "x")
    assert PASSWORD not in str(caught.value) and "redis" in str(caught.value)
    assert caught.value.__cause__ is None or PASSWORD not in str(caught.value.__cause__)


def test_errors_and_logs_show_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    tier = RedisTier(f"redis://ann:{PASSWORD}@127.0.0.1:1", "x")
    with pytest.raises(TierError) as caught:
        tier.find([b"k" * 32], 1.0)
    assert "127.0.0.1:1" in str(caught.value) and PASSWORD not in str(caught.value) + caplog.text
    assert caught.value.__suppress_context__  # so that no traceback shows what redis-py said


@pytest.mark.parametrize(
    "wrong",
    [
        {"ttl": 0},
        {"lookup": float("nan")},
        {"timeout": "1s"},
        {"prefix": "a*"},
        {"prefix": "{a}"},
        {"prefix": ""},
        {"part_bytes": 10},
        {"part_bytes": 1 << 40},
        {"budget": 0},
        {"budget": True},
        {"key": b"short"},
        {"key": "x" * 20},
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(BadInput, match=next(iter(wrong))):
        RemoteOptions("redis://host", **wrong)  # type: ignore[arg-type]


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.integers(1, 3000))
def test_cuts_cover_every_byte_once_in_parts_that_are_small_enough(sizes: list[int], part_bytes: int) -> None:
    offsets = tuple(sum(sizes[:at]) for at in range(len(sizes) + 1))
    groups = cut(offsets, part_bytes)
    assert [layer for group in groups for layer in range(group.first, group.last)] == list(range(len(sizes)))
    ranges = [each for group in groups for each in group.ranges]
    assert [begin for begin, _ in ranges] == [0, *(end for _, end in ranges[:-1])] and ranges[-1][1] == offsets[-1]
    assert all(0 < end - begin <= part_bytes for begin, end in ranges)
    assert [group.part for group in groups] == [0, *(group.part + len(group.ranges) for group in groups[:-1])]
    assert parts_of(groups) == len(ranges)
    assert groups[0].last == 1 or len(groups) == 1
    for one, other in pairwise(groups[1:]):  # no two that could have been one
        assert offsets[other.last] - offsets[one.first] > part_bytes


def test_a_block_in_one_part_is_one_group() -> None:
    offsets = tuple(WIDE.layer_offsets(32))
    assert len(cut(offsets, offsets[-1])) == 1 and len(cut(offsets, offsets[-1] - 1)) == 2


@pytest.mark.parametrize("change", ["", "cut", "longer", "magic", "parts"])
def test_envelopes_are_read_whole_or_not_at_all(change: str) -> None:
    packed = Envelope(b"header", 4096, 7).pack()
    assert unpack(packed) == Envelope(b"header", 4096, 7) and parts_in(packed[:16]) == 7
    damaged = {"": b"", "cut": packed[:-1], "longer": packed + b"x", "magic": b"X" + packed[1:]}
    with pytest.raises(Corrupt):
        unpack(damaged.get(change, packed[:8] + bytes(4) + packed[12:]))


def test_a_seal_is_of_one_secret_one_block_one_part_and_all_bytes() -> None:
    seal, other, key = Seal(b"one secret" * 2), Seal(b"two secret" * 2), b"k" * 32
    closed = bytes(seal.close(key, 3, b"data"))
    assert bytes(seal.open(key, 3, closed)) == b"data" and len(closed) == 4 + seal.size
    for sealer, name, part, data in (
        (other, key, 3, closed),
        (seal, b"j" * 32, 3, closed),
        (seal, key, 4, closed),
        (seal, key, 3, closed[:-1]),
        (seal, key, 3, b"e" + closed[1:]),
        (seal, key, 3, b""),
    ):
        with pytest.raises(Corrupt):
            sealer.open(name, part, data)
    assert Seal(None).close(key, 3, b"data") == b"data" and Seal(None).size == 0


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def fail(breaker: Breaker, times: int) -> None:
    for _ in range(times):
        breaker.failed()


def test_the_breaker_opens_after_three_failures_in_a_row_and_rests_longer_each_time() -> None:
    clock, said = Clock(), list[str]()
    breaker = Breaker(lambda: said.append("opened"), lambda: said.append("mended"), clock)
    fail(breaker, LIMIT - 1)
    breaker.succeeded()
    fail(breaker, LIMIT - 1)
    assert (breaker.closed, breaker.try_again(), said) == (True, False, [])
    breaker.failed()
    assert (breaker.closed, breaker.opens, said) == (False, 1, ["opened"])
    rests = []
    for _ in range(9):
        begin = clock.now
        while not breaker.try_again():
            clock.now += 0.5
        rests.append(clock.now - begin)
        assert not breaker.try_again()  # one is enough
        breaker.failed()
    assert rests == [1, 2, 4, 8, 16, 32, 60, 60, 60] and breaker.opens == 10
    clock.now += 60
    assert breaker.try_again()
    breaker.succeeded()
    assert breaker.closed and said[-1] == "mended" and said.count("mended") == 1
    fail(breaker, LIMIT)
    clock.now += 1
    assert breaker.try_again()  # it has forgotten how long it had rested


def test_what_began_before_the_breaker_opened_changes_nothing() -> None:
    clock = Clock()
    breaker = Breaker(clock=clock)
    fail(breaker, LIMIT + 5)
    breaker.succeeded()
    assert not breaker.closed and breaker.opens == 1
    clock.now += 1
    assert breaker.try_again()
    clock.now += 1  # whoever tried never says how it went
    assert breaker.try_again()


def test_a_bounded_socket_keeps_to_the_whole_time_not_to_that_of_each_receive() -> None:
    ours, theirs = socket.socketpair()
    over = threading.Event()

    def trickle() -> None:
        while not over.wait(0.02):
            theirs.send(b"x")

    thread = threading.Thread(target=trickle)
    thread.start()
    try:
        sock, begin, got = BoundedSocket(ours), time.monotonic(), list[bytes]()
        with pytest.raises(TimeoutError), bounded(0.2, 1 << 20):
            got.extend(iter(lambda: sock.recv(1), b""))
        assert 2 <= len(got) <= 20
        assert time.monotonic() - begin < 2.0
    finally:
        over.set()
        thread.join()
        ours.close()
        theirs.close()


@pytest.mark.parametrize("received", [True, False])
def test_a_bounded_socket_takes_no_more_bytes_than_were_asked_for(received: bool) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, bounded(5.0, 100 if received else 99):
        theirs.sendall(b"x" * 100)
        if received:
            assert BoundedSocket(ours).recv_into(bytearray(200)) == 100
        else:
            with pytest.raises(OSError, match="more than was asked for"):
                BoundedSocket(ours).recv_into(bytearray(200))


def test_sending_to_somebody_who_does_not_read_ends_in_time() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, bounded(0.1, 0), pytest.raises(TimeoutError):
        BoundedSocket(ours).sendall(bytes(64 << 20))


def test_bounds_are_each_threads_own() -> None:
    seen = list[float | None]()
    with bounded(1.0, 10):
        thread = threading.Thread(target=lambda: seen.append(time_left()))
        thread.start()
        thread.join()
        with bounded(0.5, 10):
            inner = time_left()
        assert inner is not None and inner <= 0.5 and (time_left() or 0) > 0.5
    assert seen == [None]
