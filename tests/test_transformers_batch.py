"""Batches of prompts of different lengths and hits: each row gets what it would get alone."""

from typing import Any

import pytest
import torch
from hf_models import build, prompt

from kvstore import BadInput, Unsupported
from kvstore.adapters.transformers import Reuse
from kvstore.local import LocalStore

BLOCK = 16
NEW = 12
LENGTHS = (50, 9, 33, 61)
STORED = (37, 0, 33, 8)  # leading tokens of each row that are in the store


def rows_of(seed: int) -> list[list[int]]:
    return [prompt(length, seed + number)[0].tolist() for number, length in enumerate(LENGTHS)]


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded ids and their mask."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def store_rows(model: Any, reuse: Any, rows: list[list[int]]) -> None:
    """Put the leading ``STORED`` tokens of each row into the store."""
    for row, count in zip(rows, STORED, strict=True):
        if count:
            hit = reuse.load(row[:count])
            with torch.no_grad():
                model(**hit.forward_inputs)
            assert reuse.save(row[:count], hit.cache).tokens == count


def alone(model: Any, row: list[int]) -> list[int]:
    """Greedy tokens behind one prompt, without padding and without us."""
    ids = torch.tensor([row])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    new: list[int] = out[0, len(row) :].tolist()
    return new


@pytest.mark.parametrize("family", ["llama", "qwen3", "neox", "deepseek_v2", "deepseek_v3", "fusedkv"])
def test_each_row_keeps_its_whole_hit(store: LocalStore, family: str, seed: int) -> None:
    model = build(family)
    reuse = Reuse(model, store, block_tokens=BLOCK)
    rows = rows_of(seed)
    store_rows(model, reuse, rows)
    ids, mask = padded(rows)
    hit = reuse.load(ids, mask)
    assert hit.cached_tokens == [37, 0, 32, 8]
    assert [miss.kind for miss in hit.miss] == ["parts", "parts", "complete", "parts"]
    out = model.generate(**hit.inputs, max_new_tokens=NEW, do_sample=False)
    for row, produced in zip(rows, out, strict=True):
        assert produced[-NEW:].tolist() == alone(model, row)
    saved = reuse.save(out, hit.cache)
    assert saved.tokens == [length + NEW - 1 for length in LENGTHS]
    assert [done.tokens for done in saved.wait()] == [0] * 4  # a store in memory has nothing durable
    check_stored(model, reuse, rows)


def check_stored(model: Any, reuse: Any, rows: list[list[int]]) -> None:
    """What the batch saved of each row serves that row alone."""
    for row in rows:
        longer = row + alone(model, row) + [7, 8, 9]
        hit = reuse.load(longer)
        assert hit.cached_tokens == len(row) + NEW - 1
        with torch.no_grad():
            got = model(**hit.forward_inputs).logits
            expected = model(torch.tensor([longer])).logits[:, hit.cached_tokens :]
        assert torch.allclose(got, expected, atol=1e-3)


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_windows_cut_all_rows_at_one_column(store: LocalStore, family: str, seed: int) -> None:
    model = build(family)
    reuse = Reuse(model, store, block_tokens=BLOCK)
    rows = [row[:48] for row in rows_of(seed)]
    lengths = [len(row) for row in rows]  # 48, 9, 33, 48
    store_rows(model, reuse, rows)
    ids, mask = padded(rows)
    hit = reuse.load(ids, mask)
    assert hit.cached_tokens == [8, 0, 0, 8]  # the last row has 8, so column 8 is the cut
    out = model.generate(**hit.inputs, max_new_tokens=NEW, do_sample=False)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(out, expected)
    assert reuse.save(out, hit.cache).tokens == [length + NEW - 1 for length in lengths]
    check_stored(model, reuse, rows)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.2}, {"num_beams": 2}, {"max_length": 70}])
