"""What a PEFT configuration may ask for beyond a plain LoRA: refused by name, with the way to a plain one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig

from calora.errors import CaloraError

PLAIN_STARTS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")  # they leave the base as it is
CONVERT = (
    "convert it with PEFT: model.save_pretrained(folder, path_initial_model_for_weight_conversion=<folder of the "
    "adapter before its training>)"
)
DISTIL = "make a plain LoRA of it with PEFT: peft.save_as_lora(folder, model, rank)"
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


def plain_lora(path: Path, config: Mapping[str, Any]) -> LoraConfig:
    """What an adapter_config.json says of a plain LoRA; dropout and start, which are for training, are left out.

    A trained classification head (task_type SEQ_CLS) may be there. `bias` may be anything: it shows in the tensors.

    Raises:
        CaloraError: the file asks for something else, or an entry is of the wrong kind.
    """
    if config.get("peft_type") != "LORA":
        raise CaloraError(path, "peft_type LORA", config.get("peft_type"), "name a LoRA adapter")
    refuse_start(path, config.get("init_lora_weights", True))
    for key, (name, fix) in FEATURES.items():
        if config.get(key) and not (key == "modules_to_save" and config.get("task_type") == "SEQ_CLS"):
            raise refused(path, name, f"{key}: {config[key]!r:.60}", fix)
    fields = {key: config[key] for key in FIELDS if config.get(key) is not None}
    for key in ("r", "lora_alpha"):
        value = fields.setdefault(key, 8)  # PEFT's own
        if isinstance(value, bool) or not isinstance(value, int | float) or (key == "r" and value < 1):
            raise CaloraError(path, f"a number '{key}'", repr(value), "name a folder that PEFT wrote")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = fields.setdefault(key, {})
        if not isinstance(pattern, dict) or not all(isinstance(value, int | float) for value in pattern.values()):
            raise CaloraError(path, f"numbers by name in '{key}'", f"{pattern!r:.60}", "name a folder that PEFT wrote")
    try:
        return LoraConfig(**fields)
    except (TypeError, ValueError) as error:
        raise CaloraError(path, "a configuration that PEFT can read", error, "name a folder that PEFT wrote") from None


def refuse_start(path: Path, start: object) -> None:
    """Raise `CaloraError` if the adapter's weights count from a base that its start had changed."""
    name = str(start).lower()
    if name in PLAIN_STARTS:
        return
    known = next((STARTS[key] for key in STARTS if name.startswith(key)), f"the start {start!r}")
    fix = PLAIN if known in ("LoftQ", f"the start {start!r}") else CONVERT
    raise refused(path, f"{known}, which counts from a base that it has changed", f"init_lora_weights: {start!r}", fix)


def refused(path: Path, name: str, found: str, fix: str) -> CaloraError:
    """One line for a feature that calora does not carry."""
    return CaloraError(path, "a plain LoRA", f"{name} ({found})", fix)
