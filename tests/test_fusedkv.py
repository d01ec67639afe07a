"""Models of the FusedKV family: what they compute, that leaving early changes nothing, and how they are kept."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fused_models import LAYERS, SIZES, build, plain_logits, untie
from hf_models import GROUPED, prompt
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache

from kvstore.adapters.fusedkv import FusedKVConfig, FusedKVForCausalLM, FusedKVModel
from kvstore.adapters.fusedkv.attention import FusionWeights
from kvstore.adapters.fusedkv.layers import RebuiltLayer
from kvstore.bench.micro import plans
from kvstore.plan import PLANS


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 2e-5) -> bool:
    return one.shape == other.shape and float((one - other).abs().max()) < tolerance


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_the_standard_plan_is_llama_and_qwen3(seed: int, kind: str) -> None:
    """Bit for bit, with the weights of the one in the other."""
    sizes = {**GROUPED, "head_dim": 16}
    theirs = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes)).eval()
    mine = FusedKVForCausalLM(FusedKVConfig(kv_plan="standard", qk_norm=kind == "Qwen3", **sizes)).eval()
    mine.load_state_dict(theirs.state_dict())
    ids = prompt(40, seed, rows=2)
    with torch.no_grad():
        assert torch.equal(mine(ids).logits, theirs(ids).logits)
        assert torch.equal(mine.generate(ids, max_new_tokens=8), theirs.generate(ids, max_new_tokens=8))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_logits_are_those_of_the_plainest_form(seed: int, plan: str, interleaved: bool, attention: str) -> None:
    model = build(plan, seed, attention=attention, rope_interleaved=interleaved)
    ids = prompt(30, seed)
    with torch.no_grad():
        assert close(model(ids).logits, plain_logits(model, ids))


def test_any_plan_can_be_listed(seed: int) -> None:
    sums = {"keys": [0, 1, 3], "values": [3, 1], "weighted": True}
    plan = [None, None, {"keys": [1], "values": [0], "weighted": False}, None, sums]
    model = build(plan, seed)
    ids = prompt(30, seed)
    with torch.no_grad():
        assert close(model(ids).logits, plain_logits(model, ids))
        assert close(model(ids, logits_to_keep=1).logits, plain_logits(model, ids)[:, -1:])


@pytest.mark.parametrize("plan", PLANS)
def test_leaving_early_changes_no_logits(seed: int, plan: str) -> None:
    """In one piece, and in chunks of which all but the last need no logits at all."""
    model = build(plan, seed)
    ids = prompt(50, seed)
    with torch.no_grad():
        full = model(ids).logits
        for kept in (1, 2, 7, 49, 50, 60):
            assert close(model(ids, logits_to_keep=kept).logits, full[:, -kept:]), kept
        assert close(model(ids, logits_to_keep=torch.tensor([3, 17])).logits, full[:, [3, 17]])
        cache = DynamicCache(config=model.config)
        for first, last in ((0, 13), (13, 14), (14, 40)):
            model(ids[:, first:last], past_key_values=cache, logits_to_keep=1)
        assert close(model(ids[:, 40:], past_key_values=cache, logits_to_keep=4).logits, full[:, -4:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_greedy_tokens_with_and_without_early_exit(seed: int, plan: str, dtype: torch.dtype) -> None:
    """Equal in float32. In bfloat16 a token may differ where the two best logits are a rounding apart: a tie."""
    model = build(plan, seed, dtype)
    ties = 0
    for number in range(3):
        ids = prompt(40, seed + number)
        with torch.no_grad():
            for _ in range(16):
                full, left = model(ids).logits[0, -1].float(), model(ids, logits_to_keep=1).logits[0, -1].float()
                best = full.topk(2).values
                if full.argmax() != left.argmax():
                    assert dtype == torch.bfloat16
                    assert best[0] - best[1] <= 0.05 * full.std()
                    ties += 1
                ids = torch.cat((ids, full.argmax()[None, None]), 1)
    assert ties <= 4


@pytest.mark.parametrize("plan", PLANS)
def test_generate_in_every_way(seed: int, plan: str) -> None:
    model = build(plan, seed)
    ids = prompt(33, seed, rows=2)
    greedy = model.generate(ids, max_new_tokens=8, do_sample=False)
    for way in ({"use_cache": False}, {"prefill_chunk_size": 7}):
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, **way), greedy)
    beams = model.generate(ids, max_new_tokens=8, num_beams=3, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=8, num_beams=3, do_sample=False, use_cache=False), beams)
    padded = torch.cat((torch.zeros((2, 5), dtype=torch.long), ids), 1)
    mask = (torch.arange(38) >= 5).long().expand(2, -1)
    assert torch.equal(model.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, 5:], greedy)


@pytest.mark.parametrize("plan", PLANS)
def test_rows_of_a_batch_do_not_see_each_other_or_padding(seed: int, plan: str) -> None:
    model = build(plan, seed)
    long, short = prompt(24, seed), prompt(15, seed + 1)
    batch = torch.cat((long, torch.cat((torch.full((1, 9), 7), short), 1)))
    mask = torch.ones((2, 24), dtype=torch.long)
    mask[1, :9] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        both = model(batch, attention_mask=mask, position_ids=positions, logits_to_keep=3).logits
        assert close(both[:1], model(long, logits_to_keep=3).logits)
        assert close(both[1:], model(short, logits_to_keep=3).logits)


@pytest.mark.parametrize("interleaved", [False, True])
def test_logits_do_not_change_when_all_positions_shift(seed: int, interleaved: bool) -> None:
    """Scores depend on distances only, because weights are tied over rotary pairs; untied ones show that it matters."""
    model = build("fusedkv", seed, torch.float64, rope_interleaved=interleaved)
    model.model.rotary_emb.double()
    ids = prompt(30, seed)
    positions = torch.arange(30)[None]

    def moved(shift: int) -> float:
        with torch.no_grad():
            one, other = (
                model(ids, position_ids=positions + start, attention_mask=torch.ones_like(ids)).logits
                for start in (0, shift)
            )
        return float((one - other).abs().max() / one.std())

    assert moved(19) < 1e-3  # angles of transformers are float32
    untie(model)
    assert moved(19) > 0.05


def test_nothing_of_the_whole_context_is_made_in_rebuilt_layers(seed: int) -> None:
    """Neither rebuilt keys nor values: the largest new tensor is a row of scores. All logits are the control."""

    class Sizes(TorchDispatchMode):  # type: ignore[no-untyped-call]
        inside, largest = False, 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            given = {one.untyped_storage().data_ptr() for one in args if isinstance(one, torch.Tensor)}
            if self.inside and isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, result.numel())
            return result

    sizes = Sizes()  # type: ignore[no-untyped-call]
    model = build("fusedkv", seed)
    for layer in model.modules():
        if isinstance(layer, RebuiltLayer):
            layer.register_forward_pre_hook(lambda *_: setattr(sizes, "inside", True))
            layer.register_forward_hook(lambda *_: setattr(sizes, "inside", False))
    tokens, heads, dim = 300, 4, 16
    with torch.no_grad(), sizes:
        model(prompt(tokens, seed), use_cache=True, logits_to_keep=1)
    assert 0 < sizes.largest <= heads * tokens
    with torch.no_grad(), sizes:
        model(prompt(tokens, seed), use_cache=True)
    assert sizes.largest >= 2 * tokens * dim


@pytest.mark.parametrize("kv_heads", plans.SHAPES.values())
def test_prefill_is_half_the_work(kv_heads: int) -> None:
    """Floating-point operations of a prompt of 8192, by torch's counter; the paper has 0.5 and a little."""
    with torch.device("meta"):
        work = {arm: plans.flops(plans.build(arm, kv_heads), 8192) for arm in plans.ARMS}
    assert max(work["fusedkv"], work["fusedkv-lite"], work["yoco"]) <= plans.WORK * work["standard"]
    assert work["standard"] < work["transformers"]


