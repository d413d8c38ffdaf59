"""A random model for `--tiny`: does all of it work?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

from benchmarks import synthetic
from benchmarks.device.setting import Setting
from calora.adapters.lora import lora_config
from calora.compression import compress
from calora.compression.walk import Calibration
from calora.models.loading import load_model
from calora.saving import save

SIZE = synthetic.Size(hidden=64, inner=128, layers=2, heads=4, groups=2, vocabulary=512)
RECIPES: dict[str, dict[str, Any]] = {
    "four": {"format": "int4", "group": 32, "symmetric": True, "embeddings": "int8"},
    "eight": {"format": "int8", "embeddings": "int8"},
}


def tiny(root: Path) -> Setting:
    """Little of everything, in a folder."""
    base, calibration = synthetic.make(root / "base", SIZE), Calibration(synthetic.texts(2, 8, SIZE.vocabulary))
    for name, step in RECIPES.items():
        model = load_model(base, torch.bfloat16)
        save(model, compress(model, [{"quantize": step}], calibration), root / name, base)
    teacher: Any = load_model(base, torch.bfloat16)
    get_peft_model(teacher, lora_config(4, 8, ["q_proj", "v_proj"])).save_pretrained(str(root / "teacher"))
    return Setting(
        base, root / "four", {"eight": root / "eight"}, {}, {"random": root / "teacher"}, root / "cache", counts=(1, 3),
        threads=(1,), rounds=1, requests=4, tokens=4, soak=250, mixed=3, prompts=4,
    )  # fmt: skip
