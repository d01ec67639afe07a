"""Encryption at rest: what is on disk, who can read it, and what goes with a key."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from blocks import NS, ODD, SMALL, WIDE, found, ids, load_all, namespace, recount, save
from faulty_files import FaultyFiles
from gates import fetches_are_over, only_on_disk
from vaults import gated_and_sealed, keys_of, leaks_of, plain_sums, sealed, secrets

import kvstore
from kvstore import BadInput, Layout, StoreBusy
from kvstore.directory import verify
from kvstore.tiers.base import Problem

OTHER = namespace("other")


@pytest.mark.parametrize("layout", [SMALL, WIDE, ODD], ids=["small", "wide", "odd"])
@pytest.mark.parametrize("encrypted", [True, False], ids=["sealed", "plain"])
def test_nothing_of_a_chain_is_on_disk(tmp_path: Path, layout: Layout, encrypted: bool) -> None:
    """Not in the slots, nor in the index, while it is open, when it is closed, and when it was killed."""
    tokens = ids(1, 3 * layout.block_tokens + 5)
    keys = tmp_path / "keys" if encrypted else None
    with kvstore.open(tmp_path / "cache", host="4MiB", disk="32MiB", encryption=keys) as store:
        assert save(store, tokens, layout=layout).wait().tokens == len(tokens)
        wanted = secrets(tokens, layout=layout) | plain_sums(store)
        shown = leaks_of(tmp_path / "cache", wanted)
        assert (shown == []) is encrypted
        if not encrypted:  # the search finds all kinds of what it looks for
            assert {what.split()[0] for what in shown} >= {"key", "tokens", "KV", "checksum"} - (
                {"KV"} if layout is ODD else set()
            )
        only_on_disk(store)
        assert load_all(store, [*tokens, 0], layout=layout) == len(tokens)
        assert store.verify() == [] and recount(store) == []
    assert (leaks_of(tmp_path / "cache", wanted) == []) is encrypted
    with kvstore.open(tmp_path / "cache", host="4MiB", disk="32MiB", encryption=keys) as store:
        assert load_all(store, [*tokens[:-2], 0], layout=layout) == len(tokens) - 2
        assert store.verify() == [] and recount(store) == []


def test_one_key_for_each_namespace_and_for_its_owner_alone(tmp_path: Path) -> None:
    with sealed(tmp_path) as store:
        save(store, ids(1, 40)).wait()
        save(store, ids(1, 40), OTHER).wait()
        save(store, ids(2, 40)).wait()
    assert keys_of(tmp_path) == sorted((NS.digest.hex(), OTHER.digest.hex()))
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700
    secret = {path.read_bytes() for path in (tmp_path / "keys").iterdir() if path.name != "lock"}
    assert len(secret) == 2 and {len(key) for key in secret} == {32}
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in (tmp_path / "keys").iterdir())


def test_a_key_is_durable_before_anything_is_written_with_it(tmp_path: Path) -> None:
    files = FaultyFiles()
    with sealed(tmp_path, files) as store:
        opened = len(files.log)
        save(store, ids(1, 16)).wait()
    log = files.log[opened:]
    made = log.index(f"rename {NS.digest.hex()}")
    assert log[made - 1].startswith("sync .kvstore-") and log[made + 1] == "sync_folder keys"
    assert made + 1 < next(at for at, call in enumerate(log) if call.startswith("write extent-"))


def test_where_no_key_can_be_made_blocks_stay_in_memory(tmp_path: Path) -> None:
    files = FaultyFiles()
    tokens = ids(1, 40)
    with sealed(tmp_path, files) as store:
        shutil.rmtree(tmp_path / "keys")
        assert save(store, tokens).wait().tokens == 0
        assert load_all(store, [*tokens, 0]) == 40
        assert store.stats()["counters"]["failed_writes"] == 3
        assert leaks_of(tmp_path / "cache", secrets(tokens)) == []


@pytest.mark.parametrize("how", ["deleted", "another", "short", "long", "unreadable", "of another folder"])
def test_without_its_key_a_block_is_a_miss(tmp_path: Path, how: str) -> None:
    mine, others = ids(1, 40), ids(2, 40)
    with sealed(tmp_path) as store:
        save(store, mine).wait()
        save(store, others, OTHER).wait()
    key = tmp_path / "keys" / NS.digest.hex()
    keys = "keys"
    if how == "another":
        key.write_bytes(os.urandom(32))
    elif how == "short":
        key.write_bytes(key.read_bytes()[:31])
    elif how == "long":
        key.write_bytes(key.read_bytes() + b"\n")
    elif how == "unreadable":
        key.unlink()
        key.mkdir()
    elif how == "of another folder":
        keys = "others"
    else:
        key.unlink()
    with sealed(tmp_path, keys=keys) as store:
        assert found(store, mine).tokens == 0
        theirs = load_all(store, [*others, 0], OTHER)
        assert theirs == (0 if how == "of another folder" else 40)
        assert store.stats()["counters"]["sealed_blocks"] == 3 + (3 if how == "of another folder" else 0)
        assert store.verify() == [] and recount(store) == []
        again = save(store, mine).wait().tokens
        assert again == (0 if how in ("short", "long", "unreadable") else 40)
        assert load_all(store, [*mine, 0]) == 40
    if how in ("short", "long"):
        assert len(key.read_bytes()) != 32  # it may still be mended


def test_a_key_that_is_deleted_meanwhile_is_noticed(tmp_path: Path) -> None:
    mine, others = ids(1, 40), ids(2, 40)
    with sealed(tmp_path) as store:
        save(store, mine).wait()
        save(store, others, OTHER).wait()
        only_on_disk(store)
        (tmp_path / "keys" / NS.digest.hex()).unlink()
        assert load_all(store, [*mine, 0]) == 0
        fetches_are_over(store)
        assert store.stats()["counters"]["sealed_blocks"] >= 1
        assert "corrupt_blocks" not in store.stats()["counters"]
        assert load_all(store, [*others, 0], OTHER) == 40
        fresh = ids(3, 40)
        assert save(store, fresh).wait().tokens == 40  # with a new key
        only_on_disk(store)
        assert load_all(store, [*fresh, 0]) == 40
        assert store.verify() == [] and recount(store) == []
    with sealed(tmp_path) as store:
        assert load_all(store, [*fresh, 0]) == 40
        assert found(store, mine).tokens == 0


def test_forget_destroys_keys_with_which_nothing_is_left(tmp_path: Path) -> None:
    gone, stays = namespace("gone", model="a"), namespace("stays")
    twin = namespace("gone", model="b")
    with sealed(tmp_path) as store:
        for space in (gone, twin, stays):
            save(store, ids(1, 40), space, owner="x").wait()
        save(store, ids(2, 40), twin, owner="y").wait()
        store.forget(tenant="gone", owner="x")
        assert keys_of(tmp_path) == sorted((twin.digest.hex(), stays.digest.hex()))
        store.forget(tenant="gone")
        assert keys_of(tmp_path) == [stays.digest.hex()]
        assert load_all(store, [*ids(1, 40), 0], stays) == 40
        assert save(store, ids(1, 40), gone).wait().tokens == 40
        assert len(keys_of(tmp_path)) == 2
        assert store.verify() == []


def test_keys_stay_as_long_as_somebody_reads_or_writes_with_them(tmp_path: Path) -> None:
    with gated_and_sealed(tmp_path) as (store, tier):
        tokens = ids(1, 16)
        save(store, tokens, owner="me").wait()
        match = found(store, tokens)
        assert store.forget(owner="me").deferred == 1
        assert len(keys_of(tmp_path)) == 1
        match.release()
        gate = tier.gate("write")
        save(store, ids(2, 16), OTHER)
        gate.reached()  # sealed, and not yet written
        assert store.forget(owner="nobody").deferred == 0
        assert keys_of(tmp_path) == [OTHER.digest.hex()]
        gate.open()
        store.flush()
        only_on_disk(store)
        assert load_all(store, [*ids(2, 16), 0], OTHER) == 16


def test_a_key_that_cannot_be_removed_is_reported_and_removed_later(tmp_path: Path) -> None:
    class Stuck(FaultyFiles):
        stuck = True

        def remove(self, path: str) -> None:
            if self.stuck and "keys" in path:
                raise OSError(5, "stuck", path)
            super().remove(path)

    files = Stuck()
    with sealed(tmp_path, files) as store:
        save(store, ids(1, 40)).wait()
        secret = (tmp_path / "keys" / NS.digest.hex()).read_bytes()
        assert store.forget(tenant="").deferred == 1
        assert secret not in (tmp_path / "keys" / NS.digest.hex()).read_bytes()  # overwritten at least
        assert save(store, ids(2, 40)).wait().tokens == 40  # and not taken for a key
        only_on_disk(store)
        assert load_all(store, [*ids(2, 40), 0]) == 40
        files.stuck = False
        assert store.forget(tenant="").deferred == 0
        assert keys_of(tmp_path) == []


def test_what_was_written_before_is_still_read(tmp_path: Path) -> None:
    old, new, tokens = ids(1, 40), ids(2, 40), ids(3, 48)
    with kvstore.open(tmp_path / "cache", host="4MiB", disk="32MiB") as store:
        save(store, old).wait()
        save(store, tokens[:32]).wait()
    with sealed(tmp_path) as store:
        assert load_all(store, [*old, 0]) == 40
        save(store, new).wait()
        save(store, tokens).wait()
    for index in ("kept", "lost"):
        if index == "lost":
            shutil.rmtree(tmp_path / "cache/v1/index")
        with sealed(tmp_path) as store:
            assert [load_all(store, [*chain, 0]) for chain in (old, new, tokens)] == [40, 40, 48]
            assert [problem.what for problem in store.verify() if problem.key] == [] and recount(store) == []
    (tmp_path / "keys" / NS.digest.hex()).unlink()
    with sealed(tmp_path) as store:
        assert [load_all(store, [*chain, 0]) for chain in (old, new, tokens)] == [40, 0, 32]
        assert recount(store) == []


def test_a_lost_index_is_made_anew_of_what_there_are_keys_for(tmp_path: Path) -> None:
    mine, others = ids(1, 60), ids(2, 60)
    with sealed(tmp_path) as store:
        save(store, mine).wait()
        save(store, others, OTHER).wait()
    shutil.rmtree(tmp_path / "cache/v1/index")
    (tmp_path / "keys" / OTHER.digest.hex()).unlink()
    with sealed(tmp_path) as store:
        assert load_all(store, [*mine[:57], 0]) == 57  # the tail by its token ids
        assert found(store, others, OTHER).tokens == 0
        assert store.stats()["counters"]["sealed_blocks"] == 4
        assert recount(store) == []
    assert leaks_of(tmp_path / "cache", secrets(mine) | secrets(others, OTHER)) == []


def test_a_cache_with_encrypted_blocks_is_not_opened_without_keys(tmp_path: Path) -> None:
    with sealed(tmp_path) as store:
        save(store, ids(1, 40)).wait()
    with pytest.raises(BadInput, match="holds 3 encrypted blocks"):
        kvstore.open(tmp_path / "cache", host="4MiB", disk="32MiB")
    with sealed(tmp_path) as store:
        assert load_all(store, [*ids(1, 40), 0]) == 40


def test_key_folders_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "wide").mkdir(mode=0o700)
    (tmp_path / "wide").chmod(0o750)
    (tmp_path / "file").write_text("")
    for keys, why in (("wide", "others"), ("file", "is a file"), ("cache/keys", "inside of the cache")):
        with pytest.raises(BadInput, match=why):
            sealed(tmp_path, keys=keys)
    with sealed(tmp_path), pytest.raises(StoreBusy, match=f"in use by pid {os.getpid()}"):
        kvstore.open(tmp_path / "second", encryption=tmp_path / "keys", host="4MiB", disk="32MiB")
    with sealed(tmp_path) as store:
        with pytest.raises(BadInput, match="another encryption="):
            kvstore.open(tmp_path / "cache", host="4MiB", disk="32MiB")
        with sealed(tmp_path) as same:
            assert same._residency is store._residency


def test_a_half_made_key_is_destroyed(tmp_path: Path) -> None:
    with sealed(tmp_path):
        pass
    (tmp_path / "keys" / ".kvstore-x").write_bytes(b"k" * 32)
    (tmp_path / "keys" / "README").write_text("somebody's own")
    with sealed(tmp_path):
        assert sorted(path.name for path in (tmp_path / "keys").iterdir()) == ["README", "lock"]


def test_verify_with_and_without_keys(tmp_path: Path) -> None:
    with sealed(tmp_path) as store:
        save(store, ids(1, 40)).wait()
        save(store, ids(2, 40), OTHER).wait()

    def told(keys: Path | None) -> tuple[object, object, list[str]]:
        said = list(verify(tmp_path / "cache", keys))
        return said[0], said[1], [problem.what for problem in said[2:] if isinstance(problem, Problem)]

    assert told(None) == (6, 6, []) and told(tmp_path / "keys") == (6, 0, [])
    with pytest.raises(BadInput, match="no folder of keys"):
        told(tmp_path / "nowhere")
    (tmp_path / "keys" / OTHER.digest.hex()).unlink()
    assert told(tmp_path / "keys") == (6, 3, [])
    with sealed(tmp_path) as store:  # and it has changed nothing
        assert load_all(store, [*ids(1, 40), 0]) == 40
        assert store.stats()["counters"]["sealed_blocks"] == 3
