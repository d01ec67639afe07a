"""What a store holds, in numbers."""

from __future__ import annotations

from typing import Any

from kvstore.residency import Residency


def census(residency: Residency) -> dict[str, Any]:
    """Per tier ``bytes`` (payload), ``blocks``, ``capacity`` and ``used`` (all bytes taken); gauges; counters; leases.

    The device's blocks are copies of what other tiers hold. Any thread; takes the store's lock.
    """
    with residency.lock:
        residency.settle()
        tiers = {
            "host": {
                "bytes": residency.host_payload,
                "blocks": len(residency.residents),
                "capacity": residency.host.capacity,
                "used": residency.host.used,
            }
        }
        if residency.disk is not None:
            tiers["disk"] = {
                "bytes": residency.disk_payload,
                "blocks": len(residency.disk_policy),
                "capacity": residency.disk.capacity,
                "used": residency.disk.used,
            }
        gauges, hot = residency.host.gauges(), residency.hot
        if hot is not None:
            tiers["device"] = hot.account(residency.payload)
            gauges |= hot.tier.gauges()
        leases, drafts = len(residency.index.leases), residency.drafts
    counters = residency.counters.snapshot()
    if hot is not None:
        counters["device_evicted_blocks"] = hot.evicted_blocks
    return {"tiers": tiers, "gauges": gauges, "counters": counters, "leases": leases, "drafts": drafts}
