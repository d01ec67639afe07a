"""The benchmark of documents encoded apart: its task, its arms beside what they should equal, and the command."""

import dataclasses
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore import BadInput
from kvstore.adapters.kvlink import reference
from kvstore.bench.modules import __main__ as command
from kvstore.bench.modules import begin, evaluation, language, results, retrieval, training
from kvstore.bench.modules.retrieval import KINDS, Size
from kvstore.bench.streaming.model import BEGIN
from kvstore.bench.train_plans.corpus import Corpus
from kvstore.composition import Placement

SMALL = Size(
    symbols=8, documents=3, writes=3, distinct=6, queries=4, hidden=64, layers=2, heads=2, steps=60, rate=1e-2,
    tuning_steps=5, prompts=48,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Any:
    return training.base(SMALL, 0, lambda: None)


def played(size: Size, made: retrieval.Prompt) -> tuple[dict[int, int], dict[int, str]]:
    """What keys hold in the end, and how they came to it, from the token ids alone."""
    holds: dict[int, int] = {}
    kinds: dict[int, str] = {}
    for document in made.documents:
        assert document[0] == size.mark
        before = dict(holds)
        for token in document[1:]:
            aliased, rest = divmod(token - size.write(0, 0), size.symbols**2)
            key, other = divmod(rest, size.symbols)
            kinds[key] = "alias" if aliased else "overwritten" if key in holds else "single"
            if aliased:
                assert before[other] == holds[other]  # what an earlier document wrote, and none since
            holds[key] = holds[other] if aliased else other
    return holds, kinds


def test_answers_are_what_the_writes_come_to(seed: int) -> None:
    size = Size()
    made = [retrieval.prompt(size, random.Random(seed + number)) for number in range(200)]
    for one in made:
        holds, kinds = played(size, one)
        keys = [token - size.key(0) for token in one.queries]
        assert len(set(keys)) == size.queries
        assert [holds[key] for key in keys] == one.answers
        assert [kinds[key] for key in keys] == one.kinds
        told = [value for values in one.held for value in values if value != -100]
        aliases = [token for document in one.documents for token in document if token >= size.alias(0, 0)]
        assert len(told) == len(aliases)
    counts = [sum(one.kinds.count(kind) for one in made) for kind in KINDS]
    assert min(counts) > 0.15 * sum(counts)
    assert size.linked.stop == size.vocabulary and size.alias(31, 31) < size.linked.start


def test_embeddings_of_writes_begin_as_sums(seed: int) -> None:
    weight = retrieval.build(SMALL, seed).get_input_embeddings().weight
    expected = weight[SMALL.key(3)] + weight[5]  # a key and a value
    assert torch.equal(weight[SMALL.write(3, 5)], expected)
    assert not torch.equal(weight[SMALL.alias(3, 5)], expected)


def test_batches_with_links_have_the_same_labels() -> None:
    made = retrieval.prompts(SMALL, 3, "some")
    plain, linked = (retrieval.batch(made, links, aliases=True) for links in (SMALL.plain, SMALL.linked))
    assert linked.ids.shape[1] == plain.ids.shape[1] + SMALL.links * SMALL.documents
    kept = linked.ids < SMALL.linked.start
    assert torch.equal(linked.ids[kept].view_as(plain.ids), plain.ids)
    assert torch.equal(linked.labels[kept].view_as(plain.labels), plain.labels)
    assert (linked.labels[~kept] == -100).all()


def test_positions_as_if_every_document_stood_first() -> None:
    segments = torch.tensor([[1, 1, 1, 0, 2, 2, 3, 0, 0]])
    assert evaluation.local_positions(segments).tolist() == [[0, 1, 2, 3, 0, 1, 0, 7, 8]]


def test_scores_of_the_arms_hang_together(model: Any) -> None:
    found = {(one.arm, one.share): one for one in evaluation.of_base(model, SMALL, 0)}
    assert [share for arm, share in found if arm == "blend"] == list(evaluation.SHARES)
    # Three documents of four tokens; shares are of the 8 behind the first, in whole tokens.
    assert [round(12 * found["blend", share].recomputed) for share in evaluation.SHARES] == [1, 2, 3, 4]
    assert found["full", 1.0].recomputed == 1 and found["modular", 0.0].recomputed == 0
    answered = evaluation.Answered(evaluation.held_out(SMALL), SMALL.plain)
    assert len(answered.kinds) == 48 * 4
    perfect = answered.score("perfect", 1.0, lambda made: (torch.eye(99)[made.labels.clamp_min(0)], True))
    assert (perfect.all, perfect.single, perfect.overwritten, perfect.alias) == (1, 1, 1, 1)
    wrong = answered.score("wrong", 1.0, lambda made: (-torch.eye(99)[made.labels.clamp_min(0)], False))
    assert (wrong.all, wrong.recomputed) == (0, 0)
    assert found["full", 1.0].single > 0.8  # it has learned to look up
    assert all(0 <= one.aliases <= 1 and 0 <= one.aliases_found <= 1 for one in evaluation.choices(model, SMALL))


def test_the_store_answers_as_the_reference(model: Any) -> None:
    served = evaluation.through_store(model, SMALL, SMALL.plain, 8)
    served += evaluation.through_store(model, SMALL, SMALL.linked, 8)
    assert [(one.arm, one.share) for one in served] == [
        ("modular", 0.0), ("blend", 0.05), ("blend", 0.15), ("blend", 0.3), ("tuned, links", 0.0)
    ]  # fmt: skip
    assert all(one.largest_difference < 1e-3 and one.answers_equal for one in served)
    assert [round(12 * one.cached) for one in served] == [12, 11, 10, 9, 12]
    # The prompts do differ by how documents are reused.
    made = retrieval.batch(evaluation.held_out(SMALL)[:8], SMALL.plain)
    apart = reference.modular(model, made.ids, made.segments)[0]
    assert float((apart - reference.full(model, made.ids, made.segments))[:, -4:].abs().max()) > 1e-2


def test_tuning_leaves_the_base_alone(model: Any) -> None:
    before = [weight.clone() for weight in model.parameters()]
    counted: list[int] = []
    tuned = training.tuned(model, SMALL, 0, SMALL.linked, lambda: counted.append(1))
    assert len(counted) == SMALL.tuning_steps
    assert all(map(torch.equal, before, model.parameters()))
    assert not any(map(torch.equal, before[:1], tuned.parameters()))


def test_losses_of_running_text(seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    noise, more = (torch.randint(97, 123, (4000,), generator=source).byte() for _ in range(2))
    text = Corpus(noise, more, files=1, name="noise")
    size = language.Size(tokens=16, hidden=16, layers=2, heads=2, batch=2, steps=3, texts=4)
    reader = language.trained(text, size, seed, lambda: None)
    found = {(one.arm, one.share): one.nats for one in language.losses(reader, text, size, seed)}
    assert len(found) == 4 + 2 * len(evaluation.SHARES)
    ids = text.held_out(4, 64)
    with torch.no_grad():
        logits = reader(ids).logits[:, 48:-1]
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 49:].flatten())
    assert found["full", 1.0] == pytest.approx(float(wanted), rel=1e-5)
    assert len({round(nats, 6) for nats in found.values()}) > 4


