"""Decoder layers: Llama's block around either kind of attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from kvstore.adapters.fusedkv.attention import Attention, FusedAttention, Pair, StoredAttention
from kvstore.adapters.fusedkv.config import FusedKVConfig


class Block(GradientCheckpointingLayer):
    """What both kinds of layer share."""

    def __init__(self, config: FusedKVConfig, number: int) -> None:
        super().__init__()
        self.number = number
        self.self_attn = self.attention(config, number)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    @staticmethod
    def attention(config: FusedKVConfig, number: int) -> Attention:
        """The attention that the plan gives this layer."""
        raise NotImplementedError

    def further(
        self, hidden: torch.Tensor, normed: torch.Tensor, angles: Pair, mask: torch.Tensor | None, *states: torch.Tensor
    ) -> torch.Tensor:
        """``hidden`` [batch, tokens, hidden size], one layer further. ``states``: keys, then values, of each source."""
        hidden = hidden + self.self_attn(normed, angles, mask, *states)
        made: torch.Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return made


class RebuiltLayer(Block):
    """A layer that attends to keys and values of layers below."""

    @staticmethod
    def attention(config: FusedKVConfig, number: int) -> Attention:
        """To one pair as it is, or to weighted sums."""
        plan = config.layer_plan.layers[number]
        return FusedAttention(config, number) if plan is not None and plan.weighted else Attention(config, number)

    def forward(self, hidden: torch.Tensor, angles: Pair, mask: torch.Tensor | None, *states: torch.Tensor) -> Any:
        """See ``further``; all positional, so that any way of checkpointing sees the states."""
        return self.further(hidden, self.input_layernorm(hidden), angles, mask, *states)


class StoredLayer(Block):
    """A layer with keys and values of its own."""

    self_attn: StoredAttention

    @staticmethod
    def attention(config: FusedKVConfig, number: int) -> Attention:
        """A stored layer's."""
        return StoredAttention(config, number)

    def forward(
        self,
        hidden: torch.Tensor,
        angles: Pair,
        mask: torch.Tensor | None,
        last: int = 0,
        past_key_values: Any = None,
    ) -> Any:
        """(hidden one layer further, keys, values), the latter of all tokens, those in ``past_key_values`` included.

        ``last``: how many tokens go on to the layers above, 0 for all of them. The others only leave keys and values
        here: no query, no MLP. Then ``mask`` is that of the last ones.
        """
        normed = self.input_layernorm(hidden)
        keys, values = self.self_attn.states(normed, angles)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.number)
        if last:
            hidden, normed = hidden[:, -last:], normed[:, -last:]
            angles = tail(angles, last)
        return self.further(hidden, normed, angles, mask, keys, values), keys, values


def tail(angles: Pair, last: int) -> Pair:
    """The angles of the last tokens."""
    return angles[0][:, -last:], angles[1][:, -last:]


def build(config: FusedKVConfig) -> nn.ModuleList:
    """The layers of a model."""
    return nn.ModuleList(
        StoredLayer(config, number) if layer is None else RebuiltLayer(config, number)
        for number, layer in enumerate(config.layer_plan.layers)
    )
