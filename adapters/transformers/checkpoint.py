"""Digests of weights: from safetensors files, once per file, or from memory.

The digest of a checkpoint is a sum over its tensors, each counted by name and content, so it does not depend on how
tensors are spread over files, and engines that fuse or shard weights can come to the same value.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
import xxhash

SUM_BITS = 256
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SAMPLES = 8
MAX_HEADER = 100 << 20


def item_digest(name: str, dtype: str, shape: Iterable[int], content: str) -> int:
    """One tensor's share of the sum."""
    text = json.dumps([name, dtype, list(shape), content]).encode()
    return int.from_bytes(blake2b(text, digest_size=SUM_BITS // 8).digest(), "little")


def total(items: Iterable[int]) -> str:
    """The digest of all items, whatever their order."""
    return f"{sum(items) % (1 << SUM_BITS):064x}"


def memory_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Digest of tensors in memory, equal to that of a checkpoint that holds just them."""
    return total(
        item_digest(name, str(tensor.dtype).removeprefix("torch."), tensor.shape, _content(tensor))
        for name, tensor in tensors.items()
    )


def _content(tensor: torch.Tensor) -> str:
    raw: Any = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
    return xxhash.xxh3_128_hexdigest(raw)


class SafetensorsFile:
    """One file: its header, and its tensors as views of a memory map."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > MAX_HEADER:
                raise ValueError(f"{path} has a header of {size} bytes")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        self.header: dict[str, dict[str, Any]] = header
        self._start = 8 + size

    def identity(self) -> str:
        """What a memo of this file's digest is kept under: it changes when the file does."""
        status = os.stat(self.path)
        return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors as views of the mapped file."""
        size = os.stat(self.path).st_size
        whole = torch.from_file(str(self.path), shared=False, size=size, dtype=torch.uint8)
        views = {}
        for name, entry in self.header.items():
            first, last = entry["data_offsets"]
            part = whole[self._start + first : self._start + last]
            dtype = SAFETENSORS_DTYPES[entry["dtype"]]
            if part.data_ptr() % dtype.itemsize:
                part = part.clone()
            views[name] = part.view(dtype).reshape(entry["shape"])
        return views


def checkpoint_files(folder: Path) -> list[SafetensorsFile]:
    """The safetensors files of a checkpoint folder; empty when there are none."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        paths = [folder / name for name in names]
    else:
        paths = [folder / "model.safetensors"]
    return [SafetensorsFile(path) for path in paths] if all(path.is_file() for path in paths) else []


def files_digest(files: Iterable[SafetensorsFile], store: Any) -> str:
    """Digest of a checkpoint from its files; each file is read once and then remembered by identity."""
    items = []
    for file in files:
        name = f"weights:{file.identity()}"
        known = store.recall(name)
        if known is None:
            known = memory_digest(file.tensors())
            store.remember(name, known)
        items.append(int(known, 16))
    return total(items)


def same_dtypes(files: Iterable[SafetensorsFile], tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether the tensors in memory have the dtypes that the files have them in."""
    stored = {name: SAFETENSORS_DTYPES.get(entry["dtype"]) for file in files for name, entry in file.header.items()}
    return all(stored.get(name) == tensor.dtype for name, tensor in tensors.items())


def holds(files: Iterable[SafetensorsFile], tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether the tensors in memory are those of the files, by name, shape and a sample of elements of each."""
    seen = set()
    for file in files:
        for name, stored in file.tensors().items():
            loaded = tensors.get(name)
            if loaded is None or loaded.shape != stored.shape:
                return False
            last = max(1, min(SAMPLES, stored.numel()) - 1)
            places = torch.tensor([(stored.numel() - 1) * i // last for i in range(min(SAMPLES, stored.numel()))])
            flat = loaded.detach().reshape(-1)[places.long().to(loaded.device)].to("cpu")
            if not torch.equal(stored.reshape(-1)[places.long()].to(loaded.dtype), flat):
                return False
            seen.add(name)
    return seen >= set(tensors)
