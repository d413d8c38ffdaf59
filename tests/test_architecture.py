"""The shape of the project: one direction of imports, and no calora file that a stage uses missing from its deps."""

import ast
import re
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.imports import code_of, keys_of
from tests.conftest import ROOT

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
OURS = {"calora", "stages", "pipeline"}
MAY_IMPORT = {
    "calora": {
        "calora", "torch", "transformers", "peft", "safetensors", "accelerate", "huggingface_hub", "tqdm", "numpy", "scipy", "filelock",
        "lm_eval",  # the extra of that name, in calora/lm_eval.py alone
        "gguf", "xllamacpp", "fastapi", "starlette", "uvicorn", "httpx", "pydantic", "rich",  # the extra `device`, in calora/device alone
    },
    "stages": {"calora", "stages", "pydantic", "yaml", "torch", "transformers", "safetensors", "datasets", "huggingface_hub", "sklearn", "matplotlib", "peft", "pyarrow", "requests", "packaging"},
    "pipeline": {
        "pipeline", "stages", "calora", "dvc", "prefect", "pydantic", "yaml", "ruamel", "networkx", "rich", "tqdm", "numpy", "matplotlib",
        "vl_convert", "jinja2", "markupsafe", "filelock", "huggingface_hub", "datasets",
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


FLOORS = (  # of calora, from the ground up: a room imports from the floors below it, and from itself
    {"errors"}, {"common"}, {"recovery", "models"}, {"layers"}, {"adapters", "evaluation", "formats", "taken"}, {"compression"},
    {"saving", "inheritance", "distillation", "preview"}, {"compressed", "plugin"}, {"device", "lm_eval"}, {"runtimes"}, {"__main__"},
)  # fmt: skip


def test_no_room_of_calora_imports_from_above():
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    for file in (ROOT / "calora").rglob("*.py"):
        room = file.relative_to(ROOT / "calora").parts[0].removesuffix(".py")
        if room == "__init__":  # names load from anywhere, on first use
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            parts = (getattr(node, "module", None) or "").split(".") if isinstance(node, ast.ImportFrom) else []
            if parts[:1] == ["calora"] and len(parts) > 1:
                assert parts[1] == room or floor[parts[1]] < floor[room], f"{file} imports {node.module}"


def test_calora_knows_no_project_paths():
    for file in (ROOT / "calora").rglob("*.py"):
        strings = [n.value for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Constant)]
        assert not [s for s in strings if isinstance(s, str) and s.startswith(("models/", "data/")) and " " not in s]


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_deps_name_all_code_that_a_stage_uses(stage):
    body = STAGES[stage].get("do", STAGES[stage])
    code = [dep for dep in body["deps"] if dep.startswith(("calora/", "stages/"))]
    assert sorted(code) == sorted(code_of(stage)), "run `python -m pipeline.imports`"


CHOSEN = ("dtype",)  # keys that `stages.common.choose` reads for every stage
MEANT = {"calibration": "compress.calibration", "compressions": "compress.${item}"}  # properties of Params


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_params_name_every_key_that_a_stage_reads(stage):
    body = STAGES[stage].get("do", STAGES[stage])
    listed = body.get("params", [])
    read = {re.sub(r"\.(model_dump\w*|get|items|values)$", "", key) for key in keys_of(stage)}
    for key in read:
        first, _, rest = key.partition(".")
        key = MEANT[first] if first in MEANT else f"{first}.{rest}".rstrip(".")
        assert any(key == one or f"{key}.".startswith(f"{one}.") or one == f"{key}.${{item}}" for one in listed), key
    unread = [
        one
        for one in listed
        if one not in CHOSEN
        and not any(
            f"{key}.".startswith(f"{one}.") or one.startswith(key)
            for key in map(lambda k: MEANT.get(k.split(".")[0], k), read)
        )
    ]
    assert not unread
