"""The worker's half: brings loads into the engine's pages, and takes saves from them, in threads of its own.

The engine's thread never waits for a tier, but in the mode "layers" for what its own step needs, until the deadline.
"""

from __future__ import annotations

from typing import Any

from kvstore.adapters.vllm.caches import Caches, kernels
from kvstore.adapters.vllm.loading import Loading
from kvstore.adapters.vllm.model import Model, dtype_of
from kvstore.adapters.vllm.options import Options
from kvstore.adapters.vllm.saving import Saving
from kvstore.adapters.vllm.step import Load, Save, Step
from kvstore.adapters.vllm.thread import Worker
from kvstore.store import Store

CLOSE_SECONDS = 30.0


class WorkerHalf:
    """One per worker process. Methods belong to the engine's thread."""

    def __init__(self, model: Model, store: Store, options: Options, rank: int) -> None:
        self._model, self._store, self._options, self._rank = model, store, options, rank
        self._caches: Caches | None = None
        self._loads: dict[str, Loading] = {}  # under way, or not reported yet
        self._saves: list[Saving] = []  # not reported yet
        self._held: set[str] = set()  # requests whose pages the engine keeps until we say so
        self._within: list[Loading] = []  # that this step waits for
        self._invalid: set[int] = set()  # pages of loads that failed, to be reported
        for kernel in kernels(dtype_of(model.layout)):
            kernel.get()
        self._loader, self._saver = Worker("kvstore-vllm-load"), Worker("kvstore-vllm-save")

    def register(self, caches: dict[str, Any], context: dict[str, Any], config: Any) -> None:
        """The engine's caches, by the names of layers. Raises ``Unsupported`` for what is not known."""
        self._caches = Caches(self._model, caches, context, config, self._rank)
        self._store.expect(self._model.part)

    # -- a step -------------------------------------------------------------------------------------------------------

    def before(self, step: Step) -> None:
        """Before pages are written: what was being read of preempted requests is not what it was any more."""
        for saving in self._saves:
            if saving.save.request in step.preempted:
                saving.cancel()

    def start(self, step: Step) -> None:
        """Loads begin."""
        for load in step.loads:
            self._start(load)

    def _start(self, load: Load) -> None:
        assert self._caches is not None
        loading = Loading(load, self._model, self._store, self._caches, self._rank, self._options.deadline)
        self._loads[load.request] = loading
        if load.within:
            self._within.append(loading)
        self._loader.do(loading.run)

    def layer(self, name: str) -> None:
        """The engine wants to read a layer: waits for the loads of this step."""
        for loading in self._within:
            loading.wait(self._model.layers.index(name))

    def end(self, step: Step) -> None:
        """The step's forward pass is over: blocks that are full are saved."""
        for loading in self._within:
            loading.wait(len(self._model.layers) - 1)
        self._within = []
        for save in step.saves:
            self._save(save)

    def _save(self, save: Save) -> None:
        assert self._caches is not None
        if save.held:
            self._held.add(save.request)
            for earlier in self._saves:
                if earlier.save.request == save.request:
                    earlier.keep()
        saving = Saving(save, self._model, self._store, self._caches, self._rank, self._options.deadline)
        self._saves.append(saving)
        self._saver.do(saving.run)

    def results(self) -> tuple[set[str], set[str]]:
        """Requests whose pages were read, and requests whose loads are over, since the last call."""
        received = set()
        for name, loading in list(self._loads.items()):
            if loading.over:
                del self._loads[name]
                self._invalid |= loading.invalid()
                if not loading.load.within:
                    received.add(name)
        left = []
        for saving in self._saves:
            if saving.settle():
                continue
            left.append(saving)
        self._saves = left
        waiting = {saving.save.request for saving in left}
        sent = self._held - waiting
        self._held &= waiting
        return sent, received

    def invalid(self) -> set[int]:
        """Pages that are not what they should be, since the last call."""
        found, self._invalid = self._invalid, set()
        return found

    def close(self) -> None:
        """Ends the threads, when what was asked for is done."""
        for saving in self._saves:
            saving.keep()
        for worker in (self._loader, self._saver):
            worker.close(CLOSE_SECONDS)
