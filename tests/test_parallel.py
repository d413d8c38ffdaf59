"""Several processes train what one does; a process alone takes the whole batch."""

import json
import os
import subprocess
import sys

import pytest
import torch

from calora.common.parallel import share
from stages import common
from tests.conftest import ROOT

# Runs as `python FILE MODEL OUT`, alone or under accelerate.
TRAINING = """
import json, sys, torch
from pathlib import Path
from calora.adapters.lora import lora_config
from calora.distillation.distill import finetune
from calora.evaluation.predict import accuracy
from calora.models.families import load_model, load_tokenizer
from calora.common.parallel import first, processes
from calora.models.tasks import encode_all
from calora.distillation.training import Schedule
from tests.conftest import TASK, toy_rows

folder = Path(sys.argv[1])
tokenizer = load_tokenizer(folder)
examples, scored = (encode_all(TASK, tokenizer, toy_rows(count, 1)) for count in (24, 25))
model = load_model(folder, torch.float32, attention="eager")
adapter, history = finetune(
    model, lora_config(4, 2, ["q_proj", "k_proj"]), examples, lambda: accuracy(model, TASK, tokenizer, scored, 8),
    batch_size=4, schedule=Schedule(8, 5e-3, 2, 1.0, 4, 30.0), seed=0,
)
norms = {name: float(value.norm()) for name, value in adapter.lora.items()}
if first():
    Path(sys.argv[2]).write_text(json.dumps({"history": history.to_json(), "tokens": history.tokens, "norms": norms, "processes": processes()}))
"""


def test_two_processes_train_what_one_does(llama32, tmp_path):
    script = tmp_path / "training.py"
    script.write_text(TRAINING)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    many = [*common.ACCELERATE, "--num_processes", "2"]
    found = []
    for options, out in (([], tmp_path / "one.json"), (many, tmp_path / "two.json")):
        subprocess.run(
            [sys.executable, *options, str(script), str(llama32), str(out)],
            env=env,
            check=True,
            capture_output=True,
            timeout=120,
        )
        found.append(json.loads(out.read_text()))
    one, two = found
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["tokens"] == two["tokens"]
    losses = [[row["loss"] for row in each["history"]["losses"]] for each in found]
    scores = [[row["score"] for row in each["history"]["scores"]] for each in found]
    assert scores[0] == pytest.approx(scores[1], abs=1.5 / 25)  # one answer may tip over
    # fp32 sums in another order, over eight steps
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert list(two["norms"].values()) == pytest.approx(list(one["norms"].values()), rel=1e-3)


def test_shares_are_of_one_size_and_hold_the_batch(monkeypatch):
    class State:
        num_processes, process_index = 3, 0

    assert share([5, 6, 7]) == [5, 6, 7]
    monkeypatch.setattr("calora.common.parallel.state", State)
    shares = []
    for State.process_index in range(3):
        shares.append(share([0, 1, 2, 3]))
    assert {len(each) for each in shares} == {2} and {i for each in shares for i in each} == {0, 1, 2, 3}


@pytest.mark.parametrize(("gpus", "asked", "started"), [(4, None, ["4"]), (0, "2", ["2"]), (1, None, [])])
def test_a_stage_that_trains_starts_a_process_for_each_gpu(monkeypatch, gpus, asked, started):
    commands = []
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("CALORA_PROCESSES", raising=False)
    if asked:
        monkeypatch.setenv("CALORA_PROCESSES", asked)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(os, "execv", lambda _, command: commands.append(command))
    common.launch()
    assert [command[command.index("--num_processes") + 1] for command in commands] == started
