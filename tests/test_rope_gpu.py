"""The GPU kernel: run in Triton's interpreter, compiled for a GPU that need not be here, and its plain torch twin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from interpreted import TESTS, needs_triton, passes

from kvstore.tensors import plain
from kvstore.tensors.rope import INTERLEAVED, Turn, turned
from kvstore.tensors.runs import Target


@needs_triton
@pytest.mark.soak
def test_the_kernel_does_as_plain_torch_does(request: pytest.FixtureRequest) -> None:
    passes("gpu_kernel.py", request)


# Compiles for compute capability 9.0; needs no GPU. Prints, for each case, which accesses of the device's memory and
# how many multiply-adds of floats the code has.
PROBE = """
import json, re, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kvstore.tensors.rope import Turn
from kvstore.tensors.rope_gpu import OPTIONS, form
from kvstore.tensors.rope_triton import move
from kvstore.tensors.runs import Target

signature = {p.name: "constexpr" if p.is_constexpr else p.annotation_type for p in move.params}
found = {}
for name, dtype, pairing, rounded, dims, pages, address_bits, fusion in json.loads(sys.argv[1]):
    dtype = getattr(torch, dtype)
    tables = [torch.empty(64, 64, dtype=dtype if rounded else torch.float32, device="meta") for _ in "cs"]
    turn = Turn(*tables, pairing, rounded) if pairing else None
    shape = (9, pages, 8) if pages else (8, 999)
    keys, values = (torch.empty(*shape, dim, dtype=dtype, device="meta") for dim in dims)
    target = Target(keys, values, torch.empty(9, dtype=torch.int64, device="meta") if pages else None)
    constants = form(address_bits, turn, target)
    source = ASTSource(move, signature, {(move.arg_names.index(k),): v for k, v in constants.items()})
    options = OPTIONS | ({"enable_fp_fusion": True} if fusion else {})
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    accesses = sorted(set(re.findall(r"[ls][dt]\\.global\\.(\\S+)", ptx)) - {"b64"})
    found[name] = {"accesses": accesses, "fused": len(re.findall(r"\\bfma\\.", ptx)), "halves": "cvt.rn.bf16" in ptx}
print(json.dumps({"specialized": [p.name for p in move.params if not (p.is_constexpr or p.do_not_specialize)]} | found))
"""
CASES = [  # name, dtype, pairing, rounded, dims of keys and values, tokens of a page, bits of addresses, fusion
    ("rounded", "bfloat16", "half", True, (128, 128), 0, 0, False),
    ("interleaved", "bfloat16", "interleaved", True, (128, 128), 16, 0, False),
    ("one rounding", "float16", "half", False, (128, 128), 0, 0, False),
    ("no turn, no values", "float16", None, False, (128, 0), 0, 0, False),
    ("fused", "float32", "half", True, (128, 128), 0, 0, True),
    ("odd addresses", "bfloat16", "half", True, (128, 128), 0, 2, False),
]
WIDE = [["v4.b32"], ["v2.b64", "v4.b32"]]  # 16 bytes


@needs_triton
def test_it_compiles_to_the_widest_accesses_and_without_multiply_adds(tmp_path: Path) -> None:
    environment = dict(os.environ, TRITON_CACHE_DIR=str(tmp_path))
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", PROBE, json.dumps(CASES)]
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert found["specialized"] == []  # or loads of other sizes would wait for the compiler
    for name in ("rounded", "interleaved", "one rounding", "no turn, no values"):
        assert found[name]["accesses"] in WIDE and found[name]["fused"] == 0, (name, found[name])
    assert found["rounded"]["halves"] and not found["one rounding"]["halves"]
    # What this test looks for would be found.
    assert found["fused"]["fused"] > 0
    assert found["odd addresses"]["accesses"] not in WIDE


@pytest.mark.parametrize("page_tokens", [0, 4])
def test_plain_torch_over_addresses(seed: int, page_tokens: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(2, 9, dim, generator=generator) for dim in (12, 5))
    angles = torch.rand(50, 4, generator=generator)
    turn = Turn(angles.cos(), angles.sin(), INTERLEAVED, True, first=3)
    right = turned(keys[:, 2:8], turn, torch.arange(30, 36)), values[:, 2:8]
    runs = np.array([[keys.data_ptr(), values.data_ptr(), 9, 2, 6, 30, 5], [0, 0, 4, 0, 0, 0, 0]])
    if page_tokens:
        pages = torch.tensor([4, 0, 3])
        target = Target(torch.zeros(5, 4, 2, 12), torch.zeros(5, 4, 2, 5), pages)
        plain.transfer(runs, turn, target)
        made = [tensor[pages].flatten(0, 1).transpose(0, 1) for tensor in (target.keys, target.values)]
        others = [tensor[[1, 2]] for tensor in (target.keys, target.values)]
    else:
        target = Target(torch.zeros(2, 12, 12), torch.zeros(2, 12, 5))
        plain.transfer(runs, turn, target)
        made, others = [target.keys, target.values], []
    for tensor, wanted in zip(made, right, strict=True):
        assert torch.equal(tensor[:, 5:11], wanted)
        assert not tensor[:, :5].any() and not tensor[:, 11:].any()
    assert not any(tensor.any() for tensor in others)
