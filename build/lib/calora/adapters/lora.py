"""An adapter on a model: PEFT's LoRA, the bypasses and the scales, put on, switched, and taken off again."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists, delete_adapter
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers import PreTrainedModel

from calora.adapters.scales import (
    PART,
    TaskScales,
    activate_scales,
    attach_scales,
    detach_scales,
    on_grid,
    scales_of,
    scales_state,
)
from calora.errors import CaloraError
from calora.models.anatomy import WORDS, linear_layers, module_names, named
from calora.recovery.beside import Part, Sides
from calora.recovery.bypass import Bypasses, RecoveryBypass, activate, attach, bypasses_of, detach, recovery_state

Rank = int | Mapping[str, int]  # of every layer, or by layer: then a layer that is not named gets none
PREFIX = "base_model.model."  # PEFT's, in front of every tensor name on disk
ADAPTED = (".lora_", ".recovery.", f"{PART}.")  # one of these is in the name of each of an adapter's parameters
OWN_BASE = "load the base that the adapter was made for"


@dataclass
class Adapter:
    """An adapter in memory. It may lack any part; without all of them it is the compressed model alone.

    Args:
        config: the PEFT configuration of the LoRA; None without a LoRA.
        lora: `<layer>.lora_A.weight` [r, in] and `<layer>.lora_B.weight` [out, r]; empty without a LoRA.
        recovery: `<layer>.down` [in, rank] and `<layer>.up` [rank, out]; empty without a bypass.
        meta: what calora.json holds; empty for a plain LoRA.
        scales: `<layer>.scales` [out, groups], the task's scales of a grid over the base's, minus 1; empty without any.
    """

    config: LoraConfig | None
    lora: dict[str, Tensor]
    recovery: dict[str, Tensor] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(tensor.numel() for part in (self.lora, self.recovery, self.scales) for tensor in part.values())

    @property
    def lora_layers(self) -> list[str]:
        """The layers that have a LoRA."""
        return sorted({key.partition(".lora_")[0] for key in self.lora if ".lora_" in key})

    @property
    def bypass_layers(self) -> list[str]:
        """The layers that have a bypass."""
        return sorted({key.rpartition(".")[0] for key in self.recovery})


def lora_config(
    rank: int, alpha: float, targets: list[str], wider: Mapping[str, int] | None = None, classifier: bool = False
) -> LoraConfig:
    """A PEFT configuration without dropout.

    Args:
        rank, alpha: LoRA's r and its alpha; the update is scaled by alpha / r.
        targets: names of the layers to adapt, or their last parts, such as `q_proj`.
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


def plain_config(ranks: Mapping[str, int], scales: Mapping[str, float], among: Iterable[str] = ()) -> LoraConfig:
    """The plainest configuration of a LoRA with these ranks and scales: alpha = scale r, all by name.

    A last part of a name, such as `q_proj`, stands for its layers where it names no other module of the model.

    Args:
        ranks, scales: by layer; at least one layer.
        among: the names of all modules of the model; without them every layer goes by its full name.
    """
    parts: dict[str, list[str]] = {}
    for layer in sorted(ranks):
        parts.setdefault(layer.rpartition(".")[2], []).append(layer)
    everywhere = Counter(layer.rpartition(".")[2] for layer in among)
    targets: list[str] = []
    for part, layers in parts.items():
        targets += [part] if everywhere[part] == len(layers) else layers
    values = {layer: (ranks[layer], _whole(scales[layer] * ranks[layer])) for layer in ranks}
    rank, alpha = Counter(values[layer] for layer in sorted(values)).most_common(1)[0][0]
    config = lora_config(rank, alpha, targets)
    for part, layers in parts.items():
        same = len({values[layer] for layer in layers}) == 1
        own = {part if same else layer: values[layer] for layer in layers}
        other = {name: value for name, value in own.items() if value != (rank, alpha)}
        config.rank_pattern = {**(config.rank_pattern or {}), **{name: r for name, (r, _) in other.items()}}
        config.alpha_pattern = {**(config.alpha_pattern or {}), **{name: a for name, (_, a) in other.items()}}
    return config


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number


def lora_rank(config: LoraConfig, layer: str) -> int:
    """PEFT's rank of a layer: r, or what the first regular expression of rank_pattern that fits the name gives."""
    return int(_of_pattern(config.rank_pattern, layer, config.r))


def lora_scale(config: LoraConfig, layer: str) -> float:
    """PEFT's scaling of a layer: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA."""
    rank, alpha = lora_rank(config, layer), _of_pattern(config.alpha_pattern, layer, config.lora_alpha)
    return float(alpha / rank**0.5 if config.use_rslora else alpha / rank)


