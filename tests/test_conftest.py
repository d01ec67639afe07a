"""The detectors of leaks find what is planted."""

import os
import threading
from pathlib import Path

from conftest import leaks, open_descriptors


def test_a_descriptor_that_is_left_is_found(tmp_path: Path) -> None:
    before = set(threading.enumerate()), open_descriptors()
    left = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    try:
        if before[1]:  # the system says what is open
            assert leaks(*before, patience=0) == [f"descriptor {left} -> {tmp_path / 'file'}"]
    finally:
        os.close(left)
    assert leaks(*before, patience=0) == []


def test_a_thread_that_is_left_is_found() -> None:
    before = set(threading.enumerate()), open_descriptors()
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="planted")
    thread.start()
    try:
        assert leaks(*before, patience=0) == ["thread planted"]
    finally:
        end.set()
        thread.join()
    assert leaks(*before, patience=0) == []


def test_seeds_differ_between_tests_and_not_between_runs(seed: int) -> None:
    assert 0 < seed < 2**32
