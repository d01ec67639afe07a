"""The table of what a client may ask: what its arguments must be, and who answers.

A verb is *quick* (microseconds, in the loop's thread) or *slow* (in a worker). What is *long* is answered by an event,
for as long as it takes. So is a *save*, but the session's next request waits for it: a client finds what it has saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kvstore.daemon import moving, operating, pieces, queueing, tending

NONE = type(None)
Pace = Literal["quick", "slow", "save", "long"]


@dataclass(frozen=True, slots=True)
class Verb:
    """One kind of request."""

    kinds: Sequence[Any]  # of its arguments
    run: Callable[..., object]
    pace: Pace = "quick"


_SAVE = (bytes, bytes, bytes, list, (bytes, NONE), str, (int, float, NONE), str, str, (list, NONE))
VERBS: Mapping[str, Verb] = {
    "ping": Verb((), tending.ping),
    "match": Verb((bytes, bytes, bytes, (bytes, NONE), int, bool), moving.match),
    "cut": Verb((int, int), moving.cut),
    "load": Verb((int,), moving.load),
    "sums": Verb((int,), moving.sums),
    "drafts": Verb((bytes, int), moving.drafts),
    "put": Verb((int, int, bytes), pieces.put),
    "save": Verb(_SAVE, moving.save, "save"),
    "wait": Verb((int, (int, float, NONE)), moving.wait, "long"),
    "schedule": Verb((list,), queueing.schedule),
    "prospect": Verb((list, bool), moving.prospect),
    "discover": Verb((bytes, bytes, bytes, int), moving.discover, "slow"),
    "expect": Verb((bytes,), moving.expect),
    "pin": Verb((int, str, (int, float)), tending.pin),
    "unpin": Verb((int,), tending.unpin),
    "retain": Verb((int, (int, float)), tending.retain),
    "demote": Verb((int,), tending.demote),
    "forget": Verb(((str, NONE), (str, NONE), (int, float, NONE), (int, NONE)), tending.forget, "long"),
    "stats": Verb((), tending.stats),
    "segments": Verb((int, (str, NONE)), tending.segments, "slow"),
    "pin_segment": Verb((str, str, (int, float)), tending.pin_segment, "long"),
    "forget_segment": Verb((str, (str, NONE), (str, NONE), (int, float, NONE)), tending.forget_segment, "long"),
    "remember": Verb((str, str), tending.remember),
    "recall": Verb((str,), tending.recall),
    "verify": Verb((), tending.verify, "long"),
    "flush": Verb(((int, float, NONE),), tending.flush, "long"),
    "about": Verb((), operating.about),
    "quotas": Verb((), operating.quotas, "slow"),
    "resize": Verb((str, int, (int, float)), operating.resize, "long"),
}
