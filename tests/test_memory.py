"""Less memory: packed layers are trained on as their dense view is, parts of a batch and recomputed blocks give the whole's gradient."""

from dataclasses import replace

import pytest
import torch

from calora.adapters.lora import attach_adapter, inject, lora_config, set_active
from calora.compressed import load
from calora.compression import compress
from calora.compression.walk import Calibration
from calora.distillation.distill import Pool, distill, finetune, trainable
from calora.distillation.loss import Weights
from calora.distillation.parts import Parts, recomputing
from calora.distillation.targets import Targets, write_targets
from calora.distillation.training import Schedule
from calora.errors import CaloraError
from calora.inheritance.inherit import Bypass, inherit
from calora.layers import unpacking
from calora.layers.unpacking import UnpackingLinear
from calora.models.anatomy import linear_layers
from calora.models.families import family_of
from calora.models.loading import load_model, load_tokenizer
from calora.models.tasks import Task, encode_all
from calora.saving import save
from tests.conftest import TASK, make_model, toy_rows

SCHEDULE = Schedule(steps=4, lr=1e-2, warmup=1, clip=1.0, eval_every=0, checkpoint_seconds=1e9)
INT8 = {"quantize": {"format": "int8", "embeddings": "int8"}}
INT3 = {"quantize": {"format": "int3", "group": 32, "symmetric": False, "embeddings": "int4"}}
RECIPES = {
    "q8": [INT8],
    "q8_up": [{"prune": {"score": "wanda", "pattern": "2:4"}}, INT8],
    "up": [{"prune": {"score": "wanda", "pattern": "2:4"}}],
    "q3_r": [INT3, {"recover": {"rank": 4, "fit": "after", "format": "int8"}}],
    "nf4": [{"quantize": {"format": "nf4"}}],
    "q8_m": [{"moefy": {"experts": 4, "active": 0.5, "clustering": "parameters", "router": "analytic"}}, INT8],
}  # fmt: skip


def compressed(tmp_path, recipe, kind="llama"):
    """(folder, tokenised examples)."""
    base = make_model(kind, tmp_path / "base", hidden=64, inner=64)
    examples = encode_all(TASK, load_tokenizer(base), toy_rows(8, 1))
    model = load_model(base, torch.bfloat16)
    save(model, compress(model, recipe, Calibration(examples)), tmp_path / "compressed", base)
    return tmp_path / "compressed", examples


def trained(folder, examples, targets, scales=False, schedule=SCHEDULE, **how):
    """(adapter, losses) after a few steps of everything that can be trained."""
    model = load(folder, attention="eager", **how)
    names = sorted({name.rpartition(".")[2] for name in linear_layers(model)})
    bypass = None if scales else Bypass(names, 2, "gelu", "zero")
    torch.manual_seed(0)
    made = inject_free(model, names, bypass, scales)
    weights = Weights(1.0, {"decoder": 1.0, "encoder": 1.0}, 1.0, 1.0)
    adapter, history = distill(
        model, made, Pool(examples, targets), None, lambda: 0.0, weights, batch_size=4, schedule=schedule, seed=0
    )
    return adapter, [row["loss"] for row in history.losses]


def inject_free(model, names, bypass, scales):
    """An adapter without a teacher: a fresh LoRA, a bypass that starts at zero, or scales."""
    from calora.inheritance.fresh import fresh_adapter

    plain = fresh_adapter(model, lora_config(2, 2, names), {"activation": "gelu"}, 0)
    made, _ = inherit(
        model,
        plain,
        lora="none" if scales else "fresh",
        bypass=bypass,
        scales=scales,
        seed=0,
        reference=None,
        calibration=[],
    )
    made.meta["activation"] = "gelu"
    return made


def stored_targets(tmp_path, folder, examples):
    model, tokenizer = load(folder, dense=True), load_tokenizer(folder)
    write_targets(tmp_path / "targets", model, TASK, tokenizer, examples, 4, 5, "targets")
    return Targets(tmp_path / "targets")


