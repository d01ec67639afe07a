"""Training of layer plans: same text and seeds for all, runs that are kept, and results that can be read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvstore import BadInput
from kvstore.bench.train_plans import __main__ as command
from kvstore.bench.train_plans import arms, corpus, results, training
from kvstore.bench.train_plans.arms import ARMS, Size

TINY = Size(hidden=16, layers=4, heads=2, context=16, batch=2, steps=4, held_out=4, evaluations=2)


def texts(folder: Path, files: int = 60) -> Path:
    for number in range(files):
        (folder / f"{number}.txt").write_text(f"file {number} says {number * number}. " * 20)
    (folder / "picture.bin").write_bytes(b"\xff" * 1000)
    return folder


def run(*words: object) -> subprocess.CompletedProcess[str]:
    started = [sys.executable, "-m", "kvstore.bench.train_plans", *map(str, words)]
    return subprocess.run(started, capture_output=True, text=True, timeout=150)


def test_files_are_for_training_or_for_validation_never_both(tmp_path: Path) -> None:
    text = corpus.read(texts(tmp_path), 1 << 20, 16)
    assert text.files == 60
    parts = [bytes(part.tolist()).split(corpus.END) for part in (text.train, text.validation)]
    train, held_out = (set(part) - {b""} for part in parts)
    assert train and held_out and not train & held_out
    assert len(train | held_out) == 60
    assert not any(b"\xff" in part for part in train | held_out)


def test_the_order_of_text_depends_on_the_seed_only(tmp_path: Path) -> None:
    text = corpus.read(texts(tmp_path), 1 << 20, 16)
    batches = [text.batch(4, 16, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(batches[0], batches[1]) and not torch.equal(batches[0], batches[2])
    assert torch.equal(text.held_out(3, 16), text.held_out(3, 16))


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(BadInput, match="too little text"):
        corpus.read(tmp_path, 1 << 20, 16)
    with pytest.raises(BadInput, match="there is no"):
        corpus.read(tmp_path / "nowhere", 1 << 20, 16)


def test_every_arm_learns_and_says_what_its_cache_takes(tmp_path: Path, seed: int) -> None:
    text = corpus.read(texts(tmp_path), 1 << 20, 16)
    caches, firsts = {}, set()
    for arm in ARMS:
        config = arms.configured(arm, TINY)
        model = arms.build(config, seed)
        points = [
            point
            for point in training.train(model, text, TINY, seed, torch.device("cpu"))
            if not isinstance(point, int)
        ]
        assert [point.step for point in points] == [2, 4]
        assert points[-1].tokens == 4 * 2 * 16
        assert points[-1].validation < points[0].validation < 6
        caches[arm] = arms.cached_numbers(config)
        firsts.add(points[0].train)
    assert {arm: caches["standard"] / size for arm, size in caches.items()} == {**dict.fromkeys(ARMS, 2), "standard": 1}
    assert len(firsts) > 4  # they are different models


def test_vectors_of_sums_do_not_decay(seed: int) -> None:
    decaying, others = training.groups(arms.build(arms.configured("fusedkv", TINY), seed))
    assert decaying["weight_decay"] > 0 and others["weight_decay"] == 0
    assert {weight.ndim for weight in decaying["params"]} == {2}
    assert {weight.ndim for weight in others["params"]} == {1, 3}


def test_the_rate_goes_up_and_down() -> None:
    rates = [training.rate_at(step, 100) for step in range(100)]
    assert rates[0] < rates[4] == max(rates) == 1.0
    assert rates[-1] == pytest.approx(training.FLOOR, abs=0.01)


def test_standings_are_of_seeds_that_both_have() -> None:
    def made(arm: str, seed: int, loss: float) -> results.Run:
        return results.Run(arm, seed, {}, 10, 4 if arm == "standard" else 2, [{"validation": loss}])

    runs = [made("standard", 0, 2.0), made("standard", 1, 2.2), made("cla", 1, 2.1), made("cla", 2, 2.5)]
    standard, cla = results.standings(runs)
    assert standard.mean == pytest.approx(2.1) and standard.apart == 0.0
    assert cla.cache == 0.5
    assert cla.apart == pytest.approx(-0.1) and cla.apart_spread is None
    assert cla.spread == pytest.approx(0.2828, abs=1e-3)


def test_the_command_goes_on_where_it_stopped(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    text = texts(tmp_path / "text")
    words = ("--text", text, "--steps", 2, "--plans", "standard,fusedkv", "--out", tmp_path / "out")
    done = run(*words, "--save", tmp_path / "models")
    assert done.returncode == 0, done.stderr
    assert "fusedkv" in done.stdout and "50%" in done.stdout
    lines = (tmp_path / "out" / results.RUNS).read_text().splitlines()
    assert len(lines) == 2
    cut = lines[1][: lines[1].index("}") + 1]  # it was killed while it wrote
    (tmp_path / "out" / results.RUNS).write_text(lines[0] + "\n" + cut)
    out = tmp_path / "out"
    command.main(text=text, size="smoke", plans="standard,fusedkv", seeds=2, steps=2, device="cpu", out=out)
    again = (tmp_path / "out" / results.RUNS).read_text().splitlines()
    assert again[0] == lines[0] and len(again) == 5
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(one["arm"], one["seed"]) for one in found["runs"]] == [
        (a, s) for s in (0, 1) for a in ("standard", "fusedkv")
    ]
    assert [one["validation"] for one in found["runs"][1]["curve"]] == [
        one["validation"] for one in json.loads(lines[1])["curve"]
    ]
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "models" / "fusedkv-0").config.kv_plan == "fusedkv"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--size", "huge"), "there is no size 'huge'; choose from smoke, small, large"),
        (("--plans", "gqa,mla"), "--plans 'gqa,mla': choose from standard, gqa"),
        (("--text", "nowhere"), "there is no nowhere; give a text file"),
    ],
)
def test_bad_input_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, str], sentence: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_plans", *words])
    with pytest.raises(SystemExit) as ended:
        command.cli()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert sentence in said and len(said.strip().splitlines()) == 1
