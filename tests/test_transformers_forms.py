"""Keys that are turned on load have the bits that the model's own rotation gives, wherever they are placed."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hf_models import DTYPES, FAMILIES, GROUPED, build, prompt
from hf_models import _model as model_of
from transformers import DynamicCache

import kvstore
from kvstore.adapters.transformers import Reuse
from kvstore.adapters.transformers.buffers import LayerSpec
from kvstore.adapters.transformers.form import find_form
from kvstore.adapters.transformers.rotation import Rotation
from kvstore.local import LocalStore
from kvstore.tensors.rope import HALF, INTERLEAVED
from kvstore.tensors.runs import Target
from kvstore.tensors.transfer import transfer

SHIFTS = (0, 1, 511, 4097, 65_521, (1 << 17) - 24)
TOKENS = 24
OTHERS: dict[str, Callable[[], Any]] = {
    "glm": model_of("Glm", **GROUPED, head_dim=16),
    "cohere": model_of("Cohere", **GROUPED),
    "stablelm": model_of("StableLm", **GROUPED),
    "olmo2": model_of("Olmo2", **GROUPED),
    "smollm3": model_of("SmolLM3", **GROUPED),
}
SLOW = {"deepseek_v3"}  # their keys are turned after the copy
ALL_DTYPES = {**DTYPES, "float16": torch.float16}


@pytest.fixture
def store() -> Iterator[LocalStore]:
    with kvstore.open(host="16MiB") as store:
        yield store


def a_model(family: str, dtype: str) -> Any:
    if family in FAMILIES:
        return build(family, "float32").to(ALL_DTYPES[dtype])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return OTHERS[family]().to(ALL_DTYPES[dtype]).eval()


def placed(rotation: Rotation, originals: torch.Tensor, position: int) -> torch.Tensor:
    """Keys [heads, tokens, dim] as a load writes them at ``position``."""
    if rotation.form is None:  # no kernel does it: the model's own function, on keys that were copied
        return rotation.rotate(originals[None].clone(), position)[0]
    tokens = originals.shape[1]
    source = originals.contiguous()
    keys, values = torch.full_like(source, 7), torch.full_like(source, 7)
    runs = np.array([[source.data_ptr(), source.data_ptr(), tokens, 0, tokens, position, 0]], dtype=np.int64)
    transfer(runs, rotation.form.upto(position + tokens), Target(keys, values))
    assert torch.equal(values, source)
    return keys


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_every_layer_at_every_shift(store: LocalStore, family: str, dtype: str, seed: int) -> None:
    reuse = Reuse(a_model(family, dtype), store, block_tokens=16)
    source = torch.Generator().manual_seed(seed)
    for rotation, spec in zip(reuse._joined.attached.rotations, reuse._joined.attached.specs, strict=True):
        keys = (3 * torch.randn((spec.heads, TOKENS, spec.key_dim), generator=source)).to(ALL_DTYPES[dtype])
        assert (rotation.form is None) == (rotation.function is None or family in SLOW)
        for shift in SHIFTS:
            assert torch.equal(placed(rotation, keys, shift), rotation.rotate(keys[None], shift)[0]), shift
        if rotation.form is not None:
            assert not torch.equal(placed(rotation, keys, 511), rotation.rotate(keys[None], 512)[0])


class Watching(DynamicCache):  # type: ignore[misc]
    """Keeps the keys that layer 0 was given."""

    def __init__(self, config: Any, spec: LayerSpec, seen: list[torch.Tensor]) -> None:
        super().__init__(config=config)
        self.spec, self.seen = spec, seen

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        if layer == 0:
            self.seen.append(self.spec.exchanged(keys, values)[0][0])
        return super().update(keys, values, layer, *args, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_layer_of_a_prompt_that_was_shifted(store: LocalStore, family: str, dtype: str, seed: int) -> None:
    """Layer 0 sees no attention, so its keys at other positions are what the model itself makes there."""
    model = a_model(family, dtype)
    reuse = Reuse(model, store, block_tokens=16)
    rotation, ids = reuse._joined.attached.rotations[0], prompt(TOKENS, seed)
    keys: dict[int, torch.Tensor] = {}
    for shift in SHIFTS:
        seen: list[torch.Tensor] = []

        with torch.no_grad():
            model(
                input_ids=ids,
                position_ids=torch.arange(shift, shift + TOKENS)[None],
                attention_mask=torch.ones_like(ids),
                past_key_values=Watching(model.config, reuse._joined.attached.specs[0], seen),
                use_cache=True,
            )
        keys[shift] = seen[0]
    hit = reuse.load(ids)
    with torch.no_grad():
        model(**hit.forward_inputs)
    (block, *_) = hit.cache.recorder.rows[0]._blocks.values()
    originals = block.keys[0][:, :16]
    for shift in SHIFTS:
        assert torch.equal(placed(rotation, originals, shift), keys[shift][:, :16]), shift


def test_forms_that_are_found(store: LocalStore) -> None:
    found = {}
    for family in ("llama", "phi3", "neox", "glm", "cohere", "olmo2", "deepseek_v2"):
        form = Reuse(a_model(family, "bfloat16"), store, block_tokens=16)._joined.attached.rotations[0].form
        assert form is not None
        found[family] = (form.pairing, form.rounded, form.upto(1).pairs)
    assert found == {
        "llama": (HALF, True, 8),
        "phi3": (HALF, True, 6),
        "neox": (HALF, True, 4),
        "glm": (INTERLEAVED, True, 4),
        "cohere": (INTERLEAVED, False, 8),
        "olmo2": (HALF, False, 8),
        "deepseek_v2": (INTERLEAVED, False, 8),
    }


def test_a_rotation_of_another_arithmetic_has_no_form(store: LocalStore) -> None:
    """The model's function is the judge: one last bit of difference, and keys go through the function itself."""
    rotation = Reuse(a_model("llama", "bfloat16"), store, block_tokens=16)._joined.attached.rotations[0]
    function = rotation.function
    assert function is not None

    def other(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **kwargs: Any) -> Any:
        queries, keys = function(q.double(), k.double(), cos.double(), sin.double(), **kwargs)
        turned = keys.to(k.dtype)
        turned.view(torch.int16)[..., 0, 0] ^= 1
        return queries.to(q.dtype), turned

    changed = Rotation(
        other,
        rotation.args,
        rotation.kwargs,
        rotation.key_slot,
        rotation.key_result,
        rotation.query_slots,
        rotation.angle_slots,
        rotation.table,
    )
    assert find_form(rotation, 2, 16, torch.bfloat16) is not None
    assert find_form(changed, 2, 16, torch.bfloat16) is None
