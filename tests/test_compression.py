"""Compression: 2:4 is 2:4, int8 and nf4 are bitsandbytes', packed equals dense, bytes are what is on disk."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

import calora
from calora.artifacts import bytes_on_disk, read_json
from calora.calibrate import linear_layers
from calora.compressed import load, save
from calora.compression import compress, dense_weight
from calora.compression.prune import keep_2_4
from calora.errors import CaloraError
from calora.models import load_model
from calora.packed import PackedLinear, quantize_int8
from tests.conftest import make_model

RECIPES = {
    "q8": [{"quantize": {"format": "int8", "embeddings": "int8"}}],
    "nf4": [{"quantize": {"format": "nf4", "embeddings": "int8"}}],
    "up": [{"prune": {"score": "wanda", "pattern": "2:4"}}],
    "q8_up": [{"prune": {"score": "wanda", "pattern": "2:4"}}, {"quantize": {"format": "int8", "embeddings": "int8"}}],
}


def test_int8_codes_are_those_of_bitsandbytes():
    torch.manual_seed(0)
    weight = torch.randn(8, 64).half().float()  # bitsandbytes takes fp16 here
    codes, scale = quantize_int8(weight)
    theirs, absmax, _ = bnb.functional.int8_vectorwise_quant(weight.half())
    assert int((codes.int() - theirs.int()).abs().max()) <= 1  # ties round differently
    torch.testing.assert_close(scale.flatten() * 127, absmax.float())


def test_two_of_four_are_kept_and_are_the_best():
    torch.manual_seed(0)
    score = torch.rand(6, 16)
    keep = keep_2_4(score).view(6, 4, 4)
    assert bool((keep.sum(-1) == 2).all())
    kept, dropped = score.view(6, 4, 4)[keep].view(6, 4, 2), score.view(6, 4, 4)[~keep].view(6, 4, 2)
    assert bool((kept.amin(-1) >= dropped.amax(-1)).all())


@pytest.mark.parametrize("width", [8, 12, 576])
def test_packing_is_exact(width):
    torch.manual_seed(0)
    layer = nn.Linear(width, 6, dtype=torch.bfloat16)
    keep = keep_2_4(layer.weight.abs())
    packed = PackedLinear.pack(layer, keep, "native")
    assert torch.equal(packed.dense_weight(torch.bfloat16), layer.weight * keep)


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("name", RECIPES)
def test_recipe_round_trip(tmp_path, toy, kind, name):
    base, out = make_model(kind, tmp_path / "base"), tmp_path / "out"
    model = load_model(base, torch.bfloat16)
    names = set(linear_layers(model))
    report = compress(model, RECIPES[name], toy[2])
    save(model, report, out, base)
    packed, dense = load(out), load(out, dense=True)
    assert names <= set(report["layers"])
    for layer, module in linear_layers(packed).items():
        assert torch.equal(dense_weight(module, torch.bfloat16), linear_layers(dense)[layer].weight)
        if "up" in name:
            groups = dense_weight(module, torch.float32).view(module.out_features, -1, 4)
            assert bool(((groups != 0).sum(-1) <= 2).all())
    inputs = {"input_ids": torch.tensor([[3, 5, 9, 12]])}
    if kind == "t5":
        inputs["decoder_input_ids"] = torch.tensor([[0]])
    # bf16 rounds at 2^-8; nf4's CPU kernel may sum in another order than a dense matmul
    torch.testing.assert_close(packed(**inputs).logits, dense(**inputs).logits, rtol=2e-2, atol=2e-2)
    assert (
        read_json(out / "compression.json", "")["bytes_without_this_report"]
        == bytes_on_disk(out) - (out / "compression.json").stat().st_size
    )
    assert not list(tmp_path.glob(".*partial"))


def test_bad_recipes_are_refused(toy):
    model, examples = toy[3], toy[2]
    for recipe in ([], [{"shrink": {}}], [{"quantize": {"format": "int3"}}], [{"prune": {"score": "wanda"}}]):
        with pytest.raises(CaloraError, match="Fix:"):
            compress(model, recipe, examples)
    with pytest.raises(CaloraError, match="at least one text"):
        compress(model, RECIPES["up"], [])
    compress(model, RECIPES["q8"], examples)
    with pytest.raises(CaloraError, match="not quantised yet"):
        compress(model, RECIPES["q8"], examples)


def test_truncated_edited_and_pickled_weights_are_refused(tmp_path, llama, toy):
    out = tmp_path / "out"
    model = load_model(llama, torch.bfloat16)
    save(model, compress(model, RECIPES["q8"], toy[2]), out, llama)
    weights = out / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-7])
    with pytest.raises(CaloraError, match="broken"):
        calora.load(out)
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CaloraError, match="fingerprint"):
        calora.load(out)
    weights.unlink()
    (out / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(CaloraError, match="only pickles"):
        calora.load(out)
