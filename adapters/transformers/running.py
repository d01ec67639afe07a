"""A prompt on its way through a model, and its answer, one token at a time."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from kvstore.adapters.transformers.fingerprint import base_model


class Running:
    """One sequence with a cache of its own: ``read``, ``say``, ``read``, ... For one thread at a time."""

    def __init__(self, model: Any, first: dict[str, Any], cache: Any) -> None:
        """``first``: what the model is given to read the prompt, at least ``input_ids`` [1, tokens]."""
        self.cache = cache
        self._model, self._next = model, first
        self._device = first["input_ids"].device
        only_last = "logits_to_keep" in inspect.signature(base_model(model).forward).parameters
        self._options: dict[str, Any] = {"logits_to_keep": 1} if only_last else {}

    @torch.no_grad()
    def read(self) -> torch.Tensor:
        """Reads the prompt, or later what was said last; the logits behind it, [vocabulary], where the model is.

        Raises what the model raises; the cache is then of no use.
        """
        out = self._model(**{**self._next, "past_key_values": self.cache, "use_cache": True}, **self._options)
        logits: torch.Tensor = out.logits[0, -1]
        return logits

    def say(self, token: int) -> None:
        """The answer goes on with this token, which is read next."""
        self._next = {"input_ids": torch.tensor([[token]], device=self._device)}
