"""``python -m kvstore.bench.simulate.timed``: times to first tokens, and what they cost, with a cache in two tiers.

``timed_run`` says how requests are served, ``timed_tiers`` how blocks move. The defaults are CachedAttention's set-up
for LLaMA-2 13B: two A100s that hold one copy of the model, and sessions as ShareGPT's. Its speeds are worked out from
the paper's totals. 42,000 turns took 6.25 GPU hours, and 4.0 times as many without a cache: 1.07 s a turn. Prefill was
6.8 times as fast, so P / 6.8 + D = (P + D) / 4, and prefill is 0.94 s of that, decoding 0.13 s. (By the paper's other
figure, 360 ms for 2,000 tokens of a 65B on four A100s, prefill would do 14,000 tokens a second.) Lengths and times to
think are not in the paper and are assumed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvstore.bench.command import run_command
from kvstore.bench.simulate.readers import read
from kvstore.bench.simulate.timed_run import FIRST, Chats, Run, Served, Turn, drawn, recorded
from kvstore.bench.simulate.timed_tiers import Machine, Strategy
from kvstore.errors import BadInput
from kvstore.policies.named import POLICIES
from kvstore.policies.pace import Pace
from kvstore.policy import Clock, EvictionPolicy

GB = 1e9
PREFILL = 1650.0  # tokens a second: 1,550 of a mean prompt in 0.94 s
QUADRATIC = 2 * 40 * 5120 / (2 * 13e9)  # 2 * layers * width operations for two tokens, against 2 * parameters for one
STEP = 0.012  # seconds: 265 tokens of a mean answer, 24 at a time, in 0.13 s
WRITE_BUFFER = 0.1  # as a share of the memory, beside it
GPU_HOUR, MEMORY_HOUR, DISK_HOUR = 5.0, 0.0088, 0.000082  # dollars for a GPU, and for a GB
RECOMPUTE, LOOK_AHEAD, PREFETCH = "recompute", "look-ahead", "prefetch"
AWARE = f"lru+{LOOK_AHEAD}+{PREFETCH}"
_PLAIN = (RECOMPUTE, "fifo", "lru", "pace")
STRATEGIES = (*_PLAIN, "fifo+prefetch", "lru+prefetch", "lru+look-ahead", AWARE, f"pace+{LOOK_AHEAD}+{PREFETCH}")
# CachedAttention, 13B, 128 GB of memory and 10 TB of disk: hit rate, and share of the hits that were in memory.
PAPER, PAPER_TIERS = {AWARE: (0.86, 0.996), "lru": (0.58, 0.005), "fifo": (0.48, 0.005)}, (128.0, 10000.0)

HELP = """
Serve sessions, or the requests of a trace at its times, with workers, host memory and a disk; policies that know the
queue beside those that do not.

A strategy is *recompute*, or a policy with *+look-ahead* (what waits in the queue is evicted last) and *+prefetch* (it
is read from disk in advance).
"""


def strategy_of(name: str) -> Strategy:
    """By its name: a policy, and what it does with the queue. Raises ``BadInput``."""
    policy, *uses = name.split("+")
    if (policy not in POLICIES and name != RECOMPUTE) or not {LOOK_AHEAD, PREFETCH}.issuperset(uses):
        raise BadInput(f"there is no strategy {name}; write recompute, or POLICY[+look-ahead][+prefetch] like {AWARE}")
    return Strategy(lambda clock: _pair(policy, clock), LOOK_AHEAD in uses, PREFETCH in uses)


def _pair(policy: str, clock: Clock) -> tuple[EvictionPolicy, EvictionPolicy]:
    """Of memory and of disk, as the store has them."""
    if policy == RECOMPUTE:
        policy = "lru"  # of nothing
    if POLICIES[policy] is Pace:
        return Pace.pair(clock)
    return POLICIES[policy](clock), POLICIES[policy](clock)


def serve(
    turns: Sequence[Turn],
    machine: Machine,
    name: str,
    warm_up: float = 0.0,
    ended: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Figures of one run. ``warm_up``: share of the requests, the first to come, that count for costs only; so do those
    that come when no session begins any more, for only long ones are left then. ``ended`` is called after each."""
    if name == RECOMPUTE:
        machine = replace(machine, memory=0, disk=0)
    run = Run(turns, machine, strategy_of(name), ended)
    run.finish()
    warm = sorted(run.served, key=lambda one: one.came)[int(warm_up * len(turns)) :]
    last = max(turn.time for turn in turns if turn.before == FIRST)
    counted = [one for one in warm if one.came <= last] or warm
    hours = run.now / 3600
    cost = {
        "gpu": run.busy * machine.gpus / 3600 * GPU_HOUR,
        "memory": machine.memory / GB * hours * MEMORY_HOUR,
        "disk": machine.disk / GB * hours * DISK_HOUR,
    }
    total = sum(cost.values())
    return {
        "strategy": name,
        "workers": machine.workers,
        "memory_gb": machine.memory / GB,
        "disk_gb": machine.disk / GB,
        "ttft": _times(counted),
        **_shares(counted),
        "to_the_end": _shares(warm),
        "span_s": round(run.now, 1),
        "gpu_s": round(run.busy * machine.gpus, 1),
        "written_gb": round(run.tiers.written / GB, 1),
        "read_gb": round(run.tiers.read / GB, 1),
        "cost": {part: round(dollars, 4) for part, dollars in cost.items()},
        "storage_share": round(1 - cost["gpu"] / total, 5) if total else 0.0,
    }


