"""The main job: chats replayed through a real transformer, every turn from the store, with nothing changed."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_runs import leases_left

import kvstore
from kvstore.adapters.transformers import Reuse
from kvstore.bench import logs, summary
from kvstore.bench.conversation import Chat, Conversation, Message, TokenIds, Turn
from kvstore.bench.encoders import WordEncoder, token_ids
from kvstore.bench.models import Subject, tiny_llama
from kvstore.bench.replay import Replay, Row, check, ordered
from kvstore.block import address_of
from kvstore.errors import BadInput
from kvstore.load import Load, Piece, Place

HEAD_DIM = 32
DEMO = Path(logs.__file__).parent / "data" / "demo.json"


@pytest.fixture(scope="module")
def subject() -> Subject:
    encoder = WordEncoder(4096)
    return Subject("small", tiny_llama(encoder.vocabulary, layers=2, width=64, heads=2, kv_heads=1), encoder)


def replayed(subject: Subject, store: Any, conversations: list[Conversation], **options: Any) -> Replay:
    run = Replay(subject, store, Reuse(subject.model, store), **options)
    for _ in run.run(conversations):
        pass
    return run


def infinite_cache(prompts: list[list[int]]) -> list[int]:
    """Tokens of each prompt that a token-level prefix cache without limits would have: a trie."""
    trie: dict[int, Any] = {}
    hits = []
    for prompt in prompts:
        node, depth, missed = trie, 0, False
        for token in prompt:
            missed = missed or token not in node
            depth += not missed
            node = node.setdefault(token, {})
        hits.append(min(depth, len(prompt) - 1))  # one token is left for the model
    return hits


def distinct_tokens(prompts: list[list[int]]) -> int:
    """Tokens in one copy of each chain: nodes of the trie of all prompts."""
    return len(
        {hash_chain for prompt in prompts for hash_chain in itertools.accumulate(prompt, lambda a, b: hash((a, b)))}
    )


def encoded(subject: Subject, conversations: list[Conversation], interleave: bool = False) -> list[list[int]]:
    turns = ordered(conversations, interleave)
    return [token_ids(subject.encoder, conversation.turns[number].prompt, "") for conversation, number in turns]


@pytest.mark.parametrize("interleave", [False, True], ids=["one-by-one", "interleaved"])
def test_hits_are_token_exact_and_outputs_equal(
    traces: Path, tmp_path: Path, subject: Subject, interleave: bool
) -> None:
    chats = logs.read(traces / "tau_airline_gpt4o_trajectories.json")[: 4 if interleave else 20]
    with kvstore.open(tmp_path / "cache", host="1GiB", disk="2GiB") as store:
        run = replayed(subject, store, chats, tokens=3, interleave=interleave)
        layout = run.reuse.layout
        store.flush()
        held = store.stats()["tiers"]["disk"]["bytes"]
        assert leases_left(store) == 0
        result = summary.summarize(run, "tau", {})
    prompts = encoded(subject, chats, interleave)
    assert [row.prompt_tokens for row in run.rows] == [len(prompt) for prompt in prompts]
    assert [row.cached_tokens for row in run.rows] == infinite_cache(prompts)
    assert result["tokens_equal"] and result["tokens_different"] == 0
    assert result["max_logit_difference"] < 20 * result["logit_noise"] < 1e-2
    one_copy = distinct_tokens(prompts) * sum(
        shape.heads * (shape.key_dim + shape.value_dim) * 4 for shape in layout.layers
    )
    assert one_copy <= held <= 1.1 * one_copy


def test_scarce_memory_costs_hits_and_changes_nothing(tmp_path: Path, subject: Subject) -> None:
    """Memory for a few blocks: saves end early, loads are cut, the disk serves; the outputs stay what they are."""
    with kvstore.open(tmp_path / "cache", host="1MiB", disk="256MiB") as store:
        result = summary.summarize(replayed(subject, store, logs.read(DEMO), interleave=True), "demo", {})
        assert leases_left(store) == 0
    assert result["tokens_equal"] and result["max_logit_difference"] < 20 * result["logit_noise"]
    assert result["counters"]["host_evicted_blocks"] > 0
    assert result["tokens_by_tier"]["disk"] > 0
    assert sum(result["tokens_by_tier"].values()) == result["cached_tokens"]


def test_a_queue_that_the_store_sees_brings_turns_from_memory(tmp_path: Path, subject: Subject) -> None:
    """As scarce as above: what comes next is read ahead and kept, and nothing else changes."""
    results = []
    for queue in (0, 8):
        with kvstore.open(tmp_path / f"cache-{queue}", host="1MiB", disk="256MiB") as store:
            reuse = Reuse(subject.model, store, decide="always")
            run = Replay(subject, store, reuse, tokens=2, interleave=True, queue=queue)
            assert len(list(run.run(logs.read(DEMO)))) == len(run.rows)
            assert store.flush()
            assert leases_left(store) == 0
            results.append(summary.summarize(run, "demo", {}))
    blind, told = results
    assert blind["tokens_equal"] and told["tokens_equal"]
    assert told["cached_tokens"] > 0.95 * blind["cached_tokens"]
    assert told["tokens_by_tier"]["host"] > 1.2 * blind["tokens_by_tier"]["host"]
    assert told["tokens_by_tier"]["disk"] < 0.8 * blind["tokens_by_tier"]["disk"]
    assert told["counters"]["prefetched_blocks"] > 0 and "prefetched_blocks" not in blind["counters"]


def test_all_formats_of_prompts_replay(tmp_path: Path, subject: Subject, seed: int) -> None:
    """Ids instead of text, and a session that comes back after the store was closed."""
    generator = torch.Generator().manual_seed(seed)
    ids = tuple(torch.randint(0, 4096, (700,), generator=generator).tolist())
    words = (Message("system", "a b c " * 200), Message("user", "d"))
    chats = [
        Conversation("ids", (Turn(TokenIds(ids[:300])), Turn(TokenIds(ids)))),
        Conversation("words", (Turn(Chat(words)),)),
    ]
    for expected in ([0, 300, 0], [299, 699, len(subject.encoder.encode(words)) - 1]):
        with kvstore.open(tmp_path / "cache", host="256MiB", disk="256MiB") as store:
            run = replayed(subject, store, chats)
            result = summary.summarize(run, "ids", {})
        assert [row.cached_tokens for row in run.rows] == expected
        assert result["tokens_equal"]
    assert result["tokens_by_tier"]["disk"] > 0


@dataclasses.dataclass
class Faulty:
    """A store of which what it loads is not what was saved: `spoil` gets every layer's pieces."""

    store: kvstore.Store
    spoil: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def load(self, match: Any, device: bool = False) -> Any:
        return FaultyLoad(self.store.load(match, device), self.spoil)


