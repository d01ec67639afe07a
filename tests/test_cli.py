"""The command line: what a person sees when all is well, and the one sentence when it is not."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Command, command

import kvstore
from kvstore.bench import logs, models

DEMO = Path(logs.__file__).parent / "data" / "demo.json"
__all__ = ["command"]  # a fixture
VERBS = [
    "replay",
    "simulate",
    "pml",
    "serve",
    "config",
    "doctor",
    "ping",
    "status",
    "top",
    "quota",
    "ls",
    "pin",
    "forget",
    "verify",
]
CHAT = [{"messages": [{"role": "user", "content": "hello " * 60}, {"role": "assistant", "content": "hi"}]}]


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(CHAT))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and "lock" not in path.name}


def test_help_teaches_and_is_quick_to_import() -> None:
    probe = "import sys; from kvstore import cli; print(sorted({'torch', 'numpy', 'matplotlib'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("words", [["--help"], *([verb, "--help"] for verb in VERBS)], ids=" ".join)
def test_help(command: Command, words: list[str]) -> None:
    said = command(*words)
    assert said.code == 0 and "Usage" in said.out


def test_replay_prints_writes_and_comes_back(command: Command, tmp_path: Path) -> None:
    """The main job end to end, twice: the second run finds what the first one left on disk."""
    results = []
    for _ in range(2):
        said = command(
            *(
                "replay",
                DEMO,
                "--model",
                "tiny-words",
                "--conversations",
                2,
                "--tokens",
                4,
                "--dir",
                tmp_path / "cache",
            ),
            *("--json", tmp_path / "out.json", "--report", tmp_path / "out.html", "--interleave"),
        )
        assert (said.code, "equal" in said.out) == (0, True), said.err
        results.append(json.loads((tmp_path / "out.json").read_text()))
    first, second = results
    assert first["turns"] == second["turns"] == 10 and first["conversations"] == 2
    for key in ("prompt_tokens", "cached_tokens", "max_logit_difference", "bytes_by_tier", "tokens_equal"):
        assert first[key]
    for key in ("ttft_seconds", "tpot_seconds"):
        assert first[key]["recompute"]["p50"] > 0 and first[key]["reuse"]["p99"] > 0
    assert second["cached_tokens"] == second["prompt_tokens"] - second["turns"]
    assert second["tokens_by_tier"]["disk"] > 0
    assert "<svg" in (tmp_path / "out.html").read_text()
    said = command("verify", tmp_path / "cache")
    assert (said.code, "all as written" in said.out) == (0, True), said.out + said.err


def test_nothing_is_written_unless_a_place_is_named(
    command: Command, chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    assert command("replay", chat, "--tokens", 1).code == 0
    assert contents(tmp_path) == before


def test_verify_finds_every_flipped_block(command: Command, tmp_path: Path) -> None:
    words = ("replay", DEMO, "--model", "tiny-words", "--conversations", 1, "--tokens", 1, "--dir", tmp_path)
    assert command(*words).code == 0
    extent = min((tmp_path / "v1").glob("extent-*"))
    with extent.open("r+b") as file:
        pages = [at for at in range(0, extent.stat().st_size, 4096) if any(file.read(4096))]
        file.seek(pages[-1] + 99)  # a slot begins with its header, so its last page is payload
        byte = file.read(1)[0]
        file.seek(pages[-1] + 99)
        file.write(bytes([byte ^ 1]))
    said = command("verify", tmp_path)
    assert said.code == 1 and "1 with problems" in said.out
    assert len(said.out.strip().splitlines()) == 2


UNKNOWN = '[{"prompt": "x"}]'
IDS = '[{"token_ids": [1, 2, 300]}]'
BAD: Sequence[tuple[str, str, list[str], str]] = (
    ("unknown format", UNKNOWN, [], "is of no known format"),
    ("empty log", "", [], "is empty; give"),
    ("half a line", '{"messages": []}\n{"mess', [], "line 2: the file ends in half a line"),
    ("outside vocabulary", IDS, [], "token 300 is outside the model's vocabulary of 261; replay with --model"),
    ("size without sense", "", ["--host", "lots"], "write it as"),
    ("size zero", "", ["--disk", "0", "--dir", "cache"], "must be more than nothing"),
    ("size beyond the machine", "", ["--host", "900TiB"], "host"),
    ("not a cache", "", ["--dir", "foreign"], "foreign"),
    ("no such folder", "", ["--model", "./nowhere"], "cannot load the model ./nowhere (there is no such folder)"),
    ("no such plan", "", ["--model", "tiny:fused"], "there is no layer plan 'fused'; choose from standard, cla"),
    ("no folder for the report", "", ["--report", "nowhere/out.html"], "the folder nowhere is not there"),
)


@pytest.mark.parametrize(("log", "words", "sentence"), [one[1:] for one in BAD], ids=[one[0] for one in BAD])
def test_bad_input_is_one_sentence_and_code_2(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    log: str,
    words: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("years of work")
    path = tmp_path / "log.json"
    path.write_text(log or ("" if sentence.startswith("is empty") else json.dumps(CHAT)))
    before = contents(tmp_path)
    said = command("replay", path, *words)
    assert said.code == 2
    assert said.err.startswith("kvstore: ") and sentence in said.err
    assert len(said.err.strip().splitlines()) == 1 and "Traceback" not in said.err
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["missing", "foreign"])
def test_verify_refuses_what_is_no_cache(command: Command, tmp_path: Path, name: str) -> None:
    (tmp_path / "foreign").mkdir()
    said = command("verify", tmp_path / name)
    assert said.code == 2 and "is not a cache directory" in said.err
    assert contents(tmp_path) == {} and not (tmp_path / "missing").exists()


def test_a_directory_in_use_names_its_holder(command: Command, tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import kvstore; s = kvstore.open({str(tmp_path)!r}); print('open', flush=True); input()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "open\n"
        said = command("verify", tmp_path)
        assert said.code == 2 and str(holder.pid) in said.err
    finally:
        holder.communicate("\n", timeout=60)


def test_verify_makes_nothing_smaller(command: Command, tmp_path: Path) -> None:
    with kvstore.open(tmp_path, disk="1GiB") as store:
        reuse_words(store)
        held = store.stats()["tiers"]["disk"]
    assert command("verify", tmp_path).code == 0
    with kvstore.open(tmp_path, disk="1GiB") as store:
        assert store.stats()["tiers"]["disk"]["bytes"] == held["bytes"] > 0


def reuse_words(store: kvstore.Store) -> None:
    """Leaves a few blocks on disk."""
    from kvstore.adapters.transformers import Reuse

    reuse = Reuse(models.tiny_llama(300, layers=1, width=32, heads=1, kv_heads=1), store)
    hit = reuse.load(torch.arange(290).reshape(1, -1))
    with torch.inference_mode():
        reuse.model(torch.arange(290).reshape(1, -1), past_key_values=hit.cache, use_cache=True)
    reuse.save(torch.arange(290).reshape(1, -1), hit.cache).wait()


def saved_model(folder: Path, template: bool, model: Any) -> Path:
    """A model and a tokenizer of one's own, as a user has them on disk."""
    from tokenizers import Regex, Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, **{chr(one): one for one in range(1, 256)}}
    tokenizer = Tokenizer(kinds.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    if template:
        fast.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}<assistant>"
    fast.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("template", [True, False], ids=["template", "plain"])
