"""Two processes, each with a directory of its own, that share a conversation through Redis: bytes and outputs equal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import ids, load_all, save
from gates import PATIENCE
from hf_models import build, prompt
from hf_runs import go_on, in_memory, leases_left, stored_prompt
from remotes import counters, options, tiers
from servers import running

import kvstore
from kvstore.adapters.transformers import Reuse
from kvstore.bench.remote.server import Server
from kvstore.remote.options import RemoteOptions

HERE = Path(__file__).resolve().parent
PASSWORD = "between these hosts"
OTHER_HOST = """
import json, sys
from blocks import ids, load_all, save
import kvstore
from kvstore.remote.options import RemoteOptions
url, prefix, folder, seed, length, more = json.loads(sys.argv[1])
how = RemoteOptions(url, prefix, lookup=10.0, timeout=10.0)
with kvstore.open(folder, host="8MiB", disk="16MiB", redis=how) as store:
    tokens = ids(seed, length)
    good = load_all(store, [*tokens, 0])
    save(store, tokens + ids(seed + 1, more)).wait()
    assert store.flush(20.0)
    print(json.dumps([good, store.stats()["counters"].get("remote_read_blocks", 0)]))
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running("--requirepass", PASSWORD, password=PASSWORD) as found:
        yield found


def url_of(server: Server) -> str:
    return f"redis://:{PASSWORD.replace(' ', '%20')}@127.0.0.1:{server.port}/0"


def elsewhere(how: RemoteOptions, folder: Path, seed: int, length: int, more: int) -> list[int]:
    """Another process loads a chain and goes on with it; [tokens loaded, blocks that came from Redis]."""
    asked = json.dumps([how.url, how.prefix, str(folder), seed, length, more])
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    command = [sys.executable, "-c", OTHER_HOST, asked]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert PASSWORD not in done.stderr
    said: list[int] = json.loads(done.stdout)
    return said


def test_processes_go_on_with_each_others_conversations(server: Server, tmp_path: Path) -> None:
    how = options(url_of(server))
    with kvstore.open(tmp_path / "one", host="8MiB", disk="16MiB", redis=how) as store:
        save(store, ids(1, 64)).wait()
        assert store.flush(PATIENCE)
        assert elsewhere(how, tmp_path / "other", 1, 64, 48) == [64, 4]
        whole = ids(1, 64) + ids(2, 48)
        assert tiers(store, whole) == {"host": 64, "remote": 48}
        assert load_all(store, [*whole, 0]) == 112
        assert store.flush(PATIENCE)
    with kvstore.open(tmp_path / "one", host="8MiB", disk="16MiB") as store:  # and has all of it on its own disk now
        assert load_all(store, [*whole, 0]) == 112
    assert elsewhere(how, tmp_path / "other", 1, 64, 48) == [64, 0]


def test_models_on_two_hosts_give_equal_outputs(server: Server, tmp_path: Path) -> None:
    how = options(url_of(server), prefix="models")
    model: Any = build("llama")
    with kvstore.open(tmp_path / "one", host="16MiB", disk="16MiB", redis=how) as one:
        ids_ = stored_prompt(model, Reuse(model, one, block_tokens=16), 48, 1)
        assert one.flush(PATIENCE)
    more = prompt(13, 2)
    with kvstore.open(tmp_path / "other", host="16MiB", disk="16MiB", redis=how) as other:
        hit = Reuse(model, other, block_tokens=16).load(torch.cat((ids_, more), 1))
        assert hit.cached_by_tier == {"device": 0, "host": 0, "disk": 0, "remote": 48}
        logits, _ = go_on(model, hit.cache, hit.forward_inputs["input_ids"], 1)
        assert torch.equal(logits, in_memory(model, ids_, more))
        assert counters(other)["remote_hit_tokens"] == 48
        del hit
        assert other.flush(PATIENCE) and leases_left(other) == 0
