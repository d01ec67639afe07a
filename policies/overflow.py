"""What stays of a conversation that has outgrown its context (StreamingLLM; CachedAttention's truncation).

All are one family: the first tokens stay (attention sinks), the latest stay, and the middle goes, so many tokens at a
time. What stays depends on the length of the history alone, never on where turns or calls to a model happened to end.
So keys and values of a token, which depend on what it could see, depend on the history and the policy alone too.
"""

from __future__ import annotations

from dataclasses import dataclass

STREAMING_STEP = 16  # tokens; every step, all kept keys are turned again


@dataclass(frozen=True, slots=True)
class Window:
    """At most ``context`` tokens: the first ``sinks`` and the latest. When it is full, ``step`` tokens go at once.

    Tokens count from the start of the history. What stays moves up in the cache, so that the position of a token is
    its index there. Raises ``ValueError`` for numbers that leave nothing to see or nothing to drop.
    """

    context: int
    sinks: int = 4
    step: int = STREAMING_STEP

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.step < 1:
            raise ValueError(f"sinks={self.sinks} and step={self.step}: keep 0 tokens or more, and drop 1 or more")
        if self.context < self.sinks + self.step:
            raise ValueError(
                f"a context of {self.context} tokens is full before {self.step} can be dropped behind {self.sinks} "
                "that stay; enlarge context, or make sinks or step smaller"
            )

    @property
    def mark(self) -> str:
        """A word for it: keys and values behind another one are others."""
        return f"window {self.context} {self.sinks} {self.step}"

    def dropped(self, tokens: int) -> int:
        """How many of the first ``tokens`` are gone when the last of them is read: a multiple of ``step``."""
        return max(0, -(-(tokens - self.context) // self.step)) * self.step

    def kept(self, tokens: int) -> list[tuple[int, int]]:
        """What the last of ``tokens`` sees, itself included: ranges of the history (first, behind the last)."""
        behind = self.sinks + self.dropped(tokens)
        if behind == self.sinks:
            return [(0, tokens)] if tokens else []
        return [(first, stop) for first, stop in ((0, self.sinks), (behind, tokens)) if first < stop]

    def boundary(self, tokens: int) -> int:
        """Up to which length the history may be read in one piece, when ``tokens`` are: behind it something goes."""
        return self.context + self.dropped(tokens + 1)


def streaming(context: int, sinks: int = 4, step: int = STREAMING_STEP) -> Window:
    """StreamingLLM: sinks and a window that moves on in small steps; with ``step=1``, token by token."""
    return Window(context, sinks, step)


def truncation(context: int, ratio: float = 0.5, sinks: int = 0) -> Window:
    """CachedAttention: when the context is full, its oldest part goes, ``ratio`` of it.

    Raises ``ValueError`` for a ratio that is no share.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio={ratio} is no share of the context; give a number above 0 and up to 1")
    return Window(context, sinks, int(context * ratio))