def test_a_model_of_ones_own(command: Command, tmp_path: Path, template: bool) -> None:
    model = models.tiny_llama(256, layers=1, width=32, heads=1, kv_heads=1)
    folder = saved_model(tmp_path / "mine", template, model)
    words = ("--conversations", 1, "--json", tmp_path / "out.json", "--tokens", 2, "--queue", 3)
    said = command("replay", DEMO, "--model", folder, *words)
    assert said.code == 0, said.err
    result: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())
    assert result["model"] == "mine" and result["tokens_equal"] and result["settings"]["queue"] == 3
    assert result["cached_tokens"] > result["prompt_tokens"] / 2


def test_a_model_that_stores_half(command: Command, tmp_path: Path) -> None:
    """The table says so, and the tiers hold half of what they hold for a model that stores all."""
    model = models.tiny_fusedkv("fusedkv", 256, layers=4, width=32, heads=2, kv_heads=1)
    folder = saved_model(tmp_path / "mine", True, model)
    held: dict[Any, dict[str, int]] = {}
    for name in (folder, "tiny:standard", "tiny:fusedkv"):
        words = ("--conversations", 1, "--tokens", 2, "--dir", tmp_path / f"cache-{len(held)}")
        said = command("replay", DEMO, "--model", name, *words, "--json", tmp_path / "out.json")
        assert said.code == 0, said.err
        result = json.loads((tmp_path / "out.json").read_text())
        assert result["tokens_equal"]
        plan = result["layer_plan"]
        assert (plan["stored_layers"], plan["layers"]) == ((4, 4) if name == "tiny:standard" else (2, 4))
        assert plan["token_bytes"] * 4 == plan["token_bytes_of_all_layers"] * plan["stored_layers"]
        assert f"{plan['token_bytes']:,}" in said.out and f"{plan['stored_layers']} of 4 layers" in said.out
        held[name] = result["bytes_held_by_tier"]
    for tier in ("host", "disk"):
        assert held["tiny:fusedkv"][tier] == pytest.approx(held["tiny:standard"][tier] / 2, rel=0.02)
