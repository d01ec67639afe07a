"""Small seeded models with a tokenizer and a chat template, in folders as engines read them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

transformers.utils.logging.disable_progress_bar()  # its bars start a thread

VOCABULARY, CONTEXT = 2048, 8192
MARKS = ["<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
TEMPLATE = (
    "<|begin|>{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# initializer_range: greedy replies of a default-initialised model repeat one token, whatever it read.
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROPE = {"rope_type": "default", "rope_theta": 500000.0}


def llama(folder: Path, texts: Iterable[str] = (), dtype: torch.dtype = torch.float32, seed: int = 3) -> Path:
    """A Llama of four layers, with a tokenizer trained on ``texts`` if there are any."""
    _saved(transformers.LlamaForCausalLM, transformers.LlamaConfig(**SHAPE, rope_parameters=ROPE), folder, dtype, seed)
    if texts := list(texts):
        tokenizer(texts).save_pretrained(folder)
    return folder


def sliding(folder: Path) -> Path:
    """A model whose layers all see a window of the prompt only."""
    config = transformers.MistralConfig(**SHAPE, rope_parameters=ROPE, sliding_window=256)
    return _saved(transformers.MistralForCausalLM, config, folder)


def hybrid(folder: Path) -> Path:
    """A model that has layers with a state instead of keys and values beside layers with full attention."""
    kinds = ["conv", "full_attention", "conv", "full_attention"]
    shape = {name: value for name, value in SHAPE.items() if name != "head_dim"}
    also = {"conv_dim": SHAPE["hidden_size"], "block_dim": SHAPE["hidden_size"]}  # as vLLM calls it
    config = transformers.Lfm2Config(**shape, **also, rope_parameters=ROPE, layer_types=kinds)
    return _saved(transformers.Lfm2ForCausalLM, config, folder)


def _saved(kind: Any, config: Any, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 3) -> Path:
    torch.manual_seed(seed)
    kind(config).to(dtype).save_pretrained(folder)
    return folder


def tokenizer(texts: Iterable[str]) -> Any:
    """Pieces of bytes, as frequent in ``texts`` as a small vocabulary has room for."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=MARKS, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=MARKS[0], bos_token=MARKS[1], eos_token=MARKS[2], chat_template=TEMPLATE
    )


def prompt(seed: int, length: int) -> list[int]:
    """Token ids, each an ordinary one."""
    drawn = torch.randint(len(MARKS), VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))
    found: list[int] = drawn.tolist()
    return found


def lora(folder: Path, seed: int = 5, rank: int = 4) -> Path:
    """An adapter for ``llama``, as PEFT saves one, that changes what it says."""
    folder.mkdir(parents=True, exist_ok=True)
    made, rows = torch.Generator().manual_seed(seed), SHAPE["hidden_size"]
    heads = {"q_proj": SHAPE["num_attention_heads"], "v_proj": SHAPE["num_key_value_heads"]}
    weights = {}
    for layer in range(SHAPE["num_hidden_layers"]):
        for name, count in heads.items():
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{place}.lora_A.weight"] = torch.randn(rank, rows, generator=made) * 0.1
            weights[f"{place}.lora_B.weight"] = torch.randn(count * SHAPE["head_dim"], rank, generator=made) * 0.1
    save_file(weights, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 8, "bias": "none"}
    settings |= {"target_modules": sorted(heads), "base_model_name_or_path": ""}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder
