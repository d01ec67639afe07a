"""A daemon's store for asyncio: the same verbs, awaited, while the loop goes on.

Calls run in a few threads of the client's own; each ends within the client's timeout, so a cancelled one does not stay.
What it had got is let go when it is dropped, like anything else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ParamSpec, TypeVar

from kvstore.composition import Composition
from kvstore.daemon.client import Client
from kvstore.erasure import Receipt
from kvstore.job import Answer, Job
from kvstore.keeper import Demoted, Pinned, Retained, TierName
from kvstore.keys import Namespace
from kvstore.kinds import PRE
from kvstore.layout import Layout, Shard
from kvstore.load import Load
from kvstore.match import Match
from kvstore.save import Draft, Saved
from kvstore.segments import Segment
from kvstore.writer import Durable

P = ParamSpec("P")
T = TypeVar("T")
THREADS = 8


class AsyncClient:
    """Made by ``await kvstore.aconnect(url)``; an asynchronous context manager. Belongs to one loop."""

    def __init__(self, client: Client, pool: ThreadPoolExecutor) -> None:
        self._client, self._pool = client, pool

    @classmethod
    async def connected(cls, connect: Callable[[], Client]) -> AsyncClient:
        """With what ``connect`` gives. Raises ``Unreachable``."""
        return cls(await asyncio.to_thread(connect), ThreadPoolExecutor(THREADS, "kvstore-async"))

    async def _run(self, call: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, partial(call, *arguments, **options))

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def match(
        self,
        namespace: Namespace,
        layout: Layout,
        token_ids: object,
        *,
        root: bytes | None = None,
        first: int = 0,
        whole: bool = False,
    ) -> Match:
        """See ``Store.match``."""
        call = partial(self._client.match, root=root, first=first, whole=whole)
        return await self._run(call, namespace, layout, token_ids)

    async def discover(self, namespace: Namespace, layout: Layout, token_ids: object, minimum: int) -> Composition:
        """See ``Store.discover``."""
        return await self._run(self._client.discover, namespace, layout, token_ids, minimum)

    async def load(self, match: Match, device: bool = False) -> Load:
        """See ``Store.load``."""
        return await self._run(self._client.load, match, device)

    async def layer(self, load: Load, layer: int, timeout: float | None = None) -> bool:
        """See ``Load.wait``."""
        return await self._run(load.wait, layer, timeout)

    async def read_into(self, load: Load, buffer: memoryview, timeout: float | None = None, check: bool = False) -> int:
        """See ``Load.read_into``."""
        return await self._run(load.read_into, buffer, timeout, check)

    async def schedule(self, waiting: Sequence[Job]) -> list[Answer]:
        """See ``Store.schedule``."""
        return await self._run(self._client.schedule, waiting)

    async def drafts(self, layout: Layout, count: int) -> list[Draft]:
        """See ``Store.drafts``."""
        return await self._run(self._client.drafts, layout, count)

    async def save(
        self,
        namespace: Namespace,
        layout: Layout,
        token_ids: object,
        drafts: Mapping[int, Draft],
        *,
        root: bytes | None = None,
        owner: str = "",
        ttl: float | None = None,
        writer: str = "",
        form: str = PRE,
        shard: Shard | None = None,
    ) -> Saved:
        """See ``Store.save``."""
        call = partial(self._client.save, root=root, owner=owner, ttl=ttl, writer=writer, form=form, shard=shard)
        return await self._run(call, namespace, layout, token_ids, drafts)

    async def durable(self, saved: Saved, timeout: float | None = None) -> Durable:
        """See ``Saved.wait``."""
        return await self._run(saved.wait, timeout)

    async def pin(self, match: Match, tier: TierName = "host", *, seconds: float) -> Pinned:
        """See ``Store.pin``."""
        return await self._run(partial(self._client.pin, seconds=seconds), match, tier)

    async def retain(self, match: Match, seconds: float) -> Retained:
        """See ``Store.retain``."""
        return await self._run(self._client.retain, match, seconds)

    async def demote(self, match: Match) -> Demoted:
        """See ``Store.demote``."""
        return await self._run(self._client.demote, match)

    async def forget(
        self,
        *,
        tenant: str | None = None,
        owner: str | None = None,
        older_than: float | None = None,
        match: Match | None = None,
    ) -> Receipt:
        """See ``Store.forget``."""
        call = partial(self._client.forget, tenant=tenant, owner=owner, older_than=older_than, match=match)
        return await self._run(call)

    async def stats(self) -> dict[str, Any]:
        """See ``Store.stats``."""
        return await self._run(self._client.stats)

    async def segments(self, limit: int = 100, tenant: str | None = None) -> list[Segment]:
        """See ``Store.segments``."""
        return await self._run(self._client.segments, limit, tenant)

    async def flush(self, timeout: float | None = None) -> bool:
        """See ``Store.flush``."""
        return await self._run(self._client.flush, timeout)

    async def ping(self) -> float:
        """Seconds that the daemon takes to answer. Raises ``Unreachable``."""
        return await self._run(self._client.ping)

    async def close(self) -> None:
        """Ends the session, and the threads. Again is no error."""
        await asyncio.to_thread(self._client.close)
        self._pool.shutdown(wait=False)
