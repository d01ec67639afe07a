"""Saved keys and values are what the projection gave, and going on from them is going on from memory, bit for bit."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import DTYPES, FAMILIES, build, prompt
from hf_runs import BLOCK, CASES, FIRST, SECOND, first_turn, go_on, second_turn
from safetensors.torch import load_file

import kvstore
from kvstore import Namespace
from kvstore.adapters.transformers import Reuse
from kvstore.local import LocalStore

FAULTS = ("one position off", "a block of another prompt", "a block of noise")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Both processes add in the same order, and the machine's other cores stay free."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def store() -> Iterator[LocalStore]:
    with kvstore.open(host="64MiB") as store:
        yield store


def test_a_new_process_goes_on_from_disk_bit_for_bit(tmp_path: Path) -> None:
    expected = {}
    with kvstore.open(tmp_path / "cache", host="64MiB", disk="256MiB") as store:
        for number, (family, dtype, attention) in enumerate(CASES):
            model = build(family, dtype, attention, seed=number)
            reuse = Reuse(model, store, block_tokens=BLOCK)
            ids, hit, memory = first_turn(model, reuse, number)
            assert reuse.save(ids, hit.cache).wait().tokens == FIRST
            expected[f"{family}-{dtype}-{attention}"] = go_on(model, memory, prompt(SECOND, number + 1))
    results = tmp_path / "results.safetensors"
    script = Path(__file__).parent / "hf_runs.py"
    subprocess.run([sys.executable, str(script), str(tmp_path / "cache"), str(results)], check=True, timeout=150)
    found = load_file(results)
    for name, (logits, tokens) in expected.items():
        assert found[f"{name}.cached"].item() == FIRST, name
        assert torch.equal(found[f"{name}.logits"], logits), name
        assert torch.equal(found[f"{name}.tokens"], tokens), name


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_planted_faults_change_logits_and_tokens(store: LocalStore, family: str, fault: str, seed: int) -> None:
    """The negative control of the test above: the same comparison, on stored keys that are a little wrong."""
    model = build(family)
    reuse = Reuse(model, store, block_tokens=BLOCK)
    _, other, _ = first_turn(model, reuse, seed + 1)
    ids, hit, memory = first_turn(model, reuse, seed)
    plant(fault, hit.cache.recorder.rows[0], other.cache.recorder.rows[0])
    reuse.save(ids, hit.cache)
    cached, logits, tokens = second_turn(model, reuse, ids, seed)
    expected_logits, expected_tokens = go_on(model, memory, prompt(SECOND, seed + 1))
    assert cached == FIRST
    assert not torch.equal(logits, expected_logits)
    assert not torch.equal(tokens, expected_tokens)


def plant(fault: str, row: Any, other: Any) -> None:
    """Damage what is about to be saved. The block in the middle is in every window."""
    for number, block in row._blocks.items():
        for layer, keys in enumerate(block.keys):
            if fault == "one position off":
                keys.copy_(keys.roll(1, dims=1))
            elif number != 1:
                continue
            elif fault == "a block of noise":
                keys.normal_(generator=torch.Generator().manual_seed(layer))
            else:
                keys.copy_(other._blocks[number].keys[layer])
                block.values[layer].copy_(other._blocks[number].values[layer])


def projections(model: Any) -> Iterator[tuple[Any, Any]]:
    """Of each layer that is stored, the modules whose outputs are keys and values before rotation."""
    plan = getattr(model.config, "layer_plan", None)
    for number, layer in enumerate(model.get_decoder().layers):
        attention = layer.self_attn if hasattr(layer, "self_attn") else layer.attention
        if plan is not None and number not in plan.stored:
            continue
        if hasattr(attention, "kv_a_proj_with_mqa"):
            yield attention.kv_a_proj_with_mqa, attention.kv_a_layernorm
            continue
        fused = getattr(attention, "qkv_proj", None) or getattr(attention, "query_key_value", None)
        if fused is not None:
            yield fused, fused
        else:
            yield getattr(attention, "k_norm", attention.k_proj), attention.v_proj


def states_of(family: str, spec: Any, output: torch.Tensor, values: bool) -> torch.Tensor:
    """Keys or values [heads, tokens, dim] out of a projection's output for one row."""
    tokens, dim = FIRST, spec.value_dim if values else spec.key_dim
    if spec.swapped:  # the projection gives the latent before its norm, and the keys behind it
        return output[..., output.shape[-1] - dim :]
    if family == "neox":
        return output.view(tokens, spec.heads, 3, dim)[:, :, 2 if values else 1].transpose(0, 1)
    if family == "phi3":
        rest = 4 * dim
        output = output[0, :, rest + spec.heads * dim :] if values else output[0, :, rest : rest + spec.heads * dim]
    if output.ndim == 4 and output.shape[1] == spec.heads:
        return output[0]
    return output.reshape(tokens, spec.heads, dim).transpose(0, 1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_stored_bytes_are_what_the_projection_gave(
    store: LocalStore, family: str, dtype: str, attention: str, seed: int
) -> None:
    model = build(family, dtype, attention)
    reuse = Reuse(model, store, block_tokens=BLOCK)
    seen: dict[Any, torch.Tensor] = {}
    handles = [
        module.register_forward_hook(lambda module, _, output: seen.__setitem__(module, output.detach().clone()))
        for pair in projections(model)
        for module in set(pair)
    ]
    ids = prompt(FIRST, seed)
    hit = reuse.load(ids)
    with torch.no_grad():
        model(**hit.forward_inputs)
    for handle in handles:
        handle.remove()
    reuse.save(ids, hit.cache)
    match = store.match(Namespace(reuse.fingerprint), reuse.layout, [*ids[0].tolist(), 0])
    assert match.tokens == FIRST
    load = store.load(match)
    for number, (pair, spec) in enumerate(zip(projections(model), reuse._joined.attached.specs, strict=True)):
        assert load.wait(number)
        for which, module in enumerate(pair):
            expected = states_of(family, spec, seen[module], values=bool(which))
            parts = []
            for piece in load.pieces(number):
                flat = torch.frombuffer(bytearray(piece[which]), dtype=DTYPES[dtype])
                parts.append(flat.view(spec.heads, piece.stride, -1)[:, : piece.tokens])
            assert torch.equal(torch.cat(parts, 1), expected), (number, which)
    load.release()
