"""Listening to a model's forward passes that use a cache of ours."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

from kvstore.adapters.transformers.cache import ReuseCache
from kvstore.adapters.transformers.window import WindowCache


def hook(decoder: Any, owner: object) -> None:
    """Lets caches of ``owner`` arrange what ``decoder`` is given and see what it makes, for as long as it lives."""
    mine = weakref.ref(owner)
    names = [name for name in inspect.signature(decoder.forward).parameters if name != "kwargs"]
    kinds = (ReuseCache, WindowCache)

    def cache_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> ReuseCache | WindowCache | None:
        cache = kwargs.get("past_key_values") or next((arg for arg in args if isinstance(arg, kinds)), None)
        return cache if isinstance(cache, kinds) and cache.owner() is mine() else None

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cache = cache_of(args, kwargs)
        if cache is None:
            return None
        if args:  # by name from here on
            kwargs, args = {**dict(zip(names, args, strict=False)), **kwargs}, args[len(names) :]
        kwargs = cache.arranged(kwargs)
        cache.begin(kwargs.get("input_ids"), kwargs.get("attention_mask"), kwargs.get("position_ids"))
        return args, kwargs

    def after(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        cache = cache_of(args, kwargs)
        if cache is None:
            return None
        cache.finish()
        return cache.completed(output) if isinstance(cache, WindowCache) else None

    handles = [
        decoder.register_forward_pre_hook(before, with_kwargs=True),
        decoder.register_forward_hook(after, with_kwargs=True, always_call=True),
    ]
    for handle in handles:
        weakref.finalize(owner, handle.remove).atexit = False
