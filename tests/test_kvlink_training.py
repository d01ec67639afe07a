"""Training with links: it learns, goes on bit for bit where it stopped, and can be run and evaluated by command."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_kvlink_data import LINES, encode, mixture, written
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from kvstore import BadInput
from kvstore.adapters.kvlink import LinkTokens, __main__, add_links
from kvstore.adapters.kvlink.checkpoints import Training
from kvstore.adapters.kvlink.evaluation import evaluate
from kvstore.adapters.kvlink.layout import Laid
from kvstore.adapters.kvlink.mixture import Mixture, Source
from kvstore.adapters.kvlink.training import Recipe, losses, masked_logits, padded, scored_columns, train

LINKS = LinkTokens(start=300, per_document=2, documents=4)
RECIPE = Recipe(steps=4, batch=3, rate=1e-2, keep_every=2, at_once=2)


class StoppedError(Exception):
    """What ends a training in the middle."""


def model(seed: int, vocabulary: int = 300, dropout: float = 0.1) -> Any:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        attention_dropout=dropout,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = LlamaForCausalLM(config)
    add_links(made, LinkTokens(vocabulary, 2, 4))
    return made


def weights(of: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in of.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def trained(seed: int, mixed: Mixture, out: Path, recipe: Recipe = RECIPE, stop: int = 0) -> dict[str, torch.Tensor]:
    of = model(seed)

    def told(step: int, _: float) -> None:
        if step == stop:
            raise StoppedError

    train(of, LINKS, mixed, recipe, out, told)
    return weights(of)


def test_a_training_that_was_stopped_comes_to_the_same_bits(tmp_path: Path, seed: int) -> None:
    mixed = mixture(tmp_path)
    whole = trained(seed, mixed, tmp_path / "whole")
    with pytest.raises(StoppedError):
        trained(seed, mixed, tmp_path / "stopped", stop=3)
    assert [path.name for path in (tmp_path / "stopped").iterdir()] == ["step-2"]
    # What the model was is of no account: all of it comes from the folder.
    assert same(trained(seed + 1, mixed, tmp_path / "stopped"), whole)
    assert [path.name for path in (tmp_path / "stopped").iterdir()] == ["step-4"]
    kept = LlamaForCausalLM.from_pretrained(tmp_path / "stopped" / "step-4")
    assert same(weights(kept), whole)
    assert LinkTokens.load(tmp_path / "stopped" / "step-4") == LINKS
    # Another order of examples is another training.
    assert not same(trained(seed, mixture(tmp_path, seed=9), tmp_path / "other"), whole)


def test_another_training_in_the_folder_is_refused(tmp_path: Path, seed: int) -> None:
    mixed = mixture(tmp_path)
    brief = Recipe(steps=1, batch=1)
    trained(seed, mixed, tmp_path / "out", brief)
    with pytest.raises(BadInput, match="a training with other recipe; use another folder"):
        trained(seed, mixed, tmp_path / "out", Recipe(steps=2, batch=1))
    with pytest.raises(BadInput, match="a training with other data"):
        trained(seed, mixture(tmp_path, seed=9), tmp_path / "out", brief)
    with pytest.raises(BadInput, match="holds another model"):
        train(model(seed, vocabulary=310), LINKS, mixed, brief, tmp_path / "out")
    assert not same(trained(seed + 1, mixed, tmp_path / "out", brief), weights(model(seed + 1)))  # done: only loaded


def test_what_cannot_be_trained_is_refused(tmp_path: Path, seed: int) -> None:
    mixed = mixture(tmp_path)
    with pytest.raises(BadInput, match="call add_links first"):
        train(model(seed), LinkTokens(300, 5, 40), mixed, RECIPE, tmp_path / "out")
    with pytest.raises(BadInput, match="laid out with other links"):
        train(model(seed), LinkTokens(300, 1, 4), mixed, RECIPE, tmp_path / "out")
    with pytest.raises(BadInput, match="counts from 1"):
        Recipe(steps=0)
    with pytest.raises(BadInput, match="use bfloat16"):
        Recipe(dtype="int8")


def test_rates_rise_in_a_line_and_fall_in_a_cosine() -> None:
    rates = [Recipe(steps=100, rate=1.0, warm_up=0.1).rate_at(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert rates[10] == 1.0 and rates[55] == pytest.approx(0.5) and 0 < rates[99] < 0.001


@pytest.mark.parametrize("how", [{"at_once": 1}, {"recompute": True}, {"dtype": "bfloat16"}])
def test_how_a_step_is_computed_changes_little(how: dict[str, Any], tmp_path: Path, seed: int) -> None:
    mixed, found = mixture(tmp_path), list[float]()
    for name, more in (("plain", {"at_once": 4}), ("other", how)):
        of = model(seed, dropout=0.0)
        recipe = Recipe(**{"steps": 1, "batch": 4, **more})
        train(of, LINKS, mixed, recipe, tmp_path / name, lambda _, loss: found.append(loss))
    assert found[0] == pytest.approx(found[1], rel=2e-3 if "dtype" in how else 1e-5)


def test_the_loss_is_that_of_answers_and_falls(tmp_path: Path, seed: int) -> None:
    mixed, told = mixture(tmp_path), list[float]()
    of = model(seed, dropout=0.0)
    some = padded(mixed.batch(0, 6))
    with torch.no_grad():
        nats = losses(masked_logits(of, some)[:, :-1], some.labels[:, 1:])
    scored = some.labels[:, 1:] != -100
    assert (nats[scored] > 0).all() and not nats[~scored].any()
    recipe = Recipe(steps=30, batch=6, rate=1e-2)
    train(of, LINKS, mixed, recipe, tmp_path / "out", lambda _, loss: told.append(loss))
    assert told[0] == pytest.approx(float(nats.sum() / scored.sum()), rel=1e-5)
    assert told[-1] < 0.6 * told[0]


def test_embeddings_of_links_are_trained_and_unused_ones_hardly_move(tmp_path: Path, seed: int) -> None:
    source = Source.open(written(tmp_path, "qa_memory.jsonl", LINES["qa_memory"]), "qa_memory")
    mixed = Mixture([source], mixture(tmp_path).reader)
    before = weights(model(seed))["model.embed_tokens.weight"]
    moved = trained(seed, mixed, tmp_path / "out")["model.embed_tokens.weight"] - before
    assert (moved[300:304].abs().amax(1) > 1e-3).all()  # two documents
    assert not moved[304:308].any()


# -- evaluation and commands ------------------------------------------------------------------------------------------


def test_ways_of_answering_are_told_apart(seed: int, tmp_path: Path) -> None:
    of = model(seed, dropout=0.0)
    source = Source.open(written(tmp_path, "asked.jsonl", LINES["qa_memory"]), "qa_memory")
    reader = mixture(tmp_path).reader
    train(of, LINKS, Mixture([source], reader), Recipe(steps=80, batch=2, rate=1e-2), tmp_path / "out")
    found = {one.way: one for one in evaluate(of, LINKS, source.examples(reader, 99), share=0.5)}
    assert list(found) == ["full", "apart", "blend 50%", "links"]
    assert found["links"].exact == 1.0 and found["links"].nats < min(
        one.nats for way, one in found.items() if way != "links"
    )
    laid: Laid = next(source.examples(reader, 99)).laid(LINKS)
    some = padded([laid])
    columns = scored_columns(some)
    assert columns.tolist() == list(range(len(laid) - 4, len(laid) - 1))
    with torch.no_grad():
        nats = losses(masked_logits(of, some, columns), some.labels[:, columns + 1])
    assert nats.shape == (1, 3) and found["links"].nats == pytest.approx(float(nats.mean()), rel=1e-4)
    with pytest.raises(BadInput, match="no examples"):
        evaluate(of, LINKS, [])
    with pytest.raises(BadInput, match="has no documents"):
        evaluate(of, LINKS, [reader.example("qa", LINES["qa"])])


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["kvlink", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        __main__.cli()
    return int(str(ended.value.code or 0))


def test_commands(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    model(seed).save_pretrained(folder)
    alphabet = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    spoken = Tokenizer(models.BPE({**alphabet, "<end>": 299}, []))
    spoken.pre_tokenizer, spoken.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=spoken, eos_token="<end>").save_pretrained(folder)
    mixture(tmp_path)
    out = tmp_path / "out"
    given = ["--data", tmp_path / "mixture.json", "--out", out, "--steps", 2, "--batch", 2, "--per-document", 2]
    assert run(monkeypatch, "--model", folder, *given, "--documents", 4) == 0
    assert LinkTokens.load(out / "step-2") == LinkTokens(308, 2, 4)
    assert Training(out, Recipe(), LINKS, "").newest() == out / "step-2"
    asked = ["--data", tmp_path / "qa_memory.jsonl", "--words", tmp_path / "mixture.json"]
    result = tmp_path / "result.json"
    assert run(monkeypatch, "evaluate", "--model", out / "step-2", *asked, "--json", result) == 0
    found = json.loads(result.read_text())
    assert [(one["way"], one["examples"]) for one in found] == [
        ("full", 3), ("apart", 3), ("blend 15%", 3), ("links", 3)
    ]  # fmt: skip
    assert run(monkeypatch, "evaluate", "--model", folder, *asked, "--json", result) == 0
    assert [one["way"] for one in json.loads(result.read_text())] == ["full", "apart", "blend 15%"]
    capsys.readouterr()
    assert run(monkeypatch, "--model", tmp_path / "nowhere", *given) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert run(monkeypatch, "--model", tmp_path, *given) == 2
    assert "holds no model with a tokenizer" in capsys.readouterr().err
    assert run(monkeypatch, "train", "--help") == 0
    assert "chat_memory" in capsys.readouterr().out


def test_bytes_are_tokens_here() -> None:
    assert max(encode("~")) < 299  # the tests' ends and links are no bytes
