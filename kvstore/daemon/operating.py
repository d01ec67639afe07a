"""Verbs for operators: what the daemon is, what tenants may fill, and how that is changed.

The *operator* is who runs as the daemon's own user and is no named tenant. Everybody else sees nothing but what his own
tenant has.
"""

from __future__ import annotations

import os
import time

from kvstore.daemon.session import Session, Tenant
from kvstore.errors import BadInput
from kvstore.tiers.host import MIN_EXTENT, memory_limit


def is_operator(session: Session) -> bool:
    """Whether a client may see and change what belongs to all."""
    return session.peer.uid == os.getuid() and not session.tenant.name


def about(session: Session) -> object:
    """The daemon, the caller's own sessions, and the settings for the operator."""
    house, tenant, operator = session.house, session.tenant, is_operator(session)
    return {
        "version": house.about.get("version", ""),
        "epoch": house.epoch,
        "pid": os.getpid(),
        "uptime": time.monotonic() - house.started,
        "lease_ttl": house.ttl,
        "tenant": tenant.name,
        "operator": operator,
        "refused": house.refused if operator else 0,
        "sessions": [_session(one, session) for one in list(tenant.sessions)],
        "settings": dict(house.about) if operator else {},
    }


def _session(one: Session, asking: Session) -> dict[str, object]:
    leases, drafts, staged = one.held
    return {
        "id": one.number,
        "uid": one.peer.uid,
        "pid": one.peer.pid,
        "since": one.since,
        "leases": leases,
        "drafts": drafts,
        "staged_bytes": staged,
        "own": one is asking,
    }


def quotas(session: Session) -> object:
    """What each tenant may fill and fills, in bytes: of all for the operator, or else of the caller's own."""
    tenants = session.house.tenants.values() if is_operator(session) else [session.tenant]
    return [_quota(tenant) for tenant in list(tenants)]


def _quota(tenant: Tenant) -> dict[str, object]:
    tiers = tenant.store.stats()["tiers"]
    return {
        "tenant": tenant.name,
        "sessions": len(tenant.sessions),
        "host": {name: tiers["host"][name] for name in ("capacity", "used", "blocks")},
        "staging": {"capacity": tenant.staging.limit, "used": tenant.staging.used},
        "disk": {name: tiers["disk"][name] for name in ("capacity", "used", "blocks")} if "disk" in tiers else None,
    }


def resize(session: Session, name: str, host: int, timeout: float) -> object:
    """Gives a tenant another budget of host memory, of which its clients may be filling the same part as before.

    It holds until the daemon ends. See ``LocalStore.resize``."""
    tenants = session.house.tenants
    if not is_operator(session):
        raise BadInput("only the daemon's own user, as no named tenant, may change budgets")
    tenant = tenants.get(name)
    if tenant is None:
        raise BadInput(f"there is no tenant {name!r}; kvstore quota shows those that there are")
    others = sum(one.host.capacity + one.staging.limit for one in tenants.values() if one is not tenant)
    if host + others > memory_limit():
        raise BadInput(f"other tenants have {others} of the {memory_limit()} bytes of memory here; give less")
    staging = host * tenant.staging.limit // (tenant.host.capacity + tenant.staging.limit)
    if host - staging < MIN_EXTENT:
        raise BadInput(
            f"{host} bytes are too few; of them clients may be filling {staging}, and blocks need {MIN_EXTENT}"
        )
    tenant.store.resize(host - staging, timeout)
    tenant.staging.limit = staging
    for one in list(tenant.sessions):
        one.area.trim()
    return _quota(tenant)
