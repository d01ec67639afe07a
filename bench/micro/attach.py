"""Attaching to a checkpoint of 2 GB: the attach test and the fingerprint, when the checkpoint was seen before."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import kvstore
from kvstore.adapters.transformers import Reuse


def measure(folder: Path, repeats: int) -> dict[str, float]:
    """``attach_seconds``: median of warm attaches; ``attach_cold_seconds``: the first; ``checkpoint_gb``."""
    transformers.utils.logging.disable_progress_bar()
    path = folder / "checkpoint"
    build(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    seconds = []
    for _ in range(repeats + 1):
        with kvstore.open(folder / "attach", host="64MiB", disk="1GiB") as store:
            begin = time.perf_counter()
            Reuse(model, store)
            seconds.append(time.perf_counter() - begin)
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return {
        "attach_seconds": statistics.median(seconds[1:]),
        "attach_cold_seconds": seconds[0],
        "checkpoint_gb": size / 1e9,
    }


def build(path: Path) -> None:
    """A seeded Llama of 2 GB in bfloat16, saved as safetensors."""
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=20,
        num_attention_heads=16,
        num_key_value_heads=8,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(13)
        model = LlamaForCausalLM(config.from_dict(config.to_dict() | {"dtype": "bfloat16"})).to(torch.bfloat16)
    model.save_pretrained(path)