def _of_pattern(pattern: Mapping[str, Any] | None, layer: str, default: float) -> float:
    values = dict(pattern or {})
    return float(values.get(get_pattern_key(list(values), layer), default))


def ranks_of(rank: Rank, layers: Iterable[str]) -> dict[str, int]:
    """Layer -> its rank."""
    return dict.fromkeys(layers, rank) if isinstance(rank, int) else dict(rank)


def targeted(model: PreTrainedModel, config: LoraConfig) -> set[str]:
    """The modules that PEFT would put a LoRA of this configuration on, by name."""
    targets: Any = config.target_modules
    if targets is None:
        targets = LoraModel.target_module_mapping.get(model.config.model_type)
    if targets is None:
        return set()
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = list(linear_layers(model))
    own = LoraConfig(
        target_modules=targets,
        exclude_modules=config.exclude_modules,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
    )
    return {name for name in module_names(model) if check_target_module_exists(own, name)}


def check_targets(model: PreTrainedModel, targets: Sequence[str], rank: Rank) -> dict[str, nn.Linear]:
    """The linear layers whose names end in one of `targets`, or that a word among them means (`anatomy.WORDS`).

    Raises:
        CaloraError: a target names no layer, or a rank is outside the width of a layer or of no such layer.
    """
    layers = linear_layers(model)
    ends = named(model, targets)
    missing = sorted(end for end in ends if not any(_ends_in(name, end) for name in layers))
    if missing or not targets:
        known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in layers}))
        fix = f"name layers of this model, or {', '.join(WORDS)}"
        raise CaloraError("targets", f"names among {known}", missing or "none", fix)
    chosen = {name: layer for name, layer in layers.items() if any(_ends_in(name, end) for end in ends)}
    widths = {name: min(layer.in_features, layer.out_features) for name, layer in chosen.items()}
    for name, own in ranks_of(rank, sorted(chosen, key=widths.__getitem__)).items():
        if name not in widths:
            raise CaloraError("rank", "layers that the targets name", name, "leave it out, or name it as a target")
        if not 1 <= own <= widths[name]:
            expected = f"1 to {widths[name]}, the width of {name}"
            raise CaloraError("rank", expected, own, "choose a rank in that range")
    return chosen


def _ends_in(name: str, end: str) -> bool:
    """Whether PEFT would take `end` for the name of a layer."""
    return name == end or name.endswith(f".{end}")


def inject(model: nn.Module, config: LoraConfig, name: str = "default", fresh: bool = True) -> None:
    """Put a LoRA on `model` in place, which is in eval mode then; everything but the LoRA is frozen.

    Args:
        fresh: with the start that the configuration names; else nothing of the base is looked at or changed, whatever
            the start was, and the LoRA's values are arbitrary until they are loaded.
    """
    own = copy.deepcopy(config)  # PEFT edits it
    own.lora_dropout, own.fan_in_fan_out = 0.0, False  # whatever is Conv1D in plain transformers is a linear layer here
    if not fresh:
        own.init_lora_weights = False
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are the point
        inject_adapter_in_model(own, model, adapter_name=name)
    model.eval()  # PEFT's new layers are in training mode


