"""The contract of remote tiers, held by the naive one and by Redis: alone, by a Unix socket, with TLS, as a user with
few rights, behind Sentinel, and as a cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from remotes import options, redis_of
from servers import cluster, running, sentinel, with_tls

from kvstore.bench.remote.server import wait_until
from kvstore.errors import Corrupt, TierError
from kvstore.tiers.base import Copy, Missing, Remote, Wanted
from kvstore.tiers.naive_remote import NaiveRemote, Shelf
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.seal import Envelope

KINDS = ("naive", "alone", "unix", "tls", "user", "sentinel", "cluster")
SECONDS, SECRET = 10.0, b"0123456789abcdef"
FEW_RIGHTS = (
    "+get",
    "+set",
    "+pexpire",
    "+unlink",
    "+scan",
    "+zadd",
    "+zrem",
    "+zpopmin",
    "+incrby",
    "+ping",
)


@pytest.fixture(scope="module", params=KINDS)
def place(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where blocks are: a URL; none: on a shelf."""
    with ExitStack() as stack:
        kind = request.param
        if kind == "naive":
            yield ""
        elif kind == "unix":
            folder = request.getfixturevalue("tmp_path_factory").mktemp("unix")
            stack.enter_context(running("--unixsocket", str(folder / "redis.sock")))
            yield f"unix://{folder}/redis.sock?db=3"
        elif kind == "tls":
            server, made = stack.enter_context(with_tls())
            yield f"rediss://127.0.0.1:{server.port}/0?ssl_ca_certs={made.authority}"
        elif kind == "user":
            user = ("--user", "ann", "on", ">secret word", "~*", "-@all", *FEW_RIGHTS)
            server = stack.enter_context(
                running(*user, "--user", "default", "off", username="ann", password="secret word")
            )
            yield f"redis://ann:secret%20word@127.0.0.1:{server.port}/0"
        elif kind == "sentinel":
            server = stack.enter_context(running())
            port = stack.enter_context(sentinel(server))
            yield f"redis+sentinel://127.0.0.1:1,127.0.0.1:{port}/main/2"
        elif kind == "cluster":
            servers = stack.enter_context(cluster())
            yield "redis+cluster://" + ",".join(f"127.0.0.1:{server.port}" for server in servers[:2])
        else:
            yield stack.enter_context(running()).url


class Hosts:
    """Makes tiers in one place under one prefix, and closes them."""

    def __init__(self, place: str) -> None:
        self._place, self._prefix, self._made = place, options().prefix, list[Remote]()
        self.shelf = Shelf()

    def tier(self, budget: int | None = None, secret: bytes | None = None) -> Remote:
        if not self._place:
            made: Remote = NaiveRemote(self.shelf, budget, secret)
        else:
            made = redis_of(options(self._place, prefix=self._prefix, budget=budget, key=secret))
        self._made.append(made)
        return made

    def close(self) -> None:
        for tier in self._made:
            tier.close()


@pytest.fixture
def hosts(place: str) -> Iterator[Hosts]:
    found = Hosts(place)
    yield found
    found.close()


def block(
    seed: int, sizes: Sequence[int] = (1000, 70_000, 5), ttl: float = 600.0
) -> tuple[Copy, Envelope, list[bytes]]:
    """A block of random bytes."""
    key = seed.to_bytes(32, "big")
    parts = [os.urandom(size) for size in sizes]
    return Copy(key, len(parts), sum(sizes), ttl), Envelope(b"header %d" % seed, 1 << 20, len(parts)), parts


def put(tier: Remote, made: tuple[Copy, Envelope, list[bytes]]) -> Copy:
    copy, envelope, parts = made
    tier.put(copy, envelope, [memoryview(part) for part in parts], SECONDS)
    return copy


def read(tier: Remote, copy: Copy, parts: Sequence[bytes]) -> list[object]:
    """Each part as it comes back, or the class of what is wrong with it."""
    buffers = [bytearray(len(part)) for part in parts]
    wanted = [Wanted(copy.key, number, memoryview(buffer)) for number, buffer in enumerate(buffers)]
    errors = tier.read(wanted, SECONDS)
    return [bytes(b) if error is None else type(error) for b, error in zip(buffers, errors, strict=True)]


def test_what_one_host_puts_another_finds_and_reads(hosts: Hosts) -> None:
    one, other = hosts.tier(), hosts.tier()
    made = [block(seed) for seed in range(1, 6)]
    copies = [put(one, each) for each in made]
    keys = [copy.key for copy in copies]
    assert other.find([*keys, b"\xff" * 32], SECONDS) == [*(envelope for _, envelope, _ in made), None]
    for copy, (_, _, parts) in zip(copies, made, strict=True):
        assert read(other, copy, parts) == parts
    assert other.find([], SECONDS) == [] and other.read([], SECONDS) == [] and other.refresh([], SECONDS) == []


def test_parts_of_another_length_are_not_taken(hosts: Hosts) -> None:
    tier = hosts.tier()
    copy = put(tier, block(1, (100, 100)))
    assert read(tier, copy, [b"x" * 99, b"x" * 100])[0] is Corrupt
    assert read(tier, copy, [b"x" * 101, b"x" * 100])[0] is Corrupt


