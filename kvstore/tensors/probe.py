"""How an engine orders the pages of its cache, learned from what its own function writes, and then proved by it.

Nothing is believed of shapes and names: every element of a few pages is written with a number of its own, looked for,
and must lie where a sum of steps and tables says. Then random bits must come and go unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from kvstore.errors import BadInput, Unsupported
from kvstore.tensors.grids import Grid, Pages
from kvstore.tensors.pages import put, take

# Writes keys and values [n, heads, dim] to slots [n] int64 of a cache; slot ``page * page_tokens + token``.
Write = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@dataclass(frozen=True, eq=False)
class Form:
    """What was learned; the caches of all layers that look like the one that was probed have it."""

    keys: Grid  # addresses count from the cache's first element
    values: Grid
    heads: int
    like: torch.Tensor  # the cache that was probed

    @property
    def page_elements(self) -> int:
        """Of all heads, keys and values."""
        return int(self.keys.tokens.size * self.heads * (self.keys.dims.size + self.values.dims.size))

    def of(self, cache: torch.Tensor) -> Pages:
        """A layer's cache, which may have any number of pages. ``BadInput``: it does not look like the one probed."""
        like, page = self.like, self.keys.page_step // cache.itemsize
        kin = (cache.dtype, cache.device, cache.stride()) == (like.dtype, like.device, like.stride())
        count, rest = divmod(cache.numel(), self.page_elements)
        # Of whatever else than pages, or slots in a row, there must be as many.
        steps = page, page // self.keys.tokens.size
        sizes = [[step in steps or size for size, step in zip(t.shape, t.stride(), strict=True)] for t in (cache, like)]
        if not kin or rest or sizes[0] != sizes[1]:
            raise BadInput(f"a cache of shape {list(cache.shape)} is unlike that of {list(like.shape)} that was probed")
        grids = []
        for grid in (self.keys, self.values):
            address = cache.data_ptr() + grid.address
            grids.append(Grid(address, grid.page_step, grid.head_step, grid.tokens, grid.dims))
        return Pages(grids[0], grids[1], self.heads, count, cache.dtype, cache.device, (cache, cache))


def probe(
    write: Write, cache: torch.Tensor, page_tokens: int, heads: int, key_dim: int, value_dim: int, seed: int = 0
) -> Form:
    """Learns the order of a cache from ``write``, the engine's own function.

    ``cache``: scratch of the real one's shape and strides, but of two pages or a few; what is in it is lost. Wait for
    the kernels of ``pages`` before, to have these proved too, and not only plain torch. Takes well below a second, and
    as many bytes as the scratch a few times.
    ``Unsupported``: ``write`` does not put each element into a place of its own, the same in each page and head and
    the sum of one that the token has and one that the dim has; or it changes what it is given.
    """
    trial = _Trial(write, cache, page_tokens, heads, (key_dim, value_dim), torch.Generator().manual_seed(seed))
    form = trial.learned()
    trial.prove(form)
    return form


