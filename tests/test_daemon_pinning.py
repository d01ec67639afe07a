"""Clients of a daemon on a machine with a GPU: which device they pin for, what it costs others, bits and rates."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import NS, found, ids, load_all, save
from daemons import TIMEOUT, daemon, start, until
from devices import CUDA
from gates import Task
from pinned import BLOCKS, LARGE, LONG, brought, gauges, hosts, payloads, pinned, pins_plainly, rate, saved_by

import kvstore
from kvstore import BadInput

TOKENS = ids(1, 40)


def said_by(script: str, *arguments: str) -> list[str]:
    """What a process of its own prints."""
    tests = Path(__file__).resolve().parent
    places = [str(tests.parent), str(tests), *filter(None, [os.environ.get("PYTHONPATH")])]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environ)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


LIGHT = """
import sys, kvstore
from blocks import ids, save
store = kvstore.connect(sys.argv[1], timeout=10.0, device_name=sys.argv[2])
{more}
save(store, ids(1, 40)).wait()
said = store.stats()["gauges"]
print(said["host_pinned_bytes"], said["host_pageable_bytes"] > 0, "torch" in sys.modules)
"""


@pytest.mark.parametrize(("name", "more"), [("auto", ""), ("cpu", ""), ("auto", "import torch")])
def test_no_torch_is_brought_and_no_device_is_started(place: Path, name: str, more: str) -> None:
    with daemon(place) as running:
        assert said_by(LIGHT.format(more=more), running.url, name) == ["0", "True", str(bool(more))]


CARELESS = """
import atexit, pathlib, sys
from blocks import found, ids, save
from pinned import Ledger, client_of, pinned
ledger = Ledger()
atexit.register(lambda: print(len(ledger.calls), len(ledger.pinned), len(ledger.faults)))
store = client_of(pathlib.Path(sys.argv[1]), ledger)
save(store, ids(1, 40))
load = store.load(found(store, ids(1, 40)))
pinned(store)
"""


def test_a_process_that_closes_nothing_unpins_everything(place: Path) -> None:
    with daemon(place) as running:
        assert said_by(CARELESS, str(running.socket)) == ["2", "0", "0"]


@pytest.mark.parametrize("name", ["gpu", "cuda:", "", None])
def test_a_device_that_is_none_is_refused(place: Path, name: Any) -> None:
    with pytest.raises(BadInput, match="device_name"):
        kvstore.connect(f"unix:{place}/none", device_name=name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is CUDA")
def test_a_device_that_is_not_there_is_done_without(place: Path) -> None:
    with daemon(place) as running, kvstore.connect(running.url, timeout=TIMEOUT, device_name="cuda:1") as client:
        save(client, TOKENS)
        assert load_all(client, [*TOKENS, 0]) == len(TOKENS) and gauges(client)[0] == 0


# -- with a GPU ------------------------------------------------------------------------------------------------------

GPU = torch.device("cuda", 0)
DEVICES = [torch.device("cpu"), pytest.param(GPU, marks=CUDA)]
HOST = ("--host", "1GiB")


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_a_load_is_bit_equal_on_the_device(place: Path, device: torch.device) -> None:
    name = str(device)
    with daemon(place, *HOST) as running, kvstore.connect(running.url, timeout=TIMEOUT, device_name=name) as client:
        expected = saved_by(client)
        for _ in range(2):  # while memory is being pinned, and then
            load = client.load(found(client, LONG, layout=LARGE), device=True)
            assert load.tokens == len(LONG)
            assert torch.equal(brought(load, device).cpu(), expected)
            load.release()
            assert name == "cpu" or pinned(client)


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_a_load_under_way_comes_whole_from_a_daemon_that_was_killed(place: Path, device: torch.device) -> None:
    running, cuda = start(place, *HOST), device.type == "cuda"
    try:
        with kvstore.connect(running.url, timeout=TIMEOUT, device_name=str(device)) as client:
            expected = saved_by(client)
            load = client.load(found(client, LONG, layout=LARGE), device=True)
            assert not cuda or pinned(client)
            running.kill()
            running = start(place, *HOST)
            until(lambda: save(client, TOKENS).tokens == len(TOKENS), "the client does not come back")
            assert {tensor.is_pinned() for tensor in hosts(load)} == {cuda}
            assert torch.equal(brought(load, device).cpu(), expected)
            load.release()
            del load
            gc.collect()
            until(lambda: sum(gauges(client)) < expected.nbytes, "the old memory stays")
            assert not cuda or pinned(client)
        assert int(torch.ones(8, device=device).sum()) == 8  # no error is left behind
    finally:
        running.kill()


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_a_model_s_cache_is_bit_equal(place: Path, device: torch.device, seed: int) -> None:
    pytest.importorskip("transformers")
    from hf_models import build, prompt

    from kvstore.adapters.transformers import Reuse

    model, ids = build("llama").to(device), prompt(100, seed).to(device)
    more, found_by = torch.cat((ids, ids[:, :5]), 1), list[list[torch.Tensor]]()
    with daemon(place) as running, torch.no_grad():
        for name in ("cpu", "cpu", str(device)):  # who saves, who loads without pins, who loads with them
            with kvstore.connect(running.url, timeout=TIMEOUT, device_name=name) as client:
                reuse = Reuse(model, client, block_tokens=16)
                hit = reuse.load(more if found_by else ids)
                model(**hit.forward_inputs)
                assert hit.cached_tokens == (100 if found_by else 0)
                parts = [part for layer in hit.cache.layers for part in (layer.keys, layer.values)]
                found_by.append([part[:, :, :100].clone() for part in parts])
                reuse.save(ids, hit.cache)
                assert name == "cpu" or pinned(client)
                del hit, reuse, parts
    assert len(found_by[0]) == 6
    assert all(torch.equal(*pair) for pair in zip(found_by[1], found_by[2], strict=True))
    assert all(torch.equal(*pair) for pair in zip(found_by[0], found_by[2], strict=True))


@CUDA
def test_both_kinds_of_memory_are_pinned_and_copied_at_the_rate(
    place: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    lines, there = list[str](), payloads().to(GPU)
    with daemon(place, *HOST) as running:
        for name in ("cpu", "auto"):  # without pins; with those of the device that is in use
            with kvstore.connect(running.url, timeout=TIMEOUT, device_name=name) as client:
                drafts = dict(enumerate(client.drafts(LARGE, BLOCKS)))
                staging = [torch.frombuffer(draft.payload, dtype=torch.uint8) for draft in drafts.values()]
                assert len(staging) == BLOCKS and (name == "cpu" or pinned(client))
                assert {tensor.is_pinned() for tensor in staging} == {name == "auto"}
                lines.append(f"{name}: to staging {rate(staging, list(there), GPU):.1f} GB/s")
                del staging
                assert client.save(NS, LARGE, LONG, drafts).tokens == len(LONG)
                load = client.load(found(client, LONG, layout=LARGE), device=True)
                assert name == "cpu" or pinned(client)
                sources, back = hosts(load), torch.zeros_like(there)
                assert {tensor.is_pinned() for tensor in sources} == {name == "auto"}
                lines.append(f"{name}: from arenas {rate(list(back), sources, GPU):.1f} GB/s")
                assert torch.equal(back, there)
                if name == "cpu":
                    plainly = Task(partial(pins_plainly, sources[0])).result()
                    lines.append(f"pinned without the read-only flag: {plainly}")
                load.release()
    said = f"{torch.cuda.get_device_name()}, {BLOCKS} blocks of {LARGE.full_slot_bytes} bytes: {'; '.join(lines)}"
    print(said)  # for -rP
    with capsys.disabled():
        print(f"\n{said}")
    assert [record for record in caplog.records if record.name == "kvstore"] == []


FORGOTTEN = """
import sys, torch, kvstore
from pinned import LARGE, LONG, hosts, pinned, saved_by
from blocks import found
store = kvstore.connect(sys.argv[1], timeout=10.0, device_name="cuda")
saved_by(store)
load = store.load(found(store, LONG, layout=LARGE), device=True)
pinned(store)
copies = [tensor.to("cuda", non_blocking=True) for tensor in hosts(load)]
print("over")
"""


@CUDA
def test_a_process_that_closes_nothing_ends_well(place: Path) -> None:
    with daemon(place, *HOST) as running:
        assert said_by(FORGOTTEN, running.url) == ["over"]