def test_means_and_files(tmp_path: Path) -> None:
    path, setting = tmp_path / "some" / "results.json", {"size": "none"}
    score = dataclasses.asdict(evaluation.Score("blend", 0.15, 0.1, 0.5, 1.0, 0.5, 0.0))
    choice, loss = {"share": 0.05, "aliases": 0.5, "aliases_found": 0.1}, {"arm": "full", "share": 1.0, "nats": 2.0}
    runs = [
        results.Run(seed, 1.0, [{**score, "all": right}], [choice], [], [loss]) for seed, right in enumerate((0.5, 0.7))
    ]
    assert results.finished(path, setting) == []
    results.write(path, setting, runs)
    assert results.finished(path, setting) == runs
    assert results.finished(path, {"size": "other"}) == []
    held = json.loads(path.read_text())["retrieval"][0]
    assert (held["arm"], held["share"]) == ("blend", 0.15)
    assert (held["means"]["all"], held["spreads"]["all"]) == (pytest.approx(0.6), pytest.approx(0.02**0.5))
    assert results.means([runs[0].scores], ("all",))[0].spreads["all"] is None
    path.write_text("{}")
    with pytest.raises(BadInput, match="holds no results of this benchmark"):
        results.finished(path, setting)


def test_the_command_measures_writes_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, path = tmp_path / "text.txt", tmp_path / "results.json"
    text.write_text("some text to read, over and over. " * 200)
    command.main(size="tiny", seeds=1, json=path, text=text, threads=0)
    shown = capsys.readouterr().out
    assert "not re-encoded" in shown and "perplexity" in shown and "answers equal: True" in shown
    held = json.loads(path.read_text())
    assert [run["seed"] for run in held["runs"]] == [0] and held["environment"]["python"]
    assert all(one["answers_equal"] for one in held["runs"][0]["served"])
    assert path.with_suffix(".png").stat().st_size > 10_000
    # What is there is not measured again.
    held["runs"][0]["seconds"] = -1.0
    path.write_text(json.dumps(held))
    command.main(size="tiny", seeds=2, json=path, text=text, threads=0)
    again = json.loads(path.read_text())["runs"]
    assert again[0] == held["runs"][0] and again[1]["seconds"] > 0


@pytest.mark.parametrize(
    ("words", "code", "said"), [(["--help"], 0, "reused out of context"), (["--size", "huge"], 2, "no size 'huge'")]
)
def test_the_command_says_what_it_does(
    words: list[str], code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["modules", *words])
    with pytest.raises(SystemExit) as ended:
        command.cli()
    shown = capsys.readouterr()
    assert ended.value.code == code and said in " ".join((shown.out + shown.err).split())


def test_what_is_encoded_behind_a_token_stands_where_the_prompt_has_it() -> None:
    """The arms of the measurement: the same tokens at the same positions, modules with or without the token before."""
    ids = [BEGIN, *range(1, 16)]
    for arm in begin.ARMS[:3]:
        prompt = begin.composed(ids, arm)
        assert prompt.token_ids == ids and prompt.position_ids == list(range(16))
    starts = [
        [part.start for part in begin.composed(ids, arm).parts if isinstance(part, Placement)] for arm in begin.ARMS
    ]
    assert starts == [[], [0, 0, 0], [1, 1, 1], []]
    assert begin.composed(ids, begin.ARMS[3]).position_ids == [0, 12, 13, 14, 15]
