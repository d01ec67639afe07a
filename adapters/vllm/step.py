"""What the scheduler's half of the connector tells the workers' half of a step. It is pickled between processes."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata


@dataclass(frozen=True)
class Scope:
    """Whose tokens they are, and what else than the model their keys and values depend on."""

    tenant: str = ""
    adapter: str = "none"
    generation: int = 0  # goes up when the engine's weights are replaced


@dataclass(frozen=True)
class Part:
    """Tokens ``first`` to ``stop`` of a chain, the first of them at column ``column`` of the prompt."""

    token_ids: bytes  # of the chain up to ``stop``
    first: int
    stop: int
    column: int


@dataclass(frozen=True)
class Load:
    """Parts of a request's prompt, one behind the other, and the pages that they go to."""

    request: str
    scope: Scope
    parts: tuple[Part, ...]
    pages: tuple[int, ...]  # of the whole request, from its first token on
    within: bool  # the step itself waits for it, layer by layer


@dataclass(frozen=True)
class Save:
    """Blocks of a request whose tokens have been computed: those from token ``first`` on, to the end of the tokens."""

    request: str
    scope: Scope
    token_ids: bytes  # from the first of the request on
    first: int
    pages: tuple[int, ...]
    held: bool  # the engine keeps the pages until it is told that they were read
    prompt: int = 0  # leading tokens that are to be kept when they are stored
    retain: float = 0.0  # seconds in the store
    pin: float = 0.0  # seconds in memory


@dataclass
class Step(KVConnectorMetadata):
    """One step."""

    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    preempted: set[str] = field(default_factory=set)  # whose pages are somebody else's from this step on
