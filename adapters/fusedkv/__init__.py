"""FusedKV and its family as Hugging Face models: train, save, load, generate; only storage layers are cached.

>>> from kvstore.adapters.fusedkv import FusedKVConfig, FusedKVForCausalLM                       # doctest: +SKIP
>>> model = FusedKVForCausalLM(FusedKVConfig(kv_plan="fusedkv", num_hidden_layers=8))            # doctest: +SKIP

Importing this package registers the family, so that ``AutoModelForCausalLM.from_pretrained`` finds it.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from kvstore.adapters.fusedkv.config import FusedKVConfig
from kvstore.adapters.fusedkv.model import FusedKVForCausalLM, FusedKVModel

__all__ = ["FusedKVConfig", "FusedKVForCausalLM", "FusedKVModel"]

AutoConfig.register(FusedKVConfig.model_type, FusedKVConfig, exist_ok=True)
AutoModel.register(FusedKVConfig, FusedKVModel, exist_ok=True)
AutoModelForCausalLM.register(FusedKVConfig, FusedKVForCausalLM, exist_ok=True)