@pytest.mark.parametrize(
    ("name", "scales", "kind"),
    [
        ("q8", False, "llama"), ("q8", True, "llama"), ("q8_up", False, "t5"), ("up", False, "llama"), ("q3_r", False, "llama"),
        ("q3_r", True, "llama"), ("nf4", False, "llama"), ("q8_m", False, "llama"),
    ],
)  # fmt: skip
def test_training_on_packed_layers_is_training_on_their_dense_view(name, scales, kind, tmp_path):
    folder, examples = compressed(tmp_path, RECIPES[name], kind)
    targets = stored_targets(tmp_path, folder, examples)
    dense, expected = trained(folder, examples, targets, scales, dense=True)
    packed, found = trained(folder, examples, targets, scales, trainable=True)
    assert found == expected and len({*found}) > 1
    for part in ("lora", "recovery", "scales"):
        theirs = getattr(dense, part)
        assert bool(theirs) == (scales == (part == "scales"))
        assert all(torch.equal(getattr(packed, part)[key], value) for key, value in theirs.items())


def test_nothing_dense_is_kept_for_the_backward_pass(tmp_path):
    """Of what autograd keeps nothing is as large as a weight, but where a task's scales are trained: nor there."""
    folder, _ = compressed(tmp_path, RECIPES["q8"])
    model = load(folder, trainable=True, attention="eager")
    assert any(isinstance(layer, UnpackingLinear) for layer in linear_layers(model).values())
    inject(model, lora_config(2, 2, ["q_proj", "up_proj"]))
    kept = []

    def pack(tensor):
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.tensor([[3, 4, 5]])).logits.sum().backward()
    assert kept and (64, 64) not in {tuple(shape) for shape in kept}
    assert all(p.grad is not None for p in trainable(model))


@pytest.mark.parametrize("embeddings", ["int8", "int4"])
def test_a_head_is_multiplied_some_rows_at_a_time(embeddings, tmp_path, monkeypatch):
    folder, _ = compressed(tmp_path, [{"quantize": {"format": "int8", "embeddings": embeddings}}])
    dense, packed = load(folder, dense=True), load(folder, trainable=True)
    assert isinstance(packed.lm_head, UnpackingLinear)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    expected = dense.lm_head(x)
    (gradient,) = torch.autograd.grad(expected.float().square().sum(), x)
    monkeypatch.setattr(unpacking, "ROWS", 5)
    assert packed.lm_head.in_pieces()
    found = packed.lm_head(x)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)  # bf16: products of other shapes
    torch.testing.assert_close(torch.autograd.grad(found.float().square().sum(), x)[0], gradient, rtol=2e-2, atol=1e-2)


def test_a_model_to_train_on_moves_and_is_not_saved(tmp_path):
    folder, _ = compressed(tmp_path, RECIPES["q3_r"])
    model = load(folder, trainable=True)
    before = model(torch.tensor([[3, 4, 5]])).logits
    with pytest.raises(CaloraError, match="save_pretrained: expected layers in their stored form"):
        model.save_pretrained(tmp_path / "again")
    assert torch.equal(model.to("cpu")(torch.tensor([[3, 4, 5]])).logits, before)
    (layer,) = model.to("meta").model.layers[0].mlp.up_proj.packed
    assert layer.get_buffer("weight_packed").is_meta


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_recomputed_blocks_give_the_same_bits(kind, tmp_path):
    folder, examples = compressed(tmp_path, RECIPES["q8"], kind)
    targets = stored_targets(tmp_path, folder, examples)
    plain, expected = trained(folder, examples, targets, dense=True)
    less = replace(SCHEDULE, gradient_checkpointing=True)
    again, found = trained(folder, examples, targets, schedule=less, dense=True)
    assert found == expected and all(torch.equal(again.lora[key], value) for key, value in plain.lora.items())


