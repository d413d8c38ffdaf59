"""Methods are entries of params.yaml: what one takes from another, and what a new one needs (no code)."""

import json
import os

import pytest
import torch
import yaml

import calora
from calora.adapters.folder import read_adapter
from calora.common.files import bytes_on_disk
from calora.compressed import load
from calora.distillation.loss import Weights, loss_of
from calora.errors import CaloraError
from calora.inheritance import inherit as inheriting
from calora.inheritance import ranks
from calora.models.families import Batch, Output
from pipeline.local import SMOKE
from stages.common import compressed
from stages.config import load_params
from stages.inherit import Starts, read_start
from stages.looks import LOOKS, key_of, look_of
from stages.resolve import merged, resolve
from stages.splits import read_split
from tests.conftest import ROOT, change, make_project
from tests.test_stages import run_all

NEW = {  # each an entry, and nothing else
    "lora_vo": {"like": "clm", "start": {"lora": {"targets": ["v_proj", "o_proj"], "rank": 8, "lora_alpha": 8}}, "loss": "labels"},
    "no_labels": {"like": "calora", "loss": {"task": 0.0, "unlabelled_every": 1}},
    "bypass_alone": {"like": "calora", "start": {"lora": "none"}},
    "scales_beside": {"like": "calora_scales", "start": {"lora": "inherited"}, "loss": "labels"},
    "fresh_of_bypass": {"like": "clm", "start": {"lora": "fresh", "budget": "bypass_alone"}, "loss": "labels"},
    "in_bytes": {"like": "calora", "start": {"bypass": {"rank": None, "budget": 0.006, "format": "int8"}}},
    "fresh_of_bytes": {"like": "clm", "start": {"lora": "fresh", "budget": "in_bytes"}, "loss": "labels"},
}  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    before = os.getcwd()
    folder = make_project(tmp_path_factory.mktemp("methods"))
    params = yaml.safe_load((folder / "params.yaml").read_text())
    change(folder, "methods", params["methods"] | NEW)
    change(folder, "compare", ["clm_lora", *NEW, "calora_scales", "calora"])
    run_all(folder)
    yield folder
    os.chdir(before)


def adapter(project, method):
    return read_adapter(project / "models" / method / "toy/q8_up")


def test_a_new_baseline_is_an_entry_of_params(project):
    made = adapter(project, "lora_vo")
    assert {key.split(".lora_")[0].rsplit(".", 1)[-1] for key in made.lora} == {"v_proj", "o_proj"}
    assert {t.shape[0] for key, t in made.lora.items() if ".lora_A." in key} == {8} and not made.recovery
    metrics = json.loads((project / "results/toy/q8_up/metrics.json").read_text())
    assert metrics["methods"]["clm_lora_vo"]["trainable_parameters"] == made.parameters
    assert "CLM + lora vo" in (project / "results/table.md").read_text()
    assert (project / "results/toy/q8_up/curves/lora_vo/train/loss.tsv").exists()


def test_equal_budgets_are_equal_layer_by_layer(project):
    for fresh, other in (("clm_lora", "calora"), ("fresh_of_bypass", "bypass_alone"), ("fresh_of_bytes", "in_bytes")):
        ours, theirs = adapter(project, fresh), adapter(project, other)
        assert ours.parameters == theirs.parameters and not ours.recovery
        sizes = {}
        for part in (theirs.lora, theirs.recovery):
            for key, tensor in part.items():
                layer = key.split(".lora_")[0] if ".lora_" in key else key.rsplit(".", 1)[0]
                sizes[layer] = sizes.get(layer, 0) + tensor.numel()
        for layer, size in sizes.items():
            assert sum(t.numel() for key, t in ours.lora.items() if key.startswith(f"{layer}.lora_")) == size


