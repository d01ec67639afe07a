"""Text to train on, as bytes: every byte is a token, so nothing has to be downloaded."""

from __future__ import annotations

import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch

from kvstore.adapters.transformers.checkpoint import memory_digest
from kvstore.errors import BadInput

VOCABULARY = 256
END = b"\x00"  # between files
SUFFIXES = (".py", ".txt", ".md", ".rst", ".c", ".h", ".jsonl", ".json")
HELD_OUT = 20  # one file of so many is for validation


@dataclass(frozen=True, eq=False)
class Corpus:
    """Two runs of bytes, uint8, no file in both."""

    train: torch.Tensor
    validation: torch.Tensor
    files: int
    name: str

    @property
    def digest(self) -> str:
        """Changes with any byte of either."""
        whole = memory_digest({"train": self.train, "validation": self.validation})
        return whole[:16]

    def batch(self, rows: int, context: int, source: torch.Generator) -> torch.Tensor:
        """Token ids [rows, context], from random places of the training text."""
        starts = torch.randint(0, len(self.train) - context, (rows,), generator=source)
        return torch.stack([self.train[start : start + context] for start in starts.tolist()]).long()

    def held_out(self, rows: int, context: int) -> torch.Tensor:
        """Token ids [rows, context], the same every time, spread over the validation text."""
        starts = torch.linspace(0, len(self.validation) - context, rows).long()
        return torch.stack([self.validation[start : start + context] for start in starts.tolist()]).long()


def read(path: Path | None, limit: int, context: int) -> Corpus:
    """All text below ``path`` (a file or a folder; default: Python's own sources), at most ``limit`` bytes.

    Which files are held out depends on their names only. Raises ``BadInput`` where there is too little.
    """
    root = path or Path(sysconfig.get_paths()["stdlib"])
    if not root.exists():
        raise BadInput(f"there is no {root}; give a text file or a folder of them")
    files = [root] if root.is_file() else sorted(one for one in root.rglob("*") if one.suffix in SUFFIXES and _own(one))
    train, validation = bytearray(), bytearray()
    used = 0
    for file in files:
        if len(train) + len(validation) >= limit:
            break
        data = file.read_bytes() + END
        used += 1
        if len(files) == 1:
            cut = len(data) - len(data) // HELD_OUT
            train, validation = bytearray(data[:cut]), bytearray(data[cut:])
        elif zlib.crc32(str(file.relative_to(root)).encode()) % HELD_OUT:
            train += data
        else:
            validation += data
    if min(len(train), len(validation)) <= context:
        raise BadInput(f"{root} holds too little text to train on: {len(train)} bytes, {len(validation)} held out")
    name = "Python's sources" if path is None else root.name
    return Corpus(_ids(train), _ids(validation), used, name)


def _ids(data: bytearray) -> torch.Tensor:
    return torch.frombuffer(data, dtype=torch.uint8)


def _own(path: Path) -> bool:
    """Not what was installed beside Python, nor its tests' data: it differs from machine to machine."""
    return path.is_file() and not {"site-packages", "__pycache__", "test", "tests", "idlelib"} & set(path.parts)
