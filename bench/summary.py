"""What a replay showed, as one dictionary: the JSON that `kvstore replay --json` writes and the report draws."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from kvstore.adapters.transformers import Reuse
from kvstore.bench.environment import environment
from kvstore.bench.replay import Replay, Row


def summarize(replay: Replay, log: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Everything that was measured, with the environment it was measured in.

    `bytes_by_tier` are those that a tier gave back to the model, `bytes_held_by_tier` those that it holds at the end.
    """
    rows = replay.rows
    stats = replay.store.stats()
    token_bytes = replay.reuse.layout.token_payload
    return {
        "log": log,
        "model": replay.subject.name,
        "settings": settings,
        "conversations": len({row.conversation for row in rows}),
        "turns": len(rows),
        "layer_plan": layer_plan(replay.reuse),
        "prompt_tokens": sum(row.prompt_tokens for row in rows),
        "cached_tokens": sum(row.cached_tokens for row in rows),
        "tokens_by_tier": tokens_by_tier(rows),
        **verdict([row for row in rows if row.exact], replay.tokens),
        "discovery": discovery(rows, replay.tokens) if replay.discover else None,
        "ttft_seconds": {
            "recompute": spread(row.ttft_recompute for row in rows),
            "reuse": spread(row.ttft_reuse for row in rows),
        },
        "tpot_seconds": {
            "recompute": spread(row.tpot_recompute for row in rows),
            "reuse": spread(row.tpot_reuse for row in rows),
        },
        "save_seconds": spread(row.save_seconds for row in rows),
        "bytes_by_tier": {tier: tokens * token_bytes for tier, tokens in tokens_by_tier(rows).items()},
        "bytes_held_by_tier": {name: int(tier["bytes"]) for name, tier in stats["tiers"].items()},
        "counters": dict(sorted(stats["counters"].items())),
        "environment": environment(),
        "timeline": replay.timed.as_json() if replay.timed else None,
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def layer_plan(reuse: Reuse) -> dict[str, Any]:
    """How many layers blocks hold, and the bytes of one token in them, beside those of a model that stores all."""
    plan, layout = reuse.plan, reuse.layout
    whole = dataclasses.replace(layout, layers=plan.spread(layout.layers))
    return {
        "name": plan.name,
        "layers": len(plan.layers),
        "stored_layers": len(plan.stored),
        "token_bytes": layout.token_payload,
        "token_bytes_of_all_layers": whole.token_payload,
    }


def verdict(rows: Sequence[Row], tokens: int) -> dict[str, Any]:
    """Whether the outputs are equal. A token may differ where the two best logits are closer than the noise."""
    noise = max((row.noise for row in rows if row.noise is not None), default=0.0)
    gaps = [gap for row in rows for gap in row.gaps]
    ties = sum(gap <= noise for gap in gaps)
    return {
        "tokens_equal": ties == len(gaps),
        "tokens_compared": tokens * len(rows),
        "tokens_different": len(gaps) - ties,
        "ties": ties,
        "max_logit_difference": max((row.logit_difference for row in rows), default=0.0),
        "logit_noise": noise,
    }


def discovery(rows: Sequence[Row], tokens: int) -> dict[str, Any]:
    """What looking for runs anywhere brought, and how far its outputs are from a recompute's."""
    apart = [row for row in rows if not row.exact]
    return {
        "prefix_tokens": sum(row.prefix_tokens for row in rows),
        "more_tokens": sum(row.cached_tokens - row.prefix_tokens for row in rows),
        "turns": len(apart),
        "tokens_compared": tokens * len(apart),
        "tokens_different": sum(len(row.gaps) for row in apart),
        "max_logit_difference": max((row.logit_difference for row in apart), default=0.0),
        "divergence": sum(row.divergence for row in apart) / max(1, len(apart)),
    }


def tokens_by_tier(rows: Iterable[Row]) -> dict[str, int]:
    """Tokens that were not computed, by the tier that they came from."""
    found: dict[str, int] = {}
    for row in rows:
        for tier, tokens in row.tokens_by_tier.items():
            found[tier] = found.get(tier, 0) + tokens
    return found


def spread(seconds: Iterable[float]) -> dict[str, float]:
    """Percentiles and the total of a number of measurements."""
    listed = np.fromiter(seconds, dtype=np.float64)
    if not listed.size:
        return {"p50": 0.0, "p90": 0.0, "p99": 0.0, "mean": 0.0, "total": 0.0}
    p50, p90, p99 = (float(one) for one in np.percentile(listed, (50, 90, 99)))
    return {"p50": p50, "p90": p90, "p99": p99, "mean": float(listed.mean()), "total": float(listed.sum())}
