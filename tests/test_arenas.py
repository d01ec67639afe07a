"""Memory that is shared by descriptor: of a fixed size, and written by the daemon alone."""

from __future__ import annotations

import os

import pytest

from kvstore.daemon.arenas import create
from kvstore.daemon.link import MAX_FDS
from kvstore.daemon.mapped import base_of, mapped
from kvstore.errors import TierError


@pytest.mark.parametrize("writable", [False, True])
def test_memory_that_somebody_could_shrink_is_not_mapped(writable: bool) -> None:
    """Who reads memory that was taken away is killed."""
    loose = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    os.ftruncate(loose, 8192)
    with pytest.raises(TierError, match="sealed"):
        mapped(loose, 8192, writable)
    fd, mapping = create("short", 4096, writable)
    mapping.close()
    with pytest.raises(TierError):
        mapped(fd, 8192, writable)
    reader, writer = os.pipe()
    os.close(writer)
    with pytest.raises(TierError):
        mapped(reader, 4096, writable)


def test_memory_that_can_be_written_is_not_taken_for_what_only_the_daemon_writes() -> None:
    fd, mapping = create("open", 4096, writable=True)
    mapping.close()
    with pytest.raises(TierError, match="sealed"):
        mapped(fd, 4096, writable=False)


def test_an_arena_shows_what_the_daemon_writes_later() -> None:
    fd, mapping = create("arena", 8192, writable=False)
    arena = mapped(fd, 8192, writable=False)
    mapping[4096:4100] = b"here"
    assert bytes(arena.view[4096:4100]) == b"here" and arena.base == base_of(arena.view)
    assert arena.view.readonly and MAX_FDS < 254
    mapping.close()
