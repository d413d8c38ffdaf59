"""Every stage on tiny models, in one process: Llama and T5, scored and generated answers; and the adapters that they make."""

import contextlib
import importlib
import json
import os
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from sklearn.metrics import f1_score
from transformers import GPT2LMHeadModel

import calora
from calora.adapters.fold import fold
from calora.adapters.folder import read_adapter, read_plain_lora, write_adapter
from calora.adapters.lora import Adapter, attach_adapter, set_active
from calora.common.versions import versions
from calora.device.folder import read_folder
from calora.errors import CaloraError
from calora.models.families import family_of
from calora.models.loading import load_model
from calora.models.tasks import Example
from stages.config import load_params
from stages.training import digest, run_key
from tests.conftest import ROOT, TASK, change, make_project

FIRST = (
    ("methods",), ("base",), ("download", "toy"), ("calibration",), ("teacher", "toy"), ("targets", "toy"),
    ("compress", "q8_up"), ("small", "toy"), ("reference", "toy"),
)  # fmt: skip
LAST = (("evaluate", "toy", "q8_up"), ("report",))
OF_METHODS = ("distill", "score")
COMPARED = ["clm", "clm_inherited", "clm_lora", "clm_lora_same", "calora"]


def calibration_texts(folder: Path) -> None:
    (folder / "data/calibration").mkdir(parents=True)
    shutil.copy(folder / "own/train.jsonl", folder / "data/calibration/texts.jsonl")


def run_all(folder: Path) -> None:
    os.chdir(folder)
    params = load_params()
    texts = (("write", "toy", method) for method in params.compare)
    of_methods = ((stage, "toy", "q8_up", method) for method in params.compare for stage in OF_METHODS)
    for name, *arguments in (*FIRST, *texts, ("inherit", "toy", "q8_up"), *of_methods, *LAST):
        if name == "calibration":  # the embedded corpora come from the network
            calibration_texts(folder)
        else:
            importlib.import_module(f"stages.{name}").main(params, *arguments)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    before = Path.cwd()
    folder = make_project(tmp_path_factory.mktemp("llama"))
    change(folder, "methods.calora.start.bypass.activation", "identity")
    change(folder, "compare", COMPARED)
    run_all(folder)
    yield folder
    os.chdir(before)


