"""What a cache of constant size costs: the arms read the same text, and everything that is promised is measured."""

import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from torch.nn.functional import cross_entropy

from kvstore import BadInput
from kvstore.adapters.transformers import Reuse
from kvstore.bench.streaming import __main__ as command
from kvstore.bench.streaming import model as models
from kvstore.bench.streaming import report
from kvstore.bench.streaming.arms import Arm, arms
from kvstore.bench.streaming.perplexity import score
from kvstore.bench.streaming.sinks import attention_to_first
from kvstore.bench.train_plans import corpus
from kvstore.bench.train_plans.arms import Size
from kvstore.local import LocalStore

TINY = Size(hidden=16, layers=2, heads=2, context=40, batch=2, steps=3, rate=1e-2, held_out=2, evaluations=1)
TOKENS = 150


@pytest.fixture
def words(tmp_path: Path) -> models.Begun:
    for number in range(60):
        (tmp_path / f"{number}.txt").write_text(f"file {number} says {number * number}. " * 20)
    return models.Begun.of(corpus.read(tmp_path, 1 << 20, TINY.context))


def trained(folder: Path, words: models.Begun) -> tuple[int, Any]:
    """How many steps it took, and the model."""
    *steps, model = models.trained(folder, words, TINY, 0)
    return len(steps), model


def losses(arm: Arm, model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat(list(arm.losses(model, ids)))


def test_a_trained_model_is_kept(tmp_path: Path, words: models.Begun) -> None:
    steps, model = trained(tmp_path / "model", words)
    again, kept = trained(tmp_path / "model", words)
    assert (steps, again) == (3, 0)
    ids = words.stream(20)
    assert ids[0, 0] == models.BEGIN and ids[0, 1:].tolist() == words.validation[:20].tolist()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, kept(ids).logits)
    (tmp_path / "model" / models.SETTING).write_text(json.dumps({"setting": {}}))
    assert trained(tmp_path / "model", words)[0] == 3  # another setting is another model
    assert (words.batch(3, 8, torch.Generator().manual_seed(0))[:, 0] == models.BEGIN).all()


@pytest.fixture
def ways(tmp_path: Path, words: models.Begun, store: LocalStore) -> Iterator[tuple[Any, dict[str, Arm]]]:
    torch.manual_seed(0)
    model = models.build(TINY, 0).eval()
    for parameter in model.parameters():  # so that what is seen matters
        parameter.data += 0.2 * torch.randn(parameter.shape)
    reuse = Reuse(model, store)
    yield model, {arm.name: arm for arm in arms(reuse.window, TINY.context)}


def test_arms_read_the_same_text(ways: tuple[Any, dict[str, Arm]], words: models.Begun) -> None:
    """Each token once, and alike until the context is full; then each in its own way."""
    model, named = ways
    ids = words.stream(TOKENS)
    with torch.no_grad():
        whole = cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
    found = {name: losses(arm, model, ids) for name, arm in named.items()}
    for name, made in found.items():
        assert made.shape == (TOKENS,)
        assert torch.allclose(made[: TINY.context], whole[: TINY.context], atol=1e-4), name
    assert torch.allclose(found["all kept"], whole, atol=1e-4)
    behind = [made[TINY.context :] for made in found.values()]
    for number, one in enumerate(behind):
        assert not any(torch.allclose(one, other, atol=1e-4) for other in behind[:number])


def test_recomputed_windows_are_what_the_model_makes_of_their_text(
    ways: tuple[Any, dict[str, Arm]], words: models.Begun
) -> None:
    model, named = ways
    ids = words.stream(TOKENS)
    got = losses(named["recomputed behind the sinks"], model, ids)
    every = TINY.context // 8
    first = TINY.context + 2 * every
    stop = first + every
    text = torch.cat((ids[:, :4], ids[:, stop - TINY.context + 4 : stop]), 1)
    with torch.no_grad():
        logits = model(text).logits[0, -every:]
    assert torch.allclose(
        got[first:stop], cross_entropy(logits, ids[0, first + 1 : stop + 1], reduction="none"), atol=1e-4
    )


def test_scores_begin_behind_the_first_context(ways: tuple[Any, dict[str, Arm]], words: models.Begun) -> None:
    model, named = ways
    read: list[tuple[str, int]] = []
    with torch.no_grad():
        chosen = [named["window only"], named["all kept"]]
        scores = score(model, words.stream(TOKENS), chosen, TINY.context, lambda *told: read.append(told))
        behind = losses(named["all kept"], model, words.stream(TOKENS))[TINY.context :]
    assert scores[1].loss == pytest.approx(float(behind.mean()), rel=1e-4)
    assert scores[0].apart == 0 and scores[1].apart == pytest.approx(scores[1].loss - scores[0].loss, abs=0.01)
    assert sum(count for name, count in read if name == "all kept") == TOKENS


def test_attention_to_first_tells_a_sink_from_none(ways: tuple[Any, dict[str, Arm]], words: models.Begun) -> None:
    model, _ = ways
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
        even = attention_to_first(model, words.held_out(4, TINY.context))
    assert model.config._attn_implementation == "sdpa"
    for layer in even:  # all tokens alike: 1 / how many there are
        assert layer == pytest.approx([sum(1 / (n + 1) for n in range(20, 40)) / 20] * 4, rel=1e-3)


def test_everything_is_measured_and_shown(tmp_path: Path, words: models.Begun) -> None:
    _, model = trained(tmp_path / "model", words)
    with Progress(console=Console(quiet=True)) as bar:
        result = command.measure(model, words, TOKENS, 20, TINY.context, bar)
    result["setting"] = {"tokens": TOKENS, "context": TINY.context}
    assert [part["tokens"] for part in result["decoding"]] == list(range(2, 21, 2))
    assert len({part["cache_bytes"] for part in result["decoding"]}) == 1
    assert all(0 < part["model_seconds"] <= part["seconds"] for part in result["decoding"])
    assert all(2 < one["perplexity"] < 1000 and len(one["slices"]) == 20 for one in result["losses"])
    report.plot(json.loads(json.dumps(result)), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    shown = Console(width=120, record=True, file=StringIO())
    for table in (report.losses(result), report.attention(result), report.decoding(result)):
        shown.print(table)
    assert all(one["arm"] in shown.export_text(clear=False) for one in result["losses"])
    assert "has no sinks: its first tokens get at most 10.0%" in report.sinks({"attention_to_first": [[0.0999]]})
    assert "has sinks" in report.sinks({"attention_to_first": [[0.01], [0.2, 0.1]]})


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no size 'huge'"):
        command.main(size="huge", out=tmp_path)
    with pytest.raises(BadInput, match="--tokens 96: give more than 96"):
        command.main(tokens=96, out=tmp_path)
