"""Hugging Face's side of a conversation that moves between engines, in a process of the environment that has it newer.

As a program, this file is that process: what is to be read and said in its only argument, what was said on stdout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

PYTHON = Path(__file__).resolve().parents[2] / ".venv" / "bin" / "python"


@dataclass(frozen=True)
class Replies:
    """What was said to each prompt, how much of each was stored, who wrote that, and what identifies the model."""

    tokens: tuple[tuple[int, ...], ...]
    cached: tuple[int, ...]
    writers: frozenset[str]
    fingerprint: dict[str, str]


def replies(
    model: Path, folder: Path | None, prompts: Sequence[Sequence[int]], tokens: int, dtype: str = "float32"
) -> Replies:
    """Greedy replies, with a store in ``folder`` or with none. ``dtype``: of the model."""
    if not PYTHON.is_file():
        pytest.skip("the main environment is not there: run `make install`")
    asked = {"model": str(model), "folder": folder and str(folder), "prompts": list(prompts), "tokens": tokens}
    asked["dtype"] = dtype
    done = subprocess.run(
        [str(PYTHON), __file__],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    said = json.loads(done.stdout.splitlines()[-1])
    return Replies(
        tuple(map(tuple, said["tokens"])), tuple(said["cached"]), frozenset(said["writers"]), said["fingerprint"]
    )


def main() -> None:
    import torch
    import transformers

    import kvstore
    from kvstore.adapters.transformers import Reuse

    asked = json.loads(sys.stdin.read())
    torch.set_num_threads(1)
    dtype = getattr(torch, asked["dtype"])
    model = transformers.AutoModelForCausalLM.from_pretrained(asked["model"], dtype=dtype).eval()
    greedy = {"do_sample": False, "max_new_tokens": asked["tokens"], "min_new_tokens": asked["tokens"]}
    said, cached, writers = list[list[int]](), list[int](), set[str]()
    with kvstore.open(asked["folder"], host="256MiB", disk="1GiB") as store:
        reuse = Reuse(model, store, decide="always")
        for ids in asked["prompts"]:
            given = torch.tensor([ids])
            if asked["folder"] is None:
                out = model.generate(given, attention_mask=torch.ones_like(given), eos_token_id=None, **greedy)
            else:
                hit = reuse.load(given)
                out = model.generate(**hit.inputs, eos_token_id=None, **greedy)
                reuse.save(out, hit.cache).wait()
                assert isinstance(hit.cached_tokens, int)
                cached.append(hit.cached_tokens)
                writers.update(hit.writers)
            said.append(out[0, len(ids) :].tolist())
        fingerprint = dict(reuse.fingerprint.components)
    print(json.dumps({"tokens": said, "cached": cached, "writers": sorted(writers), "fingerprint": fingerprint}))


if __name__ == "__main__":
    main()
