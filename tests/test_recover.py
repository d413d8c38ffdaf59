"""The recovery that belongs to the base: what it is worth, that it is stored once, and that it is on in every form."""

import copy
import gc

import pytest
import torch

from calora.common.files import read_json
from calora.common.tensors import read_tensors
from calora.compressed import load
from calora.compression import check_recipe, compress
from calora.compression.walk import Calibration
from calora.errors import CaloraError
from calora.layers.layout import dense_weight
from calora.models.anatomy import linear_layers
from calora.models.loading import load_model
from calora.recovery.budget import Spectrum, share_out
from calora.recovery.shared import Factors, Reading, SharedRecovery, shared_of
from calora.recovery.warmstart import best_linear_correction, weighted_size
from calora.saving import save
from tests.conftest import make_model

PRUNE = {"prune": {"score": "sparsegpt", "pattern": "2:4"}}
INT8 = {"quantize": {"format": "int8", "embeddings": "int8"}}


def recover(fit="alternate", rounds=3, rank=4, format="native"):
    return {"recover": {"rank": rank, "fit": fit, "format": format, **({"rounds": rounds} if fit != "after" else {})}}


@pytest.fixture
def base(tmp_path):
    return make_model("llama", tmp_path / "base", torch.float32, hidden=32, inner=64)


@pytest.fixture
def texts(toy):
    return toy[2]


def made(base, recipe, texts, checkpoint=None):
    model = load_model(base, torch.float32)
    return model, compress(model, recipe, Calibration(texts, checkpoint))


def test_each_input_has_one_down_and_it_is_stored_once(tmp_path, base, texts):
    model, report = made(base, [PRUNE, INT8, recover(format="int8")], texts)
    layers = linear_layers(model)
    downs = {
        name.rsplit(".", 1)[-1]: shared_of(layer).down.data_ptr() for name, layer in layers.items() if ".0." in name
    }
    assert downs["q_proj"] == downs["k_proj"] == downs["v_proj"] and downs["gate_proj"] == downs["up_proj"]
    assert len(set(downs.values())) == 4
    save(model, report, tmp_path / "out", base)
    stored = read_tensors(tmp_path / "out/model.safetensors", "")
    assert (
        sum("self_attn" in name and name.endswith("base_recovery.down") for name in stored) == 2 * 2
    )  # qkv, o; blocks
    entries = read_json(tmp_path / "out/compression.json", "")["layers"]
    for name, entry in entries.items():
        if "recovery" in entry:
            own = sum(tensor.nbytes for key, tensor in stored.items() if key.startswith(f"{name}."))
            assert entry["bytes_after"] == own
    assert entries["model.layers.0.self_attn.q_proj"]["recovery"] == {"rank": 4, "format": "int8"}


@pytest.mark.parametrize("format", ["native", "int8"])
def test_packed_dense_and_from_pretrained_all_apply_it(tmp_path, base, texts, format):
    model, report = made(base, [PRUNE, INT8, recover(format=format)], texts)
    save(model, report, tmp_path / "out", base)
    ids = torch.tensor([[3, 5, 9, 12, 7]])
    packed, dense = load(tmp_path / "out"), load(tmp_path / "out", dense=True)
    with torch.no_grad():
        expected = model(ids).logits
        for loaded in (packed, dense):
            # fp32: W_c x + L x against (W_c + L) x
            torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert not any(shared_of(layer) for layer in linear_layers(dense).values())
    without = load(tmp_path / "out")
    for layer in linear_layers(without).values():
        shared_of(layer).up.zero_()
    with torch.no_grad():
        assert not torch.allclose(without(ids).logits, expected, rtol=1e-2, atol=1e-2)


def test_the_errors_in_the_report_are_those_of_the_stored_values(base, texts):
    whole, (model, report) = load_model(base, torch.float32), made(base, [PRUNE, INT8, recover(format="int8")], texts)
    x: dict[str, list[torch.Tensor]] = {}
    name = "model.layers.0.self_attn.q_proj"
    linear_layers(whole)[name].register_forward_pre_hook(
        lambda _, args: x.setdefault(name, []).append(args[0].flatten(0, 1))
    )
    with torch.no_grad():
        for text in texts:
            whole(torch.tensor([text.prompt_ids]))
    inputs = torch.cat(x[name])
    before, after = (dense_weight(linear_layers(m)[name], torch.float32) for m in (whole, model))
    error = ((before - after) @ inputs.T).norm() / (before @ inputs.T).norm()
    assert report.layers[name]["steps"]["recover"]["output_error"] == pytest.approx(float(error), rel=1e-3)


