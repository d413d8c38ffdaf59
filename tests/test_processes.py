"""Every stage that trains, on two processes, against the same stages on one: trained and imported teacher, scored and generated task."""

import contextlib
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stages.common import ACCELERATE
from stages.config import load_params
from tests.conftest import change, make_project
from tests.test_stages import LAST, calibration_texts

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CALORA_DTYPE": "float32"}
FIRST = (("methods",), ("base",), ("download", "toy"), ("compress", "q8_up"))
TRAINING = (
    ("teacher", "toy"),
    ("targets", "toy"),
    ("small", "toy"),
    ("inherit", "toy", "q8_up"),
    ("distill", "toy", "q8_up", "calora"),
)
SCORES = (("reference", "toy"), ("score", "toy", "q8_up", "calora"), *LAST)


def alone(folder: Path, stages) -> None:
    """The stages in this process."""
    params = load_params(folder / "params.yaml")
    with contextlib.chdir(folder):
        for name, *rest in stages:
            importlib.import_module(f"stages.{name}").main(params, *rest)


def together(folder: Path, name: str, *rest: str) -> None:
    """One stage in two processes, as `stages.common.launch` starts them."""
    command = [sys.executable, *ACCELERATE, "--num_processes", "2", "--module", f"stages.{name}", *rest]
    done = subprocess.run(command, cwd=folder, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("answers", "imported"), [(True, False), (False, True)])
def test_two_processes_make_what_one_does(tmp_path, monkeypatch, answers, imported):
    monkeypatch.setenv("CALORA_DTYPE", "float32")
    one = make_project(tmp_path / "one", answers=answers)
    change(one, "compare", ["calora"])
    change(one, "evaluate.packed", [])
    calibration_texts(one)
    if imported:
        shutil.copytree(teacher_of(tmp_path), one / "own/adapter")
        change(one, "teacher.adapters", {"toy": {"path": "own/adapter"}})
    alone(one, FIRST)
    two = tmp_path / "two"
    shutil.copytree(one, two, symlinks=True)
    alone(one, (*TRAINING, *SCORES))
    for stage in TRAINING:
        if stage[0] in ("targets", "inherit"):
            alone(two, [stage])
        else:
            together(two, *stage)
    alone(two, SCORES)
    for history in ("models/calora/toy/q8_up/history.json", *([] if imported else ["models/teacher/toy/history.json"])):
        losses = [[row["loss"] for row in json.loads((f / history).read_text())["losses"]] for f in (one, two)]
        assert losses[0] == pytest.approx(
            losses[1], rel=2e-3
        )  # fp32 sums in another order; adapters are stored in bf16
    for metric in ("llm_lora", "clm_calora"):
        found = [json.loads((f / "results/toy/q8_up/metrics.json").read_text())["methods"][metric] for f in (one, two)]
        assert found[0]["accuracy"] == pytest.approx(found[1]["accuracy"], abs=1.5 / 16)  # one answer may tip over
        assert found[0]["trainable_parameters"] == found[1]["trainable_parameters"]
    assert not list((two / "checkpoints").rglob("*.safetensors"))


def teacher_of(folder: Path) -> Path:
    """A LoRA of the same base, as somebody else would have it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = make_project(folder / "theirs") / "sources/base"
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False),
    )
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"
