"""Folders for other runtimes: GGUF has the compressed model's numbers to the bit, adapters count as they do in torch, and a wrong folder is noticed."""

import asyncio
import importlib.util
import json
import re
import shutil

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers import decoders as token_decoders
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import calora
from calora.__main__ import main
from calora.adapters.cards import plain_card
from calora.adapters.fold import fold, of_one_rank, shared_lora
from calora.adapters.folder import write_adapter
from calora.adapters.lora import Adapter
from calora.common.files import read_json, write_json
from calora.compressed import load, stored_form
from calora.compression import compress
from calora.compression.walk import Calibration
from calora.device.architecture import Architecture
from calora.device.blocks import NoExactType, as_linear, exact, packed, relative_error, rounded
from calora.device.catalogue import Catalogue
from calora.device.engine import LlamaEngine
from calora.device.entries import check_pair, read_entries
from calora.device.export import export
from calora.device.folder import read_folder
from calora.device.llama import Llama
from calora.device.vocabulary import pretokenizer
from calora.device.writer import adapter_tensors, write_lora
from calora.errors import CaloraError
from calora.layers.codes import fit_grid
from calora.layers.nf4 import Nf4Linear
from calora.layers.packed import BITS, PackedEmbedding, PackedLinear, Packing
from calora.models.anatomy import linear_layers
from calora.models.loading import load_model, load_tokenizer
from calora.models.tasks import Task, encode_all
from calora.recovery.shared import shared_of
from calora.saving import save
from tests.conftest import toy_rows

TASK = Task("toy", "Review: {text}\nSentiment:", ("n", "p"), 64, 4)
INT8 = {"quantize": {"format": "int8", "embeddings": "int8"}}
INT4 = {"quantize": {"format": "int4", "group": 32, "symmetric": True, "embeddings": "int8"}}
INT3 = {"quantize": {"format": "int3", "group": 64, "symmetric": False, "embeddings": "int4"}}
RECOVER = {"recover": {"rank": 4, "fit": "after", "format": "int8"}}
llama_cpp = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")


END = "<end>"  # a token that ends an answer besides the tokenizer's own