@dataclasses.dataclass
class FaultyLoad:
    load: Load
    spoil: Any
    pieces_of: dict[int, list[Piece]] = dataclasses.field(default_factory=dict)  # by layer; they must stay

    def __getattr__(self, name: str) -> Any:
        return getattr(self.load, name)

    def places(self, layer: int) -> list[Place]:
        spoiled = self.pieces_of.setdefault(layer, self.spoil(self.load.pieces(layer)))
        return [
            Place(address_of(piece.keys), address_of(piece.values), piece.stride, piece.tokens) for piece in spoiled
        ]


def unharmed(pieces: list[Piece]) -> list[Piece]:
    return [piece._replace(keys=memoryview(bytearray(piece.keys))) for piece in pieces]


def shifted(pieces: list[Piece]) -> list[Piece]:
    """Each token gets the keys of its neighbour."""

    def turned(piece: Piece) -> memoryview:
        keys = torch.frombuffer(bytearray(piece.keys), dtype=torch.float32).view(-1, piece.stride, HEAD_DIM)
        return memoryview(bytearray(keys.roll(1, dims=1).numpy().tobytes()))

    return [piece._replace(keys=turned(piece)) for piece in pieces]


def swapped(pieces: list[Piece]) -> list[Piece]:
    """The second block is another one."""
    return [pieces[0], pieces[0]._replace(tokens=pieces[1].tokens), *pieces[2:]] if len(pieces) > 1 else pieces


