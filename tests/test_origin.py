"""The adapter follows the shape: where neurons, heads or layers were cut or moved, LoRA and warm start are cut alike."""

import pytest
import torch

from calora.adapters.lora import Adapter, attach_adapter, inject, lora_config, lora_state, set_active
from calora.adapters.origin import Origin
from calora.common.leastsquares import compensated
from calora.compressed import load
from calora.compression import compress
from calora.compression.walk import Calibration
from calora.errors import CaloraError
from calora.inheritance.inherit import Bypass, carry_lora, inherit
from calora.models.anatomy import linear_layers
from calora.models.loading import load_model
from calora.models.moments import input_second_moments
from calora.saving import save
from tests.conftest import make_model
from tests.test_compression import EXPERTS

IDS = torch.tensor([[3, 5, 9, 12, 7]])
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Sums over fewer terms, or in another order: double precision leaves 1e-16 a term.
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def teacher_of(model, targets):
    """A LoRA with random A and B."""
    inject(model, lora_config(4, 2, targets), "t")
    generator = torch.Generator().manual_seed(0)
    lora = {key: torch.randn(t.shape, generator=generator).double() * 0.1 for key, t in lora_state(model, "t").items()}
    return Adapter(lora_config(4, 2, targets), lora)


def shrunk(tmp_path, toy, silence, step, targets):
    """(logits with the teacher on the original, on the compressed model, report of the inheritance, the LoRA there)."""
    base = make_model("llama", tmp_path / "base", torch.float64)
    model = load_model(base, torch.float64)
    with torch.no_grad():
        silence(model)
    model.save_pretrained(base)
    teacher = teacher_of(load_model(base, torch.float64), targets)
    whole, model = load_model(base, torch.float64), load_model(base, torch.float64)
    attach_adapter(whole, teacher, "a")
    set_active(whole, "a")
    report = compress(model, [step], Calibration(toy[2]))
    save(model, report, tmp_path / "out", base)
    cut = load(tmp_path / "out")
    adapter, told = carry_lora(cut, teacher, cut.calora_origin)
    attach_adapter(cut, adapter, "a")
    set_active(cut, "a")
    with torch.no_grad():
        return whole(IDS).logits, cut(IDS).logits, told, adapter, teacher


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("importance", ["activation", "taylor"])
def test_cutting_only_silent_neurons_changes_nothing(tmp_path, toy, compensate, importance):
    def silence(model):
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight[::2] = 0  # silu(0) = 0: whatever LoRA adds to up_proj is multiplied by it

    step = {"shrink": {"importance": importance, "compensate": compensate, "neurons": 0.5}}
    before, after, told, adapter, teacher = shrunk(tmp_path, toy, silence, step, ["q_proj", "up_proj", "down_proj"])
    torch.testing.assert_close(after, before, **EXACT)
    name = "model.layers.1.mlp"
    assert torch.equal(
        adapter.lora[f"{name}.up_proj.lora_B.weight"], teacher.lora[f"{name}.up_proj.lora_B.weight"][1::2]
    )
    assert torch.equal(
        adapter.lora[f"{name}.down_proj.lora_A.weight"], teacher.lora[f"{name}.down_proj.lora_A.weight"][:, 1::2]
    )
    assert told.sliced[f"{name}.up_proj"] == [32, 48] and told.mapped[f"{name}.up_proj"] == [32, 24]


@pytest.mark.parametrize("importance", ["activation", "taylor"])
def test_cutting_only_silent_heads_changes_nothing(tmp_path, toy, importance):
    def silence(model):
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:, :16] = 0  # both query heads of the first of two key-value heads

    step = {"shrink": {"importance": importance, "compensate": True, "heads": 0.5}}
    before, after, told, _, _ = shrunk(tmp_path, toy, silence, step, ["q_proj", "k_proj", "v_proj"])
    torch.testing.assert_close(after, before, **EXACT)
    assert told.sliced["model.layers.0.self_attn.k_proj"] == [32, 16]


@pytest.mark.parametrize("importance", ["activation", "taylor"])
def test_cutting_only_a_silent_layer_changes_nothing_and_is_told(tmp_path, toy, importance):
    def silence(model):
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()

    step = {"shrink": {"importance": importance, "compensate": False, "layers": 0.5}}
    before, after, told, adapter, teacher = shrunk(tmp_path, toy, silence, step, ["q_proj", "gate_proj"])
    torch.testing.assert_close(after, before, **EXACT)
    assert {key.split(".lora_")[0] for key in told.dropped} == {
        f"model.layers.0.{n}" for n in ("self_attn.q_proj", "mlp.gate_proj")
    }
    now, then = "model.layers.0.self_attn.q_proj.lora_A.weight", "model.layers.1.self_attn.q_proj.lora_A.weight"
    assert torch.equal(adapter.lora[now], teacher.lora[then])


def test_experts_in_another_order_keep_every_lora(tmp_path, toy):
    step = {"moefy": {**EXPERTS, "active": 0.99, "shared": 3}}
    before, after, told, _, _ = shrunk(tmp_path, toy, lambda _: None, step, EVERY)
    torch.testing.assert_close(after, before, **EXACT)
    assert not told.sliced and not told.dropped


