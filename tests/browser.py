"""A real browser without a window: what a page shows, what it complains of, and whom it asks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
INSTALL_SECONDS, RUN_SECONDS = 300, 60
QUIET = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--mute-audio"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # nothing leaves this machine
]


class Seen(NamedTuple):
    """``dom`` as it was at the end; ``console``: lines that the page wrote there, errors of the browser's included;
    ``asked``: addresses that pages asked for."""

    dom: str
    console: list[str]
    asked: set[str]


@cache
def _installed() -> str | None:
    """Where the browser is; installed where that is allowed and it is missing."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None and os.geteuid() == 0 and shutil.which("apt-get") is not None:
        command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"]
        try:
            subprocess.run(command, capture_output=True, timeout=INSTALL_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        found = shutil.which("chromium")
    return found


def browser() -> str:
    """Where the browser is, or the test is skipped."""
    found = _installed()
    if found is None:
        pytest.skip("there is no Chromium here, and it could not be installed")
    return found


def visit(url: str, folder: Path, milliseconds: int = 3000, *options: str) -> Seen:
    """What a page shows after so long, by its own clock."""
    log = folder / "net.json"
    command = [
        *(browser(), *QUIET, f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}"),
        *("--enable-logging=stderr", f"--virtual-time-budget={milliseconds}", *options, "--dump-dom", url),
    ]
    home = {**os.environ, "HOME": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_SECONDS, check=True, env=home)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Seen(done.stdout, console, _asked(log))


def _asked(log: Path) -> set[str]:
    """Addresses in the browser's own log of its network: those that a page asked for, not the browser for itself."""
    text = log.read_text()
    if not text.rstrip().endswith("}"):  # it was cut off at the end
        text = text.rstrip().rstrip(",") + "]}"
    asked = set()
    for event in json.loads(text)["events"]:
        of = event.get("params", {})
        if "url" in of and of.get("initiator", "not an origin") != "not an origin":
            asked.add(of["url"])
    return asked


class Page(HTMLParser):
    """What a person would read: the text in each element that has an id, and attributes of those that carry numbers."""

    def __init__(self, dom: str) -> None:
        super().__init__()
        self.texts: dict[str, str] = {}
        self.numbers: list[dict[str, str]] = []  # attributes of the elements with data-…
        self.rows: dict[str, list[list[str]]] = {}  # by the id around a table, its rows of cells
        self.tags: list[str] = []
        self._around: list[str] = []  # ids, "" for none, of the elements that are open
        self.feed(dom)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """See ``HTMLParser``."""
        values = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        if any(name.startswith("data-") for name in values):
            self.numbers.append(values)
        if tag not in ("meta", "link", "br"):
            self._around.append(values.get("id", ""))
        place = next((name for name in reversed(self._around) if name), "")
        if tag == "tr":
            self.rows.setdefault(place, []).append([])
        elif tag in ("td", "th"):
            self.rows[place][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        """See ``HTMLParser``."""
        self._around.pop()

    def handle_data(self, data: str) -> None:
        """See ``HTMLParser``."""
        for name in filter(None, self._around):
            self.texts[name] = self.texts.get(name, "") + data
            if self.rows.get(name) and self.rows[name][-1]:
                self.rows[name][-1][-1] += data
