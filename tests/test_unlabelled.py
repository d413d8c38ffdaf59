"""Data sets without labels: an adapter of one's own teaches from the texts alone, and what it answers is what is agreed with."""

import json
import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from calora.adapters.teachers import attach_teacher
from calora.errors import CaloraError
from calora.evaluation.predict import predict
from calora.models.loading import load_model, load_tokenizer
from calora.models.tasks import Task, encode_all
from stages.config import load_params
from stages.splits import has_labels, read_checked
from tests.conftest import change, make_project
from tests.test_data import folder as folder
from tests.test_data import jsonl, refused, source, stored
from tests.test_stages import run_all

ADAPTER = {"toy": {"path": "own/lora"}}
FREE = ["clm", "clm_inherited", "calora_free", "calora_unlabelled"]


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture
def brought(tmp_path):
    """A project whose task has an adapter of its own, one that changes answers."""
    made = make_project(tmp_path / "p")
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(load_model(made / "sources/base", torch.float32), config).save_pretrained(made / "own/lora")
    change(made, "teacher.adapters", ADAPTER)
    change(made, "compare", FREE)
    change(made, "evaluate", {"batch_size": 8, "draws": 100, "ours": "calora_unlabelled", "baseline": "clm_inherited", "packed": []})  # fmt: skip
    before = Path.cwd()
    yield made
    os.chdir(before)


def test_every_stage_without_any_label(brought, capsys):
    """Nothing in the files, in no split: the teacher's answers choose the step, and agreement with them is what is scored."""
    for split in ("train", "validation", "test"):
        path = brought / f"own/{split}.jsonl"
        path.write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in lines(path)))
    change(brought, "data.sets.toy.label", None)
    run_all(brought)
    said = capsys.readouterr().out
    assert "toy: 24 train (without labels)" in said and "toy: no labels to score the adapter by" in said
    assert "the small baseline" in Path("models/small_lora/toy/none.json").read_text()

    task = Task.from_json(json.loads(Path("data/toy/task.json").read_text()))
    rows, tokenizer = lines("data/toy/test.jsonl"), load_tokenizer(Path("models/base"))
    assert not any(has_labels(lines(f"data/toy/{split}.jsonl")) for split in ("train", "validation", "test"))
    model = load_model(Path("models/base"))
    attach_teacher(model, Path("models/teacher/toy"), "toy")
    answers = predict(model, task, tokenizer, encode_all(task, tokenizer, rows), 8)
    assert [row["label"] for row in read_checked("toy", "test")] == answers.labels and len(set(answers.labels)) == 2

    metrics = json.loads(Path("results/toy/q8_up/metrics.json").read_text())
    assert metrics["metrics"] == ["agreement"] and metrics["methods"]["llm_lora"]["agreement"] == 1
    assert metrics["methods"]["llm"]["agreement"] < 1 and "small_lora" not in metrics["methods"]
    shown = json.loads(Path("models/evaluated/toy/q8_up/predictions.json").read_text())
    for key in ("llm", "clm", "clm_inherited", "clm_calora_unlabelled"):
        alike = [a == b for a, b in zip(shown[key]["answers"], answers.answers, strict=True)]
        assert metrics["methods"][key]["agreement"] == pytest.approx(sum(alike) / len(alike))
    assert "| method | agreement with the teacher | 95 % interval |" in Path("results/table.md").read_text()
    history = json.loads(Path("models/calora_unlabelled/toy/q8_up/history.json").read_text())
    assert len(history["losses"]) == 6 and not any("task" in losses for losses in history["losses"])


def test_texts_to_learn_from_without_labels_and_a_labelled_test_set(brought):
    """Answers are written freely; the test set's own are what is scored, the teacher's choose the step."""
    for split in ("train", "test"):
        path = brought / f"own/{split}.jsonl"
        rows = [{"text": row["text"], "answer": "good film"} for row in lines(path)]
        path.write_text("".join(json.dumps({k: row[k] for k in (("text",) if split == "train" else row)}) + "\n" for row in rows))  # fmt: skip
    change(brought, "data.sets.toy", {**load_sets(brought), "validation": None, "label": {"train": None, "test": "answer"}, "labels": [], "answers": []})  # fmt: skip
    change(brought, "compare", ["calora_unlabelled"])
    run_all(brought)
    assert all(row["answer"] == "good film" for row in read_checked("toy", "test")) and has_labels(
        lines("data/toy/test.jsonl")
    )
    assert not has_labels(lines("data/toy/validation.jsonl")) and "answer" in read_checked("toy", "validation")[0]
    assert [path.name for path in Path("models/labels/toy").iterdir()] == ["validation.jsonl"]
    metrics = json.loads(Path("results/toy/q8_up/metrics.json").read_text())
    assert metrics["metrics"] == ["em", "f1"]
    assert Path("results/toy/q8_up/curves/calora_unlabelled/validation/agreement.tsv").exists()
    assert "validation agreement" in Path("models/calora_unlabelled/toy/q8_up/README.md").read_text()

    Path("models/labels/toy/validation.jsonl").write_text('{"answer": "x"}\n')
    with pytest.raises(CaloraError, match="an answer of the teacher for each of 2 texts, found 1"):
        read_checked("toy", "validation")


def load_sets(made):
    import yaml

    return yaml.safe_load((made / "params.yaml").read_text())["data"]["sets"]["toy"]


def test_labels_are_asked_for_where_they_are_needed(folder):
    jsonl(*({"text": f"{{split}} {n}"} for n in range(30)))
    refused("columns ['text']")
    source(label=None)
    with pytest.raises(
        CaloraError,
        match=r"data\.sets\.toy has no labels to train a teacher on: name an adapter in teacher\.adapters\.toy",
    ):
        load_params()
    change(Path(), "teacher.adapters", ADAPTER)
    with pytest.raises(
        CaloraError,
        match=r"compare names clm_lora, calora, which learn from labels, .*name some of calora_free, calora_unlabelled, ",
    ):
        load_params()
    change(Path(), "compare", ["calora_free"])
    source(labels=[])
    assert load_params().data.sets["toy"].label is None
    source(label={"train": None, "validation": "label"})
    with pytest.raises(CaloraError, match="a column of labels in the test file, or `label: null`"):
        load_params()


def test_a_column_without_labels_is_none_unless_the_set_says_so(folder):
    jsonl(*({"text": f"{{split}} {n}", "label": None} for n in range(30)))
    refused("30 rows, none with a label", "{train: null, test: COLUMN}")


def test_unlabelled_texts_beyond_those_of_train_are_kept(folder, monkeypatch):
    jsonl(*({"text": f"{{split}} {n}"} for n in range(30)))
    source(label=None, labels=[])
    change(Path(), "teacher.adapters", ADAPTER)
    change(Path(), "compare", ["calora_free"])
    change(Path(), "data.sizes", {"train": 20, "unlabelled": 4, "validation": 5, "test": 6})
    from stages import download

    monkeypatch.setattr(download, "bring", lambda *_: None)
    download.main(load_params(), "toy")
    found = {split: stored(split) for split in ("train", "unlabelled", "validation", "test")}
    assert {split: len(rows) for split, rows in found.items()} == {
        "train": 20,
        "unlabelled": 4,
        "validation": 5,
        "test": 6,
    }
    assert all(label is None for rows in found.values() for label in rows.values())
    assert not set(found["train"]) & set(found["unlabelled"])
