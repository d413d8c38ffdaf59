"""`python -m pipeline adopt`: one command from a stranger's files to a params.yaml that the stages take."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import AddedToken
from transformers import LlamaConfig

from calora.adapters.lora import check_targets
from calora.common.files import fingerprint, sha256
from calora.compression import compress
from calora.compression.walk import Calibration
from calora.errors import CaloraError
from calora.models.anatomy import linear_layers
from calora.models.loading import load_model, load_tokenizer
from calora.models.tasks import Task, encode_all
from calora.preview.outline import outline
from calora.preview.recipes import preview
from calora.preview.speed import Speed
from calora.saving import save
from pipeline.__main__ import main
from pipeline.adopt import Wanted, adopt
from pipeline.adopt.columns import choice, label_column, matched, proposed_answers, proposed_prompt, text_columns
from pipeline.adopt.outlook import Texts, outlook
from pipeline.adopt.words import in_template
from pipeline.values import editor
from stages import base as base_stage
from stages import download
from stages.common import brought
from stages.config import load_params
from tests.conftest import ROOT, TASK, change, make_model, make_tokenizer, toy_rows
from tests.test_hub import COMMIT, hub  # noqa: F401  # a fixture
from tests.test_strangers import make_stranger

TEXT = (ROOT / "params.yaml").read_text(encoding="utf-8")
WORDS = ("bad", "good")


def write_csv(path, rows, names=("text", "label")):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([names, *([row["text"], row["label"]] for row in rows)])
    return path


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with the project's params.yaml and an empty own/; the current one."""
    folder = tmp_path / "project"
    (folder / "own").mkdir(parents=True)
    (folder / "params.yaml").write_text(TEXT, encoding="utf-8")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def theirs(tmp_path):
    """A stranger's folder: a base, a LoRA, and data as two CSV files."""
    folder = tmp_path / "theirs"
    make_model("llama", folder / "base", torch.float32, hidden=64, inner=128)
    make_stranger(folder / "base", folder / "lora")
    write_csv(folder / "train.csv", toy_rows(120, 5))
    write_csv(folder / "test.csv", toy_rows(20, 4))
    return folder


def wanted(theirs, **more):
    given = {"base": str(theirs / "base"), "adapter": str(theirs / "lora"), "data": (str(theirs / "train.csv"),)}
    return Wanted(
        **{**given, "test": str(theirs / "test.csv"), "answers": ("negative", "positive"), "name": "mine", **more}
    )


