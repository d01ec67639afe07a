"""How a composed prompt is put together: exactly, or from modules as they are, or with a share of them blended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kvstore.adapters.transformers.blend import deviating
from kvstore.adapters.transformers.blended import Blended, mark_of
from kvstore.adapters.transformers.composed import Composed
from kvstore.adapters.transformers.hit import Hit, release
from kvstore.adapters.transformers.joined import Joined
from kvstore.composition import Composition
from kvstore.errors import BadInput, Unsupported
from kvstore.keys import Fingerprint, Namespace
from kvstore.policies.overflow import Window

EXACT, MODULAR, BLEND, LINK = "exact", "modular", "blend", "link"
MODES = (EXACT, MODULAR, BLEND, LINK)
RECOMPUTED = 0.15  # share of the tokens that a blend computes anew, as in CacheBlend


class Links(Protocol):
    """Tokens that a model was trained to have behind documents (``kvstore.adapters.kvlink.LinkTokens``)."""

    def of(self, slot: int) -> list[int]:
        """Those behind the document number ``slot``."""


@dataclass(frozen=True)
class How:
    """What a caller says of how a prompt is to be put together; see ``Reuse.load``."""

    segments: Sequence[Any] | None = None
    mode: str | None = None
    recompute: float = RECOMPUTED
    links: Links | None = None
    discover: int = 0
    overflow: Window | None = None

    def composition(self, given: Any) -> Composition | None:
        """The composition that is meant; None: plain token ids. Raises ``BadInput`` for what contradicts itself."""
        if self.mode is not None and self.mode not in MODES:
            raise BadInput(f"mode={self.mode!r} is not known; choose one of {', '.join(MODES)}")
        composed = self.segments is not None or isinstance(given, Composition)
        if composed and (self.discover or self.overflow is not None):
            raise BadInput("discover and overflow are for plain token ids; leave segments and compositions out")
        if (self.mode == LINK) != (self.links is not None) or (self.links is not None and self.segments is None):
            raise BadInput("mode='link' goes with segments=[...] and links=LinkTokens(...)")
        if self.segments is not None:
            if given is not None:
                raise BadInput("give a prompt or segments, not both")
            segments = [_ids(segment) for segment in self.segments]
            return Composition.of_segments(segments, None if self.links is None else self.links.of)
        if given is None:
            raise BadInput("give a prompt: token ids, a composition, or segments=[ids, ids, ...]")
        if isinstance(given, Composition):
            return given
        if self.mode not in (None, EXACT) and not self.discover:
            raise BadInput(f"mode={self.mode!r} is for compositions; plain token ids are reused exactly")
        if self.discover and self.overflow is not None:
            raise BadInput("overflow is for a history of plain token ids as it is; leave discover out")
        return None


def compose(joined: Joined, composition: Composition, tenant: str, how: How, changed: str | None) -> Hit:
    """A hit of a composition. ``changed``: why nothing may be reused or recorded."""
    _check(joined, composition)
    mode, share = how.mode or MODULAR, how.recompute
    if mode == BLEND:
        if not 0 <= share <= 1:
            raise BadInput(f"recompute={share} is no share; give a number from 0 to 1")
        composition = Composition(composition.parts, mark_of(composition, share))
    fingerprint = joined.fingerprint if changed is None else Fingerprint({"changed": changed})
    namespace = Namespace(fingerprint, tenant)
    assembly, loads = joined.assembled(namespace, composition, mode != EXACT)
    if mode != BLEND or assembly.exact:
        return joined.composed(Composed(assembly), loads, tenant, changed or joined.stamp)
    # A device's recording takes whole runs only, and there is no way back to originals of keys that are stored rotated;
    # a blend is made again every time then.
    rotated = any("rotated" in run.match.forms for run in assembly.runs if run.modular)
    blended = Blended.of(assembly) if joined.staging is None and not rotated else None
    if blended is not None and (stored := joined.stored(namespace, blended.chain)) >= blended.modules:
        release(loads)
        assembly, loads = joined.assembled(namespace, blended.instead(composition, stored), True)
        return joined.composed(Composed(assembly, blended=blended), loads, tenant, changed or joined.stamp)
    chosen = deviating(joined, Composed(assembly), loads, share)
    if chosen is None:  # what follows must not pass for what follows a blend
        changed = "the layer that shows what to blend could not be loaded in time, so modules were used as they are"
    return joined.composed(Composed(assembly, chosen or (), blended), loads, tenant, changed or joined.stamp)


def _check(joined: Joined, composition: Composition) -> None:
    if not composition.parts:
        raise BadInput("the prompt has no tokens")
    top, size = max(composition.token_ids), joined.config.vocab_size
    if top >= size:
        raise BadInput(f"the prompt holds token {top}, but the model's vocabulary has {size} tokens")
    if "modular" not in joined.attached.supports:
        raise Unsupported("this model's keys are not the same at other positions, so that nothing can be composed")
    if joined.windows and composition.position_ids != list(range(len(composition))):
        raise Unsupported(
            "this model has sliding windows, which count tokens and not positions: a prompt with gaps between its "
            'positions cannot be served; leave no gaps (layout="packed")'
        )


def _ids(segment: Any) -> Any:
    """A tensor or an array as the list of its token ids."""
    return segment.reshape(-1).tolist() if hasattr(segment, "reshape") else segment
