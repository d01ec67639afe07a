"""Readers of request traces: token ids, or hash ids instead of text, one request per record.

A session is what the record names; else the chain of its parents; else the requests whose blocks go on from each
other. Tokens are drawn from the hash ids, the same in every run, so that a trace without text can be replayed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvstore.bench.conversation import Conversation, HashIds, TokenIds, Turn, session_of
from kvstore.errors import BadInput

MAX_TOKEN_ID = 2**32 - 1
SHARED_BLOCKS = 2  # one shared block alone is a system prompt, not a session


def read_trace(records: list[dict[str, Any]], path: Path, block_tokens: int) -> Iterator[Conversation]:
    """The sessions of a trace, in the order in which they begin. Raises BadInput."""
    if block_tokens < 1:
        raise BadInput(f"a hash id stands for at least 1 token, not {block_tokens}")
    sessions: dict[str, list[Turn]] = {}
    roots: dict[str, str] = {}
    open_ends: dict[int, str] = {}
    for place, record in enumerate(records):
        where = f"{path}, record {place}"
        prompt = _token_ids(record, where) if "token_ids" in record else _hash_ids(record, where, block_tokens)
        if "parent_chat_id" in record:
            name = roots.get(str(record["parent_chat_id"]), str(record.get("chat_id", place)))
            roots[str(record.get("chat_id", place))] = name
        else:
            name = session_of(record) or _continued(prompt, open_ends) or f"request-{place}"
        if isinstance(prompt, HashIds) and len(prompt.hash_ids) > SHARED_BLOCKS:
            open_ends[prompt.hash_ids[-2]] = name  # the last block may be partial, the one before it is whole
        sessions.setdefault(name, []).append(Turn(prompt))
    yield from (Conversation(name, tuple(turns)) for name, turns in sessions.items())


def drawn_token_ids(prompt: HashIds, vocabulary: int) -> list[int]:
    """Tokens for a prompt of which only hash ids are known: the same for the same hash id, in every run."""
    ids: list[int] = []
    for hash_id in prompt.hash_ids:
        ids += random.Random(hash_id).choices(range(vocabulary), k=prompt.block_tokens)
    return ids[: prompt.tokens]


def _continued(prompt: TokenIds | HashIds, open_ends: dict[int, str]) -> str:
    """The session whose last whole block the prompt holds, the one that reaches furthest; empty for none."""
    if isinstance(prompt, TokenIds):
        return ""
    for hash_id in reversed(prompt.hash_ids[SHARED_BLOCKS - 1 :]):
        if hash_id in open_ends:
            return open_ends.pop(hash_id)
    return ""


def _token_ids(record: dict[str, Any], where: str) -> TokenIds:
    ids = record["token_ids"]
    if not isinstance(ids, list) or not ids or not all(type(one) is int and 0 <= one <= MAX_TOKEN_ID for one in ids):
        raise BadInput(f'{where}: "token_ids" must be a list of at least one id, each from 0 to {MAX_TOKEN_ID}')
    return TokenIds(tuple(ids))


def _hash_ids(record: dict[str, Any], where: str, block_tokens: int) -> HashIds:
    ids, tokens = record.get("hash_ids"), record.get("input_length")
    if not isinstance(ids, list) or not ids or not all(type(one) is int for one in ids):
        raise BadInput(f'{where}: "hash_ids" must be a list of at least one whole number')
    if type(tokens) is not int or not 1 <= tokens <= len(ids) * block_tokens:
        most = len(ids) * block_tokens
        raise BadInput(
            f'{where}: "input_length" must be from 1 to {most}, which is {len(ids)} blocks of {block_tokens} tokens; '
            f"if the trace has other blocks, say so with --block-tokens"
        )
    return HashIds(tuple(ids), tokens, block_tokens)
