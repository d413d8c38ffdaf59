"""Data means what its publisher means: tables, labels and answers as they stand in the file, whatever a reader would guess."""

import gzip
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast, T5Config

from calora.common.files import fingerprint, read_json, write_json
from calora.common.tensors import write_tensors
from calora.errors import CaloraError
from calora.models.tasks import Task, positions
from stages import download, small
from stages.config import load_params
from tests.conftest import ROOT, TASK, change, make_project

SPLITS = ("train", "validation", "test")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A project without models: params.yaml, own/, and a data set `toy` whose files the test writes."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["tasks"] = ["toy"]
    params["data"]["sizes"] = {"train": 1000, "unlabelled": 1000, "validation": 1000, "test": 1000}
    params["data"]["sets"]["toy"] = {
        "source": "files", **{split: f"own/{split}.jsonl" for split in SPLITS}, "label": "label", "labels": [0, 1],
        "prompt": "{text}", "answers": ["no", "yes"], "max_tokens": 8, "max_new_tokens": 4,
    }  # fmt: skip
    (tmp_path / "own").mkdir()
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def source(**changes):
    for key, value in changes.items():
        change(Path(), f"data.sets.toy.{key}", value)


def write(ending, content):
    """The three splits, `{split}` in `content` keeping their texts apart."""
    for split in SPLITS:
        text = content.replace("{split}", split)
        opened = gzip.open if ending.endswith(".gz") else open
        with opened(f"own/{split}{ending}", "wt", encoding="utf-8", newline="") as file:
            file.write(text)
    source(**{split: f"own/{split}{ending}" for split in SPLITS})


