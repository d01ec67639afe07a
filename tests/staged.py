"""Stagings for tests: on the CPU with a thread as the side stream, on CUDA where it is there; held at will."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gates import PATIENCE

from kvstore import Layout
from kvstore.adapters.transformers.staging import Staging
from kvstore.tensors.streams import CudaStream, Event, Stream, ThreadStream

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"))
DEVICES = ["cpu", CUDA]


def side_stream(device: str) -> Stream:
    """A stream beside the engine's."""
    return ThreadStream("kvstore-leaving") if device == "cpu" else CudaStream(device)


def staging_of(layout: Layout, dtype: torch.dtype, device: str, side: Stream | None = None, **options: Any) -> Staging:
    """A staging on a device, whatever it is."""
    return Staging(layout, dtype, torch.device(device), side or side_stream(device), **options)


def refusing(buffers: int) -> Callable[..., torch.Tensor]:
    """Memory of a device for so many buffers, and no more."""
    left = [buffers]

    def allocate(*shape: int, **options: Any) -> torch.Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 32.00 MiB")
        return torch.empty(*shape, **options)

    return allocate


class Hold:
    """A stream that stands still until ``open``: a context manager."""

    def __init__(self, stream: Stream | None = None) -> None:
        self.stream = stream or ThreadStream("kvstore-held")
        self._opened = threading.Event()

    def __enter__(self) -> Hold:
        self.begin()
        return self

    def __exit__(self, *_: object) -> None:
        self.open()
        self.stream.close()

    def begin(self) -> None:
        """What is asked for from now on stands still."""
        self.stream.run(self._stand)

    def open(self) -> None:
        """Let it go on."""
        self._opened.set()

    def _stand(self) -> None:
        assert self._opened.wait(PATIENCE), "nobody let the stream go on"


class _Hasty:
    """The planted fault: a stream that waits for nobody."""

    def wait(self, event: Event) -> None:
        """Does nothing."""


class _Rash:
    """The planted fault: what the stream does is said to be over at once."""

    def record(self) -> Any:
        """An event that is over, though whoever waits for it does wait."""
        event: Event = super().record()  # type: ignore[misc]
        return _Early(event)


class _Early:
    def __init__(self, event: Event) -> None:
        self.wait = event.wait

    def done(self) -> bool:
        return True


class Hasty(_Hasty, ThreadStream):
    """A thread with that fault."""


class Rash(_Rash, ThreadStream):
    """A thread with that fault."""


class HastyOnCuda(_Hasty, CudaStream):
    """A stream of a device with that fault."""


class RashOnCuda(_Rash, CudaStream):
    """A stream of a device with that fault."""
