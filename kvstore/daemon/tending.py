"""Verbs that keep, let go, count and check."""

from __future__ import annotations

from dataclasses import asdict

from kvstore.daemon.session import Session
from kvstore.errors import BadInput

MAX_NOTE = 64 << 10
OURS = ("policies/", "namespace")  # notes that the store keeps for itself


def ping(session: Session) -> object:
    """Nothing."""
    return None


def pin(session: Session, number: int, tier: str, seconds: float) -> object:
    """See ``Store.pin``; and the number by which ``unpin`` knows it."""
    pinned = session.store.pin(session.match(number), tier, seconds=seconds)  # type: ignore[arg-type]
    return [session.pin(pinned), pinned.tier, pinned.asked, pinned.tokens, pinned.seconds, pinned.until, pinned.why]


def unpin(session: Session, number: int) -> None:
    """See ``Pinned.release``."""
    pinned = session.pins.pop(number, None)
    if pinned is not None:
        pinned.release()


def retain(session: Session, number: int, seconds: float) -> object:
    """See ``Store.retain``."""
    kept = session.store.retain(session.match(number), seconds)
    return [kept.asked, kept.tokens, kept.until, kept.why]


def demote(session: Session, number: int) -> object:
    """See ``Store.demote``."""
    demoted = session.store.demote(session.match(number))
    session.release(number, 0)
    return [demoted.asked, demoted.bytes, demoted.later]


def forget(
    session: Session, tenant: str | None, owner: str | None, older_than: float | None, number: int | None
) -> object:
    """See ``Store.forget``."""
    found = None if number is None else session.match(number)
    receipt = session.store.forget(tenant=tenant, owner=owner, older_than=older_than, match=found)
    return [receipt.blocks, receipt.bytes, receipt.deferred]


def stats(session: Session) -> object:
    """See ``Store.stats``; drafts are those of all clients of the tenant."""
    found = session.store.stats()
    found["drafts"] += sum(each.area.count for each in session.tenant.sessions)
    return found


def segments(session: Session, limit: int, tenant: str | None) -> object:
    """See ``Store.segments``."""
    return [asdict(segment) for segment in session.store.segments(limit, tenant)]


def pin_segment(session: Session, id: str, tier: str, seconds: float) -> object:
    """See ``LocalStore.segment``, and ``Store.pin``."""
    found = session.store.segment(id)
    try:
        pinned = session.store.pin(found, tier, seconds=seconds)  # type: ignore[arg-type]
    finally:
        found.release()
    return [pinned.tier, pinned.asked, pinned.tokens, pinned.seconds, pinned.until, pinned.why]


def forget_segment(
    session: Session, id: str, tenant: str | None, owner: str | None, older_than: float | None
) -> object:
    """See ``LocalStore.segment``, and ``Store.forget``."""
    found = session.store.segment(id)
    try:
        receipt = session.store.forget(tenant=tenant, owner=owner, older_than=older_than, match=found)
    finally:
        found.release()
    return [receipt.blocks, receipt.bytes, receipt.deferred]


def remember(session: Session, name: str, value: str) -> None:
    """See ``Store.remember``."""
    if len(name) + len(value) > MAX_NOTE or name.startswith(OURS):
        raise BadInput(f"a note has {MAX_NOTE} bytes at most, and a name of its own")
    session.store.remember(name, value)


def recall(session: Session, name: str) -> object:
    """See ``Store.recall``."""
    return session.store.recall(name)


def verify(session: Session) -> object:
    """See ``Store.verify``."""
    return [[problem.address, problem.key, problem.what] for problem in session.store.verify()]


def flush(session: Session, timeout: float | None) -> object:
    """See ``Store.flush``."""
    return session.store.flush(timeout)
