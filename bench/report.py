"""What a person looks at after a replay: one table in the terminal, one HTML page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich.table import Table

from kvstore.adapters.transformers.timeline import FETCH, LOAD
from kvstore.bench import plots
from kvstore.bench.replay import Row
from kvstore.figures import seconds, size

FOLDER, TEMPLATE = Path(__file__).parent, "report.html.j2"
PLOTS = (
    (plots.ttft_by_length, "Time to first token by prompt length", "dots are turns, lines are running medians"),
    (plots.tokens_over_turns, "Tokens computed and reused", "what the model had to read, and what the tiers gave back"),
    (plots.ttft_distribution, "Time to first token, all turns", "the share of turns that had to wait no longer"),
    (plots.waiting_by_conversation, "Waiting, by conversation", "what its user waited for first tokens, turn by turn"),
)
TIMELINE = "One load, layer by layer"


def html(result: dict[str, Any], rows: Sequence[Row]) -> str:
    """The whole page, with nothing in it that has to be fetched."""
    environment = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined)
    environment.filters.update(seconds=seconds, size=size)
    ttft = result["ttft_seconds"]
    return environment.get_template(TEMPLATE).render(
        result=result,
        plots=drawings(result, rows),
        share=share(result),
        speedup=speedup(ttft, "p50"),
        order="in rounds over all conversations" if result["settings"]["interleave"] else "one after the other",
        latencies=latencies(result),
        facts=facts(result),
    )


def drawings(result: dict[str, Any], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every plot with its title and its note. The timeline of a load is there when something was loaded."""
    conversations = min(plots.MOST_CONVERSATIONS, result["conversations"])
    made = []
    for draw, title, note in PLOTS:
        height = max(3.1, 0.6 + 0.3 * conversations) if draw is plots.waiting_by_conversation else 3.1
        made.append({"title": title, "note": note, "svg": Markup(plots.drawn(draw, rows, height)), "wide": False})
    timeline = result["timeline"]
    if timeline is not None:
        svg = plots.drawn(plots.load_timeline, timeline, plots.timeline_height(timeline), plots.WIDE)
        made.append({"title": TIMELINE, "note": caption(timeline), "svg": Markup(svg), "wide": True})
    return made


def caption(timeline: dict[str, Any]) -> str:
    """What the timeline of a load shows, in words."""
    kinds = {span["kind"] for span in timeline["spans"]}
    work = " and ".join(name for kind, name in ((FETCH, "fetching"), (LOAD, "loading")) if kind in kinds)
    loading, computing = (seconds(timeline[key] / 1e3) for key in ("loading_ms", "compute_ms"))
    turn = f"{timeline['conversation']}, turn {timeline['turn']}: {timeline['cached_tokens']:,} tokens reused"
    hidden = f"{timeline['overlap']:.0%} of it hidden under earlier layers"
    return f"{turn} · {work} took {loading} beside {computing} of compute, {hidden}"


def share(result: dict[str, Any]) -> float:
    """The part of all prompt tokens that was reused."""
    return float(result["cached_tokens"] / max(1, result["prompt_tokens"]))


def speedup(measured: dict[str, Any], percentile: str) -> float:
    """How many times faster reuse was."""
    return float(measured["recompute"][percentile] / max(measured["reuse"][percentile], 1e-9))


def latencies(result: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """Every latency that was measured, by the name that people read."""
    named = (("first token", "ttft_seconds"), ("next tokens", "tpot_seconds"))
    listed = [(f"{title}, {arm}", result[key][arm]) for title, key in named for arm in ("recompute", "reuse")]
    return [*listed, ("save call", result["save_seconds"])]


def facts(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Environment, settings and counters, flat."""
    environment = dict(result["environment"])
    versions = environment.pop("versions")
    plan = {"layer_plan": f"{result['layer_plan']['name']}, {stored(result['layer_plan'])}"}
    groups = (result["settings"], plan, environment, versions, result["counters"])
    return [(name.replace("_", " "), str(value)) for group in groups for name, value in group.items()]


def stored(plan: dict[str, Any]) -> str:
    """What of a model's layers blocks hold."""
    return f"{plan['stored_layers']} of {plan['layers']} layers"


def table(result: dict[str, Any]) -> Table:
    """The one table of a replay, for the terminal."""
    ttft, tpot = result["ttft_seconds"], result["tpot_seconds"]
    shown = Table(title=f"{result['turns']} turns of {result['conversations']} conversations through {result['model']}")
    for column, justify in (("", "left"), ("recompute", "right"), ("reuse", "right"), ("", "right")):
        shown.add_column(column, justify="right" if justify == "right" else "left")
    for title, measured, key in (
        ("time to first token, p50", ttft, "p50"),
        ("time to first token, p99", ttft, "p99"),
        ("time to first token, total", ttft, "total"),
        ("time per output token, p50", tpot, "p50"),
        ("time per output token, p99", tpot, "p99"),
    ):
        one, other = seconds(measured["recompute"][key]), seconds(measured["reuse"][key])
        if measured["recompute"][key]:  # one token a turn has no time per token
            shown.add_row(title, one, other, f"{speedup(measured, key):.2f}×")
    plan = result["layer_plan"]
    part = plan["token_bytes"] / plan["token_bytes_of_all_layers"]
    shown.add_row(f"bytes a token, {plan['name']}", "", f"{plan['token_bytes']:,}", f"{part:.1%}, {stored(plan)}")
    computed = result["prompt_tokens"] - result["cached_tokens"]
    shown.add_row("prompt tokens computed", f"{result['prompt_tokens']:,}", f"{computed:,}", "", end_section=True)
    for tier, tokens in result["tokens_by_tier"].items():
        if tier not in result["bytes_held_by_tier"]:
            continue  # a tier that this replay did not have
        part = f"{100 * tokens / max(1, result['prompt_tokens']):.1f}%"
        shown.add_row(f"tokens reused from {tier}", "", f"{tokens:,}", part)
    for tier, held in result["bytes_held_by_tier"].items():
        given = size(result["bytes_by_tier"].get(tier, 0))
        shown.add_row(f"bytes reused from {tier}", "", given, f"holds {size(held)}")
    different, ties = result["tokens_different"], result["ties"]
    verdict = "[green]equal[/]" if result["tokens_equal"] else f"[red]{different} differ[/]"
    shown.add_section()
    shown.add_row("output tokens", f"{result['tokens_compared']:,}", verdict, f"{ties} ties")
    noise = f"noise {result['logit_noise']:.1e}"
    shown.add_row("largest logit difference", "", f"{result['max_logit_difference']:.1e}", noise)
    if result["discovery"] is not None:
        add_discovery(shown, result["discovery"], result["prompt_tokens"])
    return shown


def add_discovery(shown: Table, found: dict[str, Any], prompt_tokens: int) -> None:
    """What was reused out of its context: how much, and what it did to the outputs."""
    shown.add_section()
    for name, key in (("any prefix cache would have", "prefix_tokens"), ("found beyond that", "more_tokens")):
        shown.add_row(f"tokens {name}", "", f"{found[key]:,}", f"{100 * found[key] / max(1, prompt_tokens):.1f}%")
    different = found["tokens_different"]
    shown.add_row(
        f"{found['turns']} turns out of context: tokens",
        f"{found['tokens_compared']:,}",
        f"[yellow]{different:,} differ[/]" if different else "equal",
        f"{found['divergence']:.2g} nats a token",
    )
