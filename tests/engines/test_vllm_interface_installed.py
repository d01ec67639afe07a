"""The vLLM that is installed has the interface that the connector was written for."""

import inspect
from typing import Any

import pytest
from vllm_interface import ABSTRACT, PARAMETERS, SOURCES, WRITES

pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def bases() -> tuple[Any, Any]:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, SupportsHMA

    return KVConnectorBase_V1, SupportsHMA


def spelled(method: Any) -> str:
    """Its parameters, as the recorded ones are written."""
    if isinstance(method, property):
        return ""
    found = inspect.signature(method).parameters.values()
    return " ".join(f"**{one.name}" if one.kind is one.VAR_KEYWORD else one.name for one in found if one.name != "self")


def test_what_connectors_must_have_is_what_was_recorded(bases: tuple[Any, Any]) -> None:
    assert {name for base in bases for name in base.__abstractmethods__} == ABSTRACT


@pytest.mark.parametrize("name", PARAMETERS)
def test_methods_take_what_was_recorded(bases: tuple[Any, Any], name: str) -> None:
    (method, *_) = (getattr(base, name) for base in bases if hasattr(base, name))
    assert spelled(method) == PARAMETERS[name]


def test_hits_have_the_sources_that_we_name() -> None:
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    assert SOURCES <= {source.name for source in CacheHitSource}


def test_the_attention_writes_its_cache_as_was_recorded() -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    assert spelled(CPUAttentionBackendImpl.do_kv_cache_update) == WRITES


def test_another_interface_would_be_noticed() -> None:
    class Other:
        def wait_for_layer_load(self, layer_name: str, patience: float) -> None: ...

    assert spelled(Other.wait_for_layer_load) != PARAMETERS["wait_for_layer_load"]
