"""The calibration sample: raw texts and prompts, the same whichever tasks a run has."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from calora.errors import CaloraError
from calora.models.loading import load_tokenizer
from stages import calibration
from stages.config import load_params
from stages.corpora import task_of
from stages.splits import read_calibration
from tests.conftest import ROOT, change, make_tokenizer

SETS = ("movies", "tweets", "amazon", "nyt")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """params.yaml alone, and 20 training texts of each corpus; those of other splits are never looked at."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    pools = {name: [{"text": f"{name} film {i}", "label": None} for i in range(20)] for name in SETS}
    monkeypatch.setattr(calibration, "split_pools", lambda params, source, task: {"train": pools[task.name]})
    change(tmp_path, "compress.calibration", {"texts": 30, "tuning": 20, "prompts": 0.0, "seed": 0})
    return tmp_path


def sampled(share, texts=30):
    """The lines of the calibration sample with this share of prompts."""
    change(Path(), "compress.calibration.prompts", share)
    change(Path(), "compress.calibration.texts", texts)
    calibration.main(load_params())
    return [json.loads(line)["text"] for line in Path("data/calibration/texts.jsonl").read_text().splitlines()]


def bare(text):
    """A text without its prompt."""
    return text.partition(": ")[2].removesuffix("\nSentiment:") if text.endswith("\nSentiment:") else text


@pytest.mark.parametrize(("share", "prompts"), [(0, [0, 0, 0, 0]), (0.5, [4, 4, 4, 3]), (1.0, [8, 8, 7, 7])])
def test_the_share_of_prompts_is_spread_over_the_sets(folder, share, prompts):
    texts = sampled(share)
    of_set = {name: [text for text in texts if f"{name} film" in text] for name in SETS}
    assert [len(found) for found in of_set.values()] == [8, 8, 7, 7]
    assert [sum(text != bare(text) for text in found) for found in of_set.values()] == prompts
    assert all(text.startswith("Tweet: ") for text in of_set["tweets"] if text != bare(text))
    assert texts == sampled(share)


def test_which_texts_they_are_does_not_depend_on_the_share(folder):
    raw = sampled(0.0)
    assert len(set(raw)) == 30 and all([bare(text) for text in sampled(share)] == raw for share in (0.25, 1))


def test_tuning_texts_are_of_the_same_kind_and_no_calibration_texts(folder):
    texts = sampled(0.5)
    tuning = [json.loads(line)["text"] for line in Path("data/calibration/tuning.jsonl").read_text().splitlines()]
    assert len(tuning) == 20 and sum(text != bare(text) for text in tuning) == 10
    assert [sum(f"{name} film" in text for text in tuning) for name in SETS] == [5, 5, 5, 5]
    assert not {bare(text) for text in texts} & {bare(text) for text in tuning}
    change(folder, "compress.calibration.tuning", 0)
    assert sampled(0.5) == texts
    change(folder, "compress.calibration.tuning", 60)
    with pytest.raises(
        CaloraError, match=r"compress\.calibration\.tuning: expected at most 12 texts of movies, found 15"
    ):
        sampled(0.5)


@pytest.mark.parametrize("end", [False, True])
def test_a_prompt_has_the_token_ids_that_scoring_gives(folder, end):
    make_tokenizer(folder, end)
    tokenizer, texts = load_tokenizer(folder), sampled(1.0, 8)
    sets = load_params().data.sets
    expected = [
        task_of(name, sets[name]).encode(tokenizer, {"text": bare(text)}).prompt_ids
        for text in texts
        for name in SETS
        if f"{name} film" in text
    ]
    assert [example.prompt_ids for example in read_calibration(tokenizer)] == expected
    raw = sampled(0.0, 8)
    assert [e.prompt_ids for e in read_calibration(tokenizer)] == [tokenizer(text).input_ids for text in raw]


def test_the_tasks_of_a_run_change_nothing(folder):
    before = sampled(0.5)
    sets = yaml.safe_load(Path("params.yaml").read_text())["data"]["sets"]
    own = {"source": "files", **dict.fromkeys(("train", "validation", "test"), "own/x.jsonl")}
    words = {key: sets["movies"][key] for key in ("answers", "max_tokens", "max_new_tokens")}
    added = {**own, **words, "label": "label", "labels": [0, 1], "prompt": "Mine: {text}"}
    change(folder, "data.sets", {"mine": added, **sets})
    change(folder, "tasks", ["tweets", "mine"])
    assert sampled(0.5) == before


@pytest.mark.parametrize(
    ("key", "value"), [("prompts", -0.1), ("prompts", 1.5), ("prompts", "half"), ("texts", 0), ("tuning", -1)]
)
def test_a_value_out_of_its_range_is_named(folder, key, value):
    change(folder, f"compress.calibration.{key}", value)
    with pytest.raises(CaloraError, match=rf"compress\.calibration\.{key}: .*{value}") as caught:
        load_params()
    assert "\n" not in str(caught.value)
