"""What is measured on: the device, how large everything is, and what several parts need: a model, the copy's speed."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvstore
from kvstore import Store

GiB = 1 << 30


@dataclass(frozen=True)
class Figure:
    """One line of the table. ``goal`` None: there is none, or it is no goal of a machine like this."""

    name: str  # its key in the JSON
    value: float | bool
    unit: str = ""
    goal: float | None = None
    at_most: bool = False  # the goal is an upper bound

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; for a yes or no, whether it is yes; None without a goal."""
        if isinstance(self.value, bool):
            return self.value
        if self.goal is None:
            return None
        return self.value <= self.goal if self.at_most else self.value >= self.goal


@dataclass
class Setting:
    """Sizes for a large GPU; with ``small``, for a test on a CPU, where figures have no goals."""

    device: torch.device
    small: bool = False
    notes: list[str] = field(default_factory=list)  # what was left out, and why

    def __post_init__(self) -> None:
        small = self.small
        self.prompt = 100 if small else 32_768  # tokens of the prompt that is reused
        self.host = "64MiB" if small else "12GiB"
        self.pool = "32MiB" if small else "8GiB"  # of the device tier
        self.copied = 4 << 20 if small else GiB  # bytes of a plain copy
        self.repeats = 2 if small else 9
        self.first_tokens = 2 if small else 5  # first tokens behind a median; each costs a prefill
        self.pairs = 3 if small else 9  # of decoding, with and without saves
        self.decoded = 4 if small else 64  # tokens of one side of a pair
        self.saved = 64 if small else 8192  # tokens that are saved in the background of a pair
        self.rounds = 16 if small else 200  # of the stress of events
        self.block_tokens = 32 if small else 256

    @property
    def cuda(self) -> bool:
        """Whether there are streams and a memory of its own."""
        return self.device.type == "cuda"

    @cached_property
    def triton(self) -> bool:
        """Whether Triton's kernel runs here: on CUDA, or anywhere in Triton's interpreter."""
        if not self.cuda and os.environ.get("TRITON_INTERPRET") != "1":
            return False
        if find_spec("triton") is None:
            self.notes.append("triton is missing: plain torch is checked and measured in its place")
            return False
        return True

    def goal(self, value: float) -> float | None:
        """A goal counts on a GPU and at full size only."""
        return value if self.cuda and not self.small else None

    def store(self, pool: str | int = 0) -> Store:
        """A store in memory, pinned on CUDA, with a device tier of ``pool`` bytes."""
        return kvstore.open(host=self.host, device=pool, device_name=str(self.device))

    @cached_property
    def model(self) -> Any:
        """A random Llama in bfloat16 of the shape of an 8B model; with ``small``, of two narrow layers."""
        if self.small:
            return self.llama(hidden_size=64, intermediate_size=128, layers=2, heads=4, kv_heads=2, dim=16)
        return self.llama(4096, 14_336, layers=32, heads=32, kv_heads=8, dim=128, vocabulary=128_256)

    @cached_property
    def thin_model(self) -> Any:
        """As ``model``, with a cache of the same shape, but next to no weights: what it takes is the cache's time."""
        if self.small:
            return self.model
        return self.llama(64, 128, layers=32, heads=8, kv_heads=8, dim=128)

    def llama(
        self,
        hidden_size: int,
        intermediate_size: int,
        layers: int,
        heads: int,
        kv_heads: int,
        dim: int,
        vocabulary: int = 1024,
    ) -> Any:
        """A seeded random Llama on the device, in bfloat16."""
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=dim,
            max_position_embeddings=1 << 17,
            rope_theta=500_000.0,
            bos_token_id=None,
            eos_token_id=None,
        )
        usual = torch.get_default_dtype()
        with torch.random.fork_rng(devices=[self.device] if self.cuda else [], device_type=self.device.type):
            torch.manual_seed(17)
            try:
                torch.set_default_dtype(torch.bfloat16)
                with self.device:
                    return LlamaForCausalLM(config).eval()
            finally:
                torch.set_default_dtype(usual)

    def ids(self, tokens: int, seed: int, model: Any) -> torch.Tensor:
        """Token ids [1, tokens] on the device."""
        drawn = torch.randint(0, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(seed))
        return drawn.to(self.device)

    @cached_property
    def pinned_copy(self) -> float:
        """Bytes per second of a plain copy from pinned memory to the device; from memory to memory without CUDA."""
        source = torch.ones(self.copied, dtype=torch.uint8, pin_memory=self.cuda)
        target = torch.empty(self.copied, dtype=torch.uint8, device=self.device)
        return self.copied / self.seconds(lambda: target.copy_(source, non_blocking=True))

    @cached_property
    def device_copy(self) -> float:
        """Bytes per second of a plain copy from the device to the device."""
        source = torch.ones(self.copied, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return self.copied / self.seconds(lambda: target.copy_(source))

    def seconds(self, work: Callable[[], object]) -> float:
        """Median time that ``work`` takes on the current stream; without CUDA, on the clock."""
        for _ in range(1 if self.small else 3):  # warm
            work()
        if not self.cuda:
            return statistics.median(self.clocked(work) for _ in range(self.repeats))
        times = []
        for _ in range(self.repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(self.device)
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(float(begin.elapsed_time(end)) / 1e3)
        return statistics.median(times)

    def graphed(self, work: Callable[[], object]) -> Callable[[], object]:
        """``work``, which only launches kernels, without what it costs the host to launch them."""
        work()  # kernels are compiled
        if not self.cuda:
            return work
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def pin(self, store: Store) -> None:
        """Waits until the store has pinned its memory, which it does beside its work; notes what stays pageable."""
        deadline = time.monotonic() + 60
        while self.cuda and (pageable := store.stats()["gauges"]["host_pageable_bytes"]):
            if time.monotonic() > deadline:
                self.notes.append(f"{pageable} bytes of the host tier are not pinned")
                return
            threading.Event().wait(0.05)

    def clocked(self, work: Callable[[], object]) -> float:
        """Seconds until all that ``work`` started is over, of the host's clock: for what waits on the host as well."""
        self.settle()
        begin = time.perf_counter()
        work()
        self.settle()
        return time.perf_counter() - begin

    def settle(self) -> None:
        """Waits for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def free(self, *names: str) -> None:
        """Lets go of what was built on demand, and of the memory that torch holds on the device."""
        for name in names:
            self.__dict__.pop(name, None)
        if self.cuda:
            torch.cuda.empty_cache()

    def description(self) -> str:
        """The device in words."""
        if self.cuda:
            return torch.cuda.get_device_name(self.device)
        return f"CPU, {os.cpu_count()} cores"
