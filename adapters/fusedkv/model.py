"""The models: a decoder that leaves early for tokens whose logits nobody asks for, and a language model on it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from kvstore.adapters.fusedkv import checkpoint
from kvstore.adapters.fusedkv.attention import FusionWeights, Pair
from kvstore.adapters.fusedkv.config import FusedKVConfig
from kvstore.adapters.fusedkv.layers import Block, build, tail


class FusedKVPreTrainedModel(PreTrainedModel):
    """What all models of the family share: loading, saving, start values."""

    config_class = FusedKVConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["RebuiltLayer", "StoredLayer"]
    _skip_keys_device_placement: ClassVar = ["past_key_values"]
    _keep_in_fp32_modules_strict: ClassVar = ["fusion"]
    _supports_sdpa = True
    _can_record_outputs: ClassVar = {"hidden_states": Block}

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers has it. Raises ``BadInput`` for a checkpoint of another plan, or with weights of another."""
        return checkpoint.load(super().from_pretrained, name, *args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FusionWeights):
            module.reset()


class FusedKVModel(FusedKVPreTrainedModel):
    """The decoder."""

    def __init__(self, config: FusedKVConfig) -> None:
        super().__init__(config)
        self.plan = config.layer_plan
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = build(config)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Hidden states [batch, tokens, hidden size] of the last ``logits_to_keep`` tokens; 0 (or a tensor): of all.

        The other tokens leave at the last stored layer, which keeps their keys and values (FusedKV, table 1). They run
        through all layers when hidden states of every layer are asked for.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(past, past + hidden.shape[1], device=hidden.device)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        last = (
            0
            if kwargs.get("output_hidden_states", self.config.output_hidden_states)
            else leaving(logits_to_keep, hidden.shape[1])
        )
        hidden = self._run(hidden, self.rotary_emb(hidden, position_ids), mask, last, past, past_key_values)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden), past_key_values=past_key_values if use_cache else None
        )

    def _run(
        self, hidden: torch.Tensor, angles: Pair, mask: torch.Tensor | None, last: int, past: int, cache: Any
    ) -> torch.Tensor:
        sources: dict[int, Pair] = {}
        for number, (layer, rebuilt) in enumerate(zip(self.layers, self.plan.layers, strict=True)):
            if rebuilt is None:
                leave = last if number == self.plan.stored[-1] else 0
                seen = mask_of_last(mask, leave, past + hidden.shape[1], hidden.device) if leave else mask
                hidden, keys, values = layer(hidden, angles, seen, leave, past_key_values=cache)
                if leave:
                    mask, angles = seen, tail(angles, leave)
                if number in self.plan.sources:
                    sources[number] = keys.contiguous(), values.contiguous()  # once, not in each layer that reads them
            else:
                states = [sources[source][0] for source in rebuilt.keys]
                hidden = layer(hidden, angles, mask, *states, *(sources[source][1] for source in rebuilt.values))
            sources = {source: pair for source, pair in sources.items() if self.plan.sources[source] > number}
        return hidden


class FusedKVForCausalLM(FusedKVPreTrainedModel, GenerationMixin):
    """The language model: trains, generates, saves and loads as any other of transformers."""

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: FusedKVConfig) -> None:
        super().__init__(config)
        self.model = FusedKVModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Logits [batch, tokens, vocabulary] of the last ``logits_to_keep`` tokens (0: of all), and the loss."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def leaving(logits_to_keep: int | torch.Tensor, tokens: int) -> int:
    """How many of ``tokens`` go through all layers; 0 when none can leave early."""
    if isinstance(logits_to_keep, torch.Tensor):
        return 0
    return logits_to_keep if 0 < logits_to_keep < tokens else 0


def mask_of_last(mask: torch.Tensor | None, last: int, columns: int, device: torch.device) -> torch.Tensor | None:
    """The rows of the last tokens in a mask of transformers; None: all is visible that lies before."""
    if mask is not None:
        return mask[..., -last:, :]
    if last == 1:
        return None
    return torch.ones((last, columns), dtype=torch.bool, device=device).tril(columns - last)[None, None]