def attach_adapter(model: PreTrainedModel, adapter: Adapter, name: str) -> None:
    """Add an adapter's LoRA, bypasses and scales to `model` in place, strictly by name; the model is in eval mode then.

    On a packed model that `calora.load` opened they are plain tensors (`calora.recovery.beside`), else PEFT's modules and hooks.

    Raises:
        CaloraError: the name is taken or unfit, or a tensor fits no layer; the model is as it was before.
    """
    check_name(model, name)
    layers = linear_layers(model)
    check_lora(f"adapter {name}", adapter, layers)
    bypasses = _bypasses(f"adapter {name}", adapter, layers)
    check_scales(f"adapter {name}", adapter, layers)
    device, dtype = model.device, dtype_of(model)
    try:
        if sides := sides_of(model):
            check_named(f"adapter {name}", adapter, model)
            sides.adapters[name] = parts_of(adapter, device, dtype)
        else:
            _attach_modules(model, adapter, bypasses, name, dtype)
        for key, ratio in adapter.scales.items():
            attach_scales(layers[key.removesuffix(PART)], name, ratio.to(device, dtype))
    except BaseException:
        detach_adapter(model, name)
        raise
    model.requires_grad_(False).eval()


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype that the base computes in: transformers' `dtype` is that of the first parameter, an adapter's perhaps."""
    return next(
        parameter.dtype
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and not any(part in name for part in ADAPTED)
    )


def _attach_modules(
    model: PreTrainedModel, adapter: Adapter, bypasses: Mapping[str, RecoveryBypass], name: str, dtype: torch.dtype
) -> None:
    layers = linear_layers(model)
    if adapter.config is not None:
        _attach_lora(model, adapter.config, adapter.lora, name)
    for layer, bypass in bypasses.items():
        attach(layers[layer], name, bypass.to(model.device, dtype))


def _attach_lora(model: PreTrainedModel, config: LoraConfig, lora: dict[str, Tensor], name: str) -> None:
    inject(model, config, name, fresh=False)
    result: Any = set_peft_model_state_dict(model, lora, adapter_name=name)
    missing = [key for key in result.missing_keys if ".lora_" in key and f".{name}." in key]
    if missing or result.unexpected_keys:
        wrong = [*missing, *result.unexpected_keys][0]
        raise CaloraError(f"adapter {name}", "tensors for the layers that its target_modules name", wrong, OWN_BASE)


def detach_adapter(model: PreTrainedModel, name: str) -> None:
    """Take the adapter `name` off; of layers that have no other adapter PEFT's wrapping and the hook go too.

    Where it is in use, the base's own scales are again.
    """
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    if name in configs:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*was active which is now deleted")  # whoever calls sets another
            delete_adapter(model, name, "lora_", LoraLayer)
        del configs[name]
        for path, module in list(model.named_modules()):
            if isinstance(module, LoraLayer) and not module.lora_A and not module.lora_embedding_A:
                model.set_submodule(path, module.get_base_layer())
        if not configs:
            del model.peft_config
    detach(model, name)
    detach_scales(model, name)
    if sides := sides_of(model):
        sides.remove(name)


def sides_of(model: nn.Module) -> Sides | None:
    """What is beside the layers of a packed model that `calora.load` opened."""
    found: Sides | None = getattr(model, "calora_sides", None)
    return found


def parts_of(adapter: Adapter, device: torch.device, dtype: torch.dtype) -> dict[str, list[Part]]:
    """Layer -> its LoRA, s B A x as x -> (x A^T) (s B^T), and its bypass."""
    parts: dict[str, list[Part]] = {}

    def add(layer: str, down: Tensor, up: Tensor, activation: str) -> None:
        """A^T or D [in, k], s B^T or U [k, out]."""
        down, up = (tensor.to(device, dtype).contiguous() for tensor in (down.T, up))
        parts.setdefault(layer, []).append(Part(down, {layer: up}, activation))

    if adapter.config is not None:
        for layer in adapter.lora_layers:
            a, b = (adapter.lora[f"{layer}.lora_{side}.weight"] for side in "AB")
            add(layer, a.T, b.T.double() * lora_scale(adapter.config, layer), "identity")
    for layer in adapter.bypass_layers:
        down, up = (adapter.recovery[f"{layer}.{part}"] for part in ("down", "up"))
        add(layer, down, up, adapter.meta["activation"])
    return parts


def check_name(model: nn.Module, name: str) -> None:
    """Raise `CaloraError` unless `name` can be the name of one more adapter on the model.

    PEFT finds an adapter's tensors by its name as one of the parts of a tensor's name: it may be no other part.
    """
    where = "adapter name"
    bypassed = any(name in bypasses for _, bypasses in bypasses_of(model))
    scaled = any(scales.of(name) is not None for _, _, scales in scales_of(model))
    if name in getattr(model, "peft_config", {}) or bypassed or scaled:
        raise CaloraError(where, "a name that is free", f"{name!r}, which is taken", "take that adapter off, or rename")
    parts = {part for path, _ in model.named_modules() for part in path.split(".")} | {"weight", "bias", "base_layer"}
    if not name or "." in name or name in parts or hasattr(Bypasses, name) or hasattr(TaskScales, name):
        expected = "a word without a dot that is no part of a layer's name and none of torch's own"
        raise CaloraError(where, expected, repr(name), "choose another name")


def check_lora(where: object, adapter: Adapter, layers: Mapping[str, nn.Linear]) -> None:
    """Raise `CaloraError` unless every LoRA tensor fits its layer: A [r, in], B [out, r] with the configuration's r."""
    if adapter.config is None:
        if adapter.lora:
            raise CaloraError(where, "a configuration of its LoRA", "none", "give the adapter its LoraConfig")
        return
    for layer in adapter.lora_layers:
        pair = [adapter.lora.get(f"{layer}.lora_{side}.weight") for side in "AB"]
        a, b = pair
        if a is None or b is None:
            raise CaloraError(f"{where}, layer {layer}", "both lora_A and lora_B", "one of them", "save it again whole")
        if layer not in layers:
            raise CaloraError(where, "layers of the base", layer, OWN_BASE)
        rank = lora_rank(adapter.config, layer)
        want = [(rank, layers[layer].in_features), (layers[layer].out_features, rank)]
        have = [tuple(a.shape), tuple(b.shape)]
        if have != want:
            expected, found = (f"lora_A {a} and lora_B {b}" for a, b in (want, have))
            raise CaloraError(f"{where}, layer {layer}", expected, found, OWN_BASE)


