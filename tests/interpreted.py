"""Tests of Triton kernels in a process of their own: whether Triton compiles or interprets is settled at its import."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def passes(name: str, request: pytest.FixtureRequest) -> None:
    """Runs the tests of a file: on a GPU where there is one, else in Triton's interpreter."""
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    seed = f"--seed={request.config.getoption('--seed')}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", seed, str(TESTS / name)]
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