def jsonl(*rows):
    write(".jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def got(split="test"):
    """text -> label or answer, as the download stage wrote them."""
    download.main(load_params(), "toy")
    return stored(split)


def stored(split):
    rows = [json.loads(line) for line in Path(f"data/toy/{split}.jsonl").read_text().splitlines()]
    return {row["text"]: row.get("label", row.get("answer")) for row in rows}


def refused(*said):
    with pytest.raises(CaloraError) as caught:
        download.main(load_params(), "toy")
    assert "\n" not in str(caught.value) and not list(Path().glob("data/*"))
    for words in said:
        assert words in str(caught.value)


def test_a_tsv_has_no_quotes(folder):
    rows = ['"' * (n in (3, 50)) + f"row {n} of {{split}}\t{n % 2}\n" for n in range(200)]
    write(".tsv", "text\tlabel\n" + "".join(rows))
    texts = got()
    assert len(texts) == 200 and texts['"row 3 of test'] == 1


def test_a_csv_is_quoted_and_a_line_break_of_unicode_ends_no_row(folder):
    write(".csv", 'text,label\r\n"a ""good"" one,\nof {split}",1\r\nb\u2028c {split},0\r\n')
    assert got() == {'a "good" one,\nof test': 1, "b\u2028c test": 0}


@pytest.mark.parametrize("ending", [".CSV", ".csv.gz", ".tsv", ".TSV.gz"])
def test_words_that_a_reader_takes_for_missing_are_texts_and_labels(folder, ending):
    source(labels=["None", "NA"])
    rows = ("null,NA", "None,None", "NA {split},None", "nan {split},")
    write(ending, "\n".join(("text,label", *rows)).replace(",", "\t" if ".tsv" in ending.lower() else ","))
    # a text that occurs in several splits is one of the test set
    for split in ("train", "validation"):
        (file := Path(f"own/{split}{ending}")).unlink()
        text = f"text,label\nx {split},NA\n".replace(",", "\t" if ".tsv" in ending.lower() else ",")
        file.write_bytes(gzip.compress(text.encode()) if ending.endswith(".gz") else text.encode())
    assert got() == {"null": 1, "None": 0, "NA test": 0}


def test_a_partly_labelled_csv(folder):
    write(".csv", "text,label\na {split},1\nb {split},\nc {split},0\n")
    assert got() == {"a test": 1, "c test": 0}
    assert got("unlabelled") == {"b train": None}


def test_answers_stay_texts(folder):
    source(labels=[], answers=[])
    write(".csv", "text,label\na {split},0017\nb {split},1.50\nc {split},true\n")
    assert got() == {"a test": "0017", "b test": "1.50", "c test": "true"}


@pytest.mark.parametrize(
    ("answer", "stored"),
    [
        (17, "17"),
        (1.50, "1.5"),
        (True, "true"),
        (["a", "b"], ["a", "b"]),
        ({"text": ["a", "b"], "answer_start": [1, 2]}, ["a", "b"]),
        ([{"text": "a", "answer_start": 1}], "a"),
        ({"text": "a"}, "a"),
    ],
)
def test_answers_as_squad_has_them(folder, answer, stored):
    source(labels=[], answers=[])
    jsonl(
        {"text": "a {split}", "label": answer}, {"text": "b {split}", "label": []},
        {"text": "c {split}", "label": {"text": [], "answer_start": []}}, {"text": "d {split}"},
    )  # fmt: skip
    assert got() == {"a test": stored}
    assert set(got("unlabelled")) == {"b train", "c train", "d train"}


def test_an_answer_of_another_shape_is_refused_by_file_row_and_column(folder):
    source(labels=[], answers=[])
    jsonl({"text": "a {split}", "label": "x"}, {"text": "b {split}", "label": {"spans": [1, 2]}})
    refused("own/train.jsonl, row 2, column 'label'", "spans")


def test_a_text_that_is_missing_is_refused_by_file_row_and_column(folder):
    write(".csv", "text,label\na {split},1\n,1\n")
    refused("own/train.csv, row 2, column 'text'")


@pytest.mark.parametrize("labels", [[False, True], ["False", "True"], ["false", "true"]])
def test_booleans_are_labels(folder, labels):
    source(labels=labels)
    jsonl({"text": "a {split}", "label": True}, {"text": "b {split}", "label": False})
    assert got() == {"a test": 1, "b test": 0}
    write(".csv", "text,label\na {split},True\nb {split},false\n")
    assert got() == {"a test": 1, "b test": 0}


@pytest.mark.parametrize("labels", [[0, 1], ["0", "1"]])
def test_numbers_are_labels_however_they_are_written(folder, labels):
    source(labels=labels)
    jsonl({"text": "a {split}", "label": 1}, {"text": "b {split}", "label": "0"}, {"text": "c {split}", "label": 1.0})
    assert got() == {"a test": 1, "b test": 0, "c test": 1}


def test_labels_that_are_one_label_are_refused(folder):
    source(labels=[1, "1"])
    jsonl({"text": "a {split}", "label": 1})
    refused("data.sets.toy.labels")


def test_minus_one_is_a_missing_label_unless_it_is_one(folder):
    jsonl({"text": "a {split}", "label": 1}, {"text": "b {split}", "label": -1}, {"text": "c {split}", "label": 0})
    assert set(got()) == {"a test", "c test"}
    source(labels=[-1, 1])
    jsonl({"text": "a {split}", "label": 1}, {"text": "b {split}", "label": -1})
    assert got() == {"a test": 1, "b test": 0}


def test_a_label_column_of_another_name_in_the_test_file(folder):
    source(label={"train": "answer", "test": "label"}, labels=[False, True])
    jsonl({"text": "a {split}", "answer": True}, {"text": "b {split}", "answer": False})
    Path("own/test.jsonl").write_text('{"text": "a", "label": true}\n')
    assert got() == {"a": 1}
    assert got("validation") == {"a validation": 1, "b validation": 0}


def test_parquet_with_missing_labels(folder):
    pandas = pytest.importorskip("pandas")
    for split in SPLITS:  # as pandas writes them: floats, and NaN where there is none
        rows = [(f"a {split}", 1.0), (f"b {split}", None), (f"c {split}", 0.0)]
        pandas.DataFrame(rows, columns=["text", "label"]).to_parquet(f"own/{split}.parquet")
    source(**{split: f"own/{split}.parquet" for split in SPLITS})
    assert got() == {"a test": 1, "c test": 0}


@pytest.mark.parametrize("ending", [".json", ".json.gz", ".jsonl.gz"])
def test_json_lists_and_lines_compressed_or_not(folder, ending):
    rows = [{"text": "2012-03-04 a {split}", "label": 1}, {"text": "b\u2028 {split}", "label": 0}]
    write(ending, "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert got() == {"2012-03-04 a test": 1, "b\u2028 test": 0}
    if ending != ".jsonl.gz":
        write(ending, json.dumps(rows, indent=1))
        assert got() == {"2012-03-04 a test": 1, "b\u2028 test": 0}


@pytest.mark.parametrize(
    ("ending", "content", "said"),
    [
        (".jsonl", '{"text": "a", "label": 1}\n{"text"\n', "own/train.jsonl, line 2"),
        (".jsonl", "[1]\n", "own/train.jsonl, row 1: expected a JSON object"),
        (".json", '{"data": [],\n "version": 2}', "a column 'text', found columns ['data', 'version']"),
        (".csv", 'text,label\n"a,1\n', "quoted as RFC 4180"),
        (".csv", "text,label\na,b,1\n", "row 1: expected at most 2 cells"),
        (".tsv", "text\ttext\na\tb\n", "a name of its own for each column"),
        (".txt", "a", "a file of .jsonl"),
        (".csv", "", "labelled rows for the train split, found 0 rows"),
        (".csv", "text,label\na {split},\n", "found 1 rows, none with a label"),
    ],
)
def test_a_broken_file_is_refused_by_name(folder, ending, content, said):
    write(ending, content)
    refused(said)


@pytest.mark.parametrize("content", [b"\x1f\x8b\x08\x00junk", b"text,label"])
def test_a_broken_archive_and_a_foreign_encoding(folder, content):
    for split in SPLITS:
        Path(f"own/{split}.csv.gz").write_bytes(content)
        Path(f"own/{split}.csv").write_bytes("text,label\nh\xf6ren,1\n".encode("latin-1"))
    source(**{split: f"own/{split}.csv.gz" for split in SPLITS})
    refused("own/train.csv.gz", "gzip")
    source(**{split: f"own/{split}.csv" for split in SPLITS})
    refused("own/train.csv", "UTF-8")


def test_a_file_used_twice_is_refused_by_that_name(folder):
    jsonl({"text": "a {split}", "label": 1})
    source(test="own/validation.jsonl")
    refused("own/validation.jsonl as validation and as test")
    Path("own/again.jsonl").symlink_to("validation.jsonl")
    source(test="own/again.jsonl")
    refused("own/again.jsonl as validation and as test", "null")


def test_a_wrong_set_stops_the_tasks_that_use_it_alone(folder):
    jsonl({"text": "a {split}", "label": 1})
    good = read_sets()["toy"]
    for wrong in ({**good, "labels": [0.5, None]}, {**good, "source": "ftp"}, {**good, "answers": ["a"]}, None, 3):
        change(folder, "data.sets", {**read_sets(), "wrong": wrong})
        assert got() == {"a test": 1}
        change(folder, "tasks", ["toy", "wrong"])
        with pytest.raises(CaloraError, match=r"data\.sets\.wrong"):
            load_params()
        change(folder, "tasks", ["toy"])
    change(folder, "data.sets.movies.archive", "none")  # the calibration reads it
    with pytest.raises(CaloraError, match="movies"):
        load_params()


def read_sets():
    return yaml.safe_load(Path("params.yaml").read_text())["data"]["sets"]


@pytest.mark.parametrize("name", ["my.task", "a/b", "calibration", ""])
def test_names_that_dvc_and_peft_take_otherwise(folder, name):
    change(folder, "data.sets", {**read_sets(), name: read_sets()["toy"]})
    change(folder, "tasks", [name])
    with pytest.raises(CaloraError, match="calibration" if name == "calibration" else "letters, digits, _ and -"):
        load_params()


def test_a_path_outside_of_own(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    jsonl({"text": "a {split}", "label": 1})
    for path in (str(folder / "own/test.jsonl"), "data.jsonl", "own/../own.jsonl", "own", "own/none.jsonl"):
        source(test=path)
        refused("data.sets.toy.test: expected a path inside own/")
    shutil.copy("own/test.jsonl", elsewhere)
    Path("own/linked").symlink_to(elsewhere)  # DVC does not look behind it
    source(test="own/linked/test.jsonl")
    refused("own/linked is a link")
    Path("own/file.jsonl").symlink_to(elsewhere / "test.jsonl")
    source(test="own/file.jsonl")
    assert got() == {"a test": 1}


def adapter(folder):
    folder.mkdir(parents=True)
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 4})
    write_tensors(folder / "adapter_model.safetensors", {"a": torch.ones(2, 2)})
    return folder


def test_an_imported_adapter_is_copied_by_content(folder):
    jsonl({"text": "a {split}", "label": 1})
    right = fingerprint(adapter(Path("own/lora")))
    Path("own/lora/optimizer.pt").write_bytes(b"\x80")
    change(folder, "teacher.adapters", {"toy": {"path": "own/lora"}})
    download.main(load_params(), "toy")
    kept = sorted(file.name for file in Path("models/brought/toy").iterdir())
    assert kept == ["adapter_config.json", "adapter_model.safetensors"]
    shutil.rmtree("data")
    change(folder, "teacher.adapters", {"toy": {"path": "own/lora", "sha256": "0" * 64}})
    refused(right, "own/lora")
    change(folder, "teacher.adapters", {"toy": {"path": "elsewhere/lora"}})
    refused("teacher.adapters.toy: expected a path inside own/")
    change(folder, "teacher.adapters", {"toy": {"path": "own/train.jsonl"}})
    refused("teacher.adapters.toy: expected a folder")
    Path("own/lora/adapter_model.safetensors").rename("own/lora/adapter_model.bin")
    change(folder, "teacher.adapters", {"toy": {"path": "own/lora"}})
    refused("only pickles")


def test_dvc_notices_what_the_user_edits(folder, tmp_path_factory, monkeypatch):
    from dvc.repo import Repo

    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    for name in ("calora", "stages"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "dvc.yaml", folder)
    jsonl({"text": "a {split}", "label": 1}, {"text": "b {split}", "label": 0})
    linked = tmp_path_factory.mktemp("elsewhere") / "train.jsonl"
    Path("own/train.jsonl").rename(linked)
    Path("own/train.jsonl").symlink_to(linked)
    lora = adapter(Path("own/lora"))
    config, weights = lora / "adapter_config.json", lora / "adapter_model.safetensors"
    change(folder, "teacher.adapters", {"toy": {"path": "own/lora"}})
    Repo.init(no_scm=True)

    with Repo() as repo:
        assert [stage.name for stage in repo.reproduce("download@toy")] == ["download@toy"]
        assert not repo.status("download@toy")
    edits = {
        linked: lambda: linked.write_text(linked.read_text().translate(str.maketrans("01", "10"))),
        config: lambda: write_json(config, {"peft_type": "LORA", "r": 2, "lora_alpha": 16}),
        weights: lambda: write_tensors(weights, {"a": torch.zeros(2, 2)}),
    }
    for file, edit in edits.items():
        before = file.read_bytes()
        edit()
        with Repo() as repo:
            assert "download@toy" in repo.status("download@toy"), file
        file.write_bytes(before)
        with Repo() as repo:
            assert not repo.status("download@toy"), file
    for edit in edits.values():
        edit()
    with Repo() as repo:
        assert [stage.name for stage in repo.reproduce("download@toy")] == ["download@toy"]
    assert stored("train") == {"a train": 0, "b train": 1}
    assert read_json(Path("models/brought/toy/adapter_config.json"), "")["lora_alpha"] == 16
    assert fingerprint(Path("models/brought/toy")) == fingerprint(Path("own/lora"))


@pytest.mark.parametrize(
    "prompt",
    ["{text:>9999999999}", "{text!r}", "{text.real}", "{text[0]}", "{}", "{text", "text}", "{text:{text}}", "text"],
)
def test_a_prompt_holds_columns_alone(prompt):
    with pytest.raises(CaloraError, match="prompt of task toy"):
        Task("toy", prompt, ("no", "yes"), 8, 4)
    with pytest.raises(CaloraError, match="prompt of task toy"):
        Task.from_json({**TASK.to_json(), "prompt": prompt})


def test_braces_of_the_text_and_odd_columns():
    task = Task("toy", "{{{first text}}} {0} {0}", ("no", "yes"), 8, 4)
    assert task.columns == ["first text", "0"]
    assert task.render({"first text": "{a}", "0": "b"}) == "{{a}} b b"


@pytest.mark.parametrize(
    "change",
    [{"prompt": None}, {"max_tokens": 0}, {"max_tokens": "8"}, {"answers": [1, 2]}, {"answers": None}, {"more": 1}],
)
def test_a_foreign_task_is_checked(change):
    with pytest.raises(CaloraError):
        Task.from_json({**TASK.to_json(), **change})
    with pytest.raises(CaloraError):
        Task.from_json({})


def tokenizer(template):
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "<s>", *"abcdefghijklmnopqrstuvwxyz"])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        made.post_processor = processors.TemplateProcessing(template, special_tokens=[("<s>", 3), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize(
    ("template", "kept"),
    [
        ("<s> $A", "<s> w x y z"),
        ("<s> $A </s>", "<s> x y z </s>"),
        ("$A </s>", "w x y z </s>"),
        (None, "v w x y z"),
    ],
)
def test_a_long_prompt_keeps_its_special_tokens_and_its_end(template, kept):
    words, task = tokenizer(template), Task("toy", "{text}", (), 5, 2)
    long, short = {"text": " ".join("abcdefghijklmnopqrstuvwxyz")}, {"text": "a </s>"}
    assert words.decode(task.encode(words, long).prompt_ids) == kept
    assert task.encode(words, short).prompt_ids == words("a </s>").input_ids
    # the model's own positions hold the prompt and the answer
    assert len(task.encode(words, long, limit=6).prompt_ids) == 4
    scored = Task("toy", "{text}", ("a", "b"), 5, 2)
    assert len(scored.encode(words, long, limit=4).prompt_ids) == 4
    with pytest.raises(CaloraError, match="longest prompt of task toy"):
        task.encode(words, long, limit=2)


@pytest.mark.parametrize(
    "kind",
    ["bert", "roberta", "xlm-roberta", "camembert", "mpnet", "esm", "xmod", "opt", "gpt2", "distilbert", "electra"],
)
def test_positions_are_those_that_the_model_has(kind):
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 20, "pad_token_id": 1}
    more = {"languages": ["en"], "default_language": "en"} if kind == "xmod" else {}
    more |= {"word_embed_proj_dim": 8, "ffn_dim": 8} if kind == "opt" else {}
    config = AutoConfig.for_model(kind, **sizes, **more, max_position_embeddings=12)
    model = AutoModel.from_config(config).eval()
    count = positions(config)
    model(torch.full((1, count), 5), attention_mask=torch.ones(1, count, dtype=torch.long))
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        model(torch.full((1, count + 1), 5), attention_mask=torch.ones(1, count + 1, dtype=torch.long))


def test_a_prompt_longer_than_the_small_encoders_positions(tmp_path, monkeypatch):
    folder = make_project(tmp_path / "p")  # its encoder has 64 positions
    monkeypatch.chdir(folder)
    source(max_tokens=200)
    change(folder, "train.steps", 2)
    for split in SPLITS:
        rows = [json.loads(line) for line in Path(f"own/{split}.jsonl").read_text().splitlines()[:8]]
        long = [{**row, "text": "film " * 100 + row["text"]} for row in rows]
        Path(f"own/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    download.main(load_params(), "toy")
    shutil.copytree("sources/small", "models/small")
    small.main(load_params(), "toy")
    assert Path("models/small_lora/toy/adapter_model.safetensors").exists()


def test_a_model_without_a_number_of_positions():
    assert positions(T5Config()) is None  # its positions are relative
