"""Documents that were each read once, in an order that nobody has seen."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from kvstore.bench.engines.engine import Engine, embedded

DOCUMENTS, TOKENS, QUESTION = 10, 500, 40


def documents(folder: Path, model: Path) -> dict[str, Any]:
    """Tokens that are matched and seconds to the first token: recomputed, by exact prefix, and as segments."""
    draw = random.Random(5)
    texts = [draw.choices(range(10, 32_000), k=TOKENS) for _ in range(DOCUMENTS)]
    question = draw.choices(range(10, 32_000), k=QUESTION)
    order = draw.sample(range(DOCUMENTS), DOCUMENTS)
    prompt = [token for number in order for token in texts[number]] + question
    segments = [[number * TOKENS, (number + 1) * TOKENS] for number in range(DOCUMENTS)]
    found: dict[str, Any] = {"documents": DOCUMENTS, "tokens": len(prompt)}
    with Engine(model, embedded(folder / "documents", "2GiB")) as engine:
        for text in texts:
            engine.ask(text)
        engine.settle()
        wish = {"kv_transfer_params": {"kvstore": {"segments": segments, "mode": "modular"}}}
        found["modular"] = engine.ask(prompt, extra=wish, salt="#documents")
        found["exact"] = engine.ask(prompt)
    with Engine(model, None, prefix_caching=False) as engine:
        engine.ask(texts[0])
        found["no cache"] = engine.ask(prompt)
    return found
