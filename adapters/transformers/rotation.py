"""How one layer rotates its keys, by the model's own function and its own tables.

Found once by the attach test. From then on it answers two questions: which keys, before rotation, does this
``Cache.update`` stand for, and what are these stored keys at those positions. Both are exact: the first hands out the
very tensor that the rotary function was given, the second calls that function again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Reversible, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from kvstore.adapters.transformers.capture import Call
from kvstore.tensors.rope import Turn

Slot = int | str  # of an argument: its place, or its name
SMALLEST_TABLE = 512
# Which columns of a model's tables belong to the pairs: models repeat them, one after the other or each twice.
FIRST_HALF, EVERY_SECOND, ALL = "first half", "every second", "all"


def get_argument(call_args: Sequence[Any], kwargs: dict[str, Any], slot: Slot) -> Any:
    """The argument at ``slot``."""
    return call_args[slot] if isinstance(slot, int) else kwargs[slot]


def arguments(args: Sequence[Any], kwargs: dict[str, Any]) -> list[tuple[Slot, Any]]:
    """All arguments with their slots."""
    return [*enumerate(args), *kwargs.items()]


def replaced(
    args: Sequence[Any], kwargs: dict[str, Any], changes: dict[Slot, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with those in ``changes`` exchanged."""
    new_args = tuple(changes.get(place, value) for place, value in enumerate(args))
    return new_args, {name: changes.get(name, value) for name, value in kwargs.items()}


def outputs_of(result: Any) -> tuple[torch.Tensor, ...]:
    """What a rotary module returned, one tensor or several; empty when it is something else."""
    outputs = (result,) if isinstance(result, torch.Tensor) else result
    if not isinstance(outputs, tuple | list) or not all(isinstance(output, torch.Tensor) for output in outputs):
        return ()
    return tuple(outputs)


class Known(NamedTuple):
    """A table as far as it is made. Replaced as one, so that nobody sees a new length and old angles."""

    length: int  # positions
    outputs: tuple[torch.Tensor, ...]
    turns: dict[Any, Turn]  # made of the outputs, for kernels
    shorter: Known | None  # stays: a device may be reading it. All of those together are no longer than this one

    @property
    def real(self) -> list[tuple[int, torch.Tensor]]:
        """Each output with its number; one of complex numbers as two, cosines and sines."""
        parts = (
            (which, (made.real, made.imag) if made.is_complex() else (made,)) for which, made in enumerate(self.outputs)
        )
        return [(which, part) for which, both in parts for part in both]


@dataclass(eq=False)
class Table:
    """Cosines and sines (or complex numbers) for positions from 0 on, as the model's rotary module gives them.

    Any thread.
    """

    module: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state_slot: Slot | None  # the argument that only says dtype and device
    position_slot: Slot
    _known: Known = field(default_factory=lambda: Known(0, (), {}, None))  # replaced in one step
    _growing: threading.Lock = field(default_factory=threading.Lock)

    def upto(self, length: int) -> tuple[torch.Tensor, ...]:
        """The module's outputs, at least ``length`` positions long."""
        return self.known(length).outputs

    def known(self, length: int) -> Known:
        """The outputs, at least ``length`` positions long, and what was made of them."""
        if self._known.length < length:
            with self._growing:
                if self._known.length < length:
                    length = max(SMALLEST_TABLE, 1 << (length - 1).bit_length())
                    self._known = Known(length, self.at(torch.arange(length)[None]), {}, self._known)
        return self._known

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The module's outputs for ``positions`` of shape [1, T]."""
        like = get_argument(self.args, self.kwargs, self.position_slot)
        changes: dict[Slot, Any] = {self.position_slot: positions.to(like.device, like.dtype)}
        args, kwargs = replaced(self.args, self.kwargs, changes)
        # Tables outlive this call, so they must not be inference tensors.
        with torch.inference_mode(False), torch.no_grad():
            return outputs_of(self.module(*args, **kwargs))


