"""What a daemon shows to people and to machines, over HTTP: a page, metrics, health.

There are two listeners. ``http`` is for this machine only, and names tenants. ``health`` may stand at any address: it
says whether the daemon lives and serves, and nothing else. Neither changes anything. Answers are made by two threads,
apart from the daemon's own loop; ``/livez`` needs neither.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import cache
from http import HTTPStatus
from pathlib import Path
from typing import Any

from kvstore.daemon.listener import Listener, Reply, Request
from kvstore.daemon.metrics import CONTENT_TYPE, exposition
from kvstore.daemon.trend import EVERY, Trend
from kvstore.daemon.watched import Watched
from kvstore.errors import BadInput, KVStoreError, StoreClosed
from kvstore.segments import Segment
from kvstore.settings.address import Address
from kvstore.store import Store

WORKERS = 2
QUEUED = 16  # answers that are wanted at once, at most
ANSWER_SECONDS = 20.0
SEGMENTS = 20  # that the page shows
MOST_SEGMENTS = 1000
REST = 10  # times as long as it took to look through the stores, they are left alone afterwards, and at least:
REST_SECONDS = 2.0
LOCAL_NAMES = {"localhost", "127.0.0.1", "[::1]"}

Page = Callable[[Request], Reply]


class Monitor:
    """Serves from ``start`` to ``close``, in threads of its own."""

    def __init__(
        self, watched: Watched, http: Address | None, health: Address | None, version: str, every: float = EVERY
    ) -> None:
        """``http`` and ``health``: where to listen, None for not at all. ``every``: seconds between samples of the
        history. Raises ``BadInput`` for an ``http`` that others than this machine reach."""
        self._watched, self._version, self._every = watched, version, every
        self._wanted = {"http": http, "health": health}
        if http is not None and not http.loopback:
            raise BadInput(f'http="{http}" is reached from outside; give a loopback address such as 127.0.0.1:9410')
        self.addresses: dict[str, tuple[str, int]] = {}  # "http" and "health", once they listen
        self._trend = Trend()
        self._listed: tuple[float, int, list[dict[str, Any]]] = (0.0, 0, [])  # until when, limit, segments
        self._pool = ThreadPoolExecutor(WORKERS, "kvstore-http-answer")
        self._queued = 0  # belongs to the loop
        self._thread = threading.Thread(target=self._run, name="kvstore-http", daemon=True)
        self._started = Future[None]()
        self._stop: Callable[[], None] = lambda: None
        self._pages: dict[str, Page] = {
            "/": self._page,
            "/metrics": self._metrics,
            "/healthz": self._healthz,
            "/api/status": self._status,
            "/api/segments": self._segments,
            "/api/history": self._history,
        }

    def start(self) -> None:
        """Listens from now on. Raises ``BadInput`` when an address cannot be had."""
        self._thread.start()
        try:
            self._started.result()
        except (OSError, UnicodeError) as error:
            self.close()
            raise BadInput(f"the address to listen at cannot be had: {error}; give another") from error

    def close(self) -> None:
        """Ends all connections and threads. Again is no error."""
        self._stop()
        if self._thread.ident is not None:
            self._thread.join()
        self._pool.shutdown(cancel_futures=True)

    # -- in the loop --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        loop, over = asyncio.get_running_loop(), asyncio.Event()
        listeners = {"http": Listener(self._local), "health": Listener(self._anywhere)}
        try:
            for name, wanted in self._wanted.items():
                if wanted is not None:
                    host = "127.0.0.1" if wanted.host == "localhost" else wanted.host
                    self.addresses[name] = await listeners[name].open(host, wanted.port)
        except (OSError, UnicodeError) as error:
            for listener in listeners.values():
                await listener.close()
            self._started.set_exception(error)
            return

        def stop() -> None:
            loop.call_soon_threadsafe(over.set)

        self._stop = stop
        self._started.set_result(None)
        sampling = loop.create_task(self._sample()) if self._wanted["http"] is not None else None
        await over.wait()
        self._stop = lambda: None
        for listener in listeners.values():
            await listener.close()
        if sampling is not None:
            sampling.cancel()

    async def _sample(self) -> None:
        while True:
            await self._asked(lambda: self._trend.take(time.time(), self._stats().values()))
            await asyncio.sleep(self._every)

    async def _local(self, request: Request) -> Reply:
        """What this machine sees. Names that lead here by others' word (DNS rebinding) are not ours."""
        name, port = request.host.lower(), self.addresses["http"][1]
        if name not in LOCAL_NAMES and name not in {f"{local}:{port}" for local in LOCAL_NAMES}:
            return Reply(HTTPStatus.MISDIRECTED_REQUEST, b"ask for 127.0.0.1 or localhost\n")
        page = self._pages.get(request.path)
        if page is None:
            return await self._anywhere(request)
        return await self._asked(lambda: page(request)) or _UNANSWERED

    async def _anywhere(self, request: Request) -> Reply:
        """What everybody may see: nobody's name."""
        if request.path == "/livez":
            return Reply(HTTPStatus.OK, b"alive\n")
        if request.path == "/readyz":
            return await self._asked(self._readyz) or _UNANSWERED
        return Reply(HTTPStatus.NOT_FOUND, b"there is no such page\n")

    async def _asked(self, ask: Callable[[], Reply | None]) -> Reply | None:
        """What a thread of the pool makes of it; None when it takes too long, or the stores are closed meanwhile."""
        if self._queued >= QUEUED:
            return None
        self._queued += 1
        future = asyncio.get_running_loop().run_in_executor(self._pool, ask)
        future.add_done_callback(self._answered)
        try:
            return await asyncio.wait_for(asyncio.shield(future), ANSWER_SECONDS)
        except (TimeoutError, KVStoreError):
            return None

    def _answered(self, future: Awaitable[Reply | None]) -> None:
        self._queued -= 1

    # -- in the pool's threads ----------------------------------------------------------------------------------------

    def _readyz(self) -> Reply:
        ready = not self._watched.ready()
        return Reply(HTTPStatus.OK, b"ready\n") if ready else Reply(HTTPStatus.SERVICE_UNAVAILABLE, b"not ready\n")

    def _healthz(self, request: Request) -> Reply:
        why = self._watched.ready()
        return Reply(HTTPStatus.SERVICE_UNAVAILABLE, f"{why}\n".encode()) if why else Reply(HTTPStatus.OK, b"ok\n")

    def _page(self, request: Request) -> Reply:
        text, policy = _page()
        return Reply(HTTPStatus.OK, text, "text/html; charset=utf-8", {"Content-Security-Policy": policy})

    def _metrics(self, request: Request) -> Reply:
        return Reply(HTTPStatus.OK, exposition(self._version, self._stats(), self._watched), CONTENT_TYPE)

    def _status(self, request: Request) -> Reply:
        watched = self._watched
        return _json(
            {
                "version": self._version,
                "now": time.time(),
                "uptime": watched.uptime(),
                "not_ready": watched.ready(),
                "tenants": self._stats(),
                "sessions": [asdict(session) for session in watched.sessions()],
                "failures": [{"at": at, "what": what} for at, what in watched.failures()],
            }
        )

    def _history(self, request: Request) -> Reply:
        try:
            since = float(request.query.get("since", 0.0))
        except ValueError:
            return _refused("since is to be a time in Unix seconds")
        return _json(self._trend.since(since))

    def _segments(self, request: Request) -> Reply:
        limit = request.query.get("limit", str(SEGMENTS))
        if not re.fullmatch(r"[1-9]\d{0,3}", limit) or int(limit) > MOST_SEGMENTS:
            return _refused(f"limit is to be a number from 1 to {MOST_SEGMENTS}")
        until, listed, segments = self._listed
        begin = time.monotonic()
        if begin >= until or listed != int(limit):
            found: list[tuple[str, Segment]] = []
            for tenant, store in self._stores():
                with contextlib.suppress(StoreClosed):
                    found += ((tenant, segment) for segment in store.segments(int(limit)))
            found.sort(key=lambda pair: _rank(pair[1]), reverse=True)
            segments = [{"store": tenant, **asdict(segment)} for tenant, segment in found[: int(limit)]]
            rest = max(REST * (time.monotonic() - begin), REST_SECONDS)
            self._listed = (time.monotonic() + rest, int(limit), segments)
        return _json({"segments": segments})

    def _stores(self) -> list[tuple[str, Store]]:
        return list(dict(self._watched.stores).items())

    def _stats(self) -> dict[str, Any]:
        stats = {}
        for tenant, store in self._stores():
            with contextlib.suppress(StoreClosed):  # a tenant that leaves
                stats[tenant] = store.stats()
        return stats


_UNANSWERED = Reply(HTTPStatus.SERVICE_UNAVAILABLE, b"there is no answer now; ask again\n")


def _rank(segment: Segment) -> tuple[float, ...]:
    return segment.served, segment.last_use, segment.tokens


def _json(value: object) -> Reply:
    return Reply(HTTPStatus.OK, json.dumps(value, separators=(",", ":")).encode(), "application/json")


def _refused(why: str) -> Reply:
    return Reply(HTTPStatus.BAD_REQUEST, f"{why}\n".encode())


@cache
def _page() -> tuple[bytes, str]:
    """The page, and the policy that lets nothing but its own script and style run."""
    text = Path(__file__).with_name("page.html").read_bytes()
    hashes = {
        tag: base64.b64encode(hashlib.sha256(re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), text, re.S)[0]).digest())
        for tag in ("script", "style")
    }
    policy = "; ".join(
        [
            "default-src 'none'",
            *(f"{tag}-src 'sha256-{digest.decode()}'" for tag, digest in hashes.items()),
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )
    return text, policy
