"""Models to replay through: a small Llama built here, or a real one with its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from kvstore.bench.encoders import ByteEncoder, Encoder, TemplateEncoder, WordEncoder
from kvstore.errors import BadInput

TINY = {"tiny": ByteEncoder, "tiny-words": WordEncoder}


@dataclass(frozen=True)
class Subject:
    """What a replay runs: a model in float32, and what turns prompts into its ids."""

    name: str
    model: Any
    encoder: Encoder


def load(name: str) -> Subject:
    """`tiny` (bytes), `tiny-words`, a folder, or the id of a model. Raises BadInput when it cannot be loaded."""
    if name in TINY:
        encoder = TINY[name]()
        return Subject(name, tiny_llama(encoder.vocabulary), encoder)
    if name.startswith(("/", "./", "../", "~")) and not Path(name).expanduser().is_dir():
        raise _cannot_load(name, "there is no such folder")
    transformers.utils.logging.disable_progress_bar()  # the replay shows its own
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        # float32, because "equal to a full recompute" says nothing in a dtype that rounds in the third digit
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_load(name, str(error).strip().split("\n")[0] or type(error).__name__) from error
    shown = Path(name).name if Path(name).exists() else name
    return Subject(shown, model.eval(), TemplateEncoder(tokenizer, model.config.vocab_size))


def _cannot_load(name: str, reason: str) -> BadInput:
    return BadInput(f"cannot load the model {name} ({reason}); --model takes tiny, tiny-words, a folder or a model id")


def tiny_llama(
    vocabulary: int, layers: int = 4, width: int = 128, heads: int = 4, kv_heads: int = 2, seed: int = 7
) -> Any:
    """A small Llama with seeded weights, built on the spot. The wide initial range keeps errors from hiding."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1 << 17,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).to(torch.float32).eval()
