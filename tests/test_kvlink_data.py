"""Examples to train on: what each kind becomes, what is refused and where, and mixtures that can go on anywhere."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kvstore import BadInput
from kvstore.adapters.kvlink import LinkTokens
from kvstore.adapters.kvlink.data import Example, Reader, Words, checked
from kvstore.adapters.kvlink.mixture import WEIGHTS, Mixture, Source

LINKS = LinkTokens(start=300, per_document=2, documents=4)
WORDS = Words(system="S", document="[{text}]", role="<{role}>", summarize="sum")
END = [299]
CHAT = [
    {"role": "system", "content": "be"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]
LINES: dict[str, dict[str, Any]] = {
    "text": {"text": "running text"},
    "chat": {"messages": CHAT},
    "chat_memory": {"messages": CHAT},
    "qa": {"question": "why", "answer": "so"},
    "qa_memory": {"documents": ["one", "two"], "question": "why", "answer": "so"},
    "summary": {"documents": ["one", "two"], "summary": "short"},
}


def encode(text: str) -> list[int]:
    return list(text.encode())


def said(ids: Any) -> str:
    """Token ids as they were written; ends are "."."""
    return "".join("." if token == END[0] else chr(token) for token in ids)


def read(kind: str, fields: dict[str, Any]) -> Example:
    return Reader(encode, LINKS, WORDS, END).example(kind, checked(kind, json.dumps(fields).encode()))


def parts(example: Example) -> tuple[str, list[str], str, str]:
    documents = [said(document) for document in example.documents]
    return said(example.system), documents, said(example.question), said(example.answer)


def written(folder: Path, name: str, *lines: Any) -> Path:
    path = folder / name
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_what_each_kind_becomes() -> None:
    assert {kind: parts(read(kind, fields)) for kind, fields in LINES.items()} == {
        "text": ("", [], "", "running text"),
        "chat": ("be", [], "<user>a.<assistant>b.<user>c.<assistant>", "d."),
        "chat_memory": ("be", ["<user>a.<assistant>b."], "<user>c.<assistant>", "d."),
        "qa": ("S", [], "<user>why<assistant>", "so."),
        "qa_memory": ("S", ["[one]", "[two]"], "<user>why<assistant>", "so."),
        "summary": ("S", ["[one]", "[two]"], "<user>sum<assistant>", "short."),
    }


def test_only_answers_are_learned() -> None:
    laid = read("qa_memory", LINES["qa_memory"]).laid(LINKS)
    learned = [label for label in laid.labels if label != -100]
    assert said(learned) == "so." and laid.token_ids[-3:] == learned
    assert laid.token_ids.index(300) == 1 + 5  # behind system and the first document
    assert {segment for token, segment in zip(laid.token_ids, laid.segments, strict=True) if token >= 299} == {0}


def test_long_texts_are_cut_into_no_more_pieces_than_slots() -> None:
    for tokens, expected in ((100, [100]), (300, [128, 128, 44]), (1000, [250] * 4)):
        example = read("summary", {"text": "x" * tokens, "summary": "short"})
        assert [len(document) for document in example.documents] == expected


def test_a_long_conversation_keeps_its_last_exchanges() -> None:
    turns = [{"role": role, "content": str(turn)} for turn in range(9) for role in ("user", "assistant")]
    example = read("chat_memory", {"messages": turns})
    assert [said(document)[6] for document in example.documents] == ["4", "5", "6", "7"]


def test_what_is_too_long_is_cut_where_it_hurts_least() -> None:
    example = Example(answer=[1] * 4, question=[2] * 6, documents=([3] * 50, [4] * 5, [5] * 30))
    whole = len(example.laid(LINKS))
    assert whole == 4 + 6 + 85 + 6 and example.fitted(LINKS, whole) is example
    cut = example.fitted(LINKS, 60)
    assert [len(document) for document in cut.documents] == [19, 5, 19]  # 44 left, and 1 is over
    assert (cut.answer, cut.question) == (example.answer, example.question)
    with pytest.raises(BadInput, match="takes 16 of 18 tokens"):
        example.fitted(LINKS, 18)
    bare = Example(answer=[1] * 4, question=list(range(6)), system=(9,))
    assert bare.fitted(LINKS, 8).laid(LINKS).token_ids == [9, 3, 4, 5, 1, 1, 1, 1]
    assert bare.fitted(LINKS, 4).laid(LINKS).token_ids == [9, 1, 1, 1]


@pytest.mark.parametrize(
    ("kind", "line", "complaint"),
    [
        ("qa", '{"question": "why"}', 'lacks "answer"'),
        ("qa", '{"question": 3, "answer": "so"}', '"question" is not a text'),
        ("qa_memory", '{"documents": "one", "question": "why", "answer": "so"}', '"documents" is not a list of texts'),
        ("summary", '{"summary": "short"}', 'lacks "text"'),
        ("chat", '{"messages": [{"role": "user", "content": "a"}]}', "last, an assistant's reply"),
        ("chat", '{"messages": ["a", "b"]}', '"messages" is not a list of'),
        ("text", '{"text": ', "is no JSON"),
        ("text", "[1]", "is no JSON object"),
    ],
)
def test_a_bad_line_is_refused_with_its_place(kind: str, line: str, complaint: str, tmp_path: Path) -> None:
    path = written(tmp_path, "some.jsonl", LINES[kind], "", line)
    with pytest.raises(BadInput, match=r"some\.jsonl, line 3: .*" + complaint.replace("[", r"\[")):
        Source.open(path, kind)


def test_lines_without_tokens_are_refused_when_they_are_drawn(tmp_path: Path) -> None:
    source = Source.open(written(tmp_path, "some.jsonl", LINES["text"], {"text": ""}), "text")
    reader = Reader(encode, LINKS)
    assert said(source.example(0, reader, 99).answer) == "running text"
    with pytest.raises(BadInput, match=r"some\.jsonl, line 2: its text has no tokens"):
        source.example(1, reader, 99)


def mixture(folder: Path, **more: Any) -> Mixture:
    """A file of three lines of every kind; weights as they are by themselves."""
    for kind, fields in LINES.items():
        written(folder, f"{kind}.jsonl", fields, "", fields, fields)
    files = [{"path": f"{kind}.jsonl", "kind": kind} for kind in LINES]
    described = written(folder, "mixture.json", {"files": files, "words": {"document": "[{text}]"}})
    return Mixture.read(described, encode, LINKS, END, **more)


def test_draws_follow_weights_and_depend_on_nothing_else(tmp_path: Path) -> None:
    mixed = mixture(tmp_path, seed=3)
    draws = [mixed.draw(step, row) for step in range(100) for row in range(30)]
    kinds = Counter(source.kind for source, _ in draws)
    for kind, weight in WEIGHTS.items():
        assert abs(kinds[kind] / len(draws) - weight / 100) < 0.04
    assert {number for _, number in draws} == {0, 1, 2}
    again = mixture(tmp_path, seed=3)
    assert again.digest() == mixed.digest()
    assert again.batch(57, 4) == mixed.batch(57, 4)  # whatever was drawn before
    other = mixture(tmp_path, seed=4)
    assert other.digest() != mixed.digest()
    assert [other.batch(step, 8) for step in range(3)] != [mixed.batch(step, 8) for step in range(3)]
    assert {len(row) for row in mixture(tmp_path, tokens=33).batch(0, 30)} <= set(range(34))
    assert "[one]" in {said(text) for text in read_with(mixed).documents}  # the words of the file


def read_with(mixed: Mixture) -> Example:
    return mixed.reader.example("qa_memory", LINES["qa_memory"])


@pytest.mark.parametrize(
    ("described", "complaint"),
    [
        ({}, 'lacks "files"'),
        ({"files": []}, "at least one file"),
        ({"files": [{"path": "text.jsonl"}]}, 'file 0 needs "path" and "kind"'),
        ({"files": [{"path": "text.jsonl", "kind": "poem"}]}, "no kind 'poem'; choose from text, chat"),
        ({"files": [{"path": "text.jsonl", "kind": "text", "weight": 0}]}, "a number above 0"),
        ({"files": [{"path": "text.jsonl", "kind": "text", "weight": "much"}]}, "no number"),
        ({"files": [{"path": "nowhere.jsonl", "kind": "text"}]}, "nowhere.jsonl cannot be read"),
        ({"files": [{"path": "empty.jsonl", "kind": "text"}]}, "empty.jsonl has no examples"),
        ({"files": [{"path": "text.jsonl", "kind": "text"}], "words": {"sytem": ""}}, "has sytem; there are document"),
        ({"files": [{"path": "text.jsonl", "kind": "text"}], "words": [1]}, "no object of texts"),
        ([1], "is no JSON object"),
        ("{", "is no JSON"),
    ],
)
def test_a_bad_mixture_is_refused(described: Any, complaint: str, tmp_path: Path) -> None:
    written(tmp_path, "text.jsonl", LINES["text"])
    written(tmp_path, "empty.jsonl")
    path = written(tmp_path, "mixture.json", described)
    with pytest.raises(BadInput, match=complaint):
        Mixture.read(path, encode, LINKS)
    with pytest.raises(BadInput, match="cannot be read"):
        Mixture.read(tmp_path / "elsewhere.json", encode, LINKS)
