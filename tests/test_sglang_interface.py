"""SGLang's storage backend without SGLang: its calls are there, and pages come back bit for bit or not at all."""

from __future__ import annotations

import importlib.util
import inspect
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gates import MIB
from hosted import Hosted, hosted
from sglang_interface import INTERFACE
from sglang_tiny import PAGE, FlatPool, PartsPool, backend, keys, pages

import kvstore
from kvstore import Fingerprint, Namespace
from kvstore.adapters.sglang.backend import Backend
from kvstore.adapters.sglang.form import form_of
from kvstore.adapters.sglang.hits import restorable
from kvstore.adapters.sglang.identity import digest
from kvstore.adapters.sglang.pages import STEP, Pages, layout_of


@pytest.fixture
def place(quick: Path) -> dict[str, Any]:
    return {"dir": str(quick / "cache"), "host": "8MiB", "disk": "64MiB"}


@pytest.fixture
def served(quick: Path) -> Iterator[Hosted]:
    with hosted(quick / "cache", host=8 * MIB, disk=64 * MIB) as found:
        yield found


def socket_of(served: Hosted, **more: Any) -> dict[str, Any]:
    return {"socket": f"unix:{served.path}", **more}


def test_every_call_that_sglang_makes_is_there() -> None:
    for name, (parameters, _) in INTERFACE.items():
        if name != "get_stats" and name != "batch_exists_v2":  # which are the part that needs SGLang
            assert list(inspect.signature(getattr(Backend, name)).parameters) == parameters, name


def test_the_package_costs_no_engine_and_says_what_is_missing() -> None:
    code = "import sys, kvstore.adapters.sglang; print(*({'torch', 'sglang'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
    if importlib.util.find_spec("sglang") is None:
        with pytest.raises(ImportError, match=r"install sglang>=0\.5"):
            from kvstore.adapters.sglang import KVStoreHiCache  # noqa: F401


POOLS = {"layer_first": FlatPool("layer_first"), "page_first": FlatPool("page_first"), "parts": PartsPool()}


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
@pytest.mark.parametrize("through", ["dir", "socket"])
def test_pages_come_back_bit_for_bit(
    pool: Any, through: str, place: dict[str, Any], served: Hosted, quick: Path
) -> None:
    extra = place | {"dir": str(quick / "other")} if through == "dir" else socket_of(served)
    names = keys(200)
    pool.draw(1)
    wanted = [tensor.clone() for tensor in (pool.buffer, getattr(pool, "values", pool.buffer))]
    made = backend(extra, pool)
    assert made.batch_exists(names) == 0 and not made.exists(names[0])
    assert made.batch_set_v1(names[:150], pages(0, 150)) == [True] * 150
    assert (made.batch_exists(names), made.exists(names[149]), made.exists(names[150])) == (150, True, False)
    pool.buffer.zero_()
    asked = names[100:160] + names[:3]
    assert made.batch_get_v1(asked, pages(0, 63)) == [True] * 50 + [False] * 10 + [True] * 3
    for was, now in zip(wanted, [pool.buffer, getattr(pool, "values", pool.buffer)], strict=True):
        if pool.layout == "layer_first":
            was, now = was.transpose(0, 1), now.transpose(0, 1)
        step = PAGE if len(was) > 300 else 1
        assert torch.equal(now[: 50 * step].view(torch.uint8), was[100 * step : 150 * step].view(torch.uint8))
        assert torch.equal(now[60 * step : 63 * step].view(torch.uint8), was[: 3 * step].view(torch.uint8))
    made.close()


def test_a_page_may_come_as_a_tensor_and_go_into_a_pool(place: dict[str, Any]) -> None:
    pool = FlatPool("page_first")
    pool.draw(1)
    made, names = backend(place, pool), keys(3)
    values = [pool.get_data_page(page * PAGE) for page in range(3)]
    assert made.batch_set(names, values) and made.set(names[0], values[0])
    assert made.batch_get_v1(names, pages(10, 3)) == [True] * 3 and pool.bytes_of(10, 3) == pool.bytes_of(0, 3)
    target = torch.zeros_like(values[1])
    assert made.get(names[1], target) is target and torch.equal(target.view(torch.uint8), values[1].view(torch.uint8))
    assert made.get("nothing", target) is None and made.batch_get([names[2], "x"])[1] is None
    other = torch.zeros(len(target), dtype=torch.float16)
    assert made.get(names[1], other) is None and not made.set("new", other) and not made.set("new", None)
    assert made.counts["batch_get: shape"] == 1 and made.counts["batch_set: shape"] == 2
    made.close()


