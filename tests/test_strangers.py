"""An adapter that somebody else made: as plain PEFT computes it in eval mode, or refused by name before any work."""

import json
import re
import shutil
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

import calora
from calora.adapters.features import FEATURES
from calora.adapters.fold import fold
from calora.adapters.folder import read_plain_lora, write_adapter
from calora.adapters.foreign import import_lora
from calora.adapters.lora import Adapter, attach_adapter, detach_adapter, lora_scale, set_active
from calora.compression import compress
from calora.compression.walk import Calibration
from calora.errors import CaloraError
from calora.inheritance.inherit import carry_lora, inherit
from calora.models.anatomy import linear_layers
from calora.models.families import family_of
from calora.models.loading import load_model, load_tokenizer
from calora.models.tasks import Example, encode_all
from calora.saving import save
from tests.conftest import TASK, make_model, toy_rows

EXAMPLES = [Example([3, 5, 9]), Example([4, 12, 7, 6])]
CHOSEN = torch.tensor([3, 9])
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
STEPS = {
    "int8": [{"quantize": {"format": "int8"}}],
    "2:4": [{"prune": {"score": "magnitude", "pattern": "2:4"}}],
}
CARRIED = {
    "plain": {},
    "dropout": {"lora_dropout": 0.5},
    "rank-stabilised": {"use_rslora": True},
    "all-linear": {"target_modules": "all-linear"},
    "a regular expression": {"target_modules": r".*\.(q_proj|down_proj)"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["k_proj", "model.layers.0.mlp.up_proj"]},
    "some layers": {"layers_to_transform": [1]},
    "patterns of plain names": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 32}},
    "patterns that are regular expressions": {
        "rank_pattern": {r"layers\.1\..*_proj": 2}, "alpha_pattern": {r"model\.layers\.[1-9]\..*q_proj": 32},
    },
    "rank-stabilised by pattern": {"use_rslora": True, "rank_pattern": {r".*layers\.0.*q_proj": 3}},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "no start": {"init_lora_weights": False},
    "biases where the base has none": {"bias": "all"},
    "of another layout, which a linear layer has not": {"fan_in_fan_out": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "pissa by pattern": {"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {r"layers\.1.*": 3}},
}  # fmt: skip


def make_stranger(base, folder, extra=(), dtype=None, **options):
    """A PEFT folder: the configuration, and random values for all that PEFT would train."""
    torch.manual_seed(0)
    made = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **options}
    model = get_peft_model(load_model(base, torch.float32), LoraConfig(**made))
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    if dtype:
        save_file({key: value.to(dtype) for key, value in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    if extra:
        edit(folder, **dict(extra))
    return folder


def edit(folder, **entries):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **entries}))