def noisy(pieces: list[Piece]) -> list[Piece]:
    """The first block is noise."""
    first = torch.frombuffer(bytearray(pieces[0].values), dtype=torch.float32)
    noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(1))
    return [pieces[0]._replace(values=memoryview(bytearray(noise.numpy().tobytes()))), *pieces[1:]]


@pytest.mark.parametrize(("spoil", "equal"), [(unharmed, True), (shifted, False), (swapped, False), (noisy, False)])
def test_planted_faults_are_noticed(subject: Subject, spoil: Any, equal: bool) -> None:
    with kvstore.open(host="256MiB") as store:
        faulty: Any = Faulty(store, spoil)
        run = Replay(subject, store, Reuse(subject.model, faulty), tokens=8)
        rows = list(run.run(logs.read(DEMO)[:2]))
        result = summary.summarize(run, "demo", {})
    assert sum(row.cached_tokens for row in rows) > 0
    assert result["tokens_equal"] is equal
    assert (result["max_logit_difference"] < 20 * result["logit_noise"]) is equal
    assert (result["tokens_different"] == 0) is equal


def test_ties_are_counted_apart() -> None:
    """Tokens may differ only where the two best logits are closer than the noise."""

    def row(gaps: tuple[float, ...], noise: float | None) -> Row:
        return Row("c", 1, 10, 5, {}, 0.0, 0.0, 0.0, 0.0, 0.0, logit_difference=1e-5, gaps=gaps, noise=noise)

    close = summary.verdict([row((1e-6,), None), row((), 1e-5)], tokens=8)
    assert (close["tokens_equal"], close["ties"], close["tokens_different"]) == (True, 1, 0)
    apart = summary.verdict([row((1e-6, 1e-2), None), row((), 1e-5)], tokens=8)
    assert (apart["tokens_equal"], apart["ties"], apart["tokens_different"]) == (False, 1, 1)
    unmeasured = summary.verdict([row((1e-6,), None)], tokens=8)
    assert not unmeasured["tokens_equal"]


def test_ids_outside_the_vocabulary_stop_the_replay_before_it_starts(subject: Subject) -> None:
    chats = [Conversation("c", (Turn(TokenIds((1, 2))), Turn(TokenIds((4095, 4096)))))]
    with pytest.raises(BadInput, match="conversation c, turn 2: token 4096 is outside"):
        check(chats, subject.encoder)


def test_what_the_result_holds(subject: Subject) -> None:
    with kvstore.open(host="256MiB") as store:
        run = replayed(subject, store, logs.read(DEMO)[:1], tokens=2)
        result = summary.summarize(run, "demo", {"interleave": False})
    assert result["turns"] == len(run.rows) == 4
    assert result["prompt_tokens"] == sum(row.prompt_tokens for row in run.rows)
    assert set(result["bytes_by_tier"]) >= {"host"}
    timeline = result["timeline"]
    assert timeline["cached_tokens"] == max(row.cached_tokens for row in run.rows)
    assert {(span["kind"], span["layer"]) for span in timeline["spans"]} >= {("load", 0), ("compute", 1)}
    assert min(span["begin_ms"] for span in timeline["spans"]) == 0.0 and 0 <= timeline["overlap"] <= 1
    for latency in ("ttft_seconds", "tpot_seconds"):
        for arm in ("recompute", "reuse"):
            assert 0 < result[latency][arm]["p50"] <= result[latency][arm]["p99"]
