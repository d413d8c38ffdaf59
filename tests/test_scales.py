"""A task's own scales: W = (codes - zero) * scale * (1 + ratio) on every grid, packed and dense, and what they are as an adapter."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import calora.plugin  # noqa: F401  # from_pretrained then knows our format
from calora.adapters.cards import plain_card
from calora.adapters.fold import fold
from calora.adapters.folder import META, SCALES, read_adapter, write_adapter
from calora.adapters.lora import attach_adapter, lora_config, set_active, take_adapter
from calora.adapters.scales import on_grid
from calora.common.files import fingerprint
from calora.common.tensors import read_tensors
from calora.compressed import load
from calora.compression import compress
from calora.compression.prune import keep_n_of_m
from calora.compression.walk import Calibration
from calora.distillation.distill import Pool, distill, trainable
from calora.distillation.loss import Weights
from calora.distillation.training import Schedule
from calora.errors import CaloraError
from calora.inheritance.fresh import equal_budget, fresh_adapter, unchanged_scales
from calora.inheritance.inherit import Bypass, inherit
from calora.layers.codes import fit_grid
from calora.layers.layout import dense_view
from calora.layers.ongrid import GridLinear
from calora.layers.packed import BITS, PackedLinear, Packing
from calora.models.anatomy import linear_layers
from calora.models.loading import load_model, load_tokenizer
from calora.models.tasks import encode_all
from calora.recovery.shared import Factors, SharedRecovery, attach_shared
from calora.saving import save
from tests.conftest import TASK, make_model, toy_rows
from tests.test_adapters import resealed
from tests.test_strangers import logits

# format, group, symmetric, 2:4
GRIDS = [("int8", 64, True, False), ("int8", 64, True, True)] + [
    (format, 32, symmetric, sparse)
    for format in ("int4", "int3", "int2")
    for symmetric in (True, False)
    for sparse in (False, True)
]


def on(format, group, symmetric, sparse, dtype=torch.float32):
    """(packed layer, ratio, W = (codes - zero) * scale * (1 + ratio) in plain torch)."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 48, dtype=dtype).requires_grad_(False)
    keep = keep_n_of_m(layer.weight.abs(), 2, 4) if sparse else torch.ones(48, 64, dtype=torch.bool)
    grid = fit_grid(layer.weight * keep, BITS[format], group, symmetric, dtype)
    packing = Packing(format, sparse, group, symmetric)
    packed = PackedLinear.pack(layer, packing, keep=keep if sparse else None, grid=grid)
    ratio = 0.1 * torch.randn(48, 64 // group)
    zero = torch.full_like(grid.scale, -0.5 if grid.half_step else 0) if grid.zero is None else grid.zero
    levels = grid.encode(layer.weight * keep).float() - zero.float().repeat_interleave(group, 1)
    return packed, ratio, levels * (grid.scale.float() * (1 + ratio)).repeat_interleave(group, 1) * keep


@pytest.mark.parametrize("grid", GRIDS)
def test_each_grid_is_two_lines_of_torch_packed_and_dense(grid):
    packed, ratio, expected = on(*grid)
    dense, x = dense_view(packed, torch.float32), torch.randn(5, 64)
    before = [layer(x) for layer in (packed, dense)]
    for layer in (packed, dense):
        layer.rescale(ratio)
        torch.testing.assert_close(layer(x), F.linear(x, expected, layer.bias), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed.dense_weight(torch.float32), expected, rtol=1e-6, atol=1e-7)
    for layer, own in zip((packed, dense), before, strict=True):
        layer.rescale(-ratio)  # another task's
        layer.rescale(torch.zeros_like(ratio))
        assert torch.equal(layer(x), own)
        layer.rescale(None)
        assert torch.equal(layer(x), own)


@pytest.mark.parametrize("grid", GRIDS)
def test_what_a_cpu_computes_with_takes_them_and_gives_them_back(grid):
    """bf16: torch's kernels; a bf16 scale is rounded at 2^-9, and so is each weight of the dense view."""
    packed, ratio, expected = on(*grid, dtype=torch.bfloat16)
    packed.prepare(packed.room())
    assert bool(packed.kernel) == (grid[0] != "int8")
    ratio, x = ratio.bfloat16(), torch.randn(5, 64, dtype=torch.bfloat16)
    held = packed.kernel[1] if packed.kernel else packed.weight_scale
    before, kept = packed(x), held.clone()
    packed.rescale(torch.zeros_like(ratio))
    assert torch.equal(packed(x), before)
    packed.rescale(ratio)
    torch.testing.assert_close(packed(x), F.linear(x, expected.bfloat16(), packed.bias), rtol=2e-2, atol=2e-2)
    dense = dense_view(on(*grid, dtype=torch.bfloat16)[0], torch.bfloat16)
    dense.rescale(ratio)
    torch.testing.assert_close(packed(x), dense(x), rtol=2e-2, atol=2e-2)
    packed.rescale(None)
    assert (packed.kernel[1] if packed.kernel else packed.weight_scale) is held and torch.equal(held, kept)


@pytest.mark.parametrize("grid", [("int4", 32, False, False), ("int8", 64, True, True)])
def test_a_layer_that_moves_takes_the_tasks_scales_along(grid):
    packed, ratio, expected = on(*grid, dtype=torch.bfloat16)
    packed.prepare(packed.room())
    model = nn.ModuleDict({"layer": packed})
    packed.rescale(ratio.bfloat16())
    kept = packed.exchanged[0].clone()
    model.to(torch.float32)
    torch.testing.assert_close(packed.dense_weight(torch.float32), expected, rtol=2e-2, atol=2e-2)
    packed.rescale(None)
    assert torch.equal((packed.kernel[1] if packed.kernel else packed.weight_scale).bfloat16(), kept)
    if packed.kernel:  # as on the way to a GPU
        packed.rescale(ratio.bfloat16())
        model.to("meta")
        assert not packed.kernel and packed.exchanged is not None


def test_outlier_columns_and_the_bases_recovery_stay():
    torch.manual_seed(0)
    layer, columns = nn.Linear(64, 48).requires_grad_(False), torch.tensor([3, 40])
    rest = layer.weight.index_fill(1, columns, 0)
    grid = fit_grid(rest, 8, 64, True, torch.float32)
    packed = PackedLinear.pack(layer, Packing("int8", group=64, outliers=2), grid=grid, outliers=columns)
    factors = Factors.of(torch.randn(64, 4), {"q": torch.randn(4, 48)}, "int8", torch.float32)
    attach_shared(packed, SharedRecovery(factors, "q"))
    ratio, x = 0.1 * torch.randn(48, 1), torch.randn(5, 64)
    expected = grid.decode(grid.encode(rest)) * (1 + ratio) + (layer.weight - rest) + factors.weight("q")
    dense = dense_view(packed, torch.float32)
    for made in (packed, dense):
        before = made(x)
        made.rescale(ratio)
        torch.testing.assert_close(made(x), F.linear(x, expected, layer.bias), rtol=1e-4, atol=1e-4)
        made.rescale(None)
        assert torch.equal(made(x), before)
    assert dense.state_dict().keys() == {"weight", "bias"} and not list(dense.children())


def test_the_gradient_is_that_of_the_scales_and_goes_nowhere_else():
    packed, ratio, _ = on("int4", 32, False, False)
    dense, x = dense_view(packed, torch.float32), torch.randn(5, 64)
    parameter = nn.Parameter(ratio.clone())
    dense.rescale(parameter)
    dense(x).square().sum().backward()
    values = dense.weight.detach().view(48, 2, 32)
    ratio.requires_grad_()
    F.linear(x, (values * (1 + ratio.unsqueeze(-1))).flatten(1), dense.bias).square().sum().backward()
    torch.testing.assert_close(parameter.grad, ratio.grad)
    assert all(p.grad is None for p in dense.parameters())


RECIPES = {
    "int8": [{"quantize": {"format": "int8", "embeddings": "int8"}}],
    "int4": [{"quantize": {"format": "int4", "group": 32, "symmetric": False}}],
    "int3_int2": [{"quantize": {"format": "int3", "group": 32, "layers": {"up_proj": "int2"}}}],
    "experts": [
        {"moefy": {"experts": 8, "active": 0.5, "clustering": "parameters", "router": "analytic"}},
        {"quantize": {"format": "int8"}},
    ],
    "recovered": [
        {"prune": {"score": "wanda", "pattern": "2:4"}},
        {"quantize": {"format": "int8"}},
        {"recover": {"rank": 4, "fit": "after", "format": "int8"}},
    ],
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Recipe -> a compressed base of bf16."""
    folder = tmp_path_factory.mktemp("bases")
    whole = make_model("llama", folder / "base", hidden=64, inner=64)
    examples = encode_all(TASK, load_tokenizer(whole), toy_rows(8, 1))
    for name, recipe in RECIPES.items():
        model = load_model(whole, torch.bfloat16)
        save(model, compress(model, recipe, Calibration(examples)), folder / name, whole)
    return {name: folder / name for name in RECIPES}


def some(base, seed=1, **parts):
    """An adapter of random scales for a compressed base, and of other parts."""
    model = load(base)
    meta = {"task": TASK.to_json(), "compressed_fingerprint": model.calora_fingerprint, "origin": "here"}
    teacher = fresh_adapter(model, lora_config(4, 2, ["q_proj", "k_proj"]), meta)
    made, _ = inherit(model, teacher, **{"lora": "none", "scales": True, **parts})
    generator = torch.Generator().manual_seed(seed)
    for tensors in (made.lora, made.recovery, made.scales):
        for key, tensor in sorted(tensors.items()):
            tensors[key] = torch.randn(tensor.shape, generator=generator).mul(0.1).bfloat16().float()
    return made


def written(base, folder, **options):
    write_adapter(folder, some(base, **options), str(base), plain_card(TASK, str(base)), torch.bfloat16)
    return folder


BOTH = {"lora": "inherited", "bypass": Bypass(["q_proj", "down_proj"], 4, "gelu", "zero")}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("parts", [{}, BOTH], ids=["alone", "beside"])
def test_packed_equals_the_dense_view_and_zero_is_the_base_exactly(bases, tmp_path, recipe, parts):
    base = bases[recipe]
    made = some(base, **parts)
    written(base, tmp_path / "toy", **parts)
    found = {}
    for dense in (False, True):
        model = load(base, dense=dense)
        alone = logits(model)
        attach_adapter(model, inherit(model, made, lora="none", scales=True)[0], "zero")
        set_active(model, "zero")
        assert torch.equal(logits(model), alone)
        model.load_adapter(tmp_path / "toy", "toy")
        found[dense] = logits(model)
        assert float((found[dense] - alone).float().norm()) > 0.05 * float(alone.float().norm())
        model.set_adapter(None)
        assert torch.equal(logits(model), alone)
    torch.testing.assert_close(found[False], found[True], rtol=3e-2, atol=3e-2)
    assert set(made.scales) == {f"{name}.scales" for name in linear_layers(load(base))}


def test_one_token_of_experts_uses_them(bases, tmp_path):
    packed, dense = (load(bases["experts"], dense=dense) for dense in (False, True))
    for model in (packed, dense):
        model.load_adapter(written(bases["experts"], tmp_path / f"toy{id(model)}"), "toy")
    ids = torch.tensor([[5]])
    torch.testing.assert_close(packed(ids).logits, dense(ids).logits, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("recipe", ["int4", "recovered"])
def test_from_pretrained_takes_them(bases, tmp_path, recipe):
    adapter = read_adapter(written(bases[recipe], tmp_path / "toy"))
    theirs = AutoModelForCausalLM.from_pretrained(bases[recipe], dtype=torch.bfloat16)
    ours = load(bases[recipe])
    for model in (theirs, ours):
        attach_adapter(model, adapter, "toy")
        set_active(model, "toy")
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=2e-2, atol=2e-2)  # bf16, summed in another order


def test_bypasses_and_scales_are_in_the_dtype_of_the_base_whatever_is_on_it(bases):
    """The base of int8 tables has no floating parameter before its adapters', and PEFT's LoRA on int8 codes is fp32."""
    model = load(bases["int8"])
    attach_adapter(model, some(bases["int8"], lora="inherited", scales=False), "one")
    attach_adapter(model, some(bases["int8"], **BOTH), "two")
    kinds = [tensor.dtype for key, tensor in model.state_dict().items() if ".scales." in key]
    parts = [
        part.down.dtype for layers in model.calora_sides.adapters.values() for own in layers.values() for part in own
    ]
    assert len(kinds) == 14 and len(parts) > 4 and {*kinds, *parts} == {torch.bfloat16}


@pytest.mark.parametrize("recipe", ["int8", "int4"])
@pytest.mark.parametrize("dense", [False, True])
def test_adapters_are_switched_and_taken_off(bases, tmp_path, recipe, dense):
    base, found = bases[recipe], {}
    model = load(base, dense=dense)
    state, alone = {key: value.clone() for key, value in model.state_dict().items()}, logits(model)
    kinds = {"one": {}, "two": {}, "all": BOTH, "plain": {**BOTH, "scales": False}}
    for seed, (name, parts) in enumerate(kinds.items()):
        model.load_adapter(written(base, tmp_path / name, seed=seed, **parts), name)
        fresh = load(base, dense=dense)
        fresh.load_adapter(tmp_path / name, name)
        found[name] = logits(fresh)
    for name in ("two", "plain", "all", "one", "plain", "two"):
        model.set_adapter(name)
        assert torch.equal(logits(model), found[name]), name
    model.unload_adapter("one")
    assert model.calora_active == "two" and torch.equal(logits(model), found["two"])
    for name in ("two", "all", "plain"):  # the first is in use
        model.unload_adapter(name)
        assert torch.equal(logits(model), alone)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    model.load_adapter(tmp_path / "one", "one")
    model.set_adapter("one")
    assert torch.equal(logits(model), found["one"])


def test_a_folder_holds_its_ratios_in_bf16_and_notices_edits(bases, tmp_path):
    base = bases["int4"]
    folder, again = written(base, tmp_path / "toy"), written(base, tmp_path / "again")
    assert fingerprint(folder) == fingerprint(again)
    assert {path.name for path in folder.iterdir()} == {SCALES, META, "README.md"}
    stored, made = read_tensors(folder / SCALES, ""), some(base)
    assert made.parameters == sum(
        layer.weight.numel() // 32 for layer in linear_layers(load(base, dense=True)).values()
    )
    assert sum(tensor.nbytes for tensor in stored.values()) == 2 * made.parameters
    read = read_adapter(folder)
    assert read.meta == made.meta and all(torch.equal(read.scales[key], made.scales[key]) for key in made.scales)
    model = load(base)
    model.load_adapter(folder, "toy")
    taken = take_adapter(model, None, read.meta, "toy")
    assert all(torch.equal(taken.scales[key], value) for key, value in read.scales.items())
    with pytest.raises(CaloraError, match="adapter name: expected a name that is free"):
        attach_adapter(model, read, "toy")
    resealed(lambda about: about.update(scales=False))(folder)
    with pytest.raises(CaloraError, match="the SHA-256 of"):
        read_adapter(folder)
    resealed(lambda about: about.pop("scales"))(written(base, tmp_path / "old", scales=False, lora="inherited"))
    assert not read_adapter(tmp_path / "old").scales  # a folder of before


def test_beside_a_lora_plain_peft_is_told_of_them(bases, tmp_path):
    folder = written(bases["int8"], tmp_path / "toy", lora="inherited")
    about = json.loads((folder / "adapter_config.json").read_text())
    assert about["calora"].startswith("the rest of it is in scales.safetensors")


def test_what_cannot_be_is_refused(bases):
    base, made = bases["int4"], some(bases["int4"])
    model = load(base)
    name = "model.layers.0.self_attn.q_proj"
    cases = {
        "<layer>.scales of a layer of the base, found elsewhere": {"elsewhere": torch.zeros(4, 2)},
        r"expected \[64, 2\], found \[64, 3\]": {f"{name}.scales": torch.zeros(64, 3)},
    }
    for said, scales in cases.items():
        wrong = copy.copy(made)
        wrong.scales = {f"{name[:-6]}v_proj.scales": made.scales[f"{name[:-6]}v_proj.scales"], **scales}
        with pytest.raises(CaloraError, match=said):
            attach_adapter(model, wrong, "toy")
        assert not any(".scales" in key for key in model.state_dict())
    whole = load_model(base.parent / "base", torch.bfloat16)
    with pytest.raises(CaloraError, match=r"a layer whose codes are on a grid.*found Linear"):
        attach_adapter(whole, made, "toy")
    with pytest.raises(CaloraError, match="scales: expected layers on a grid"):
        unchanged_scales(whole)
    with pytest.raises(CaloraError, match="fold: expected a LoRA and a linear bypass, found scales"):
        fold(made)
    with pytest.raises(CaloraError, match=r"equal_budget: .* found scales"):
        equal_budget(made, linear_layers(model))
    with pytest.raises(CaloraError, match="that is no part of a layer's name"):
        attach_adapter(model, made, "in_use")


def test_nf4_has_no_such_grid(tmp_path, toy):
    pytest.importorskip("bitsandbytes")
    model = load_model(make_model("llama", tmp_path / "base", hidden=64, inner=64), torch.bfloat16)
    compress(model, [{"quantize": {"format": "nf4"}}], Calibration(toy[2]))
    with pytest.raises(CaloraError, match="nf4 has no such grid"):
        unchanged_scales(model)


def test_a_model_in_a_tasks_scales_is_not_saved(bases, tmp_path):
    model = load(bases["int8"])
    model.load_adapter(written(bases["int8"], tmp_path / "toy"), "toy")
    with pytest.raises(CaloraError, match="a task's scales"):
        model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def trained(base, steps=120, dense=True, **parts):
    """(model, adapter, history) of scales that learn the labels of the toy task."""
    model = load(base, dense=dense)
    examples = encode_all(TASK, load_tokenizer(base), toy_rows(24, 1))
    meta = {"task": TASK.to_json(), "compressed_fingerprint": model.calora_fingerprint}
    start = fresh_adapter(model, lora_config(4, 2, ["q_proj"]), meta)
    start, _ = inherit(model, start, **{"lora": "none", "scales": True, **parts})
    schedule = Schedule(steps, 5e-2, 2, 1.0, steps, 1e9)
    made, history = distill(
        model, start, Pool(examples), None, lambda: 0.0, Weights(), batch_size=12, schedule=schedule, seed=0
    )
    return model, made, history


@pytest.mark.parametrize("recipe", ["int8", "int4", "recovered"])
def test_scales_learn_and_nothing_else_does(bases, recipe):
    before = {key: value.clone() for key, value in load(bases[recipe], dense=True).state_dict().items()}
    model, _, history = trained(bases[recipe])
    losses = [row["loss"] for row in history.losses]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    names = {name for name, p in model.named_parameters() if any(p is q for q in trainable(model))}
    assert names == {f"{name}.scales.default" for name in linear_layers(model)} == after.keys() - before.keys()
    assert all(isinstance(layer, GridLinear) and on_grid(layer) for layer in linear_layers(model).values())


def test_the_same_run_gives_the_same_scales(bases):
    (_, one, first), (_, two, second) = trained(bases["int4"], 3), trained(bases["int4"], 3)
    assert first.losses == second.losses and all(
        torch.equal(two.scales[key], value) for key, value in one.scales.items()
    )


def test_scales_are_not_trained_on_packed_layers(bases):
    with pytest.raises(CaloraError, match="distill: expected a model that can be trained on, found packed layers"):
        trained(bases["int4"], dense=False)