@dataclass(frozen=True)
class Form:
    """A rotation that kernels can do: which of a table's ``real`` are cosines and sines, and the arithmetic."""

    table: Table
    cos: int
    sin: int
    columns: str  # of the outputs: FIRST_HALF, EVERY_SECOND or ALL
    pairing: str
    rounded: bool
    first: int

    def upto(self, length: int, device: torch.device | None = None) -> Turn:
        """The turn with tables of at least ``length`` positions, on the model's device or another.

        Shared by all layers of the same form.
        """
        known = self.table.known(length)
        device = device or known.outputs[0].device
        key = (device, self.cos, self.sin, self.columns, self.pairing, self.rounded, self.first)
        turn = known.turns.get(key)
        if turn is None:
            cos, sin = (self._pairs(known.real[which][1]).to(device) for which in (self.cos, self.sin))
            turn = known.turns[key] = Turn(cos, sin, self.pairing, self.rounded, self.first)
        return turn

    def between(self, stored: int, position: int, tokens: int, keys: torch.Tensor) -> Turn:
        """From where the model has keys at ``stored`` and after to where it has them at ``position`` and after: tables
        of ``tokens`` rows, which are not positions but count from the first. For keys like ``keys``.

        They are the quotients of the model's own tables, whose rounding and scale are in keys that are turned already.
        """
        turn = self.upto(max(stored, position) + tokens, keys.device)
        tables = [
            table[first : first + tokens].double() for first in (stored, position) for table in (turn.cos, turn.sin)
        ]
        cos, sin, to_cos, to_sin = tables
        size, dtype = cos * cos + sin * sin, torch.promote_types(keys.dtype, torch.float32)
        quotients = (to_cos * cos + to_sin * sin) / size, (to_sin * cos - to_cos * sin) / size
        cos, sin = (made.to(dtype).contiguous() for made in quotients)
        return Turn(cos, sin, self.pairing, keys.dtype == dtype, self.first)

    def _pairs(self, output: torch.Tensor) -> torch.Tensor:
        angles, width = output[0], output.shape[-1]
        with torch.inference_mode(False):
            if self.columns == FIRST_HALF:
                angles = angles[:, : width // 2]
            elif self.columns == EVERY_SECOND:
                angles = angles[:, ::2]
            return angles.to(angles.dtype if self.rounded else torch.float32).contiguous()


@dataclass(eq=False)
class Rotation:
    """One layer's rotation. ``function`` None: the layer does not rotate (NoPE)."""

    function: Callable[..., Any] | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    key_slot: Slot = 1
    key_result: int | None = None  # None: the function returns the keys alone
    query_slots: tuple[Slot, ...] = ()
    angle_slots: tuple[tuple[Slot, int], ...] = ()  # (slot, which output of the table)
    table: Table | None = None
    transposed: bool = False  # the function sees [batch, tokens, heads, dim]
    part: tuple[int, int] | None = None  # only these dims go through the function
    empty_queries: bool = True  # the function takes queries of no heads
    form: Form | None = None  # the same for kernels, where one was found

    def originals(self, calls: Reversible[Call], keys: torch.Tensor) -> torch.Tensor | None:
        """What ``keys``, which ``Cache.update`` was given, were before rotation; None when no call made them."""
        if self.function is None:
            return keys
        for call in reversed(calls):
            if call.function is not self.function:
                continue
            source = get_argument(call.args, call.kwargs, self.key_slot)
            made = call.result if self.key_result is None else call.result[self.key_result]
            if made is keys and self.part is None and not self.transposed:
                return source  # type: ignore[no-any-return]
            if self.transposed:
                source, made = source.transpose(1, 2), made.transpose(1, 2)
            if self.part is not None:
                first, last = self.part
                if made.shape[:-1] == keys.shape[:-1] and torch.equal(made, keys[..., first:last]):
                    return torch.cat((keys[..., :first], source, keys[..., last:]), dim=-1)
            elif same_memory(made, keys):
                return source  # type: ignore[no-any-return]
        return None

    def rotate(self, keys: torch.Tensor, start: int) -> torch.Tensor:
        """``keys`` of shape [batch, heads, tokens, dim], as the model has them at ``start`` and after."""
        if self.function is None or self.table is None:
            return keys
        stop = start + keys.shape[-2]
        return self.rotate_with(keys, tuple(angle[..., start:stop, :] for angle in self.table.upto(stop)))

    def rotate_with(self, keys: torch.Tensor, angles: Sequence[torch.Tensor]) -> torch.Tensor:
        """``keys`` turned by these outputs of the table."""
        assert self.function is not None
        turning = keys if self.part is None else keys[..., self.part[0] : self.part[1]]
        given = turning.transpose(1, 2) if self.transposed else turning
        changes: dict[Slot, Any] = {slot: angles[which] for slot, which in self.angle_slots}
        # Queries are not wanted: none of their heads are given, which halves the work.
        queries = given if not self.empty_queries else given.narrow(2 if self.transposed else 1, 0, 0)
        changes |= dict.fromkeys(self.query_slots, queries)
        changes[self.key_slot] = given
        args, kwargs = replaced(self.args, self.kwargs, changes)
        result = self.function(*args, **kwargs)
        made: torch.Tensor = result if self.key_result is None else result[self.key_result]
        made = made.transpose(1, 2) if self.transposed else made
        if self.part is None:
            return made
        return torch.cat((keys[..., : self.part[0]], made, keys[..., self.part[1] :]), dim=-1)


def same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both name the same elements in the same order."""
    return (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
    )
