"""One `calora.load` for torch and llama.cpp: the same answers, an export that is made once, and the faster one measured once."""

import asyncio
import csv
import importlib.util

import pytest
import torch

import calora
from calora.__main__ import main
from calora.compressed import Compressed
from calora.device import faster
from calora.device.export import export
from calora.errors import CaloraError
from calora.runtimes import load
from tests.test_export import RECOVER, Task, make_adapter, make_compressed, task_rows

pytestmark = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
LETTERS = Task("letters", "Review: {text}", tuple("abcdefgh"), 64, 4)
COPA = Task("copa", "{text}", (" {one}", " {two}"), 64, 4)
ROWS = task_rows()
TEXTS = [row["text"] for row in ROWS]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(compressed folder, folders of two adapters), all in fp32."""
    folder = tmp_path_factory.mktemp("made")
    prune = {"prune": {"score": "magnitude", "pattern": "2:4"}}
    compressed = make_compressed(folder, [prune, RECOVER], intermediate_size=128, dtype=torch.float32)
    adapters = [make_adapter(folder / task.name, compressed, task=task.to_json()) for task in (LETTERS, COPA)]
    return compressed, *adapters


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CALORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def both(made):
    """The model in torch and in llama.cpp."""
    compressed, letters, _ = made
    return load(compressed, letters), load(compressed, letters, runtime="llama", threads=1)


def test_both_runtimes_say_the_same(made, both):
    ours, theirs = both
    assert len(set(ours.answer(TEXTS))) > 2
    for name in ("letters", "copa"):
        for model in both:
            if name == "copa":
                model.load_adapter(made[2], name)
                assert model.answer(TEXTS)  # another one stays active
            model.set_adapter(name)
        assert theirs.answer(ROWS) == ours.answer(ROWS)
        for a, b in zip(theirs.choose(ROWS), ours.choose(ROWS), strict=True):
            assert (a.answer, a.answers, a.tokens, a.label) == (b.answer, b.answers, b.tokens, b.label)
            assert a.probabilities == pytest.approx(b.probabilities, abs=0.01)
    for model in both:
        model.unload_adapter("copa")
        with pytest.raises(CaloraError, match="an active adapter"):
            model.answer(TEXTS)
    alone = [model.complete(["a film ", "the plot"], 1) for model in both]
    assert alone[0] == alone[1]
    for model in both:
        model.set_adapter("letters")


def test_it_works_where_an_event_loop_runs(both):
    async def notebook():
        return both[1].answer(TEXTS[:2])

    assert asyncio.run(notebook()) == both[0].answer(TEXTS[:2])


def test_mistakes_are_told_alike(made, both):
    compressed, _, copa = made
    for model in both:
        for work, said in (
            (lambda model=model: model.load_adapter(copa, "letters"), "a name that is free"),
            (lambda model=model: model.set_adapter("film"), r"one of \['letters'\], found film"),
            (lambda model=model: model.unload_adapter("film"), r"one of \['letters'\], found film"),
            (lambda model=model: model.load_adapter(compressed, "x"), "calora.json"),
            (lambda model=model: model.answer([{"film": "x"}]), "text in column 'text'"),
        ):
            with pytest.raises(CaloraError, match=said):
                work()
        assert model.answer(TEXTS[:1])  # as before
    with pytest.raises(CaloraError, match="context"):
        both[1].complete(["a " * 3000], 1)
    with pytest.raises(CaloraError, match=r"options that llama\.cpp has, found dense"):
        load(compressed, runtime="llama", dense=True)
    with pytest.raises(CaloraError, match="one of torch, llama, auto, found onnx"):
        load(compressed, runtime="onnx")


def test_an_export_is_made_once_and_again_if_it_is_broken(made, capsys, monkeypatch):
    compressed, letters, _ = made
    model = load(compressed, letters, runtime="llama", threads=1)
    assert capsys.readouterr().err == ""  # the fixture made it
    path = model.catalogue.base
    path.write_bytes(path.read_bytes()[:-8])
    load(compressed, runtime="llama", threads=1)
    assert "is kept in" in capsys.readouterr().err
    monkeypatch.setattr("calora.device.cache.versions", lambda: {"calora": "later"})
    load(compressed, runtime="llama", threads=1)
    assert "is kept in" in capsys.readouterr().err
    assert [one.name for one in path.parents[1].iterdir()] == [path.parent.name]


def test_an_exported_folder_is_for_llama_cpp(made, tmp_path, both):
    compressed, letters, copa = made
    export(compressed, [letters], tmp_path / "out", adapter_type="F32")
    model = calora.load(tmp_path / "out", "letters", runtime="auto", threads=1)
    assert model.answer(TEXTS) == both[0].answer(TEXTS) and model.adapters == ["letters"]
    with pytest.raises(CaloraError, match="the folder of a compressed model, found the export"):
        model.load_adapter(copa, "copa")
    with pytest.raises(CaloraError, match="a compressed model, for torch, found an export"):
        load(tmp_path / "out")
    with pytest.raises(CaloraError, match=r"one of \['letters'\], found copa"):
        load(tmp_path / "out", "copa", runtime="llama")


@pytest.mark.parametrize("quick", ["torch", "llama"])
def test_auto_measures_once(made, tmp_path, monkeypatch, capsys, quick):
    compressed, letters, copa = made
    gguf = load(compressed, runtime="llama").catalogue.folder
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / gguf.name).symlink_to(gguf)
    monkeypatch.setenv("CALORA_CACHE", str(tmp_path))
    measured = []

    def seconds(model, task):
        name = "torch" if isinstance(model, Compressed) else "llama"
        measured.append((name, task and task.name))
        assert faster_seconds(model, task) > 0
        return 0.01 if name == quick else 0.02

    faster_seconds = faster._seconds
    monkeypatch.setattr(faster, "_seconds", seconds)
    monkeypatch.setattr(faster, "TEXTS", 2)
    monkeypatch.setattr(faster, "WRITTEN", 2)

    def opened(adapter, threads=1):
        model = load(compressed, adapter, runtime="auto", threads=threads)
        assert isinstance(model, Compressed) == (quick == "torch")
        return model, capsys.readouterr().err

    model, told = opened(letters)
    other = {"torch": "llama", "llama": "torch"}[quick]
    assert (
        told
        == f"calora: {quick} answers letters faster: 10 ms a text, {other} 20 (measured now, remembered in {tmp_path}/runtimes.json)\n"
    )
    assert measured == [("torch", "letters"), ("llama", "letters")] and len(model.answer(TEXTS)) == len(TEXTS)
    assert "measured before" in opened(letters)[1] and len(measured) == 2
    for again in ((copa,), (None,), (letters, 2)):
        assert "measured now" in opened(*again)[1] and "measured before" in opened(*again)[1]
    assert len(measured) == 8 and measured[4] == ("torch", None)
    (tmp_path / "runtimes.json").write_text("{")
    assert "measured now" in opened(letters)[1]


def test_auto_is_torch_where_llama_cpp_is_no_way(made, monkeypatch, capsys):
    compressed, letters, _ = made
    curved = make_adapter(letters.parent / "curved", compressed, activation="gelu")
    assert isinstance(load(compressed, curved, runtime="auto"), Compressed)
    told = capsys.readouterr().err
    assert "calora: torch, because llama.cpp is no way here" in told and "activation: identity" in told
    with pytest.raises(CaloraError, match=r"calora.json: expected a JSON file"):
        load(compressed, compressed, runtime="auto")
    monkeypatch.setitem(__import__("sys").modules, "xllamacpp", None)
    assert isinstance(load(compressed, letters, runtime="auto"), Compressed)
    assert "pip install 'calora[device]'" in capsys.readouterr().err
    with pytest.raises(CaloraError, match="xllamacpp"):
        load(compressed, letters, runtime="llama")


@pytest.mark.parametrize("runtime", ["torch", "llama"])
def test_a_table_is_classified_by_either(made, tmp_path, runtime, both, capsys):
    compressed, letters, _ = made
    file = tmp_path / "in.csv"
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([["text"], *([text] for text in TEXTS)])
    command = ["classify", str(file), "--folder", str(compressed), "--runtime", runtime, "--threads", "1"]
    assert main(command) == 1 and "--adapter FOLDER" in capsys.readouterr().err
    assert main([*command, "--adapter", str(letters)]) == 0
    with (tmp_path / "in.classified.csv").open(newline="") as stream:
        assert [row["label"] for row in csv.DictReader(stream)] == both[0].answer(TEXTS)
