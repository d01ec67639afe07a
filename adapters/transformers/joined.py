"""A model joined to a store as it is now: how a load becomes a hit, and what was recorded becomes a save."""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvstore.adapters.transformers.ahead import worker_for
from kvstore.adapters.transformers.attach import Attached
from kvstore.adapters.transformers.batch import Plan, Prompts, cut_by_columns, lay_out
from kvstore.adapters.transformers.blended import Blended
from kvstore.adapters.transformers.cache import ReuseCache
from kvstore.adapters.transformers.choice import Choice, choose
from kvstore.adapters.transformers.composed import Composed, Scattered
from kvstore.adapters.transformers.gather import Gather, Span
from kvstore.adapters.transformers.hit import Hit, SavedTurn, add_tiers, release
from kvstore.adapters.transformers.loaded import Loaded
from kvstore.adapters.transformers.pace import Pace
from kvstore.adapters.transformers.recompute import nested_prefill
from kvstore.adapters.transformers.recorder import Opening, Recorder, Take
from kvstore.adapters.transformers.reopen import reopen
from kvstore.adapters.transformers.rotated import cut, readable, writers_of
from kvstore.adapters.transformers.row import Row, Seat
from kvstore.adapters.transformers.staging import Staging
from kvstore.adapters.transformers.watch import Stamp
from kvstore.adapters.transformers.window import WindowCache
from kvstore.assembly import Assembly, assemble
from kvstore.composition import Chain, Composition
from kvstore.errors import StoreClosed
from kvstore.keys import Fingerprint, Namespace
from kvstore.layout import Layout
from kvstore.load import Load
from kvstore.match import Match, Miss
from kvstore.save import Draft
from kvstore.store import Store
from kvstore.tensors.carrier import Carrier

WRITER = f"transformers/{torch.__version__}"[:64]


