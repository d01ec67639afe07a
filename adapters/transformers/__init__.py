"""KV reuse for Hugging Face transformers: any RoPE decoder that passes the attach test, unmodified.

>>> from kvstore.adapters.transformers import Reuse             # doctest: +SKIP
>>> reuse = Reuse(model, store)                                 # doctest: +SKIP
>>> out = reuse.generate(input_ids, max_new_tokens=64)          # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvstore.adapters.transformers.hit import Hit
    from kvstore.adapters.transformers.loop import Loop
    from kvstore.adapters.transformers.request import Request
    from kvstore.adapters.transformers.reuse import Reuse

__all__ = ["Hit", "Loop", "Request", "Reuse"]


def __getattr__(name: str) -> object:
    # Lazy, so that naming this package costs no import of torch.
    if name == "Reuse":
        from kvstore.adapters.transformers.reuse import Reuse

        return Reuse
    if name == "Hit":
        from kvstore.adapters.transformers.hit import Hit

        return Hit
    if name == "Loop":
        from kvstore.adapters.transformers.loop import Loop

        return Loop
    if name == "Request":
        from kvstore.adapters.transformers.request import Request

        return Request
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
