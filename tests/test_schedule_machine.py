"""The store against a dict once more, with hints at any moment: they change what is where, never what is found."""

from __future__ import annotations

import test_state_machine
from gates import fetches_are_over
from hypothesis import strategies as st
from hypothesis.stateful import rule
from queues import nobody_waits
from test_state_machine import SPACES, run, tenants, tokens_of_a_chain

from kvstore import Job

waiting = st.lists(st.tuples(tenants, tokens_of_a_chain, st.integers(0, 1)), max_size=6)


class Machine(test_state_machine.Machine):
    """Jobs wait, leave, come back and are loaded, or not."""

    @rule(queue=waiting, settled=st.booleans())
    def schedule(self, queue: list[tuple[str, list[int], int]], settled: bool) -> None:
        jobs = [
            Job((tenant, number), namespace=SPACES[tenant], layout=self.layout, token_ids=tokens, priority=priority)
            for number, (tenant, tokens, priority) in enumerate(queue)
        ]
        for answer, (tenant, tokens, _) in zip(self.live.schedule(jobs), queue, strict=True):
            expected = self.model.match(tenant, tokens)
            assert answer.tokens == expected if self.exact else answer.tokens <= expected
            assert (answer.state == "unknown") == (answer.tokens == 0)
        if settled:
            fetches_are_over(self.live)

    def check_accounts(self) -> None:
        nobody_waits(self.live)
        super().check_accounts()


def test_the_store_is_a_dict_with_hints_too(seed: int) -> None:
    run(seed, examples=40, steps=30, machine=Machine)
