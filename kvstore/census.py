"""What a store holds, in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvstore.remote.tier import RemoteTier
from kvstore.residency import Residency


def census(residency: Residency, beside: Mapping[str, float], remote: RemoteTier | None = None) -> dict[str, Any]:
    """Per tier ``bytes`` (payload), ``blocks``, ``capacity`` and ``used`` (all bytes taken); gauges; counters; leases.

    The device's blocks are copies of what other tiers hold. ``kept``: bytes of slots that pins keep in each tier, and
    that are retained in the last. Two gauges tell what the disk is worth, since the store was opened:
    ``write_amplification``, bytes written to disk for each byte of payload that was saved (headers, padding and tails
    written anew make it more than 1, what is not admitted less), and ``read_back``, bytes read from disk for each byte
    written there. ``histograms``: see ``Uses.histograms``. ``beside``: more gauges. Any thread; takes the store's lock.
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
        gauges: dict[str, float] = {**residency.host.gauges(), **beside}
        if remote is not None:
            tiers["remote"] = remote.account()
            gauges.update(remote.gauges())
        hot = residency.hot
        if hot is not None:
            tiers["device"] = hot.account(residency.payload)
            gauges.update(hot.tier.gauges())
        leases, drafts, keeping = len(residency.index.leases), residency.drafts, residency.keeping
        pinned = {tier: account.bytes for tier, account in keeping.pins.items()}
        kept = {"pinned_bytes": pinned, "retained_bytes": keeping.retained.bytes}
        histograms, saved_seconds = residency.uses.histograms(), residency.uses.saved_seconds
    counters = residency.counters.snapshot()
    saved, written, read = (counters.get(name, 0) for name in ("saved_bytes", "disk_written_bytes", "disk_read_bytes"))
    gauges |= {"write_amplification": _ratio(written, saved), "read_back": _ratio(read, written)}
    if hot is not None:
        counters["device_evicted_blocks"] = hot.evicted_blocks
    if remote is not None:
        counters.update(remote.counters())
    totals: dict[str, float] = {**counters, "saved_prefill_seconds": saved_seconds}
    numbers = {"tiers": tiers, "gauges": gauges, "counters": totals, "kept": kept, "histograms": histograms}
    return {**numbers, "leases": leases, "drafts": drafts}


def _ratio(of: int, to: int) -> float:
    return of / to if to else 0.0
