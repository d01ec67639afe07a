"""What goes wrong beside the layers that are brought ahead costs time and never reaches the model."""

import threading
from typing import Any

import pytest
import torch
from gates import PATIENCE
from hf_models import build, prompt
from hf_runs import BLOCK, attach, go_on, in_memory, stored_prompt
from transformers import DynamicCache

import kvstore
from kvstore.adapters.transformers import Reuse, gather
from kvstore.adapters.transformers.rotation import Form
from kvstore.local import LocalStore
from kvstore.tensors.carrier import Carrier
from kvstore.tensors.streams import ThreadStream

LAYERS = 3
STORED, MORE = 70, 5


# -- two threads --------------------------------------------------------------------------------------------------


def test_a_table_that_grows_meanwhile_is_never_short_afterwards(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread makes something of the shorter table while another makes a longer one: the short one must not stay."""
    _, reuse = attach("llama", store)
    form = reuse._joined.attached.rotations[0].form
    assert form is not None
    long, short = 1 << 14, 1 << 13
    inside, go = threading.Event(), threading.Event()
    pairs = Form._pairs

    def held_up(self: Form, output: torch.Tensor) -> torch.Tensor:
        if threading.current_thread().name == "test-slow":
            inside.set()
            assert go.wait(PATIENCE)
        return pairs(self, output)

    monkeypatch.setattr(Form, "_pairs", held_up)
    slow = threading.Thread(target=form.upto, args=(short,), name="test-slow")
    slow.start()
    assert inside.wait(PATIENCE)
    assert form.upto(long).cos.shape[0] == long
    go.set()
    slow.join()
    assert form.upto(long).cos.shape[0] == long


@pytest.mark.parametrize("threads", [3])
def test_tables_that_grow_while_others_read_them(store: LocalStore, threads: int) -> None:
    _, reuse = attach("llama", store)
    form = reuse._joined.attached.rotations[0].form
    assert form is not None
    short: list[int] = []

    def work() -> None:
        for power in range(9, 17):
            for _ in range(30):
                if form.upto(1 << power).cos.shape[0] < 1 << power:
                    short.append(power)

    workers = [threading.Thread(target=work, name=f"test-{number}") for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert short == []


# -- what goes wrong beside it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [MemoryError, OSError, torch.OutOfMemoryError])
def test_no_memory_for_a_layer_never_reaches_the_model(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, error: type[Exception], seed: int
) -> None:
    model, reuse = attach("llama", store)
    ids, more = stored_prompt(model, reuse, STORED, seed), prompt(MORE, seed + 1)

    def none(*_: Any) -> Any:
        raise error("no memory")

    monkeypatch.setattr(gather, "empty", none)
    hit = reuse.load(torch.cat((ids, more), 1))
    with torch.no_grad():
        assert torch.equal(model(**hit.forward_inputs).logits, in_memory(model, ids, more))
    assert hit.cache.loaded.recomputed == LAYERS


def test_a_store_that_closes_between_tokens_never_reaches_the_model(seed: int) -> None:
    with kvstore.open(host="64MiB") as store:
        model, reuse = attach("llama", store)
        ids, more = stored_prompt(model, reuse, STORED, seed), prompt(MORE, seed + 1)
        hit = reuse.load(torch.cat((ids, more), 1))
        saved = reuse.load(ids)
        with torch.no_grad():
            model(**saved.forward_inputs)
        reuse.save(ids, saved.cache)  # to go on with
    with torch.no_grad():
        expected, tokens = go_on(model, DynamicCache(config=model.config), torch.cat((ids, more), 1), 2 * BLOCK)
        got, same = go_on(model, hit.cache, more, 2 * BLOCK)
        go_on(model, saved.cache, more, 1)
    assert torch.allclose(got[:, -1], expected[:, -1], atol=1e-3) and torch.equal(tokens, same)


def test_patience_begins_with_the_forward_pass(store: LocalStore, seed: int) -> None:
    """However long a hit lies about, waiting for layers is for whoever computes."""
    model = build("llama")
    reuse = Reuse(model, store, block_tokens=BLOCK, patience=0.0)
    ids = stored_prompt(model, reuse, STORED, seed)
    hit = reuse.load(torch.cat((ids, prompt(MORE, seed + 1)), 1))
    store.worker().record().wait()
    assert hit.cache.loaded._deadline is None


# -- what a device still reads ----------------------------------------------------------------------------------------


def test_seeds_hold_their_slots_until_the_engine_has_read_them(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """A block's first tokens are read in the engine's own stream, which the host may be far ahead of."""
    gate, streams, engine = threading.Event(), Carrier(torch.device("cpu")), ThreadStream("kvstore-test")
    try:
        with kvstore.open(host="64MiB", device="64MiB", device_name="cpu") as store:
            model, reuse = attach("llama", store)
            ids = stored_prompt(model, reuse, STORED, seed)
            reuse._joined.carrier = streams
            for held in (False, True):  # the second finds its blocks on the device
                hit = reuse.load(torch.cat((ids, prompt(MORE, seed + 1)), 1))
                if held:
                    assert hit.cached_by_tier["device"] == STORED
                    engine.run(lambda: none_of(gate.wait(PATIENCE)))
                    monkeypatch.setattr(gather, "current", lambda _: engine)
                with torch.no_grad():
                    model(**hit.forward_inputs)
                store.worker().record().wait()
                streams.turns.record().wait()
                assert (store.stats()["leases"] > 0) == held
            gate.set()
            engine.record().wait()
            assert store.stats()["leases"] == 0
            del hit
    finally:
        gate.set()
        streams.close()
        engine.close()


def none_of(_: object) -> None:
    """What work gives back."""
