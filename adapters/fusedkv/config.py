"""What a model of the family is made of: Llama or Qwen3 blocks, and the plan that says which layers are stored."""

from __future__ import annotations

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from kvstore import plan
from kvstore.errors import BadInput
from kvstore.layout import LayerShape
from kvstore.plan import LayerPlan
from kvstore.tensors.rope import HALF, INTERLEAVED

FUSION_INITS = ("lite", "normal")


@strict
class FusedKVConfig(PreTrainedConfig):
    """Configuration of ``FusedKVForCausalLM``; raises ``BadInput`` for a plan that the layers do not suit.

    ``kv_plan``: a name ("standard", "cla", "yoco", "fusedkv-lite", "fusedkv-lite-reversed", "fusedkv"), or a list with
    an item for each layer: None where it is stored, else a dict of its sources, ``{"keys": [0], "values": [0]}``, with
    ``"weighted": True`` where sums of them are learned.

    ``qk_norm``: Qwen3's norm of queries and keys; False gives Llama's blocks. ``rope_interleaved``: rotary pairs are
    (2i, 2i + 1), as in the paper, instead of (i, i + head_dim / 2). ``fusion_init``: what weighted sums start from:
    "lite" is keys of the upper source and values of the lower one, which is FusedKV-Lite; "normal" draws from N(0, 1).
    Key-value heads may differ from layer to layer (``per_layer_config``), but not between a layer and its sources.
    """

    model_type = "fusedkv"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]

    vocab_size: int = 32_000
    hidden_size: int = 1024
    intermediate_size: int | None = None  # None: three times the hidden size
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None  # None: as many as there are query heads
    head_dim: int | None = None  # None: the hidden size, split over the query heads
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None  # type: ignore[type-arg]
    attention_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = True
    rope_interleaved: bool = False
    kv_plan: str | list = "fusedkv"  # type: ignore[type-arg]
    fusion_init: str = "lite"
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.intermediate_size = self.intermediate_size or 3 * self.hidden_size
        super().__post_init__(**kwargs)
        self.layer_plan.check(self.shapes)
        self._check()

    def _check(self) -> None:
        if self.fusion_init not in FUSION_INITS:
            raise BadInput(f"fusion_init={self.fusion_init!r} is not one of {', '.join(FUSION_INITS)}")
        if (self.rope_parameters or {}).get("partial_rotary_factor", 1.0) != 1.0:
            raise BadInput("partial_rotary_factor: all dims of a head turn in this family; leave it out")
        if len({shape.key_dim for shape in self.shapes}) > 1 or self.shapes[0].key_dim % 2:
            raise BadInput("head_dim must be even, and one for all layers: they share one rotary embedding")
        for number, shape in enumerate(self.shapes):
            if self.num_attention_heads % shape.heads:
                raise BadInput(
                    f"layer {number}: {self.num_attention_heads} query heads cannot share {shape.heads} key-value "
                    "heads evenly"
                )

    @property
    def layer_plan(self) -> LayerPlan:
        """Which layers are stored, and how the others are rebuilt."""
        return plan.read(self.kv_plan, self.num_hidden_layers)

    @property
    def kv_sharing_modes(self) -> list[str | None]:
        """transformers' word for the same: its caches hold nothing for layers that "reuse"."""
        return [None if layer is None else "reuse" for layer in self.layer_plan.layers]

    @property
    def shapes(self) -> list[LayerShape]:
        """Key-value heads and dims of each layer; of a rebuilt one, those that its sources must have."""
        return [
            LayerShape(layer.num_key_value_heads, layer.head_dim, layer.head_dim) for layer in self.per_layer_config
        ]

    @property
    def pairing(self) -> str:
        """Which dims of a key turn together, as ``kvstore.tensors.rope`` names it."""
        return INTERLEAVED if self.rope_interleaved else HALF
