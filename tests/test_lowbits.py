"""Low bits: exact packing, grids of few levels, searched ranges, formats by kind of layer, int4 tables."""

import copy
import functools

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import AutoModelForCausalLM

import calora.plugin  # noqa: F401  # from_pretrained then knows our format
from calora.common.files import read_json
from calora.compressed import load
from calora.compression import check_recipe, compress
from calora.compression.gptq import gptq
from calora.compression.prune import keep_n_of_m
from calora.compression.walk import Calibration
from calora.errors import CaloraError
from calora.layers.codes import RANGE, Grid, fit_grid, pack_planes, unpack_planes
from calora.layers.int4 import MANY_ROWS, unpacked, unpacks
from calora.layers.layout import dense_weight, prepare, restore, store
from calora.layers.packed import MANY_OUTPUTS, PackedEmbedding, PackedLinear, Packing, table_packing, table_tensors
from calora.models.anatomy import linear_layers
from calora.models.loading import load_model
from calora.saving import save
from stages.config import load_params
from tests.conftest import ROOT, make_model

LOW = {"format": "int3", "group": 32, "symmetric": False, "rounding": "gptq", "range": "search"}
FEED_FORWARD = {"llama": ("gate_proj", "up_proj"), "t5": ("wi",)}


def drawn(rows=48, width=128, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def rounded(weight, bits, group=32, symmetric=False, **options):
    grid = fit_grid(weight, bits, group, symmetric, torch.float32, **options)
    return grid.decode(grid.encode(weight))


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (4, 13), (6, 64), (29,), (2, 3, 31)])
def test_planes_hold_every_code_in_exactly_its_bits(bits, shape):
    low, high = RANGE[bits]
    codes = (torch.arange(torch.Size(shape).numel()) % (high - low + 1) + low).view(shape).to(torch.int8)
    packed = pack_planes(codes, bits)
    assert torch.equal(unpack_planes(packed, shape[-1], bits), codes) and packed.dtype == torch.uint8
    if shape[-1] % 8 == 0:
        assert packed.nbytes * 8 == bits * codes.numel()


def test_the_layout_on_disk_is_the_documented_one():
    codes = torch.tensor([[-2, -1, 0, 1, 1, 0, -1, -2]], dtype=torch.int8)
    # byte j of a plane of m bytes: codes j, j + m, j + 2 m, ..., the first in the lowest bits
    assert pack_planes(codes, 2).tolist() == [[0 | 2 << 2 | 3 << 4 | 1 << 6, 1 | 3 << 2 | 2 << 4 | 0 << 6]]
    three = torch.tensor([[-4, -3, -2, -1, 0, 1, 2, 3]], dtype=torch.int8)  # 0 to 7 above the lowest
    assert pack_planes(three, 3).tolist() == [[0 | 2 << 2 | 0 << 4 | 2 << 6, 1 | 3 << 2 | 1 << 4 | 3 << 6, 0b11110000]]


@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (2, True), (3, False), (3, True)])
def test_nearest_rounding_is_two_lines_of_torch(bits, symmetric):
    weight, levels = drawn(4, 32), 2**bits - 1
    if symmetric:
        step = weight.abs().amax(1, keepdim=True) / (levels / 2)
        half = 0.5 if bits == 2 else 0.0
        expected = ((weight / step - half).round().clamp(*RANGE[bits]) + half) * step
    else:
        step = (weight.amax(1, keepdim=True) - weight.amin(1, keepdim=True)) / levels
        zero = (-weight.amin(1, keepdim=True) / step).round()
        expected = ((weight / step + zero).round().clamp(0, levels) - zero) * step
    torch.testing.assert_close(rounded(weight, bits, 32, symmetric), expected)


def test_symmetric_int2_is_a_half_step_grid_and_asymmetric_keeps_zero():
    weight = drawn(8, 32)
    grid = fit_grid(weight, 2, 32, True, torch.float32)
    values = grid.decode(grid.encode(weight)) / grid.scale
    assert {round(v, 4) for v in values.flatten().tolist()} == {-1.5, -0.5, 0.5, 1.5}
    weight[:, 5] = 0
    for bits in (2, 3, 4):
        assert not bool(rounded(weight, bits)[:, 5].any())
    assert not bool(rounded(weight, 3, symmetric=True)[:, 5].any())
    empty = rounded(torch.zeros(2, 32), 2, symmetric=True)
    assert float(empty.abs().max()) < 1e-30  # no code is 0, but the scale of nothing is as small as can be


