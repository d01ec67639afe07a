"""The model that an engine serves, as the store knows it: its layers, what identifies it, what a block of it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvstore.adapters.transformers.checkpoint import checkpoint_files, files_digest
from kvstore.adapters.transformers.fingerprint import composed
from kvstore.adapters.vllm.options import Options
from kvstore.adapters.vllm.rotation import buffers
from kvstore.adapters.vllm.step import Scope
from kvstore.errors import BadInput, Unsupported
from kvstore.keys import Fingerprint, Namespace
from kvstore.layout import Layout, Shard
from kvstore.plan import named
from kvstore.store import Store


@dataclass(frozen=True)
class Model:
    """What both halves of the connector know of it."""

    layers: tuple[str, ...]  # names of its attention layers, the first one first
    page_tokens: int
    heads: int  # kv heads of the whole model
    ranks: int  # workers that share them
    layout: Layout  # of blocks with all heads
    fingerprint: Fingerprint
    engine: str = ""  # its workers' group

    @property
    def part(self) -> Layout:
        """Of one worker's part of a block: its heads."""
        shape = self.layout.layers[0]
        heads = max(1, self.heads // self.ranks)
        return Layout.uniform(len(self.layers), heads, shape.key_dim, self.layout.dtype, self.layout.block_tokens)

    def first_head(self, rank: int) -> int:
        """The first kv head of a worker."""
        return rank * self.heads // self.ranks

    def shard(self, rank: int) -> Shard | None:
        """What a worker has of a block; None: all of it."""
        return None if self.ranks == 1 else Shard(self.part, self.first_head(rank), self.engine)

    def saves(self, rank: int) -> bool:
        """Whether a worker has heads that the one before it has not."""
        return rank == 0 or self.first_head(rank) != self.first_head(rank - 1)

    def namespace(self, scope: Scope) -> Namespace:
        """Of a request's blocks."""
        parts: Mapping[str, str] = self.fingerprint.components
        if scope.adapter != "none":
            parts = {**parts, "adapters": scope.adapter}
        if scope.generation:
            parts = {**parts, "generation": str(scope.generation)}
        return Namespace(self.fingerprint if parts is self.fingerprint.components else Fingerprint(parts), scope.tenant)


def describe(vllm_config: Any, kv_cache_config: Any, options: Options, store: Store) -> Model:
    """Reads it off the engine's configuration. Raises ``Unsupported`` for what cannot be served exactly."""
    config, parallel = vllm_config.model_config, vllm_config.parallel_config
    spec, names = _attention(kv_cache_config)
    if parallel.pipeline_parallel_size > 1:
        raise Unsupported("pipeline parallelism is not served; set pipeline_parallel_size to 1")
    if max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size) > 1:
        raise Unsupported("context parallelism is not served; set its sizes to 1")
    dtype = str(config.dtype).removeprefix("torch.")
    if spec.dtype != config.dtype or vllm_config.cache_config.cache_dtype not in ("auto", dtype):
        raise Unsupported(
            f"a cache of {vllm_config.cache_config.cache_dtype} beside a model of {dtype} is not served; "
            "set kv_cache_dtype to auto"
        )
    heads = config.get_total_num_kv_heads()
    layout = Layout.uniform(len(names), heads, spec.head_size, dtype, options.block_tokens)
    ranks = parallel.tensor_parallel_size
    fingerprint = _fingerprint(vllm_config, options, store, len(names))
    engine = str(vllm_config.kv_transfer_config.engine_id)
    return Model(tuple(sorted(names, key=_number)), spec.block_size, heads, ranks, layout, fingerprint, engine)


def _attention(kv_cache_config: Any) -> tuple[Any, list[str]]:
    """The one kind of attention that all layers have, and their names."""
    groups = kv_cache_config.kv_cache_groups
    kinds = sorted({type(group.kv_cache_spec).__name__ for group in groups})
    if len(groups) != 1 or kinds != ["FullAttentionSpec"]:
        found = ", ".join(kinds) or "no cache"
        raise Unsupported(f"only models whose layers all have full attention are served, and this one has {found}")
    spec = groups[0].kv_cache_spec
    for name in ("sliding_window", "attention_chunk_size"):
        if getattr(spec, name, None):
            raise Unsupported(f"some of this model's layers have a {name.replace('_', ' ')}, which is not served")
    if getattr(spec, "head_size_v", spec.head_size) != spec.head_size:
        raise Unsupported("keys and values of different sizes are not served")
    return spec, list(groups[0].layer_names)


def _number(name: str) -> int:
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    if len(numbers) != 1:
        raise Unsupported(f"the name {name!r} of an attention layer does not say which layer it is")
    return numbers[0]


def _fingerprint(vllm_config: Any, options: Options, store: Store, layers: int) -> Fingerprint:
    if options.fingerprint is not None:
        return Fingerprint({"given": options.fingerprint})
    config = vllm_config.model_config
    text = config.hf_text_config
    return composed(
        text,
        weights=_weights(config, str(vllm_config.load_config.load_format), store),
        dtype=str(config.dtype).removeprefix("torch."),
        quantization=getattr(config.hf_config, "quantization_config", None),
        frequencies=buffers(text),
        adapters="none",
        plan=named("standard", layers),
    )


def _weights(config: Any, load_format: str, store: Store) -> str:
    """The digest of the checkpoint's files, as the adapter for transformers has it."""
    if load_format == "dummy":
        return f"dummy {config.seed}"
    files = checkpoint_files(_folder(str(config.model), getattr(config, "revision", None)))
    if not files:
        raise BadInput(
            f"there are no safetensors files of {config.model!r} to identify it by; set fingerprint in "
            "kv_connector_extra_config to a text that changes whenever its weights do"
        )
    return files_digest(files, store)


def _folder(model: str, revision: str | None) -> Path:
    place = Path(model).expanduser()
    if place.is_dir():
        return place
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):
        return place


def dtype_of(layout: Layout) -> torch.dtype:
    """The layout's dtype as torch has it."""
    found = getattr(torch, layout.dtype)
    assert isinstance(found, torch.dtype)
    return found
