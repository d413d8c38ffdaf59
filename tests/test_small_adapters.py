"""The recovery part in 8 and 4 bits: how far it is rounded, what it weighs, and that a spoilt one is refused."""

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel

import calora
from calora.adapters.cards import plain_card
from calora.adapters.codes import GROUP, decode_recovery, encode_recovery, rounded
from calora.adapters.fold import fold
from calora.adapters.folder import META, RECOVERY, read_adapter, write_adapter
from calora.adapters.lora import attach_adapter, set_active
from calora.common.files import sha256
from calora.common.tensors import read_tensors, write_tensors
from calora.errors import CaloraError
from tests.conftest import TASK
from tests.test_adapters import base as base
from tests.test_adapters import resealed, some
from tests.test_strangers import logits

STEPS = {"int8": 254, "int4": 15}  # between the ends of the grid
SCALE = 1.06  # scales are stored in bf16: at the upper end of int4's grid, 7.5 steps away, that counts


def factors(inputs, rank, outputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.down": torch.randn(inputs, rank, generator=generator),
        "a.up": torch.randn(rank, outputs, generator=generator),
    }


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("shape", [(64, 32, 48), (5, 3, 7), (9, 1, 4), (6, 33, 11), (4, 80, 3)])
def test_each_value_is_within_half_a_step_of_its_row(kind, shape):
    made = factors(*shape)
    stored = encode_recovery(made, kind, torch.bfloat16)
    assert stored.keys() == {f"a.{factor}.{part}" for factor in ("down", "up") for part in ("codes", "scale")}
    found = decode_recovery(stored, kind, "file")
    for name, tensor in made.items():
        assert found[name].shape == tensor.shape and found[name].dtype == torch.float32
        rows, other = (tensor, found[name]) if name == "a.down" else (tensor.T, found[name].T)
        for ours, theirs in zip(rows, other, strict=True):  # an input, or an output: along the rank
            for group, again in zip(ours.split(GROUP), theirs.split(GROUP), strict=True):
                most = float((group if kind == "int4" else ours).abs().max())
                assert float((group - again).abs().max()) <= SCALE * most / STEPS[kind]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_what_an_outlier_is_takes_nothing_from_the_others(kind):
    """Rows of huge inputs and of huge outputs, as quiet or as loud as they are."""
    made = factors(64, 32, 48)
    before = rounded(made, kind, torch.bfloat16)
    made["a.down"][3] *= 2.0**10
    made["a.down"][5] *= 2.0**-10
    made["a.up"][:, 7] *= 2.0**10
    after = rounded(made, kind, torch.bfloat16)
    for row, factor in ((3, 2.0**10), (5, 2.0**-10)):
        assert torch.equal(after["a.down"][row], before["a.down"][row] * factor)
        after["a.down"][row] = before["a.down"][row]
    assert torch.equal(after["a.up"][:, 7], before["a.up"][:, 7] * 2.0**10)
    after["a.up"][:, 7] = before["a.up"][:, 7]
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_zeros_stay_zeros(kind):
    made = factors(8, 4, 6)
    made["a.up"].zero_()
    made["a.down"][2] = 0
    found = rounded(made, kind, torch.bfloat16)
    assert not found["a.up"].any() and not found["a.down"][2].any() and found["a.down"].any()


def test_what_is_not_finite_or_no_format_is_refused():
    made = factors(4, 2, 4)
    with pytest.raises(CaloraError, match="format of the bypass: expected one of bf16, int8, int4, found int2"):
        encode_recovery(made, "int2", torch.bfloat16)
    made["a.up"][0, 0] = float("nan")
    with pytest.raises(CaloraError, match=r"bypass a\.up: expected finite values"):
        encode_recovery(made, "int8", torch.bfloat16)


def written(base, folder, kind, **options):
    made = some(base, **options)
    write_adapter(folder, made, str(base), plain_card(TASK, str(base)), torch.bfloat16, None, kind)
    return made


@pytest.mark.parametrize(("kind", "codes"), [("int8", 1.0), ("int4", 0.5)])
def test_a_small_adapter_goes_to_disk_and_back(base, tmp_path, kind, codes):
    made = written(base, tmp_path / "toy", kind)
    about, stored = json.loads((tmp_path / "toy" / META).read_text()), read_tensors(tmp_path / "toy" / RECOVERY, "")
    assert about["recovery_format"] == kind and about["sha256"][RECOVERY] == sha256(tmp_path / "toy" / RECOVERY)
    wanted = 0
    for tensor in made.recovery.values():
        rank = min(tensor.shape)
        wanted += tensor.numel() * codes + 2 * tensor.numel() / rank  # a scale of two bytes a row
    assert sum(t.nbytes for t in stored.values()) == wanted
    read = read_adapter(tmp_path / "toy")
    assert read.meta == made.meta and "recovery_format" not in read.meta
    for name, tensor in rounded(made.recovery, kind, torch.bfloat16).items():
        assert torch.equal(read.recovery[name], tensor)
    model, other = calora.load(base), calora.load(base)
    model.load_adapter(tmp_path / "toy", "toy")
    attach_adapter(other, read, "toy")
    set_active(other, "toy")
    assert torch.equal(logits(model), logits(other))