@pytest.mark.parametrize("symmetric", [True, False])
def test_fewer_bits_cost_more_and_a_searched_range_never_does(symmetric):
    weight, importance = drawn(), drawn(1, 128, 1).square().flatten()

    def whole(bits, **options):
        return float(((rounded(weight, bits, symmetric=symmetric, **options) - weight).square() * importance).sum())

    by_bits = [whole(bits) for bits in (2, 3, 4, 8)]
    assert by_bits == sorted(by_bits, reverse=True) and len(set(by_bits)) == 4
    for bits in (2, 3, 4):
        plain = (rounded(weight, bits, symmetric=symmetric) - weight).square() * importance
        new = rounded(weight, bits, symmetric=symmetric, search=True, importance=importance)
        searched = (new - weight).square() * importance
        groups = [error.view(48, 4, 32).sum(-1) for error in (searched, plain)]
        assert bool((groups[0] <= groups[1] + 1e-6).all())
        assert float(searched.sum()) < (0.95 if bits < 4 else 1.0) * float(plain.sum())
    assert whole(2, search=True, importance=importance) < 0.7 * whole(2)


def test_a_range_is_searched_for_what_counts():
    """A weight that meets no input may be clipped; without the importance it spoils the grid of its group."""
    weight = drawn(4, 32)
    weight[:, 3] = 6.0
    importance = torch.ones(32).index_fill_(0, torch.tensor([3]), 0.0)
    others = torch.arange(32) != 3

    def cost(**options):
        return float((rounded(weight, 3, search=True, **options) - weight)[:, others].square().sum())

    assert cost(importance=importance) < 0.8 * cost()


