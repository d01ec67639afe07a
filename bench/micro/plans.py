"""What layer plans save and cost: work of a prefill, time to the first token, time per token, beside the standard plan.

The same seeded model of every plan. ``transformers`` is Qwen3 of the transformers library at the same sizes, which
computes its last layer for all tokens of a prompt.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

from kvstore import compiled
from kvstore.adapters.fusedkv import FusedKVConfig, FusedKVForCausalLM

STANDARD, THEIRS = "standard", "transformers"
ARMS = (STANDARD, THEIRS, "cla", "yoco", "fusedkv-lite", "fusedkv")
PROMPT = 8192
DECODE = 24  # tokens of one side of a comparison
COMPILING = 120.0  # seconds that kernels may take to be compiled
# Key-value heads of 8 query heads: each query reads a cache of its own, or all read one, which a step reads once.
SHAPES = {"memory-bound": 8, "one key-value head": 1}
WORK, LITE = 0.55, 1.05  # what a prefill's work, and Lite's time per token, are to stay below, beside standard
SIZES: dict[str, Any] = {
    "vocab_size": 8000,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 1 << 15,
    "initializer_range": 0.1,
}


def build(arm: str, kv_heads: int, **sizes: Any) -> Any:
    """The seeded model of an arm, in float32."""
    sizes = {**SIZES, "num_key_value_heads": kv_heads, **sizes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        if arm == THEIRS:
            return Qwen3ForCausalLM(Qwen3Config(**sizes)).eval()
        return FusedKVForCausalLM(FusedKVConfig(kv_plan=arm, fusion_init="normal", **sizes)).eval()


@torch.inference_mode()
def measure(repeats: int, tokens: int = PROMPT, **sizes: Any) -> dict[str, dict[str, dict[str, float]]]:
    """For each shape and arm: ``flops``, ``ttft`` and ``tpot`` (seconds), each with its ratio to the standard plan's.

    Ratios of times are medians over repeats in which all arms take turns.
    """
    result = {}
    for shape, kv_heads in SHAPES.items():
        models = {arm: build(arm, kv_heads, **sizes) for arm in ARMS}
        with torch.device("meta"):
            work = {arm: flops(build(arm, kv_heads, **sizes), tokens) for arm in ARMS}
        ids = torch.randint(0, SIZES["vocab_size"], (1, tokens), generator=torch.Generator().manual_seed(3))
        caches: dict[str, Any] = {}
        first = taken({arm: prefill(model, ids, caches, arm) for arm, model in models.items()}, max(2, repeats // 3))
        compiled.idle(COMPILING)
        steps = {arm: decode(model, caches, arm) for arm, model in models.items()}
        next_tokens = taken(steps, max(3, repeats))
        result[shape] = {
            arm: {
                "flops": work[arm],
                "flops_ratio": work[arm] / work[STANDARD],
                **compared("ttft", first, arm, 1),
                **compared("tpot", next_tokens, arm, DECODE),
            }
            for arm in ARMS
        }
    return result


def flops(model: Any, tokens: int) -> int:
    """Floating-point operations up to the first token, by torch's counter; nothing is computed."""
    ids = torch.zeros((1, tokens), dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, past_key_values=DynamicCache(config=model.config), use_cache=True, logits_to_keep=1)
    return int(counter.get_total_flops())


def prefill(model: Any, ids: torch.Tensor, caches: dict[str, Any], arm: str) -> Callable[[], None]:
    """The whole prompt; leaves its cache."""

    def run() -> None:
        caches[arm] = DynamicCache(config=model.config)
        model(input_ids=ids, past_key_values=caches[arm], use_cache=True, logits_to_keep=1)

    return run


def decode(model: Any, caches: dict[str, Any], arm: str) -> Callable[[], None]:
    """Some tokens behind the prompt, which are forgotten afterwards."""

    def run() -> None:
        token = torch.ones((1, 1), dtype=torch.long, device=model.device)
        for _ in range(DECODE):
            out = model(input_ids=token, past_key_values=caches[arm], use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
        caches[arm].crop(-DECODE)

    return run


def clocked(run: Callable[[], object]) -> float:
    """Seconds on the clock."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def taken(
    work: dict[str, Callable[[], None]], repeats: int, clock: Callable[[Callable[[], object]], float] = clocked
) -> dict[str, list[float]]:
    """Seconds of each, in turns; the first round only warms up."""
    times: dict[str, list[float]] = {arm: [] for arm in work}
    for number in range(repeats + 1):
        for arm, run in work.items():
            seconds = clock(run)
            if number:
                times[arm].append(seconds)
    return times


def compared(name: str, times: dict[str, list[float]], arm: str, units: int) -> dict[str, float]:
    """The median time of a unit, and the median and the spread (half the middle half) of the ratio to standard."""
    ratios = [one / other for one, other in zip(times[arm], times[STANDARD], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        name: statistics.median(times[arm]) / units,
        f"{name}_ratio": middle,
        f"{name}_spread": (high - low) / 2,
    }


def table(results: dict[str, dict[str, dict[str, float]]]) -> Table:
    """All arms of all shapes."""
    shown = Table(title=f"Layer plans behind a prompt of {PROMPT:,}, beside the standard plan")
    shown.add_column("plan", no_wrap=True)
    for column in ("GFLOP", "ratio", "first s", "ratio", "±", "next ms", "ratio", "±"):
        shown.add_column(column, justify="right")
    shown.caption = f"wanted: work of halves at most {WORK}, fusedkv-lite's time per token at most {LITE}"
    for shape, arms in results.items():
        shown.add_row(f"[bold]{shape}[/]")
        for place, (arm, row) in enumerate(arms.items(), 1):
            cells = [f"{row['flops'] / 1e9:,.0f}", f"{row['flops_ratio']:.3f}"]
            cells += [f"{row['ttft']:.2f}", f"{row['ttft_ratio']:.2f}", f"{row['ttft_spread']:.2f}"]
            cells += [f"{row['tpot'] * 1e3:.1f}", f"{row['tpot_ratio']:.2f}", f"{row['tpot_spread']:.2f}"]
            shown.add_row(f"  {arm}", *cells, end_section=place == len(arms))
    return shown