def check_named(where: object, adapter: Adapter, model: PreTrainedModel) -> None:
    """Raise `CaloraError` unless the LoRA tensors are those of the layers that the configuration names."""
    named = set() if adapter.config is None else targeted(model, adapter.config)
    wanted = {f"{layer}.lora_{side}.weight" for layer in named for side in "AB"}
    wrong = sorted(wanted ^ adapter.lora.keys())
    if wrong:
        raise CaloraError(where, "tensors for the layers that its target_modules name", wrong[0], OWN_BASE)


def _bypasses(where: object, adapter: Adapter, layers: Mapping[str, nn.Linear]) -> dict[str, RecoveryBypass]:
    """The bypasses of an adapter by layer, each of the shape of its layer."""
    made: dict[str, RecoveryBypass] = {}
    for name in adapter.bypass_layers:
        if name not in layers:
            raise CaloraError(where, "a bypass beside a layer of the base", name, OWN_BASE)
        down, up = (adapter.recovery.get(f"{name}.{part}") for part in ("down", "up"))
        if down is None or up is None:
            raise CaloraError(f"{where}, bypass of {name}", "both down and up", "one of them", "save it again whole")
        layer, rank = layers[name], down.shape[-1]
        want = [(layer.in_features, rank), (rank, layer.out_features)]
        have = [tuple(down.shape), tuple(up.shape)]
        if have != want:
            expected, found = (f"down {d} and up {u}" for d, u in (want, have))
            raise CaloraError(f"{where}, bypass of {name}", expected, found, OWN_BASE)
        made[name] = RecoveryBypass(*want[0][:1], want[1][1], rank, str(adapter.meta.get("activation")))
        made[name].load_state_dict({"down": down, "up": up}, assign=True)
        made[name].requires_grad_(False)
    return made


def check_scales(where: str, adapter: Adapter, layers: Mapping[str, nn.Linear]) -> None:
    """Raise `CaloraError` unless each ratio [out, groups] fits the grid of its layer."""
    for key, ratio in adapter.scales.items():
        name = key.removesuffix(PART)
        layer = layers.get(name)
        if layer is None or name == key:
            raise CaloraError(where, f"<layer>{PART} of a layer of the base", key, OWN_BASE)
        grid = on_grid(layer)
        if grid is None:
            expected = "a layer whose codes are on a grid (int8 to int2, packed or its dense view)"
            fix = "open the base that the adapter was made for with calora.load"
            raise CaloraError(f"{where}, scales of {name}", expected, type(layer).__name__, fix)
        want = [layer.out_features, grid.scale_groups]
        if list(ratio.shape) != want:
            raise CaloraError(f"{where}, scales of {name}", want, list(ratio.shape), OWN_BASE)


def set_active(model: PreTrainedModel, name: str | None) -> None:
    """Make `name` the active LoRA, bypass and scales everywhere; None switches all off."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(name is not None)
            if name is not None:
                module.set_adapter(name, inference_mode=True)
    activate(model, name)
    activate_scales(model, name)
    if sides := sides_of(model):
        sides.use(name)


def lora_alone(model: PreTrainedModel) -> None:
    """Switch off all of an adapter but its LoRA, which is what plain PEFT serves; not on a packed model."""
    activate(model, None)
    activate_scales(model, None)


def lora_state(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The LoRA tensors of a model by PEFT's names, without its prefix; none if `name` has no LoRA there."""
    if name not in getattr(model, "peft_config", {}):
        return {}
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {key.removeprefix(PREFIX): tensor.detach() for key, tensor in state.items()}


def take_adapter(
    model: nn.Module, config: LoraConfig | None, meta: Mapping[str, Any], name: str = "default"
) -> Adapter:
    """The adapter `name` as it stands on the model; `config` is None if it has no LoRA."""
    return Adapter(config, lora_state(model, name), recovery_state(model, name), dict(meta), scales_state(model, name))