def test_the_warm_start_of_a_cut_layer_is_zero_where_nothing_was_lost(tmp_path, toy):
    base = make_model("llama", tmp_path / "base", torch.float32)
    model = load_model(base, torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight[::2] = 0
            layer.mlp.down_proj.weight[:, ::2] = 0
    model.save_pretrained(base)
    whole, model = load_model(base, torch.float32), load_model(base, torch.float32)
    report = compress(
        model, [{"shrink": {"importance": "activation", "compensate": True, "neurons": 0.5}}], Calibration(toy[2])
    )
    teacher = teacher_of(load_model(base, torch.float32), ["q_proj"])
    origin = Origin(report.kept, report.layers_kept)
    bypass = Bypass(["down_proj", "up_proj"], 4, "gelu", "weighted_error")
    adapter, told = inherit(model, teacher, bypass=bypass, reference=whole, calibration=toy[2], origin=origin)
    assert set(map(tuple, told.errors.values())) == {(0.0, 0.0)}  # so nothing that the start could remove
    assert not any(bool(t.any()) for key, t in adapter.recovery.items() if key.endswith(".up"))


def test_compensation_is_the_least_squares_fit():
    torch.manual_seed(0)
    x = torch.randn(500, 12) @ torch.randn(12, 12)
    weight, kept = torch.randn(5, 12), torch.tensor([0, 2, 3, 7, 8, 11])
    new = compensated(weight, x.T @ x, kept)
    best = torch.linalg.lstsq(x[:, kept], x @ weight.T).solution.T
    lost = [float((x @ weight.T - x[:, kept] @ w.T).square().sum()) for w in (new, best, weight[:, kept])]
    assert lost[1] <= lost[0] < 1.05 * lost[1] < lost[2]  # the damping costs a little
    assert torch.equal(compensated(weight, x.T @ x, torch.arange(12)), weight)


def test_a_lora_of_another_base_is_refused():
    with pytest.raises(CaloraError, match=r"inherited tensor model\.layers\.9"):
        Origin().carry(
            {"model.layers.9.q.lora_A.weight": torch.ones(1), "model.layers.9.q.lora_B.weight": torch.ones(1)},
            ["model.layers.0.q"],
        )
    with pytest.raises(CaloraError, match="both lora_A and lora_B"):
        Origin().carry({"a.lora_A.weight": torch.ones(1)}, ["a"])


def test_smaller_models_are_ordinary_ones(tmp_path, toy):
    """Plain transformers loads them, without calora's format."""
    from transformers import AutoModelForCausalLM

    base = make_model("llama", tmp_path / "base")
    model = load_model(base, torch.bfloat16)
    step = {"shrink": {"importance": "activation", "compensate": True, "neurons": 0.5, "heads": 0.5, "layers": 0.5}}
    save(model, compress(model, [step], Calibration(toy[2])), tmp_path / "out", base)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert not hasattr(plain.config, "quantization_config")
    assert (plain.config.num_hidden_layers, plain.config.intermediate_size, plain.config.num_key_value_heads) == (
        1,
        24,
        1,
    )
    assert torch.equal(plain(IDS).logits, load(tmp_path / "out")(IDS).logits)
    assert {n: tuple(m.weight.shape) for n, m in linear_layers(plain).items()}["model.layers.0.self_attn.q_proj"] == (
        16,
        32,
    )


def test_an_inherited_lora_makes_up_for_the_inputs_that_were_cut(tmp_path, toy):
    """A' is the least squares fit of A X from the inputs that remain (X as the uncompressed model under its LoRA has them)."""
    base = make_model("llama", tmp_path / "base", torch.float32)
    whole, model = load_model(base, torch.float32), load_model(base, torch.float32)
    teacher = teacher_of(load_model(base, torch.float32), EVERY)
    step = {"shrink": {"importance": "activation", "compensate": True, "neurons": 0.5, "heads": 0.5}}
    report = compress(model, [step], Calibration(toy[2]))
    origin = Origin(report.kept, report.layers_kept)
    with pytest.raises(CaloraError, match=r"reference: expected the uncompressed model, for the LoRA on .*lost inputs"):
        inherit(model, teacher, origin=origin)
    adapter, told = inherit(model, teacher, reference=whole, calibration=toy[2], origin=origin)
    sliced, _ = carry_lora(model, teacher, origin)
    attach_adapter(whole, teacher, "a")
    set_active(whole, "a")
    layers = linear_layers(whole)
    moments = dict(input_second_moments(whole, toy[2], layers))
    for layer in told.mapped:
        a, b = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
        assert torch.equal(adapter.lora[b], sliced.lora[b])
        columns = origin.columns(layer)
        if columns is None:
            assert torch.equal(adapter.lora[a], sliced.lora[a])
            continue
        assert layer.endswith(("down_proj", "o_proj"))
        torch.testing.assert_close(adapter.lora[a], compensated(teacher.lora[a], moments[layer], columns))

        def lost(values, layer=layer, columns=columns, a=a):
            rest = teacher.lora[a].clone()
            rest[:, columns] -= values
            return float(((rest @ moments[layer].double()) * rest).sum())

        assert lost(adapter.lora[a]) < 0.9 * lost(sliced.lora[a])
    alone, _ = inherit(model, teacher, lora="fresh", origin=origin)  # nothing to fit
    assert alone.lora.keys() == adapter.lora.keys()
