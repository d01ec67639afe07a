"""What many blocks share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from kvstore.errors import BadInput
from kvstore.keys import Namespace
from kvstore.layout import Layout

PRE, ROTATED = "pre", "rotated"


class Origin(NamedTuple):
    """How a block's keys stand in it, and who made it, as far as is known.

    ``form``: "pre" (before rotation), "rotated" (turned for the positions that they have in their chain, which begins
    at 0), or "opaque". ``writer``: engine and build; empty for blocks on disk that nobody has read since it was opened.
    """

    form: str = PRE
    writer: str = ""

    @property
    def rotated(self) -> bool:
        """Whether keys are turned already."""
        return self.form == ROTATED


@dataclass(frozen=True, slots=True)
class Kind:
    """Namespace, owner, layout and origin of blocks. Interned, so that a block holds a small int for it."""

    namespace: bytes
    fingerprint: bytes  # empty for blocks that were found on disk
    tenant: str
    owner: str
    layout: Layout
    origin: Origin


def check_ttl(ttl: float | None) -> None:
    """Raises ``BadInput`` for a time that is none."""
    if ttl is not None and not ttl > 0:
        raise BadInput(f"ttl must be a positive number of seconds, not {ttl}")


def check_form(form: str, namespace: Namespace, root: bytes | None) -> None:
    """``BadInput`` where the keys of a chain behind ``root`` cannot be stored so."""
    if form not in (PRE, ROTATED):
        raise BadInput(f"form={form!r} is not known; keys are saved 'pre' (before rotation) or 'rotated'")
    if form == ROTATED and root not in (None, namespace.root):
        raise BadInput(
            "keys are saved rotated only in chains that start at position 0, behind nothing; leave root out, or save "
            "them before rotation"
        )
