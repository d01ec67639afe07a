"""Readers of chat logs and request traces; the format is recognised by the fields, never by the file's name.

The log's own replies are part of the prompts that follow, so a replay reads exactly what was said, whatever the
model would say.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from kvstore.bench.conversation import Chat, Conversation, Message, ToolCall, Turn, session_of
from kvstore.bench.traces import read_trace
from kvstore.errors import BadInput

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
FORMATS = (
    'ShareGPT ("conversations" of "from" and "value"), OpenAI or vLLM chats ("messages" of "role" and '
    '"content", also nested), MT-Bench questions ("turns"), token ids ("token_ids"), traces ("hash_ids")'
)
NEAREST = 6  # levels of nesting in which a list of messages is looked for


def read(path: str | Path, block_tokens: int = 512) -> list[Conversation]:
    """The conversations of a log. `block_tokens` is what one hash id of a trace stands for.

    Raises BadInput when the file is missing, empty, cut short, of an unknown format, or holds no turn.
    """
    path = Path(path)
    records = _parsed(path)
    make = _reader_of(records, path, block_tokens)
    conversations = [found for found in make() if found.turns]
    if not conversations:
        raise BadInput(f"{path} holds no turn: a conversation needs at least one message before a reply")
    return conversations


def _parsed(path: Path) -> list[Any]:
    """The records of a JSON array, a JSON object or JSON lines."""
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{path} is not a text file in UTF-8 (byte {error.start}); give a JSON or JSONL chat log"
        ) from error
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}; give the path of a JSON or JSONL chat log") from error
    if not text.strip():
        raise BadInput(f"{path} is empty; give a JSON or JSONL chat log with at least one conversation")
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        return list(_parsed_lines(path, text, error))
    records = whole if isinstance(whole, list) else [whole]
    if records and all(isinstance(record, dict) and "role" in record for record in records):
        return [{"messages": records}]  # the file is one bare list of messages
    return records


def _parsed_lines(path: Path, text: str, whole: json.JSONDecodeError) -> Iterator[Any]:
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    for place, (number, line) in enumerate(lines):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            if place == 0:
                where = f"line {whole.lineno}, column {whole.colno}"
                raise BadInput(f"{path} is not JSON or JSONL, or is cut short: {whole.msg} at {where}") from error
            cut = "the file ends in half a line" if place == len(lines) - 1 else "the line is broken"
            raise BadInput(
                f"{path}, line {number}: {cut} ({error.msg}); remove the line or fetch the file again"
            ) from error


def _reader_of(records: list[Any], path: Path, block_tokens: int) -> Callable[[], Iterable[Conversation]]:
    """The reader of the format that the first record's fields show."""
    if not records:
        raise BadInput(f"{path} holds an empty list; give a log with at least one conversation")
    for place, record in enumerate(records):
        if not isinstance(record, dict):
            raise BadInput(f"{path}, record {place}: an object was expected, not {_shown(record)}; known are {FORMATS}")
    first = records[0]
    if "hash_ids" in first or "token_ids" in first:
        return lambda: read_trace(records, path, block_tokens)
    if "conversations" in first or _messages_of(first) is not None:
        return lambda: _merged([_chat(record, place, path) for place, record in enumerate(records)])
    if isinstance(first.get("turns"), list):
        return lambda: (_questions(record, place, path) for place, record in enumerate(records))
    fields = ", ".join(sorted(map(str, first))) or "no fields"
    raise BadInput(f"{path} is of no known format: its first record has {fields}; known are {FORMATS}")


def _messages_of(record: Any, depth: int = NEAREST) -> list[Any] | None:
    """The nearest list of messages in a record, however deep a trajectory hides it."""
    if depth == 0 or not isinstance(record, dict):
        return None
    for value in record.values():
        if isinstance(value, list) and value and all(isinstance(one, dict) and "role" in one for one in value):
            return value
    inner = (_messages_of(value, depth - 1) for value in record.values())
    return next((found for found in inner if found is not None), None)


def _chat(record: dict[str, Any], place: int, path: Path) -> tuple[str, tuple[Message, ...]]:
    name = session_of(record) or str(place)
    where = f"{path}, record {place}"
    if "conversations" in record:
        listed, role, content = record["conversations"], "from", "value"
    else:
        listed, role, content = _messages_of(record) or record.get("messages"), "role", "content"
    if not isinstance(listed, list):
        raise BadInput(f"{where}: no list of messages; known are {FORMATS}")
    return name, tuple(_message(one, role, content, f"{where}, message {i}") for i, one in enumerate(listed))


def _message(given: Any, role: str, content: str, where: str) -> Message:
    if not isinstance(given, dict) or not isinstance(given.get(role), str):
        raise BadInput(f'{where}: an object with "{role}" and "{content}" was expected, not {_shown(given)}')
    if given[role] not in ROLES:
        raise BadInput(f'{where}: unknown role "{given[role]}"; known are {", ".join(ROLES)}')
    calls = tuple(_tool_call(call, where) for call in given.get("tool_calls") or ())
    return Message(ROLES[given[role]], _text(given.get(content), where), calls, str(given.get("name") or ""))


def _text(content: Any, where: str) -> str:
    """A message's words; a message that only calls tools has none."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        raise BadInput(
            f"{where}: the content is not text ({_shown(content)}); only text can be replayed, remove the rest"
        )
    return "".join(part["text"] for part in parts)


def _tool_call(call: Any, where: str) -> ToolCall:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadInput(f'{where}: a tool call needs "function" with "name" and "arguments", not {_shown(call)}')
    arguments = function.get("arguments", "")
    return ToolCall(function["name"], arguments if isinstance(arguments, str) else json.dumps(arguments))


def _questions(record: dict[str, Any], place: int, path: Path) -> Conversation:
    """MT-Bench: the user's turns only; what the model would have said in between is left empty."""
    questions = record.get("turns")
    if not isinstance(questions, list) or not all(isinstance(question, str) for question in questions):
        raise BadInput(f'{path}, record {place}: "turns" must be a list of texts')
    said = [message for question in questions for message in (Message("user", question), Message("assistant", ""))]
    name = record.get("question_id", place)
    return Conversation(str(name), _turns(tuple(said)))


def _turns(messages: tuple[Message, ...]) -> tuple[Turn, ...]:
    """A turn before every reply, and one for a chat that still waits for its reply."""
    ends = [end for end, message in enumerate(messages) if end and message.role == "assistant"]
    if messages and messages[-1].role != "assistant":
        ends.append(len(messages))
    return tuple(Turn(Chat(messages[:end])) for end in ends)


def _merged(chats: list[tuple[str, tuple[Message, ...]]]) -> Iterator[Conversation]:
    """Logs of requests repeat a session's history in every record: a request that a later one goes on from is dropped.

    Only where no record ends with a reply: in a log of whole chats, one may well begin like another.
    """
    is_request_log = all(messages and messages[-1].role != "assistant" for _, messages in chats)
    continued: set[tuple[Message, ...]] = set()
    if is_request_log:
        for _, messages in chats:
            continued.update(messages[:end] for end in range(1, len(messages)))
    names: dict[str, int] = {}
    for name, messages in chats:
        if messages in continued:
            continue
        again = names[name] = names.get(name, 0) + 1
        yield Conversation(name if again == 1 else f"{name}#{again}", _turns(messages))


def _shown(value: Any) -> str:
    """What was found, without its words: logs are private."""
    if isinstance(value, dict):
        return "an object with " + (", ".join(sorted(map(str, value))) or "no fields")
    return {list: "a list", str: "a text", type(None): "nothing"}.get(type(value), f"a {type(value).__name__}")
