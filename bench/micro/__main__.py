"""``python -m kvstore.bench.micro``: every figure beside its limit, one table, JSON for machines."""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvstore.bench.micro import daemon, disk, host, index
from kvstore.bench.micro.limits import Timing

SINGLE: tuple[str, ...] = ("ping_seconds", "match_32k_daemon_seconds", "daemon_own_bytes", "match_32k_seconds")
SINGLE += ("index_bytes_per_block", "reopen_seconds", "import_seconds", "attach_seconds")
ROTATED = "rotated_load"
MEMCPYS, FLOORS = 1.35, 1.5  # what a load with rotation, and a first token, are to stay below
PARTS: tuple[str, ...] = ("host", "rotated", "disk", "daemon", "peers", "index")
PARTS += ("attach", "ttft", "composed", "tpot", "plans", "policies", "pages")


def main(
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
    folder: Annotated[
        Path | None, typer.Option("--dir", help="Where to put the files that are measured; a disk, not a tmpfs.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help=f"Only these parts: {', '.join(PARTS)}.")] = None,
    repeats: Annotated[int, typer.Option(help="Interleaved repeats behind each median.")] = 9,
    blocks: Annotated[int, typer.Option(help="Blocks in the index that is measured.")] = 1_000_000,
) -> None:
    """Measures the store against what the machine can do, both in turns, and prints ratios: 1.0 is the limit itself."""
    parts = only or list(PARTS)
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise typer.BadParameter(f"unknown part {unknown[0]!r}; choose from {', '.join(PARTS)}")
    results: dict[str, Any] = {"environment": environment()}
    with tempfile.TemporaryDirectory(dir=folder or Path.cwd(), prefix=".micro-") as scratch, Progress() as progress:
        task = progress.add_task("measuring", total=len(parts))
        for part in parts:
            progress.update(task, description=f"measuring {part}")
            measure(part, Path(scratch), repeats, blocks, results)
            progress.advance(task)
    show(results)
    if json_path is not None:
        json_path.write_text(json.dumps(results, indent=2) + "\n")


def measure(part: str, scratch: Path, repeats: int, blocks: int, results: dict[str, Any]) -> None:
    """Runs one part and files its figures under the names of the JSON."""
    if part == "host":
        for size in host.LAYOUTS:
            for threads in (1, 2):
                for name, timing in host.measure(size, threads, repeats).items():
                    key = name if threads == 1 else f"{name}_{threads}_threads"
                    moved = host.TOTAL * threads
                    results.setdefault(size, {})[key] = figures(timing, moved)
    elif part == "rotated":
        measure_rotated(repeats, results)
    elif part == "disk":
        for size in host.LAYOUTS:
            for name, timings in disk.measure(size, scratch, repeats).items():
                # The better of one and four plain transfers in flight is the limit.
                flight, timing = min(timings.items(), key=lambda item: item[1].ratio)
                row = figures(timing, disk.TOTAL) | {"limit_in_flight": int(flight)}
                results.setdefault(size, {})[name] = row
    elif part == "daemon":
        for size in host.LAYOUTS:
            for name, timing in daemon.measure(size, scratch, repeats).items():
                results.setdefault(size, {})[name] = figures(timing, host.TOTAL)
            together = figures(daemon.many(size, scratch, repeats), daemon.CLIENTS * daemon.EACH)
            results[size][f"daemon_load_{daemon.CLIENTS}_clients"] = together
        results |= daemon.calls(scratch)
    elif part == "peers":
        from kvstore.bench.micro import peers

        results["peers"] = peers.measure(scratch, repeats)
    elif part == "index":
        results |= index.measure(scratch, blocks)
    elif part == "policies":
        from kvstore.bench.micro import policies

        results["policies"] = policies.measure(blocks)
    elif part == "pages":
        from kvstore.bench.micro import pages

        results["pages"] = pages.measure(repeats)
    else:
        import torch

        from kvstore.bench.micro import attach, composed, plans, ttft

        torch.set_num_threads(os.cpu_count() or 1)
        if part == "attach":
            results |= attach.measure(scratch, min(repeats, 5))
        elif part == "ttft":
            results["ttft"] = ttft.measure(scratch, repeats)
        elif part == "composed":
            results["composed"] = composed.measure(scratch, repeats)
        elif part == "plans":
            results["plans"] = plans.measure(repeats)
        else:
            results["tpot"] = ttft.measure_tpot(scratch, pairs=max(repeats, 5))


def measure_rotated(repeats: int, results: dict[str, Any]) -> None:
    """Loads with rotation, for one and two threads."""
    import torch

    from kvstore.bench.micro import rotated

    torch.set_num_threads(1)  # the threads that load are the benchmark's
    for size in host.LAYOUTS:
        for threads in (1, 2):
            key = "rotated_load" if threads == 1 else f"rotated_load_{threads}_threads"
            results.setdefault(size, {})[key] = rotated.measure(size, threads, repeats)


def figures(timing: Timing, moved: int) -> dict[str, float]:
    """What the JSON says of one comparison that moved so many bytes."""
    gigabytes = moved / 1e9
    return {
        "ratio": timing.ratio,
        "spread": timing.spread,
        "gb_per_second": gigabytes / timing.seconds,
        "limit_gb_per_second": gigabytes / timing.limit,
        "cpu_seconds_per_gb": timing.cpu / gigabytes,
        "limit_cpu_seconds_per_gb": timing.limit_cpu / gigabytes,
    }


def environment() -> dict[str, Any]:
    """The machine and the versions, for whoever reads the figures later."""
    model = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    packages = {name: version(name) for name in ("kvstore-llm", "lmdb", "msgpack", "xxhash")}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": model,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": packages,
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def show(results: dict[str, Any]) -> None:
    """Prints the tables."""
    console = Console()
    for shown in (moves(results), rotations(results), others(results), single(results), first_tokens(results)):
        if shown.row_count:
            console.print(shown)
    if "plans" in results:
        from kvstore.bench.micro import plans

        console.print(plans.table(results["plans"]))
    if "composed" in results:
        from kvstore.bench.micro import composed

        console.print(composed.table(results["composed"]))
    if "policies" in results:
        from kvstore.bench.micro import policies

        console.print(policies.table(results["policies"]))
    if "pages" in results:
        from kvstore.bench.micro import pages

        console.print(pages.table(results["pages"]))
    if "tpot" in results:
        row = results["tpot"]
        console.print(
            f"recording and saving cost {row['overhead']:+.1%} of TPOT "
            f"(quarters {row['low']:+.1%} to {row['high']:+.1%}; {row['pairs']} pairs, TPOT {row['tpot'] * 1e3:.0f} ms)"
        )


def moves(results: dict[str, Any]) -> Table:
    """Host and disk tier beside plain copies."""
    shown = Table("block", "what", "ratio to limit", "± spread", "GB/s", "CPU s/GB", "limit's CPU s/GB", title="Moves")
    for size in host.LAYOUTS:
        for name, row in results.get(size, {}).items():
            if not name.startswith(ROTATED):
                shown.add_row(f"{size} MiB", name.replace("_", " "), *_cells(row))
    return shown


def rotations(results: dict[str, Any]) -> Table:
    """Loads into a model's cache, keys turned on the way. Here fewer is better: 1.0 takes as long as memcpy."""
    shown = Table("block", "threads", "memcpys", "± spread", "GB/s", "CPU s/GB", "bits", "B/block")
    shown.title = f"Loads with rotation into a model's cache: at most {MEMCPYS} memcpys"
    for size in host.LAYOUTS:
        for name, row in results.get(size, {}).items():
            if name.startswith(ROTATED):
                equal = "equal" if row["bit_equal"] else "differ"
                allocated = f"{row['allocated_bytes_per_block']:,.0f}"
                shown.add_row(f"{size} MiB", str(row["threads"]), *_cells(row)[:4], equal, allocated)
                if not row["compiled"]:
                    shown.caption = "not compiled: numba is missing, plain torch was measured"
    return shown


def _cells(row: dict[str, Any]) -> list[str]:
    three = [f"{row[key]:.3f}" for key in ("ratio", "spread", "cpu_seconds_per_gb", "limit_cpu_seconds_per_gb")]
    return [*three[:2], f"{row['gb_per_second']:.2f}", *three[2:]]


def others(results: dict[str, Any]) -> Table:
    """What else keeps tensors on disk."""
    shown = Table("on disk, 32 MiB", "save + sync GB/s", "cold load GB/s", title="Others on the same bytes")
    for name, row in results.get("peers", {}).items():
        shown.add_row(name, *(f"{row[key]:.2f}" for key in ("save_gb_per_second", "load_gb_per_second")))
    return shown


def single(results: dict[str, Any]) -> Table:
    """Figures that have no limit beside them."""
    shown = Table("what", "value", title="Index and import")
    for name in SINGLE:
        if name in results:
            shown.add_row(name.replace("_", " "), f"{results[name]:.6g}")
    return shown


def first_tokens(results: dict[str, Any]) -> Table:
    """Time to the first token, and how many times the floor it is."""
    shown = Table("prompt", "recompute s", "host s", "floor s", "ratio", "cold disk s", "limit s", "ratio")
    shown.title = f"Time to the first token (at most {FLOORS} times the floor, or the disk's limit)"
    for length, row in results.get("ttft", {}).items():
        cells = [f"{row[key]:.4f}" for key in ("recompute", "host", "floor")] + [f"{row['host_ratio']:.2f}"]
        cells += [f"{row[key]:.4f}" for key in ("disk_cold", "disk_limit")] + [f"{row['disk_ratio']:.2f}"]
        shown.add_row(length, *cells)
    return shown


if __name__ == "__main__":
    typer.run(main)