def test_rounds_lose_less_and_the_best_one_is_kept(base, texts):
    errors = {}
    for fit, rounds in (("after", None), ("alternate", 1), ("alternate", 4)):
        _, report = made(base, [PRUNE, INT8, recover(fit, rounds, rank=8)], texts)
        notes = {name: entry["steps"]["recover"] for name, entry in report.layers.items() if "recovery" in entry}
        assert all(note["output_error"] < note["without"] for note in notes.values())
        errors[fit, rounds] = sum(min(note["rounds"]) for note in notes.values())
        for note in notes.values():
            assert len(note["rounds"]) == (rounds or 1)
    assert errors["after", None] == errors["alternate", 1]
    assert errors["alternate", 4] < 0.95 * errors["after", None]


def test_the_map_is_the_best_of_its_rank_for_what_compression_lost():
    """Against the closed form by way of C^(1/2) (QERA, arXiv 2410.06040)."""
    torch.manual_seed(0)
    x, error = torch.randn(300, 24) @ torch.randn(24, 24), torch.randn(16, 24)
    moment = (x.T @ x).double()
    p, q = best_linear_correction(error, moment, 5)
    values, vectors = torch.linalg.eigh(moment)
    root = vectors * values.sqrt() @ vectors.T
    u, s, v = torch.linalg.svd(error.double() @ root)
    best = (u[:, :5] * s[:5] @ v[:5] @ torch.linalg.inv(root)).float()
    assert weighted_size(error - (p @ q).T, moment.float()) == pytest.approx(
        weighted_size(error - best, moment.float()), rel=1e-4
    )


def test_layers_of_one_input_get_the_best_map_of_all():
    torch.manual_seed(0)
    p, q = torch.randn(24, 4), {"a": torch.randn(4, 10), "b": torch.randn(4, 6)}
    factors = Factors.of(p, q, "native", torch.float32)
    for name in q:  # fp32 rounds at 2^-24
        torch.testing.assert_close(factors.weight(name), (p @ q[name]).T, rtol=1e-4, atol=1e-5)
        x = torch.randn(7, 24)
        torch.testing.assert_close(SharedRecovery(factors, name)(x), x @ p @ q[name], rtol=1e-4, atol=1e-4)


def test_inputs_with_huge_activations_keep_their_precision_in_int8():
    """An input that is 1000 times the others has factors a thousandth of theirs: one scale for all would round them off."""
    torch.manual_seed(0)
    size = torch.ones(64)
    size[5] = 1000.0
    x = torch.randn(200, 64) * size
    p, q = torch.randn(64, 8) / size.unsqueeze(1), torch.randn(8, 32)
    made = SharedRecovery(Factors.of(p, {"a": q}, "int8", torch.float32), "a")(x)
    error = (made - x @ p @ q).norm() / (x @ p @ q).norm()
    assert error < 0.01  # half a step of 127, of normal values


def test_one_input_is_read_once_and_forgotten():
    torch.manual_seed(0)
    factors = Factors.of(torch.randn(8, 2), {"a": torch.randn(2, 3), "b": torch.randn(2, 3)}, "native", torch.float32)
    a, b = SharedRecovery(factors, "a"), SharedRecovery(factors, "b")
    a.reading = b.reading = reading = Reading()
    x, calls = torch.randn(4, 8), []
    for layer in (a, b):
        layer.read = lambda x, own=layer: calls.append(1) or SharedRecovery.read(own, x)
    alone = SharedRecovery(factors, "b")(x)
    a(x)
    assert torch.equal(b(x), alone) and len(calls) == 1
    b(x + 1)
    assert len(calls) == 2
    x.requires_grad_(True)
    a(x), b(x)
    assert len(calls) == 4  # a graph is never held
    x = torch.randn(4, 8)
    a(x)
    assert reading.held is not None
    del x
    gc.collect()
    assert reading.held is None


def test_a_budget_goes_where_it_mends_most_a_byte():
    spectra = {"a": Spectrum([8.0, 4.0, 1.0], [4] * 3), "b": Spectrum([3.0, 2.0], [1] * 2)}
    assert share_out(spectra, 2) == {"a": 0, "b": 2}
    assert share_out(spectra, 10) == {"a": 2, "b": 2}
    assert share_out(spectra, 1000) == {"a": 3, "b": 2}
    assert share_out({"a": Spectrum([8.0, 0.0], [4, 4]), "b": Spectrum([0.0], [1])}, 1000) == {"a": 1, "b": 0}


def test_a_direction_that_brings_scales_along_is_weighed_with_those_behind_it():
    """Alone the first of `a` mends 0.4 a byte, all three 0.56; each of `b` 0.5."""
    spectra = {"a": Spectrum([4.0, 3.0, 2.0], [10, 3, 3]), "b": Spectrum([0.5] * 9, [1] * 9)}
    assert spectra["a"].runs() == [(9 / 16, 3)]
    assert share_out(spectra, 20) == {"a": 3, "b": 4}
    assert share_out(spectra, 15) == {"a": 2, "b": 2}  # a part of the run, where no more fits
    assert share_out(spectra, 9) == {"a": 0, "b": 9}
    again = {"a": Spectrum([4.0, 3.0, 2.9], [5, 20, 5]), "b": Spectrum([0.2], [6])}  # the second doesn't fit: no third
    assert share_out(again, 15) == {"a": 1, "b": 1}


