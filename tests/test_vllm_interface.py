"""The connector for vLLM, read without vLLM: its methods are those of the interface that it was written for."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from vllm_interface import ABSTRACT, PARAMETERS, SOURCES

CONNECTOR = Path(__file__).resolve().parent.parent / "adapters" / "vllm" / "connector.py"


def methods(text: str) -> dict[str, str]:
    """The public methods of the only class, with their parameters."""
    (found,) = (node for node in ast.parse(text).body if isinstance(node, ast.ClassDef))
    return {
        node.name: parameters(node.args)
        for node in found.body
        if isinstance(node, ast.FunctionDef) and (node.name == "__init__" or not node.name.startswith("_"))
    }


def parameters(given: ast.arguments) -> str:
    names = [one.arg for one in [*given.posonlyargs, *given.args, *given.kwonlyargs]][1:]
    return " ".join(names + ([f"**{given.kwarg.arg}"] if given.kwarg else []))


def faults(text: str) -> list[str]:
    """What a connector lacks, or has otherwise than vLLM calls it."""
    ours = methods(text)
    missing = [f"{name} is missing" for name in sorted(ABSTRACT - set(ours))]
    unknown = [f"{name} is none of vLLM's" for name in sorted(set(ours) - set(PARAMETERS))]
    other = [f"{name}({ours[name]})" for name in sorted(set(ours) & set(PARAMETERS)) if ours[name] != PARAMETERS[name]]
    return missing + unknown + other


def test_the_connector_has_the_methods_that_vllm_calls() -> None:
    assert faults(CONNECTOR.read_text("utf-8")) == []


def test_a_connector_of_another_interface_is_noticed() -> None:
    text = CONNECTOR.read_text("utf-8")
    assert faults(text.replace("def wait_for_save(self)", "def waits(self)")) == [
        "wait_for_save is missing",
        "waits is none of vLLM's",
    ]
    assert faults(text.replace("def reset_cache(self)", "def reset_cache(self, hard)")) == ["reset_cache(hard)"]


def test_the_sources_of_hits_are_named_as_vllm_names_them() -> None:
    named = {
        node.attr
        for node in ast.walk(ast.parse(CONNECTOR.read_text("utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "CacheHitSource"
    }
    assert named == SOURCES


@pytest.mark.parametrize("part", ["", ".options"])
def test_naming_the_package_costs_no_engine(part: str) -> None:
    code = f"import sys, kvstore.adapters.vllm{part}; print(*({{'torch', 'vllm'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
