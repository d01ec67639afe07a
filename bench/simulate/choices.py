"""What is simulated, as a person writes it: names of policies and capacities, separated by commas."""

from __future__ import annotations

from difflib import get_close_matches

from kvstore.bench.simulate.sweep import MINIMUM
from kvstore.errors import BadInput
from kvstore.policies.named import POLICIES

ALL = "all"


def policies(text: str) -> list[str]:
    """Names of policies, each once, in order; ``all`` stands for all. Raises ``BadInput``."""
    known = [*POLICIES, MINIMUM]
    found: list[str] = []
    for name in _words(text, "--policy", "default,lru"):
        if name not in (*known, ALL):
            near = get_close_matches(name, known, 1)
            meant = f"did you mean {near[0]}? There are" if near else "there are"
            raise BadInput(f"there is no policy {name}; {meant} {', '.join(known)} and {ALL}")
        found += known if name == ALL else [name]
    return sorted(set(found))


def capacities(text: str) -> list[float]:
    """Shares of a trace's different blocks, each once, the smallest first. Raises ``BadInput``."""
    found: list[float] = []
    for word in _words(text, "--capacity", "0.01,0.1"):
        try:
            share = float(word)
        except ValueError as error:
            raise BadInput(f"{word} is no capacity; give shares of all different blocks, as in 0.01,0.1") from error
        if not 0 < share <= 1:
            raise BadInput(f"capacity {word} must be more than 0 and at most 1, which holds all different blocks")
        found.append(share)
    return sorted(set(found))


def _words(text: str, option: str, example: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise BadInput(f"{option} is empty; write it as {option} {example}")
    return words
