"""The shape of the project: one direction of imports, and no calora file that a stage uses missing from its deps."""

import ast
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.imports import code_of
from tests.conftest import ROOT

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
OURS = {"calora", "stages", "pipeline"}
MAY_IMPORT = {
    "calora": {"calora", "torch", "transformers", "peft", "safetensors", "accelerate", "tqdm", "numpy"},
    "stages": {"calora", "stages", "pydantic", "yaml", "torch", "transformers", "safetensors", "datasets", "huggingface_hub", "sklearn", "matplotlib", "peft"},
    "pipeline": {
        "pipeline", "stages", "calora", "dvc", "prefect", "pydantic", "yaml", "ruamel", "filelock", "networkx", "rich", "tqdm", "numpy", "matplotlib",
        "vl_convert",
    },
}  # fmt: skip


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names)


@pytest.mark.parametrize("package", sorted(OURS))
def test_imports_go_one_way(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        assert imported(file) <= MAY_IMPORT[package], file


def test_calora_knows_no_project_paths():
    for file in (ROOT / "calora").rglob("*.py"):
        strings = [n.value for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Constant)]
        assert not [s for s in strings if isinstance(s, str) and s.startswith(("models/", "data/")) and " " not in s]


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_deps_name_all_code_that_a_stage_uses(stage):
    body = STAGES[stage].get("do", STAGES[stage])
    code = [dep for dep in body["deps"] if dep.startswith(("calora/", "stages/"))]
    assert sorted(code) == sorted(code_of(stage)), "run `python -m pipeline.imports`"
