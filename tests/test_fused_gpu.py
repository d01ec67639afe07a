"""The GPU kernel of fused attention: run in Triton's interpreter, and compiled for a GPU that need not be here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from interpreted import TESTS, needs_triton, passes


@needs_triton
@pytest.mark.soak
def test_the_kernel_does_as_plain_torch_does(request: pytest.FixtureRequest) -> None:
    passes("gpu_fused.py", request)


# Compiles for compute capability 9.0; needs no GPU. Prints, for each case, how sources are read, what multiplies
# matrices, the shared memory of a program, and the bytes that do not fit its registers.
PROBE = """
import json, re, subprocess, sys
from pathlib import Path
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kvstore.tensors import fused_gpu
from kvstore.tensors.fused_sums import combine, rebuild
from kvstore.tensors.fused_triton import attend

def compiled(kernel, constants, options):
    signature = {p.name: "constexpr" if p.is_constexpr else p.annotation_type for p in kernel.params}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)

def spilled(ptx):
    file = Path(sys.argv[2]) / "kernel.ptx"
    file.write_text(ptx)
    command = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name", "sm_90a", str(file), "-o", str(file) + ".cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(map(int, re.findall(r"(\\d+) bytes spill", said)))

found = {}
large = fused_gpu.Chip(132, 227 << 10)
for name, dtype, dim, sources, tokens, gap in json.loads(sys.argv[1]):
    here, dtype = large if "large" in name else fused_gpu.LEAST, getattr(torch, dtype)
    queries = torch.empty(2, 16, tokens, dim, dtype=dtype, device="meta")
    states = [torch.empty(2, 4, 999, dim + gap, dtype=dtype, device="meta")[..., :dim]] * sources
    form, options = fused_gpu.form(queries, states, states, None, here)
    kernel = compiled(attend, form | {"SPLIT": tokens == 1}, options)
    ptx = kernel.asm["ptx"]
    found[name] = {
        "wide": len(re.findall(r"cp\\.async\\.cg\\.shared\\.global [^;]*, 0x10|ld\\.global\\.v4", ptx)),
        "narrow": len(re.findall(r"ld\\.global\\.b16|cp\\.async\\.ca", ptx)),
        "matrices": sorted(set(re.findall(r"wgmma\\.mma_async|mma\\.sync", ptx))),
        "spilled": spilled(ptx),
        "shared": kernel.metadata.shared,
    }
kind = {"DIM": 40, "KIND": fused_gpu.KINDS[torch.bfloat16]}
compiled(combine, kind | {"TOGETHER": 16}, {})
compiled(rebuild, kind | {"SOURCES": 2, "ALIGNED": 16, "TILE": 64}, {"enable_fp_fusion": False})
numbers = [p for kernel in (attend, combine, rebuild) for p in kernel.params if not p.is_constexpr]
print(json.dumps({"specialized": [p.name for p in numbers if not p.do_not_specialize]} | found))
"""
CASES = [  # name, dtype, dim, sources, query tokens, further dims between rows
    ("decode", "bfloat16", 128, 2, 1, 0),
    ("prefill", "bfloat16", 128, 2, 512, 0),
    ("large prefill", "bfloat16", 128, 2, 512, 0),
    ("large four sources", "float16", 128, 4, 512, 0),
    ("float32", "float32", 64, 2, 1, 0),
    ("odd rows", "bfloat16", 64, 2, 1, 1),
    ("too much, large", "bfloat16", 256, 2, 512, 0),
]


@needs_triton
def test_it_compiles_to_tensor_cores_and_the_widest_accesses_without_spills(tmp_path: Path) -> None:
    environment = dict(os.environ, TRITON_CACHE_DIR=str(tmp_path))
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", PROBE, json.dumps(CASES), str(tmp_path)]
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert found["specialized"] == []  # or contexts of other lengths would wait for the compiler
    for name in ("decode", "prefill", "large prefill", "large four sources", "float32"):
        case, large = found[name], "large" in name
        assert case["wide"] >= 8 and not case["narrow"], (name, case)
        # What does not fit registers there is needed before or behind the loops only.
        assert case["spilled"] <= (1024 if large else 0), (name, case)
        assert case["shared"] <= (227 if large else 99) << 10, (name, case)
    assert found["decode"]["matrices"] == ["mma.sync"]
    for name in ("prefill", "large prefill", "large four sources"):
        assert found[name]["matrices"] == ["wgmma.mma_async"], name
    # What this test looks for would be found.
    assert (
        found["float32"]["matrices"] == []
        and found["odd rows"]["narrow"] > 0
        and found["too much, large"]["spilled"] > 1024
    )