@dataclass(eq=False)
class Joined:
    """What stays as it is until the next ``refresh``. Any thread."""

    owner: weakref.ref[Any]  # the Reuse whose caches these are
    decoder: Any
    config: Any
    store: Store
    attached: Attached
    layout: Layout
    fingerprint: Fingerprint
    stamp: Stamp  # of the weights that the fingerprint was taken of
    staging: Staging | None
    carrier: Carrier | None
    pace: Pace
    patience: float  # seconds that a forward pass waits for layers in all, before it computes them itself

    @property
    def windows(self) -> bool:
        """Whether some layer sees only so many tokens back."""
        return any(spec.window is not None for spec in self.attached.specs)

    # -- loading ------------------------------------------------------------------------------------------------------

    def load(self, match: Match, choice: Choice | None = None) -> tuple[Load, int]:
        """Start a load; which tokens of the chain, up to which, can be counted on."""
        load = self.store.load(match, device=self.carrier is not None)
        # What fails before attention begins costs a shorter hit; layer 0 comes first, so it is soon known.
        if choice is None:
            load.wait(0, timeout=self.patience)
        elif not choice.waits_for(load, match, self.pace):
            return load, 0
        good = readable(((each.tokens, each.origin.form) for each in load.sources), self.attached.turnable)
        return load, match.skipped + min(good, load.good_tokens(len(self.layout.layers) - 1))

    def rows(self, prompts: Prompts, tenant: str, by_columns: bool, changed: Callable[[], str | None]) -> Hit:
        """A hit for prompts that go on from what is stored. ``changed``, how the model changed, is asked meanwhile."""
        namespace = Namespace(self.fingerprint, tenant)
        matches = [self.store.match(namespace, self.layout, ids) for ids in prompts.rows]
        for match in matches:
            cut(match, self.attached.turnable, goes_on=True)
        lengths, on_device = [len(ids) for ids in prompts.rows], self.carrier is not None
        choice = choose(self.store, self.pace, lengths, matches, on_device, self.patience)
        if choice is not None:
            choice.cut(matches)
        begun = [self.load(match, choice) for match in matches]
        loads, tokens = [load for load, _ in begun], [good for _, good in begun]
        misses = [match.miss for match in matches]
        return self.hit(prompts, loads, misses, tokens, tenant, by_columns, self.stamp, choice, changed)

    def hit(
        self,
        prompts: Prompts,
        loads: list[Any],
        misses: list[Any],
        tokens: list[int],
        tenant: str,
        by_columns: bool,
        stamp: object,
        choice: Choice | None = None,
        changed: Callable[[], str | None] = lambda: None,
    ) -> Hit:
        """A hit of the first ``tokens`` of each row; of nothing, if the model turns out to have ``changed``."""
        columns = max(tokens)
        if len(tokens) > 1 and (self.windows or by_columns):
            columns, tokens = cut_by_columns(prompts, tokens)
        tiers: dict[str, int] = {}
        for place, (load, count) in enumerate(zip(loads, tokens, strict=True)):
            add_tiers(tiers, load, count)
            if load is not None and not count:
                load.release()
                loads[place] = None
        spans = [[Span(place, 0, count, 0, columns - count)] if count else [] for place, count in enumerate(tokens)]
        gather, writers = self._gather(loads, spans, columns), writers_of(loads)
        if (reason := changed()) is not None:
            gather.release()
            return empty(self, prompts, tenant, reason)
        plan = lay_out(prompts, columns, tokens, self.attached.specs[0].device)
        held = torch.arange(columns) >= columns - torch.tensor(plan.tokens)[:, None]
        rows = [
            self.row(ids[:count], Seat(source=place))
            for place, (ids, count) in enumerate(zip(prompts.rows, plan.tokens, strict=True))
        ]
        recorder = Recorder(rows, held, self.attached.rotations, self.attached.dtype, self.windows)
        if isinstance(stamp, str):
            recorder.end_all(stamp)
        cache = self._cache(gather, plan, recorder, stamp, tenant, None, choice)
        cached, why = (tokens[0], misses[0]) if prompts.single else (tokens, misses)
        decision = None if choice is None else choice.decision
        return Hit(cache, cached, why, tiers, plan, decision=decision, writers=writers)

    def assembled(self, namespace: Namespace, composition: Composition, apart: bool) -> tuple[Assembly, list[Any]]:
        """A prompt resolved, and loads of its runs under way.

        What turns out not to be there (a block that fails, no room for leases) is left to compute: of a run of this
        prompt its end, of a modular one all that the next try does not promise any more.
        """
        while True:
            assembly = assemble(self.store, namespace, self.layout, composition, apart)
            loads: list[Any] = []
            broken, left = [], []
            for number, run in enumerate(assembly.runs):
                if not run.cached:
                    run.match.release()
                    loads.append(None)
                    continue
                cut(run.match, self.attached.turnable, goes_on=not run.modular)
                load, good = self.load(run.match)
                loads.append(load)
                if run.modular and good < len(run.chain):
                    broken.append(number)
                    left.append(good)
                run.stored = min(run.stored, good)
            if not broken:
                return assembly, loads
            release(loads)
            composition = assembly.without(broken, left)

    def stored(self, namespace: Namespace, chain: Chain) -> int:
        """How many leading tokens of a chain the store has; one is always left."""
        match = self.store.match(namespace, self.layout, chain.token_ids, root=chain.context.root(namespace))
        match.release()
        return match.tokens

    def composed(self, composed: Composed, loads: list[Any], tenant: str, stamp: object) -> Hit:
        """A hit of a composed prompt, with ``loads`` of its runs."""
        assembly = composed.assembly
        tiers: dict[str, int] = {}
        for load, run in zip(loads, assembly.runs, strict=True):
            add_tiers(tiers, load, run.stored - run.match.skipped, run.first - run.match.skipped)
        scattered = composed.scatter(self.attached.specs, self.decoder.config._attn_implementation)
        plan = composed.plan(self.attached.specs[0].device)
        gather = self._gather(loads, [composed.spans()], plan.columns if scattered is None else scattered.total)
        recorder = self._opening(composed, tenant)
        if isinstance(stamp, str):
            recorder.end_all(stamp)
        cache = self._cache(gather, plan, recorder, stamp, tenant, scattered)
        unfinished = (run.match.miss for run in assembly.runs if run.cached < len(run.chain) - run.first)
        cached = composed.total - len(composed.computed)
        return Hit(cache, cached, next(unfinished), tiers, plan, assembly.exact, writers=writers_of(loads))

    def _gather(self, loads: list[Any], spans: list[list[Span]], columns: int) -> Gather:
        """What brings loads, and has begun: a hit is put together while the first layers are on their way."""
        at = self.attached
        gather = Gather(loads, spans, columns, at.specs, at.rotations, at.dtype, self.carrier)
        return gather.begin()

    def _cache(
        self,
        gather: Gather,
        plan: Plan,
        recorder: Recorder,
        stamp: object,
        tenant: str,
        scattered: Scattered | None,
        choice: Choice | None = None,
    ) -> ReuseCache:
        attached, specs, columns = self.attached, self.attached.specs, gather.columns
        new = int(plan.ids.shape[1]) - columns
        computed = new or len(scattered.columns if scattered else ())
        loaded = Loaded(
            gather,
            new,
            specs,
            recorder,
            nested_prefill(self.decoder, self.config, plan, columns, specs),
            self.patience if choice is None else choice.patience,
            None if gather.asks_only else worker_for(self.store, computed, self.carrier is not None),
            self.pace,
            whole=scattered is not None,
            choice=choice,
        )
        return ReuseCache(
            self.owner(), loaded, recorder, attached.plan, specs, attached.dtype, plan, stamp, tenant, scattered
        )

    # -- recording ----------------------------------------------------------------------------------------------------

    def row(self, ids: Sequence[int], seat: Seat) -> Row:
        """What records a chain of which ``ids`` are stored."""

        def new_draft() -> Draft | None:
            try:
                return self.store.draft(self.layout)
            except StoreClosed:  # inside a forward pass, which goes on
                return None

        specs, dtype = self.attached.specs, self.attached.dtype
        return Row(ids, specs, dtype, self.layout.block_tokens, new_draft, self.staging, seat)

    def _opening(self, composed: Composed, tenant: str) -> Recorder:
        """Records each chain that the first pass computes a part of, and then the one that goes on."""
        namespace, ids = Namespace(self.fingerprint, tenant), composed.assembly.composition.token_ids
        takes: list[Take] = []
        for source, run in enumerate(composed.kept):
            first, count = composed.takes(run)
            if count:
                tokens = array("I", run.chain.token_ids).tolist()[: run.first + run.cached]
                root = run.chain.context.root(namespace)
                seat = Seat(ids[: run.column], run.first, run.position, root, source, run.match.skipped)
                takes.append(Take(self.row(tokens, seat), ids[run.stop - count : run.stop], [(first, 0, count)]))
        if composed.blended is not None:
            takes.append(self._blended(composed, composed.blended, ids, namespace))
        opening = Opening([ids[column] for column in composed.computed], takes)
        known = torch.ones((1, composed.total - len(composed.computed)), dtype=torch.bool)
        tail, attached = takes[-1].row, self.attached
        return Recorder([tail], known, attached.rotations, attached.dtype, self.windows, opening)

    def _blended(self, composed: Composed, blended: Blended, ids: list[int], namespace: Namespace) -> Take:
        """Records the chain of a blend: what was computed, and the originals of what was used as it was."""
        source, stored = composed.blend_stored
        seat = Seat(ids[: blended.column], 0, blended.position, blended.chain.context.root(namespace), source)
        row = self.row(ids[blended.column : blended.column + stored], seat)
        start = blended.column + stored
        row.copies = composed.copies(start)
        return Take(row, ids[start:], composed.computed_runs(start))

    # -- saving -------------------------------------------------------------------------------------------------------

    def save(
        self,
        cache: ReuseCache | WindowCache,
        namespace: Namespace,
        owner: str,
        ttl: float | None,
        tokens: Sequence[int] | None = None,
    ) -> SavedTurn:
        """Publish what was recorded with a cache; ``tokens``: only the first so many of each row's chain."""
        recorder = cache.recorder
        texts = [self._save(row, len(row.ids), namespace, owner, ttl) for row in recorder.texts]
        recorder.texts.clear()
        counts = [len(row.ids) for row in recorder.rows] if tokens is None else tokens
        saves = [
            self._save(row, count, namespace, owner, ttl) for row, count in zip(recorder.rows, counts, strict=True)
        ]
        return SavedTurn(saves, len(saves) == 1, beside=texts)

    def _save(self, row: Row, tokens: int, namespace: Namespace, owner: str, ttl: float | None) -> Any:
        """Publish what was recorded of the first ``tokens`` of a chain."""
        drafts, whole, ongoing = row.take(tokens), tokens == len(row.ids), row.ended is None
        row.end("it was saved")
        root, ids = row.seat.root, row.ids[:tokens]
        saved = self.store.save(namespace, self.layout, ids, drafts, root=root, owner=owner, ttl=ttl, writer=WRITER)
        if whole and ongoing and saved.tokens == tokens:
            specs, dtype = self.attached.specs, self.attached.dtype
            row.reopen = lambda: reopen(row, self.store, namespace, self.layout, specs, dtype, self.patience)
        return saved


def empty(joined: Joined, prompts: Prompts, tenant: str, reason: str) -> Hit:
    """A hit of nothing, which records nothing, because of ``reason``."""
    rows = len(prompts.rows)
    misses = [Miss("changed", 0, reason)] * rows
    return joined.hit(prompts, [None] * rows, misses, [0] * rows, tenant, False, reason)
