"""`adopt` on answers that rows bring, on tasks that are ready, on tables without a line of names, and on texts without labels."""

import csv
import json
from pathlib import Path

import pytest
import torch

from calora.errors import CaloraError
from pipeline.adopt import Wanted, adopt
from pipeline.adopt.columns import headless
from pipeline.adopt.options import options
from stages import download
from stages.config import load_params
from tests.conftest import make_model, toy_rows
from tests.test_adopt import project as project
from tests.test_strangers import make_stranger

COLOURS = ("red", "green", "blue", "grey")


def quiz(count, columns, label):
    """Rows with four choices, in an order that turns; `label` makes the label of the place and the text of the right one."""
    rows = []
    for n in range(count):
        texts = [f"{COLOURS[(n + i) % 4]} film" for i in range(4)]
        rows.append({"question": f"which film is {n} ?", **dict(zip(columns, texts, strict=True)), "answer": label(n % 4, texts[n % 4])})  # fmt: skip
    return rows


def table(path, rows, header=True):
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([*([list(rows[0])] if header else []), *(row.values() for row in rows)])
    return str(path)


@pytest.mark.parametrize(
    ("columns", "label", "labels"),
    [
        (("a", "b", "c", "d"), lambda at, text: "abcd"[at], ("a", "b", "c", "d")),
        (("A", "B", "C", "D"), lambda at, text: at, (0, 1, 2, 3)),
        (("choice1", "choice2", "choice3", "choice4"), lambda at, text: at, (0, 1, 2, 3)),
        (("choice1", "choice2", "choice3", "choice4"), lambda at, text: f"choice{at + 1}", ("choice1", "choice2", "choice3", "choice4")),
        (("option_a", "option_b", "option_c", "option_d"), lambda at, text: "ABCD"[at], ("A", "B", "C", "D")),
        (("ending0", "ending1", "ending2", "ending3"), lambda at, text: at + 1, (1, 2, 3, 4)),
        (("opa", "opb", "opc", "opd"), lambda at, text: text, ()),
    ],
)  # fmt: skip
def test_choices_in_columns_of_their_own(columns, label, labels):
    found = options(quiz(40, columns, label), "answer")
    assert found.columns == columns and found.labels == labels
    assert found.answers == tuple(f"{{{name}}}" for name in columns)


def test_what_is_no_choice():
    pairs = [{"a": f"a b {n}", "b": f"a c {n}", "label": n % 2} for n in range(40)]
    assert options(pairs, "label") is None  # a pair of texts that is judged
    assert options([{"sentence1": "a b", "sentence2": f"c {n}", "label": n % 2} for n in range(40)], "label") is None
    assert options([{"choice1": "a b", "choice2": "c d", "label": "neither"}] * 9, "label") is None
    assert options([{"choice1": "a b", "choice3": "c d", "label": 1}] * 9, "label") is None
    assert options([{"option1": "a b", "option2": "", "label": n % 2} for n in range(9)], "label") is None


