"""Several processes train what one does; a process alone takes the whole batch."""

import json
import os
import runpy
import subprocess
import sys
from importlib.machinery import ModuleSpec

import pytest
import torch

from calora.adapters.lora import inject, lora_config
from calora.common.parallel import share, weight
from calora.distillation.distill import trainable
from calora.distillation.loss import Weights, items, loss_of
from calora.distillation.targets import Targets, write_targets
from calora.models.families import family_of
from calora.models.loading import load_model, load_tokenizer
from calora.models.tasks import Task, encode_all
from stages import common
from tests.conftest import ROOT, TASK, toy_rows

# FILE MODEL OUT, run in this process, and in two by accelerate.
TRAINING = """
import json, sys, torch
from pathlib import Path
from calora.adapters.lora import lora_config
from calora.distillation.distill import finetune
from calora.evaluation.predict import score
from calora.models.loading import load_model, load_tokenizer
from calora.common.parallel import is_first, processes
from calora.models.tasks import Task, encode_all
from calora.distillation.training import Schedule
from tests.conftest import TASK, toy_rows

folder = Path(sys.argv[1])
tokenizer = load_tokenizer(folder)
# Answers of one to five words in batches of five: two shares differ in texts and in answer tokens.
written = Task("toy", TASK.prompt, (), 32, 8)
rows = toy_rows(24, 1)
examples = encode_all(written, tokenizer, [{**row, "answer": " ".join(row["text"].split()[: 1 + i % 5])} for i, row in enumerate(rows)])
scored = encode_all(TASK, tokenizer, toy_rows(25, 1))
model = load_model(folder, torch.float32, attention="eager")
adapter, history = finetune(
    model, lora_config(4, 2, ["q_proj", "k_proj"]), examples, lambda: score(model, TASK, tokenizer, scored, 8),
    batch_size=5, schedule=Schedule(8, 5e-3, 2, 1.0, 4, 30.0), seed=0,
)
norms = {name: float(value.norm()) for name, value in adapter.lora.items()}
if is_first():
    Path(sys.argv[2]).write_text(json.dumps({"history": history.to_json(), "tokens": history.tokens, "norms": norms, "processes": processes()}))
"""


def test_two_processes_train_what_one_does(llama32, tmp_path, monkeypatch):
    script = tmp_path / "training.py"
    script.write_text(TRAINING)
    arguments = [str(script), str(llama32)]
    monkeypatch.setattr(sys, "argv", [*arguments, str(tmp_path / "one.json")])
    runpy.run_path(str(script))
    subprocess.run(
        [sys.executable, *common.ACCELERATE, "--num_processes", "2", *arguments, str(tmp_path / "two.json")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        timeout=120,
    )
    found = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two")]
    one, two = found
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["tokens"] == two["tokens"]
    losses = [[row["loss"] for row in each["history"]["losses"]] for each in found]
    scores = [[row["score"] for row in each["history"]["scores"]] for each in found]
    assert scores[0] == pytest.approx(scores[1], abs=1.5 / 25)  # one answer may tip over
    # fp32 sums in another order, over eight steps
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert list(two["norms"].values()) == pytest.approx(list(one["norms"].values()), rel=1e-3)


def test_shares_hold_each_text_once_and_are_never_empty(monkeypatch):
    class State:
        num_processes, process_index = 3, 0

    assert share([5, 6, 7]) == [5, 6, 7]
    monkeypatch.setattr("calora.common.parallel.state", State)

    def shares(batch):
        found = []
        for State.process_index in range(3):
            found.append(share(batch))
        return found

    assert shares([5, 6, 7, 8]) == [[5, 8], [6], [7]]
    assert shares([5, 6]) == [[5], [6], [5]]


def gradient_of(model, examples, targets, indices, whole):
    """Of a loss with every part, over the examples at `indices` of a batch `whole`."""
    family, weights = family_of(model), Weights(1.0, {"decoder": 2.0}, 0.5, 1.5)
    batch = family.collate([examples[i] for i in indices], model)
    output, target = family.forward(model, batch, None), targets.read(indices, model.device)
    losses = loss_of(output, batch, target, weights, True, lambda kind: weight(items(batch, kind), whole))
    return torch.cat([g.flatten() for g in torch.autograd.grad(losses["loss"], trainable(model))]), losses


@pytest.mark.parametrize("batch", [[0, 1, 2], [3]])
def test_unequal_shares_give_the_gradient_of_the_whole_batch(batch, llama32, tmp_path, monkeypatch):
    tokenizer, model = load_tokenizer(llama32), load_model(llama32, torch.float32)
    task = Task("toy", TASK.prompt, (), 32, 8)
    answers = ["good", "a dull film", "the plot was superb", "bad"]
    examples = encode_all(task, tokenizer, [{**r, "answer": a} for r, a in zip(toy_rows(4, 1), answers, strict=True)])
    write_targets(tmp_path, model, task, tokenizer, examples, 4, 5, "targets")
    targets = Targets(tmp_path)
    inject(model, lora_config(4, 2, ["q_proj", "v_proj"]))
    for parameter in trainable(model):
        parameter.data.normal_(generator=torch.Generator().manual_seed(len(parameter)), std=0.1)
    expected, losses = gradient_of(model, examples, targets, batch, batch)

    class State:
        num_processes, process_index = 2, 0

    found, counts = [], ([], [])

    def counted(own):
        counts[State.process_index].append(own)
        return 1.0

    monkeypatch.setattr("calora.common.parallel.state", State)
    monkeypatch.setattr("calora.common.parallel.total", counted)
    for State.process_index in (0, 1):  # the counts come in the same order in both
        gradient_of(model, examples, targets, share(batch), batch)
    for State.process_index in (0, 1):
        sums = iter([sum(each) for each in zip(*counts, strict=True)])
        monkeypatch.setattr("calora.common.parallel.total", lambda _, sums=sums: next(sums))
        found.append(gradient_of(model, examples, targets, share(batch), batch))
    torch.testing.assert_close((found[0][0] + found[1][0]) / 2, expected, rtol=1e-4, atol=1e-6)
    for name, value in losses.items():
        torch.testing.assert_close((found[0][1][name] + found[1][1][name]) / 2, value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("gpus", "asked", "started"), [(4, None, ["4"]), (0, "2", ["2"]), (1, None, [])])
def test_a_stage_that_trains_starts_a_process_for_each_gpu(monkeypatch, gpus, asked, started):
    commands = []
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("CALORA_PROCESSES", raising=False)
    if asked:
        monkeypatch.setenv("CALORA_PROCESSES", asked)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(os, "execv", lambda _, command: commands.append(command))
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", ModuleSpec("stages.teacher", None))
    common.launch()
    assert [command[command.index("--num_processes") + 1] for command in commands] == started
