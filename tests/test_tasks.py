"""The paper's eleven tasks as their publishers lay them out, and answers that a row brings or that have several tokens."""

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from calora.adapters.prompts import task_of
from calora.distillation.distill import Pool
from calora.distillation.labels import with_labels
from calora.distillation.targets import Targets, write_targets
from calora.errors import CaloraError
from calora.evaluation.predict import likelihoods, predict
from calora.models.loading import load_model, load_tokenizer
from calora.models.tasks import Task, encode_all
from stages import download
from stages.config import load_params
from stages.tasks import READY
from tests.conftest import ROOT, TASK, change, make_model, toy_rows

PREMISE = {"premise": "A {n}.", "hypothesis": "B {n}."}
NLI = [("entailment", 0), ("neutral", 1), ("contradiction", 2)]
MNLI = ["index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse", "sentence1_parse", "sentence2_parse"]  # fmt: skip


def squad(rows):
    """Two questions to a paragraph, one without an answer."""
    return {"version": "1.1", "data": [{"title": f"T{n}", "paragraphs": [{"context": f"It is {n}, the end.", "qas": [
        {"id": f"a{n}", "question": f"What is {n}?", "answers": [{"answer_start": 6, "text": n}, {"answer_start": 6, "text": f"{n},"}]},
        {"id": f"b{n}", "question": f"Why {n}?", "answers": [], "is_impossible": True},
    ]}]} for n in rows]}  # fmt: skip