def make_tokenizer(folder):
    """Byte-level BPE, as GPT-2 splits, with one merge, a special token and a chat template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", *letters, "Ġg"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ġ", "g")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = token_decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    made.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    made.add_special_tokens({"additional_special_tokens": [END]})
    made.save_pretrained(folder)


SIZES = {
    "vocab_size": 264, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "llama 3": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3, "attention_bias": True}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 32}),
}


def make_base(folder, family="llama", dtype=torch.bfloat16, loud=None, ends=(), **sizes):
    """A random model.

    Args:
        loud: token -> factor of its logit.
        ends: tokens that end an answer besides the tokenizer's own.
    """
    torch.manual_seed(0)
    model_class, config_class, own = FAMILIES[family]
    model = model_class(config_class(**SIZES | own | sizes))
    for (
        name,
        parameter,
    ) in model.named_parameters():  # a random model says nearly the same of every text, and looks everywhere
        if parameter.ndim > 1:
            parameter.data.mul_(12.0 if "q_proj" in name or "k_proj" in name else 3.0)
        else:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    for token, factor in (loud or {}).items():
        model.get_output_embeddings().weight.data[token] *= factor
    model.generation_config.eos_token_id = [1, *ends]
    model.to(dtype).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def make_compressed(folder, recipe, **options):
    base = make_base(folder / "base", **options)
    tokenizer, model = load_tokenizer(base), load_model(base, options.get("dtype", torch.bfloat16))
    report = compress(model, recipe, Calibration(encode_all(TASK, tokenizer, toy_rows(8, 1))))
    save(model, report, folder / "compressed", base)
    return folder / "compressed"


def make_adapter(folder, compressed, recovery=True, activation="identity", size=0.3, **meta):
    """Mixed ranks and alphas, a bypass on some layers; bf16 values."""
    generator = torch.Generator().manual_seed(1)
    model, report = stored_form(compressed)
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], rank_pattern={"v_proj": 2},
        alpha_pattern={"down_proj": 3},
    )  # fmt: skip
    lora, bypass = {}, {}
    for name, layer in linear_layers(model).items():
        part, rank = name.rpartition(".")[2], 2 if name.endswith("v_proj") else 4

        def drawn(*shape):
            return (size * torch.randn(*shape, generator=generator)).bfloat16()

        if part in ("q_proj", "v_proj", "down_proj"):
            lora[f"{name}.lora_A.weight"], lora[f"{name}.lora_B.weight"] = (
                drawn(rank, layer.in_features), drawn(layer.out_features, rank)
            )  # fmt: skip
        if recovery and part in ("k_proj", "v_proj", "up_proj"):
            bypass[f"{name}.down"], bypass[f"{name}.up"] = drawn(layer.in_features, 3), drawn(3, layer.out_features)
    meta = {
        "task": TASK.to_json(), "method": "test", "activation": activation, "base_fingerprint": report["base_fingerprint"],
        "compressed_fingerprint": report["fingerprint"], "recipe": "test", "steps": report["recipe"], **meta,
    }  # fmt: skip
    write_adapter(folder, Adapter(config, lora, bypass, meta), "base", plain_card(TASK, "base"), torch.bfloat16)
    return folder


@pytest.fixture(scope="module")
def int8(tmp_path_factory):
    """(compressed folder, adapter folder)."""
    folder = tmp_path_factory.mktemp("int8")
    compressed = make_compressed(folder, [INT8])
    return compressed, make_adapter(folder / "adapter", compressed)


@pytest.fixture(scope="module")
def recovered(tmp_path_factory):
    """int3 in groups of 64 where they fit, with an int4 table and a recovery of the base."""
    folder = tmp_path_factory.mktemp("recovered")
    compressed = make_compressed(folder, [INT3, RECOVER], intermediate_size=128)
    return compressed, make_adapter(folder / "adapter", compressed)


def layer(format, symmetric=True, group=32, sparse=False, inputs=128, size=0.05):
    generator = torch.Generator().manual_seed(0)
    dense = torch.nn.Linear(inputs, 24, bias=False).bfloat16().requires_grad_(False)
    dense.weight.data = (size * torch.randn(24, inputs, generator=generator) + 0.01).bfloat16()
    keep = torch.rand(24, inputs, generator=generator) < 0.5 if sparse else None
    grid = fit_grid(dense.weight, BITS[format], inputs if format == "int8" else group, symmetric, torch.bfloat16)
    packing = Packing(format, sparse, group, symmetric)
    return PackedLinear.pack(dense, packing, keep=keep, grid=grid)


@pytest.mark.parametrize(
    ("format", "symmetric", "group", "kind"),
    [
        ("int8", True, 0, "Q8_0"), ("int4", True, 32, "Q4_0"), ("int4", True, 64, "Q4_0"), ("int4", True, 128, "Q4_0"),
        ("int4", False, 32, "Q5_0"), ("int4", False, 128, "Q5_0"), ("int3", True, 64, "Q4_0"), ("int3", False, 64, "Q4_0"),
        ("int2", True, 32, "Q4_0"), ("int2", False, 32, "Q4_0"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("sparse", [False, True])
def test_every_grid_has_a_type_of_gguf_that_holds_it_to_the_bit(format, symmetric, group, kind, sparse):
    own = layer(format, symmetric, group, sparse)
    blocks = exact(own)
    assert blocks.type.name == kind
    zero = own.grid.zero if own.grid.zero is not None else torch.full((1, 1), -0.5 if own.grid.half_step else 0.0)
    codes = own.codes().float().view(24, own.grid.scale.shape[1], -1)
    expected = ((codes - zero.float().unsqueeze(-1)) * own.grid.scale.float().unsqueeze(-1)).flatten(1)
    if sparse:
        expected *= own.keep
    assert torch.equal(blocks.values(), expected)
    assert torch.equal(blocks.values().bfloat16(), own.dense_weight(torch.bfloat16))


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_table_is_exact_too(format):
    table = torch.nn.Embedding(40, 64).bfloat16().requires_grad_(False)
    own = PackedEmbedding.pack(table, format)
    assert torch.equal(exact(own).values().bfloat16(), own.dense_weight(torch.bfloat16))
    assert torch.equal(as_linear(own).dense_weight(torch.bfloat16), own.dense_weight(torch.bfloat16))


def test_what_no_type_holds_is_refused_and_can_be_rounded():
    dense = layer("int8").dense_weight(torch.bfloat16)
    linear = torch.nn.Linear(128, 24, bias=False).bfloat16().requires_grad_(False)
    linear.weight.data = dense
    nf4 = Nf4Linear.pack(linear)
    columns = torch.tensor([3, 70])
    grid = fit_grid(dense, 8, 128, True, torch.bfloat16)
    outliers = PackedLinear.pack(linear, Packing("int8", group=128, outliers=2), grid=grid, outliers=columns)
    for own, said in ((nf4, "nf4"), (outliers, "columns"), (layer("int8", size=1e-5), "fp16 rounds")):
        if said == "fp16 rounds":
            own.weight_scale = own.weight_scale * 2.0**-13
        with pytest.raises(NoExactType, match=said):
            exact(own)
        values = own.dense_weight(torch.float32)
        assert relative_error(rounded(values, "Q8_0"), values) < (0.01 if said != "fp16 rounds" else 2.0)
    with pytest.raises(NoExactType, match="groups of 48"):
        packed(torch.ones(4, 48, dtype=torch.int8), torch.ones(4, 1), gguf.GGMLQuantizationType.Q8_0)
    with pytest.raises(CaloraError, match="multiple of 32"):
        rounded(dense[:, :40], "Q4_0")


def permuted(weight, heads):
    """As llama.cpp's converter turns transformers' rows."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