def correlated(rows=256, width=64, tokens=400):
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(tokens, width // 2, generator=generator) @ torch.randn(width // 2, width, generator=generator)
    x = mixed + 0.1 * torch.randn(tokens, width, generator=generator)
    return torch.randn(rows, width, generator=generator), x


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_beats_nearest_and_the_search_beats_both_alone(bits, symmetric):
    weight, x = correlated()
    moment = x.T @ x
    fit = functools.partial(fit_grid, bits=bits, group=32, symmetric=symmetric, dtype=torch.float32)

    def lost(new):
        return float(((weight - new) @ x.T).square().sum())

    found = {search: gptq(weight, moment, functools.partial(fit, search=search), 32)[0] for search in (False, True)}
    nearest = [lost(rounded(weight, bits, 32, symmetric, search=search)) for search in (False, True)]
    assert lost(found[False]) < 0.6 * nearest[0] and lost(found[True]) < 0.6 * nearest[1]
    assert lost(found[True]) < lost(found[False])


@pytest.mark.parametrize("format", ["int3", "int2"])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("out", [128, 16, 13])
def test_a_layer_stores_the_values_it_was_given_and_computes_with_them(format, sparse, symmetric, out):
    torch.manual_seed(0)
    layer = nn.Linear(64, out, dtype=torch.bfloat16)
    bits = int(format[-1])
    keep = keep_n_of_m(layer.weight.abs(), 2, 4) if sparse else None
    given = layer.weight.detach() if keep is None else layer.weight.detach() * keep
    grid = fit_grid(given, bits, 32, symmetric, torch.bfloat16)
    values = grid.decode(grid.encode(given)).bfloat16() * (1 if keep is None else keep)
    packed = PackedLinear.pack(layer, Packing(format, sparse, 32, symmetric), keep=keep, grid=grid)
    assert torch.equal(packed.dense_weight(torch.bfloat16), values)
    entry, tensors = store(packed)
    again = restore(layer, entry, tensors)
    x = torch.randn(2, 3, 64, dtype=torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        expected = nn.functional.linear(x.to(dtype), values.to(dtype), layer.bias.to(dtype))
        torch.testing.assert_close(again(x.to(dtype)), expected)
    again.prepare(again.room())
    assert bool(again.kernel) == (out != 13)  # torch's int4 kernel, where it takes the shape
    assert torch.equal(again.dense_weight(torch.bfloat16), values)  # and exactly the same values
    torch.testing.assert_close(again(x), nn.functional.linear(x, values, layer.bias), rtol=2e-2, atol=2e-2)
    if again.kernel:
        again.unprepare()
        assert again.packing == Packing("int4", False, 32, True)
        assert torch.equal(again.dense_weight(torch.bfloat16), values)


@pytest.mark.parametrize("out", [128, 80])
@pytest.mark.parametrize("symmetric", [True, False])
def test_many_rows_are_multiplied_by_the_unpacked_weight(symmetric, out, monkeypatch):
    torch.manual_seed(0)
    layer = nn.Linear(96, out, dtype=torch.bfloat16)
    grid = fit_grid(layer.weight.detach(), 4, 32, symmetric, torch.bfloat16)
    packed = PackedLinear.pack(layer, Packing("int4", False, 32, symmetric), grid=grid)
    packed.prepare(packed.room())
    kernel, calls = torch._weight_int4pack_mm_for_cpu, []
    monkeypatch.setattr(torch, "_weight_int4pack_mm_for_cpu", lambda *args: calls.append(1) or kernel(*args))
    x = torch.randn(2, MANY_ROWS // 2, 96, dtype=torch.bfloat16)
    whole, calls_of_many = packed(x), len(calls)
    parts = torch.cat([packed(x[:1]), packed(x[1:])])
    assert len(calls) - calls_of_many == 2 and calls_of_many == (0 if unpacks(packed.kernel[0]) else 1)
    torch.testing.assert_close(whole, parts, rtol=2e-2, atol=2e-2)  # the kernel does not round the weight to bf16
    if unpacks(packed.kernel[0]):
        scale, shift = (part.T.repeat_interleave(32, 1).float() for part in packed.kernel[1].unbind(-1))
        codes = grid.encode(layer.weight.detach()).float()
        assert torch.equal(unpacked(*packed.kernel).T, (codes * scale + shift).bfloat16())


@pytest.mark.parametrize(("format", "group"), [("int3", 64), ("int2", 32), ("int2", 128)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_bytes_are_those_of_codes_scales_and_zeros(format, group, symmetric):
    layer, bits = nn.Linear(128, 48, bias=False, dtype=torch.bfloat16), int(format[-1])
    grid = fit_grid(layer.weight.detach(), bits, group, symmetric, torch.bfloat16)
    packed = PackedLinear.pack(layer, Packing(format, False, group, symmetric), grid=grid)
    groups = 48 * 128 // group
    expected = bits * 48 * 128 // 8 + 2 * groups + (0 if symmetric else bits * groups // 8)
    assert sum(tensor.nbytes for tensor in packed.tensors().values()) == expected


def test_peft_puts_a_lora_on_a_layer_of_two_bits():
    layer = nn.Linear(64, 16, bias=False, dtype=torch.bfloat16)
    grid = fit_grid(layer.weight.detach(), 2, 32, False, torch.bfloat16)
    model = nn.Sequential()
    model.add_module("norm", nn.LayerNorm(64))
    model.add_module("q", PackedLinear.pack(layer, Packing("int2", group=32, symmetric=False), grid=grid))
    x = drawn(3, 64)
    before = model(x)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["q"], init_lora_weights=False), model)
    assert not torch.allclose(model(x), before)
    assert {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


@pytest.fixture
def calibration(toy):
    return Calibration(toy[2])


def wide(tmp_path, kind="llama"):
    return make_model(kind, tmp_path / "base", hidden=64, inner=64)


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_formats_by_kind_of_layer_go_to_disk_and_back(tmp_path, calibration, kind, pruned):
    base, out = wide(tmp_path, kind), tmp_path / "out"
    parts = FEED_FORWARD[kind]
    own = dict(zip(parts, ({"format": "int2", "group": 64}, "int3"), strict=False))
    step = {"quantize": LOW | {"format": "int4", "layers": own, "embeddings": "int4"}}
    recipe = [{"prune": {"score": "wanda", "pattern": "2:4"}}, step] if pruned else [step]
    model = load_model(base, torch.bfloat16)
    report = compress(model, recipe, calibration)
    before = copy.deepcopy(model)
    save(model, report, out, base)
    for name, layer in linear_layers(model).items():
        given = own.get(name.rpartition(".")[2], "int4")
        expected = ("int2", 64) if isinstance(given, dict) else (given, 32)
        assert (layer.packing.format, layer.packing.group) == expected
    stored = read_json(out / "compression.json", "")
    sizes = sum(entry["bytes_after"] for entry in stored["layers"].values()) + sum(stored["untouched"].values())
    shared = sum(model.get_parameter(alias).nbytes for alias in stored["tied"] if alias.endswith(".weight"))
    shared += sum(model.get_buffer(alias).nbytes for alias in stored["tied"] if not alias.endswith(".weight"))
    on_disk = (out / "model.safetensors").stat().st_size
    assert 0 < on_disk - (sizes - shared) < 20_000  # the header
    packed, dense = load(out), load(out, dense=True)
    for name, layer in linear_layers(dense).items():
        made = dense_weight(linear_layers(before)[name], torch.bfloat16)
        assert torch.equal(layer.weight.bfloat16(), made)
        assert not pruned or int((made.view(-1, 4) != 0).sum(1).max()) <= 2
    inputs = {"input_ids": torch.tensor([[3, 5, 9, 12]])}
    if kind == "t5":
        inputs["decoder_input_ids"] = torch.tensor([[0]])
    torch.testing.assert_close(packed(**inputs).logits, dense(**inputs).logits, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tokens", [24, 32])
def test_int4_tables_are_stored_once_and_load_in_transformers(tmp_path, calibration, tied, tokens):
    base, out = wide(tmp_path), tmp_path / "out"
    model = load_model(base, torch.bfloat16)
    model.config.tie_word_embeddings = tied
    model.resize_token_embeddings(tokens, mean_resizing=False)
    if not tied:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().flip(0).clone(), requires_grad=False)
    model.requires_grad_(False).save_pretrained(base)
    report = compress(model, [{"quantize": LOW | {"embeddings": "int4"}}], calibration)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (table.weight.data_ptr() == head.weight.data_ptr()) == tied
    save(model, report, out, base)
    tables = {"lm_head.weight", "lm_head.weight_scale", "lm_head.weight_zero_point"}
    assert set(read_json(out / "compression.json", "")["tied"]) == (tables if tied else set())
    ids, dense = torch.tensor([[3, 5, 9, 12]]), load(out, dense=True, dtype=torch.bfloat16)
    expected = dense(ids).logits
    for theirs in (load(out, dtype=torch.bfloat16), AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)):
        assert torch.equal(theirs.get_input_embeddings()(ids), dense.get_input_embeddings()(ids))
        assert bool(theirs.lm_head.kernel) == (tokens == 32)
        torch.testing.assert_close(theirs(ids).logits, expected, rtol=3e-2, atol=3e-2)
        assert torch.equal(theirs.lm_head.rows(ids[0], torch.bfloat16), dense.lm_head.weight[ids[0]])
        if tied:
            assert theirs.lm_head.weight.data_ptr() == theirs.get_input_embeddings().weight.data_ptr()
    with pytest.raises(CaloraError, match="stored form"):
        load(out, dtype=torch.bfloat16).save_pretrained(tmp_path / "again")
    again = load(out, dtype=torch.float32)  # no kernel: the head is unpacked some rows at a time
    assert not again.lm_head.kernel
    torch.testing.assert_close(again(ids).logits, load(out, dense=True, dtype=torch.float32)(ids).logits)


def test_a_table_without_a_kernel_is_read_in_pieces(monkeypatch):
    table = nn.Embedding(19, 96, dtype=torch.bfloat16).requires_grad_(False)  # no whole group of 64, no whole word of 8
    packed = PackedEmbedding.pack(table, "int4")
    packing = table_packing(96, "int4")
    grid = fit_grid(table.weight, 4, 32, False, torch.bfloat16, search=True)
    values = grid.decode(grid.encode(table.weight)).bfloat16()
    assert packing == Packing("int4", False, 32, False)
    assert torch.equal(packed.dense_weight(torch.bfloat16), values)
    ids = torch.tensor([[0, 7, 8], [18, 3, 3]])
    assert torch.equal(packed(ids), values[ids])
    head = PackedLinear(96, 19, packing, torch.bfloat16).restore(table_tensors(table.weight, "int4"))
    assert torch.equal(head.dense_weight(torch.bfloat16), values)
    x = drawn(2, 96).view(2, 1, 96)
    whole = head(x)
    assert MANY_OUTPUTS > 19
    monkeypatch.setattr("calora.layers.packed.MANY_OUTPUTS", 5)
    torch.testing.assert_close(head(x), whole)
    torch.testing.assert_close(whole, nn.functional.linear(x, values.float()))
    assert sum(t.nbytes for t in packed.state_dict().values()) == 19 * 96 // 2 + 2 * 19 * 3 + 4 * 3 * 3


def test_a_prepared_int4_head_moves_and_can_be_left():
    torch.manual_seed(0)
    head = PackedLinear(64, 32, table_packing(64, "int4"), torch.bfloat16)
    head.restore(table_tensors(torch.randn(32, 64, dtype=torch.bfloat16), "int4"))
    values = head.dense_weight(torch.bfloat16)
    prepare(head)
    assert head.kernel and torch.equal(head.dense_weight(torch.bfloat16), values)
    assert not copy.deepcopy(head).to("meta").kernel
    head.unprepare()
    assert torch.equal(head.dense_weight(torch.bfloat16), values)


def test_the_recipes_of_the_project_are_valid():
    for name in ("q3", "q4_2", "q2"):
        (step, options), *rest = check_recipe(load_params(ROOT / "params.yaml").compressions[name])
        assert step == "quantize" and options.rounding == "gptq" and options.range == "search"
        assert [name for name, _ in rest] == ["recover"]
    mixed = check_recipe(load_params(ROOT / "params.yaml").compressions["q4_2"])[0][1]
    reads, writes = (mixed.scheme("a.any", words) for words in ({"feed_forward_in"}, {"feed_forward"}))
    assert (reads.format, reads.group) == ("int2", 32) and (writes.format, writes.group) == ("int4", 64)


BAD = [
    ({"format": "int3"}, r"quantize\.group \(of int3\): expected one of 32, 64, 128"),
    ({"format": "int2", "group": 16}, r"quantize\.group \(of int2\)"),
    ({"format": "int8", "range": "search"}, r"quantize\.range: expected one of minmax"),
    ({"format": "int2", "group": 32, "range": "mse"}, r"quantize\.range: expected one of minmax, search"),
    ({"format": "int2", "group": 32, "outliers": 6.0}, r"quantize\.outliers"),
    ({"format": "int8", "symmetric": False}, r"quantize\.symmetric"),
    ({"format": "int8", "embeddings": "int3"}, r"quantize\.embeddings: expected one of int8, int4, none"),
    ({"format": "nf4", "layers": {"q_proj": "int4"}}, r"quantize\.layers: expected none for nf4"),
    ({"format": "int8", "layers": ["q_proj"]}, r"quantize\.layers: expected names of layers"),
    ({"format": "int8", "layers": {"q_proj": "nf4"}}, r"quantize\.layers\.q_proj\.format: expected one of int8"),
    ({"format": "int8", "layers": {"q_proj": "int4"}}, r"quantize\.layers\.q_proj\.group \(of int4\)"),
    ({"format": "int8", "layers": {"q_proj": {"bits": 4}}}, r"quantize\.layers\.q_proj: expected a format"),
    ({"format": "int4", "group": 32, "layers": {"q_proj": {"format": "int8", "group": 32}}}, r"none for int8"),
    ({"format": "int4", "group": 32, "layers": {"mlp": "int2"}}, r"down_proj, gate_proj, k_proj.*found mlp"),
    ({"format": "int4", "group": 32, "layers": {"up_proj": {"format": "int2", "group": 128}}}, r"up_proj's 64 inputs"),
]


@pytest.mark.parametrize(("options", "told"), BAD)
def test_bad_options_are_refused_before_any_work(tmp_path, calibration, options, told, monkeypatch):
    model = load_model(wide(tmp_path), torch.bfloat16)
    monkeypatch.setattr("calora.compression.walk._record", lambda *_: pytest.fail("work began"))
    with pytest.raises(CaloraError, match=told):
        compress(model, [{"quantize": options}], calibration)


def test_a_table_without_whole_groups_is_refused(tmp_path, calibration):
    model = load_model(make_model("llama", tmp_path / "odd", hidden=48), torch.bfloat16)
    with pytest.raises(
        CaloraError, match=r"embeddings \(int4\), model\.embed_tokens: expected a width divisible by 32"
    ):
        compress(model, [{"quantize": {"format": "int8", "embeddings": "int4"}}], calibration)


def test_a_widened_grid_has_the_same_values():
    for bits, symmetric in ((2, True), (2, False), (3, True), (3, False)):
        grid = fit_grid(drawn(), bits, 32, symmetric, torch.bfloat16)
        codes = grid.encode(drawn())
        four, wide = grid.widened(codes)
        assert isinstance(wide, Grid) and torch.equal(wide.decode(four), grid.decode(codes))
        assert int(four.min()) >= -8 and int(four.max()) <= 7
