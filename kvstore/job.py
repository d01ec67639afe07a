"""Jobs that wait for an engine: what a scheduler tells the store of its queue, and what the store answers."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal

from kvstore.errors import BadInput
from kvstore.keys import Namespace
from kvstore.layout import Layout
from kvstore.match import Match

State = Literal["resident", "prefetching", "too far", "over budget", "unknown"]


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One waiting job, and what it will read: a ``match``, or the prefix that is stored of ``token_ids``.

    ``name``: the caller's own, the same in every call for one job. ``root``, ``first``: as in ``Store.match``.
    ``start``: an estimate of the seconds until it starts, by which reads from disk are ordered (without: with the job
    before it). ``priority``: which of the jobs that may have memory get it first, and keep it longest, higher first; in
    all else, and among equals, the order of the queue decides. ``deadline``: seconds from now after which the caller
    gives the job up; what cannot be there by then is not begun. Raises ``BadInput``.
    """

    name: Hashable
    match: Match | None = None
    namespace: Namespace | None = None
    layout: Layout | None = None
    token_ids: Any = None
    root: bytes | None = None
    first: int = 0
    start: float | None = None
    priority: int = 0
    deadline: float | None = None

    def __post_init__(self) -> None:
        try:
            dict.fromkeys([self.name])
        except TypeError:
            raise BadInput(f"a job's name must be hashable, which {self.name!r} is not; use a string") from None
        said = [part is not None for part in (self.namespace, self.layout, self.token_ids)]
        if any(said) if self.match is not None else not all(said):
            raise BadInput(f"job {self.name!r} needs a match, or else namespace, layout and token_ids")
        for what in ("start", "deadline", "priority", "first"):
            value: object = getattr(self, what)
            number = isinstance(value, int | float) and math.isfinite(value)
            if not number and (value is not None or what in ("priority", "first")):
                raise BadInput(f"{what}={value!r} of job {self.name!r} is no number; leave it out if it is not known")


@dataclass(frozen=True, slots=True)
class Answer:
    """Where the store has what a job will read, and what it does about it.

    * "resident": all of it is in host memory or on the device;
    * "prefetching": the rest is on its way;
    * "too far": the rest stays on disk, because the job stands too far back in the queue, or its deadline is too near;
    * "over budget": the rest stays on disk, because there is no memory for it now;
    * "unknown": nothing of it is stored.
    """

    name: Hashable
    state: State
    tokens: int  # that are stored
    tokens_by_tier: dict[str, int]  # "device", "host", "disk", "remote"; what is on its way counts where it comes from
