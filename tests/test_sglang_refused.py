"""SGLang's storage backend without SGLang, when something is wrong: the start stops, or a page is a miss."""

from __future__ import annotations

import logging
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from daemons import daemon
from sglang_tiny import FlatPool, LatePool, SealedPool, backend, config, keys, pages

from kvstore import BadInput
from kvstore.adapters.sglang.backend import Backend


@pytest.fixture
def place(quick: Path) -> dict[str, Any]:
    return {"dir": str(quick / "cache"), "host": "8MiB", "disk": "64MiB"}


BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no place": ({}, {}, 'give "dir" or "socket"'),
    "two places": ({"dir": "x", "socket": "unix:y"}, {}, 'give "dir" or "socket"'),
    "typing error": ({"dirs": "x"}, {}, 'did you mean "dir"'),
    "budget of a daemon": ({"socket": "unix:y", "disk": "1GiB"}, {}, '"disk" does not go with "socket"'),
    "no text": ({"dir": 5}, {}, "no text"),
    "no size": ({"dir": "x", "host": "many"}, {}, "host='many'"),
    "no time": ({"dir": "x", "timeout": "soon"}, {}, "no number of seconds"),
    "never": ({"dir": "x", "timeout": 0}, {}, "no number of seconds"),
    "nobody": ({"socket": "unix:/nobody/there"}, {}, "cannot be had"),
    "two ranks": ({"dir": "x"}, {"tp_size": 2}, "kvstore serve"),
    "a replica": ({"dir": "x"}, {"dp_rank": 1}, "kvstore serve"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_configuration_stops_the_start(name: str, quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(quick)
    extra, changes, said = BAD[name]
    with pytest.raises(BadInput, match=said) as raised:
        Backend(config(extra, **changes), {})
    assert "\n" not in str(raised.value) and list(quick.iterdir()) == []


def test_pools_that_cannot_be_stored_stop_the_start(place: dict[str, Any]) -> None:
    made = Backend(config(place | {"backend_name": "kvstore", "interface_v1": 1}), {})
    with pytest.raises(BadInput, match="page_first"):
        made.register_mem_pool_host(SealedPool())
    made.close()


def test_pages_that_are_not_in_use_yet_are_no_hindrance(place: dict[str, Any]) -> None:
    pool, names = LatePool(), keys(2)
    pool.draw(1)
    made = backend(place, pool)
    assert made.batch_set_v1(names, pages(0, 2)) == [False, False] and made.batch_exists(names) == 0
    pool.used = (0, 1, 4, 5)
    assert made.batch_set_v1(names, pages(0, 2)) == made.batch_get_v1(names, pages(4, 2)) == [True, True]
    assert pool.bytes_of(4, 2) == pool.bytes_of(0, 2)
    made.close()


def test_whatever_goes_wrong_is_a_miss_counted_and_told_once(
    place: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    made, names = backend(place), keys(2)
    unknown = SimpleNamespace(name="swa", keys=names, host_indices=pages(0, 2), hit_policy="all_pages")
    with caplog.at_level(logging.WARNING, "kvstore"):
        for _ in range(3):
            assert made.batch_set_v1(names, pages(0, 1)) == made.batch_get_v1(names, None) == [False, False]
            assert made.batch_set_v2([unknown]) == made.batch_get_v2([unknown]) == {"swa": [False, False]}
            assert made.batch_exists([*names, 5]) == 0  # type: ignore[list-item]
            assert made.batch_set_v1(names[:1], pages(400, 1)) == [False]
    assert len(caplog.records) == len({record.getMessage() for record in caplog.records}) == 5
    assert made.counts["batch_set_v1: ValueError"] == 6 and made.batch_exists(names) == 0
    assert made.batch_set_v1(names, pages(0, 2)) == [True, True] and made.batch_exists(names) == 2
    made.close()
    assert made.batch_exists(names) == 0 and made.batch_get_v1(names, pages(0, 2)) == [False, False]
    assert not made.set(names[0], torch.zeros(96, dtype=torch.bfloat16)) and not made.clear()


def test_a_page_that_is_larger_than_memory_is_not_stored(quick: Path) -> None:
    pool = FlatPool(width=1 << 17, count=2)  # 3 MiB a page
    made = backend({"dir": str(quick / "cache"), "host": "2MiB", "disk": "64MiB"}, pool)
    assert made.batch_set_v1(keys(2), pages(0, 2)) == [False, False] and made.batch_exists(keys(2)) == 0
    made.close()


def test_a_frozen_daemon_costs_the_timeout_and_a_dead_one_nothing(quick: Path) -> None:
    pool, names = FlatPool(), keys(4)
    with daemon(quick, "--dir", quick / "cache", "--disk", "64MiB") as process:
        made = backend({"socket": process.url, "timeout": 0.5}, pool)
        assert made.batch_set_v1(names, pages(0, 4)) == [True] * 4
        process.process.send_signal(signal.SIGSTOP)
        begin = time.monotonic()
        assert made.batch_get_v1(names, pages(0, 4)) == [False] * 4 and made.batch_exists(names) == 0
        assert made.batch_set_v1(keys(2, 1), pages(0, 2)) == [False] * 2
        assert time.monotonic() - begin < 10  # three calls of half a second
        process.process.send_signal(signal.SIGCONT)
        process.kill()
        assert made.batch_exists(names) == 0 and made.batch_set_v1(names, pages(0, 4)) == [False] * 4
        made.close()
