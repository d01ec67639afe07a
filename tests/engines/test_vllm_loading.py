"""Loads of the vLLM adapter from a daemon that stops answering: what did not come is named, never taken for loaded."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from daemons import start

import kvstore
from kvstore.adapters.vllm.loading import Loading
from kvstore.adapters.vllm.model import Model
from kvstore.adapters.vllm.step import Load, Part, Scope
from kvstore.keys import Fingerprint, token_bytes
from kvstore.layout import Layout

PAGE, BLOCK, TOKENS = 16, 32, 96
LAYOUT = Layout.uniform(2, 2, 16, "float32", BLOCK)
MODEL = Model(("layers.0", "layers.1"), PAGE, 2, 1, LAYOUT, Fingerprint({"given": "test"}))
IDS = token_bytes(list(range(TOKENS)))


class Written:
    """Caches that only note which columns of which layer were written."""

    def __init__(self) -> None:
        self.columns: set[tuple[int, int]] = set()

    def put(self, layer: int, runs: np.ndarray, turn: Any, pages: tuple[int, ...], first_head: int) -> None:
        for _, _, _, _, tokens, _, column in runs.tolist():
            self.columns |= {(layer, at) for at in range(column, column + tokens)}


def loading(store: Any, caches: Any) -> Loading:
    load = Load("one", Scope(), (Part(IDS, 0, TOKENS, 0),), tuple(range(TOKENS // PAGE)), False)
    return Loading(load, MODEL, store, caches, 0, 2.0)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("stopped", [False, True])
def test_a_load_that_a_frozen_daemon_refuses_is_no_load(tmp_path: Path, stopped: bool) -> None:
    daemon = start(tmp_path, "--host", "64MiB")
    try:
        with kvstore.connect(daemon.url, timeout=0.3) as store:
            drafts = dict(enumerate(store.drafts(LAYOUT, TOKENS // BLOCK)))
            store.save(MODEL.namespace(Scope()), LAYOUT, IDS, drafts, form="rotated")
            match, caches = store.match(MODEL.namespace(Scope()), LAYOUT, IDS, whole=True), Written()
            assert match.tokens == TOKENS
            under_way = loading(_Matched(store, match, daemon.process if stopped else None), caches)
            under_way.run()
            assert under_way.over
            everything = {(layer, column) for layer in range(2) for column in range(TOKENS)}
            if stopped:
                assert under_way.invalid() == set(range(TOKENS // PAGE))
            else:
                assert (under_way.invalid(), caches.columns) == (set(), everything)
    finally:
        daemon.process.send_signal(signal.SIGCONT)
        daemon.kill()


class _Matched:
    """A store whose daemon freezes between the match and the load."""

    def __init__(self, store: Any, match: Any, process: Any) -> None:
        self._store, self._match, self._process = store, match, process

    def match(self, *_: object, **__: object) -> Any:
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)
        return self._match

    def load(self, match: Any) -> Any:
        return self._store.load(match)
