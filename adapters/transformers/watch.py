"""Noticing that a model is no longer the one that was fingerprinted: a sweep cheap enough for every load and save."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

SAMPLES = 4  # elements looked at in each tensor
ADAPTER_STATE = ("_active_adapter", "_disable_adapters", "merged_adapters")


@dataclass(frozen=True)
class Stamp:
    """What a sweep saw."""

    names: tuple[str, ...]
    places: tuple[tuple[int, int], ...]  # address and version of each tensor
    samples: bytes
    attention: str | None
    adapters: tuple[object, ...]


def sweep(model: Any) -> Stamp:
    """Addresses, versions and a few elements of all parameters and buffers, adapters, attention implementation."""
    names: list[str] = []
    places: list[tuple[int, int]] = []
    picked: list[torch.Tensor] = []
    adapters: list[object] = []
    with torch.no_grad():
        for name, module in _modules(model):
            for owned in (module._parameters, module._buffers):
                for key, tensor in owned.items():
                    if tensor is not None:
                        names.append(f"{name}.{key}")
                        places.append((tensor.data_ptr(), _version(tensor)))
                        picked.append(_pick(tensor))
            state = module.__dict__
            for attribute in ADAPTER_STATE:
                if attribute in state:
                    adapters.append((name, attribute, repr(state[attribute])))
    attention = getattr(model.config, "_attn_implementation", None)
    return Stamp(tuple(names), tuple(places), _bytes(picked), attention, tuple(adapters))


def difference(before: Stamp, after: Stamp) -> str | None:
    """What changed, in words; None when nothing did."""
    if before == after:
        return None
    if before.attention != after.attention:
        return f"the attention implementation changed from {before.attention} to {after.attention}"
    if before.adapters != after.adapters or before.names != after.names:
        return "adapters were added, switched or merged"
    for name, old, new in zip(before.names, before.places, after.places, strict=True):
        if old != new:
            return f"weights changed ({name})"
    return "weights changed"


def _modules(model: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    """Every module under its path, without building joined names more often than needed."""
    stack: list[tuple[str, torch.nn.Module]] = [("", model)]
    while stack:
        name, module = stack.pop()
        yield name, module
        prefix = f"{name}." if name else ""
        stack.extend((prefix + key, child) for key, child in module._modules.items() if child is not None)


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _pick(tensor: torch.Tensor) -> torch.Tensor:
    """A few elements, spread; a view, so that nothing is copied before all are gathered."""
    count = tensor.numel()
    if count <= SAMPLES or not tensor.is_contiguous():
        return tensor.reshape(-1)[:SAMPLES]
    return tensor.as_strided((SAMPLES,), ((count - 1) // (SAMPLES - 1),))


def _bytes(picked: list[torch.Tensor]) -> bytes:
    """The elements as raw bytes, so that a NaN equals itself; one gather per dtype and device."""
    groups: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for tensor in picked:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return b"".join(torch.cat(group).view(torch.uint8).cpu().numpy().tobytes() for group in groups.values())
