"""Transfers in plain torch, over raw addresses: where no kernel is to be had. Slow, and right on any device."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import torch

from kvstore.tensors.rope import Turn, turned
from kvstore.tensors.runs import Target


def transfer(runs: np.ndarray, turn: Turn | None, target: Target) -> None:
    """``tensors.transfer.transfer``, on the current stream of the target's device."""
    device = target.keys.device
    head_major = target.pages is None
    heads = target.keys.shape[0 if head_major else 2]
    for keys_at, values_at, stride, token, tokens, position, column in runs.tolist():
        if not tokens:
            continue
        for tensor, address in ((target.keys, keys_at), (target.values, values_at)):
            shape = (heads, stride, tensor.shape[-1])
            made = at(address, shape, tensor.dtype, device)[:, token : token + tokens]
            if turn is not None and tensor is target.keys:
                made = turned(made, turn, torch.arange(position, position + tokens, device=device))
            if target.pages is None:
                tensor[:, column : column + tokens] = made
            else:
                columns = torch.arange(column, column + tokens, device=device)
                pages = target.pages[columns // tensor.shape[1]]
                tensor[pages, columns % tensor.shape[1]] = made.transpose(0, 1)


def at(address: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A contiguous tensor over memory of somebody else, who must keep it while the tensor is in use."""
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cuda":
        made = torch.as_tensor(_Lent(address, size), device=device)
    else:
        made = torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=torch.uint8)
    return made.view(dtype).view(shape)


class _Lent:
    """Memory of a CUDA device, as torch takes it from others without a copy."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }
