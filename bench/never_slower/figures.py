"""What pairs of measurements say: percentiles of both ways, and their ratio with what chance may make of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from kvstore.bench.never_slower.pairs import Pair

PERCENTILES = (50, 90, 99)
RESAMPLES = 2000
MISSED = 0.25  # relative error of an expectation that was none
LIMIT = 1.05  # times the time without a store, that the p99 with one should be at most


def summarize(pairs: Sequence[Pair], seed: int = 0) -> dict[str, Any]:
    """Figures of one disk. ``ratio_p50``, ``_p90``, ``_p99`` have ``low`` and ``high``: 95 % of ``RESAMPLES`` draws of
    pairs, with replacement, lie between. ``error``: of expected first tokens, the median relative one; ``missed_pairs``
    are those with a large one, ``slower_pairs`` those in which the store was slower than ``LIMIT``."""
    both = np.array([(pair.with_store, pair.without) for pair in pairs])
    draws = np.random.default_rng(seed).integers(0, len(both), (RESAMPLES, len(both)))
    found: dict[str, Any] = {"pairs": len(pairs)}
    for percentile in PERCENTILES:
        ours, plain = np.percentile(both, percentile, axis=0)
        sampled = np.percentile(both[draws], percentile, axis=1)
        low, high = np.percentile(sampled[:, 0] / sampled[:, 1], (2.5, 97.5))
        found[f"with_p{percentile}"], found[f"without_p{percentile}"] = float(ours), float(plain)
        found[f"ratio_p{percentile}"] = {"value": float(ours / plain), "low": float(low), "high": float(high)}
    matched, cached = sum(pair.matched for pair in pairs), sum(pair.cached for pair in pairs)
    errors = [abs(pair.expected / pair.with_store - 1) for pair in pairs if pair.expected]
    return found | {
        "worst_pair": float(max(both[:, 0] / both[:, 1])),
        "prompt_tokens": sum(pair.prompt_tokens for pair in pairs),
        "matched_tokens": matched,
        "loaded_tokens": cached,
        "recomputed_tokens": matched - cached,
        "cut_pairs": sum(pair.cached < pair.matched for pair in pairs),
        "slower_pairs": sum(pair.with_store > LIMIT * pair.without for pair in pairs),
        "missed_pairs": sum(error > MISSED for error in errors),
        "late_layers": sum(pair.recomputed_layers for pair in pairs),
        "error": float(np.median(errors)) if errors else None,
        "same_tokens": sum(pair.same_token for pair in pairs),
    }


def table(results: dict[str, dict[str, Any]]) -> Table:
    """One row for each disk."""
    shown = Table("disk", "pairs", "p50, s", "p99, s", "p99 ratio", "95 %", "slower", "loaded", "error")
    shown.title = f"First tokens with a store and without one; p99 ratio at most {LIMIT}"
    shown.caption = "slower: pairs; loaded: of what matched; error: of expected first tokens"
    for disk, row in results.items():
        ratio = row["ratio_p99"]
        shown.add_row(
            disk,
            str(row["pairs"]),
            *(f"{row[f'with_p{p}']:.2f} / {row[f'without_p{p}']:.2f}" for p in (50, 99)),
            f"{ratio['value']:.2f}",
            f"{ratio['low']:.2f}-{ratio['high']:.2f}",
            str(row["slower_pairs"]),
            f"{row['loaded_tokens'] / max(1, row['matched_tokens']):.0%}",
            "" if row["error"] is None else f"{row['error']:.0%}",
        )
    return shown


def plot(pairs: dict[str, Sequence[Pair]], path: Path) -> None:
    """For each disk, how first tokens are spread, both ways."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(pairs), figsize=(4 * len(pairs), 3.2), squeeze=False, sharey=True)
    for axis, (disk, rows) in zip(axes[0], pairs.items(), strict=True):
        shares = np.linspace(0, 1, len(rows))
        axis.plot(sorted(row.without for row in rows), shares, "--", color="0.5", label="without")
        axis.plot(sorted(row.with_store for row in rows), shares, color="C0", label="with the store")
        axis.set_title(disk)
        axis.set_xlabel("seconds to the first token")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("share of turns")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
