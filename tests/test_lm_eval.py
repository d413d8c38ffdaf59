"""lm-evaluation-harness: what is opened for it, and, where it is installed, what it computes with that."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import calora.lm_eval as harness
from calora.adapters.folder import write_adapter
from calora.adapters.lora import Adapter, lora_config
from calora.compressed import load
from calora.compression import compress
from calora.compression.walk import Calibration
from calora.errors import CaloraError
from calora.inheritance.fresh import fresh_adapter
from calora.models.loading import load_model, load_tokenizer
from calora.models.tasks import encode_all
from calora.saving import save
from tests.conftest import TASK, make_model, toy_rows

CONTEXT, ANSWERS = "Review: the film was good Sentiment:", (" positive", " negative")
TASK_YAML = """
task: toy_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Review: {{{{text}}}} Sentiment:"
doc_to_choice: ["negative", "positive"]
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A packed fp32 model, and an adapter that turns its answers."""
    place = tmp_path_factory.mktemp("lm_eval")
    base = make_model("llama", place / "base", torch.float32)
    model, examples = load_model(base, torch.float32), encode_all(TASK, load_tokenizer(base), toy_rows(8, 1))
    save(model, compress(model, [{"quantize": {"format": "int8"}}], Calibration(examples)), place / "c", base)
    compressed = load(place / "c")
    adapter = fresh_adapter(compressed, lora_config(4, 8, ["q_proj", "down_proj"]), {}, 0)
    torch.manual_seed(0)
    lora = {key: 0.5 * torch.randn(tensor.shape) for key, tensor in adapter.lora.items()}
    meta = {"task": TASK.to_json(), "compressed_fingerprint": compressed.calora_fingerprint}
    write_adapter(place / "a", Adapter(adapter.config, lora, meta=meta), str(place / "c"), "", torch.float32)
    return place / "c", place / "a"


def likelihood(model, answer):
    """log p(answer | context), two lines of torch."""
    ids, count = model.calora_tokenizer(CONTEXT + answer, return_tensors="pt").input_ids, len(answer.split())
    with torch.no_grad():
        logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    return float(logs[-count:].sum())


def test_what_is_opened_computes_with_its_adapter(folders):
    path, adapter = map(str, folders)
    bare, with_it, dense = (
        harness.opened(path), harness.opened(path, adapter), harness.opened(path, adapter, dense=True),
    )  # fmt: skip
    for answer in ANSWERS:
        assert abs(likelihood(bare, answer) - likelihood(with_it, answer)) > 0.01
        assert likelihood(with_it, answer) == pytest.approx(likelihood(dense, answer), abs=1e-4)
    with pytest.raises(CaloraError, match="adapter"):
        harness.opened(path, path)


def test_without_the_harness_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    assert harness.main(["--tasks", "piqa"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: calora.lm_eval: expected lm-evaluation-harness") and said.count("\n") == 1


def test_it_gives_the_harness_an_open_model_and_its_tokenizer(folders, monkeypatch):
    """Against a stand-in for the harness, which keeps what its own model of transformers is given."""

    class Registry(dict):
        def register(self, name):
            return lambda made: self.setdefault(name, made)

    class HFLM:
        def __init__(self, **given):
            self.given = given

    ran = []
    for name in ("lm_eval", "lm_eval.api", "lm_eval.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    registry = SimpleNamespace(model_registry=Registry())
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", registry)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", SimpleNamespace(HFLM=HFLM))
    cli = SimpleNamespace(cli_evaluate=lambda: ran.append(list(sys.argv)))
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", cli)
    monkeypatch.setattr(sys, "argv", ["x"])
    path, adapter = map(str, folders)
    made = harness.register()(path=path, adapter=adapter, batch_size=4)
    assert made.given["batch_size"] == 4 and made.given["tokenizer"] is made.given["pretrained"].calora_tokenizer
    expected = likelihood(harness.opened(path, adapter), ANSWERS[0])
    assert likelihood(made.given["pretrained"], ANSWERS[0]) == pytest.approx(expected, abs=1e-6)
    assert harness.register() is type(made)
    assert harness.main(["--tasks", "a"]) == 0 and harness.main(["ls", "tasks"]) == 0
    harness.main(["run", "--model", "hf"])
    assert [line[1:] for line in ran] == [
        ["run", "--model", "calora", "--tasks", "a"], ["ls", "tasks"], ["run", "--model", "hf"],
    ]  # fmt: skip


def test_the_harness_scores_a_local_task(folders, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    path, adapter = map(str, folders)
    rows = toy_rows(24, 2)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "toy.yaml").write_text(TASK_YAML.format(data=tmp_path / "rows.jsonl"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    given = ["--model_args", f"path={path},adapter={adapter}", "--tasks", "toy_choice", "--include_path", str(tmp_path)]
    assert harness.main([*given, "--device", "cpu", "--batch_size", "4", "--output_path", str(tmp_path / "out")]) == 0
    (found,) = (tmp_path / "out").rglob("results*.json")
    accuracy = json.loads(found.read_text())["results"]["toy_choice"]["acc,none"]
    model = harness.opened(path, adapter)
    answers = model.answer([str(row["text"]) for row in rows])
    assert accuracy == pytest.approx(
        sum(a == TASK.answers[row["label"]] for a, row in zip(answers, rows, strict=True)) / 24
    )

    from lm_eval.api.instance import Instance

    lm = harness.register()(path=path, adapter=adapter, device="cpu")
    asked = [
        Instance(request_type="loglikelihood", doc={}, arguments=(CONTEXT, answer), idx=i)
        for i, answer in enumerate(ANSWERS)
    ]
    for (log, _), answer in zip(lm.loglikelihood(asked), ANSWERS, strict=True):
        assert log == pytest.approx(likelihood(model, answer), abs=1e-4)  # fp32 sums of a few tokens