# task -> a layout: the names of the train and the validation file, what makes a row of a number (as JSON, or cells below a
# header), the labels of rows 0, 1, ... as they are spelled there, and as places in `answers`
OFFICIAL = {
    "boolq": ("train.jsonl", "val.jsonl", lambda n, y: {"question": f"is {n}", "passage": f"P {n}", "idx": n, "label": y}, [False, True], [0, 1]),
    "boolq, first release": ("train.jsonl", "dev.jsonl", lambda n, y: {"question": f"is {n}", "title": "T", "answer": y, "passage": f"P {n}"}, [True, False], [1, 0]),
    "cb": ("train.jsonl", "val.jsonl", lambda n, y: {"premise": f"A {n}", "hypothesis": f"B {n}", "label": y, "idx": n}, ["entailment", "contradiction", "neutral"], [0, 1, 2]),
    "rte": ("train.jsonl", "val.jsonl", lambda n, y: {"premise": f"A {n}", "hypothesis": f"B {n}", "label": y, "idx": n}, ["entailment", "not_entailment"], [0, 1]),
    "rte, GLUE": ("train.tsv", "dev.tsv", lambda n, y: ["index", "sentence1", "sentence2", "label"] if n is None else [n, f'"A {n}', f"B {n}", y], ["not_entailment", "entailment"], [1, 0]),
    "copa": ("train.jsonl", "val.jsonl", lambda n, y: {"premise": "It was.", "choice1": f"A {n}", "choice2": f"B {n}", "question": "cause", "label": y, "idx": n}, [0, 1], [0, 1]),
    "wic": ("train.jsonl", "val.jsonl", lambda n, y: {"word": "w", "sentence1": f"w {n}", "sentence2": f"a w {n}", "idx": n, "label": y, "start1": 0, "start2": 2, "end1": 1, "end2": 3, "version": 1.1}, [False, True], [0, 1]),
    "sst2": ("train.tsv", "dev.tsv", lambda n, y: ["sentence", "label"] if n is None else [f'"{n} films ', y], [0, 1], [0, 1]),
    "mnli": ("train.tsv", "dev_matched.tsv", lambda n, y: [*MNLI, "sentence1", "sentence2", "label1", "gold_label"] if n is None else [n, *"abcdefg", f"A {n}", f"B {n}", y, y], ["neutral", "contradiction", "entailment", "-"], [1, 2, 0, None]),
    "mnli, jsonl": ("multinli_1.0_train.jsonl", "multinli_1.0_dev_matched.jsonl", lambda n, y: {"annotator_labels": [y], "gold_label": y, "sentence1": f"A {n}", "sentence2": f"B {n}"}, ["entailment", "-", "neutral"], [0, None, 1]),
    "qqp": ("train.tsv", "dev.tsv", lambda n, y: ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"] if n is None else [n, 1, 2, f"A {n}", f"B {n}", y], [0, 1], [0, 1]),
    "mrpc": ("train.tsv", "dev.tsv", lambda n, y: ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"] if n is None else [y, 1, 2, f"A {n}", f"B {n}"], [1, 0], [1, 0]),
    "qnli": ("train.tsv", "dev.tsv", lambda n, y: ["index", "question", "sentence", "label"] if n is None else [n, f"Q {n}", f"S {n}", y], ["entailment", "not_entailment"], [0, 1]),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A project without models: params.yaml and own/."""
    (tmp_path / "own").mkdir()
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    change(tmp_path, "data.sizes", {"train": 1000, "unlabelled": 1000, "validation": 1000, "test": 1000})
    return tmp_path


def write(file, text):
    opened = gzip.open if file.endswith(".gz") else open
    with opened(file, "wt", encoding="utf-8", newline="") as stream:
        stream.write(text)


def file_of(name, make, rows):
    """The text of a file: rows are (number, label)."""
    made = [make(n, y) for n, y in rows]
    if name.endswith(".tsv"):
        return "".join("\t".join(map(str, cells)) + "\n" for cells in [make(None, None), *made])
    return "".join(json.dumps(row) + "\n" for row in made)


def take(name, **more):
    """The stored splits of a task whose entry is `like` it, with the official files in own/<name>."""
    change(Path(), "data.sets", {name: {"like": name, "folder": f"own/{name}", **more}})
    change(Path(), "tasks", [name])
    download.main(load_params(), name)
    return {
        split: [json.loads(line) for line in Path(f"data/{name}/{split}.jsonl").read_text().splitlines()]
        for split in ("train", "validation", "test", "unlabelled")
    }


def test_there_is_an_entry_for_each_task_of_the_paper():
    paper = ["boolq", "cb", "rte", "copa", "wic", "sst2", "mnli", "qqp", "mrpc", "qnli", "squad"]
    sets = load_params(ROOT / "params.yaml").data.sets
    assert list(yaml.safe_load(READY.read_text())) == paper and set(paper) < set(sets)
    assert {name.split(",")[0] for name in OFFICIAL} | {"squad"} == set(paper)
    for name in paper:
        assert sets[name].source == "hub" and sets[name].validation is None
        assert sets[name].test.startswith("validation")  # the labels of the official test sets are secret
        task_of("x", download.task_of(name, sets[name]).to_json())


@pytest.mark.parametrize("zipped", ["", ".gz"])
@pytest.mark.parametrize("layout", OFFICIAL)
def test_official_files_of(layout, zipped, folder):
    train, val, make, spelled, places = OFFICIAL[layout]
    name = layout.split(",")[0]
    (folder / "own" / name).mkdir()
    rows = [(n, spelled[n % len(spelled)]) for n in range(60)]
    write(f"own/{name}/{train}{zipped}", file_of(train, make, rows))
    write(f"own/{name}/{val}{zipped}", file_of(val, make, [(n + 100, y) for n, y in rows]))
    found = take(name)
    told = [row["label"] for row in found["test"]]
    expected = [place for n in range(60) if (place := places[n % len(places)]) is not None]
    assert sorted(told) == sorted(expected)
    text = next(row for row in found["test"] if "100" in json.dumps(row))
    assert text["label"] == places[0]
    assert len(found["train"]) + len(found["validation"]) == len(expected) and found["validation"]
    assert bool(found["unlabelled"]) == (None in places) and len(found["unlabelled"]) <= 60 - len(expected)


@pytest.mark.parametrize("zipped", ["", ".gz"])
def test_official_files_of_squad(zipped, folder):
    (folder / "own/squad").mkdir()
    numbers = {"train": map(str, range(60)), "dev": map(str, range(100, 120))}
    for split, rows in numbers.items():
        write(f"own/squad/{split}-v1.1.json{zipped}", json.dumps(squad(list(rows))))
    found = take("squad")
    assert len(found["test"]) == 20 and len(found["train"]) + len(found["validation"]) == 60
    one = next(row for row in found["test"] if row["question"] == "What is 107?")
    assert one == {"context": "It is 107, the end.", "question": "What is 107?", "answer": ["107", "107,"]}
    assert {row["question"][:3] for row in found["unlabelled"]} == {"Why"} and "answer" not in found["unlabelled"][0]

    write(f"own/squad/train-v1.1.json{zipped}", json.dumps({"data": [{"paragraphs": [{"qas": 3}]}]}))
    with pytest.raises(CaloraError, match=r"train-v1\.1\.json(\.gz)?: expected SQuAD's nesting"):
        take("squad")


def test_what_is_said_beside_a_ready_task_goes_before(folder):
    (folder / "own/rte").mkdir()
    for file in ("mine.jsonl", "val.jsonl"):
        write(f"own/rte/{file}", file_of(file, OFFICIAL["rte"][2], [(f"{n} {file}", "entailment") for n in range(30)]))
    with pytest.raises(
        CaloraError, match=r"train\.jsonl or train\.tsv \(\.gz too\) in own/rte, found mine\.jsonl, val"
    ):
        take("rte")
    found = take("rte", train="mine.jsonl", test="own/rte/val.jsonl", prompt="{hypothesis}", max_tokens=7)
    assert len(found["test"]) == 30 and set(found["test"][0]) == {"hypothesis", "label"}
    assert json.loads(Path("data/rte/task.json").read_text())["max_tokens"] == 7


def test_a_row_without_a_text_is_left_out_where_the_set_says_so(folder, capsys):
    (folder / "own/qqp").mkdir()
    make = OFFICIAL["qqp"][2]
    for file in ("train.tsv", "dev.tsv"):
        text = file_of(file, make, [(f"{n} {file}", n % 2) for n in range(40)])
        write(f"own/qqp/{file}", text + "99\t1\t2\tno second one\t\t0\n")
    assert len(take("qqp")["test"]) == 40
    assert "1 rows of own/qqp/dev.tsv without a text left out" in capsys.readouterr().out
    with pytest.raises(CaloraError, match=r"row 41, column 'question2': expected text .*incomplete: leave_out"):
        take("qqp", incomplete="refuse")


def test_a_mistake_in_a_ready_entry_stops_the_tasks_that_use_it_alone(folder):
    sets = yaml.safe_load(Path("params.yaml").read_text())["data"]["sets"]
    for wrong, said in (
        ({"like": "boolqq"}, r"data\.sets\.boolq.*'boolqq' is none"),
        ({"like": ["boolq"]}, r"data\.sets\.boolq.*is none"),
        ({"like": "boolq", "folder": "own/boolq", "train": 3}, r"data\.sets\.boolq.*train"),
        ({"like": "boolq", "metric": "f1"}, r"data\.sets\.boolq.*metric: expected no such key"),
        ({"like": "boolq", "metrics": ["f2"]}, r"data\.sets\.boolq.*metrics"),
        ({"like": "boolq", "answers": [" yes"], "labels": [1]}, r"data\.sets\.boolq.*two answers or more"),
    ):
        change(folder, "data.sets", {**sets, "boolq": wrong})
        change(folder, "tasks", ["movies", "rte"])
        assert load_params().tasks == ["movies", "rte"]
        change(folder, "tasks", ["movies", "boolq"])
        with pytest.raises(CaloraError, match=said):
            load_params()


@pytest.mark.parametrize(
    ("answers", "metrics", "said"),
    [
        (("a", "b", "c"), ("f1",), "some of accuracy, macro_f1, matthews"),
        (("a", "b"), ("em",), "some of accuracy, f1, macro_f1, matthews"),
        (("a {x}", "b"), ("f1",), "some of accuracy"),
        ((), ("accuracy",), "some of em, f1"),
        (("a", "b"), ("f1", "f1"), "some of .*, each once"),
    ],
)
def test_metrics_that_do_not_fit_the_answers_are_refused(answers, metrics, said):
    with pytest.raises(CaloraError, match=f"metrics of task t: expected {said}"):
        Task("t", "{text}", answers, 8, 4, metrics=metrics)


def test_a_task_of_before_is_read_as_it_was_meant():
    old = {key: value for key, value in TASK.to_json().items() if key not in ("likelihood", "metrics")}
    assert Task.from_json(old) == task_of("x", old) == TASK == Task.from_json(TASK.to_json())
    assert (TASK.metrics, TASK.likelihood) == (("accuracy",), "sum")
    assert Task("t", "{text}", (), 8, 4).metrics == ("em", "f1")
    with pytest.raises(CaloraError, match="task"):
        task_of("x", {**TASK.to_json(), "likelihood": "max"})
    with pytest.raises(CaloraError, match=r"task\.answers"):
        task_of("x", {**TASK.to_json(), "answers": ["{a.b}", "c"]})


LISTS = {
    "a list": lambda texts: texts,
    "ARC's": lambda texts: {"text": texts, "label": list("ABCD")[: len(texts)]},
}


@pytest.mark.parametrize("kind", LISTS)
def test_as_many_answers_as_a_row_has(kind, folder):
    entry = {
        "source": "files", "train": "own/train.jsonl", "validation": None, "test": "own/test.jsonl", "label": "key", "labels": [],
        "prompt": "{ask}", "answers": [" {options}"], "max_tokens": 8, "max_new_tokens": 4,
    }  # fmt: skip
    for split in ("train", "test"):
        rows = [
            {"ask": f"{split} {n}", "options": LISTS[kind]([f"o{i} {n}" for i in range(2 + n % 3)]), "key": "B" if "A" in kind else 1}
            for n in range(30)
        ]  # fmt: skip
        write(f"own/{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    change(folder, "data.sets", {"mine": entry})
    change(folder, "tasks", ["mine"])
    download.main(load_params(), "mine")
    stored = [json.loads(line) for line in Path("data/mine/test.jsonl").read_text().splitlines()]
    assert {len(row["options"]) for row in stored} == {2, 3, 4} and {row["label"] for row in stored} == {1}
    task = download.task_of("mine", load_params().data.sets["mine"])
    assert task.choices(stored[0])[1] == " " + stored[0]["options"][1]
    if kind == "a list":  # by letters: as many of them as the longest row has
        change(folder, "data.sets.mine.labels", ["p", "q", "r", "s"])
        with pytest.raises(CaloraError, match="column 'key': expected a label among p, q"):
            download.main(load_params(), "mine")
        change(folder, "data.sets.mine.labels", [])
    write("own/test.jsonl", json.dumps({"ask": "x", "options": ["one"], "key": 0}) + "\n")
    with pytest.raises(CaloraError, match=r"test\.jsonl, row 1, column 'options': expected two texts or more"):
        download.main(load_params(), "mine")


ROWS = [
    {"text": "a film is good", "one": "great", "two": "bad plot awful", "label": 1},
    {"text": "the plot", "one": "a dull film", "two": "superb", "label": 0},
    {"text": "was the film the plot fine", "one": "poor the", "two": "a poor the", "label": 1},
    {"text": "bad", "one": "good", "two": "awful film"},
]
OWN = Task("own", "Review: {text} Sentiment:", (" {one}", " {two}"), 32, 4)


def reference(model, tokenizer, prompt, answer):
    """log p(answer | prompt) of each token, by the model's own forward pass of this text alone."""
    prompt_ids, answer_ids = tokenizer(prompt).input_ids, tokenizer(answer, add_special_tokens=False).input_ids
    if model.config.is_encoder_decoder:
        start = [model.config.decoder_start_token_id]
        given = {"input_ids": torch.tensor([prompt_ids]), "decoder_input_ids": torch.tensor([start + answer_ids[:-1]])}
        logits = model(**given).logits[0]
    else:
        logits = model(input_ids=torch.tensor([prompt_ids + answer_ids])).logits[0, len(prompt_ids) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer_ids)[:, None])[:, 0]


@pytest.mark.parametrize("likelihood", ["sum", "mean"])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_answers_of_several_tokens_are_scored_whole(kind, likelihood, tmp_path):
    folder = make_model(kind, tmp_path / kind, torch.float32)
    model, tokenizer = load_model(folder, torch.float32), load_tokenizer(folder)
    lists = [{"text": row["text"], "all": [row["one"], row["two"], "was"][: 2 + n % 2]} for n, row in enumerate(ROWS)]
    fixed = Task("fixed", OWN.prompt, ("good", "a bad film"), 32, 4, likelihood)
    listed = Task("listed", OWN.prompt, (" {all}",), 32, 4, likelihood)
    for task, rows in ((replace(OWN, likelihood=likelihood), ROWS), (fixed, ROWS), (listed, lists)):
        examples = encode_all(task, tokenizer, rows)
        found = likelihoods(model, task, examples, 3)
        for row, scores in zip(rows, found, strict=True):
            each = [reference(model, tokenizer, task.render(row), answer) for answer in task.choices(row)]
            expected = torch.stack([getattr(one, likelihood)() for one in each])
            torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
        predictions = predict(model, task, tokenizer, examples, 3)
        assert predictions.labels == [int(scores.argmax()) for scores in found]
        texts = [task.choices(row)[place].strip() for row, place in zip(rows, predictions.labels, strict=True)]
        assert predictions.answers == texts


def test_answers_of_one_token_are_chosen_alike_on_both_paths(llama32):
    model, tokenizer = load_model(llama32, torch.float32), load_tokenizer(llama32)
    rows = toy_rows(24, 1)
    examples = encode_all(TASK, tokenizer, rows)
    assert TASK.answer_token_ids(tokenizer) and not examples[0].choice_ids
    whole = [replace(e, choice_ids=tuple(tokenizer(a).input_ids for a in TASK.answers)) for e in examples]
    scores = likelihoods(model, TASK, whole, 8)
    assert predict(model, TASK, tokenizer, examples, 8).labels == [int(one.argmax()) for one in scores]


def test_the_teacher_chooses_where_a_rows_answer_is_not_known(llama32, tmp_path):
    """And what it says of the others follows the right answer, so that they are no unlabelled texts."""
    model, tokenizer = load_model(llama32, torch.float32), load_tokenizer(llama32)
    examples = encode_all(OWN, tokenizer, ROWS)
    write_targets(tmp_path, model, OWN, tokenizer, examples, 2, 5, "targets")
    targets = Targets(tmp_path)
    answered = targets.with_answers(examples)
    best = int(likelihoods(model, OWN, examples[3:], 1)[0].argmax())
    assert answered[3].answer_ids == list(examples[3].choice_ids[best])
    assert [e.answer_ids for e in answered[:3]] == [e.choice_ids[e.label] for e in examples[:3]]
    target = targets.read([0, 3], torch.device("cpu"))
    assert target.logits.shape == (sum(len(answered[i].answer_ids) for i in (0, 3)), 5)
    labelled = Pool(examples[:3], targets.take([0, 1, 2]))
    kept, others = with_labels(labelled, None, 1, seed=0)
    assert len(kept.examples) == 1 and others is None


def test_a_written_answer_has_the_tokens_that_a_text_before_it_would_give(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["</s>"])
    made.train_from_iterator(["Answer: Denver Broncos of Denver"] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    task = Task("t", "{text}\nAnswer:", (), 64, 8)
    example = task.encode(tokenizer, {"text": "x", "answer": "Denver Broncos"})
    whole = tokenizer("x\nAnswer: Denver Broncos").input_ids
    assert example.prompt_ids + example.answer_ids == [*whole, tokenizer.eos_token_id]