def test_generate_gives_the_callers_own_format(
    store: LocalStore, options: dict[str, Any], side: str, seed: int
) -> None:
    model = build("llama")
    reuse = Reuse(model, store, block_tokens=BLOCK)
    rows = rows_of(seed)
    store_rows(model, reuse, rows)
    ids, mask = padded(rows)
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    if "max_length" in options:
        del options["max_new_tokens"]
    expected = model.generate(ids, attention_mask=mask, **options)
    if side == "right":
        lengths = [len(row) for row in rows]
        ids = torch.stack([row.roll(n - len(row)) for row, n in zip(ids, lengths, strict=True)])
        mask = torch.stack([row.roll(n - len(row)) for row, n in zip(mask, lengths, strict=True)])
    out = reuse.generate(ids, mask, **options)
    width = ids.shape[1]
    assert torch.equal(out[:, :width], ids)
    assert torch.equal(out[:, width:], expected[:, width:])
    hit = reuse.load(out, pad_mask(out, mask))
    assert isinstance(hit.cached_tokens, list)
    assert hit.cached_tokens == [length - 1 for length in LENGTHS]


def pad_mask(out: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mask of a prompt, cut behind it: what was generated is not asked for."""
    return torch.cat((mask, torch.zeros_like(out[:, mask.shape[1] :])), 1)


def test_rows_end_at_their_end_of_sequence(store: LocalStore, seed: int) -> None:
    model = build("llama")
    rows = [row[:20] for row in rows_of(seed)]
    firsts = [alone(model, row) for row in rows]
    model.generation_config.eos_token_id = firsts[0][3]
    reuse = Reuse(model, store, block_tokens=BLOCK)
    ids, mask = padded(rows)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    hit = reuse.load(ids, mask)
    out = model.generate(**hit.inputs, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(out[:, -NEW:], expected[:, -NEW:])
    first_end = 20 + firsts[0].index(firsts[0][3]) + 1
    saved = reuse.save(out, hit.cache).tokens
    assert saved[0] == (first_end if first_end < 20 + NEW else first_end - 1)


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "fusedkv"])
def test_chunks_of_a_batch_with_different_hits(store: LocalStore, family: str, seed: int) -> None:
    model = build(family)
    reuse = Reuse(model, store, block_tokens=BLOCK)
    rows = rows_of(seed)
    store_rows(model, reuse, rows)
    hit = reuse.load(*padded(rows))
    out = model.generate(**hit.inputs, max_new_tokens=NEW, do_sample=False, prefill_chunk_size=8)
    for row, produced in zip(rows, out, strict=True):
        assert produced[-NEW:].tolist() == alone(model, row)
    assert reuse.save(out, hit.cache).tokens == [length + NEW - 1 for length in LENGTHS]
    check_stored(model, reuse, rows)


def test_lists_of_different_lengths_are_a_batch(store: LocalStore, seed: int) -> None:
    model = build("llama")
    reuse = Reuse(model, store, block_tokens=BLOCK)
    rows = rows_of(seed)
    out = reuse.generate(rows, max_new_tokens=NEW, do_sample=False)
    for row, produced in zip(rows, out, strict=True):
        assert produced[-NEW:].tolist() == alone(model, row)
    assert reuse.load({"input_ids": rows[0]}).cached_tokens == len(rows[0]) - 1
    assert reuse.load(rows[0]).cached_tokens == len(rows[0]) - 1


def test_what_is_no_prompt_is_refused_in_a_sentence(store: LocalStore, seed: int) -> None:
    reuse = Reuse(build("llama"), store, block_tokens=BLOCK)
    ids = prompt(10, seed, rows=2)
    holes = torch.ones_like(ids)
    holes[1, 4] = 0
    for wrong, mask, kind, words in (
        ([], None, BadInput, "input_ids"),
        ("a text", None, BadInput, "input_ids"),
        (torch.rand(1, 4), None, BadInput, "whole numbers"),
        ([1, 2, 500], None, BadInput, "vocabulary"),
        ([1, -2], None, BadInput, "vocabulary"),
        (ids, torch.ones(2, 9), BadInput, "attention_mask"),
        (ids, torch.zeros(2, 10), BadInput, "no tokens"),
        (ids, holes, Unsupported, "hides tokens inside row 1"),
        (ids, torch.ones(2, 1, 10, 10), Unsupported, "custom mask"),
    ):
        with pytest.raises(kind, match=words):
            reuse.load(wrong, mask)
