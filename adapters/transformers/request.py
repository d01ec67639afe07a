"""One request to a model: what was asked, and what became of it."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch

from kvstore.adapters.transformers.hit import Hit
from kvstore.errors import BadInput, KVStoreError
from kvstore.keys import token_bytes
from kvstore.policies.split import Decision

State = Literal["waiting", "running", "done", "failed", "cancelled", "late"]
Sampler = Callable[[torch.Tensor, torch.Tensor], Any]


class QueueFull(KVStoreError):
    """As many requests wait as the loop takes; the message says how many. Come back later."""


class DeadlinePassed(KVStoreError):
    """The request waited for longer than its deadline, and was never begun."""


class Cancelled(KVStoreError):
    """The request was cancelled, or its loop was closed, before its answer was whole."""


class Figures(NamedTuple):
    """What the store had of a request's prompt; see ``Hit``."""

    cached_tokens: int
    cached_by_tier: dict[str, int]
    decision: Decision | None


@dataclass(eq=False, repr=False)
class Request:
    """A prompt that waits for its answer, gets it, or has it. ``Loop.submit`` makes one.

    ``result``, ``cancel`` and what can be read are for any thread; ``hear``, ``begin`` and ``end`` are the loop's.
    """

    token_ids: list[int]  # the prompt, and behind it what was said so far
    max_new_tokens: int
    ends: Collection[int] = ()  # tokens behind which nothing more is said
    priority: int = 0
    deadline: float | None = None  # seconds that it may wait
    tenant: str = ""
    owner: str = ""
    sampler: Sampler | None = None
    on_token: Callable[[int], None] | None = None
    state: State = field(default="waiting", init=False)
    ttft_seconds: float | None = field(default=None, init=False)  # from ``submit`` to the first token
    hit: Figures | None = field(default=None, init=False)  # from when it runs
    stopping: bool = field(default=False, init=False)  # it was cancelled; a running one stops before its next token
    leave: Callable[[Request], None] | None = field(default=None, init=False)  # ends it, if it still waits

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.token_ids)
        self.prompt = token_bytes(self.token_ids)
        self._since = time.perf_counter()
        self._over = threading.Event()
        self._error: BaseException | None = None

    @property
    def waited(self) -> float:
        """Seconds since it was made."""
        return time.perf_counter() - self._since

    @property
    def left(self) -> int:
        """How many tokens more may be said."""
        return self.max_new_tokens - (len(self.token_ids) - self.prompt_tokens)

    @property
    def complete(self) -> bool:
        """Whether all was said."""
        return not self.left or (len(self.token_ids) > self.prompt_tokens and self.token_ids[-1] in self.ends)

    def result(self, timeout: float | None = None) -> torch.Tensor:
        """The prompt and the answer as ``generate`` returns them, [1, tokens], on the CPU; waits for it.

        Somebody has to ``step``, ``run`` or ``serve`` meanwhile. Raises ``TimeoutError`` after so many seconds,
        ``DeadlinePassed``, ``Cancelled``, what the model or the store raised, or what a sampler or callback did.
        """
        if not self._over.wait(timeout):
            raise TimeoutError(f"no answer within {timeout} seconds; the request is still {self.state}")
        if self._error is not None:
            raise self._error
        return torch.tensor([self.token_ids])

    def cancel(self) -> bool:
        """Give it up: a waiting request leaves the queue at once, a running one stops before its next token, and what
        was computed of it is saved. False: it was over already."""
        if self._over.is_set():
            return False
        self.stopping = True
        if self.leave is not None:
            self.leave(self)
        return True

    # -- what the loop does with it -----------------------------------------------------------------------------------

    def begin(self, hit: Hit) -> None:
        """It runs, with this hit."""
        assert isinstance(hit.cached_tokens, int)  # one prompt, not a batch
        self.hit = Figures(hit.cached_tokens, hit.cached_by_tier, hit.decision)
        self.state = "running"

    def hear(self, logits: torch.Tensor) -> Exception | None:
        """The model's logits behind what was read, [vocabulary]: the next token is chosen, and the caller told of it.

        Returns what the caller's own functions raised.
        """
        try:
            token = self._chosen(logits)
            self.token_ids.append(token)
            if self.ttft_seconds is None:
                self.ttft_seconds = self.waited
            if self.on_token is not None:
                self.on_token(token)
        except Exception as error:  # theirs may raise anything, and it ends this request only
            return error
        return None

    def _chosen(self, logits: torch.Tensor) -> int:
        if self.sampler is None:
            return int(logits.argmax())
        ids = torch.tensor([self.token_ids], device=logits.device)
        picked = torch.as_tensor(self.sampler(ids, logits[None].to(torch.float32, copy=True)))
        token = int(picked if picked.numel() == 1 else picked.argmax())
        if not 0 <= token < logits.shape[0]:
            raise BadInput(f"the sampler chose token {token} of a vocabulary of {logits.shape[0]}; choose one of them")
        return token

    def end(self, error: BaseException | None = None) -> None:
        """It is over: the answer is whole, or this is why it is not. Once."""
        if error is not None and error.__traceback__ is not None:
            error.add_note("It was raised here:\n" + "".join(traceback.format_tb(error.__traceback__)))
            _let_go(error)
        self.state, self._error = state_after(error), error
        self._over.set()


def state_after(error: BaseException | None) -> State:
    """What a request is that ended so."""
    kinds: dict[type, State] = {type(None): "done", Cancelled: "cancelled", DeadlinePassed: "late"}
    return kinds.get(type(error), "failed")


def _let_go(error: BaseException | None) -> None:
    """Frames keep what they had in their hands, a cache and its leases, for as long as somebody keeps the error."""
    if error is not None and error.__traceback__ is not None:
        error.__traceback__ = None
        _let_go(error.__cause__)
        _let_go(error.__context__)
