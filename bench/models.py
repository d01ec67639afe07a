"""Models to replay through: a small one built here, of any layer plan, or a real one with its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from kvstore.adapters.fusedkv import FusedKVConfig, FusedKVForCausalLM
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
    """`tiny` (bytes), `tiny-words`, either with `:PLAN`, a folder, or a model id. Raises BadInput for anything else."""
    size, _, plan = name.partition(":")
    if size in TINY:
        encoder = TINY[size]()
        model = tiny_fusedkv(plan, encoder.vocabulary) if plan else tiny_llama(encoder.vocabulary)
        return Subject(name, model, encoder)
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
    known = "tiny, tiny-words, tiny:PLAN, a folder or a model id"
    return BadInput(f"cannot load the model {name} ({reason}); --model takes {known}")


def tiny_llama(
    vocabulary: int, layers: int = 4, width: int = 128, heads: int = 4, kv_heads: int = 2, seed: int = 7
) -> Any:
    """A small Llama with seeded weights, built on the spot. The wide initial range keeps errors from hiding."""
    config = LlamaConfig(**sizes(vocabulary, layers, width, heads, kv_heads), bos_token_id=None, eos_token_id=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).to(torch.float32).eval()


def tiny_fusedkv(
    plan: str, vocabulary: int, layers: int = 4, width: int = 128, heads: int = 4, kv_heads: int = 2, seed: int = 7
) -> Any:
    """A model of a layer plan, as small and as seeded. Raises BadInput for a plan that there is not."""
    config = FusedKVConfig(
        kv_plan=plan, fusion_init="normal", qk_norm=False, **sizes(vocabulary, layers, width, heads, kv_heads)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FusedKVForCausalLM(config).to(torch.float32).eval()


def sizes(vocabulary: int, layers: int, width: int, heads: int, kv_heads: int) -> dict[str, Any]:
    """What both kinds of model are made of."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 1 << 17,
        "initializer_range": 0.1,
    }