@pytest.mark.parametrize("which", ["int8", "recovered"])
def test_base_gguf_has_the_model_to_the_bit(tmp_path, request, which):
    compressed, adapter = request.getfixturevalue(which)
    about = export(compressed, [adapter], tmp_path / "out")
    read = {
        tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
        for tensor in gguf.GGUFReader(tmp_path / "out/base.gguf").tensors
    }
    dense, _ = stored_form(compressed)  # its layers' own dense views, without the recovery
    state = {
        name: module.dense_weight(torch.bfloat16)
        for name, module in dense.named_modules()
        if isinstance(module, PackedLinear | PackedEmbedding)
    }
    for block in range(2):
        for own, theirs in (
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("mlp.down_proj", "ffn_down"),
        ):
            want = state[f"model.layers.{block}.{own}"]
            heads = {"attn_q": 4, "attn_k": 2}.get(theirs)
            want = permuted(want, heads) if heads else want
            assert torch.equal(read[f"blk.{block}.{theirs}.weight"].bfloat16(), want)
    assert torch.equal(read["token_embd.weight"].bfloat16(), state["model.embed_tokens"])
    assert torch.equal(read["output_norm.weight"], dense.model.norm.weight.float())
    assert "output.weight" not in read and about["base"]["rounded"] == {}
    expected = {"int8": {"Q8_0": 15}, "recovered": {"Q4_0": 14, "Q5_0": 1}}[which]
    assert about["base"]["types"] == expected


def factors(path):
    read = gguf.GGUFReader(path)
    return read, {t.name: torch.from_numpy(np.array(gguf.dequantize(t.data, t.tensor_type))) for t in read.tensors}


