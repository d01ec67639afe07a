"""Layer plans on a GPU: attention to weighted sums, first tokens and decoding, beside torch and the standard plan."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from kvstore.bench.gpu.setting import Figure, Setting
from kvstore.bench.micro import plans
from kvstore.bench.micro.plans import STANDARD
from kvstore.tensors.fused_attention import attend
from kvstore.tensors.fusion import Fusion, rebuilt, reference, tied
from kvstore.tensors.rope import HALF

ARMS = (STANDARD, "yoco", "fusedkv-lite", "fusedkv")
AS_TORCH = 1.5  # times as far from float64 as torch's own attention, at most
# Query heads and key-value heads: a step reads a cache for each query head, or computes much with what it reads once.
SHAPES = {"memory_bound": (16, 16), "compute_bound": (128, 2)}
PAPER = {"memory_bound": "1.5 in the paper", "compute_bound": "1.0 in the paper"}


def measure(setting: Setting) -> Iterator[Figure]:
    """Whether attention is right, its speed, and the ratios that the paper has (FusedKV, figure 4)."""
    with torch.inference_mode():
        yield from attention(setting)
        for shape, (heads, kv_heads) in SHAPES.items():
            yield from models(setting, shape, heads, kv_heads)
            setting.free()


def attention(setting: Setting) -> Iterator[Figure]:
    """One layer, all tokens of a prompt, and one token behind it.

    Right is what is no further from float64 than torch's own attention in the same dtype, given the sums. Speeds are
    those of the kernels, launched by a graph; of a call, what the host does is in it.
    """
    tokens, heads, kv_heads, dim = (64, 4, 2, 16) if setting.small else (8192, 16, 4, 128)
    source = torch.Generator(setting.device).manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=source, device=setting.device).to(torch.bfloat16)

    keys, values = ([noise(1, kv_heads, tokens, dim) for _ in "ab"] for _ in "kv")
    fusion = Fusion(tied(noise(2, kv_heads, dim // 2).float(), HALF), noise(2, kv_heads, dim).float())
    sums = rebuilt(keys, fusion.keys), rebuilt(values, fusion.values)
    wide = [[state.double() for state in states] for states in (keys, values)]
    for name, count, note in (("prefill", tokens, "28 % less in the paper"), ("decode", 1, "twice the bytes")):
        queries = noise(1, heads, count, dim)
        fused = partial(attend, queries, keys, values, fusion, dim**-0.5)
        plain = partial(scaled_dot_product_attention, queries, is_causal=count > 1, enable_gqa=True)
        part = min(count, 64)  # the reference makes all scores
        wanted = reference(queries[:, :, -part:].double(), wide[0], wide[1], fusion, dim**-0.5)
        error = distance(fused()[:, -part:], wanted)
        own = distance(plain(*sums).transpose(1, 2)[:, -part:], wanted)
        yield Figure(f"fused_{name}_near_reference", error <= AS_TORCH * own)
        yield Figure(f"fused_{name}_error", error, "of what float64 gives")
        yield Figure(f"fused_{name}_torch_error", own, "of the same, torch's attention to the sums")
        one_pair = partial(plain, keys[0], values[0])
        kernels = setting.seconds(setting.graphed(one_pair)) / setting.seconds(setting.graphed(fused))
        yield Figure(f"fused_{name}_speed", kernels, f"of torch's attention to one pair ({note})")
        calls = setting.seconds(one_pair) / setting.seconds(fused)
        yield Figure(f"fused_{name}_call_speed", calls, "of the same, calls")


def distance(made: torch.Tensor, wanted: torch.Tensor) -> float:
    """Of two tensors, relative to the second: root of the squares."""
    return float((made.double() - wanted).norm() / wanted.norm())


def models(setting: Setting, shape: str, heads: int, kv_heads: int) -> Iterator[Figure]:
    """Whole models, in turns: seconds of a first token and of a token behind the prompt, beside the standard plan's."""
    built = {arm: build(setting, arm, heads, kv_heads) for arm in ARMS}
    ids = setting.ids(100 if setting.small else 8192, 3, built[STANDARD])
    caches: dict[str, Any] = {}
    first = {arm: plans.prefill(model, ids, caches, arm) for arm, model in built.items()}
    firsts = plans.taken(first, setting.first_tokens, setting.clocked)
    steps = {arm: plans.decode(model, caches, arm) for arm, model in built.items()}
    tokens = plans.taken(steps, setting.repeats, setting.clocked)
    for arm in ARMS:
        one, other = plans.compared("ttft", firsts, arm, 1), plans.compared("tpot", tokens, arm, plans.DECODE)
        yield Figure(f"{shape}_{arm}_first_token", one["ttft"] * 1e3, "ms")
        yield Figure(f"{shape}_{arm}_token", other["tpot"] * 1e3, "ms")
        if arm != STANDARD:
            limit = setting.goal(plans.WORK)
            yield Figure(f"{shape}_{arm}_first_token_ratio", one["ttft_ratio"], "of standard", limit, at_most=True)
            goal = setting.goal(plans.LITE) if arm == "fusedkv-lite" else None
            unit = f"of standard ({PAPER[shape]})" if arm == "fusedkv" else "of standard"
            yield Figure(f"{shape}_{arm}_token_ratio", other["tpot_ratio"], unit, goal, at_most=True)


def build(setting: Setting, arm: str, heads: int, kv_heads: int) -> Any:
    """A seeded random model on the device, in bfloat16, about as large as the paper's 1.5B."""
    sizes: dict[str, Any] = {"num_attention_heads": heads}
    sizes |= {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "vocab_size": 512}
    if not setting.small:
        sizes |= {"num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 6144, "head_dim": 128}
    usual = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with setting.device:
            return plans.build(arm, kv_heads, **sizes)
    finally:
        torch.set_default_dtype(usual)
