"""A request loop: what a small server does with a model and a store."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from kvstore.adapters.transformers import generating
from kvstore.adapters.transformers.batch import read_prompts
from kvstore.adapters.transformers.fingerprint import base_model
from kvstore.adapters.transformers.queue import Queue
from kvstore.adapters.transformers.request import Cancelled, DeadlinePassed, QueueFull, Request, Sampler, state_after
from kvstore.adapters.transformers.reuse import Reuse
from kvstore.adapters.transformers.running import Running
from kvstore.adapters.transformers.tempo import Tempo
from kvstore.errors import BadInput, KVStoreError, StoreClosed
from kvstore.keys import name_bytes
from kvstore.metrics import Counters

log = logging.getLogger("kvstore")

# What a model, its kernels and the store raise over one request: no memory, shapes, a closed store.
FAILURES = (RuntimeError, ValueError, TypeError, LookupError, MemoryError, KVStoreError)


class Loop:
    """Answers requests in the order in which they came, up to ``active`` of them at once, a token each in turn.

    Each has a cache of its own, so what one is told does not depend on the others: greedy tokens are those of
    ``generate``. The store is told who waits, and brings what they will read. ``submit``, ``chat``, ``cancel`` and
    ``result`` are for any thread, and for callbacks all but ``result``; ``step`` and ``run`` are for any thread but
    not for callbacks, and take turns; ``serve`` starts a thread that does it, until ``close``. One loop for a store.
    """

    def __init__(self, reuse: Reuse, active: int = 4, max_waiting: int = 1024) -> None:
        """At most ``max_waiting`` requests wait. Raises ``BadInput``."""
        for name, value in (("active", active), ("max_waiting", max_waiting)):
            _check_count(name, value)
        self._reuse, self._active = reuse, active
        self._queue = Queue(reuse, max_waiting)
        self._tempo = Tempo()
        self._counters = Counters()
        self._one = threading.Lock()  # held for a round; guards the fields below, and the tempo
        self._inside = 0  # the thread that has it
        self._running: dict[Request, Running] = {}
        self._serving = threading.Lock()  # guards the field below
        self._thread: threading.Thread | None = None

    # -- asking -------------------------------------------------------------------------------------------------------

    def submit(
        self,
        input_ids: Any,
        *,
        max_new_tokens: int,
        eos_token_id: int | Sequence[int] | None = None,
        priority: int = 0,
        deadline: float | None = None,
        tenant: str = "",
        owner: str = "",
        sampler: Sampler | None = None,
        on_token: Callable[[int], None] | None = None,
    ) -> Request:
        """Queues a prompt, and returns at once. Any thread.

        ``input_ids``: one prompt, flat or [1, tokens]. ``eos_token_id``: what ends an answer; None: the model's own.
        ``deadline``: seconds after which a request that still waits is refused. ``priority``: whose stored tokens get
        memory first; the order stays that of arrival. ``sampler``: chooses a token of (ids [1, tokens], logits
        [1, vocabulary], float32), or returns scores, as a ``LogitsProcessor`` does, of which the best is taken; without
        it the best of the model's. ``on_token``: is given each new token, in the thread that steps; what it or the
        sampler raises ends this request. Raises ``BadInput``, ``QueueFull``, and ``StoreClosed`` when the loop is.
        """
        model = base_model(self._reuse.model)
        prompts = read_prompts(input_ids, None, None, model.config.get_text_config(decoder=True).vocab_size)
        if not prompts.single:
            raise BadInput(f"a request is one prompt, but {len(prompts.rows)} were given; submit each alone")
        _check_count("max_new_tokens", max_new_tokens)
        name_bytes(owner, "owner")
        if eos_token_id is None:
            ends = set(generating.ends(model))
        else:
            ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)
        request = Request(prompts.rows[0], max_new_tokens, ends, priority, deadline, tenant, owner, sampler, on_token)
        request.leave = self._withdraw
        try:
            self._queue.add(request)
        except QueueFull:
            self._counters.add("requests_refused")
            raise
        return request

    def chat(self, messages: Sequence[dict[str, Any]], tokenizer: Any, **options: Any) -> Request:
        """``submit`` of a chat, put in words by the tokenizer's chat template. Any thread."""
        return self.submit(tokenizer.apply_chat_template(messages, add_generation_prompt=True), **options)

    @property
    def counters(self) -> dict[str, int]:
        """How many requests were done, failed, cancelled, late (past their deadline), refused (no room), unsaved."""
        return self._counters.snapshot()

    # -- answering ----------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """One round: the next waiting request is begun, if there is room, and then every running one says a token.

        Returns whether anything is left to do. What fails over one request ends that one; raises what else goes wrong.
        """
        with self._round():
            for request in self._queue.remove_late():
                waited = f"waited {request.waited:.3g} seconds, longer than its deadline of {request.deadline:.3g}"
                self._end(request, DeadlinePassed(f"the request {waited}; nothing of it was computed"))
            self._tell()
            if len(self._running) < self._active:
                self._admit()
            for request in list(self._running):
                started = time.perf_counter()
                self._advance(request)
                self._tempo.next(time.perf_counter() - started)
            return bool(self._running or len(self._queue))

    def run(self) -> None:
        """Steps until nothing is left."""
        while self.step():
            pass

    def serve(self) -> None:
        """Starts a thread that steps whenever there is something to do, until ``close``."""
        with self._serving:
            if self._queue.closed:
                raise StoreClosed("the loop is closed; make a new one")
            if self._thread is not None:
                raise BadInput("this loop serves already; one thread is enough")
            self._thread = threading.Thread(target=self._serve, name="kvstore-loop", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Ends what waits and what runs with ``Cancelled``; what was computed is saved. Any thread; callbacks may not.

        When it returns, nothing of the loop runs any more.
        """
        self._check_outside()
        for request in self._queue.close():
            self._end(request, Cancelled("the loop was closed while the request waited"))
        with self._serving:
            if self._thread is not None:
                self._thread.join()
        with self._round():
            for request in list(self._running):
                self._leave(request, Cancelled("the loop was closed before the answer was whole"))
            self._tell()

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- one round ----------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Begins the request that is next: what is stored of its prompt is loaded, the rest read."""
        request = self._queue.head()
        if request is None:
            return
        started = time.perf_counter()
        try:
            hit = self._reuse.load([request.token_ids], tenant=request.tenant)
        except BaseException as error:
            if self._queue.remove(request):
                self._fail(request, error)
            if not isinstance(error, FAILURES):
                raise
            return
        if not self._queue.remove(request):
            return  # it was cancelled meanwhile
        request.begin(hit)
        self._running[request] = Running(self._reuse.model, hit.forward_inputs, hit.cache)
        self._advance(request)
        self._tempo.first(time.perf_counter() - started)
        self._tell()  # now that the leases of this load have ended, there is room for more

    def _advance(self, request: Request) -> None:
        """One forward pass for a running request, and one token."""
        if request.stopping:
            return self._leave(request, Cancelled("the request was cancelled before its answer was whole"))
        try:
            failure = request.hear(self._running[request].read())
        except BaseException as error:  # what it left of the cache is of no use
            del self._running[request]
            self._fail(request, error)
            if not isinstance(error, FAILURES):
                raise
            return None
        if failure is not None or request.complete:
            return self._leave(request, failure)
        return self._running[request].say(request.token_ids[-1])

    def _leave(self, request: Request, error: BaseException | None) -> None:
        """A running request ends, and what was computed of it is saved."""
        cache = self._running.pop(request).cache
        try:
            self._reuse.save([request.token_ids], cache, tenant=request.tenant, owner=request.owner)
        except FAILURES as failure:
            log.warning("what was computed for a request could not be saved: %s", failure)
            self._counters.add("requests_unsaved")
        self._end(request, error)

    def _fail(self, request: Request, error: BaseException) -> None:
        interrupted = Cancelled(f"{type(error).__name__} came in the midst of this request")
        self._end(request, error if isinstance(error, Exception) else interrupted)

    def _withdraw(self, request: Request) -> None:
        if self._queue.remove(request):
            self._end(request, Cancelled("the request was cancelled while it waited"))

    def _end(self, request: Request, error: BaseException | None) -> None:
        self._counters.add(f"requests_{state_after(error)}")
        request.end(error)

    def _tell(self) -> None:
        self._queue.tell(self._tempo, [request.left for request in self._running], self._active)

    # -- threads ------------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while self._queue.wait(busy=bool(self._running)):
                self.step()
        except BaseException as error:
            reason = f"the loop has ended over another request: {type(error).__name__}: {error}"
            with self._round():
                for request in [*self._queue.close(), *self._running]:
                    self._end(request, Cancelled(reason))
                self._running.clear()
            raise

    @contextmanager
    def _round(self) -> Iterator[None]:
        self._check_outside()
        with self._one:
            self._inside = threading.get_ident()
            try:
                yield
            finally:
                self._inside = 0

    def _check_outside(self) -> None:
        if self._inside == threading.get_ident():
            raise BadInput("a request's own callback cannot step or close its loop; leave that to who made the loop")


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or value < 1:
        raise BadInput(f"{name}={value!r} must be a whole number of at least 1")
