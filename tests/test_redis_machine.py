"""Two stores that share blocks, against a set of what was saved, under any order of save, load, match, evict, forget,
and of what a remote tier may do: lose parts, damage them, fail for a while."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack

import hypothesis
import pytest
from blocks import load_all, namespace, recount, save, wrong
from gates import PATIENCE
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from remotes import GatedRemote, options, settled, sharing

from kvstore import LayerShape, Layout
from kvstore.local import LocalStore
from kvstore.match import Match
from kvstore.remote import breaker, seeker
from kvstore.remote.withdrawal import Withdrawal
from kvstore.tiers.naive_remote import NaiveRemote, Shelf
from kvstore.tiers.seal import HEADER_PART

LAYERS = Layout((LayerShape(1, 2, 2),) * 3, "uint8", block_tokens=4, alignment=512)  # two parts
SPACES = {tenant: namespace(tenant) for tenant in ("", "t")}
Block = tuple[str, tuple[int, ...]]  # tenant, all tokens up to its end

# Few of them, so that many have much in common.
chains = st.builds(
    lambda size, fork: [0] * min(size, fork) + [1] * (size - fork), st.integers(0, 22), st.integers(0, 22)
)
hosts, tenants, owners = st.integers(0, 1), st.sampled_from(sorted(SPACES)), st.sampled_from("ab")


class Machine(RuleBasedStateMachine):
    """``saved``: whose each block may be; a block may be found as long as it is there. ``honest``: nothing is lost, so
    full blocks that anybody saved must be found by everybody."""

    def __init__(self) -> None:
        super().__init__()
        self.saved: dict[Block, set[str]] = {}
        self.pins: list[tuple[LocalStore, Match, str, list[int]]] = []
        self.stack = ExitStack()

    @initialize(honest=st.booleans())
    def open(self, honest: bool) -> None:
        self.honest = honest
        self.shelf, how = Shelf(), options(part_bytes=1024)
        self.gates = [GatedRemote(NaiveRemote(self.shelf)) for _ in range(2)]
        self.stores = [self.stack.enter_context(sharing(gate, how, checked=False)) for gate in self.gates]

    def most(self, tenant: str, tokens: list[int]) -> int:
        """Leading tokens that anybody has saved, at most the last but one."""
        limit = max(len(tokens) - 1, 0)
        ends = [chain for space, chain in self.saved if space == tenant]
        done = 0
        while done + 4 <= limit and (tenant, tuple(tokens[: done + 4])) in self.saved:
            done += 4
        behind = [chain for chain in ends if done < len(chain) <= done + 4 and list(chain[:done]) == tokens[:done]]
        return max((_common(chain, tokens[:limit]) for chain in behind), default=done)

    def least(self, tenant: str, tokens: list[int]) -> int:
        """Tokens of full blocks that everybody must find."""
        return self.most(tenant, tokens) // 4 * 4 if self.honest else 0

    @rule(host=hosts, tenant=tenants, tokens=chains, owner=owners)
    def save(self, host: int, tenant: str, tokens: list[int], owner: str) -> None:
        store = self.stores[host]
        load_all(store, [*tokens, 0], SPACES[tenant], LAYERS)  # what is elsewhere comes here first, as to an engine
        saved = save(store, tokens, SPACES[tenant], LAYERS, owner=owner)
        assert store.flush(PATIENCE)
        for end in range(4, saved.tokens + 4, 4):
            self.saved.setdefault((tenant, tuple(tokens[: min(end, saved.tokens)])), set()).add(owner)

    @rule(host=hosts, tenant=tenants, tokens=chains)
    def load(self, host: int, tenant: str, tokens: list[int]) -> None:
        good = load_all(self.stores[host], tokens, SPACES[tenant], LAYERS)
        assert self.least(tenant, tokens) <= good <= self.most(tenant, tokens)

    @rule(host=hosts, tenant=tenants, tokens=chains)
    def pin(self, host: int, tenant: str, tokens: list[int]) -> None:
        match = self.stores[host].match(SPACES[tenant], LAYERS, tokens)
        assert self.least(tenant, tokens) <= match.tokens <= self.most(tenant, tokens)
        self.pins.append((self.stores[host], match, tenant, tokens))

    @precondition(lambda self: self.pins)
    @rule(data=st.data(), loads=st.booleans())
    def unpin(self, data: st.DataObject, loads: bool) -> None:
        store, match, tenant, tokens = self.pins.pop(data.draw(st.integers(0, len(self.pins) - 1)))
        if not loads:
            match.release()
            return
        load = store.load(match)
        assert wrong(load, tokens, SPACES[tenant]) == []
        load.release()

    @rule(host=hosts)
    def evict(self, host: int) -> None:
        """What nobody holds leaves memory; partial blocks are nowhere else."""
        store = self.stores[host]
        settled(store)
        residency = store._residency
        with residency.lock:
            residency.settle()
            for number in sorted(residency.residents, reverse=True):
                if number not in residency.index.leases:
                    residency.drop_host(number)

    @precondition(lambda self: not self.honest)
    @rule(owner=owners)
    def forget(self, owner: str) -> None:
        """Everywhere: what one host forgets, another that has it still may share again."""
        for store in self.stores:
            settled(store)
            assert store.flush(PATIENCE)  # or what is on its way is held
            receipt = store.forget(owner=owner)
            assert self.gates[0].fails or receipt.deferred == 0 or self.pins
        for block in [block for block, whose in self.saved.items() if owner in whose]:
            self.saved[block].discard(owner)
            if not self.saved[block]:
                del self.saved[block]

    @precondition(lambda self: not self.honest)
    @rule(one=st.integers(0, 1000))
    def lose(self, one: int) -> None:
        names = sorted(self.shelf.parts)
        if names:
            del self.shelf.parts[names[one % len(names)]]

    @precondition(lambda self: not self.honest)
    @rule(bit=st.integers(0, 31))
    def damage(self, bit: int) -> None:
        for name, part in self.shelf.parts.items():
            if name[1] != HEADER_PART:
                changed = bytearray(part)
                changed[bit // 8] ^= 1 << bit % 8
                self.shelf.parts[name] = bytes(changed)

    @precondition(lambda self: not self.honest)
    @rule(fails=st.booleans())
    def fail(self, fails: bool) -> None:
        for gate in self.gates:
            gate.fails = fails

    def teardown(self) -> None:
        for _, match, _, _ in self.pins:
            match.release()
        try:
            for store in getattr(self, "stores", ()):
                assert store.flush(PATIENCE)
                settled(store)
                assert recount(store) == []
                assert "failed_jobs" not in store.stats()["counters"]
                assert not store._residency.index.remote
        finally:
            self.stack.close()


def _common(chain: tuple[int, ...], tokens: list[int]) -> int:
    return next(
        (at for at, (a, b) in enumerate(zip(chain, tokens, strict=False)) if a != b), min(len(chain), len(tokens))
    )


def run(seed: int, examples: int, steps: int, phases: Collection[Phase] = tuple(Phase)) -> None:
    profile = settings(
        phases=phases,
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(hypothesis.seed(seed)(Machine), settings=profile)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is remembered to be missing, and a breaker that is open is tried at once."""
    monkeypatch.setattr(seeker, "MISSING_SECONDS", 0.0)
    monkeypatch.setattr(breaker, "FIRST", 0.0)
    monkeypatch.setattr(breaker, "GROWTH", 0.0)


def test_stores_that_share_are_a_set(seed: int) -> None:
    run(seed, examples=60, steps=25)


@pytest.mark.soak
def test_stores_that_share_are_a_set_for_long(seed: int) -> None:
    run(seed, examples=3000, steps=80)


PLANTED = {
    "what is forgotten stays with others": ("kvstore.remote.withdrawal.Withdrawal.run", lambda self, seconds=0.0: 0),
    "what is elsewhere stays known": ("kvstore.residency.Residency.drop_remote", lambda self, number: None),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_fault_is_found(planted: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Withdrawal.run.__defaults__  # what is replaced below has such a default, too
    monkeypatch.setattr(*PLANTED[planted])
    with pytest.raises((AssertionError, BaseExceptionGroup)):
        run(seed, examples=60, steps=25, phases=[Phase.generate])
