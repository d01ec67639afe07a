"""Small seeded models of every family that the transformers adapter must serve exactly.

``initializer_range=0.1``, because default-initialised small models hide errors: with keys shifted by one token
their greedy tokens often stay equal.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers

from kvstore.adapters.fusedkv import FusedKVConfig, FusedKVForCausalLM

transformers.utils.logging.disable_progress_bar()  # its bars start a thread
VOCABULARY = 211
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
GROUPED = {**SHAPE, "num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
GEMMA: dict[str, Any] = {
    "head_dim": 16,
    "sliding_window": 24,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "tie_word_embeddings": False,
}
MLA: dict[str, Any] = {
    **SHAPE,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
}


def _model(kind: str, **config: Any) -> Callable[[], Any]:
    def build() -> Any:
        return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, _config(kind))(**config))

    return build


def _fused(plan: str, **config: Any) -> Any:
    """A model whose cache holds only some layers."""
    return FusedKVForCausalLM(FusedKVConfig(**{**GROUPED, **config}, kv_plan=plan))


def _config(kind: str) -> str:
    return "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config"


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": _model("Llama", **GROUPED),
    "llama3": _model("Llama", **GROUPED, rope_parameters=LLAMA3),
    "yarn": _model("Llama", **GROUPED, rope_parameters=YARN),
    "mistral": _model("Mistral", **GROUPED, sliding_window=24),
    "qwen3": _model("Qwen3", **GROUPED, head_dim=16),
    # Untied, because tied to its scaled embeddings a small Gemma says one token for ever, whatever it has read.
    "gemma3": _model("Gemma3", **GROUPED, **GEMMA),
    "phi3": _model("Phi3", **GROUPED, rope_parameters=PARTIAL),
    # Wider, or its attention is so weak that noise in a third of the keys can leave all tokens equal.
    "neox": _model("GPTNeoX", **{**SHAPE, "hidden_size": 128}),
    "mqa": _model("Llama", **SHAPE, num_key_value_heads=1),
    # Turned by complex numbers; with fewer dims torch multiplies those in another way in float32.
    "deepseek_v2": _model("DeepseekV2", **MLA, q_lora_rank=None, qk_rope_head_dim=16),
    # Turned from pairs side by side to pairs of halves, which no kernel does.
    "deepseek_v3": _model("DeepseekV3", **MLA, q_lora_rank=32, qk_rope_head_dim=8),
    # Of six layers 0, 2 and 4 are stored; of five, 0 to 2.
    "cla": lambda: _fused("cla", num_hidden_layers=6, qk_norm=False),
    "fusedkv": lambda: _fused("fusedkv", num_hidden_layers=5, rope_interleaved=True, fusion_init="normal"),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build(family: str, dtype: str = "float32", attention: str = "sdpa", seed: int = 0) -> Any:
    """A model of a family, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FAMILIES[family]()
        # Norm weights and biases start as constants, which would hide a forgotten one.
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn(parameter.shape)
            assert torch.isfinite(parameter).all(), name
    model.set_attn_implementation(attention)
    return model.to(DTYPES[dtype]).eval()


def prompt(tokens: int, seed: int, rows: int = 1) -> torch.Tensor:
    """Random token ids that are no padding."""
    return torch.randint(1, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))
