"""Texts that the teacher writes itself: sampled as the model says, column by column, and learnt from without any other."""

import json
import os
from pathlib import Path

import pytest
import torch

from calora.adapters.folder import read_adapter
from calora.common.versions import versions
from calora.distillation.targets import Targets
from calora.distillation.written import write_rows
from calora.errors import CaloraError
from calora.models.loading import load_model, load_tokenizer
from calora.models.tasks import Task, encode_all
from stages.config import load_params
from tests.conftest import TASK, WORDS, change, make_model, make_project
from tests.test_stages import run_all

PAIR = Task("pair", "{a} film {b}", ("negative", "positive"), 32, 4)


def texts(model, folder, task=TASK, count=12, seed=0, temperature=1.0, tokens=6, batch=8):
    made = load_tokenizer(Path(model.name_or_path))
    return write_rows(
        folder,
        model,
        made,
        task,
        count,
        temperature=temperature,
        tokens=tokens,
        seed=seed,
        batch_size=batch,
        title=None,
    )


@pytest.fixture
def model(tmp_path):
    return load_model(make_model("llama", tmp_path / "base", torch.float32), torch.float32)


def test_each_column_ends_where_the_prompt_goes_on(model, tmp_path):
    for task, stops in ((TASK, {"text": "Sentiment:"}), (PAIR, {"a": "film", "b": "</s>"})):
        rows = texts(model, tmp_path / task.name, task)
        assert len(rows) == 12 and len({tuple(row.values()) for row in rows}) == 12
        assert any(len(next(iter(row.values())).split()) < 6 for row in rows)  # not all are as long as they may be
        for row in rows:
            assert list(row) == task.columns
            for column, stop in stops.items():
                words = row[column].split()
                assert 1 <= len(words) <= 6 and stop not in words and set(words) <= {*WORDS, "<unk>"}
        assert all(example.label == -1 for example in encode_all(task, load_tokenizer(Path(model.name_or_path)), rows))


def test_a_seed_gives_the_same_texts_and_a_batch_that_is_there_is_kept(model, tmp_path):
    rows = texts(model, tmp_path / "a")
    assert texts(model, tmp_path / "b") == rows != texts(model, tmp_path / "c", seed=1)
    before = torch.get_rng_state()
    (tmp_path / "a/texts-00001.json").unlink()
    assert texts(model, tmp_path / "a") == rows and torch.equal(torch.get_rng_state(), before)
    kept = tmp_path / "a/texts-00000.json"
    kept.write_text(json.dumps([{"text": f"kept {i}"} for i in range(8)]))
    assert texts(model, tmp_path / "a")[:8] == [{"text": f"kept {i}"} for i in range(8)]


def test_words_are_drawn_as_the_model_says(model, tmp_path):
    """Their shares in 2,400 draws against softmax(logits / T), whatever the model's own generation settings are."""
    model.generation_config.update(top_k=2, temperature=0.01, do_sample=True)
    tokenizer = load_tokenizer(Path(model.name_or_path))
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)
        ids = torch.tensor([tokenizer("Review:").input_ids])
        expected = (model(ids).logits[0, -1].double() / 2).softmax(0)
    counts = torch.zeros(len(expected))
    with pytest.raises(CaloraError, match="texts that differ"):  # there are only so many words
        texts(model, tmp_path / "drawn", count=600, temperature=2.0, tokens=1, batch=200)
    drawn = [row["text"] for file in (tmp_path / "drawn").glob("*.json") for row in json.loads(file.read_text())]
    words = [word for word in drawn if word]  # an end token or a pad leaves nothing
    for word in words:
        counts[tokenizer(word).input_ids[0]] += 1
    named = torch.tensor([i > 2 and word != "Sentiment:" for i, word in enumerate(["", "", "", *WORDS])])
    expected, counts = expected[named] / expected[named].sum(), counts[named]
    assert counts.sum() > 1500 and expected.max() > 0.1
    deviation = (expected * (1 - expected) / counts.sum()).sqrt()
    assert bool(((counts / counts.sum() - expected).abs() < 4.5 * deviation + 1e-3).all())


def test_a_lead_stands_in_front_while_it_is_written(model, tmp_path, monkeypatch):
    """It is read, and is no part of a row."""
    read = []
    own = type(model).generate
    monkeypatch.setattr(
        type(model), "generate", lambda self, **inputs: read.append(inputs["input_ids"]) or own(self, **inputs)
    )
    tokenizer = load_tokenizer(Path(model.name_or_path))
    rows = write_rows(
        tmp_path / "a", model, tokenizer, TASK, 8, temperature=1.0, tokens=4, seed=0, batch_size=8, title=None,
        lead="the plot is ",
    )  # fmt: skip
    assert tokenizer.decode(read[0][0]) == "the plot is Review:" and len(rows) == 8


def test_a_model_that_says_the_same_is_refused(model, tmp_path):
    with pytest.raises(CaloraError, match="expected 12 texts that differ, found 1"):
        texts(model, tmp_path / "a", temperature=1e-4, tokens=3)


def test_an_encoder_decoder_writes_none(tmp_path):
    model = load_model(make_model("t5", tmp_path / "t5"), torch.float32)
    with pytest.raises(CaloraError, match="decoder-only"):
        texts(model, tmp_path / "a")


@pytest.mark.parametrize("answers", [True, False])
def test_methods_learn_from_what_the_teacher_wrote(tmp_path, answers, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = make_project(tmp_path / "p", answers=answers)
    change(folder, "teacher.written.by", "base" if answers else "teacher")
    change(folder, "teacher.written.leads", {"toy": "a film was "})
    change(folder, "methods.clm_written", {"like": "clm", "texts": "written"})
    change(
        folder, "compare", ["calora_written", "calora_written_free", "calora_free", "clm_written", "calora", "clm_lora"]
    )
    run_all(folder)
    own = folder / "models/written/toy/calora_written"
    rows = [json.loads(line) for line in (own / "texts.jsonl").read_text().splitlines()]
    assert len(rows) == 10 and all(set(row) == {"text"} for row in rows)
    assert json.loads((own / "versions.json").read_text()) == versions() and not list(
        (folder / "checkpoints/models/written").glob("*/*")
    )
    assert len(Targets(own / "targets").rows) == 10
    assert os.listdir(folder / "models/written/toy/calora") == ["none.json"]
    history = json.loads((folder / "models/calora_written/toy/q8_up/history.json").read_text())
    assert len(history["losses"]) == 6 and all("task" not in row and "kl" in row for row in history["losses"])
    inherited = {
        m: read_adapter(folder / "models/inherited/toy/q8_up" / m).recovery
        for m in ("calora_written_free", "calora_free")
    }
    a, b = inherited.values()
    assert a.keys() == b.keys() and not all(torch.equal(a[key], b[key]) for key in a)  # other texts weigh the error
    methods = json.loads((folder / "results/toy/q8_up/metrics.json").read_text())["methods"]
    assert {"clm_calora_written", "clm_calora_written_free", "clm_written"} <= methods.keys()


@pytest.mark.parametrize("loss", ["labels", {"labels": 5}, {"labels": "all"}])
def test_written_texts_have_no_labels(tmp_path, loss):
    folder = make_project(tmp_path / "p")
    change(folder, "methods.mine", {"like": "calora", "texts": "written", "loss": loss})
    with pytest.raises(CaloraError, match=r"methods\.mine: `texts: written` goes with"):
        load_params(folder / "params.yaml")
