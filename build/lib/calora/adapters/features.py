"""What a PEFT configuration may ask for beyond a plain LoRA: refused by name, with the way to a plain one."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig

from calora.errors import CaloraError

PLAIN_STARTS = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")  # they leave the base as it is
CONVERT = (
    "convert it with PEFT: model.save_pretrained(folder, path_initial_model_for_weight_conversion=<folder of the "
    "adapter before its training>)"
)
DISTIL = "make a plain LoRA of it with PEFT (peft.save_as_lora(folder, model, rank)); as a teacher it is taken as it is"
MERGE = "merge it into the base with PEFT (model.merge_and_unload().save_pretrained(folder)), and name that base"
PLAIN = "train a LoRA without it"
FEATURES = {  # key of adapter_config.json -> (name of the feature, the way to a plain LoRA)
    "use_dora": ("DoRA", DISTIL),
    "lora_bias": ("a bias of the LoRA's own", PLAIN),
    "modules_to_save": ("layers that are trained whole", MERGE),
    "trainable_token_indices": ("trained tokens", MERGE),
    "layer_replication": ("replicated layers", MERGE),
    "megatron_config": ("Megatron's parallel layers", PLAIN),
    "alora_invocation_tokens": ("Activated LoRA (aLoRA)", PLAIN),
    "target_parameters": ("LoRA on bare parameters", PLAIN),
    "use_qalora": ("QALoRA", PLAIN),
    "use_bdlora": ("block-diagonal LoRA", PLAIN),
    "velora_config": ("VeLoRA", PLAIN),
    "monteclora_config": ("MonteCLoRA", PLAIN),
    "arrow_config": ("Arrow routing", PLAIN),
    "kasa_config": ("KaSA, which changes the base's weights", MERGE),
}
STARTS = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "lora_ga": "LoRA-GA", "loftq": "LoftQ"}
FIELDS = (
    "r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern", "use_rslora", "task_type", "modules_to_save",
)  # fmt: skip


def plain_lora(path: Path, config: Mapping[str, Any], starts: Collection[str] = PLAIN_STARTS) -> LoraConfig:
    """What an adapter_config.json says of a plain LoRA; dropout and start, which are for training, are left out.

    A trained classification head (task_type SEQ_CLS) may be there. `bias` may be anything: it shows in the tensors.

    Args:
        path: of the file, for messages.
        starts: the values of init_lora_weights, in small letters, that whoever asks can handle.

    Raises:
        CaloraError: the file asks for something else, or an entry is of the wrong kind.
    """
    if config.get("peft_type") != "LORA":
        raise CaloraError(path, "peft_type LORA", config.get("peft_type"), "name a LoRA adapter")
    if str(config.get("init_lora_weights", True)).lower() not in starts:
        raise _refused_start(path, config["init_lora_weights"])
    for key, (name, fix) in FEATURES.items():
        if config.get(key) and not (key == "modules_to_save" and config.get("task_type") == "SEQ_CLS"):
            raise refused(path, name, f"{key}: {config[key]!r:.60}", fix)
    fields: dict[str, Any] = {"r": 8, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}}  # PEFT's own
    fields |= {key: config[key] for key in FIELDS if config.get(key) is not None}
    _check_numbers(path, fields)
    try:
        return LoraConfig(**fields)
    except (TypeError, ValueError) as error:
        found = " ".join(str(error).split())
        raise CaloraError(path, "a configuration that PEFT can read", found, "name a folder that PEFT wrote") from None


def _check_numbers(path: Path, fields: Mapping[str, Any]) -> None:
    """Raise `CaloraError` unless ranks are whole numbers above 0, alphas finite ones, and patterns regular expressions."""
    fix = "name a folder that PEFT wrote"
    for name, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        if not isinstance(fields[pattern], dict):
            raise CaloraError(path, f"numbers by name in '{pattern}'", f"{fields[pattern]!r:.60}", fix)
        for key, value in {name: fields[name], **fields[pattern]}.items():
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or (name == "r" and (value < 1 or value != int(value))):
                raise CaloraError(path, f"a number for '{key}'", repr(value), fix)
        for key in fields[pattern]:
            try:
                re.compile(key)
            except re.error as error:
                raise CaloraError(path, f"a regular expression in '{pattern}'", f"{key}: {error}", fix) from None


def _refused_start(path: Path, start: object) -> CaloraError:
    """One line for an adapter whose weights count from a base that its start had changed."""
    name = next((STARTS[key] for key in STARTS if str(start).lower().startswith(key)), f"the start {start!r}")
    fix = CONVERT if name in ("PiSSA", "OLoRA", "CorDA", "LoRA-GA") else PLAIN
    return refused(path, f"{name}, which counts from a base that it has changed", f"init_lora_weights: {start!r}", fix)


def refused(path: Path, name: str, found: str, fix: str) -> CaloraError:
    """One line for a feature that calora does not carry."""
    return CaloraError(path, "a plain LoRA", f"{name} ({found})", fix)