def lying(folder):
    """Everything below a folder: links with what they point to, files with their content."""
    return {
        path.relative_to(folder): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def test_what_is_not_changed_stays_as_it_is_written(tmp_path):
    yaml_, copy = editor(), tmp_path / "params.yaml"
    with copy.open("w", encoding="utf-8") as stream:
        yaml_.dump(yaml_.load(TEXT), stream)
    assert copy.read_text(encoding="utf-8") == TEXT


def test_a_strangers_folder_in_one_command(project, theirs, capsys):
    adopt(project, wanted(theirs, prompt="Review: {text}\\nSentiment:"))
    params = load_params()
    entry, teacher = params.data.sets["mine"], params.teacher.adapters["mine"]
    assert params.tasks == ["mine"] and params.base.sha256 == fingerprint(theirs / "base")
    assert params.base.path == str(theirs / "base") and teacher.sha256 == fingerprint(theirs / "lora")
    assert entry.prompt == "Review: {text}\nSentiment:" and entry.answers == [" negative", " positive"]
    assert entry.labels == [0, 1] and entry.label == "label" and entry.validation is None
    assert entry.test == "own/mine/test.csv"
    before, after = TEXT.splitlines(), Path("params.yaml").read_text().splitlines()
    gone = [line for line in before if line not in after]
    assert all(re.match(r"tasks:|recipes:|  (source|package|version|sha256|member|adapters):", line) for line in gone)
    assert {line.partition(" #")[2] for line in before} <= {line.partition(" #")[2] for line in after}  # comments
    said = capsys.readouterr().out
    for words in (
        "LlamaForCausalLM",
        "rank 4",
        "4 layers",
        "120 train, 20 test",
        "0 (70)",
        "own/mine/train.csv",
        "make run",
    ):
        assert words in said, said
    # The stages take it.
    download.main(params, "mine")
    assert fingerprint(brought("mine")) == fingerprint(theirs / "lora")
    assert len(Path("data/mine/test.jsonl").read_text().splitlines()) == 20
    base_stage.check_fingerprint(Path(params.base.path), params.base)


def test_a_second_run_changes_only_what_changed(project, theirs, capsys):
    adopt(project, wanted(theirs))
    text, files = Path("params.yaml").read_text(), lying(project / "own")
    capsys.readouterr()
    adopt(project, wanted(theirs))
    assert "params.yaml: nothing to change" in capsys.readouterr().out
    assert Path("params.yaml").read_text() == text and lying(project / "own") == files
    # By hand, and then by what is named: the rest stays, the test set and the adapter too.
    Path("params.yaml").write_text(re.sub(r"(mine:(\n      .*)*max_tokens: )\d+", r"\g<1>77  # mine", text))
    assert "77" in Path("params.yaml").read_text()
    adopt(project, Wanted(data=(str(theirs / "train.csv"),), name="mine", prompt="{text} Is it good?"))
    again = Path("params.yaml").read_text()
    changed = [line for line in again.splitlines() if line not in text.splitlines()]
    assert changed == ['      prompt: "{text} Is it good?"', "      max_tokens: 77  # mine"]
    adopt(project, Wanted(name="mine", prompt="{text} So:"))  # the data is known by the task's name
    assert load_params().data.sets["mine"].prompt == "{text} So:" and load_params().data.sets["mine"].test
    # Another file of the same name takes the link's place.
    (theirs / "new").mkdir()
    adopt(project, wanted(theirs, data=(str(write_csv(theirs / "new/train.csv", toy_rows(60, 8))),)))
    assert os.readlink("own/mine/train.csv") == str((theirs / "new/train.csv").resolve())


def test_a_dry_run_writes_nothing(project, theirs, capsys):
    adopt(project, wanted(theirs), dry=True)
    said = capsys.readouterr().out
    assert lying(project) == {Path("params.yaml"): TEXT.encode()} and not list(Path("own").iterdir())
    assert "+    mine:" in said and "-tasks: [movies]" in said and "nothing was written" in said


def write_gguf(base, path):
    """A tiny Llama as llama.cpp's converter lays it out: rows of queries and keys are in pairs; a byte-level vocabulary."""
    import gguf

    model, writer = load_model(base, torch.float32), gguf.GGUFWriter(path, "llama")
    config, names = model.config, gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    for add, value in (
        (writer.add_vocab_size, config.vocab_size), (writer.add_context_length, config.max_position_embeddings),
        (writer.add_embedding_length, config.hidden_size), (writer.add_block_count, config.num_hidden_layers),
        (writer.add_feed_forward_length, config.intermediate_size), (writer.add_head_count, config.num_attention_heads),
        (writer.add_head_count_kv, config.num_key_value_heads), (writer.add_layer_norm_rms_eps, config.rms_norm_eps),
        (writer.add_rope_freq_base, 10000.0), (writer.add_rope_dimension_count, config.head_dim), (writer.add_file_type, 0),
    ):  # fmt: skip
        add(value)
    words = [*(chr(33 + i) for i in range(config.vocab_size - 1)), '!"']  # the last one is what the merge makes
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([1] * len(words))
    writer.add_token_merges([f"{words[0]} {words[1]}"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.float().numpy())
    for act in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        act()
    return path


def test_a_base_that_is_a_gguf_file(project, theirs, tmp_path):
    file = write_gguf(theirs / "base", theirs / "base.gguf")
    adopt(project, Wanted(base=str(file)))
    source = load_params().base
    assert (source.source, source.path, source.sha256) == ("path", str(file), sha256(file))
    size = base_stage._from_place(source, tmp_path)
    assert size == file.stat().st_size
    made, wanted_ = load_model(tmp_path, torch.float32), load_model(theirs / "base", torch.float32)
    ids = torch.tensor([[3, 5, 9]])
    with torch.no_grad():  # stored in bf16: two digits
        torch.testing.assert_close(made(ids).logits, wanted_(ids).logits, rtol=0.05, atol=0.02)
    change(Path(), "base.sha256", "0" * 64)
    with pytest.raises(CaloraError, match=sha256(file)):
        base_stage._from_place(load_params().base, tmp_path / "out")


def test_copies_instead_of_links(project, theirs):
    adopt(project, wanted(theirs, copy=True))
    assert not [path for path in Path("own").rglob("*") if path.is_symlink()]
    assert sha256(Path("own/mine/train.csv")) == sha256(theirs / "train.csv")
    Path("own/mine/train.csv").write_text("text,label\nnot theirs,1\n")
    with pytest.raises(CaloraError, match="a file of other content"):
        adopt(project, wanted(theirs))
    assert Path("own/mine/train.csv").read_text() == "text,label\nnot theirs,1\n"


def broken(theirs, name, text):
    (theirs / name).parent.mkdir(exist_ok=True)
    (theirs / name).write_text(text)
    return str(theirs / name)


def of_another_size(theirs):
    make_stranger(make_model("llama", theirs / "other", torch.float32), theirs / "stranger")
    return str(theirs / "stranger")


def without_tokenizer(theirs):
    shutil.copytree(theirs / "base", theirs / "bare")
    (theirs / "bare/tokenizer.json").unlink()
    return str(theirs / "bare")


def moods(theirs):
    rows = [{**row, "label": ("sad", "glad", "calm")[n % 3]} for n, row in enumerate(toy_rows(90, 5))]
    return str(write_csv(theirs / "moods.csv", rows))


REFUSED = {
    "nothing": (lambda t: Wanted(), "--base, --adapter or --data"),
    "no such base": (lambda t: wanted(t, base="nowhere"), "--base: expected a folder or file that is there, or a hub id"),
    "an adapter that is a GGUF": (lambda t: wanted(t, adapter=broken(t, "lora.gguf", "x")), "of a GGUF the one that"),
    "an encoder": (lambda t: wanted(t, base=str(make_model("bert", t / "bert"))), "which answers nothing"),
    "a base of pickles": (lambda t: wanted(t, base=str(Path(broken(t, "p/pytorch_model.bin", "x")).parent)), "only pickles"),
    "a base that is a file": (lambda t: wanted(t, base=str(t / "train.csv")), "a model folder, a GGUF file"),
    "a GGUF that is none": (lambda t: wanted(t, base=broken(t, "x.gguf", "x")), "x.gguf: expected a model"),
    "no tokenizer": (lambda t: wanted(t, base=without_tokenizer(t)), "the base's tokenizer"),
    "an adapter of another base": (lambda t: wanted(t, adapter=of_another_size(t)), "lora_A"),
    "no adapter": (lambda t: wanted(t, adapter=str(t / "base")), "adapter_config.json"),
    "no such column": (lambda t: wanted(t, prompt="{review}"), "columns among label, text, found {review}"),
    "no column": (lambda t: wanted(t, prompt="Good?"), "columns in braces"),
    "too few answers": (lambda t: wanted(t, answers=("no", "yes", "perhaps")), "each of the 2 labels 0, 1, found 3"),
    "answers alike": (lambda t: wanted(t, answers=("good", "good film")), "none of which begins with another"),
    "no label": (lambda t: wanted(t, label="mood"), "--label: expected a column among text, label"),
    "no data": (lambda t: wanted(t, data=("none.csv",)), "--data: expected files, a folder, or a hub id, found no none.csv"),
    "a broken file": (lambda t: wanted(t, data=(broken(t, "b.jsonl", '{"a": '),)), "b.jsonl, line 1"),
    "a missing text": (lambda t: wanted(t, data=(broken(t, "e.csv", "text,label\n,1\n" + "a b,0\nb c,1\n" * 19),)), "row 1"),
    "a name with a dot": (lambda t: wanted(t, name="a.b"), "letters, digits, _ and -"),
    "a folder of anything": (lambda t: Wanted(data=(str(t / "base"),)), "files called train"),
    "a task for a head of two labels": (lambda t: Wanted(base=str(make_model("classifier", t / "head")), data=(moods(t),)), "2 answers, as its head has"),
    "a chat without a template": (lambda t: wanted(t, chat=True), "a base with a chat template"),
    "an adapter for no task": (lambda t: Wanted(adapter=str(t / "lora"), name="unknown"), "what the adapter is for"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_refuses_it_refuses_in_a_line_and_nothing_is_written(project, theirs, case):
    make, words = REFUSED[case]
    given = make(theirs)
    with pytest.raises(CaloraError) as caught:
        adopt(project, given)
    assert words in str(caught.value) and "\n" not in str(caught.value), caught.value
    assert Path("params.yaml").read_text() == TEXT and not list(Path("own").iterdir())


def test_a_classifier_as_the_base(project, tmp_path, capsys):
    base = make_model("classifier", tmp_path / "head", torch.float32)
    data = write_csv(tmp_path / "mine.csv", toy_rows(90, 5))
    adopt(project, Wanted(base=str(base), data=(str(data),)))
    params, said = load_params(), capsys.readouterr().out
    assert params.base.sha256 == fingerprint(base) and params.data.sets["mine"].labels == [0, 1]
    assert "classifier of 2 labels" in said and "not for this base: m, q8_up_m" in said


def test_each_part_alone(project, theirs, tmp_path, capsys):
    # Data, while the base is not on this machine: lengths are guessed.
    adopt(project, Wanted(data=(str(theirs / "train.csv"), str(theirs / "test.csv"))))
    assert load_params().tasks == ["theirs"] and load_params().base.source == "pypi"
    assert "guessed" in capsys.readouterr().out
    # A base: an encoder-decoder, whose layers have other names.
    t5 = make_model("t5", tmp_path / "t5", torch.float32)
    adopt(project, Wanted(base=str(t5)))
    params = yaml.safe_load(Path("params.yaml").read_text())
    assert params["base"]["sha256"] == fingerprint(t5) and params["teacher"]["targets"] == ["all-linear"]
    model, qk = load_model(t5), params["methods"]["clm_lora_qk"]["start"]["lora"]["targets"]
    assert len(check_targets(model, params["teacher"]["targets"], 1)) == len(linear_layers(model))
    assert {name.rpartition(".")[2] for name in check_targets(model, qk, 1)} == {"q", "k"}
    # An adapter, for the run's only task.
    make_stranger(t5, tmp_path / "lora", target_modules=["q", "v"])
    adopt(project, Wanted(adapter=str(tmp_path / "lora")))
    assert load_params().teacher.adapters["theirs"].path == "own/theirs-lora"


def test_splits_that_have_no_file_are_split_off_train(project, theirs):
    everything = write_csv(theirs / "all.csv", toy_rows(400, 3))
    adopt(project, Wanted(base=str(theirs / "base"), data=(str(everything),), answers=WORDS))
    params = load_params()
    assert params.tasks == ["all"] and params.data.sets["all"].test is None
    download.main(params, "all")
    rows = {
        split: {json.loads(line)["text"] for line in Path(f"data/all/{split}.jsonl").read_text().splitlines()}
        for split in ("train", "validation", "test")
    }
    assert sum(map(len, rows.values())) == len(set().union(*rows.values())) == 400
    assert 70 <= len(rows["test"]) <= 130 and 20 <= len(rows["validation"]) <= 60  # shares of 0.25 and 0.1


def test_a_folder_as_glue_lays_it_out(project, theirs):
    """Test labels are withheld (-1), and the validation file calls the label otherwise."""
    folder = theirs / "cb"
    folder.mkdir()
    for split, rows in (("train", toy_rows(60, 5)), ("dev", toy_rows(20, 4)), ("test", toy_rows(10, 7))):
        rows = [{"idx": i, "sentence": row["text"], "answer": bool(row["label"])} for i, row in enumerate(rows)]
        rows = [{**row, "answer": -1} for row in rows] if split == "test" else rows
        rows = [{"label": row.pop("answer"), **row} for row in rows] if split == "dev" else rows
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    adopt(project, Wanted(base=str(theirs / "base"), data=(str(folder),), answers=WORDS))
    entry = load_params().data.sets["cb"]
    assert entry.test == "own/cb/dev.jsonl" and entry.validation is None and entry.labels == [False, True]
    assert (entry.label.train, entry.label.test) == ("answer", "label") and entry.answers == [" bad", " good"]
    assert entry.prompt == "Sentence: {sentence}\nAnswer:"
    download.main(load_params(), "cb")
    assert len(Path("data/cb/test.jsonl").read_text().splitlines()) == 20


def test_answers_that_are_written_freely(project, theirs):
    """As SQuAD has them on the hub: lists of texts; the longest answer is allowed for."""
    rows = [
        {"id": f"q{i}", "context": f"the film was {row['text']}", "question": f"what w{i} ?",
         "answers": {"text": ["good film"] * (i % 2 + 1), "answer_start": [0]}}
        for i, row in enumerate(toy_rows(60, 5))
    ]  # fmt: skip
    (theirs / "questions.json").write_text(json.dumps(rows))
    adopt(project, Wanted(base=str(theirs / "base"), data=(str(theirs / "questions.json"),)))
    entry = load_params().data.sets["questions"]
    assert (entry.answers, entry.labels, entry.label, entry.max_new_tokens) == ([], [], "answers", 2)
    assert entry.prompt == "Context: {context}\nQuestion: {question}\nAnswer:"
    download.main(load_params(), "questions")
    assert json.loads(Path("data/questions/test.jsonl").read_text().splitlines()[0])["answer"]


def test_columns_are_told_apart():
    rows = [{"id": i, "Title": f"a b {i}", "mood": "sad" if i % 3 else "glad", "n": str(i % 5)} for i in range(30)]
    assert label_column(rows, None, ["n"]) == "mood" and text_columns(rows, "mood") == ["Title"]
    with pytest.raises(CaloraError, match="give --label"):
        label_column(rows, None, [])  # mood or n
    assert choice(rows, "mood").values == ("glad", "sad") and choice(rows, "Title").values == ()
    assert choice([{"y": value} for value in ("1.0", "0", "-1", "1", "0")], "y").values == (0, 1)
    assert choice([{"y": value} for value in ("True", "false", "true", "False")], "y").values == (False, True)
    assert choice([{"y": v} for v in ("007", "08", "007", "08")], "y").values == ("007", "08")
    assert choice([{"y": {"text": ["a"]}}] * 4, "y").values == ()
    assert choice([{"y": 1}] * 4, "y", ["neg", "pos"]).values == (0, 1)
    assert matched(["glad", "sad"], ["Sad", "Glad"]) == ["sad", "glad"] and matched([0, 1], ["b", "a"]) == [0, 1]
    assert proposed_answers([0, 1, 2], []) == ["A", "B", "C"] and proposed_answers([0, 1], ["not_ok", "ok"]) == [
        "not ok",
        "ok",
    ]
    assert proposed_prompt(["question_1", "text"], "label", True) == "Question 1: {question_1}\nText: {text}\nLabel:"


def test_a_prompt_in_the_bases_chat_template(project, theirs):
    tokenizer = load_tokenizer(theirs / "base")
    tokenizer.chat_template = "{% for m in messages %}Review: {{ m.content }} {% endfor %}Sentiment: { }"
    tokenizer.add_special_tokens({"bos_token": AddedToken("<pad>")})
    tokenizer.save_pretrained(theirs / "base")
    adopt(project, wanted(theirs, chat=True, prompt="the {text} is"))
    prompt = load_params().data.sets["mine"].prompt
    assert prompt == "Review: the {text} is Sentiment: {{ }}" == in_template(tokenizer, "the {text} is")
    row = {"text": "film", "label": 1}
    expected = tokenizer.apply_chat_template([{"role": "user", "content": "the film is"}], tokenize=False)
    assert Task("t", prompt, (), 9, 1).render(row) == expected
    text = Path("params.yaml").read_text()
    adopt(project, Wanted(name="mine", chat=True))  # once is enough
    assert Path("params.yaml").read_text() == text


SIZES = {
    "int8": [{"quantize": {"format": "int8", "embeddings": "int8"}}],
    "int4": [{"quantize": {"format": "int4", "group": 64, "symmetric": False, "embeddings": "int4"}}],
    "int2 and others": [{"quantize": {"format": "int2", "group": 32, "layers": {"up_proj": "int8"}}}],
    "nf4": [{"quantize": {"format": "nf4"}}],
    "2:4": [{"prune": {"score": "magnitude", "pattern": "2:4"}}],
    "2:4 int3 recover": [
        {"prune": {"score": "magnitude", "pattern": "2:4"}},
        {"quantize": {"format": "int3", "group": 64, "symmetric": False}},
        {"recover": {"rank": 4, "fit": "after", "format": "int8"}},
    ],
    "half of the neurons": [{"shrink": {"neurons": 0.5, "importance": "activation", "compensate": False}}],
}  # fmt: skip


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("wide") / "base", torch.bfloat16, hidden=128, inner=256)


@pytest.mark.parametrize("case", SIZES)
def test_bytes_are_known_before_any_work(wide, tmp_path, case):
    """Against what compression really stores, without the header of the file."""
    model = load_model(wide, torch.bfloat16)
    examples = encode_all(TASK, load_tokenizer(wide), toy_rows(8, 1))
    save(model, compress(model, SIZES[case], Calibration(examples)), tmp_path / "out", wide)
    file = tmp_path / "out/model.safetensors"
    stored = file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")
    assert preview(outline(wide), SIZES[case]).bytes == pytest.approx(stored, rel=0.02)


def test_a_recipe_that_does_not_fit_is_told_beforehand(wide):
    with pytest.raises(CaloraError, match=r"recover\.rank"):
        preview(outline(wide), [*SIZES["int8"], {"recover": {"rank": 512, "fit": "after", "format": "int8"}}])


def test_estimates_are_within_a_factor_of_two_of_a_run_that_was_measured(tmp_path, monkeypatch):
    """`make run` of SmolLM2-135M on two cores of an AMD EPYC, with the speed that was measured there."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    make_tokenizer(tmp_path, end=False)
    params = yaml.safe_load(TEXT)
    params["compress"]["calibration"] |= {"texts": 128}
    params["compress"]["q3"][1]["recover"]["tune"]["steps"] = 60
    params |= {"compare": ["clm", "clm_inherited", "calora_free", "clm_lora", "calora"]}
    monkeypatch.setattr("calora.preview.speed.speed", lambda *_: Speed(191.0, 91.0, "bfloat16", 2))
    texts = Texts(params["data"]["sizes"], 29.2, 80)
    rows, _ = outlook(params, outline(tmp_path), texts, brought=False)
    row = next(row for row in rows if row.name == "q3")
    measured = {"megabytes": 81.0, "memory": 2.485, "compress": 689 / 60, "whole": 32.4}  # MB, GB, minutes
    for name, value in measured.items():
        assert value / 2 < getattr(row, name) < value * 2, name
    assert row.megabytes == pytest.approx(81.0, rel=0.01)
    brought, _ = outlook(params, outline(tmp_path), texts, brought=True)
    assert next(row for row in brought if row.name == "q3").whole < row.whole  # no teacher to train


def commands(folder, address, *several):
    """`adopt` with each of the arguments, one after another in one process; their exit codes are its output's last line."""
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(folder / "hf")}
    code = f"from pipeline.__main__ import main; print([main(['adopt', *given]) for given in {several!r}])"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)


def test_everything_from_the_hub(hub, tmp_path):  # noqa: F811
    root, address = hub
    base = make_model("llama", root / "models/us/tiny", torch.float32)
    make_stranger(base, root / "models/us/lora")
    (root / "datasets/us/toy").mkdir(parents=True)
    for split, count in (("train", 60), ("test", 16)):
        rows = "".join(json.dumps(row) + "\n" for row in toy_rows(count, len(split)))
        (root / f"datasets/us/toy/{split}.jsonl").write_text(rows)
    folder = tmp_path / "p"
    folder.mkdir()
    for name in ("calora", "stages", "pipeline"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "own").mkdir()
    (folder / "params.yaml").write_text(TEXT)
    given = ("--base", f"us/tiny@{COMMIT}", "--adapter", "us/lora", "--data", "us/toy", "--answers", "bad,good")
    result = commands(folder, address, given, ("--base", "us/none"))
    assert result.stdout.splitlines()[-1] == "[0, 1]", result.stderr
    params = load_params(folder / "params.yaml")
    assert params.base.model_dump() == {
        "source": "hub", "repo": "us/tiny", "revision": COMMIT, "sha256": fingerprint(base),
    }  # fmt: skip
    entry = params.data.sets["toy"]
    assert (entry.source, entry.revision, entry.train, entry.test) == ("hub", COMMIT, "train", "test")
    assert entry.answers == [" bad", " good"] and params.tasks == ["toy"]
    lora = folder / params.teacher.adapters["toy"].path
    assert fingerprint(lora) == fingerprint(root / "models/us/lora") and not (lora / "adapter_config.json").is_symlink()
    told = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(told) == 1 and told[0].startswith("error: --base us/none") and "Traceback" not in result.stderr


def test_the_command_line(project, theirs, monkeypatch, capsys):
    monkeypatch.setattr("pipeline.__main__.ROOT", project)
    given = ["--base", str(theirs / "base"), "--data", str(theirs / "train.csv"), "--answers", "negative,positive"]
    assert main(["adopt", *given, "--dry-run"]) == 0 and Path("params.yaml").read_text() == TEXT
    assert main(["adopt", *given, "--label", "mood"]) == 1
    assert capsys.readouterr().err.startswith("error: --label: expected a column among text, label")