@pytest.mark.parametrize("kind", ["BF16", "F32", "F16", "Q8_0"])
def test_an_adapter_of_mixed_ranks_keeps_its_scale(tmp_path, int8, kind):
    compressed, folder = int8
    export(compressed, [folder], tmp_path / "out", adapter_type=kind)
    read, found = factors(tmp_path / "out/adapters/toy.gguf")
    assert read.fields["adapter.lora.alpha"].contents() == 0 and read.fields["adapter.type"].contents() == "lora"
    model = load(compressed, dense=True, dtype=torch.float32)
    model.load_adapter(folder, "toy")
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    for name, part, heads in (("v_proj", "attn_v", None), ("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2)):
        own = model.get_submodule(f"model.layers.1.self_attn.{name}")
        plain = getattr(own, "base_layer", own)
        with torch.no_grad():
            added = own(x) - torch.nn.functional.linear(x, plain.weight)  # LoRA by PEFT, bypass by its hook
        a, b = (found[f"blk.1.{part}.weight.lora_{side}"] for side in "ab")
        got = x @ a.T @ b.T
        want = permuted(added.T, heads).T if heads else added
        torch.testing.assert_close(
            got, want, rtol=0.02 if kind == "Q8_0" else 0.005, atol=0.05 if kind == "Q8_0" else 0.01
        )
        assert float(want.abs().mean()) > 0.3  # a wrong scale would show


def test_the_bases_recovery_is_a_lora_beside_or_inside(tmp_path, recovered):
    compressed, folder = recovered
    model, _ = stored_form(compressed)
    shared = fold(shared_lora(model))
    for name, own in linear_layers(model).items():
        a, b = (shared.lora[f"{name}.lora_{side}.weight"] for side in "AB")
        torch.testing.assert_close(b @ a, shared_of(own).weight())
    beside = export(compressed, [folder], tmp_path / "beside")
    inside = export(compressed, [folder], tmp_path / "inside", recovery="inside")
    assert beside["adapters"]["toy"]["apply"] == ["recovery.gguf", "adapters/toy.gguf"]
    assert inside["adapters"]["toy"]["apply"] == ["adapters/toy.gguf"]
    assert beside["base"]["apply"] == inside["base"]["apply"] == ["recovery.gguf"]
    alone, both = factors(tmp_path / "beside/adapters/toy.gguf")[1], factors(tmp_path / "inside/adapters/toy.gguf")[1]
    base = factors(tmp_path / "beside/recovery.gguf")[1]
    for name in base:
        rows, columns = (0, 1) if name.endswith("a") else (1, 0)
        parts = [one[name] for one in (alone, base) if name in one]
        assert torch.equal(both[name], torch.cat(parts, dim=rows)), columns
    assert len(both) == len(base) == 28


@pytest.mark.parametrize("recovery", ["beside", "inside"])
def test_plain_folders_compute_what_calora_does(tmp_path, recovered, recovery):
    compressed, folder = recovered
    about = export(compressed, [folder], tmp_path / "out", kinds=["peft"], recovery=recovery)
    assert about["base"] is None and about["architecture"] is None
    config = read_json(tmp_path / "out/peft/toy/adapter_config.json", "")
    assert config["r"] == config["lora_alpha"] == (9 if recovery == "inside" else 5)  # v_proj: 2 + 3, and 4 of the base
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    ours = load(compressed, dense=True, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out/dense", dtype=torch.float32)
    ids = torch.randint(2, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = ours(input_ids=ids).logits
        if recovery == "beside":
            torch.testing.assert_close(plain(input_ids=ids).logits, alone, rtol=0.01, atol=0.02)
        ours.load_adapter(folder, "toy")
        theirs = PeftModel.from_pretrained(plain, str(tmp_path / "out/peft/toy"))(input_ids=ids).logits
        whole = ours(input_ids=ids).logits
    assert float((whole - alone).abs().mean()) > 0.3
    torch.testing.assert_close(theirs, whole, rtol=0.02, atol=0.05)  # weights rounded to bf16


def test_one_rank_adds_zeros_alone():
    generator = torch.Generator().manual_seed(0)
    lora = {}
    for name, rank in (("a.q_proj", 2), ("a.v_proj", 5)):
        lora[f"{name}.lora_A.weight"] = torch.randn(rank, 6, generator=generator)
        lora[f"{name}.lora_B.weight"] = torch.randn(8, rank, generator=generator)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 5})
    whole = of_one_rank(Adapter(config, lora))
    assert whole.config.r == whole.config.lora_alpha == 5 and not whole.config.rank_pattern
    for name, scale in (("a.q_proj", 2.0), ("a.v_proj", 0.8)):
        a, b = (whole.lora[f"{name}.lora_{side}.weight"] for side in "AB")
        assert len(a) == 5
        torch.testing.assert_close(b @ a, scale * lora[f"{name}.lora_B.weight"] @ lora[f"{name}.lora_A.weight"])
    assert of_one_rank(Adapter(None, {})).lora == {}


def test_vocabulary_template_and_fingerprints_are_in_the_files(tmp_path, int8):
    compressed, folder = int8
    about = export(compressed, {"mine": folder}, tmp_path / "out")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "out/base.gguf").fields.items()}
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == "gpt-2"
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == 264 and tokens[1] == "</s>" and tokens[-1] == "[PAD263]"
    assert (kinds[1], kinds[5], kinds[-1]) == (3, 1, 5) and fields["tokenizer.ggml.merges"] == ["Ġ g"]
    assert fields["tokenizer.ggml.eos_token_id"] == 1 and not fields["tokenizer.ggml.add_bos_token"]
    assert "messages" in fields["tokenizer.chat_template"]
    assert fields["llama.attention.head_count_kv"] == 2 and fields["llama.rope.freq_base"] == 10000
    base, mine = (read_entries(tmp_path / "out" / name) for name in ("base.gguf", "adapters/mine.gguf"))
    for key in ("base_fingerprint", "compressed_fingerprint"):
        assert (
            base[key]
            == mine[key]
            == about[key]
            == read_json(compressed / "compression.json", "")[{"compressed_fingerprint": "fingerprint"}.get(key, key)]
        )
    assert json.loads(mine["task"]) == TASK.to_json() == about["adapters"]["mine"]["task"]
    assert about["adapters"]["mine"]["answer_ids"] == [load_tokenizer(compressed)(a).input_ids[0] for a in TASK.answers]


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