@pytest.mark.parametrize("format", ["native", "int8"])
def test_a_budget_is_kept_and_loses_less_than_one_rank_for_all(base, texts, format):
    def tried(**size):
        """The bytes of all factors, and what each layer's entry says."""
        model, report = made(base, [PRUNE, INT8, {"recover": {"fit": "after", "format": format, **size}}], texts)
        factors = [t for name, t in model.state_dict().items() if name.endswith(("recovery.up", "recovery.down"))]
        told = {name: entry["steps"].get("recover") for name, entry in report.layers.items()}
        used = {t.data_ptr(): t.nbytes for t in factors}  # layers of one input share D
        return sum(used.values()), {name: notes for name, notes in told.items() if notes}

    def lost(told):
        leaders = [notes for name, notes in told.items() if not name.endswith(("k_proj", "v_proj", "up_proj"))]
        return sum(notes["rounds"][0] ** 2 for notes in leaders)

    budget, even = tried(rank=6)
    used, spread = tried(budget=budget / 1e6)
    assert len({notes["rank"] for notes in spread.values()}) > 1
    assert 0.9 * budget < used <= budget
    assert lost(spread) < lost(even)


def test_gradients_pass_through_the_packed_form(base, texts):
    model, _ = made(base, [PRUNE, INT8, recover(format="int8")], texts)
    layer = linear_layers(model)["model.layers.0.mlp.up_proj"]
    x = torch.randn(3, 32, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, dense_weight(layer, torch.float32).sum(0).expand(3, -1), rtol=1e-4, atol=1e-5)


def test_a_killed_compression_goes_on_with_one_down_for_each_input(tmp_path, base, texts):
    recipe = [PRUNE, INT8, recover(format="int8")]
    whole, report = made(base, recipe, texts, tmp_path / "blocks")
    (tmp_path / "blocks/model.layers.1.safetensors").unlink()
    again, resumed = made(base, recipe, texts, tmp_path / "blocks")
    assert {name: entry["bytes_after"] for name, entry in resumed.layers.items()} == {
        name: entry["bytes_after"] for name, entry in report.layers.items()
    }
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    downs = [
        shared_of(layer).down.data_ptr() for name, layer in linear_layers(again).items() if "layers.0.self_attn" in name
    ]
    assert len(set(downs)) == 2


def test_compressing_twice_gives_the_same_bits(base, texts):
    first, _ = made(base, [PRUNE, INT8, recover(format="int8")], texts)
    second, _ = made(base, [PRUNE, INT8, recover(format="int8")], texts)
    for name, tensor in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ([recover()], "recover after prune or quantize"),
        ([PRUNE, recover(), INT8], "no quantize after recover"),
        ([PRUNE, recover(), recover()], "no recover after recover"),
        ([PRUNE, recover("after") | {}, {"moefy": {}}], "moefy"),
        ([PRUNE, {"recover": {"rank": 4, "fit": "after", "rounds": 2, "format": "int8"}}], "recover.rounds"),
        ([PRUNE, {"recover": {"rank": 4, "fit": "alternate", "format": "int8"}}], "recover.rounds"),
        ([PRUNE, recover(rank=0)], "recover.rank"),
        ([PRUNE, recover(format="int7")], "recover.format"),
        ([PRUNE, recover(fit="before")], "recover.fit"),
        ([PRUNE, {"recover": {"fit": "after", "format": "int8"}}], "a rank or a budget"),
        ([PRUNE, {"recover": {"rank": 4, "budget": 1.0, "fit": "after", "format": "int8"}}], "a rank or a budget"),
        ([PRUNE, {"recover": {"budget": 0, "fit": "after", "format": "int8"}}], "recover.budget"),
        (
            [
                {"shrink": {"importance": "activation", "compensate": True, "neurons": 0.5}},
                PRUNE,
                {"recover": {"budget": 1.0, "fit": "after", "format": "int8"}},
            ],
            "no recover after shrink",
        ),
    ],
)
def test_a_wrong_recipe_is_refused(recipe, said):
    with pytest.raises(CaloraError, match=said):
        check_recipe(recipe)


def test_a_rank_above_a_layers_width_is_refused(base, texts):
    with pytest.raises(CaloraError, match=r"recover\.rank, model\.layers\.0\.self_attn\.q_proj"):
        made(base, [PRUNE, recover(rank=33)], texts)


def test_deepcopy_of_a_loaded_model(tmp_path, base, texts):
    model, report = made(base, [PRUNE, INT8, recover(format="int8")], texts)
    save(model, report, tmp_path / "out", base)
    loaded, ids = load(tmp_path / "out"), torch.tensor([[3, 5, 9]])
    with torch.no_grad():
        expected = loaded(ids).logits
        assert torch.equal(copy.deepcopy(loaded)(ids).logits, expected)
