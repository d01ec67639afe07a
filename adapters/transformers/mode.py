"""How a composed prompt is put together: exactly, or from modules as they are, or with a share of them blended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvstore.adapters.transformers.blend import deviating
from kvstore.adapters.transformers.composed import Composed
from kvstore.adapters.transformers.hit import Hit
from kvstore.adapters.transformers.joined import Joined
from kvstore.composition import Composition
from kvstore.errors import BadInput, Unsupported
from kvstore.keys import Fingerprint, Namespace

EXACT, MODULAR, BLEND = "exact", "modular", "blend"
MODES = (EXACT, MODULAR, BLEND)
RECOMPUTED = 0.15  # share of the tokens that a blend computes anew, as in CacheBlend


def asked_for(given: Any, segments: Sequence[Any] | None, mode: str | None) -> Composition | None:
    """The composition that a caller means; None: plain token ids. Raises ``BadInput`` for what contradicts itself."""
    if mode is not None and mode not in MODES:
        raise BadInput(f"mode={mode!r} is not known; choose one of {', '.join(MODES)}")
    if segments is not None:
        if given is not None:
            raise BadInput("give a prompt or segments, not both")
        return Composition.of_segments([_ids(segment) for segment in segments])
    if given is None:
        raise BadInput("give a prompt: token ids, a composition, or segments=[ids, ids, ...]")
    if isinstance(given, Composition):
        return given
    if mode not in (None, EXACT):
        raise BadInput(f"mode={mode!r} is for compositions; plain token ids are reused exactly")
    return None


def compose(
    joined: Joined, composition: Composition, tenant: str, mode: str, share: float, changed: str | None = None
) -> Hit:
    """A hit of a composition. ``changed``: why nothing may be reused or recorded."""
    _check(joined, composition)
    if mode == BLEND:
        if not 0 <= share <= 1:
            raise BadInput(f"recompute={share} is no share; give a number from 0 to 1")
        composition = Composition(composition.parts, f"blend {share:g}")
    fingerprint = joined.fingerprint if changed is None else Fingerprint({"changed": changed})
    assembly, loads = joined.assembled(Namespace(fingerprint, tenant), composition, mode != EXACT)
    composed = Composed(assembly)
    if mode == BLEND and not assembly.exact:
        chosen = deviating(joined, composed, loads, share)
        if chosen is None:  # what follows must not pass for what follows a blend
            changed = "the layer that shows what to blend could not be loaded in time, so modules were used as they are"
        composed = Composed(assembly, chosen or ())
    return joined.composed(composed, loads, tenant, joined.stamp if changed is None else changed)


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
