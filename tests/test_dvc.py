"""The real DVC on a tiny model: a change re-runs what depends on it and no more; going back restores."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from calora.common.files import sha256
from tests.conftest import change, make_project
from tests.test_stages import calibration_texts

# One thread: the models are tiny, and threads of stages that run side by side only get in each other's way.
ENV = {
    **os.environ,
    "DVC_NO_ANALYTICS": "1",
    "OMP_NUM_THREADS": "1",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}


def dvc(folder: Path, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], cwd=folder, env=ENV, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def heeds_interrupts() -> None:
    """In the background shells let their commands ignore Ctrl-C, and so their commands' children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def ran(output: str) -> set[str]:
    return set(re.findall(r"Running stage '(.+)'", output))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = make_project(tmp_path_factory.mktemp("dvc"))
    # The embedded corpora come from the network: here the calibration texts are data of the project's own.
    text = (folder / "dvc.yaml").read_text()
    text = re.sub(r"\n  calibration:\n.*?(?=\n  teacher:)", "", text, flags=re.S)
    (folder / "dvc.yaml").write_text(text)
    calibration_texts(folder)
    change(folder, "recipes", ["q8", "q8_up"])
    change(folder, "compare", ["calora"])  # each stage is a process, and takes seconds to import torch
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    dvc(folder, "init", "-q")
    dvc(folder, "repro")
    return folder


def test_nothing_changed_runs_nothing(project):
    assert ran(dvc(project, "repro")) == set()
    assert "up to date" in dvc(project, "status")


def test_alpha_reruns_distill_and_evaluate_and_going_back_restores(project):
    curves = project / "models/calora/toy/q8_up/history.json"
    first = sha256(curves)
    again = {f"{stage}@toy-{r}-calora" for stage in ("distill", "score") for r in ("q8", "q8_up")}
    again |= {f"evaluate@toy-{r}" for r in ("q8", "q8_up")}
    change(project, "methods.calora.loss.alpha", 0.5)
    assert ran(dvc(project, "repro")) == again | {"methods", "report"}
    assert sha256(curves) != first
    change(project, "methods.calora.loss.alpha", 0.055)
    assert ran(dvc(project, "repro")) == {"report"}  # cheap, and its outputs are kept in git, not in the cache
    assert sha256(curves) == first


def test_a_recipe_reruns_only_what_follows_from_it(project):
    change(project, "compress.q8", [{"quantize": {"format": "int8", "embeddings": "none"}}])
    output = ran(dvc(project, "repro"))
    of_methods = {f"{stage}@toy-q8-calora" for stage in ("distill", "score")}
    assert {"compress@q8", "inherit@toy-q8", *of_methods, "evaluate@toy-q8"} <= output
    assert not [stage for stage in output if "q8_up" in stage or stage.startswith(("teacher", "download", "reference"))]


def test_a_docstring_of_the_metrics_compresses_nothing_again(project):
    file = project / "calora/evaluation/metrics.py"
    before = file.read_text()
    file.write_text(before.replace('"""', '"""Here: ', 1))
    changed = json.loads(dvc(project, "status", "--json"))
    assert "score@toy-q8-calora" in changed and not [stage for stage in changed if stage.startswith("compress")]
    file.write_text(before)


def test_a_docstring_reruns_its_stage_at_most(project):
    file = project / "stages/compress.py"
    file.write_text(file.read_text().replace('"""Compress the base', '"""Here: compress the base', 1))
    assert ran(dvc(project, "repro")) == {"compress@q8", "compress@q8_up"}


@pytest.mark.parametrize(
    ("stage", "how", "made"),
    [
        (("distill", "toy", "q8_up", "calora"), signal.SIGINT, "models/calora/toy/q8_up/recovery.safetensors"),
        (("teacher", "toy"), signal.SIGKILL, "models/teacher/toy/adapter_model.safetensors"),
    ],
)
def test_a_killed_training_resumes_to_the_same_adapter(project, tmp_path, stage, how, made):
    folder = tmp_path / "p"
    shutil.copytree(project, folder, symlinks=True)
    change(folder, "train.steps", 60)
    change(folder, "train.eval_every", 60)
    command = [sys.executable, "-m", f"stages.{stage[0]}", *stage[1:]]
    adapter = folder / made
    shutil.rmtree(adapter.parent)
    process = subprocess.Popen(command, cwd=folder, env=ENV, start_new_session=True, preexec_fn=heeds_interrupts)
    saved = folder / "checkpoints" / adapter.parent.relative_to(folder) / "checkpoint.safetensors"
    deadline = time.monotonic() + 120
    while not saved.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, how)
    process.wait()
    assert saved.exists() and not adapter.exists()
    resumed = subprocess.run(command, cwd=folder, env=ENV, capture_output=True, text=True, check=True)
    assert "resumes after step" in resumed.stdout
    first = sha256(adapter)
    assert not saved.exists()
    subprocess.run(command, cwd=folder, env=ENV, check=True, capture_output=True)
    assert sha256(adapter) == first
