"""``Reuse``: a transformers model joined to a store."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch

from kvstore.adapters.transformers import capture, generating, watch
from kvstore.adapters.transformers.agree import agreed_tokens, without_trailing_padding
from kvstore.adapters.transformers.ahead import worker_for
from kvstore.adapters.transformers.attach import Attached, attach_test
from kvstore.adapters.transformers.batch import Prompts, cut_by_columns, lay_out, read_prompts, to_callers_format
from kvstore.adapters.transformers.cache import ReuseCache
from kvstore.adapters.transformers.fingerprint import base_model, fingerprint
from kvstore.adapters.transformers.gather import Gather
from kvstore.adapters.transformers.hit import Hit, Refused, SavedTurn, sequences_of
from kvstore.adapters.transformers.loaded import Loaded
from kvstore.adapters.transformers.pace import Pace
from kvstore.adapters.transformers.recompute import nested_prefill
from kvstore.adapters.transformers.recorder import Recorder
from kvstore.adapters.transformers.reopen import reopen
from kvstore.adapters.transformers.row import Row
from kvstore.adapters.transformers.staging import staging_on
from kvstore.errors import BadInput, StoreClosed
from kvstore.keys import Fingerprint, Namespace
from kvstore.layout import BLOCK_TOKENS
from kvstore.match import Miss
from kvstore.plan import LayerPlan
from kvstore.save import Draft
from kvstore.store import Store
from kvstore.tensors.carrier import Carrier

PATIENCE = 10.0  # seconds that a forward pass waits for layers in all, before it computes them itself


class Reuse:
    """Reuse of keys and values for one model. Runs the attach test; raises ``Unsupported`` with the reason.

    ``fingerprint`` overrides what identifies the model: a string that changes whenever its keys and values would.
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
    ) -> None:
        self.model, self.store = model, store
        self._base = base_model(model)
        self._decoder = self._base.get_decoder()
        self._config = self._decoder.config.get_text_config(decoder=True)
        self._given_fingerprint = fingerprint
        self._block_tokens, self._patience = block_tokens, patience
        self._pace = Pace()
        self._carrier: Carrier | None = None
        capture.install(self._decoder, self)
        self._attached: Attached
        self.refresh()
        self._hook()

    # -- attaching ----------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Test and fingerprint the model again, after its weights, adapters or attention were changed on purpose."""
        self._attached = attach_test(self._decoder, self)
        self.layout = self._attached.layout(self._block_tokens)
        self.store.expect(self.layout)  # while the fingerprint is taken
        given = self._given_fingerprint
        if given is None:
            given = fingerprint(self.model, self.store, self.plan)
        self.fingerprint = given if isinstance(given, Fingerprint) else Fingerprint({"given": given})
        self._staging = staging_on(self.layout, self._attached.dtype, self._attached.specs[0].device)
        self._stamp = watch.sweep(self._base)
        device = self._attached.device
        if self._carrier is None and device.type == "cuda" and self._attached.turnable:
            self._carrier = Carrier(device)

    @property
    def plan(self) -> LayerPlan:
        """Which layers blocks hold."""
        return self._attached.plan

    @property
    def supports(self) -> frozenset[str]:
        """Which kinds of reuse are exact claims on this model: of "exact", "shifted" and "modular"."""
        return self._attached.supports

    @property
    def counters(self) -> dict[str, int]:
        """What happened while recording on a device, beside the counters of ``store.stats()``."""
        return {} if self._staging is None else self._staging.counters.snapshot()

    @property
    def _padding(self) -> int | None:
        return generating.padding(self._base, self._config)

    def _hook(self) -> None:
        """Listen to the decoder's forward passes that use a cache of ours."""
        mine = weakref.ref(self)
        names = [name for name in inspect.signature(self._decoder.forward).parameters if name != "kwargs"]

        def cache_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> ReuseCache | None:
            cache = kwargs.get("past_key_values") or next((arg for arg in args if isinstance(arg, ReuseCache)), None)
            return cache if isinstance(cache, ReuseCache) and cache.owner() is mine() else None

        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            cache = cache_of(args, kwargs)
            if cache is None:
                return None
            if args:  # by name from here on
                kwargs, args = {**dict(zip(names, args, strict=False)), **kwargs}, args[len(names) :]
            ids: Any = kwargs.get("input_ids")
            positions: Any = kwargs.get("position_ids")
            known = cache.unread(ids, positions)
            if known:
                ids, positions = ids[:, known:], positions[:, known:]
                kwargs = {**kwargs, "input_ids": ids, "position_ids": positions}
            cache.begin(ids, kwargs.get("attention_mask"), positions)
            return args, kwargs

        def after(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], __: Any) -> None:
            cache = cache_of(args, kwargs)
            if cache is not None:
                cache.finish()

        handles = [
            self._decoder.register_forward_pre_hook(before, with_kwargs=True),
            self._decoder.register_forward_hook(after, with_kwargs=True, always_call=True),
        ]
        for handle in handles:
            weakref.finalize(self, handle.remove).atexit = False

    def _changed(self) -> str | None:
        difference = watch.difference(self._stamp, watch.sweep(self._base))
        if difference is None:
            return None
        return f"{difference} after it was attached; call refresh() to use the model as it is now"

    # -- the three steps ----------------------------------------------------------------------------------------------

    def load(self, input_ids: Any, attention_mask: Any = None, tenant: str = "") -> Hit:
        """Find what is cached of a prompt or a batch, and start bringing it."""
        return self._load(self._read(input_ids, attention_mask), tenant, by_columns=False)

    def save(self, out: Any, cache: Any, tenant: str = "", owner: str = "", ttl: float | None = None) -> SavedTurn:
        """Store what was computed with a hit's cache; returns at once.

        ``out``: all token ids of each row, prompt first, as ``generate`` returns them. Refuses (``BadInput``) ids that
        are not what the model read. The cache may go on to the next turn and be saved again.
        """
        if not isinstance(cache, ReuseCache) or cache.owner() is not self:
            raise BadInput("save needs the cache of a hit of this Reuse; pass hit.cache")
        if cache.tenant != tenant:
            raise BadInput(f"this hit was loaded for tenant {cache.tenant!r}, so it cannot be saved for {tenant!r}")
        recorder, single = cache.recorder, len(cache.recorder.rows) == 1
        sequences = sequences_of(out)
        if not sequences or len(sequences) % len(recorder.rows):
            raise BadInput(f"the output has {len(sequences)} rows, the cache {len(recorder.rows)}")
        each = len(sequences) // len(recorder.rows)
        agreed = []
        for number, row in enumerate(recorder.rows):
            ids = without_trailing_padding(sequences[number * each], generating.ends(self._base), self._padding)
            agreed.append(agreed_tokens(number, ids, recorder.columns[number].tolist(), row.ids))
        refused = cache.stamp if isinstance(cache.stamp, str) else self._changed()
        if refused is not None or cache.stamp is not self._stamp:
            recorder.end_all("saving was refused")
            recorder.discard()
            reason = refused or "the model was refreshed after this hit was loaded"
            return SavedTurn([Refused()] * len(recorder.rows), single, reason)
        namespace = Namespace(self.fingerprint, tenant)
        saves = []
        for row, tokens in zip(recorder.rows, agreed, strict=True):
            saves.append(self._save_row(row, tokens, namespace, owner, ttl))
        return SavedTurn(saves, single)

    def _save_row(self, row: Row, tokens: int, namespace: Namespace, owner: str, ttl: float | None) -> Any:
        store, layout, attached, patience = self.store, self.layout, self._attached, self._patience
        drafts, whole, ongoing = row.take(tokens), tokens == len(row.ids), row.ended is None
        row.end("it was saved")
        saved = store.save(namespace, layout, row.ids[:tokens], drafts, owner=owner, ttl=ttl, writer=WRITER)
        if whole and ongoing and saved.tokens == tokens:
            row.reopen = lambda: reopen(row, store, namespace, layout, attached.specs, attached.dtype, patience)
        return saved

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        tenant: str = "",
        owner: str = "",
        ttl: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """``model.generate`` with reuse: load, generate, save. Takes its arguments and gives its result."""
        generating.refuse(kwargs)
        prompts = self._read(input_ids, attention_mask)
        hit = self._load(prompts, tenant, by_columns=generating.reads_ids(kwargs))
        width = int(hit.plan.ids.shape[1])
        kwargs = generating.adjust(self.model, kwargs, width - int(prompts.given.shape[1]))
        out = self.model.generate(**hit.inputs, **kwargs)
        self.save(out, hit.cache, tenant=tenant, owner=owner, ttl=ttl)
        if isinstance(out, torch.Tensor):
            return to_callers_format(out, prompts, width)
        out.sequences = to_callers_format(out.sequences, prompts, width)
        return out

    # -- how a load is put together -----------------------------------------------------------------------------------

    def _read(self, input_ids: Any, attention_mask: Any) -> Prompts:
        return read_prompts(input_ids, attention_mask, self._padding, self._config.vocab_size)

    def _load(self, prompts: Prompts, tenant: str, by_columns: bool) -> Hit:
        changed = self._changed()
        if changed is not None:
            empty: list[Any] = [None] * len(prompts.rows)
            misses = [Miss("changed", 0, changed)] * len(prompts.rows)
            return self._hit(prompts, empty, misses, [0] * len(prompts.rows), tenant, by_columns, changed)
        namespace = Namespace(self.fingerprint, tenant)
        loads, misses, tokens = [], [], []
        for ids in prompts.rows:
            match = self.store.match(namespace, self.layout, ids)
            load = self.store.load(match, device=self._carrier is not None)
            # What fails before attention begins costs a shorter hit; layer 0 comes first, so it is soon known.
            load.wait(0, timeout=self._patience)
            loads.append(load)
            misses.append(match.miss)
            tokens.append(min(load.tokens, load.good_tokens(len(self.layout.layers) - 1)))
        return self._hit(prompts, loads, misses, tokens, tenant, by_columns, self._stamp)

    def _hit(
        self,
        prompts: Prompts,
        loads: list[Any],
        misses: list[Any],
        tokens: list[int],
        tenant: str,
        by_columns: bool,
        stamp: object,
    ) -> Hit:
        attached = self._attached
        windows = any(spec.window is not None for spec in attached.specs)
        columns = max(tokens)
        if len(tokens) > 1 and (windows or by_columns):
            columns, tokens = cut_by_columns(prompts, tokens)
        tiers: dict[str, int] = {}
        for place, (load, count) in enumerate(zip(loads, tokens, strict=True)):
            for tier, part in load.tokens_by_tier(count).items() if load is not None else ():
                tiers[tier] = tiers.get(tier, 0) + part
            if load is not None and not count:
                load.release()
                loads[place] = None
        plan = lay_out(prompts, columns, tokens, attached.specs[0].device)
        recorder = self._recorder(prompts, plan, windows, stamp)
        gather = Gather(loads, tokens, columns, attached.specs, attached.rotations, attached.dtype, self._carrier)
        new = int(plan.ids.shape[1]) - columns
        loaded = Loaded(
            gather,
            new,
            attached.specs,
            recorder,
            nested_prefill(self._decoder, self._config, plan, attached.specs),
            self._patience,
            worker_for(self.store, new, self._carrier is not None),
            self._pace,
        )
        specs, dtype = attached.specs, attached.dtype
        cache = ReuseCache(self, loaded, recorder, self.plan, specs, dtype, plan, stamp, tenant)
        single = prompts.single
        return Hit(cache, tokens[0] if single else tokens, misses[0] if single else misses, tiers, plan)

    def _recorder(self, prompts: Prompts, plan: Any, windows: bool, stamp: object) -> Recorder:
        attached, store, layout, staging = self._attached, self.store, self.layout, self._staging

        def new_draft() -> Draft | None:
            try:
                return store.draft(layout)
            except StoreClosed:  # inside a forward pass, which goes on
                return None

        rows = [
            Row(ids[:count], attached.specs, attached.dtype, layout.block_tokens, new_draft, staging)
            for ids, count in zip(prompts.rows, plan.tokens, strict=True)
        ]
        held = plan.mask[:, : plan.columns].to("cpu", torch.bool)
        recorder = Recorder(rows, held, attached.rotations, attached.dtype, windows)
        if isinstance(stamp, str):
            recorder.end_all(stamp)
        return recorder


WRITER = f"transformers/{torch.__version__}"[:64]
