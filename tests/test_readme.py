"""What README shows runs, and says what it says it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_snippet_runs_twice_and_prints_what_its_comments_say(tmp_path: Path) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    for _ in range(2):  # the second time its prompts come from disk
        ran = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True, check=True)
        hit, durable, composed = ran.stdout.strip().splitlines()
        assert durable.startswith("Durable(tokens=651,")
        assert composed == "900 False"
        assert hit.startswith("615 the prompts part at token 615") or "cached" in hit
    assert (tmp_path / "cache-dir" / "CACHEDIR.TAG").is_file()


def test_every_file_that_the_documents_link_to_is_there() -> None:
    for page in README.parent.glob("*.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text("utf-8")):
            assert (README.parent / target).exists(), f"{page.name} links to {target}"