def test_recomputing_keeps_less_and_leaves_no_trace(llama32):
    model = load_model(llama32, torch.float32, attention="eager")
    inject(model, lora_config(2, 2, ["q_proj", "up_proj"]))
    for parameter in trainable(model):
        parameter.requires_grad_()
    kept = {}
    for on in (False, True):
        with (
            torch.autograd.graph.saved_tensors_hooks(
                lambda t, on=on: kept.setdefault(on, []).append(t.numel()) or t, lambda t: t
            ),
            recomputing(model, on),
        ):
            model(torch.tensor([[3, 4, 5, 6]])).logits.sum()
    assert len(kept[True]) < 0.5 * len(kept[False])
    assert not [block for block in model.model.layers if "forward" in vars(block)]


def test_parts_of_a_batch_give_the_step_of_the_whole(llama32, tmp_path):
    """Answers of one to five words: parts differ in texts and in answer tokens. fp32, sums in another order."""
    tokenizer, model = load_tokenizer(llama32), load_model(llama32, torch.float32, attention="eager")
    written = Task("toy", TASK.prompt, (), 32, 8)
    rows = [{**row, "answer": " ".join(row["text"].split()[: 1 + i % 5])} for i, row in enumerate(toy_rows(12, 1))]
    examples = encode_all(written, tokenizer, rows)
    write_targets(tmp_path, model, written, tokenizer, examples, 4, 5, "targets")
    found = {}
    for parts in (1, 3, 9):
        schedule = replace(SCHEDULE, accumulation=parts)
        model = load_model(llama32, torch.float32, attention="eager")
        adapter, history = finetune(
            model, lora_config(2, 2, ["q_proj", "up_proj"]), examples, lambda: 0.0, batch_size=5, schedule=schedule, seed=0
        )  # fmt: skip
        model = load_model(llama32, torch.float32, attention="eager")
        weights = Weights(1.0, {"decoder": 1.0}, 1.0, 1.0)
        theirs, distilled = distill(
            model, adapter, Pool(examples, Targets(tmp_path)), None, lambda: 0.0, weights, batch_size=5, schedule=schedule, seed=0
        )  # fmt: skip
        losses = [list(row.values()) for each in (history, distilled) for row in each.losses]
        found[parts] = losses, history.tokens + distilled.tokens, theirs.lora
    for parts in (3, 9):
        assert found[parts][1] == found[1][1]
        for row, expected in zip(found[parts][0], found[1][0], strict=True):
            assert row == pytest.approx(expected, rel=1e-4, abs=1e-7)
        for key, value in found[1][2].items():
            torch.testing.assert_close(found[parts][2][key], value, rtol=2e-3, atol=2e-5)


def test_a_batch_is_split_evenly(llama32):
    tokenizer, model = load_tokenizer(llama32), load_model(llama32, torch.float32)
    examples = encode_all(TASK, tokenizer, toy_rows(8, 1))
    assert Parts(model, examples, [3, 1, 2, 7, 0], 2).indices == [[3, 1], [2, 7, 0]]
    assert Parts(model, examples, [3, 1], 4).indices == [[3], [1]]
    assert (
        family_of(model).collate([examples[3]], model).labels.tolist()
        == Parts(model, examples, [3], 1).batches[0].labels.tolist()
    )


def test_what_serves_is_not_trained_on(tmp_path):
    folder, examples = compressed(tmp_path, RECIPES["q8"])
    model = load(folder)
    with pytest.raises(CaloraError, match="dense=True or trainable=True"):
        distill(
            model, inject_free(load(folder, dense=True), ["q_proj"], None, False), Pool(examples), None, lambda: 0.0, Weights(),
            batch_size=4, schedule=SCHEDULE, seed=0,
        )  # fmt: skip
    with pytest.raises(CaloraError, match="dense or trainable"):
        load(folder, dense=True, trainable=True)


def test_adapters_are_served_on_a_model_to_train_on_as_on_the_dense_view(tmp_path):
    folder, _ = compressed(tmp_path, RECIPES["q8"])
    outputs = []
    for how in ({"dense": True}, {"trainable": True}):
        model = load(folder, **how)
        attach_adapter(
            model, inject_free(model, ["q_proj", "down_proj"], Bypass(["up_proj"], 2, "gelu", "zero"), False), "one"
        )
        set_active(model, "one")
        outputs.append(model(torch.tensor([[3, 4, 5]])).logits)
    assert torch.equal(*outputs)
