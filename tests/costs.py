"""What tests of costs share: a machine whose passes take what a formula says, and costs that were learned from it."""

from __future__ import annotations

from kvstore.policies.cost import Costs

TRUE = (0.02, 2e-3, 3e-7, 3e-7)


def prefill(base: float, token: float, alone: float, behind: float, rows: int, new: int, cached: int) -> float:
    """Seconds of a pass, as the model has it."""
    pairs = behind * new * (cached + new) if cached else alone * new * new / 2
    return base + rows * (token * new + pairs)


def known_costs(true: tuple[float, float, float, float] = TRUE) -> Costs:
    """Costs that were learned without noise."""
    costs = Costs()
    for _ in range(4):
        for new in (1, 50, 500, 1000, 2000, 4000):
            for cached in (0, 100, 1000, 4000):
                costs.prefill.took(1, new, cached, prefill(*true, 1, new, cached))
    return costs
