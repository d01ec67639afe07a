"""Attention of stored and of rebuilt layers. Only stored ones project keys and values, and only those reach a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import initialization
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, eager_attention_forward

from kvstore.adapters.fusedkv.config import FusedKVConfig
from kvstore.adapters.fusedkv.rotary import apply_rotary_pos_emb, turned
from kvstore.plan import Rebuilt
from kvstore.tensors.fused_attention import attend
from kvstore.tensors.fusion import Fusion, tied

Pair = tuple[torch.Tensor, torch.Tensor]


class Attention(nn.Module):
    """Queries and output of any layer; as it is, one that attends to the keys and values of others."""

    is_causal = True  # read by transformers' attention functions, as are the four that follow

    def __init__(self, config: FusedKVConfig, layer: int) -> None:
        super().__init__()
        shape = config.shapes[layer]
        self.config, self.head_dim, self.interleaved = config, shape.key_dim, config.rope_interleaved
        self.num_key_value_groups = config.num_attention_heads // shape.heads
        self.scaling = self.head_dim**-0.5
        width = config.num_attention_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_bias)
        self.q_norm = head_norm(config, self.head_dim)

    def forward(self, hidden: torch.Tensor, angles: Pair, mask: torch.Tensor | None, *states: torch.Tensor) -> Any:
        """What ``hidden`` [batch, tokens, hidden size] finds in ``states``: keys, then values, of each source.

        ``angles``: cosines and sines of the positions of ``hidden``. ``mask``: as transformers makes it; None where all
        is visible that lies before.
        """
        queries = turned(self.heads(self.q_norm, self.q_proj(hidden)), *angles, self.interleaved)
        found = self.attend(queries, states, mask)
        return self.o_proj(found.reshape(*hidden.shape[:-1], -1))

    def heads(self, norm: nn.Module, states: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, heads x dim] to [batch, heads, tokens, dim], each head normed."""
        normed: torch.Tensor = norm(states.unflatten(-1, (-1, self.head_dim)))
        return normed.transpose(1, 2)

    def attend(self, queries: torch.Tensor, states: Sequence[torch.Tensor], mask: torch.Tensor | None) -> torch.Tensor:
        """One pair of keys and values, used as it is: no copy is made."""
        keys, values = states
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        found: torch.Tensor = attention(self, queries, keys, values, mask, scaling=self.scaling)[0]
        return found


class StoredAttention(Attention):
    """A layer that keeps keys and values."""

    def __init__(self, config: FusedKVConfig, layer: int) -> None:
        super().__init__(config, layer)
        width = config.shapes[layer].heads * self.head_dim
        self.k_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_norm = head_norm(config, self.head_dim)

    def states(self, hidden: torch.Tensor, angles: Pair) -> Pair:
        """Keys (turned) and values of new tokens, [batch, kv heads, tokens, dim]."""
        keys = self.heads(self.k_norm, self.k_proj(hidden))
        values = self.v_proj(hidden).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return apply_rotary_pos_emb(keys, *angles, self.interleaved), values


class FusedAttention(Attention):
    """A layer whose keys and values are weighted sums of other layers' (FusedKV, section 3); it never holds them."""

    def __init__(self, config: FusedKVConfig, layer: int) -> None:
        super().__init__(config, layer)
        plan = config.layer_plan.layers[layer]
        assert plan is not None
        self.fusion = FusionWeights(config, layer, plan)

    def attend(self, queries: torch.Tensor, states: Sequence[torch.Tensor], mask: torch.Tensor | None) -> torch.Tensor:
        """The sums are taken where keys and values are read."""
        kind = queries.device.type
        # Under autocast norms give float32, and projections what it is set to.
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            queries, states = queries.to(dtype), [state.to(dtype) for state in states]
        keys = len(self.fusion.keys)
        return attend(queries, states[:keys], states[keys:], self.fusion(), self.scaling, mask)


class FusionWeights(nn.Module):
    """The learned vectors of one rebuilt layer. They stay float32, whatever the model is cast to.

    ``keys`` [sources, kv heads, dim / 2] has one number for each rotary pair: a sum with two would depend on where keys
    stand, not only on how far from the query (FusedKV, section on RoPE). ``values`` [sources, kv heads, dim].
    """

    def __init__(self, config: FusedKVConfig, layer: int, plan: Rebuilt) -> None:
        super().__init__()
        shape = config.shapes[layer]
        self.pairing, self.start, self.plan = config.pairing, config.fusion_init, plan
        sizes = (len(plan.keys), shape.heads, shape.key_dim // 2), (len(plan.values), shape.heads, shape.value_dim)
        self.keys, self.values = (nn.Parameter(torch.empty(size, dtype=torch.float32)) for size in sizes)

    def forward(self) -> Fusion:
        """The weights as kernels take them."""
        return Fusion(tied(self.keys, self.pairing), self.values)

    def reset(self) -> None:
        """Start values. "lite": keys of the uppermost source, values of the lowest one (FusedKV-Lite)."""
        if self.start == "normal":
            for weights in (self.keys, self.values):
                initialization.normal_(weights)
            return
        for weights, sources, chosen in (
            (self.keys, self.plan.keys, max(self.plan.keys)),
            (self.values, self.plan.values, min(self.plan.values)),
        ):
            alone = torch.tensor([float(source == chosen) for source in sources], device=weights.device)
            initialization.copy_(weights, alone[:, None, None].expand_as(weights))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        def moved(tensor: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = fn(tensor)
            return made if made.dtype == tensor.dtype else tensor.to(made.device)

        return super()._apply(moved, recurse)


def head_norm(config: FusedKVConfig, dim: int) -> nn.Module:
    """Qwen3's norm of each head, or nothing, as in Llama."""
    norm: nn.Module = LlamaRMSNorm(dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()
    return norm