@pytest.mark.parametrize(
    ("choices", "label", "labels"),
    [
        (lambda texts: texts, lambda at, text: at, ()),
        (lambda texts: texts, lambda at, text: at + 1, (1, 2, 3, 4)),
        (lambda texts: texts, lambda at, text: "ABCD"[at], ("A", "B", "C", "D")),
        (lambda texts: texts, lambda at, text: text, ()),
        (lambda texts: {"text": texts, "label": list("ABCD")}, lambda at, text: "ABCD"[at], ()),
    ],
)
def test_choices_in_a_list(choices, label, labels, project):
    rows = [
        {"question": row["question"], "choices": choices([row[name] for name in "abcd"]), "answer": row["answer"]}
        for row in quiz(60, "abcd", label)
    ]
    Path("quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    adopt(project, Wanted(data=("quiz.jsonl",)))
    entry = load_params().data.sets["quiz"]
    assert entry.answers == [" {choices}"] and tuple(entry.labels) == labels
    assert right_ones("quiz", lambda row: row["choices"])


def right_ones(name, choices):
    """Whether each row's label is that of the answer that the quiz has for right; raises where it is not taken at all."""
    download.main(load_params(), name)
    rows = [json.loads(line) for line in Path(f"data/{name}/train.jsonl").read_text().splitlines()]
    for row in rows:
        n = int(row["question"].split()[-2])
        assert choices(row)[row["label"]] == f"{COLOURS[(n + n % 4) % 4]} film"
    return rows


def test_a_quiz_in_one_command_and_a_second_one(project, capsys):
    columns = ("a", "b", "c", "d")
    file = table(project / "quiz.csv", quiz(200, columns, lambda at, text: "abcd"[at]))
    adopt(project, Wanted(data=(file,)))
    entry = load_params().data.sets["quiz"]
    assert entry.prompt == "Question: {question}\nAnswer:" and entry.labels == ["a", "b", "c", "d"]
    assert entry.answers == [" {a}", " {b}", " {c}", " {d}"]
    assert "one of the row's own" in capsys.readouterr().out.replace("label 'answer': a", "one of the row's own")
    assert right_ones("quiz", lambda row: [row[name] for name in columns])
    text = Path("params.yaml").read_text()
    adopt(project, Wanted(data=(file,)))
    assert Path("params.yaml").read_text() == text and "nothing to change" in capsys.readouterr().out
    # The user's own words, and keys that only people write, stay.
    text = text.replace(
        '[" {a}", " {b}", " {c}", " {d}"]', '["({a})", "({b})", "({c})", "({d})"]\n      likelihood: mean'
    )
    Path("params.yaml").write_text(text)
    adopt(project, Wanted(data=(file,), prompt="{question}"))
    entry = load_params().data.sets["quiz"]
    assert (entry.prompt, entry.likelihood, entry.answers[0], entry.labels[0]) == ("{question}", "mean", " ({a})", "a")
    adopt(project, Wanted(data=(file,), answers=("{d}", "{c}", "{b}", "{a}")))
    assert load_params().data.sets["quiz"].labels == ["d", "c", "b", "a"]
    with pytest.raises(CaloraError, match=r"--answers: expected columns among .*, found \{e\}"):
        adopt(project, Wanted(data=(file,), answers=("{a}", "{e}")))


def test_the_text_of_the_right_answer_is_a_label(project):
    columns = ("option1", "option2", "option3", "option4")
    adopt(project, Wanted(data=(table(project / "quiz.csv", quiz(200, columns, lambda at, text: text)),)))
    assert load_params().data.sets["quiz"].labels == []
    assert right_ones("quiz", lambda row: [row[name] for name in columns])
    text = (
        Path("own/quiz/quiz.csv").read_text().replace("red film\n", "no film\n").replace("red film\r\n", "no film\r\n")
    )
    Path("own/quiz/quiz.csv").unlink()
    Path("own/quiz/quiz.csv").write_text(text)
    with pytest.raises(
        CaloraError, match=r"quiz\.csv, row \d+, column 'answer': expected a label among .* film, .*found 'no film'"
    ):
        download.main(load_params(), "quiz")


def official_copa(folder):
    folder.mkdir()
    for split, count in (("train", 60), ("val", 20), ("test", 5)):
        rows = [{"premise": f"it {n} {split}", "choice1": "a film", "choice2": "the plot", "question": "cause", "label": n % 2, "idx": n} for n in range(count)]  # fmt: skip
        rows = [{key: value for key, value in row.items() if key != "label" or split != "test"} for row in rows]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_a_task_that_is_ready_is_asked_as_it_is_there(project, tmp_path, capsys):
    folder = official_copa(tmp_path / "copa")
    adopt(project, Wanted(data=(folder,)))
    line = "    copa: {like: copa, folder: own/copa, train: train.jsonl, test: val.jsonl}"
    assert line in Path("params.yaml").read_text().splitlines()
    entry = load_params().data.sets["copa"]
    assert entry.answers == [" {choice1}", " {choice2}"] and entry.test == ["own/copa/val.jsonl"]
    download.main(load_params(), "copa")
    assert len(Path("data/copa/test.jsonl").read_text().splitlines()) == 20
    assert "label 'label': 0 (40) answered ' {choice1}'" in " ".join(capsys.readouterr().out.split())
    adopt(project, Wanted(data=(folder,)))
    assert "nothing to change" in capsys.readouterr().out
    adopt(project, Wanted(name="copa", prompt="{premise} So:"))  # its data are known
    entry = load_params().data.sets["copa"]
    assert entry.prompt == "{premise} So:" and "like: copa" in Path("params.yaml").read_text()
    # Other columns under that name, or words of one's own: as any other data.
    rows = [{"text": row["text"], "label": row["label"]} for row in toy_rows(60, 5)]
    adopt(project, Wanted(data=(table(tmp_path / "all.csv", rows),), name="rte"))
    assert load_params().data.sets["rte"].label == "label" and load_params().data.sets["rte"].answers == [" no", " yes"]


def test_columns_without_a_line_of_names(project):
    rows = [{"label": row["label"], "text": f"{row['text']} and that is all of it"} for row in toy_rows(60, 5)]
    file = table(project / "raw.csv", rows, header=False)
    with pytest.raises(
        CaloraError, match=r'raw\.csv: expected a first line that names .*looks like a row: 0, .*--columns "label,text"'
    ):
        adopt(project, Wanted(data=(file,)))
    adopt(project, Wanted(data=(file,), columns=("label", "text")))
    entry = load_params().data.sets["raw"]
    assert entry.header == ["label", "text"] and entry.labels == [0, 1]
    adopt(project, Wanted(name="raw", prompt="{text} So:"))
    assert load_params().data.sets["raw"].header == ["label", "text"]
    download.main(load_params(), "raw")
    counts = [
        len(Path(f"data/raw/{split}.jsonl").read_text().splitlines()) for split in ("train", "validation", "test")
    ]
    assert sum(counts) == 60
    (project / "x.jsonl").write_text('{"a": "b"}\n')
    with pytest.raises(CaloraError, match=r"x\.jsonl: expected a csv or tsv file, where columns are given names"):
        adopt(project, Wanted(data=("x.jsonl",), columns=("label",)))
    with pytest.raises(CaloraError, match=r"raw\.csv, row 1: expected at most 1 cells"):
        adopt(project, Wanted(data=(file,), columns=("text",)))
    with pytest.raises(CaloraError, match=r"a name of its own for each column, found a, a"):
        adopt(project, Wanted(data=(file,), columns=("a", "a")))


def test_which_first_lines_look_like_a_row():
    assert headless([{"good": "x y", "0": n % 2} for n in range(9)])
    assert headless([{"this was a film of rare and quiet warmth": "x"}] * 3)
    assert not headless([{"text": "good", "label": "text" if n == 3 else f"{n}"} for n in range(9)])
    assert not headless([{"1": f"a {n}", "2": f"b {n}", "label": n % 2} for n in range(9)]) and not headless([])


def test_texts_without_labels(project, tmp_path, capsys):
    base = make_model("llama", tmp_path / "base", torch.float32)
    make_stranger(base, tmp_path / "lora")
    texts = [{"text": row["text"]} for row in toy_rows(200, 5)]
    file = table(tmp_path / "texts.csv", texts)
    with pytest.raises(CaloraError, match=r"texts without labels need an adapter that teaches \(--adapter\)"):
        adopt(project, Wanted(base=str(base), data=(file,)))
    given = {"base": str(base), "adapter": str(tmp_path / "lora"), "data": (file,), "answers": ("negative", "positive")}
    adopt(project, Wanted(**given))
    params = load_params()
    entry = params.data.sets["texts"]
    assert entry.label is None and entry.labels == [] and entry.answers == [" negative", " positive"]
    assert params.compare == ["clm", "clm_inherited", "calora_free", "calora_unlabelled"]
    assert (params.evaluate.ours, params.evaluate.baseline) == ("calora_unlabelled", "clm_inherited")
    said = " ".join(capsys.readouterr().out.split())
    assert "the adapter's answers stand for them; agreement with the adapter is what is scored" in said
    text = Path("params.yaml").read_text()
    adopt(project, Wanted(**given))
    assert Path("params.yaml").read_text() == text
    # A test set with labels is what is scored.
    tested = [{"text": f"{row['text']} it is", "mood": "good" if row["label"] else "bad"} for row in toy_rows(20, 4)]
    adopt(
        project, Wanted(**{**given, "answers": ("good", "bad")}, test=table(tmp_path / "t.csv", tested), label="mood")
    )
    entry = load_params().data.sets["texts"]
    assert (entry.label.train, entry.label.test, entry.labels) == (None, "mood", ["good", "bad"])
    assert load_params().data.sets["texts"].answers == [" good", " bad"]
    download.main(load_params(), "texts")
    assert json.loads(Path("data/texts/test.jsonl").read_text().splitlines()[0])["label"] in (0, 1)
