"""The store against a dict, under any order of open, save, load, match, pin, forget, evict, close and crash."""

from __future__ import annotations

import os
import shutil
import tempfile
from array import array
from collections.abc import Collection
from pathlib import Path

import hypothesis
import pytest
from blocks import fill, load_all, marks, namespace, recount, wrong
from gates import only_on_disk
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

import kvstore
from kvstore import LayerShape, Layout
from kvstore.files import OsFiles
from kvstore.index import Index
from kvstore.local import LocalStore
from kvstore.match import Match
from kvstore.residency import Residency

TINY = Layout((LayerShape(1, 2, 2),), "uint8", block_tokens=4, alignment=512)  # everything has room
BIG = Layout((LayerShape(2, 2048, 1024),) * 2, "float32", block_tokens=4)  # five in memory, twenty on disk
SPACES = {tenant: namespace(tenant) for tenant in ("", "t")}
Block = tuple[str, tuple[int, ...], tuple[int, ...]]  # tenant, tokens before it, its own

tokens_of_a_chain = st.lists(st.integers(0, 2), max_size=22)
tenants, owners = st.sampled_from(sorted(SPACES)), st.sampled_from("abc")


class Model:
    """What a store with room for everything holds: each block's owner."""

    def __init__(self) -> None:
        self.owner: dict[Block, str] = {}
        self.gone: set[Block] = set()  # superseded: a crash may bring them back

    def save(self, tenant: str, tokens: list[int], owner: str) -> None:
        for start in range(0, len(tokens), 4):
            before, own = tuple(tokens[:start]), tuple(tokens[start : start + 4])
            siblings = self.siblings(tenant, before)
            if own in siblings or (len(own) < 4 and any(other[: len(own)] == own for other in siblings)):
                continue
            for other in siblings:
                if own[: len(other)] == other:
                    del self.owner[tenant, before, other]
                    self.gone.add((tenant, before, other))
            self.owner[tenant, before, own] = owner

    def siblings(self, tenant: str, before: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [own for space, above, own in self.owner if (space, above) == (tenant, before)]

    def match(self, tenant: str, tokens: list[int]) -> int:
        limit, done = max(len(tokens) - 1, 0), 0
        while done + 4 <= limit and (tenant, tuple(tokens[:done]), tuple(tokens[done : done + 4])) in self.owner:
            done += 4
        rest = tuple(tokens[done:limit])
        siblings = self.siblings(tenant, tuple(tokens[:done]))
        return done + max((_common(rest, own) for own in siblings), default=0)

    def forget(self, tenant: str | None, owner: str | None, kept: bool) -> int:
        """``kept``: some were being written, and a crash may still bring them back."""
        going = [b for b, o in self.owner.items() if (tenant in (None, b[0])) and (owner in (None, o))]
        for block in going:
            del self.owner[block]
        self.gone = self.gone | set(going) if kept else set()
        return len(going)

    def prune(self) -> None:
        """A restart lets go of what nothing reaches."""
        for space, before, own in sorted(self.owner, key=lambda block: len(block[1])):
            if before and (space, before[:-4], before[-4:]) not in self.owner:
                del self.owner[space, before, own]


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Machine(RuleBasedStateMachine):
    """One store at a time. ``exact``: there is room for everything, so matches are as long as the model's."""

    def __init__(self) -> None:
        super().__init__()
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # thousands of syncs
        self.root = Path(tempfile.mkdtemp(prefix="kvstore-machine-", dir=memory))
        self.crashes = 0
        self.model = Model()
        self.pins: list[tuple[Match, str, list[int]]] = []
        self.store: LocalStore | None = None

    @initialize(exact=st.booleans(), disk=st.sampled_from([True, True, False]), portable=st.booleans())
    def begin(self, exact: bool, disk: bool, portable: bool) -> None:
        self.exact, self.disk, self.files = exact, disk, OsFiles(portable)
        self.layout = TINY if exact else BIG
        self.store = self.opened()

    def opened(self) -> LocalStore:
        host, disk = ("4MiB", "32MiB") if self.exact else ("1MiB", "6MiB")
        path = self.root / f"cache{self.crashes}" if self.disk else None
        return kvstore.open(path, host=host, disk=disk, files=self.files)

    @property
    def live(self) -> LocalStore:
        assert self.store is not None
        return self.store

    @rule(tenant=tenants, tokens=tokens_of_a_chain, owner=owners, waits=st.booleans())
    def save(self, tenant: str, tokens: list[int], owner: str, waits: bool) -> None:
        space, every, drafts = SPACES[tenant], marks(SPACES[tenant], tokens), {}
        first = self.live.match(space, self.layout, [*tokens, 9]).tokens // 4
        for block in range(first, -(-len(tokens) // 4)):
            draft = self.live.draft(self.layout)
            if draft is None:
                break
            fill(draft, every[block * 4 : block * 4 + 4])
            drafts[block] = draft
        saved = self.live.save(space, self.layout, tokens, drafts, owner=owner)
        self.model.save(tenant, tokens, owner)
        if self.exact:
            assert saved.tokens == len(tokens)
        if waits:
            durable = saved.wait()
            assert durable.tokens <= saved.tokens
            if self.exact and self.disk:
                assert durable.tokens == len(tokens)

    @rule(tenant=tenants, tokens=tokens_of_a_chain)
    def load(self, tenant: str, tokens: list[int]) -> None:
        good = load_all(self.live, tokens, SPACES[tenant], self.layout)
        expected = self.model.match(tenant, tokens)
        assert good == expected if self.exact else good <= expected

    @rule(tenant=tenants, tokens=tokens_of_a_chain)
    def pin(self, tenant: str, tokens: list[int]) -> None:
        match = self.live.match(SPACES[tenant], self.layout, tokens)
        expected = self.model.match(tenant, tokens)
        assert match.tokens == expected if self.exact else match.tokens <= expected
        self.pins.append((match, tenant, tokens))

    @precondition(lambda self: self.pins)
    @rule(data=st.data(), released=st.booleans())
    def unpin(self, data: st.DataObject, released: bool) -> None:
        match, tenant, tokens = self.pins.pop(data.draw(st.integers(0, len(self.pins) - 1)))
        load = self.live.load(match)
        assert wrong(load, tokens, SPACES[tenant]) == []
        if released:
            load.release()

    @rule(tenant=st.one_of(st.none(), tenants), owner=owners)
    def forget(self, tenant: str | None, owner: str | None) -> None:
        receipt = self.live.forget(tenant=tenant, owner=owner)
        expected = self.model.forget(tenant, owner, kept=bool(receipt.deferred))
        assert receipt.blocks == expected if self.exact else receipt.blocks <= expected

    @rule()
    def evict(self) -> None:
        if self.disk:
            only_on_disk(self.live)

    @rule()
    def reopen(self) -> None:
        self.end_pins()
        self.check_accounts()
        self.live.close()
        self.store = self.opened()
        if self.disk:
            self.model.prune()
        else:
            self.model = Model()

    @precondition(lambda self: self.disk)
    @rule()
    def crash(self) -> None:
        """The files as they are with no more than what runs: as after SIGKILL."""
        self.end_pins()
        self.live._mover.close()
        before = self.root / f"cache{self.crashes}"
        self.crashes += 1
        shutil.copytree(before, self.root / f"cache{self.crashes}")
        self.live._writer.abort()  # or closing would wait for writes that no worker does
        self.live.close()
        shutil.rmtree(before)
        self.store = self.opened()
        found = self.blocks_of(self.live)
        unknown = found.keys() - self.model.owner.keys() - self.model.gone
        assert not unknown, f"nobody saved {unknown}, or somebody had them forgotten"
        self.model.owner = found

    @staticmethod
    def blocks_of(store: LocalStore) -> dict[Block, str]:
        index, found = store._residency.index, {}
        for number in index.number.values():
            chain = [array("I", index.tokens_of(n)).tolist() for n in index.chain(number)]
            before = tuple(token for block in chain[:-1] for token in block)
            kind = index.kind_of(number)
            found[kind.tenant, before, tuple(chain[-1])] = kind.owner
        return found

    def end_pins(self) -> None:
        for match, _, _ in self.pins:
            match.release()
        self.pins.clear()

    def check_accounts(self) -> None:
        self.live.flush()
        assert recount(self.live) == []
        assert self.live.verify() == []
        assert "failed_jobs" not in self.live.stats()["counters"]

    def teardown(self) -> None:
        self.end_pins()
        try:
            if self.store is not None:
                self.check_accounts()
        finally:
            if self.store is not None:
                self.store.close()
            shutil.rmtree(self.root)


def run(
    seed: int,
    examples: int,
    steps: int,
    phases: Collection[Phase] = tuple(Phase),
    machine: type[RuleBasedStateMachine] = Machine,
) -> None:
    profile = settings(
        phases=phases,
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(hypothesis.seed(seed)(machine), settings=profile)


def test_the_store_is_a_dict(seed: int) -> None:
    run(seed, examples=60, steps=30)


@pytest.mark.soak
def test_the_store_is_a_dict_for_long(seed: int) -> None:
    run(seed, examples=5000, steps=100)


def _keeps(residency: Residency, number: int, erase: bool) -> bool:
    return False


def _never(index: Index, number: int) -> None:
    return None


PLANTED = {
    "a forgotten block stays": (Residency, "doom", _keeps),
    "a lease is never ended": (Residency, "lease_ended", lambda residency, numbers: None),
    "absent numbers are never swept": (Index, "sweep", _never),
    "a partial match counts one token more": (
        Index,
        "best_child",
        lambda index, parent, tokens, now: next(((c, 1) for c in index.families.children(parent)), (-1, 0)),
    ),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_fault_is_found(planted: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*PLANTED[planted])
    with pytest.raises((AssertionError, BaseExceptionGroup)):
        run(seed, examples=50, steps=20, phases=[Phase.generate])
