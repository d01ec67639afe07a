"""Link tokens: ids, room in the model, masks, and prompts that the store serves as one masked pass computes them."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import FAMILIES, VOCABULARY, build, prompt
from transformers import DynamicCache

import kvstore
from kvstore import BadInput
from kvstore.adapters.kvlink import LinkTokens, add_links, additive, block_mask, compose, lay_out, reference
from kvstore.adapters.kvlink.mask import causal_mask
from kvstore.adapters.kvlink.training import Padded, masked_logits, padded
from kvstore.adapters.transformers import Reuse
from kvstore.composition import Chain, Placement, Text
from kvstore.local import LocalStore

LINKS = LinkTokens(start=VOCABULARY, per_document=2, documents=4)
LENGTHS = (33, 20, 27)


def drawn(tokens: int, seed: int) -> list[int]:
    ids: list[int] = prompt(tokens, seed)[0].tolist()
    return ids


def parts(seed: int) -> tuple[list[list[int]], list[int], list[int]]:
    """Documents, question, system."""
    documents = [drawn(tokens, seed + number) for number, tokens in enumerate(LENGTHS)]
    return documents, drawn(6, seed + 10), drawn(5, seed + 11)


def linked(seed: int, family: str = "llama") -> Any:
    """A model with links that differ from all else, as trained ones do."""
    model = build(family, seed=seed)
    assert add_links(model, LINKS) == 8
    weight, source = model.get_input_embeddings().weight.data, torch.Generator().manual_seed(seed)
    weight[VOCABULARY:] = torch.randn(weight[VOCABULARY:].shape, generator=source) * weight.std()
    return model


def masked(model: Any, laid: Any) -> torch.Tensor:
    with torch.no_grad():
        return masked_logits(model, padded([laid]))[0]


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, atol=1e-4, rtol=1e-4)


# -- ids and embeddings -----------------------------------------------------------------------------------------------


def test_every_slot_has_ids_of_its_own(tmp_path: Path) -> None:
    ids = [LINKS.of(slot) for slot in range(4)]
    assert [token for slot in ids for token in slot] == list(range(LINKS.start, LINKS.stop))
    with pytest.raises(BadInput, match="there are 4 slots"):
        LINKS.of(4)
    with pytest.raises(BadInput, match="negative"):
        LinkTokens(3, -1)
    LINKS.save(tmp_path)
    assert LinkTokens.load(tmp_path) == LINKS
    with pytest.raises(BadInput, match="does not say which tokens are links"):
        LinkTokens.load(tmp_path / "elsewhere")


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_are_near_the_mean_and_old_rows_stay(tied: bool) -> None:
    model = FAMILIES["llama"]()
    model.config.tie_word_embeddings = tied
    model.tie_weights()
    before = model.get_input_embeddings().weight.detach().clone()
    assert add_links(model, LINKS) == 8
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = end.weight.detach()
        assert weight.shape[0] == LINKS.stop
        old, new = weight[:VOCABULARY], weight[VOCABULARY:]
        assert len(new.unique(dim=0)) == 8
        assert ((new - old.mean(0)).abs() < 0.2 * old.std(0)).all()
    assert torch.equal(model.get_input_embeddings().weight[:VOCABULARY], before)
    assert model.config.vocab_size == LINKS.stop
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert add_links(model, LINKS) == 0  # there is room now


def test_links_behind_a_gap_are_refused_and_reserved_ids_are_used() -> None:
    model = build("llama")
    before = model.get_input_embeddings().weight.detach().clone()
    with pytest.raises(BadInput, match=f"use start={VOCABULARY}"):
        add_links(model, LinkTokens(VOCABULARY + 1, 2, 4))
    assert add_links(model, LinkTokens(VOCABULARY - 8, 2, 4)) == 0
    assert torch.equal(model.get_input_embeddings().weight, before)


# -- layout and mask --------------------------------------------------------------------------------------------------


def test_a_prompt_in_parts_and_in_one_piece_is_the_same() -> None:
    documents, question, system = parts(0)
    composed = compose(LINKS, documents, question, system)
    laid = lay_out(LINKS, documents, question, [7, 8], system)
    assert laid.token_ids == [*composed.token_ids, 7, 8]
    assert composed.position_ids == list(range(len(composed)))
    expected = [0] * 5 + [1] * 33 + [0, 0] + [2] * 20 + [0, 0] + [3] * 27 + [0, 0] + [0] * 8
    assert laid.segments == expected
    assert laid.labels == [-100] * len(composed) + [7, 8]
    placed = [part for part in composed.parts if isinstance(part, Placement)]
    assert [part.chain for part in placed] == [Chain.of(document) for document in documents]  # alone, without links
    assert [part.position for part in placed] == [5, 40, 62]
    texts = [part.token_ids for part in composed.parts if isinstance(part, Text)]
    assert texts == [Chain.of(ids).token_ids for ids in (system, *(LINKS.of(slot) for slot in range(3)), question)]


def test_layouts_without_system_links_or_question() -> None:
    bare = LinkTokens(VOCABULARY, 0, 4)
    assert [type(part) for part in compose(bare, [[1], [2, 3]], [4]).parts] == [Placement, Placement, Text]
    assert lay_out(bare, [], [], [5]).labels == [5]
    with pytest.raises(BadInput, match="document 1 has no tokens"):
        compose(LINKS, [[1], []], [4])
    with pytest.raises(BadInput, match="document 4 has no links"):
        lay_out(LINKS, [[1]] * 5, [4])


def seen(segments: list[int], row: int, column: int) -> bool:
    return column <= row and (segments[row] == segments[column] or (segments[row] == 0 and segments[column] != -1))


def test_masks_are_what_the_rule_says(seed: int) -> None:
    source = random.Random(seed)
    rows = [[source.choice([-1, 0, 0, 1, 2, 3]) for _ in range(24)] for _ in range(6)]
    mask = block_mask(torch.tensor(rows))
    assert mask.shape == (6, 1, 24, 24)
    for segments, made in zip(rows, mask[:, 0].tolist(), strict=True):
        assert made == [[seen(segments, row, column) for column in range(24)] for row in range(24)]
    added = additive(mask, torch.bfloat16)
    assert torch.equal(added == 0, mask) and float(added.min()) == torch.finfo(torch.bfloat16).min
    whole = causal_mask(torch.tensor([[0, 1, 2, -1]]))[0, 0].tolist()
    assert whole == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_documents_see_themselves_only_and_links_what_is_before(attention: str, seed: int) -> None:
    model = linked(seed)
    model.set_attn_implementation(attention)
    documents, question, system = parts(seed)
    laid = lay_out(LINKS, documents, question, (), system)
    before = masked(model, laid)

    def changed(place: int) -> set[int]:
        """Segments in which a logit changes with the token at a place; links are -1, question and system 0."""
        laid.token_ids[place] = laid.token_ids[place] % 99 + 100
        different = (masked(model, laid) - before).abs().amax(1) > 1e-5
        marks = [
            -1 if token >= VOCABULARY else segment for token, segment in zip(laid.token_ids, laid.segments, strict=True)
        ]
        return {marks[column] for column in different.nonzero().flatten().tolist()}

    assert changed(0) == {0, -1}  # the system: links and question read it, documents do not
    before = masked(model, laid)
    assert changed(len(system) + 3) == {1, -1, 0}  # within the first document


def test_padding_changes_nothing(seed: int) -> None:
    model = linked(seed)
    documents, question, system = parts(seed)
    rows = [lay_out(LINKS, documents, question, [3], system), lay_out(LINKS, documents[:1], question, [3])]
    some = padded(rows)
    assert some.segments[1].tolist() == rows[1].segments + [-1] * (len(rows[0]) - len(rows[1]))
    with torch.no_grad():
        both = masked_logits(model, some)
    assert both.isfinite().all()
    for row, laid in enumerate(rows):
        assert close(both[row, : len(laid)], masked(model, laid))


# -- the same through caches ------------------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(model: Any, documents: list[list[int]], question: list[int], system: list[int]) -> torch.Tensor:
    """Logits of the question: documents encoded alone, their keys and values put behind what is there."""
    cache, position = DynamicCache(config=model.config), 0

    def computed(ids: list[int], into: DynamicCache) -> torch.Tensor:
        places = torch.arange(position, position + len(ids))[None]
        taken = model(torch.tensor([ids]), position_ids=places, past_key_values=into)
        logits: torch.Tensor = taken.logits[0]
        return logits

    computed(system, cache)
    position += len(system)
    for slot, document in enumerate(documents):
        alone = DynamicCache(config=model.config)
        computed(document, alone)
        for number, layer in enumerate(alone.layers):
            cache.update(layer.keys, layer.values, number)
        position += len(document)
        computed(LINKS.of(slot), cache)
        position += LINKS.per_document
    return computed(question, cache)


def test_a_masked_pass_is_documents_alone_and_links_computed(seed: int) -> None:
    model = linked(seed)
    documents, question, system = parts(seed)
    wanted = by_hand(model, documents, question, system)
    assert close(masked(model, lay_out(LINKS, documents, question, (), system))[-len(question) :], wanted)
    # Ordinary attention, and links of other slots, are something else.
    some: Padded = padded([lay_out(LINKS, documents, question, (), system)])
    assert not close(reference.full(model, some.ids, some.segments)[0, -len(question) :], wanted)
    shifted = lay_out(LinkTokens(LINKS.start + 2, 2, 3), documents, question, (), system)
    assert not close(masked(model, shifted)[-len(question) :], wanted)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_store_serves_what_a_masked_pass_computes(family: str, seed: int, store: LocalStore) -> None:
    model = linked(seed, family)
    reuse = Reuse(model, store, block_tokens=16)
    documents, question, system = parts(seed)
    assert reuse.encode(segments=documents).new_tokens == sum(LENGTHS)
    hit = reuse.load(compose(LINKS, documents, question, system))
    assert hit.cached_tokens == sum(LENGTHS) and not hit.exact
    with torch.no_grad():
        logits = model(**hit.forward_inputs).logits[0]
    assert len(logits) == len(system) + 3 * 2 + len(question)  # all that was computed
    wanted = masked(model, lay_out(LINKS, documents, question, (), system))
    assert close(logits[-len(question) :], wanted[-len(question) :])
    # In another order the documents are the same, and get the links of their new slots.
    turned = documents[::-1]
    again = reuse.load(compose(LINKS, turned, question, system))
    assert again.cached_tokens == sum(LENGTHS)
    with torch.no_grad():
        logits = model(**again.forward_inputs).logits[0, -len(question) :]
    assert close(logits, masked(model, lay_out(LINKS, turned, question, (), system))[-len(question) :])
    assert not close(logits, wanted[-len(question) :])


# -- blends -----------------------------------------------------------------------------------------------------------


def test_blends_go_from_apart_to_whole(seed: int) -> None:
    model = linked(seed)
    documents, question, system = parts(seed)
    some = padded([lay_out(LinkTokens(VOCABULARY, 0, 4), documents, question, (), system)])
    whole = reference.full(model, some.ids, some.segments)
    apart, _ = reference.modular(model, some.ids, some.segments)
    all_of_it, chosen = reference.blend(model, some.ids, some.segments, 1.0)
    assert close(all_of_it, whole) and int(chosen.sum()) == sum(LENGTHS)
    nothing, chosen = reference.blend(model, some.ids, some.segments, 0.0)
    assert close(nothing[:, -6:], apart[:, -6:]) and not chosen.any()
    assert not close(whole[:, -6:], apart[:, -6:])
    for source in (None, torch.Generator().manual_seed(seed)):
        _, chosen = reference.blend(model, some.ids, some.segments, 0.15, source)
        assert int(chosen.sum()) == 12  # 0.15 of 80
        assert not (chosen & (some.segments == 0)).any()


@pytest.mark.parametrize("share", [0.05, 0.15, 0.5])
def test_a_blend_is_what_the_store_serves(share: float, seed: int, store: LocalStore) -> None:
    model = build("llama", seed=seed)
    reuse = Reuse(model, store, block_tokens=16)
    documents, question, _ = parts(seed)
    bare = LinkTokens(VOCABULARY, 0, 4)
    reuse.encode(segments=documents)
    hit = reuse.load(compose(bare, documents, question), mode="blend", recompute=share)
    with torch.no_grad():
        logits = model(**hit.forward_inputs).logits[0, -len(question) :]
    some = padded([lay_out(bare, documents, question)])
    wanted, chosen = reference.blend(model, some.ids, some.segments, share)
    assert close(logits, wanted[0, -len(question) :])
    assert hit.cached_tokens == sum(LENGTHS) - int(chosen.sum())
    assert not chosen[0, : LENGTHS[0]].any()  # the first document is as it was alone
    random, _ = reference.blend(model, some.ids, some.segments, share, torch.Generator().manual_seed(seed))
    assert not close(logits, random[0, -len(question) :])


def test_segments_with_links_are_the_same_prompt() -> None:
    """``mode="link"`` lays segments out as ``compose`` does, and serves them from documents encoded alone."""
    links = LinkTokens(100, per_document=2, documents=3)
    documents, question = [[1, 2, 3], [4, 5, 6, 7]], [8, 9]
    with kvstore.open(host="64MiB") as store:
        reuse = Reuse(build("llama"), store, block_tokens=16)
        reuse.encode(segments=documents)
        hit = reuse.load(segments=[*documents, question], mode="link", links=links)
        wanted = compose(links, documents, question)
        assert hit.plan.ids[0].tolist() == wanted.token_ids == [1, 2, 3, 100, 101, 4, 5, 6, 7, 102, 103, 8, 9]
        assert hit.cached_tokens == reuse.load(wanted).cached_tokens == 7