def test_a_bypass_may_have_a_budget_of_bytes(project):
    made = adapter(project, "in_bytes")
    ranks = {key: tensor.shape[1] for key, tensor in made.recovery.items() if key.endswith(".down")}
    assert 0 < len(ranks) < 14 and len(set(ranks.values())) > 1
    assert 5000 < (project / "models/in_bytes/toy/q8_up/recovery.safetensors").stat().st_size <= 6000
    assert len(json.loads((project / "models/inherited/toy/q8_up/in_bytes/inherit.json").read_text())["errors"]) == 14


def starts_of(project):
    return Starts(load(compressed("q8_up")), "toy", 0, read_split("toy", "train"))


def test_the_shape_of_a_budget_takes_no_more_than_the_spectra(project, monkeypatch):
    """The layers' inputs are looked at once, and no map is made."""
    seen = []
    own = ranks.moments_of
    monkeypatch.setattr(ranks, "moments_of", lambda *a: seen.append(a[4]) or own(*a))
    for name in ("moments_of", "_warm_start"):
        monkeypatch.setattr(inheriting, name, lambda *a: pytest.fail("made in full"))
    monkeypatch.chdir(project)
    made, _ = starts_of(project).of(read_start("fresh_of_bytes")[0])
    assert seen == ["spectra"] and made.parameters == adapter(project, "in_bytes").parameters


def test_starts_have_their_look_in_common_and_are_what_each_is_alone(project, monkeypatch):
    """One pass with the teacher's LoRA and one without; the same start is made once."""
    looks, maps = [], []
    look, share = inheriting.input_second_moments, ranks.share_out
    monkeypatch.setattr(
        inheriting, "input_second_moments", lambda m, e, layers: looks.append(len(layers)) or look(m, e, layers)
    )
    monkeypatch.setattr(ranks, "share_out", lambda *a: maps.append(a) or share(*a))
    monkeypatch.chdir(project)
    together = starts_of(project)
    names = ["bypass_alone", "calora", "fresh_of_bytes", "in_bytes", "no_labels"]
    made = {name: together.of(read_start(name)[0]) for name in names}
    assert [count for count in looks if count] == [14, 14] and len(maps) == 1
    assert made["calora"][0] is made["no_labels"][0]
    for name in names:
        one, report = starts_of(project).of(read_start(name)[0])
        assert one.lora.keys() == made[name][0].lora.keys() and one.recovery.keys() == made[name][0].recovery.keys()
        assert all(torch.equal(tensor, made[name][0].lora[key]) for key, tensor in one.lora.items())
        assert all(torch.equal(tensor, made[name][0].recovery[key]) for key, tensor in one.recovery.items())
        assert json.dumps(report.to_json()) == json.dumps(made[name][1].to_json())


def test_an_adapter_may_be_a_bypass_alone(project):
    made = adapter(project, "bypass_alone")
    assert made.recovery and not made.lora and made.config is None
    assert not (project / "models/bypass_alone/toy/q8_up/adapter_config.json").exists()


def test_scales_are_an_entry_alone_and_beside_a_lora(project):
    alone, beside = adapter(project, "calora_scales"), adapter(project, "scales_beside")
    assert not alone.lora and not alone.recovery and beside.lora and beside.scales.keys() == alone.scales.keys()
    history = json.loads((project / "models/calora_scales/toy/q8_up/history.json").read_text())
    assert len(history["losses"]) == 6 and {"task", "kl"} <= history["losses"][0].keys()
    start = read_adapter(project / "models/inherited/toy/q8_up/calora_scales")
    assert start.scales.keys() == alone.scales.keys() and not any(tensor.any() for tensor in start.scales.values())
    folder = project / "models/calora_scales/toy/q8_up"
    assert "plain PEFT" not in (folder / "README.md").read_text()
    metrics = json.loads((project / "results/toy/q8_up/metrics.json").read_text())["methods"]
    assert metrics["clm_calora_scales"]["trainable_parameters"] == alone.parameters
    base, own = (bytes_on_disk(project / "models" / part) for part in ("compressed/q8_up", "calora_scales/toy/q8_up"))
    assert metrics["clm_calora_scales"]["bytes_on_disk"] == base + own
    assert "CLM + scales (PEQA)" in (project / "results/table.md").read_text()
    packed = calora.load(project / "models/compressed/q8_up")
    packed.load_adapter(folder, "toy")
    assert packed.answer(["a good film"])[0] in ("positive", "negative")