def _shares(served: Sequence[Served]) -> dict[str, float]:
    """Tokens found of those of prompts; of what was found, that in memory when its request started; and seconds from
    then to the first token."""
    found = max(sum(one.found for one in served), 1)
    return {
        "hit": round(sum(one.hit for one in served) / sum(one.prompt for one in served), 5),
        "in_memory": round(sum(one.in_memory for one in served) / found, 5),
        "in_service_s": round(sum(one.first - one.started for one in served) / len(served), 4),
    }


def _times(served: Sequence[Served]) -> dict[str, float]:
    """Seconds to the first token, from when a request came."""
    waited = sorted(one.first - one.came for one in served)
    ttft = {f"p{part}": round(waited[min(len(waited) * part // 100, len(waited) - 1)], 4) for part in (50, 90, 99)}
    return {"mean": round(sum(waited) / len(waited), 4), **ttft}


def most(turns: Sequence[Turn]) -> float:
    """Share of the prompts' tokens that an earlier turn had already: nobody finds more."""
    seen, found = set[int](), 0
    for turn in turns:
        whole = sum(tokens for block, tokens in zip(turn.blocks, turn.tokens, strict=True) if block in seen)
        found += min(whole, turn.prompt - 1)
        seen.update(turn.blocks)
    return found / sum(turn.prompt for turn in turns)


def main(
    trace: Annotated[Path | None, typer.Option(help="Serve this trace instead of sessions that are drawn.")] = None,
    strategy: Annotated[list[str] | None, typer.Option(help=f"Any of these: {', '.join(STRATEGIES)}, …")] = None,
    workers: Annotated[
        list[int] | None, typer.Option(min=1, max=4, help="Workers with one queue (default: 1).")
    ] = None,
    memory: Annotated[float, typer.Option(min=0, help="Host memory, GB.")] = PAPER_TIERS[0],
    disk: Annotated[list[float] | None, typer.Option(min=0, help="Disk, GB (default: 10000 and 2000).")] = None,
    sessions: Annotated[int, typer.Option(min=1, help="How many are drawn.")] = 9000,
    rate: Annotated[float, typer.Option(min=1e-6, help="Sessions that begin in a second.")] = 1.0,
    think: Annotated[float, typer.Option(min=1e-6, help="Seconds from an answer to the next turn, on average.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    warm_up: Annotated[float, typer.Option(min=0, max=0.99, help="Share of the requests that only warm up.")] = 10 / 52,
    slots: Annotated[int, typer.Option(min=1, help="Requests that a worker has at a time.")] = 24,
    gpus: Annotated[int, typer.Option(min=1, help="Of one worker.")] = 2,
    token_mb: Annotated[float, typer.Option(min=1e-6, help="What a token takes, MB.")] = 0.78,
    prefill: Annotated[float, typer.Option(min=1, help="Tokens a second, without attention.")] = PREFILL,
    quadratic: Annotated[
        float, typer.Option(min=0, help="What attention adds for each token of a prompt's length, as a share of that.")
    ] = QUADRATIC,
    step: Annotated[float, typer.Option(min=0, help="Seconds to decode a token of every request at hand.")] = STEP,
    link: Annotated[float, typer.Option(min=1e-3, help="Memory to device, GB/s.")] = 26.0,
    disk_read: Annotated[float, typer.Option(min=1e-3, help="GB/s.")] = 5.0,
    disk_write: Annotated[float, typer.Option(min=1e-3, help="GB/s.")] = 5.0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot", help="Draw them in this PNG file.")] = None,
) -> None:
    names = strategy or list(STRATEGIES)
    for name in names:
        strategy_of(name)
    chats = Chats(sessions, rate, think)
    turns = drawn(chats, seed) if trace is None else recorded(read(trace, seed=seed))
    speeds = (link * GB, disk_read * GB, disk_write * GB, round(token_mb * 1e6), 1 / prefill, quadratic / prefill, step)
    machine = Machine(1, slots, gpus, int(memory * GB), 0, int(WRITE_BUFFER * memory * GB), *speeds)
    disks = disk or [10000.0, 2000.0]
    settings = [one for one in product(disks, workers or [1], names) if one[2] != RECOMPUTE or one[0] == disks[0]]
    rows: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("serving", total=len(settings) * len(turns))
        for size, several, name in settings:
            one = replace(machine, workers=several, disk=int(size * GB))
            rows.append(serve(turns, one, name, warm_up, lambda: bar.advance(task)))
    told = {
        "requests": len(turns),
        "trace": None if trace is None else trace.name,
        "chats": None if trace is not None else {**asdict(chats), "seed": seed},
        "machine": {**asdict(machine), "workers": None, "disk": None},
        "warm_up": round(warm_up, 4),
        "most": round(most(turns), 5),
        "results": rows,
    }
    show(told)
    if json_path is not None:
        json_path.write_text(json.dumps(told, indent=1) + "\n")
    if plot_path is not None:
        plot(told, plot_path)


def show(told: dict[str, Any]) -> None:
    """What requests saw, and what that took: a line for each run in both."""
    heads = ("strategy", "disk", "workers")
    times = Table(*heads, "TTFT mean", "p50", "p90", "p99", "in service", "found", "in memory", "paper", "to the end")
    times.caption = f"{told['requests']:,} requests; at most {told['most']:.1%} of their prompts can be found"
    costs = Table(*heads, "GPU hours", "span", "written", "read", "GPU", "storage", "total", "storage's share")
    for table in (times, costs):
        for column in table.columns[1:]:
            column.justify = "right"
    for row in told["results"]:
        waits = [f"{row['ttft'][part]:.2f} s" for part in ("mean", "p50", "p90", "p99")]
        said = PAPER.get(row["strategy"]) if (row["memory_gb"], row["disk_gb"]) == PAPER_TIERS else None
        paper = f"{said[0]:.0%} / {said[1]:.1%}" if said and told["chats"] else ""
        counted, whole = (
            [f"{one['in_service_s'] * 1e3:.0f} ms", f"{one['hit']:.1%}", f"{one['in_memory']:.1%}"]
            for one in (row, row["to_the_end"])
        )
        times.add_row(*_named(row), *waits, *counted, paper, " / ".join(whole))
        hours = [f"{row['gpu_s'] / 3600:.2f}", f"{row['span_s'] / 3600:.2f} h"]
        moved = [f"{row[way] / 1e3:.2f} TB" for way in ("written_gb", "read_gb")]
        gpu, storage = row["cost"]["gpu"], row["cost"]["memory"] + row["cost"]["disk"]
        dollars = [f"${part:.2f}" for part in (gpu, storage, gpu + storage)]
        costs.add_row(*_named(row), *hours, *moved, *dollars, f"{row['storage_share']:.1%}")
    for table in (times, costs):
        Console().print(table)


def _named(row: dict[str, Any]) -> list[str]:
    """The strategy, the disk and the number of workers of a run."""
    return [row["strategy"], f"{row['disk_gb'] / 1e3:g} TB" if row["disk_gb"] else "", str(row["workers"])]


def plot(told: dict[str, Any], path: Path) -> None:
    """What was found and where, and how long first tokens took, for each run."""
    rows = told["results"]
    with matplotlib.rc_context({"font.size": 8}):
        figure = Figure(figsize=(11, 1.6 + 0.24 * len(rows)), layout="constrained")
        FigureCanvasAgg(figure)
        found, times = figure.subplots(1, 2, sharey=True)
        _draw_found(found, rows, PAPER if told["chats"] else {})
        places = range(len(rows))
        times.barh(places, [row["ttft"]["mean"] for row in rows], color="#d9dde3", label="mean, with the queue")
        times.barh(places, [row["in_service_s"] for row in rows], height=0.4, color="#d0743a", label="mean, in service")
        times.set_xscale("log")
        times.set_xlabel("seconds to the first token")
        found.set_yticks(places, ["  ".join(_named(row)) for row in rows])
        found.invert_yaxis()
        for axes in (found, times):
            axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=110)


def _draw_found(axes: Axes, rows: Sequence[dict[str, Any]], said: dict[str, tuple[float, float]]) -> None:
    places = range(len(rows))
    memory = [row["hit"] * row["in_memory"] for row in rows]
    disk = [row["hit"] - share for row, share in zip(rows, memory, strict=True)]
    axes.barh(places, memory, color="#13877b", label="in memory at the start")
    axes.barh(places, disk, left=memory, color="#9fb3e0", label="on disk")
    marks = [
        (said[row["strategy"]][0], place)
        for place, row in enumerate(rows)
        if row["strategy"] in said and (row["memory_gb"], row["disk_gb"]) == PAPER_TIERS
    ]
    axes.plot([x for x, _ in marks], [y for _, y in marks], "k|", markersize=11, label="paper")
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the prompts' tokens that was found")


if __name__ == "__main__":
    run_command(main, HELP, "timed")
