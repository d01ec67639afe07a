"""The readers of chat logs and traces: what each format becomes, and what a bad one says."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kvstore.bench import logs
from kvstore.bench.conversation import Chat, HashIds, Message, TokenIds, ToolCall
from kvstore.bench.encoders import ByteEncoder, WordEncoder, token_ids
from kvstore.bench.traces import drawn_token_ids
from kvstore.errors import BadInput

MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "no"},
]
TOOLS = [
    {"role": "user", "content": [{"type": "text", "text": "where is "}, {"type": "text", "text": "it?"}]},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "find", "arguments": '{"a": 1}'}}]},
    {"role": "tool", "name": "find", "content": "there"},
]


def written(folder: Path, content: object, lines: bool = False) -> Path:
    path = folder / "log"
    text = "\n".join(map(json.dumps, content)) if lines and isinstance(content, list) else json.dumps(content)
    path.write_text(text if not isinstance(content, str) else content)
    return path


def prompts(path: Path) -> list[list[tuple[tuple[str, str], ...]]]:
    """Per conversation and turn: (role, content) of each message."""
    found = []
    for conversation in logs.read(path):
        chats = [turn.prompt for turn in conversation.turns]
        assert all(isinstance(chat, Chat) for chat in chats)
        found.append([tuple((m.role, m.content) for m in chat.messages) for chat in chats if isinstance(chat, Chat)])
    return found


SAID = tuple((str(m["role"]), str(m["content"])) for m in MESSAGES)
SHAREGPT = [{"from": "human", "value": "one?"}, {"from": "gpt", "value": "yes"}, {"from": "human", "value": "two?"}]


@pytest.mark.parametrize(
    ("content", "lines", "expected"),
    [
        ([{"id": "a", "messages": MESSAGES}], False, [[SAID[:2], SAID[:4]]]),
        ([{"messages": MESSAGES}, {"messages": MESSAGES[:2]}], True, [[SAID[:2], SAID[:4]], [SAID[:2]]]),
        ({"messages": MESSAGES}, False, [[SAID[:2], SAID[:4]]]),
        (MESSAGES, False, [[SAID[:2], SAID[:4]]]),
        ([{"info": {"task": [1]}, "run": {"traj": MESSAGES}}], False, [[SAID[:2], SAID[:4]]]),
        ([{"id": "x", "conversations": SHAREGPT}], False, [[SAID[1:2], SAID[1:4]]]),
        ([{"question_id": 8, "turns": ["one?"]}], True, [[SAID[1:2]]]),
        # a request log repeats the history: the request that a later one goes on from is dropped
        ([{"messages": MESSAGES[:2]}, {"messages": MESSAGES[:4]}], True, [[SAID[:2], SAID[:4]]]),
        # an assistant that speaks first has no prompt
        ([{"messages": [MESSAGES[2], *MESSAGES[1:3]]}], False, [[(SAID[2], SAID[1])]]),
    ],
    ids=["openai", "jsonl", "object", "bare", "nested", "sharegpt", "mt-bench", "requests", "assistant-first"],
)
def test_formats(tmp_path: Path, content: object, lines: bool, expected: object) -> None:
    assert prompts(written(tmp_path, content, lines)) == expected


def test_tool_calls_survive(tmp_path: Path) -> None:
    (conversation,) = logs.read(written(tmp_path, [{"messages": TOOLS}]))
    last = conversation.turns[-1].prompt
    assert isinstance(last, Chat)
    assert last.messages == (
        Message("user", "where is it?"),
        Message("assistant", "", (ToolCall("find", '{"a": 1}'),)),
        Message("tool", "there", name="find"),
    )
    assert last.messages[1].as_dict()["tool_calls"][0]["function"]["name"] == "find"
    assert b"find" in bytes(one for one in ByteEncoder().encode(last.messages) if one < 256)


def test_traces_become_sessions(tmp_path: Path) -> None:
    requests = [
        {"input_length": 10, "hash_ids": [1, 2, 3]},
        {"input_length": 12, "hash_ids": [1, 7, 8]},
        {"input_length": 17, "hash_ids": [1, 2, 4, 5, 6]},  # goes on behind the whole blocks of the first
    ]
    first, second = logs.read(written(tmp_path, requests, lines=True), block_tokens=4)
    assert [turn.prompt for turn in first.turns] == [HashIds((1, 2, 3), 10, 4), HashIds((1, 2, 4, 5, 6), 17, 4)]
    assert len(second.turns) == 1
    one, other = (drawn_token_ids(turn.prompt, 50) for turn in first.turns if isinstance(turn.prompt, HashIds))
    assert (len(one), len(other)) == (10, 17) and max(one + other) < 50
    assert one[:8] == other[:8] and one[8:] != other[8:10]


def test_parents_make_a_session(tmp_path: Path) -> None:
    requests = [
        {"chat_id": 5, "parent_chat_id": -1, "input_length": 3, "hash_ids": [1]},
        {"chat_id": 6, "parent_chat_id": -1, "input_length": 3, "hash_ids": [2]},
        {"chat_id": 9, "parent_chat_id": 5, "input_length": 7, "hash_ids": [1, 3]},
    ]
    found = logs.read(written(tmp_path, requests, lines=True), block_tokens=4)
    assert [(one.id, len(one.turns)) for one in found] == [("5", 2), ("6", 1)]


def test_token_ids(tmp_path: Path) -> None:
    (found,) = logs.read(written(tmp_path, [{"session_id": "s", "token_ids": [1, 2]}] * 2, lines=True))
    assert [turn.prompt for turn in found.turns] == [TokenIds((1, 2)), TokenIds((1, 2))]
    with pytest.raises(
        BadInput, match=r"here: token 261 is outside the model's vocabulary of 261; replay with --model"
    ):
        token_ids(ByteEncoder(), TokenIds((5, 261)), "here")


@pytest.mark.parametrize("encoder", [ByteEncoder(), WordEncoder(512)], ids=["bytes", "words"])
def test_a_turn_is_a_prefix_of_the_next(tmp_path: Path, encoder: ByteEncoder | WordEncoder) -> None:
    (conversation,) = logs.read(written(tmp_path, [{"messages": [*MESSAGES, *TOOLS]}]))
    encoded = [token_ids(encoder, turn.prompt, "") for turn in conversation.turns]
    for shorter, longer in itertools.pairwise(encoded):
        assert longer[: len(shorter)] == shorter
    assert 0 <= min(encoded[-1]) and max(encoded[-1]) < encoder.vocabulary


HALF = json.dumps({"messages": MESSAGES})
BAD: Sequence[tuple[str, Any, str]] = (
    ("empty", "", "is empty; give a JSON"),
    ("blank", " \n ", "is empty; give a JSON"),
    ("empty-list", "[]", "empty list"),
    ("not-json", "hello", "not JSON or JSONL, or is cut short: .* at line 1, column 1"),
    ("cut-json", json.dumps([{"messages": MESSAGES}])[:-9], "is cut short: .* at line 1"),
    ("half-a-line", f"{HALF}\n{HALF[:40]}", "line 2: the file ends in half a line .*; remove the line"),
    ("broken-line", f"{HALF}\n{HALF[:40]}\n{HALF}", "line 2: the line is broken"),
    (
        "unknown",
        [{"prompt": "x", "completion": "y"}],
        "no known format: its first record has completion, prompt; known",
    ),
    ("numbers", [1, 2], "record 0: an object was expected, not a int"),
    ("mixed", [{"messages": MESSAGES}, 7], "record 1: an object was expected"),
    ("role", [{"messages": [{"role": "wizard", "content": "x"}]}], 'message 0: unknown role "wizard"; known are'),
    ("image", [{"messages": [{"role": "user", "content": [{"type": "image"}]}]}], "not text .* only text can be"),
    ("no-value", [{"conversations": [{"from": "human"}, "x"]}], 'message 1: an object with "from" and "value"'),
    ("no-turn", [{"messages": [{"role": "assistant", "content": "hello"}]}], "holds no turn"),
    ("call", [{"messages": [{"role": "user", "content": "", "tool_calls": [{}]}]}], 'a tool call needs "function"'),
    ("too-long", [{"hash_ids": [1], "input_length": 513}], "from 1 to 512, .* --block-tokens"),
    ("bad-hash", [{"hash_ids": ["a"], "input_length": 5}], '"hash_ids" must be a list'),
    ("bad-ids", [{"token_ids": [-1]}], '"token_ids" must be a list'),
    ("big-ids", [{"token_ids": [2**32]}], "from 0 to 4294967295"),
    ("questions", [{"turns": [1]}], '"turns" must be a list of texts'),
)


@pytest.mark.parametrize(("content", "sentence"), [one[1:] for one in BAD], ids=[one[0] for one in BAD])
def test_bad_logs_say_what_and_where(tmp_path: Path, content: Any, sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence) as caught:
        logs.read(written(tmp_path, content))
    assert str(caught.value).startswith(str(tmp_path / "log")) and "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"cannot read .*missing\.json: No such file"):
        logs.read(tmp_path / "missing.json")
    with pytest.raises(BadInput, match="cannot read"):
        logs.read(tmp_path)
    (tmp_path / "log").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(BadInput, match="not a text file in UTF-8"):
        logs.read(tmp_path / "log")


def test_messages_do_not_leak_text(tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        logs.read(written(tmp_path, [{"messages": [{"role": "user", "content": {"secret": "my password"}}]}]))
    assert "password" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "conversations", "turns"),
    [
        ("conversation_trace.jsonl", 8100, 12031),
        ("fastchat_dummy_conversation.sharegpt.json", 500, 1000),
        ("mt_bench_question.jsonl", 80, 160),
        ("tau_airline_gpt4o_trajectories.json", 200, 2654),
    ],
)
def test_public_logs(traces: Path, name: str, conversations: int, turns: int) -> None:
    found = logs.read(traces / name)
    assert (len(found), sum(len(one.turns) for one in found)) == (conversations, turns)


def test_our_own_log() -> None:
    found = logs.read(Path(logs.__file__).parent / "data" / "demo.json")
    assert len(found) == 6 and all(3 <= len(one.turns) <= 8 for one in found)
    firsts = {one.turns[0].prompt.messages[0] for one in found if isinstance(one.turns[0].prompt, Chat)}
    assert len(firsts) == 1  # one system prompt for all