class _Trial:
    """One scratch cache, and the function that is watched."""

    def __init__(
        self,
        write: Write,
        cache: torch.Tensor,
        page_tokens: int,
        heads: int,
        dims: tuple[int, int],
        generator: torch.Generator,
    ) -> None:
        self.write, self.cache, self.page, self.heads, self.dims = write, cache, page_tokens, heads, dims
        self.count, rest = divmod(cache.numel(), page_tokens * heads * sum(dims))
        if rest or self.count < 2 or cache.dtype.itemsize not in WORDS:
            size = f"{heads} heads of {page_tokens} tokens with {sum(dims)} elements"
            raise Unsupported(f"a cache {list(cache.shape)} of {cache.dtype} is not two or more pages of {size}")
        self.generator = generator

    def learned(self) -> Form:
        """The form, from where each element lands."""
        places, size = self._places(), self.count * self.page * self.heads * self.dims[0]  # of all keys
        keys, values = self._grid(places[:size], self.dims[0]), self._grid(places[size:], self.dims[1])
        return Form(keys, values, self.heads, self.cache)

    def _grid(self, places: np.ndarray, dim: int) -> Grid:
        if not dim:
            return Grid(0, 0, 0, np.zeros(self.page, dtype=np.int64), np.zeros(0, dtype=np.int64))
        found = places.reshape(self.count, self.page, self.heads, dim)
        first = int(found[0, 0, 0, 0])
        page = int(found[1, 0, 0, 0]) - first
        head = int(found[0, 0, 1, 0]) - first if self.heads > 1 else 0
        tokens, dims = found[0, :, 0, 0] - first, found[0, 0, 0] - first
        sums = first + np.arange(self.count)[:, None] * page + tokens
        sums = sums[:, :, None, None] + (np.arange(self.heads) * head)[:, None] + dims
        if (found != sums).any():
            names, at = ("page", "token", "head", "dim"), np.argwhere(found != sums)[0]
            place = ", ".join(f"{name} {number}" for name, number in zip(names, at, strict=True))
            raise Unsupported(f"the cache keeps an order that is no sum of steps and tables: {place} lies elsewhere")
        return Grid(first, page, head, tokens, dims)

    def _places(self) -> np.ndarray:
        """Where each element of all keys, then of all values lands: bytes from the cache's first element."""
        shapes = [(self.count * self.page, self.heads, dim) for dim in self.dims]
        total, base = self.cache.numel(), 8 if self.cache.dtype.itemsize == 1 else 128  # digits are exact in any dtype
        codes, seen, digit = torch.arange(1, total + 1), torch.zeros(total, dtype=torch.int64), 1
        while digit <= total:
            given = (codes // digit % base).to(self.cache.dtype)
            parts = given.split([total * dim // sum(self.dims) for dim in self.dims])
            self.cache.zero_()
            self._write(parts[0].view(shapes[0]), parts[1].view(shapes[1]), torch.arange(self.count * self.page))
            found = self.cache.cpu().flatten().to(torch.float64)
            if not ((found >= 0) & (found < base) & (found == found.floor())).all():
                raise Unsupported(f"the engine changes what it writes to its cache of {self.cache.dtype}")
            seen += found.long() * digit
            digit *= base
        order = seen.argsort()
        if not torch.equal(seen[order], codes):
            missing = total - int(torch.isin(codes, seen).sum())
            raise Unsupported(f"{missing} of {total} elements that the engine wrote are not found in its cache")
        offsets = self._offsets()
        return np.take(offsets, order.numpy())

    def _offsets(self) -> np.ndarray:
        """Of each element of the cache, in the order of its shape, the bytes from the first."""
        made = np.zeros(1, dtype=np.int64)
        for size, step in zip(self.cache.shape, self.cache.stride(), strict=True):
            made = (made[:, None] + np.arange(size) * (step * self.cache.itemsize)).reshape(-1)
        return made

    def _write(self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        device = self.cache.device
        try:
            self.write(keys.to(device), values.to(device), self.cache, slots.to(device))
        except (RuntimeError, TypeError, ValueError) as error:
            said = str(error).strip().split("\n")[0]
            raise Unsupported(f"the engine's function refuses to write keys of {keys.dtype}: {said}") from error

    def prove(self, form: Form) -> None:
        """That what the engine writes is taken, and what is put is what the engine writes, bit for bit."""
        for draw in (self._bits, self._numbers):
            if self._comes_back(form, draw):
                return
        raise Unsupported(f"what the engine writes to its cache of {self.cache.dtype} is not what it was given")

    def _comes_back(self, form: Form, draw: Callable[[tuple[int, ...]], torch.Tensor]) -> bool:
        """One page stays as it is, and the end of another; the engine gets the tokens in any order."""
        pages, generator = form.of(self.cache), self.generator
        table = torch.randperm(self.count, generator=generator)[:-1]
        columns = torch.arange(len(table) * self.page - self.page // 2)
        slots = table[columns // self.page] * self.page + columns % self.page
        given = [draw((self.heads, len(columns), dim)).to(self.cache.device) for dim in self.dims]
        before = self._bits(tuple(self.cache.shape)).to(self.cache.device)
        order = torch.randperm(len(columns), generator=generator)
        self.cache.copy_(before)
        keys, values = (part[:, order].transpose(0, 1).contiguous() for part in given)
        self._write(keys, values, slots[order])
        taken = [torch.zeros_like(part) for part in given]
        take(_runs(taken), pages, table.numpy())
        written = self.cache.clone()
        self.cache.copy_(before)
        put(_runs(given), None, pages, table.numpy())
        words = WORDS[self.cache.dtype.itemsize]
        if not all(torch.equal(one.view(words), two.view(words)) for one, two in zip(taken, given, strict=True)):
            return False
        if not torch.equal(self.cache.view(words), written.view(words)):
            raise Unsupported("the engine changes more of its cache than the slots that it is to write")
        return True

    def _bits(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Any bits; NaN of all kinds among them."""
        words = WORDS[self.cache.dtype.itemsize]
        limits = torch.iinfo(words)
        return (
            torch.randint(limits.min, limits.max + 1, shape, generator=self.generator).to(words).view(self.cache.dtype)
        )

    def _numbers(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Common numbers, for an engine that makes one NaN of all."""
        return torch.randn(shape, generator=self.generator).to(self.cache.dtype)


def _runs(blocks: list[torch.Tensor]) -> np.ndarray:
    """One run: all of a block."""
    keys, values = blocks
    return np.array([[keys.data_ptr(), values.data_ptr(), keys.shape[1], 0, keys.shape[1], 0, 0]], dtype=np.int64)