@pytest.mark.parametrize("plan", PLANS)
def test_gradients_with_and_without_checkpointing(seed: int, plan: str) -> None:
    model = build(plan, seed).train()
    ids = prompt(20, seed, rows=2)
    model(ids, labels=ids, use_cache=False).loss.backward()
    plain = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    assert all(float(gradient.abs().sum()) > 0 for gradient in plain.values())
    for reentrant in (False, True):
        model.zero_grad()
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model(ids, labels=ids, use_cache=False).loss.backward()
        model.activation_checkpointing_disable()
        assert all(torch.allclose(weight.grad, plain[name], atol=1e-6) for name, weight in model.named_parameters())


@pytest.mark.parametrize("plan", PLANS)
def test_training_with_products_in_half_precision(seed: int, plan: str) -> None:
    model = build(plan, seed).train()
    ids = prompt(20, seed, rows=2)
    wanted = model(ids, labels=ids, use_cache=False).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    assert abs(loss.item() - wanted.item()) < 0.05
    for name, weight in model.named_parameters():
        assert weight.grad.dtype == torch.float32 and torch.isfinite(weight.grad).all(), name
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model.generate(ids, max_new_tokens=3)).all()


def test_hidden_states_of_all_layers_are_of_all_tokens(seed: int) -> None:
    model = build("fusedkv", seed)
    with torch.no_grad():
        states = model(prompt(20, seed), logits_to_keep=1, output_hidden_states=True).hidden_states
    assert [tuple(state.shape) for state in states] == [(1, 20, 64)] * (LAYERS + 1)


