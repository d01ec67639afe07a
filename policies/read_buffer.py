"""How far ahead of the model its layers are loaded (CachedAttention, layer-wise pre-loading with a read buffer).

While layer l computes on the new tokens, layer l + 1 of the history is loaded. Where loading takes longer than
computing, a read buffer lets loading begin before the forward pass does, by as much as is missing.
"""

from __future__ import annotations


def read_buffer(load: float, history: int, prefill: float, new: int, total: int) -> int:
    """Bytes to be loaded before the forward pass starts, so that it never waits; 0 when loading is quick enough.

    ``S = B * (T_load * L_hist - T_pref * L_new)``: ``load`` seconds per token of ``history`` tokens, ``prefill``
    seconds per token of ``new`` tokens, all layers, as measured. The bandwidth B follows from them: ``total`` bytes
    (the whole history) take ``load * history`` seconds. Clamped to what there is.
    """
    loading = load * history
    if loading <= 0:
        return 0
    return int(min(1.0, max(0.0, 1 - prefill * new / loading)) * total)


def layers_ahead(buffer: int, total: int, layers: int) -> int:
    """The same in whole layers, of ``layers`` that take ``total`` bytes: at least the one that comes next."""
    if total <= 0:
        return 1
    return max(1, min(layers, -(-buffer * layers // total)))