def rename(folder, change):
    save_file({change(key): value for key, value in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)


def logits(model, chosen=None):
    with torch.no_grad():
        batch = family_of(model).collate(EXAMPLES, model)
        return family_of(model).forward(model, batch, chosen).logits


def in_peft(model, folder):
    """(logits of the whole vocabulary, of the chosen tokens) in plain PEFT's eval mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(model, folder).eval()
    whole = []
    for example in EXAMPLES:  # one by one: nothing is padded
        with torch.no_grad():
            whole.append(theirs(input_ids=torch.tensor([example.prompt_ids])).logits[0, -1])
    return torch.stack(whole), torch.stack(whole)[:, CHOSEN]


def close(found, expected, limit=1e-6):
    assert float((found - expected).abs().max()) <= limit


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = make_model("llama", tmp_path_factory.mktemp("base") / "base", torch.float32)
    model = load_model(folder, torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(3)  # at 0.02 hardly anything of an adapter would show
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def packed(base, tmp_path_factory):
    """Name of the recipe -> folder of the compressed base."""
    examples = encode_all(TASK, load_tokenizer(base), toy_rows(8, 1))
    made = {}
    for name, steps in STEPS.items():
        model = load_model(base, torch.float32)
        made[name] = tmp_path_factory.mktemp("packed") / "out"
        save(model, compress(model, steps, Calibration(examples)), made[name], base)
    return made


@pytest.mark.parametrize("case", CARRIED)
def test_it_is_as_in_peft_on_every_path(base, packed, tmp_path, case):
    stranger = make_stranger(base, tmp_path / "stranger", **CARRIED[case])
    model = load_model(base, torch.float32)
    adapter = import_lora(stranger, model)
    attach_adapter(model, adapter, "own")
    set_active(model, "own")
    whole, chosen = in_peft(load_model(base, torch.float32), stranger)
    assert float((whole - logits(load_model(base, torch.float32))).abs().max()) > 0.01
    close(logits(model), whole)
    close(logits(model, CHOSEN), chosen)
    assert torch.equal(logits(model), logits(model)) and not any(module.training for module in model.modules())
    plain = tmp_path / "plain"  # for PEFT on the compressed base: a start that changes the base would change this one
    write_adapter(plain, adapter, str(base), "", torch.float32)
    for folder in packed.values():
        compressed = calora.load(folder)
        inherited, _ = inherit(compressed, adapter)
        attach_adapter(compressed, inherited, "own")
        set_active(compressed, "own")
        whole, chosen = in_peft(
            calora.load(folder, dense=True), plain if "pissa" in case or "olora" in case else stranger
        )
        close(logits(compressed), whole, 1e-5)  # other kernels add up in another order
        close(logits(compressed, CHOSEN), chosen, 1e-5)


@pytest.mark.parametrize("case", ["patterns that are regular expressions", "rank-stabilised by pattern", "all-linear"])
def test_a_cut_layer_and_a_fold_keep_peft_s_own_scale(base, tmp_path, case):
    stranger = make_stranger(base, tmp_path / "stranger", **CARRIED[case])
    adapter = import_lora(stranger, load_model(base, torch.float32))
    theirs = PeftModel.from_pretrained(load_model(base, torch.float32), stranger)
    deltas = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in theirs.named_modules()
        if isinstance(module, LoraLayer)
    }

    def delta(made, layer):
        a, b = (made.lora[f"{layer}.lora_{side}.weight"] for side in "AB")
        return lora_scale(made.config, layer) * b @ a

    folded = fold(adapter)
    for layer, expected in deltas.items():
        torch.testing.assert_close(delta(folded, layer), expected)
    model = load_model(base, torch.float32)
    examples = encode_all(TASK, load_tokenizer(base), toy_rows(8, 1))
    step = {"shrink": {"importance": "activation", "compensate": False, "layers": 0.5}}
    report = compress(model, [step], Calibration(examples))
    origin = calora.adapters.origin.Origin(report.kept, report.layers_kept)
    cut, told = carry_lora(model, adapter, origin)
    assert told.dropped and told.mapped
    for layer in told.mapped:
        torch.testing.assert_close(delta(cut, layer), deltas[origin.source(layer)])


def test_eva_starts_from_the_base_as_it_is(base, tmp_path):
    stranger = make_stranger(base, tmp_path / "s", extra={"init_lora_weights": "eva", "eva_config": {"rho": 2.0}})
    adapter = import_lora(stranger, load_model(base, torch.float32))
    assert adapter.lora.keys() and adapter.config.init_lora_weights is True


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_floating_point_is_read(base, tmp_path, dtype):
    stranger = make_stranger(base, tmp_path / "s", dtype=dtype)
    model = load_model(base, torch.float32)
    attach_adapter(model, import_lora(stranger, model), "own")
    set_active(model, "own")
    close(logits(model), in_peft(load_model(base, torch.float32), stranger)[0])


PREFIXED = {
    "PEFT's prefix absent": lambda key: key.removeprefix("base_model.model."),
    "the model's own prefix twice": lambda key: key.replace("base_model.model.", "base_model.model.model.", 1),
    "the model's own prefix absent": lambda key: key.replace("base_model.model.model.", "base_model.model.", 1),
    "the adapter's name": lambda key: key.replace(".weight", ".default.weight"),
    "torch.compile": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod.", 1),
    "torch.compile inside": lambda key: key.replace(".self_attn.", "._orig_mod.self_attn."),
    "DeepSpeed": lambda key: f"module.{key}",
    "DeepSpeed inside": lambda key: key.replace("base_model.model.", "base_model.model.module.", 1),
}


@pytest.mark.parametrize("case", PREFIXED)
def test_other_prefixes_are_read(base, tmp_path, case):
    stranger, model = make_stranger(base, tmp_path / "s"), load_model(base, torch.float32)
    plain = import_lora(stranger, model)
    rename(stranger, PREFIXED[case])
    found = import_lora(stranger, model)
    assert found.lora.keys() == plain.lora.keys()
    assert all(torch.equal(found.lora[key], tensor) for key, tensor in plain.lora.items())


def test_names_that_fit_two_layers_are_refused(tmp_path):
    base = make_model("t5", tmp_path / "t5", torch.float32)
    stranger = make_stranger(base, tmp_path / "s", target_modules=["q", "v"])
    model = load_model(base, torch.float32)
    adapter = import_lora(stranger, model)
    attach_adapter(model, adapter, "own")
    rename(stranger, lambda key: re.sub(r"(en|de)coder\.", "", key) if "layer.0" in key and "encoder" in key else key)
    with pytest.raises(CaloraError, match=r"fits encoder.* and decoder"):
        import_lora(stranger, model)


REFUSED = {
    "pissa_niter_4": ({}, {"init_lora_weights": "pissa_niter_4"}, "PiSSA.*path_initial_model_for_weight_conversion"),
    "corda": ({}, {"init_lora_weights": "corda"}, "CorDA.*path_initial_model"),
    "lora_ga": ({}, {"init_lora_weights": "lora_ga"}, "LoRA-GA.*path_initial_model"),
    "loftq": ({}, {"init_lora_weights": "loftq"}, "LoftQ"),
    "an unknown start": ({}, {"init_lora_weights": "better"}, "the start 'better'"),
    "dora": ({"use_dora": True}, {}, "DoRA.*save_as_lora"),
    "dora in the tensors alone": ({"use_dora": True}, {"use_dora": False}, "DoRA"),
    "lora_bias": ({"lora_bias": True}, {}, "bias of the LoRA's own"),
    "modules_to_save of the head": ({"modules_to_save": ["lm_head"]}, {}, "trained whole.*lm_head"),
    "modules_to_save of the embeddings": ({"modules_to_save": ["embed_tokens"]}, {}, "trained whole.*embed_tokens"),
    "modules_to_save of the norms": ({"modules_to_save": ["norm"]}, {}, "trained whole.*norm"),
    "modules_to_save in the tensors alone": ({"modules_to_save": ["norm"]}, {"modules_to_save": None}, "trained whole"),
    "trained tokens": ({"trainable_token_indices": [1, 2]}, {}, "trained tokens"),
    "the head": ({"target_modules": ["q_proj", "lm_head"]}, {}, "LoRA on the output head"),
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, {}, "LoRA on embeddings"),
    "replication": ({}, {"layer_replication": [[0, 2], [1, 2]]}, "replicated layers"),
    "megatron": ({}, {"megatron_config": {"a": 1}}, "Megatron"),
    "alora": ({"alora_invocation_tokens": [3, 5]}, {}, "aLoRA"),
    "parts beside the LoRA": (
        {},
        {"calora": "the rest of it is in scales.safetensors"},
        "parts for its own base.*load_adapter",
    ),
    "another method": ({}, {"peft_type": "LOHA"}, "peft_type LORA, found LOHA"),
    "targets that are not there": ({}, {"target_modules": ["c_attn"]}, r"target_modules among .*q_proj.*c_attn"),
    "targets without tensors": ({}, {"target_modules": ["q_proj", "k_proj", "down_proj"]}, "k_proj.*no tensors"),
    "tensors without targets": ({}, {"target_modules": ["q_proj"]}, "down_proj.*does not name"),
    "a rank that is not the tensors'": ({}, {"r": 8}, r"lora_A \(8, \d+\).*found lora_A \(4, "),
    "no rank": ({}, {"r": 0}, "a number for 'r'"),
    "a rank of text": ({}, {"r": "4"}, "a number for 'r'"),
    "half a rank": ({}, {"rank_pattern": {"q_proj": 2.5}}, "a number for 'q_proj'"),
    "no alpha": ({}, {"lora_alpha": float("nan")}, "a number for 'lora_alpha'"),
    "a pattern that is a list": ({}, {"rank_pattern": [1]}, "numbers by name"),
    "a broken pattern": ({}, {"alpha_pattern": {"(q": 2}}, "a regular expression in 'alpha_pattern'"),
    "layers of a pattern": ({}, {"target_modules": ".*q_proj", "layers_to_transform": [0]}, "that PEFT can read"),
    "a broken expression": ({}, {"target_modules": "(q_proj"}, "that PEFT can read"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_carried_is_refused_by_name(base, tmp_path, case):
    options, entries, said = REFUSED[case]
    stranger = make_stranger(base, tmp_path / "s", extra=entries, **options)
    model = load_model(base, torch.float32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CaloraError, match=said) as caught:
        import_lora(stranger, model)
    assert "\n" not in str(caught.value) and "Fix: " in str(caught.value)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_start_that_changes_the_base_is_not_read_without_the_base(base, tmp_path):
    stranger = make_stranger(base, tmp_path / "s", init_lora_weights="pissa")
    with pytest.raises(CaloraError, match=r"PiSSA.*path_initial_model_for_weight_conversion"):
        read_plain_lora(stranger)


def test_every_feature_is_one_of_peft_s():
    assert set(FEATURES) <= set(LoraConfig.__dataclass_fields__)


def test_biases_of_the_base_are_refused(tmp_path):
    base = make_model("bert", tmp_path / "bert", torch.float32)
    stranger = make_stranger(base, tmp_path / "s", target_modules=["query"], bias="lora_only")
    with pytest.raises(CaloraError, match="biases of the base"):
        import_lora(stranger, load_model(base, torch.float32))


def test_a_larger_vocabulary_is_one_line(base, tmp_path):
    wider, more = tmp_path / "wider", load_model(base, torch.float32)
    shutil.copytree(base, wider)
    size = more.config.vocab_size
    more.resize_token_embeddings(size + 2)
    more.save_pretrained(wider)
    stranger = make_stranger(wider, tmp_path / "s")
    tensors = load_file(stranger / WEIGHTS)
    table = more.get_input_embeddings().weight.detach().clone()
    save_file({**tensors, "base_model.model.model.embed_tokens.weight": table}, stranger / WEIGHTS)
    with pytest.raises(CaloraError, match=f"expected {size} tokens.*found {size + 2} tokens.*resize_token_embeddings"):
        import_lora(stranger, load_model(base, torch.float32))
    whole = make_stranger(wider, tmp_path / "whole", modules_to_save=["embed_tokens", "lm_head"])
    head = make_stranger(wider, tmp_path / "head", target_modules=["q_proj", "lm_head"])
    for folder in (whole, head):  # the sizes come first: the others cannot be mended before
        with pytest.raises(CaloraError, match=f"expected {size} tokens.*found {size + 2} tokens"):
            import_lora(folder, load_model(base, torch.float32))
    own = load_model(base, torch.float32).get_input_embeddings().weight.detach().clone()
    save_file({**tensors, "base_model.model.model.embed_tokens.weight": own}, stranger / WEIGHTS)
    assert import_lora(stranger, load_model(base, torch.float32)).lora  # a copy of the base's own changes nothing


def broken(change):
    def apply(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors, sorted(tensors)[0])
        save_file(tensors, folder / WEIGHTS)

    return apply


TENSORS = {
    "one missing": (broken(lambda t, key: t.pop(key)), "both lora_A and lora_B"),
    "of another width": (broken(lambda t, key: t.update({key: torch.ones(4, 5)})), r"lora_A \(4, 48\).*\(4, 5\)"),
    "flat": (broken(lambda t, key: t.update({key: torch.ones(4)})), r"lora_A \(4, 48\).*\(4,\)"),
    "not finite": (broken(lambda t, key: t[key].fill_(float("nan"))), "finite"),
    "whole numbers": (broken(lambda t, key: t.update({key: t[key].int()})), "floating point"),
    "unexpected": (broken(lambda t, key: t.update({"base_model.model.other.weight": torch.ones(2)})), "other.weight"),
    "of another layer": (
        broken(lambda t, key: t.update({key.replace("layers.0", "layers.7"): t.pop(key)})), r"layers\.7.*fits none",
    ),
    "twice": (broken(lambda t, key: t.update({f"module.{key}": t[key].clone()})), "a second one"),
    "of two adapters": (
        broken(lambda t, key: t.update({key.replace(".weight", ".a.weight"): t.pop(key)})), "one adapter",
    ),
    "none": (broken(lambda t, key: t.clear()), "at least one layer"),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_wrong_tensors_are_one_line(base, tmp_path, case):
    change, said = TENSORS[case]
    stranger = make_stranger(base, tmp_path / "s")
    change(stranger)
    with pytest.raises(CaloraError, match=said) as caught:
        import_lora(stranger, load_model(base, torch.float32))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("start", ["pissa", "olora", "orthogonal"])
def test_attaching_never_starts_anything(base, start):
    """Whatever an adapter's configuration says, the base's weights are those from before."""
    model = load_model(base, torch.float32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    layer = linear_layers(model)["model.layers.0.self_attn.q_proj"]
    config = LoraConfig(
        r=4, target_modules=["model.layers.0.self_attn.q_proj"], init_lora_weights=start, lora_dropout=0.5
    )
    lora = {
        "model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, layer.in_features),
        "model.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(layer.out_features, 4),
    }
    attach_adapter(model, Adapter(config, lora), "own")
    now = {key.replace(".base_layer", ""): value for key, value in model.state_dict().items()}
    assert all(torch.equal(now[key], value) for key, value in before.items())
    detach_adapter(model, "own")
    assert model.state_dict().keys() == before.keys() and not hasattr(model, "peft_config")
    assert not any(isinstance(module, LoraLayer) for module in model.modules())
    assert config.lora_dropout == 0.5  # the caller's own is not edited


@pytest.mark.parametrize("name", ["", "a.b", "keys", "mlp", "weight", "0"])
def test_names_that_peft_would_mix_up_are_refused(base, name):
    model = load_model(base, torch.float32)
    with pytest.raises(CaloraError, match="adapter name"):
        attach_adapter(model, Adapter(None, {}), name)
