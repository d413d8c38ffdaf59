"""An adapter on a model: PEFT's LoRA and the bypasses, put on, switched, and taken off again."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from calora.errors import CaloraError
from calora.models.anatomy import linear_layers
from calora.recovery.bypass import RecoveryBypass, activate, attach, recovery_state

PREFIX = "base_model.model."  # PEFT's, in front of every tensor name on disk


@dataclass
class Adapter:
    """An adapter in memory.

    Args:
        config: the PEFT configuration of the LoRA part.
        lora: `<layer>.lora_A.weight` [r, in] and `<layer>.lora_B.weight` [out, r].
        recovery: `<layer>.down` [in, rank] and `<layer>.up` [rank, out]; empty for a plain LoRA.
        meta: what calora.json holds; empty for a plain LoRA.
    """

    config: LoraConfig
    lora: dict[str, Tensor]
    recovery: dict[str, Tensor] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(tensor.numel() for tensor in [*self.lora.values(), *self.recovery.values()])


def lora_config(
    rank: int, alpha: float, targets: list[str], wider: Mapping[str, int] | None = None, classifier: bool = False
) -> LoraConfig:
    """A PEFT configuration without dropout.

    Args:
        rank, alpha: LoRA's r and its alpha; the update is scaled by alpha / r.
        targets: last parts of the names of the layers to adapt, such as `q_proj`.
        wider: a larger rank for some of the targets; their scaling stays alpha / rank.
        classifier: also train the classification head.
    """
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT divides by r; it need not be whole
        target_modules=list(targets),
        lora_dropout=0.0,
        rank_pattern=dict(wider or {}),
        alpha_pattern={name: alpha * r / rank for name, r in (wider or {}).items()},
        task_type="SEQ_CLS" if classifier else None,
        modules_to_save=["classifier"] if classifier else None,
    )


def check_targets(model: PreTrainedModel, targets: Sequence[str], rank: int, section: str) -> dict[str, nn.Linear]:
    """The linear layers whose names end in one of `targets`.

    Raises:
        CaloraError: a target names no layer, or the rank is above the width of a layer.
    """
    layers = linear_layers(model)
    names = {name.rsplit(".", 1)[-1] for name in layers}
    missing = sorted(set(targets) - names)
    if missing or not targets:
        known = ", ".join(sorted(names))
        raise CaloraError(f"{section}.targets", f"names among {known}", missing or "none", "mend params.yaml")
    chosen = {name: layer for name, layer in layers.items() if name.rsplit(".", 1)[-1] in targets}
    widths = {name: min(layer.in_features, layer.out_features) for name, layer in chosen.items()}
    narrowest = min(widths, key=widths.__getitem__)
    if not 1 <= rank <= widths[narrowest]:
        expected = f"1 to {widths[narrowest]}, the width of {narrowest}"
        raise CaloraError(f"{section}.rank", expected, rank, "mend params.yaml")
    return chosen


def inject(model: nn.Module, config: LoraConfig, name: str = "default") -> None:
    """Put a fresh LoRA on `model` in place; everything but the LoRA is frozen."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are the point
        inject_adapter_in_model(config, model, adapter_name=name)


def attach_adapter(model: PreTrainedModel, adapter: Adapter, name: str) -> None:
    """Add an adapter's LoRA and its bypasses to `model` in place, strictly by name."""
    inject(model, adapter.config, name)
    result: Any = set_peft_model_state_dict(model, adapter.lora, adapter_name=name)
    missing = [key for key in result.missing_keys if ".lora_" in key and f".{name}." in key]
    if missing or result.unexpected_keys:
        wrong = [*missing, *result.unexpected_keys][0]
        raise CaloraError(f"adapter {name}", "tensors that match the base's layers", wrong, "load its own base")
    layers = linear_layers(model)
    for layer in sorted({key.rsplit(".", 1)[0] for key in adapter.recovery}):
        if layer not in layers:
            raise CaloraError(f"recovery of {name}", "a layer of the base", layer, "load the adapter's own base")
        down, up = adapter.recovery[f"{layer}.down"], adapter.recovery[f"{layer}.up"]
        bypass = RecoveryBypass(down.shape[0], up.shape[1], down.shape[1], adapter.meta["activation"])
        bypass.load_state_dict({"down": down, "up": up}, assign=True)
        attach(layers[layer], name, bypass.requires_grad_(False))
    model.requires_grad_(False)


def set_active(model: PreTrainedModel, name: str | None) -> None:
    """Make `name` the active LoRA and bypass everywhere; None switches both off."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(name is not None)
            if name is not None:
                module.set_adapter(name, inference_mode=True)
    activate(model, name)


def lora_state(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The LoRA tensors of a model by PEFT's names, without its prefix."""
    state = get_peft_model_state_dict(model, adapter_name=name)
    return {key.removeprefix(PREFIX): tensor.detach() for key, tensor in state.items()}


def take_adapter(model: nn.Module, config: LoraConfig, meta: Mapping[str, Any], name: str = "default") -> Adapter:
    """The adapter `name` as it stands on the model."""
    return Adapter(config, lora_state(model, name), recovery_state(model, name), dict(meta))


def lora_scale(config: LoraConfig, layer: str) -> float:
    """PEFT's scaling of a layer: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA."""
    rank = _of_pattern(config.rank_pattern, layer, config.r)
    alpha = _of_pattern(config.alpha_pattern, layer, config.lora_alpha)
    return float(alpha / rank**0.5 if config.use_rslora else alpha / rank)


def _of_pattern(pattern: Mapping[str, Any] | None, layer: str, default: float) -> float:
    for name, value in (pattern or {}).items():
        if layer == name or layer.endswith(f".{name}"):
            return float(value)
    return default
