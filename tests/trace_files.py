"""Small traces, and how tests write them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
MOONCAKE: list[Record] = [
    {"timestamp": 0, "input_length": 1300, "output_length": 7, "hash_ids": [0, 1, 2]},
    {"timestamp": 2500, "input_length": 512, "output_length": 0, "hash_ids": [0]},
    {"timestamp": 2500.5, "input_length": 1025, "output_length": 9, "hash_ids": [0, 1, 5]},
]


def written(folder: Path, content: str | bytes | Sequence[Any], name: str = "trace") -> Path:
    """Records one a line; text and bytes as they are."""
    path = folder / name
    if not isinstance(content, str | bytes):
        content = "".join(json.dumps(record) + "\n" for record in content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path
