"""The bypass: an exact no-op at zero, the equation of the paper, and the exact linear warm start."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from calora.adapters.lora import Adapter, inject, lora_config, lora_state
from calora.compression import compress
from calora.compression.walk import Calibration
from calora.errors import CaloraError
from calora.inheritance.inherit import inherit
from calora.layers.codes import fit_grid
from calora.layers.layout import dense_weight
from calora.layers.packed import PackedLinear, Packing
from calora.models.anatomy import linear_layers
from calora.models.families import family_of
from calora.models.loading import load_model
from calora.models.tasks import Example
from calora.recovery.bypass import RecoveryBypass, activate, attach, recovery_state
from calora.recovery.warmstart import best_linear_correction, linear_as_bypass


def test_zero_bypass_is_an_exact_no_op_beside_dense_and_packed_layers():
    torch.manual_seed(0)
    dense = nn.Linear(16, 12, dtype=torch.bfloat16)
    grid = fit_grid(dense.weight.detach(), 8, 16, True, torch.bfloat16)
    for layer in (dense, PackedLinear.pack(dense, Packing("int8", group=16), grid=grid)):
        x = torch.randn(3, 5, 16, dtype=torch.bfloat16)
        before = layer(x)
        attach(layer, "a", RecoveryBypass(16, 12, 4, "gelu").bfloat16())
        activate(layer, "a")
        assert torch.equal(layer(x), before)


def test_bypass_is_sigma_xd_u():
    torch.manual_seed(0)
    layer, bypass = nn.Linear(16, 12), RecoveryBypass(16, 12, 4, "gelu")
    nn.init.normal_(bypass.up)
    x = torch.randn(3, 16)
    attach(layer, "a", bypass)
    activate(layer, "a")
    plain = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), plain + F.gelu(x @ bypass.down) @ bypass.up)
    activate(layer, None)
    assert torch.equal(layer(x), plain)
    assert set(recovery_state(nn.ModuleDict({"l": layer}), "a")) == {"l.down", "l.up"}


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_within_the_last_product_is_output_plus_bypass(rows, dtype):
    torch.manual_seed(0)
    bypass = RecoveryBypass(16, 12, 4, "gelu").to(dtype)
    nn.init.normal_(bypass.up)
    x, output = torch.randn(1, rows, 16, dtype=dtype), torch.randn(1, rows, 12, dtype=dtype)
    expected = output + bypass(x)
    kept = bypass.beside(output.clone(), x)
    kept.sum().backward()
    assert bypass.down.grad is not None
    with torch.no_grad():
        inplace = bypass.beside(output.clone(), x)
    # one rounding instead of two in bf16 (2^-8); in fp32 the order of the sum
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-6
    for found in (kept, inplace):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("activation", ["gelu", "silu", "relu", "identity"])
def test_warm_start_equals_its_linear_map(activation):
    torch.manual_seed(0)
    p, q = torch.randn(16, 3, dtype=torch.float64), torch.randn(3, 12, dtype=torch.float64)
    rank = 3 if activation == "identity" else 6
    bypass = RecoveryBypass(16, 12, rank, activation).double()
    bypass.down.data, bypass.up.data = linear_as_bypass(p, q, activation, rank)
    x = torch.randn(50, 16, dtype=torch.float64)
    torch.testing.assert_close(bypass(x), x @ p @ q, rtol=1e-10, atol=1e-10)  # float64: rounding only


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_correction_is_the_optimum_of_the_weighted_norm(shape):
    torch.manual_seed(0)
    error = torch.randn(shape, dtype=torch.float64)
    x = torch.randn(200, shape[1], dtype=torch.float64) @ torch.diag(torch.logspace(-1, 1, shape[1]).double())
    p, q = best_linear_correction(error, x.T @ x, 4)
    rest = (x @ (error - (p.double() @ q.double()).T).T).norm()
    singular = torch.linalg.svdvals(x @ error.T)  # Eckart-Young: what no rank-4 map can remove
    torch.testing.assert_close(rest, singular[4:].norm(), rtol=1e-5, atol=0.0)  # p, q are rounded to fp32
    torch.testing.assert_close(p.norm(), q.norm(), rtol=1e-5, atol=0.0)


def test_correction_of_a_singular_moment_is_finite():
    torch.manual_seed(0)
    x = torch.randn(3, 12)  # fewer tokens than inputs
    p, q = best_linear_correction(torch.randn(20, 12), x.T @ x, 4)
    assert bool(p.isfinite().all() and q.isfinite().all())


@pytest.mark.parametrize(("rank", "activation"), [(0, "gelu"), (13, "gelu"), (4, "tanh")])
def test_bad_bypass_is_refused(rank, activation):
    with pytest.raises(CaloraError, match="expected"):
        RecoveryBypass(16, 12, rank, activation)


def test_the_warm_start_is_fitted_to_what_the_uncompressed_model_sees(toy, llama):
    _, _, examples, compressed = toy
    reference = load_model(llama, torch.bfloat16)
    inject(reference, lora_config(4, 2, ["q_proj"]), "t")
    generator = torch.Generator().manual_seed(0)
    lora = {key: torch.randn(t.shape, generator=generator) * 0.1 for key, t in lora_state(reference, "t").items()}
    teacher = Adapter(lora_config(4, 2, ["q_proj"]), lora)
    compress(compressed, [{"prune": {"score": "magnitude", "pattern": "2:4"}}], Calibration(examples))
    whole = load_model(llama, torch.bfloat16)
    adapter, report = inherit(
        compressed, whole, teacher, examples, targets=["down_proj"], rank=4, activation="gelu", start="weighted_error"
    )
    seen = []
    name = "model.layers.1.mlp.down_proj"
    whole.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2).double()))
    family = family_of(whole)
    with torch.no_grad():
        for example in examples:
            family.forward(whole, family.collate([Example(example.prompt_ids)], whole), None)
    x = torch.cat(seen)
    error = (linear_layers(whole)[name].weight - dense_weight(linear_layers(compressed)[name], torch.bfloat16)).double()
    down, up = (adapter.recovery[f"{name}.{part}"].double() for part in ("down", "up"))
    rest = (x @ error.T - F.gelu(x @ down) @ up).norm()
    best = torch.linalg.svdvals(x @ error.T)[2:].norm()  # what no map of rank 2 = 4 / 2 can remove
    torch.testing.assert_close(rest, best, rtol=5e-3, atol=0.0)  # the inputs are bf16, batched in another way here
    whole_output = (x @ linear_layers(whole)[name].weight.double().T).norm()
    expected = [float((x @ error.T).norm() / whole_output), float(rest / whole_output)]
    assert report["errors"][name] == pytest.approx(expected, rel=1e-2)


def test_what_is_switched_off_is_not_there(toy, llama):
    """For the ablation: no bypass, a fresh LoRA of the same shape, and then a reference without the teacher's."""
    _, _, examples, model = toy
    config = lora_config(4, 2, ["q_proj"])
    reference = load_model(llama, torch.bfloat16)
    inject(reference, config, "t")
    teacher = Adapter(config, {key: torch.ones_like(t) for key, t in lora_state(reference, "t").items()})
    compress(model, [{"prune": {"score": "magnitude", "pattern": "2:4"}}], Calibration(examples))
    options = {"targets": ["down_proj"], "rank": 4, "activation": "gelu", "start": "weighted_error"}

    def made(**off):
        return inherit(model, load_model(llama, torch.bfloat16), teacher, examples, **options, **off)

    (whole, _), (alone, told), (fresh, _) = made(), made(bypass=False), made(lora=False)
    assert not alone.recovery and not told["errors"] and alone.meta["recovery"] is False
    assert all(torch.equal(alone.lora[key], tensor) for key, tensor in whole.lora.items())
    assert fresh.lora.keys() == whole.lora.keys() and fresh.recovery.keys() == whole.recovery.keys()
    for key, tensor in fresh.lora.items():
        assert bool(tensor.any()) == (".lora_A." in key)
    assert not torch.equal(*(a.recovery["model.layers.1.mlp.down_proj.down"] for a in (whole, fresh)))
    again, _ = made(lora=False)
    assert all(torch.equal(fresh.lora[key], tensor) for key, tensor in again.lora.items())
