"""Where a benchmark was run."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import Any

import torch

LIBRARIES = ("kvstore-llm", "torch", "transformers", "lmdb", "xxhash", "msgpack", "numpy")


def environment(*others: str) -> dict[str, Any]:
    """The machine, and the versions of libraries; ``others``: beside those that all benchmarks need."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": cores,
        "torch_threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in (*LIBRARIES, *others)},
    }