def test_weights_of_sums_start_as_lite(seed: int) -> None:
    """Keys of the middle layer and values of the first: the model that FusedKV-Lite is."""
    fused, lite = build("fusedkv", seed, fusion_init="lite"), build("fusedkv-lite", seed)
    lite.load_state_dict({name: w for name, w in fused.state_dict().items() if "fusion" not in name})
    ids = prompt(30, seed)
    with torch.no_grad():
        assert close(fused(ids).logits, lite(ids).logits)


# -- kept in files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS)
def test_saved_and_loaded_by_the_auto_classes(tmp_path: Path, seed: int, plan: str) -> None:
    model = build(plan, seed)
    model.save_pretrained(tmp_path)
    ids = prompt(20, seed)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, FusedKVForCausalLM)
    assert isinstance(AutoModel.from_pretrained(tmp_path), FusedKVModel)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_fresh_process_needs_only_the_import(tmp_path: Path, seed: int) -> None:
    model = build("fusedkv", seed)
    model.save_pretrained(tmp_path / "model")
    ids = prompt(20, seed)
    script = (
        "import sys, torch, kvstore.adapters.fusedkv\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(model.generate(torch.tensor([eval(sys.argv[2])]), max_new_tokens=6, do_sample=False).tolist())"
    ).replace("eval(sys.argv[2])", repr(ids[0].tolist()))
    command = [sys.executable, "-c", script, str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == str(model.generate(ids, max_new_tokens=6, do_sample=False).tolist())


def test_weights_of_sums_stay_float32(tmp_path: Path, seed: int) -> None:
    model = build("fusedkv", seed)
    before = {name: weight.clone() for name, weight in model.named_parameters() if "fusion" in name}
    assert before
    model.save_pretrained(tmp_path)
    for cast in (AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16), model.to(torch.bfloat16)):
        for name, weight in cast.named_parameters():
            assert weight.dtype == (torch.float32 if "fusion" in name else torch.bfloat16), name
            assert "fusion" not in name or torch.equal(weight, before[name])


def test_sums_are_the_only_vectors_of_a_plan(seed: int) -> None:
    """Half as many numbers for keys as for values: tied pairs cannot come apart in training."""
    shapes = {tuple(m.keys.shape) + tuple(m.values.shape) for m in build("fusedkv", seed).modules() if _is_sum(m)}
    assert shapes == {(2, 2, 8, 2, 2, 16)}
    assert not any(_is_sum(module) for plan in PLANS if plan != "fusedkv" for module in build(plan, seed).modules())


def _is_sum(module: Any) -> bool:
    return isinstance(module, FusionWeights)


def test_sizes_that_are_left_out(seed: int) -> None:
    config = FusedKVConfig(kv_plan="fusedkv", hidden_size=256, num_hidden_layers=8)
    assert (config.head_dim, config.num_key_value_heads, config.intermediate_size) == (16, 16, 768)
    assert SIZES["num_attention_heads"] == 4