@pytest.mark.parametrize(("kind", "answers"), [("t5", True), ("t5", False), ("llama", False)])
def test_every_stage_for_other_families_and_generated_answers(tmp_path, kind, answers, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = make_project(tmp_path / "p", kind, answers)
    change(folder, "compare", [*COMPARED, "paper", "calora_scales"])
    change(folder, "data.sets.toy.metrics", measured := ["f1", "accuracy" if answers else "em"])
    run_all(folder)
    metrics = json.loads((folder / "results/toy/q8_up/metrics.json").read_text())
    methods = metrics["methods"]
    assert {
        "llm",
        "llm_lora",
        "clm",
        "clm_inherited",
        "clm_lora",
        "clm_lora_same",
        "clm_calora",
        "clm_paper",
        "clm_calora_scales",
    } <= set(methods)
    assert ("small_lora" in methods) == answers
    assert ("em" in methods["llm"]) != answers
    assert (metrics["metric"], metrics["metrics"], metrics["per_item"]) == ("f1", measured, not answers)
    others = "accuracy" if answers else "exact match"
    assert f"| method | F1 | 95 % interval | {others} | MB on disk |" in Path("results/table.md").read_text()
    assert Path("results/toy/q8_up/curves/calora/validation/f1.tsv").read_text().startswith("step\tf1\n0\t")
    assert "validation f1" in Path("models/calora/toy/q8_up/README.md").read_text()
    shown = json.loads(Path("results/summary.json").read_text())["toy"]["q8_up"]
    said = json.loads(Path("models/evaluated/toy/q8_up/predictions.json").read_text())
    for key, m in methods.items():
        assert m["score"] == m["f1"] == pytest.approx(sum(said[key]["items"]) / 16, abs=1e-6)
        assert m["ci"][0] - 5e-5 <= m["f1"] <= m["ci"][1] + 5e-5
        if key in shown["f1"]:
            assert {name: shown[name][key] for name in measured} == {name: round(m[name], 4) for name in measured}
    if answers:  # scikit-learn's, from what each method answered
        right = [json.loads(line)["label"] for line in Path("data/toy/test.jsonl").read_text().splitlines()]
        for key, m in methods.items():
            chosen = [TASK.answers.index(answer) for answer in said[key]["answers"]]
            assert m["f1"] == pytest.approx(f1_score(right, chosen), abs=1e-12)


def test_every_stage_for_answers_that_a_row_brings(tmp_path, monkeypatch):
    """As COPA has them: two of several tokens each; some rows have no label, and the teacher chooses there."""
    monkeypatch.chdir(tmp_path)
    folder = make_project(tmp_path / "p", "t5")
    for split in ("train", "validation", "test"):
        path = folder / f"own/{split}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [{**row, "one": f"the {row['text']}", "two": "was a film", "label": row["label"] - (n % 4 == 3 and 9)} for n, row in enumerate(rows)]  # fmt: skip
        path.write_text("".join(json.dumps({**row, "label": max(row["label"], -1)}) + "\n" for row in rows))
    change(folder, "data.sets.toy.answers", [" {one}", " {two}"])
    change(folder, "data.sets.toy.likelihood", "mean")
    change(folder, "compare", ["clm_lora", "calora", "calora_free"])
    run_all(folder)
    methods = json.loads(Path("results/toy/q8_up/metrics.json").read_text())["methods"]
    assert set(methods) == {"llm", "llm_lora", "clm_lora", "clm_calora", "clm_calora_free"}
    assert Path("data/toy/unlabelled.jsonl").read_text()
    model = calora.load("models/compressed/q8_up")
    model.load_adapter("models/calora/toy/q8_up", "toy")
    asked = [{"text": "a film", "one": "good", "two": "is a bad plot"}, {"text": "the plot", "one": "x y", "two": "z"}]
    assert all(a in (row["one"], row["two"]) for a, row in zip(model.answer(asked), asked, strict=True))
    with pytest.raises(CaloraError, match="column 'one', found no such column"):
        model.answer(["a film"])


@pytest.mark.parametrize("kind", ["bart", "gpt2", "classifier"])
def test_every_stage_for_more_families(tmp_path, kind, monkeypatch):
    """By the names of no layer: the words of params.yaml fit any family."""
    monkeypatch.chdir(tmp_path)
    folder = make_project(tmp_path / "p", kind)
    change(folder, "compare", ["clm", "clm_lora", "calora"])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fan_in_fan_out.*")  # PEFT's, of a configuration that it has to mend
        run_all(folder)
        if kind == "gpt2":
            plain = GPT2LMHeadModel.from_pretrained(folder / "models/base", dtype=torch.float32)
            theirs = PeftModel.from_pretrained(plain, folder / "models/teacher/toy")
    methods = json.loads((folder / "results/toy/q8_up/metrics.json").read_text())["methods"]
    assert methods["clm_lora"]["trainable_parameters"] == methods["clm_calora"]["trainable_parameters"] > 0
    if kind == "gpt2":
        ours = load_model(folder / "models/base", torch.float32)
        attach_adapter(ours, read_plain_lora(folder / "models/teacher/toy"), "toy")
        set_active(ours, "toy")
        torch.testing.assert_close(logits_of(ours), logits_of(theirs.get_base_model()), rtol=1e-4, atol=1e-5)


def test_results_hold_the_interface(project):
    metrics = json.loads((project / "results/toy/q8_up/metrics.json").read_text())
    methods = metrics["methods"]
    assert set(methods) == {
        "llm", "llm_lora", "small_lora", "clm", "clm_inherited", "clm_lora", "clm_lora_same", "clm_calora",
    }  # fmt: skip
    for method in methods.values():
        assert {"accuracy", "ci", "bytes_on_disk", "trainable_parameters"} <= set(method)
        assert method["ci"][0] <= method["accuracy"] <= method["ci"][1]
    assert methods["clm_lora"]["trainable_parameters"] == methods["clm_calora"]["trainable_parameters"]
    assert {"value", "ci", "below_noise"} <= set(metrics["recovered_share"])
    compressed = sum(f.stat().st_size for f in (project / "models/compressed/q8_up").iterdir())
    assert methods["clm"]["bytes_on_disk"] == compressed
    assert len(list((project / "results/plots").glob("*.png"))) == 2
    assert "CA-LoRA" in (project / "results/table.md").read_text()


def test_every_artifact_records_the_versions_that_made_it(project):
    found = {
        "models/base/versions.json": None, "models/small/versions.json": None, "models/teacher/toy/versions.json": None,
        "models/targets/toy/versions.json": None, "models/small_lora/toy/versions.json": None,
        "models/compressed/q8_up/compression.json": "versions", "models/inherited/toy/q8_up/calora/calora.json": "versions",
        "models/calora/toy/q8_up/calora.json": "versions", "results/toy/q8_up/metrics.json": "versions",
    }  # fmt: skip
    for file, key in found.items():
        content = json.loads((project / file).read_text())
        assert (content[key] if key else content) == versions(), file


def test_a_checkpoint_is_of_one_code_data_targets_settings_and_start(project, tmp_path):
    """Each of them changed alone gives another key; the same again the same."""
    params = load_params(project / "params.yaml")
    folder = tmp_path / "p"
    shutil.copytree(project, folder, symlinks=True)
    inputs = [Path("models/inherited/toy/q8_up/calora"), Path("models/compressed/q8_up"), Path("models/targets/toy")]

    def key(settings=0, **more):
        with contextlib.chdir(folder):
            return run_key(params.model_copy(update=more), "toy", inputs, settings)

    keys = [key(), key(settings=1), key(seed=1), key(train=params.train.model_copy(update={"lr": 0.01}))]
    for file in (
        "models/inherited/toy/q8_up/calora/calora.json",
        "models/targets/toy/versions.json",
        "data/toy/train.jsonl",
    ):
        before = (folder / file).read_bytes()
        (folder / file).write_bytes(before.replace(b"a", b"b", 1))
        keys.append(key())
        (folder / file).write_bytes(before)
    assert len(set(keys)) == len(keys) and key() == keys[0]
    (tmp_path / "code").mkdir()
    (tmp_path / "code/a.py").write_text("1")
    first = digest(tmp_path / "code", suffixes=(".py",))
    (tmp_path / "code/a.py").write_text("2")
    assert digest(tmp_path / "code", suffixes=(".py",)) != first


def test_splits_are_disjoint(project):
    texts = {}
    for split in ("train", "validation", "test", "unlabelled"):
        rows = [json.loads(line) for line in (project / f"data/toy/{split}.jsonl").read_text().splitlines()]
        texts[split] = {row["text"].lower() for row in rows}
        assert len(texts[split]) == len(rows)
    assert not (texts["train"] | texts["unlabelled"]) & (texts["validation"] | texts["test"])
    assert not texts["validation"] & texts["test"] and not texts["train"] & texts["unlabelled"]


def test_adapter_folder(project):
    files = {path.name for path in (project / "models/calora/toy/q8_up").iterdir()}
    assert files == {
        "adapter_config.json", "adapter_model.safetensors", "recovery.safetensors", "calora.json", "history.json", "README.md",
    }  # fmt: skip
    card = (project / "models/calora/toy/q8_up/README.md").read_text()
    assert "library_name: peft" in card and "LoRA part alone" in card


def test_load_swap_answer(project):
    model = calora.load(project / "models/compressed/q8_up")
    model.load_adapter(project / "models/calora/toy/q8_up", "toy")
    model.load_adapter(project / "models/clm_lora/toy/q8_up", "fresh")
    model.set_adapter("toy")
    first = logits_of(model)
    assert model.answer(["a good film"]) in (["positive"], ["negative"])
    model.set_adapter("fresh")
    assert not torch.equal(logits_of(model), first)
    model.set_adapter("toy")
    assert torch.equal(logits_of(model), first)
    model.set_adapter(None)
    assert torch.equal(logits_of(model), logits_of(calora.load(project / "models/compressed/q8_up")))
    with pytest.raises(CaloraError, match="load_adapter"):
        model.set_adapter("other")


def test_an_edited_adapter_is_refused(project, tmp_path):
    edited = tmp_path / "edited"
    shutil.copytree(project / "models/calora/toy/q8_up", edited)
    file = edited / "recovery.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CaloraError, match=r"recovery\.safetensors: expected SHA-256"):
        calora.load(project / "models/compressed/q8_up").load_adapter(edited, "toy")
    file.write_bytes(content[:-9])
    with pytest.raises(CaloraError, match="a whole safetensors file"):
        calora.load(project / "models/compressed/q8_up").load_adapter(edited, "toy")


def logits_of(model):
    family = family_of(model)
    batch = family.collate([Example([3, 5, 9]), Example([4, 12])], model)
    with torch.no_grad():
        return family.forward(model, batch, None).logits


def test_zero_bypass_starts_at_the_inherited_lora(project, tmp_path):
    adapter = read_adapter(project / "models/inherited/toy/q8_up/calora")
    adapter.recovery = {k: v * 0 if k.endswith(".up") else v for k, v in adapter.recovery.items()}
    write_adapter(tmp_path / "zero", adapter, "base", "", torch.bfloat16)
    plain = Adapter(adapter.config, adapter.lora, {}, dict(adapter.meta))
    write_adapter(tmp_path / "plain", plain, "base", "", torch.bfloat16)
    model = calora.load(project / "models/compressed/q8_up")
    outputs = []
    for name in ("zero", "plain"):
        model.load_adapter(tmp_path / name, name)
        model.set_adapter(name)
        outputs.append(logits_of(model))
    assert torch.equal(*outputs)


def test_adapter_folders_do_not_depend_on_the_process_that_wrote_them(project):
    """PEFT keeps the targets as a set of strings: their order on disk would be another in every process."""
    targets = [
        json.loads(file.read_text())["target_modules"] for file in project.glob("models/*/toy/**/adapter_config.json")
    ]
    assert max(map(len, targets)) >= 7
    assert all(names == sorted(names) for names in targets)


def test_wrong_base_is_refused_with_both_fingerprints(project):
    params = load_params(project / "params.yaml")
    os.chdir(project)
    importlib.import_module("stages.compress").main(params, "q8")
    model = calora.load(project / "models/compressed/q8")
    right = json.loads((project / "models/compressed/q8_up/compression.json").read_text())["fingerprint"]
    with pytest.raises(CaloraError, match=f"(?s){right}.*{model.calora_fingerprint}"):
        model.load_adapter(project / "models/calora/toy/q8_up", "toy")


def test_plain_peft_loads_the_lora_and_warns(project):
    model = calora.load(project / "models/compressed/q8_up")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(model, project / "models/calora/toy/q8_up", autocast_adapter_dtype=False)
    assert any("calora" in str(w.message) for w in caught)
    ours = calora.load(project / "models/compressed/q8_up")
    adapter = read_adapter(project / "models/calora/toy/q8_up")
    attach_adapter(ours, replace(adapter, recovery={}), "toy")
    set_active(ours, "toy")
    torch.testing.assert_close(logits_of(model), logits_of(ours), rtol=2e-2, atol=2e-2)  # bf16: one sum instead of two


def test_linear_bypass_folds_into_the_lora_exactly(project, tmp_path):
    adapter = read_adapter(project / "models/calora/toy/q8_up")
    folded = fold(adapter)
    write_adapter(tmp_path / "folded", folded, "base", "", torch.float32)
    whole = load_model(project / "models/base", torch.float32)
    whole_state = Adapter(
        adapter.config, {k: v.float() for k, v in adapter.lora.items()},
        {k: v.float() for k, v in adapter.recovery.items()}, adapter.meta,
    )  # fmt: skip
    attach_adapter(whole, whole_state, "a")
    set_active(whole, "a")
    plain = PeftModel.from_pretrained(load_model(project / "models/base", torch.float32), tmp_path / "folded")
    torch.testing.assert_close(logits_of(plain.get_base_model()), logits_of(whole), rtol=1e-4, atol=1e-5)
    adapter.meta["activation"] = "gelu"
    with pytest.raises(CaloraError, match="identity"):
        fold(adapter)


def test_our_adapter_is_exported_and_scored(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    params = load_params()
    params = params.model_copy(update={"export": params.export.model_copy(update={"kinds": ["peft"]})})
    importlib.import_module("stages.export").main(params, "toy", "q8_up")
    about = read_folder(project / "models/export/toy/q8_up")
    score = about["adapters"]["toy"]["scores"]["peft"]
    stored = json.loads((project / "results/toy/q8_up/scores/calora.json").read_text())["calora"]
    assert score["torch"] == stored["accuracy"] and score["changed"] <= 1
    assert f"peft: {score['accuracy']['value']:.4f}, torch {score['torch']:.4f}" in capsys.readouterr().out


def test_an_adapter_of_ones_own_is_imported(project, tmp_path, monkeypatch):
    folder = tmp_path / "p"
    shutil.copytree(project, folder, symlinks=True)
    monkeypatch.chdir(folder)
    own = calora.common.files.fingerprint(folder / "models/teacher/toy")
    shutil.copytree(folder / "models/teacher/toy", folder / "own/lora")
    change(folder, "teacher.adapters", {"toy": {"path": "own/lora", "sha256": "0" * 64}})
    with pytest.raises(CaloraError, match=own):
        importlib.import_module("stages.download").main(load_params(), "toy")
    change(folder, "teacher.adapters", {"toy": {"path": "own/lora"}})
    for stage in ("download", "teacher"):
        importlib.import_module(f"stages.{stage}").main(load_params(), "toy")
    assert calora.common.files.fingerprint(folder / "models/teacher/toy") == own


def test_the_snippet_of_the_readme_runs(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    code = re.search(r"```python\n(import calora.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    exec(
        compile(
            code.replace("movies", "toy").replace("calora/tweets", "calora/toy").replace("q3", "q8_up"),
            "README.md",
            "exec",
        ),
        {},
    )
    assert capsys.readouterr().out.strip() in ("['positive']", "['negative']")


def test_a_base_that_fits_only_packed_is_trained_and_scored_so(project, tmp_path, monkeypatch):
    """The dense view is never made, and the adapter is the same to the bit."""
    folder = tmp_path / "p"
    shutil.copytree(project, folder)
    monkeypatch.chdir(folder)
    change(folder, "train.base", "packed")
    change(folder, "train.gradient_checkpointing", True)
    views = []
    for name in ("distill", "score"):
        stage = importlib.import_module(f"stages.{name}")

        def watched(*args, opened=stage.load, **how):
            views.append(how["dense"])
            return opened(*args, **how)

        monkeypatch.setattr(stage, "load", watched)
        stage.main(load_params(), "toy", "q8_up", "calora")
    assert views == [False, False]
    for file in ("adapter_model.safetensors", "recovery.safetensors"):
        made = Path("models/calora/toy/q8_up") / file
        assert made.read_bytes() == (project / made).read_bytes()
    scored = json.loads(Path("results/toy/q8_up/scores/calora.json").read_text())["calora"]
    assert scored["packed"] == scored["accuracy"]
