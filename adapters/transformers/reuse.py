"""``Reuse``: a transformers model joined to a store."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kvstore.adapters.transformers import capture, generating, watch
from kvstore.adapters.transformers.agree import agreed_rows
from kvstore.adapters.transformers.attach import attach_test
from kvstore.adapters.transformers.batch import Prompts, read_prompts, to_callers_format
from kvstore.adapters.transformers.cache import ReuseCache
from kvstore.adapters.transformers.encode import Encoded, encode, encodings
from kvstore.adapters.transformers.fingerprint import base_model, fingerprint
from kvstore.adapters.transformers.hit import Hit, Refused, SavedTurn
from kvstore.adapters.transformers.hook import hook
from kvstore.adapters.transformers.joined import Joined
from kvstore.adapters.transformers.mode import RECOMPUTED, How, Links, compose
from kvstore.adapters.transformers.pace import Pace
from kvstore.adapters.transformers.staging import staging_on
from kvstore.adapters.transformers.waiting import schedule
from kvstore.adapters.transformers.window import WindowCache
from kvstore.adapters.transformers.windowed import Windowed
from kvstore.composition import Composition
from kvstore.errors import BadInput, Unsupported
from kvstore.job import Answer
from kvstore.keys import Fingerprint, Namespace
from kvstore.layout import BLOCK_TOKENS, Layout
from kvstore.match import Match
from kvstore.plan import LayerPlan
from kvstore.policies.overflow import Window
from kvstore.store import Store
from kvstore.tensors.carrier import Carrier

MEASURED, ALWAYS = "measured", "always"  # when what is cached is loaded
PATIENCE = 10.0  # seconds that a forward pass waits for layers in all, before it computes them itself


class Reuse:
    """Reuse of keys and values for one model. Runs the attach test; raises ``Unsupported`` with the reason.

    ``fingerprint`` overrides what identifies the model: a string that changes whenever its keys and values would.
    ``patience``: seconds that a forward pass waits for layers in all, before it computes them itself, at most.
    ``decide``: "measured" loads what is cached only where, going by what was measured, the first token comes no later
    for it (``hit.decision``); "always" loads all of it.
    May be used from several threads at once, each with its own hits.
    """

    def __init__(
        self,
        model: Any,
        store: Store,
        *,
        fingerprint: str | Fingerprint | None = None,
        block_tokens: int = BLOCK_TOKENS,
        patience: float = PATIENCE,
        decide: str = MEASURED,
    ) -> None:
        if decide not in (MEASURED, ALWAYS):
            raise BadInput(f"decide={decide!r} is not known; choose {MEASURED!r} or {ALWAYS!r}")
        self.model, self.store = model, store
        self._base = base_model(model)
        self._decoder = self._base.get_decoder()
        self._config = self._decoder.config.get_text_config(decoder=True)
        self._given_fingerprint = fingerprint
        self._block_tokens, self._patience = block_tokens, patience
        self._pace = Pace(decide == MEASURED)
        self._carrier: Carrier | None = None
        capture.install(self._decoder, self)
        self._joined: Joined
        self.refresh()
        hook(self._decoder, self)

    # -- attaching ----------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Test and fingerprint the model again, after its weights, adapters or attention were changed on purpose."""
        attached = attach_test(self._decoder, self)
        layout = attached.layout(self._block_tokens)
        self.store.expect(layout)  # while the fingerprint is taken
        given = self._given_fingerprint
        if given is None:
            given = fingerprint(self.model, self.store, attached.plan)
        if self._carrier is None and attached.device.type == "cuda" and attached.turnable:
            self._carrier = Carrier(attached.device)
        self._joined = Joined(
            owner=weakref.ref(self),
            decoder=self._decoder,
            config=self._config,
            store=self.store,
            attached=attached,
            layout=layout,
            fingerprint=given if isinstance(given, Fingerprint) else Fingerprint({"given": given}),
            stamp=watch.sweep(self._base),
            staging=staging_on(layout, attached.dtype, attached.specs[0].device),
            carrier=self._carrier,
            pace=self._pace,
            patience=self._patience,
        )

    @property
    def layout(self) -> Layout:
        """What the bytes of this model's blocks mean."""
        return self._joined.layout

    @property
    def fingerprint(self) -> Fingerprint:
        """What identifies the model."""
        return self._joined.fingerprint

    @property
    def plan(self) -> LayerPlan:
        """Which layers blocks hold."""
        return self._joined.attached.plan

    @property
    def supports(self) -> frozenset[str]:
        """Which kinds of reuse this model takes: of "exact", "shifted" and "modular"."""
        return self._joined.attached.supports

    @property
    def counters(self) -> dict[str, int]:
        """What happened while recording on a device, beside the counters of ``store.stats()``."""
        staging = self._joined.staging
        return {} if staging is None else staging.counters.snapshot()

    @property
    def _padding(self) -> int | None:
        return generating.padding(self._base, self._config)

    def _changed(self) -> str | None:
        difference = watch.difference(self._joined.stamp, watch.sweep(self._base))
        if difference is None:
            return None
        return f"{difference} after it was attached; call refresh() to use the model as it is now"

    # -- the three steps ----------------------------------------------------------------------------------------------

    def load(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        tenant: str = "",
        *,
        segments: Sequence[Any] | None = None,
        mode: str | None = None,
        recompute: float = RECOMPUTED,
        links: Links | None = None,
        discover: int = 0,
        overflow: Window | None = None,
    ) -> Hit:
        """Find what is cached of a prompt or a batch, and start bringing it.

        ``input_ids``: token ids, or a ``Composition``. ``segments``: lists of token ids that follow each other; all but
        the last may have been encoded apart. ``mode``: "exact" reuses only what was computed in this very context;
        "modular" also what was encoded apart, as it is; "blend" computes the share ``recompute`` of that anew, where it
        is furthest from what this prompt makes of it; "link" puts learned tokens (``links``) behind each segment, for a
        model that was trained so. Compositions and segments are "modular" unless told otherwise.
        ``discover``: also take runs of at least so many tokens that are stored anywhere (0: do not look; one prompt).
        ``overflow``: what stays when a conversation outgrows its context; give its whole history, every time.
        """
        how = How(segments, mode, recompute, links, discover, overflow)
        return self._hit(self._asked_for(input_ids, attention_mask, tenant, how), tenant, how)

    def save(self, out: Any, cache: Any, tenant: str = "", owner: str = "", ttl: float | None = None) -> SavedTurn:
        """Store what was computed with a hit's cache; returns at once.

        ``out``: all token ids of each row, prompt first, as ``generate`` returns them. Refuses (``BadInput``) ids that
        are not what the model read. The cache may go on to the next turn and be saved again.
        """
        if not isinstance(cache, ReuseCache | WindowCache) or cache.recorder is None or cache.owner() is not self:
            raise BadInput("save needs the cache of a hit of this Reuse; pass hit.cache")
        if cache.tenant != tenant:
            raise BadInput(f"this hit was loaded for tenant {cache.tenant!r}, so it cannot be saved for {tenant!r}")
        recorder, single, joined = cache.recorder, len(cache.recorder.rows) == 1, self._joined
        agreed = agreed_rows(out, recorder, generating.ends(self._base), self._padding)
        refused = cache.stamp if isinstance(cache.stamp, str) else self._changed()
        if refused is not None or cache.stamp is not joined.stamp:
            recorder.end_all("saving was refused")
            recorder.discard()
            reason = refused or "the model was refreshed after this hit was loaded"
            return SavedTurn([Refused()] * len(recorder.rows), single, reason)
        return joined.save(cache, Namespace(self.fingerprint, tenant), owner, ttl, agreed)

    def generate(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        *,
        segments: Sequence[Any] | None = None,
        mode: str | None = None,
        recompute: float = RECOMPUTED,
        links: Links | None = None,
        discover: int = 0,
        overflow: Window | None = None,
        tenant: str = "",
        owner: str = "",
        ttl: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """``model.generate`` with reuse: load, generate, save. Takes its arguments and those of ``load``."""
        generating.refuse(kwargs)
        how = How(segments, mode, recompute, links, discover, overflow)
        asked = self._asked_for(input_ids, attention_mask, tenant, how)
        hit = self._hit(asked, tenant, how, by_columns=generating.reads_ids(kwargs))
        width = int(hit.plan.ids.shape[1])
        wider = width - int(asked.given.shape[1]) if isinstance(asked, Prompts) else 0
        out = self.model.generate(**hit.inputs, **generating.adjust(self.model, kwargs, wider))
        self.save(out, hit.cache, tenant=tenant, owner=owner, ttl=ttl)
        if isinstance(asked, Composition):
            return out
        if isinstance(out, torch.Tensor):
            return to_callers_format(out, asked, width)
        out.sequences = to_callers_format(out.sequences, asked, width)
        return out

    def encode(
        self,
        schema: Any = None,
        *,
        segments: Sequence[Any] | None = None,
        tenant: str = "",
        owner: str = "",
        ttl: float | None = None,
        pin: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Encoded:
        """Compute and store what prompts will be composed of: the modules of a schema, compositions, or segments.

        Each is computed alone; what is stored already is left as it is. ``pin``: keep it in "host" memory, or on
        "disk" at least, until the result is released. ``progress`` is told tokens done and in all.
        """
        changed = self._changed()
        if changed is not None:
            raise Unsupported(changed)
        return encode(self._joined, encodings(schema, segments), tenant, owner, ttl, pin, progress)

    def schedule(self, waiting: Sequence[Any], tenant: str = "") -> list[Answer]:
        """Hints, as ``Store.schedule``: the whole queue of prompts that wait to be loaded, the next one first, each as
        token ids, a ``Composition``, or a ``kvstore.Job``. Answers for the first two are named by their place."""
        changed = self._changed()
        fingerprint = self.fingerprint if changed is None else Fingerprint({"changed": changed})
        return schedule(self._joined, Namespace(fingerprint, tenant), waiting, self._padding)

    def match(self, input_ids: Any, tenant: str = "") -> Match:
        """What is stored of one prompt's token ids, for ``store.pin``, ``retain``, ``demote`` and ``forget``; to
        be released. Raises ``BadInput``, and ``Unsupported`` for a model that has changed."""
        changed = self._changed()
        if changed is not None:
            raise Unsupported(changed)
        rows = read_prompts(input_ids, None, self._padding, self._config.vocab_size).rows
        if len(rows) > 1:
            raise BadInput("match looks up one prompt of token ids at a time")
        return self.store.match(Namespace(self.fingerprint, tenant), self.layout, rows[0], whole=True)

    def window(self, policy: Window) -> WindowCache:
        """An empty cache of constant size for a conversation that is not stored: for the model, or ``generate``."""
        return Windowed(self._joined, policy).cache()

    # -- how a load is put together -----------------------------------------------------------------------------------

    def _asked_for(self, given: Any, attention_mask: Any, tenant: str, how: How) -> Prompts | Composition:
        """What a caller wants read."""
        composition = how.composition(given)
        if composition is not None:
            return composition
        prompts = read_prompts(given, attention_mask, self._padding, self._config.vocab_size)
        if not how.discover:
            return prompts
        if len(prompts.rows) > 1:
            raise BadInput("discover looks through one prompt of token ids at a time")
        namespace = Namespace(self.fingerprint, tenant)
        return self.store.discover(namespace, self.layout, prompts.rows[0], how.discover)

    def _hit(self, asked: Prompts | Composition, tenant: str, how: How, by_columns: bool = False) -> Hit:
        if isinstance(asked, Composition):
            return compose(self._joined, asked, tenant, how, self._changed())
        if how.overflow is not None:
            return Windowed(self._joined, how.overflow).hit(asked, tenant, self._changed())
        return self._joined.rows(asked, tenant, by_columns, self._changed)
