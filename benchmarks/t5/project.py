"""The project that the benchmark runs in: params.yaml of this repository with a T5 as its base, in a folder beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from calora.common.files import fingerprint
from pipeline.local import copied
from pipeline.settings import ROOT
from stages.config import Params
from stages.resolve import merged
from stages.tasks import READY

FOLDER, MODEL = ROOT / ".t5", Path("own/t5")
OWN = Path("own")  # of tasks in the layout of their publishers, a folder each
MIXED = ("sst2", "qqp", "mnli")  # what the base learns besides gaps in texts
LEFT_OUT = ("movies",)  # sentences of the test set of sst2 among its own
TASKS = ["sst2", "tweets", "amazon"]
EXPERTS = {"experts": 128, "shared": 0, "active": 0.3, "clustering": "coactivation", "router": "learned"}
INT8 = {"quantize": {"format": "int8", "embeddings": "int8"}}
PRUNE = {"prune": {"score": "sparsegpt", "pattern": "2:4"}}
CHANGES: dict[str, Any] = {
    "tasks": TASKS,
    "recipes": ["q8", "up", "sp", "m", "q8_up_m"],
    "compare": ["clm_inherited", "clm_lora", "calora"],
    "compress": {"m": [{"moefy": EXPERTS}], "q8_up_m": [{"moefy": EXPERTS}, PRUNE, INT8]},
    "evaluate": {"packed": []},
}


def entries() -> dict[str, Any]:
    """params.yaml of the benchmark, without a fingerprint of its base where that is not there yet."""
    raw = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    ready = yaml.safe_load(READY.read_text(encoding="utf-8"))
    sets = {name: entry for name, entry in raw["data"]["sets"].items() if name not in (*ready, *LEFT_OUT)}
    there = [name for name in ready if name in MIXED or (ROOT / OWN / name).is_dir()]
    sets |= {name: {"like": name, "folder": str(OWN / name)} for name in there}
    known = fingerprint(ROOT / MODEL) if (ROOT / MODEL).is_dir() else "0" * 64
    raw["data"]["sets"] = sets
    return {**merged(raw, CHANGES), "base": {"source": "path", "path": str(MODEL), "sha256": known}}


def params() -> Params:
    """The same, checked."""
    return Params.model_validate(entries())


def make() -> Path:
    """The folder of the project, whose params.yaml may be edited: `python -m pipeline repro` there, or `make` anew."""
    copied(FOLDER, entries())
    return FOLDER
