"""What most policies have in common: all blocks are admitted, and nothing is learned for later."""

from __future__ import annotations


class Unlearning:
    """The part of ``EvictionPolicy`` of those that keep no knowledge beyond the blocks they hold."""

    def admits(self, block: int) -> bool:
        """Every block is."""
        return True

    def state(self) -> str:
        """Nothing."""
        return ""

    def learn(self, state: str) -> None:
        """Ignored."""
