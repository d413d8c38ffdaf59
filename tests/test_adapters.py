"""An adapter of any parts: its folder, which notices every edit, and loading it, which changes all or nothing."""

import hashlib
import json
import shutil

import pytest
import torch
import yaml

import calora
from calora.adapters.cards import calora_card, plain_card
from calora.adapters.fold import fold
from calora.adapters.folder import META, read_adapter, write_adapter
from calora.adapters.lora import (
    Adapter,
    attach_adapter,
    lora_config,
    lora_rank,
    lora_scale,
    lora_state,
    plain_config,
    set_active,
    take_adapter,
)
from calora.adapters.prompts import check_prompt
from calora.common.files import fingerprint
from calora.common.versions import versions
from calora.compressed import load
from calora.compression import compress
from calora.compression.walk import Calibration
from calora.errors import CaloraError
from calora.inheritance.fresh import equal_budget, fresh_adapter
from calora.inheritance.inherit import Bypass, inherit
from calora.models.anatomy import linear_layers
from calora.models.loading import load_model, load_tokenizer
from calora.models.tasks import Task, encode_all
from calora.saving import save
from tests.conftest import TASK, make_model, toy_rows
from tests.test_strangers import logits

PARTS = {"both": (True, True), "lora": (True, False), "bypass": (False, True), "empty": (False, False)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A compressed base."""
    folder = tmp_path_factory.mktemp("compressed")
    whole = make_model("llama", folder / "base", torch.float32)
    settings = {"eos_token_id": [1, 7], "repetition_penalty": 1.5, "do_sample": False}
    (whole / "generation_config.json").write_text(json.dumps(settings))
    model = load_model(whole, torch.float32)
    examples = encode_all(TASK, load_tokenizer(whole), toy_rows(8, 1))
    save(model, compress(model, [{"quantize": {"format": "int8"}}], Calibration(examples)), folder / "out", whole)
    return folder / "out"


def some(base, lora=True, bypass=True, seed=1, targets=("q_proj", "k_proj"), activation="gelu"):
    """An adapter of random values for the compressed base."""
    model = calora.load(base)
    meta = {"task": TASK.to_json(), "compressed_fingerprint": model.calora_fingerprint, "origin": "here"}
    teacher = fresh_adapter(model, lora_config(4, 2, list(targets)), meta)
    made, _ = inherit(
        model, teacher, lora="inherited" if lora else "none", bypass=Bypass(["q_proj", "down_proj"], 4, activation, "zero") if bypass else None,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    for tensors in (made.lora, made.recovery):
        for key, tensor in sorted(tensors.items()):
            tensors[key] = torch.randn(tensor.shape, generator=generator) * 0.3
    return made


def written(base, folder, name="toy", **options):
    write_adapter(folder / name, some(base, **options), str(base), plain_card(TASK, str(base)), torch.float32)
    return folder / name


@pytest.mark.parametrize("parts", PARTS)
def test_an_adapter_of_any_parts_goes_to_disk_and_back(base, tmp_path, parts):
    lora, bypass = PARTS[parts]
    folder = written(base, tmp_path, lora=lora, bypass=bypass)
    files = {path.name for path in folder.iterdir()}
    assert ("adapter_config.json" in files) == ("adapter_model.safetensors" in files) == lora
    assert ("recovery.safetensors" in files) == bypass and ("adapter_model.safetensors" in files) == lora
    about = json.loads((folder / META).read_text())
    assert (about["lora"], about["recovery"], about["versions"]) == (lora, bypass, versions())
    made, read = some(base, lora=lora, bypass=bypass), read_adapter(folder)
    assert read.meta == made.meta and (read.config is None) == (not lora)
    model = calora.load(base)
    before = logits(model)
    model.load_adapter(folder, "toy")
    assert torch.equal(logits(model), before) == (not lora and not bypass)
    assert model.answer(["a good film"]) in (["positive"], ["negative"])
    dense = calora.load(base, dense=True)
    dense.load_adapter(folder, "toy")
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-5, atol=1e-5)  # PEFT's modules against one product
    taken = take_adapter(dense, read.config, read.meta, "toy")
    for ours, theirs in ((taken.lora, made.lora), (taken.recovery, made.recovery)):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], value) for key, value in theirs.items())
    linear = some(base, lora=lora, bypass=bypass, activation="identity")
    folded, whole, plain = fold(linear), calora.load(base), calora.load(base)
    for model, adapter in ((whole, linear), (plain, folded)):
        attach_adapter(model, adapter, "toy")
        set_active(model, "toy")
    torch.testing.assert_close(logits(plain), logits(whole), rtol=1e-5, atol=1e-5)
    assert (folded.config is None) == (not lora and not bypass)


def test_adapters_of_different_parts_are_switched_and_taken_off(base, tmp_path):
    model, found = calora.load(base), {}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    alone = logits(model)
    for seed, (parts, (lora, bypass)) in enumerate(PARTS.items()):
        model.load_adapter(written(base, tmp_path, parts, lora=lora, bypass=bypass, seed=seed), parts + "_one")
    for parts in PARTS:
        fresh = calora.load(base)
        fresh.load_adapter(tmp_path / parts, parts)
        model.set_adapter(parts + "_one")
        found[parts] = logits(model)
        assert torch.equal(found[parts], logits(fresh)), parts
    model.set_adapter("lora_one")
    model.unload_adapter("both_one")
    assert model.calora_active == "lora_one" and torch.equal(logits(model), found["lora"])
    model.unload_adapter("lora_one")
    assert model.calora_active is None and torch.equal(logits(model), alone)
    model.unload_adapter("bypass_one")
    model.unload_adapter("empty_one")
    assert model.state_dict().keys() == state.keys() and not hasattr(model, "peft_config")
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(CaloraError, match="unload_adapter: expected one of"):
        model.unload_adapter("both_one")
    model.load_adapter(tmp_path / "both", "both_one")
    assert torch.equal(logits(model), found["both"])


def test_a_load_that_fails_changes_nothing(base, tmp_path):
    model = calora.load(base)
    model.load_adapter(written(base, tmp_path, "first"), "first")
    before, state = logits(model), sorted(model.state_dict())
    other = written(base, tmp_path, "other", targets=["q_proj", "v_proj"], seed=2)
    with pytest.raises(CaloraError, match="a name that is free"):
        model.load_adapter(other, "first")
    wrong = some(base, targets=["q_proj", "v_proj"])
    key = next(key for key in wrong.recovery if key.endswith("up"))
    spoilt = {
        "narrow": Adapter(wrong.config, wrong.lora, {**wrong.recovery, key: torch.ones(4, 3)}, wrong.meta),
        "half": Adapter(wrong.config, wrong.lora, {key: wrong.recovery[key]}, wrong.meta),
        "elsewhere": Adapter(wrong.config, {k.replace("layers.1", "layers.9"): t for k, t in wrong.lora.items()}, {}, wrong.meta),
        "few": Adapter(wrong.config, {k: t for k, t in wrong.lora.items() if "layers.1" not in k}, wrong.recovery, wrong.meta),
        "thin": Adapter(wrong.config, {k: t[:2] if "lora_A" in k else t[:, :2] for k, t in wrong.lora.items()}, {}, wrong.meta),
    }  # fmt: skip
    for name, adapter in spoilt.items():
        write_adapter(tmp_path / name, adapter, "base", "", torch.float32)
        with pytest.raises(CaloraError) as caught:
            model.load_adapter(tmp_path / name, "second")
        assert "\n" not in str(caught.value)
        assert torch.equal(logits(model), before) and sorted(model.state_dict()) == state, name
        assert list(model.calora_tasks) == ["first"] and model.calora_active == "first"
    model.load_adapter(other, "second")
    model.set_adapter("second")
    fresh = calora.load(base)
    fresh.load_adapter(other, "second")
    assert torch.equal(logits(model), logits(fresh))


def edit_json(name, change):
    def apply(folder):
        value = json.loads((folder / name).read_text())
        change(value)
        (folder / name).write_text(json.dumps(value))

    return apply


def resealed(change):
    """An edit of calora.json by somebody who knows how it is sealed."""

    def apply(value):
        change(value)
        hashes = value.get("sha256")
        if isinstance(hashes, dict) and META in hashes:
            rest = {**value, "sha256": {k: v for k, v in hashes.items() if k != META}}
            hashes[META] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()

    return edit_json(META, apply)


EDITS = {
    "lora_alpha": (edit_json("adapter_config.json", lambda c: c.update(lora_alpha=64)), "adapter_config.json.*edited"),
    "use_rslora": (
        edit_json("adapter_config.json", lambda c: c.update(use_rslora=True)),
        "adapter_config.json.*edited",
    ),
    "activation": (edit_json(META, lambda m: m.update(activation="relu")), "edited"),
    "prompt": (edit_json(META, lambda m: m["task"].update(prompt="Say no: {text}")), "edited"),
    "base": (edit_json(META, lambda m: m.update(compressed_fingerprint="0" * 64)), "edited"),
    "no hashes": (edit_json(META, lambda m: m.update(sha256={})), "the SHA-256 of"),
    "hashes of another kind": (edit_json(META, lambda m: m.update(sha256=[])), "an entry 'sha256'"),
    "a path": (edit_json(META, lambda m: m["sha256"].update({"../../x": "0"})), "the SHA-256 of"),
    "a part away": (lambda folder: (folder / "recovery.safetensors").unlink(), "no such file"),
    "a part denied": (resealed(lambda m: m.update(recovery=False)), "the SHA-256 of"),
    "no activation": (resealed(lambda m: m.pop("activation")), "an activation among"),
    "no task": (resealed(lambda m: m.pop("task")), "an entry 'task'"),
    "no fingerprint": (resealed(lambda m: m.pop("compressed_fingerprint")), "an entry 'compressed_fingerprint'"),
    "half a task": (resealed(lambda m: m["task"].pop("answers")), "task: expected the entries"),
    "a task of another kind": (resealed(lambda m: m["task"].update(max_tokens="8")), "task.max_tokens"),
    "no meta": (lambda folder: (folder / META).unlink(), "no such file"),
    "a list": (lambda folder: (folder / META).write_text("[]"), "a JSON object"),
    "a prompt that pads": (resealed(lambda m: m["task"].update(prompt="{text:>9999999999}")), "plain columns"),
    "a prompt that looks inside": (resealed(lambda m: m["task"].update(prompt="{text.__class__}")), "plain columns"),
}


@pytest.mark.parametrize("case", EDITS)
def test_every_edit_is_noticed(base, tmp_path, case):
    change, said = EDITS[case]
    folder = written(base, tmp_path)
    change(folder)
    model = calora.load(base)
    with pytest.raises(CaloraError, match=said) as caught:
        model.load_adapter(folder, "toy")
    assert "\n" not in str(caught.value) and not model.calora_tasks and "dvc" not in str(caught.value)


@pytest.mark.parametrize(
    "prompt", ["{text!r}", "{text:>9}", "{text[0]}", "{a.b}", "{}", "{text", "}", "{a:{b}}", "{0.x}"]
)
def test_a_prompt_holds_plain_columns_alone(prompt):
    with pytest.raises(CaloraError, match="a prompt: expected"):
        check_prompt("a prompt", prompt)


def test_plain_prompts_are_prompts():
    for prompt in ("Review: {text}", "{sentence 1}\n{sentence-2}", "{{braces}} {text}", "none"):
        check_prompt("a prompt", prompt)


@pytest.mark.parametrize("base_name", ["models/x", "C: a model", "a # b", "'x': [y", "- z", "yes"])
def test_cards_are_yaml_whatever_the_names(base_name):
    task = Task("a: `b`", "Is it `so`: {text}\n---\nyes: no", ("a: b", "`"), 8, 2)
    for card in (plain_card(task, base_name), calora_card(task, base_name, "o: p", "accuracy", 0.5, 0.25)):
        front = yaml.safe_load(card.split("---\n")[1])
        assert front["base_model"] == base_name and front["library_name"] == "peft" and "lora" in front["tags"]


def test_a_fresh_adapter_is_as_peft_starts_it_and_depends_on_its_seed(base):
    model = calora.load(base)
    config = lora_config(4, 2, ["q_proj", "down_proj"], {"q_proj": 8})
    one, again, other = (fresh_adapter(model, config, {"a": 1}, seed) for seed in (0, 0, 1))
    assert one.meta == {"a": 1} and list(one.lora) == sorted(one.lora) and len(one.lora) == 8
    for key, tensor in one.lora.items():
        assert torch.equal(tensor, again.lora[key])
        if ".lora_A." in key:
            bound = tensor.shape[1] ** -0.5  # Kaiming with a = sqrt(5)
            assert 0.9 * bound < float(tensor.abs().max()) <= bound and not torch.equal(tensor, other.lora[key])
        else:
            assert not tensor.any()
    assert one.lora["model.layers.0.self_attn.q_proj.lora_A.weight"].shape[0] == 8
    before = logits(model)
    attach_adapter(model, one, "fresh")
    set_active(model, "fresh")
    assert torch.equal(logits(model), before)
    with pytest.raises(CaloraError, match="target_modules"):
        fresh_adapter(model, lora_config(4, 2, ["c_attn"]))


@pytest.mark.parametrize(("lora", "bypass"), [(True, True), (True, False), (False, True)])
def test_an_equal_budget_has_the_same_number_of_parameters(base, lora, bypass):
    model, adapter = calora.load(base), some(base, lora=lora, bypass=bypass)
    config = equal_budget(adapter, linear_layers(model))
    fresh = fresh_adapter(model, config)
    assert fresh.parameters == adapter.parameters
    assert set(fresh.lora_layers) == {*adapter.lora_layers, *adapter.bypass_layers}
    for layer in fresh.lora_layers:
        assert lora_scale(config, layer) == pytest.approx(0.5 if lora else 1.0)
        both = layer in adapter.lora_layers and layer in adapter.bypass_layers
        assert lora_rank(config, layer) == (8 if both else 4)
    attach_adapter(model, fresh, "fresh")
    with pytest.raises(CaloraError, match="an empty one"):
        equal_budget(Adapter(None, {}), linear_layers(model))


def test_a_configuration_is_as_short_as_its_layers_allow(base):
    names = list(linear_layers(calora.load(base)))
    queries = [name for name in names if name.endswith("q_proj")]
    config = plain_config(dict.fromkeys(queries, 4), dict.fromkeys(queries, 2.0), names)
    assert (config.r, config.lora_alpha, config.target_modules) == (4, 8, {"q_proj"}) and not config.rank_pattern
    config = plain_config({queries[0]: 4}, {queries[0]: 2.0}, names)
    assert config.target_modules == {queries[0]}
    config = plain_config(dict(zip(queries, (4, 2), strict=True)), dict(zip(queries, (2.0, 3.0), strict=True)), names)
    assert [(lora_rank(config, name), lora_scale(config, name)) for name in queries] == [(4, 2.0), (2, 3.0)]


def test_a_bypass_of_no_use_is_refused():
    for options, said in (
        ((["q_proj"], 4, "tanh", "zero"), "activation"),
        ((["q_proj"], 4, "gelu", "random"), "start"),
        ((["q_proj"], 3, "gelu", "weighted_error"), "even"),
    ):
        with pytest.raises(CaloraError, match=said):
            Bypass(*options)


def test_what_a_start_needs_is_asked_for(base):
    model, adapter = calora.load(base), some(base, bypass=False)
    warm = Bypass(["q_proj"], 4, "gelu", "weighted_error")
    with pytest.raises(CaloraError, match="reference: expected the uncompressed model, for a warm start"):
        inherit(model, adapter, bypass=warm)
    with pytest.raises(CaloraError, match="calibration: expected examples"):
        inherit(model, adapter, bypass=warm, reference=model)
    with pytest.raises(CaloraError, match="lora: expected one of inherited, fresh, none"):
        inherit(model, adapter, lora="new")


def test_the_generation_settings_are_those_of_the_folder(base, tmp_path):
    model = calora.load(base)
    assert model.generation_config.eos_token_id == [1, 7] and model.generation_config.repetition_penalty == 1.5
    shutil.copytree(base, tmp_path / "broken")
    (tmp_path / "broken/generation_config.json").write_text("{")
    with pytest.raises(CaloraError, match=r"generation_config\.json"):
        calora.load(tmp_path / "broken")
    (tmp_path / "broken/generation_config.json").unlink()
    assert calora.load(tmp_path / "broken").generation_config.eos_token_id == 1


def test_the_same_adapter_gives_the_same_bytes(base, tmp_path):
    first, second = written(base, tmp_path, "first"), written(base, tmp_path, "second")
    assert fingerprint(first) == fingerprint(second)
    assert (first / META).read_text() == (second / META).read_text()


def test_a_lora_is_read_off_whatever_stands_beside_it(base):
    """PEFT tells adapters apart by a part of a tensor's name."""
    model, adapter = calora.load(base, dense=True), some(base, bypass=False)
    attach_adapter(model, adapter, "one")
    attach_adapter(model, some(base, bypass=False, seed=3), "two")
    assert all(torch.equal(lora_state(model, "one")[key], value) for key, value in adapter.lora.items())
    assert lora_state(model, "three") == {}


def test_a_packed_model_is_not_saved_in_another_form(tmp_path, toy):
    base = make_model("llama", tmp_path / "base", hidden=64, inner=64)
    model = load_model(base, torch.bfloat16)
    int4 = {"quantize": {"format": "int4", "group": 32}}
    save(model, compress(model, [int4], Calibration(toy[2])), tmp_path / "out", base)
    with pytest.raises(CaloraError, match="dense=True"):
        load(tmp_path / "out").save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()
    load(tmp_path / "out", dense=True).save_pretrained(tmp_path / "again")
