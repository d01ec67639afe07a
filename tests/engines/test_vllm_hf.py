"""A conversation that moves: what Hugging Face read vLLM goes on with, and the other way round, as each would alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import chats
import pytest
import transformers
from hugging_face import Replies, replies
from inside import Answer, running
from serving import transfer

from kvstore.layout import BLOCK_TOKENS

pytest_plugins = ["small_models"]
pytestmark = [pytest.mark.timeout(900)]
TOKENS = 32
PROMPTS = 20


def store_in(folder: Path) -> dict[str, Any]:
    return transfer(dir=str(folder), host="256MiB", disk="1GiB")


@pytest.fixture(scope="module")
def prompts(llama: Path) -> list[list[int]]:
    """Turns of chats, each of its own conversation."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    count = PROMPTS if chats.LOG == chats.TAU else 2
    turns = chats.turns(3 * PROMPTS, 3)
    last = {turn.conversation: turn for turn in turns}
    found = [chats.ids(tokenizer, turn) for turn in last.values()]
    assert len(found) >= count
    return found


@pytest.fixture(scope="module")
def vllm_alone(tmp_path_factory: pytest.TempPathFactory, llama: Path, prompts: list[list[int]]) -> list[Answer]:
    with running(llama, tmp_path_factory.mktemp("alone") / "log") as engine:
        return [engine.one(ids, TOKENS) for ids in prompts]


@pytest.fixture(scope="module")
def hf_alone(llama: Path, prompts: list[list[int]]) -> Replies:
    return replies(llama, None, prompts, TOKENS)


def test_vllm_goes_on_with_what_hugging_face_read(
    tmp_path: Path, llama: Path, prompts: list[list[int]], vllm_alone: list[Answer], hf_alone: Replies
) -> None:
    wrote = replies(llama, tmp_path / "cache", prompts, 1)
    with running(llama, tmp_path / "log", store_in(tmp_path / "cache")) as engine:
        identified = engine.fingerprint()
        assert identified == wrote.fingerprint
        said = []
        for ids in prompts:
            engine.forget()
            said.append(engine.one(ids, TOKENS))
    same = sum(mine.tokens == alone.tokens for mine, alone in zip(said, vllm_alone, strict=True))
    print(f"{same} of {len(prompts)} as vLLM alone, {[mine.tokens for mine in said] == list(hf_alone.tokens)=}")
    assert same == len(prompts)
    assert [mine.cached for mine in said] == [len(ids) - 1 for ids in prompts]


def test_hugging_face_goes_on_with_what_vllm_read(
    tmp_path: Path, llama: Path, prompts: list[list[int]], hf_alone: Replies
) -> None:
    with running(llama, tmp_path / "log", store_in(tmp_path / "cache")) as engine:
        for ids in prompts:
            engine.one(ids, 1)
    said = replies(llama, tmp_path / "cache", prompts, TOKENS)
    same = sum(mine == alone for mine, alone in zip(said.tokens, hf_alone.tokens, strict=True))
    print(f"{same} of {len(prompts)} as transformers alone, blocks of {sorted(said.writers)}")
    assert same == len(prompts)
    # It stores what it computes with keys as they were before, so it goes on behind whole blocks of the other's.
    assert said.cached == tuple((len(ids) - 1) // BLOCK_TOKENS * BLOCK_TOKENS for ids in prompts)
    assert any(writer.startswith("vllm") for writer in said.writers)


def test_both_engines_say_the_same_alone(vllm_alone: list[Answer], hf_alone: Replies) -> None:
    assert [answer.tokens for answer in vllm_alone] == list(hf_alone.tokens)


def test_another_model_is_not_served_these_blocks(tmp_path: Path, llama: Path, prompts: list[list[int]]) -> None:
    """The same checkpoint in another dtype."""
    replies(llama, tmp_path / "cache", prompts[:1], 1)
    with running(llama, tmp_path / "log", store_in(tmp_path / "cache"), dtype="bfloat16") as engine:
        assert engine.one(prompts[0], 2).cached == 0
