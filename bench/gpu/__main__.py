"""``python -m kvstore.bench.gpu``: is it right on this GPU, and how near to what the machine can do?"""

from __future__ import annotations

import json
import platform
import re
import time
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from kvstore.bench.gpu.setting import Figure, Setting

PARTS = {
    "exactness": "kernel bits beside plain torch",
    "waits": "events, with and without",
    "bandwidth": "blocks to an engine's cache",
    "first_token": "time to the first token",
    "decode": "decoding beside saves",
    "plans": "models that store half of their layers",
}
PACKAGES = ("torch", "triton", "numpy", "transformers", "numba", "msgpack", "xxhash", "lmdb")
RESULTS = Path(__file__).resolve().parent.parent / "results"


def main(
    device: Annotated[str, typer.Option(help="Where to measure; auto is cuda where there is one.")] = "auto",
    small: Annotated[bool, typer.Option(help="The same code at sizes for a test; figures mean nothing then.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    only: Annotated[list[str] | None, typer.Option(help=f"Only these parts: {', '.join(PARTS)}.")] = None,
) -> None:
    """Checks correctness and measures on a CUDA machine; writes bench/results/gpu-NAME.json.

    Exits with 1 when something is not correct or a part failed; a goal of speed that is missed is only shown.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() or not small else "cpu"
    unknown = sorted(set(only or ()) - set(PARTS))
    if unknown:
        raise typer.BadParameter(f"unknown part {unknown[0]!r}; choose from {', '.join(PARTS)}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no CUDA device here; --device cpu --small runs the same code without one")
    setting = Setting(torch.device(device), small)
    if not setting.cuda and not small:
        raise typer.BadParameter("full sizes are for a GPU; add --small")
    console = Console()
    figures, failed = measured(setting, only or list(PARTS), console)
    console.print(table(setting, figures))
    for note in setting.notes:
        console.print(note)
    path = json_path or (RESULTS / f"gpu-{name(setting)}.json" if setting.cuda and not only and not small else None)
    if path is not None:
        path.write_text(json.dumps(result(setting, figures, failed), indent=2) + "\n", "utf-8")
        console.print(f"figures: {path}")
    if failed or any(figure.value is False for part in figures.values() for figure in part):
        raise typer.Exit(1)


def measured(setting: Setting, parts: list[str], console: Console) -> tuple[dict[str, list[Figure]], list[str]]:
    """The figures of each part, and the parts that failed. A part that fails, or lacks a library, stops no other."""
    figures: dict[str, list[Figure]] = {}
    failed = []
    for part in parts:
        begin, found = time.perf_counter(), figures.setdefault(part, [])
        try:
            for figure in import_module(f"kvstore.bench.gpu.{part}").measure(setting):
                found.append(figure)
        except ImportError as error:
            setting.notes.append(f"{part}: skipped, {error}")
        except Exception as error:  # top loop: compilers have errors of their own, and figures of other parts must stay
            reason = (str(error).strip().splitlines() or [""])[0]
            setting.notes.append(f"{part}: failed, {type(error).__name__}: {reason}")
            failed.append(part)
        setting.free()
        console.print(f"{part}: {time.perf_counter() - begin:.1f} s")
    return figures, failed


def table(setting: Setting, figures: dict[str, list[Figure]]) -> Table:
    """All figures beside their goals."""
    shown = Table(title=f"{setting.description()}{', small sizes: times mean nothing' if setting.small else ''}")
    for column, justify in (("figure", "left"), ("", "right"), ("", "left"), ("goal", "right")):
        shown.add_column(column, justify=justify)  # type: ignore[arg-type]
    for part, rows in figures.items():
        shown.add_row(f"[bold]{PARTS[part]}[/]")
        for place, figure in enumerate(rows, 1):
            shown.add_row(f"  {figure.name.replace('_', ' ')}", *_cells(figure), end_section=place == len(rows))
    return shown


def _cells(figure: Figure) -> tuple[str, str, str]:
    colour = {True: "green", False: "red", None: "default"}[figure.met]
    if isinstance(figure.value, bool):
        return f"[{colour}]{'yes' if figure.value else 'no'}[/]", "", ""
    goal = "" if figure.goal is None else f"{'≤' if figure.at_most else '≥'} {figure.goal:g}"
    return f"[{colour}]{figure.value:.4g}[/]", figure.unit, goal


def result(setting: Setting, figures: dict[str, list[Figure]], failed: list[str]) -> dict[str, Any]:
    """What the JSON holds: the machine, and each part's figures with their goals."""
    parts = {
        part: {
            figure.name: {"value": figure.value, "unit": figure.unit, "goal": figure.goal, "met": figure.met}
            for figure in rows
        }
        for part, rows in figures.items()
    }
    return {"environment": environment(setting), "parts": parts, "failed": failed, "notes": setting.notes}


def environment(setting: Setting) -> dict[str, Any]:
    """Device, date and versions."""
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "device": setting.description(),
        "small": setting.small,
        "system": platform.platform(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "versions": {package: version_of(package) for package in PACKAGES},
    }
    if setting.cuda:
        found["memory_bytes"] = torch.cuda.get_device_properties(setting.device).total_memory
    return found


def version_of(package: str) -> str | None:
    """Its version, or None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def name(setting: Setting) -> str:
    """The device as a part of a file name."""
    words = re.sub(r"[^a-z0-9]+", "-", setting.description().lower()).strip("-")
    return words.removeprefix("nvidia-")


if __name__ == "__main__":
    typer.run(main)