def test_without_labels_every_step_is_unlabelled(project):
    history = json.loads((project / "models/no_labels/toy/q8_up/history.json").read_text())
    assert history["losses"] and all("task" not in row and "kl" in row for row in history["losses"])


def test_a_start_is_the_same_whatever_is_learnt_from_it(project):
    a, b = (read_adapter(project / "models/inherited/toy/q8_up" / method) for method in ("calora", "no_labels"))
    assert all(torch.equal(tensor, b.recovery[key]) for key, tensor in a.recovery.items())
    assert all(torch.equal(tensor, b.lora[key]) for key, tensor in a.lora.items())


def test_the_small_run_changes_keys_that_there_are(tmp_path):
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(merged(params, SMOKE)))
    small = load_params(tmp_path / "params.yaml")
    assert resolve(small.methods)["clm_lora"]["start"]["calibration_texts"] == 32 and small.train.steps == 6


def test_what_like_and_budget_name_is_filled_in():
    methods = resolve(load_params(ROOT / "params.yaml").methods)
    whole, paper = methods["calora"], methods["paper"]
    assert paper["start"]["bypass"] == {**methods["wide"]["start"]["bypass"], "start": "zero"}
    assert paper["loss"] == {**whole["loss"], "kl": 0.0, "unlabelled_every": 0}
    assert methods["clm_lora"]["start"]["budget"] == whole["start"]
    assert methods["clm"] == {
        "start": {**whole["start"], "lora": "none", "bypass": None},
        "loss": None,
        "texts": "task",
    }
    assert methods["calora_written"] == {**methods["calora_unlabelled"], "texts": "written"}


def test_every_method_has_a_look_and_a_name_in_results():
    assert [key_of(name) for name in ("clm", "clm_lora", "calora")] == ["clm", "clm_lora", "clm_calora"]
    assert key_of("clmx") == "clm_clmx"
    assert look_of("clm_calora") is LOOKS["clm_calora"] and look_of("clm_new_one").label == "CLM + new one"


def test_the_loss_is_the_weighted_sum_of_its_parts():
    torch.manual_seed(0)
    hidden, mask = torch.randn(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    output, labels = Output({"decoder": hidden}, torch.randn(2, 7)), torch.tensor([1, 5])
    batch = Batch({}, (torch.arange(2), torch.tensor([2, 2])), labels, {"decoder": mask})
    from calora.distillation.targets import Target

    target = Target({"decoder": torch.randn(6, 4)}, torch.tensor([[0, 1], [2, 3]]), torch.randn(2, 2))
    weights = Weights(0.5, {"decoder": 0.1}, 2.0, 3.0, 4.0, 2)
    found = loss_of(output, batch, target, weights, labelled=True)
    task = torch.nn.functional.cross_entropy(output.logits, labels)
    distance = ((hidden[mask] - target.hidden["decoder"]) ** 2).mean()
    torch.testing.assert_close(found["loss"], 0.5 * task + 3 * (0.1 * distance + 2 * found["kl"]))
    found = loss_of(output, batch, target, weights, labelled=False)
    torch.testing.assert_close(found["loss"], 4 * (0.1 * distance + 2 * found["kl"]))
    assert set(loss_of(output, batch, None, Weights(), labelled=True)) == {"task", "loss"}
    with pytest.raises(CaloraError, match="a weight above 0 on unlabelled texts"):
        loss_of(output, batch, None, Weights(), labelled=False)
