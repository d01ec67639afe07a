"""What else people use to keep tensors on disk, on the same bytes: durable saves and cold loads of 32 MiB blocks."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import lmdb
import numpy as np
from safetensors.numpy import load_file, save_file

from kvstore.bench.micro.limits import memory

BLOCK = 32 << 20
COUNT = 16


def measure(folder: Path, repeats: int) -> dict[str, dict[str, float]]:
    """GB/s of ``save`` (durable) and ``load_cold`` for safetensors (a file a block) and LMDB (a value a block)."""
    source = np.frombuffer(memory(BLOCK), dtype=np.uint8)
    result: dict[str, dict[str, float]] = {}
    for name, save, load in (("safetensors", _save_files, _load_files), ("lmdb", _save_lmdb, _load_lmdb)):
        place = folder / name
        place.mkdir()
        saves, loads = [], []
        for _ in range(max(3, repeats // 3)):
            saves.append(_rate(lambda save=save, place=place: save(place, source)))  # type: ignore[misc]
            _drop_pages(place)
            loads.append(_rate(lambda load=load, place=place: load(place)))  # type: ignore[misc]
        result[name] = {"save_gb_per_second": statistics.median(saves), "load_gb_per_second": statistics.median(loads)}
    return result


def _rate(work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    work()
    return BLOCK * COUNT / (time.perf_counter() - begin) / 1e9


def _drop_pages(place: Path) -> None:
    for path in place.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def _save_files(place: Path, source: np.ndarray) -> None:
    for i in range(COUNT):
        path = place / f"{i}.safetensors"
        save_file({"kv": source}, path)
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def _load_files(place: Path) -> None:
    for i in range(COUNT):
        assert load_file(place / f"{i}.safetensors")["kv"].nbytes == BLOCK


def _save_lmdb(place: Path, source: np.ndarray) -> None:
    with lmdb.open(str(place), map_size=4 * BLOCK * COUNT) as env:
        for i in range(COUNT):
            with env.begin(write=True) as txn:
                txn.put(b"%d" % i, source.data)


def _load_lmdb(place: Path) -> None:
    target = np.empty(BLOCK, dtype=np.uint8)
    with lmdb.open(str(place), map_size=4 * BLOCK * COUNT) as env, env.begin(buffers=True) as txn:
        for i in range(COUNT):
            value = txn.get(b"%d" % i)
            assert value is not None
            target[:] = np.frombuffer(value, dtype=np.uint8)
