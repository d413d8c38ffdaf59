"""CA-LoRA: carry a LoRA adapter onto a compressed base model (arXiv 2307.07705).

`compress`, `inherit` and `distill` make an adapter for a compressed model; `load` opens that model, and its
`load_adapter` / `set_adapter` / `answer` use the adapter. Names load on first use, so that a program
imports (and a pipeline stage depends on) no more than it needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Bypass": "calora.inheritance.inherit",
    "CaloraError": "calora.errors",
    "RecoveryBypass": "calora.recovery.bypass",
    "Task": "calora.models.tasks",
    "compress": "calora.compression",
    "distill": "calora.distillation.distill",
    "export": "calora.device.export",
    "fold": "calora.adapters.fold",
    "import_adapter": "calora.adapters.teachers",
    "import_lora": "calora.adapters.foreign",
    "inherit": "calora.inheritance.inherit",
    "load": "calora.runtimes",
    "save": "calora.saving",
    "share_ranks": "calora.inheritance.ranks",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'calora' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value