def test_what_pages_depend_on_is_never_forgotten(served: Hosted) -> None:
    base: dict[str, Any] = {"extra": socket_of(served), "pool": FlatPool()}
    first, names = backend(**base), keys(1)
    assert first.batch_set_v1(names, pages(0, 1)) == [True]
    others: list[dict[str, Any]] = [
        {"pool": FlatPool("page_first")},
        {"pool": FlatPool(dtype=torch.float16)},
        {"pool": FlatPool(width=16)},
        {"extra": socket_of(served, tag="other weights")},
        {"extra": socket_of(served, tenant="other")},
        {"stored": "fp8_e5m2"},
        {"model_name": "org/model2"},
        {"tp_size": 2},
        {"tp_size": 2, "tp_rank": 1},
        {"pp_size": 2},
        {"attn_cp_size": 2},
        {"is_mla_model": True, "pp_size": 2},
        {"is_mla_model": True, "dcp_size": 2, "tp_size": 2, "logical_page_size": 8},
    ]
    for change in others:
        other = backend(**base | change)
        assert other.batch_exists(names) == 0 and other.batch_get_v1(names, pages(0, 1)) == [False], change
        other.close()
    same = backend(**base | {"dp_rank": 0, "tp_lcm_size": 4})
    assert same.batch_exists(names) == 1
    for each in (first, same):
        each.close()


def test_ranks_with_the_same_keys_and_values_share_them(served: Hosted) -> None:
    mla: dict[str, Any] = {"extra": socket_of(served), "is_mla_model": True, "tp_size": 2}
    one, two, names = backend(**mla), backend(**mla, tp_rank=1), keys(2)
    for rank, each in enumerate((one, two)):
        each.register_mem_host_pool_v2(FlatPool(), "mamba")
        state = SimpleNamespace(name="mamba", keys=[names[rank]], host_indices=pages(0, 1))
        assert each.batch_set_v2([state]) == {"mamba": [True]}
    assert one.batch_set_v1(names[:1], pages(0, 1)) == [True] and two.batch_exists(names) == 1
    own = SimpleNamespace(name="mamba", hit_policy="all_pages", keys=None)
    assert one.found(names[:1], [own])[2] == [1] and two.found(names[:1], [own])[2] == []
    for each in (one, two):
        each.close()


class Counting:
    """A store whose calls are counted."""

    def __init__(self, store: kvstore.Store) -> None:
        self.store, self.calls = store, Counter[str]()

    def __getattr__(self, name: str) -> Any:
        self.calls[name] += 1
        return getattr(self.store, name)


def test_a_batch_is_one_call_whichever_pages_are_there(quick: Path) -> None:
    form, names = form_of(FlatPool()), keys(128)
    with kvstore.open(quick / "cache", host="8MiB", disk="64MiB") as store:
        counting = Counting(store)
        held = Pages(counting, Namespace(Fingerprint({"a": "b"})), form.size, "o", 5.0)  # type: ignore[arg-type]
        counting.calls.clear()
        assert held.write(names[::2], form.ends(pages(0, 64), 64)) == [True] * 64
        assert counting.calls == {"match": 1, "drafts": 1, "save": 1}
        counting.calls.clear()
        assert held.present(names) == [True, False] * 64 and held.leading(names) == 1
        assert counting.calls == {"match": 2}
        counting.calls.clear()
        assert held.read(names, form.ends(pages(0, 128), 128)) == [True, False] * 64
        assert counting.calls == {"match": 1, "load": 1}