@pytest.mark.parametrize(
    ("about", "name"),
    [
        (BYTES, "gpt-2"),
        ({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]}, "smollm"),
        ({**BYTES, "add_prefix_space": True}, None),
        ({"type": "Whitespace"}, None),
        (None, None),
    ],
)
def test_how_a_text_is_split_has_a_name_or_is_refused(about, name):
    if name:
        assert pretokenizer("tokenizer.json", about) == name
    else:
        with pytest.raises(CaloraError, match="a pre_tokenizer of GPT-2"):
            pretokenizer("tokenizer.json", about)


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, int8, monkeypatch):
    compressed, folder = int8
    out = tmp_path / "out"
    for options, said in (
        ({"kinds": ["onnx"]}, "kinds: expected one of gguf, peft"),
        ({"kinds": []}, "kinds"),
        ({"adapter_type": "Q4_0"}, "adapter_type"),
        ({"recovery": "above"}, "recovery"),
        ({"requantise": "Q2_K"}, "requantise: expected one of Q8_0"),
        ({"tests": {"toy": [{"text": "x"}]}, "kinds": ["peft"]}, "tests of toy, row 1: expected a label or an answer"),
        ({"tests": {"nobody": []}, "kinds": ["peft"]}, "tests: expected names among toy"),
    ):
        with pytest.raises(CaloraError, match=said):
            export(compressed, [folder], out, **options)
    with pytest.raises(CaloraError, match="of its own, found 'toy', twice"):
        export(compressed, [folder, folder], out)
    for name in ("../x", "base"):
        with pytest.raises(CaloraError, match=f"found '{re.escape(name)}'"):
            export(compressed, {name: folder}, out)
    monkeypatch.setattr("calora.device.export.write_lora", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(compressed, [folder], out)
    assert not out.exists() and not list(tmp_path.iterdir())
    monkeypatch.undo()
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(CaloraError, match="an earlier export"):
        export(compressed, [folder], out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_files_that_are_not_as_they_were_are_noticed(tmp_path, int8):
    compressed, folder = int8
    out = tmp_path / "out"
    about = export(compressed, [folder], out)
    assert read_folder(out) == about == read_json(out / "manifest.json", "")
    assert export(compressed, [folder], out) == about  # the same bytes again
    check_pair(out / "base.gguf", out / "adapters/toy.gguf")
    content = (out / "base.gguf").read_bytes()
    (out / "base.gguf").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CaloraError, match="SHA-256"):
        read_folder(out)
    (out / "base.gguf").write_bytes(content[:5000])
    with pytest.raises(CaloraError, match=rf"{len(content)} bytes, found 5000"):
        read_folder(out, whole=False)
    with pytest.raises(CaloraError, match="a whole GGUF file"):
        check_pair(out / "base.gguf", out / "adapters/toy.gguf")
    write_json(out / "manifest.json", {**about, "files": {"../elsewhere": {}}})
    with pytest.raises(CaloraError, match="files inside the folder"):
        read_folder(out)
    write_json(out / "manifest.json", {**about, "version": 0})
    with pytest.raises(CaloraError, match="version 1, found 0"):
        read_folder(out)


def test_an_adapter_of_another_base_or_without_linear_form_is_refused(tmp_path, int8):
    compressed, _ = int8
    other = make_adapter(tmp_path / "other", compressed, compressed_fingerprint="f" * 64)
    with pytest.raises(CaloraError, match="the base that it was made for, ffff"):
        export(compressed, [other], tmp_path / "out")
    curved = make_adapter(tmp_path / "curved", compressed, activation="gelu")
    with pytest.raises(CaloraError, match="activation: identity, found gelu"):
        export(compressed, [curved], tmp_path / "out")
    model, _ = stored_form(compressed)
    write_lora(tmp_path / "x.gguf", Architecture.of(model.config), {}, {"compressed_fingerprint": "f" * 64})
    export(compressed, [], tmp_path / "base")
    with pytest.raises(CaloraError, match="its compressed base ffff"):
        check_pair(tmp_path / "base/base.gguf", tmp_path / "x.gguf")
    with pytest.raises(CaloraError, match="adapter_type"):
        adapter_tensors(fold(Adapter(None, {})), Architecture.of(model.config), "Q4_0")


@pytest.mark.parametrize(
    ("recipe", "options", "said"),
    [
        ([{"quantize": {"format": "nf4", "embeddings": "int8"}}], {}, r"nf4.*Fix: compress with quantize.*requantise Q8_0"),
        ([INT8], {"dtype": torch.float32}, "scales that fp16 rounds"),
        (
            [{"moefy": {"experts": 4, "shared": 1, "active": 0.5, "clustering": "parameters", "router": "analytic"}}],
            {"intermediate_size": 128}, "experts.*Fix: compress without `moefy`$",
        ),
    ],
)  # fmt: skip
def test_a_base_without_exact_types_is_refused_by_its_layer(tmp_path, recipe, options, said):
    compressed = make_compressed(tmp_path, recipe, **options)
    with pytest.raises(CaloraError, match=rf"model\..*{said}"):
        export(compressed, [], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    if "moefy" in recipe[0]:
        for asked in ({"requantise": "Q8_0"}, {"kinds": ["peft"]}):
            with pytest.raises(CaloraError, match="experts"):
                export(compressed, [], tmp_path / "out", **asked)
        return
    about = export(compressed, [], tmp_path / "out", requantise="Q8_0")
    changed = about["base"]["rounded"]
    assert changed and all(0 <= one["error"] < 0.01 for one in changed.values())
    card = (tmp_path / "out/README.md").read_text()
    assert f"**{len(changed)} tensors of `base.gguf` were rounded**" in card and next(iter(changed)) in card


def test_another_family_or_tokenizer_is_refused(tmp_path, int8):
    model, _ = stored_form(int8[0])
    config = model.config
    for key, value in (
        ("architectures", ["GemmaForCausalLM"]),
        ("hidden_act", "gelu"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
    ):
        before = getattr(config, key)
        setattr(config, key, value)
        with pytest.raises(CaloraError, match="export to gguf"):
            Architecture.of(config)
        setattr(config, key, before)
    path = int8[0] / "tokenizer.json"
    kept = path.read_text()
    about = json.loads(kept)
    about["model"]["byte_fallback"] = True
    path.write_text(json.dumps(about))
    with pytest.raises(CaloraError, match="a byte-level BPE tokenizer"):
        export(int8[0], [], tmp_path / "out")
    path.write_text(kept)


def test_the_command(tmp_path, int8, capsys):
    compressed, folder = map(str, int8)
    out = str(tmp_path / "out")
    assert main(["export", compressed, f"mine={folder}", "--out", out, "--kind", "gguf", "peft"]) == 0
    assert "README.md says" in capsys.readouterr().out
    assert set(read_folder(tmp_path / "out")["adapters"]) == {"mine"}
    assert main(["export", compressed, f"mine={folder}", folder, "--out", out]) == 1
    assert "expected NAME=PATH" in capsys.readouterr().err
    assert main(["export", str(tmp_path), "--out", out]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["export", compressed])
    assert calora.export is export


def test_scores_of_plain_folders_are_those_of_torch(tmp_path, int8):
    compressed, folder = int8
    tests = {"toy": toy_rows(12, 3)}
    about = export(compressed, [folder], tmp_path / "out", kinds=["peft"], tests=tests, draws=100)
    score = about["adapters"]["toy"]["scores"]["peft"]
    assert score["items"] == 12 and score["difference"]["value"] == score["changed"] == 0
    assert f"| toy | transformers and PEFT | 12 | {score['torch']:.4f} |" in (tmp_path / "out/README.md").read_text()
    wrong = [1 - round(score["torch"])] * 12
    worse = export(compressed, [folder], tmp_path / "out", kinds=["peft"], tests=tests, hits={"toy": wrong}, draws=100)
    assert worse["adapters"]["toy"]["scores"]["peft"]["torch"] == wrong[0]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """(an uncompressed base, a plain LoRA of it) in fp32; ranks and alphas are mixed."""
    folder = tmp_path_factory.mktemp("plain")
    base = make_base(folder / "base", dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2})
    generator, lora = torch.Generator().manual_seed(1), {}
    for name, layer in linear_layers(load_model(base, torch.float32)).items():
        if (part := name.rpartition(".")[2]) in ("q_proj", "v_proj"):
            rank = 2 if part == "v_proj" else 4
            lora[f"{name}.lora_A.weight"] = 0.15 * torch.randn(rank, layer.in_features, generator=generator)
            lora[f"{name}.lora_B.weight"] = 0.15 * torch.randn(layer.out_features, rank, generator=generator)
    write_adapter(folder / "toy", Adapter(config, lora), "base", plain_card(TASK, "base"), torch.float32)
    return base, folder / "toy"


def test_an_uncompressed_base_is_exported_with_plain_loras(tmp_path, plain):
    base, folder = plain
    out = tmp_path / "out"
    about = export(base, [folder], out, kinds=["gguf", "peft"], adapter_type="F32", tasks={"toy": TASK})
    assert about["base_fingerprint"] == about["compressed_fingerprint"] and about["recipe"] == []
    assert about["base"]["types"] == {"F32": 15} and about["base"]["apply"] == []
    assert about["adapters"]["toy"]["method"] == "lora" and about["adapters"]["toy"]["task"] == TASK.to_json()
    found = Catalogue.read(out)
    sizes = {name: entry["bytes"] for name, entry in about["files"].items()}
    own = found.models["toy"]
    assert not found.compressed and found.fingerprint == about["base_fingerprint"]
    assert (own.base_bytes, own.adapter_bytes) == (sizes["base.gguf"], sizes["adapters/toy.gguf"])
    model = load_model(base, torch.float32)
    read = factors(out / "base.gguf")[1]
    assert torch.equal(read["blk.1.ffn_down.weight"], model.model.layers[1].mlp.down_proj.weight)
    card = (out / "README.md").read_text()
    assert "# An uncompressed model and its adapters" in card and "| toy | toy | lora |" in card
    ids = torch.randint(2, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = PeftModel.from_pretrained(model, str(folder))(input_ids=ids).logits
        dense = AutoModelForCausalLM.from_pretrained(out / "dense", dtype=torch.float32)
        got = PeftModel.from_pretrained(dense, str(out / "peft/toy"))(input_ids=ids).logits
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_what_no_uncompressed_base_takes(tmp_path, plain, int8):
    base, folder = plain
    out = tmp_path / "out"
    for adapters, tasks, said in (
        ([folder], {}, "the task of toy, found none. Fix: give it: --task toy="),
        ({"mine": folder}, {"toy": TASK}, "the task of mine, found tasks of toy"),
        ([folder], {"toy": TASK, "other": TASK}, "tasks: expected names of plain LoRAs, found other"),
        ([int8[1]], {"adapter": TASK}, "found one that was made for a compressed base"),
    ):
        with pytest.raises(CaloraError, match=said):
            export(base, adapters, out, tasks=tasks)
    with pytest.raises(CaloraError, match="tasks: expected names of plain LoRAs, found toy"):
        export(int8[0], [int8[1]], out, tasks={"toy": TASK})
    more = shutil.copytree(folder, tmp_path / "toy")
    (more / "whole").mkdir()
    with pytest.raises(CaloraError, match=r"a plain LoRA: llama\.cpp has nothing else, found what whole/ holds"):
        export(base, [more], out, tasks={"toy": TASK})
    theirs = shutil.copytree(base, tmp_path / "theirs")
    config = read_json(theirs / "config.json", "")
    write_json(theirs / "config.json", {**config, "quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(CaloraError, match="weights that are compressed already"):
        export(theirs, [], out)
    assert not out.exists()


@llama_cpp
def test_llama_cpp_computes_what_the_uncompressed_model_does(tmp_path, plain, capsys):
    base, folder = plain
    out = tmp_path / "out"
    write_json(tmp_path / "task.json", TASK.to_json())
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in toy_rows(12, 3)))
    command = ["export", str(base), str(folder), "--out", str(out), "--adapter-type", "F32", "--threads", "1"]
    assert main([*command, "--task", f"toy={tmp_path}/task.json", "--test", f"toy={tmp_path}/test.jsonl"]) == 0
    about = read_folder(out)
    score = about["adapters"]["toy"]["scores"]["gguf"]
    assert score["items"] == 12 and score["changed"] <= 1 and score["tokens"] == {"prompts": 12, "same": 12}
    engine = LlamaEngine(out / "base.gguf", {file: out / file for file in about["adapters"]["toy"]["apply"]}, 128, 1, 1)
    ids = load_tokenizer(base)("Review: a good film, the plot was great\nSentiment:").input_ids
    plainly = load_model(base, torch.float32)
    with torch.no_grad():
        alone = plainly(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        own = (
            PeftModel.from_pretrained(plainly, str(folder))(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        )
    for want, other, on in ((own, alone, about["adapters"]["toy"]["apply"]), (alone, own, [])):
        torch.testing.assert_close(probabilities(engine, ids, on), want, rtol=1e-3, atol=2e-3)
        assert float((want - other).abs().max()) > 0.3


def test_without_xllamacpp_a_score_is_refused_before_any_work(tmp_path, int8, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "xllamacpp", None)
    with pytest.raises(CaloraError, match=r"pip install 'calora\[device\]'"):
        export(int8[0], [int8[1]], tmp_path / "out", tests={"toy": toy_rows(4, 3)})


def probabilities(engine, ids, on):
    """llama.cpp's log-probabilities of the next token, of the whole vocabulary."""
    only = {"logit_bias": [[70, 100.0]]}  # of a token that is a whole character it tells them; they are without this
    body = {"prompt": ids, "n_predict": 1, "n_probs": 264, "cache_prompt": False, "temperature": 0.0, **only}
    found = asyncio.run(engine.ask("/completion", body, on))["completion_probabilities"][0]["top_logprobs"]
    by_id = {one["id"]: one["logprob"] for one in found}
    return torch.tensor([by_id[i] for i in range(264)])


def said_by_both(tmp_path, recipe, recovery="beside", **options):
    """(what, log-probabilities of torch, of llama.cpp, and of llama.cpp with the wrong LoRAs) alone and with an adapter."""
    compressed = make_compressed(tmp_path, recipe, intermediate_size=128, **options)
    folder = make_adapter(tmp_path / "adapter", compressed, size=0.15)
    out = tmp_path / "out"
    about = export(compressed, [folder], out, recovery=recovery, adapter_type="F32")
    files = {*about["base"]["apply"], *about["adapters"]["toy"]["apply"]}
    engine = LlamaEngine(out / "base.gguf", {file: out / file for file in files}, 128, 1, 1)
    ours = load(compressed, dense=True, dtype=torch.float32)
    ours.load_adapter(folder, "toy")
    text = "Review: a good film, the plot was great, 1234 times\nSentiment:"
    ids = load_tokenizer(compressed)(text).input_ids
    assert asyncio.run(engine.tokenize(text)) == ids
    for name, entry in ((None, about["base"]), ("toy", about["adapters"]["toy"])):
        ours.set_adapter(name)
        with torch.no_grad():
            want = ours(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        wrong = probabilities(engine, ids, [] if name else list(files))
        yield name, want, probabilities(engine, ids, entry["apply"]), wrong


@llama_cpp
@pytest.mark.parametrize("family", list(FAMILIES))
def test_llama_cpp_computes_what_torch_computes(tmp_path, family):
    """All in fp32: the order of heads, frequencies, biases, and the scales of an adapter of mixed ranks."""
    prune = {"prune": {"score": "magnitude", "pattern": "2:4"}}
    for name, want, got, wrong in said_by_both(tmp_path, [prune], family=family, dtype=torch.float32):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=2e-3, msg=lambda told, name=name: f"{name}: {told}")
        assert float((wrong - want).abs().max()) > 0.3


@llama_cpp
@pytest.mark.parametrize(
    ("recipe", "recovery"),
    [([INT8], "beside"), ([INT4], "beside"), ([INT3, RECOVER], "beside"), ([INT3, RECOVER], "inside")],
)
def test_llama_cpp_says_what_torch_says(tmp_path, recipe, recovery):
    """On quantised layers it rounds the activations to 8 bits."""
    for _, want, *others in said_by_both(tmp_path, recipe, recovery):
        close, far = (float((want.exp() * (want - one)).sum()) for one in others)
        assert close < 0.02 and close < 0.1 * far, (close, far)


TASKS = {  # answers of a kind are equally long: a random model takes the shortest one else
    "letters": Task("letters", "Review: {text}", tuple("abcdefgh"), 64, 4),
    "words": Task("words", "Review: {text}", ("one", "two", "bad", "xyz"), 64, 4),
    "means": Task("means", "Review: {text}", (" no", " good", " so so"), 64, 4, likelihood="mean"),
    "parts": Task("parts", "{text}", ("é", "ü", "ß", "ø"), 64, 4),  # a token is a part of a character
    "copa": Task("copa", "{text}", (" {one}", " {two}"), 64, 4),
    "listed": Task("listed", "{text}", (" {ends}",), 12, 4),  # prompts are cut
    "essay": Task("essay", "{text}", (), 64, 6),
}


def task_rows():
    """Rows that every task of `TASKS` reads."""
    texts = [str(row["text"]) for row in toy_rows(6, 3)]
    return [
        {"text": text, "one": texts[i - 1][:7], "two": texts[i - 2][:7], "ends": [texts[i - j][-5:] for j in (3, 4, 5)]}
        for i, text in enumerate(texts)
    ]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """(compressed folder, an adapter for each of `TASKS`), all in fp32; what is written are whole characters, and often ends."""
    folder = tmp_path_factory.mktemp("tasks")
    make_tokenizer(folder)
    vocabulary = load_tokenizer(folder).get_vocab()
    loud = {index: 0.05 for token, index in vocabulary.items() if not token.isascii()} | {vocabulary[END]: 2.0}
    prune = {"prune": {"score": "magnitude", "pattern": "2:4"}}
    compressed = make_compressed(folder, [prune], dtype=torch.float32, loud=loud, ends=[vocabulary[END]])
    adapters = {
        name: make_adapter(folder / name, compressed, size=0.3, task=task.to_json()) for name, task in TASKS.items()
    }
    return compressed, adapters


def right(task, row, answer):
    """What a row needs for this answer to be right."""
    return {"label": [text.strip() for text in task.choices(row)].index(answer)} if task.scored else {"answer": answer}


@llama_cpp
def test_llama_cpp_answers_any_task_as_torch_does(tmp_path, tasks):
    """By single tokens, by the likelihood of several, of a row's own answers, and in writing."""
    compressed, adapters = tasks
    rows = task_rows()
    ours, said, tests = load(compressed, dense=True), {}, {}
    for name, folder in adapters.items():
        ours.load_adapter(folder, name)
        ours.set_adapter(name)
        said[name] = ours.answer(rows)
        tests[name] = [{**row, **right(TASKS[name], row, own)} for row, own in zip(rows, said[name], strict=True)]
        assert len({row.get("label", row.get("answer")) for row in tests[name]}) > 1, name
    hits = {name: [1] * len(rows) for name in TASKS}
    about = export(
        compressed, adapters, tmp_path / "out", adapter_type="F32", tests=tests, hits=hits, draws=50, threads=1
    )
    for name, entry in about["adapters"].items():
        score = entry["scores"]["gguf"]
        assert score["changed"] == 0 and score["tokens"] == {"prompts": 6, "same": 6}, name
    llama = Llama(tmp_path / "out", threads=1)  # several at a time
    for name in adapters:
        llama.set_adapter(name)
        assert llama.answer(rows) == said[name]
    assert any(0 < len(text) < TASKS["essay"].max_new_tokens for text in said["essay"])  # ended
    llama.close()


@llama_cpp
def test_llama_cpp_is_scored(tmp_path, int8):
    compressed, folder = int8
    tests = {"toy": toy_rows(12, 3)}
    about = export(compressed, [folder], tmp_path / "out", tests=tests, draws=100, threads=1)
    score = about["adapters"]["toy"]["scores"]["gguf"]
    assert score["items"] == 12 and score["changed"] <= 1 and score["tokens"] == {"prompts": 12, "same": 12}