def test_what_is_dropped_is_gone(hosts: Hosts) -> None:
    tier = hosts.tier()
    kept, gone = put(tier, block(1)), put(tier, block(2))
    assert tier.drop([gone, block(3)[0]], SECONDS) == 1
    assert [found is not None for found in tier.find([kept.key, gone.key], SECONDS)] == [True, False]
    assert read(tier, gone, [b"x" * 1000]) == [Missing]
    assert tier.drop([gone], SECONDS) == 0


def test_refreshing_says_what_is_there_whole(hosts: Hosts) -> None:
    tier = hosts.tier()
    whole, never = put(tier, block(1)), block(2)[0]
    longer = put(tier, block(3))._replace(parts=4)
    assert tier.refresh([never, whole, longer], SECONDS) == [False, True, False]


def test_blocks_die_after_their_time_unless_they_are_refreshed(hosts: Hosts) -> None:
    tier = hosts.tier()
    short, kept = put(tier, block(1, ttl=0.2)), put(tier, block(2, ttl=0.2))
    assert tier.refresh([kept._replace(ttl=600.0)], SECONDS) == [True]
    wait_until(lambda: tier.find([short.key], SECONDS) == [None])
    assert tier.find([kept.key], SECONDS) != [None]
    assert read(tier, kept, [b"x" * 1000])[0] is not Missing


def test_the_budget_is_kept_and_the_oldest_go(hosts: Hosts) -> None:
    tier = hosts.tier(budget=10_000)
    first = put(tier, block(1, (1000, 1000)))
    put(tier, block(2, (1000, 1000)))
    tier.refresh([first], SECONDS)  # so the second is the one used longest ago
    for seed in range(3, 6):
        put(tier, block(seed, (1000, 1000)))
    assert tier.gauges()["used"] == 10_000
    for seed in range(6, 9):
        put(tier, block(seed, (1000, 1000)))
        assert tier.gauges()["used"] <= 10_000
    there = [found is not None for found in tier.find([seed.to_bytes(32, "big") for seed in range(1, 9)], SECONDS)]
    assert not there[1] and there[7] and sum(there) <= 5
    assert tier.gauges()["capacity"] == 10_000


def test_putting_again_counts_once(hosts: Hosts) -> None:
    tier = hosts.tier(budget=10_000)
    for _ in range(8):
        put(tier, block(1, (1000, 1000)))
    assert tier.gauges()["used"] == 2000
    assert tier.drop([block(1, (1000, 1000))[0]], SECONDS) == 1 and tier.gauges()["used"] == 0


def test_without_the_secret_nothing_is_found_or_read(hosts: Hosts) -> None:
    ours, same, nobody, others = (hosts.tier(secret=secret) for secret in (SECRET, SECRET, None, b"another secret!!"))
    made = block(1)
    copy = put(ours, made)
    assert same.find([copy.key], SECONDS) == [made[1]] and read(same, copy, made[2]) == made[2]
    for stranger in (nobody, others):
        assert stranger.find([copy.key], SECONDS) == [None]
        assert set(read(stranger, copy, made[2])) == {Corrupt}
        assert stranger.gauges()["refused"] >= 1
    without = put(nobody, block(2))
    assert ours.find([without.key], SECONDS) == [None]


def test_a_proof_is_of_one_block_and_one_part() -> None:
    shelf = Shelf()
    tier, copy, other = NaiveRemote(shelf, secret=SECRET), block(1, (100, 100))[0], block(2, (100, 100))[0]
    for seed in (1, 2):
        put(tier, block(seed, (100, 100)))
    parts = shelf.parts
    parts[copy.key, 0], parts[copy.key, 1] = parts[copy.key, 1], parts[other.key, 1]
    assert read(tier, copy, [b"x" * 100] * 2) == [Corrupt, Corrupt]


def test_a_scan_sees_every_block_and_what_is_left_of_others(hosts: Hosts) -> None:
    tier = hosts.tier()
    made = {copy.key: envelope for copy, envelope, parts in (block(seed) for seed in range(1, 200))}
    for seed in range(1, 200):
        put(tier, block(seed, (10, 10, 10)))
    seen: dict[bytes, Envelope | None] = {}
    tier.scan(lambda some: seen.update({key: envelope for key, _, envelope in some}), SECONDS)
    assert seen == made


def test_nothing_is_said_after_closing(hosts: Hosts) -> None:
    tier = hosts.tier()
    tier.close()
    with pytest.raises(TierError):
        tier.find([b"x" * 32], SECONDS)


def test_after_a_reset_it_goes_on(hosts: Hosts) -> None:
    tier = hosts.tier()
    copy = put(tier, block(1))
    tier.reset()
    assert tier.find([copy.key], SECONDS) != [None]


def test_a_header_without_all_parts_is_not_left_behind(tmp_path: Path) -> None:
    """A server that lets parts go while a block is put: the block is not there afterwards."""
    with running("--maxmemory", "1500kb", "--maxmemory-policy", "allkeys-lru") as server:
        tier = RedisTier(server.url, "test")
        copy, envelope, parts = block(1, (200_000,) * 8)
        with pytest.raises(TierError):
            put(tier, (copy, envelope, parts))
        assert tier.find([copy.key], SECONDS) == [None]
        tier.close()