def test_more_than_memory_holds_is_written_and_read_all_the_same(quick: Path) -> None:
    pool, count = FlatPool(width=1024), 128  # 24 KiB a page
    pool.draw(3)
    made = backend({"dir": str(quick / "cache"), "host": "1MiB", "disk": "64MiB", "timeout": 60}, pool)
    wanted = pool.bytes_of(0, count)
    assert made.batch_set_v1(keys(count), pages(0, count)) == [True] * count
    pool.buffer.zero_()
    assert made.batch_get_v1(keys(count), pages(0, count)) == [True] * count
    assert pool.bytes_of(0, count) == wanted
    made.close()


def test_clear_takes_the_pages_of_this_model_and_no_others(served: Hosted) -> None:
    names = keys(3)
    one, other = backend(socket_of(served)), backend(socket_of(served), model_name="x" * 300)
    for each in (one, other):
        assert each.batch_set_v1(names, pages(0, 3)) == [True] * 3
    assert one.clear() and one.batch_exists(names) == 0 and other.batch_exists(names) == 3
    for each in (one, other):
        each.close()


def test_what_moved_is_told_once(place: dict[str, Any]) -> None:
    made = backend(place)
    made.batch_set_v1(keys(3), pages(0, 3))
    made.batch_get_v1(keys(4), pages(0, 4))
    rates = made.rates()
    assert [count for count, _ in rates["written"]] == [3] and [count for count, _ in rates["read"]] == [3]
    assert rates["read"][0][1] > 0 and made.rates() == {"read": [], "written": []}
    size = 3 * 4 * 8 * 2
    said = {"written_pages": 3, "written_bytes": 3 * size, "not_written_pages": 0}
    assert made.counts == said | {"read_pages": 3, "read_bytes": 3 * size, "not_read_pages": 1}
    made.close()


def test_keys_are_taken_whole() -> None:
    name = keys(1)[0]
    assert digest(name) == bytes.fromhex(name)
    variants = [name, name.upper(), name + ".mamba", name[:-1], "", "0" * 63 + "g"]
    assert len({digest(each) for each in variants}) == len(variants) and {len(digest(each)) for each in variants} == {
        32
    }


@pytest.mark.parametrize("size", [0, 1, 7, STEP - 1, STEP, STEP + 1, 3 * STEP + 100])
def test_a_layout_has_room_for_a_page_in_one_piece(size: int) -> None:
    layout = layout_of(size)
    assert layout.payload_bytes(8) >= size > layout.payload_bytes(8) - 8192 or size == 0
    assert list(layout.gaps(8)) == [gap for gap in layout.gaps(8) if gap[0] >= size]


def has(*numbers: int) -> Any:
    return lambda pool, asked: [number in numbers for number in asked]


def test_hit_policies() -> None:
    def wanted(policy: str, count: int = 0, **more: int) -> Any:
        return SimpleNamespace(name="p", hit_policy=policy, keys=[0] * count, **more)

    ten: list[object] = list(range(10))
    assert restorable(ten, 6, [wanted("all_pages")], has(0, 1, 2, 4)) == ([1, 2, 3], {"p": 3})
    assert restorable(ten, 6, [wanted("trailing_pages")], has(1, 4, 8)) == ([2, 5], {"p": 5})
    assert restorable(ten, 6, [wanted("trailing_pages", 2)], has(0, 3, 4)) == ([1, 5], {"p": 5})
    assert restorable(ten, 6, [wanted("trailing_pages", 9)], has(0, 1)) == ([1, 2], {"p": 2})
    assert restorable(ten, 6, [wanted("all_pages")], has()) == ([], {})
    assert restorable(ten, 0, [wanted("all_pages")], has(0)) == ([], {})
    groups = wanted("block_groups", block_pages=4, group_pages=1)
    assert restorable(ten, 2, [groups], has(3, 7)) == ([1, 2], {"p": 8})  # whatever there is of keys and values
    assert restorable(ten, 2, [groups], has(3)) == ([1, 2], {"p": 4})
    own = SimpleNamespace(name="p", hit_policy="block_groups", keys=[20, 21, 22, 23], block_pages=4, group_pages=2)
    assert restorable(ten, 2, [own], has(20, 21, 22)) == ([1, 2], {"p": 4})
    for bad in (wanted("some_pages"), wanted("block_groups", block_pages=0, group_pages=0)):
        with pytest.raises(ValueError):
            restorable(ten, 2, [bad], has())