def test_int8_is_nearer_to_what_was_trained_than_int4(base, tmp_path):
    outputs = {}
    for kind in ("bf16", "int8", "int4"):
        written(base, tmp_path / kind, kind)
        model = calora.load(base)
        model.load_adapter(tmp_path / kind, "toy")
        outputs[kind] = logits(model).float()
    off = {kind: float((outputs[kind] - outputs["bf16"]).norm()) for kind in ("int8", "int4")}
    assert 0 < 4 * off["int8"] < off["int4"] < 0.5 * float(outputs["bf16"].norm())


def test_a_small_linear_bypass_folds(base, tmp_path):
    written(base, tmp_path / "toy", "int8", activation="identity")
    read = read_adapter(tmp_path / "toy")
    found = []
    for adapter in (read, fold(read)):
        model = calora.load(base)
        attach_adapter(model, adapter, "toy")
        set_active(model, "toy")
        found.append(logits(model))
    torch.testing.assert_close(found[0], found[1], rtol=2e-2, atol=2e-2)


def test_an_older_folder_has_no_format(base, tmp_path):
    made = written(base, tmp_path / "toy", "bf16")
    resealed(lambda about: about.pop("recovery_format"))(tmp_path / "toy")
    read = read_adapter(tmp_path / "toy")
    assert all(torch.equal(read.recovery[name], tensor.bfloat16()) for name, tensor in made.recovery.items())


def test_plain_peft_loads_the_lora(base, tmp_path):
    written(base, tmp_path / "toy", "int4")
    with pytest.warns(UserWarning, match="calora"):
        theirs = PeftModel.from_pretrained(calora.load(base), tmp_path / "toy", autocast_adapter_dtype=False)
    ours, read = calora.load(base), read_adapter(tmp_path / "toy")
    attach_adapter(ours, replace(read, recovery={}), "toy")
    set_active(ours, "toy")
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=2e-2, atol=2e-2)  # bf16: one sum instead of two


KEY = "model.layers.0.self_attn.q_proj.down"
SPOILT = {
    "no scale": (lambda t: t.pop(f"{KEY}.scale"), "down.codes and .scale, as int8 has them"),
    "no codes": (lambda t: t.pop(f"{KEY}.codes"), "down.codes and .scale, as int8 has them"),
    "values": (lambda t: t.update({KEY: torch.ones(32, 4)}), "as int8 has them"),
    "few scales": (lambda t: t.update({f"{KEY}.scale": torch.ones(5, 1)}), r"codes \[5, rank\] of torch.int8, for 5 scales"),
    "scales of groups": (lambda t: t.update({f"{KEY}.scale": torch.ones(32, 2)}), r"scales \[n, 1\]"),
    "whole scales": (lambda t: t.update({f"{KEY}.scale": torch.ones(32, 1, dtype=torch.int32)}), r"scales \[n, 1\]"),
    "flat codes": (lambda t: t.update({f"{KEY}.codes": torch.ones(32, dtype=torch.int8)}), r"codes \[32, rank\]"),
    "codes of int4": (lambda t: t.update({f"{KEY}.codes": t[f"{KEY}.codes"].view(torch.uint8)}), "torch.uint8"),
    "a scale that is none": (lambda t: t[f"{KEY}.scale"].fill_(float("nan")), "finite scales above 0"),
    "a scale below 0": (lambda t: t[f"{KEY}.scale"].neg_(), "finite scales above 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_recovery_part_is_refused(base, tmp_path, case):
    """By somebody who knows how a folder is sealed; anybody else's edit is told by its hash."""
    change, said = SPOILT[case]
    written(base, tmp_path / "toy", "int8")
    path = tmp_path / "toy" / RECOVERY
    tensors = read_tensors(path, "")
    change(tensors)
    write_tensors(path, tensors)
    model = calora.load(base)
    with pytest.raises(CaloraError, match=r"recovery\.safetensors: expected SHA-256"):
        model.load_adapter(tmp_path / "toy", "toy")
    resealed(lambda about: about["sha256"].update({RECOVERY: sha256(path)}))(tmp_path / "toy")
    with pytest.raises(CaloraError, match=said) as caught:
        model.load_adapter(tmp_path / "toy", "toy")
    assert "\n" not in str(caught.value) and RECOVERY in str(caught.value) and not model.calora_tasks


def test_an_unknown_format_is_refused(base, tmp_path):
    written(base, tmp_path / "toy", "int8")
    resealed(lambda about: about.update(recovery_format="int3"))(tmp_path / "toy")
    with pytest.raises(CaloraError, match="a recovery_format among bf16, int8, int4"):
        calora.load(base).load_adapter(tmp_path / "toy", "toy")
