"""Import a LoRA that somebody else made: as plain PEFT computes it in eval mode, or refused by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from calora.adapters.codes import FIX
from calora.adapters.features import FEATURES, MERGE, PLAIN, PLAIN_STARTS, plain_lora, refused
from calora.adapters.layouts import read_folder
from calora.adapters.lora import (
    OWN_BASE,
    PREFIX,
    Adapter,
    check_lora,
    inject,
    lora_rank,
    lora_scale,
    lora_state,
    plain_config,
    targeted,
)
from calora.adapters.places import adapter_files
from calora.errors import CaloraError
from calora.models.anatomy import linear_layers, module_names

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # torch.compile's, FSDP's
FACTOR = re.compile(r"(?P<path>.+)\.(?P<factor>lora_[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
REPEATABLE = ("pissa", "olora")  # starts that are a function of the base's weights alone
PARTS = {  # of a tensor's name -> key of FEATURES
    ".lora_magnitude_vector": "use_dora",
    ".lora_B.bias": "lora_bias",
    ".modules_to_save": "modules_to_save",
    ".token_adapter": "trainable_token_indices",
    ".trainable_tokens_": "trainable_token_indices",
}
LOAD = "put it on that base with load_adapter; a new base is given the LoRA that it was inherited from"


def import_lora(directory: Path, model: PreTrainedModel) -> Adapter:
    """Read PEFT's or mlx-lm's folder for the base `model`; each layer is then named, with its rank and its scale, explicitly.

    What is for training only (dropout, the start of A and B) is left out. What PiSSA and OLoRA take from the base at
    their start is added to the LoRA, exactly, at twice the rank. The names of the tensors may lack PEFT's prefix, or
    hold those of torch.compile, FSDP, DeepSpeed or of one adapter, as long as each fits one layer.

    Args:
        model: the uncompressed base; it is only looked at.

    Raises:
        CaloraError: a file is missing or broken, the adapter is more than a plain LoRA, or it is of another base.
    """
    raw, tensors = read_folder(directory)
    check_vocabulary(adapter_files(directory)[1], tensors, model)
    return plain_of(directory, raw, tensors, model)


def plain_of(directory: Path, raw: Mapping[str, Any], tensors: Mapping[str, Tensor], model: PreTrainedModel) -> Adapter:
    """`import_lora` of entries and tensors that were read from `directory`."""
    path, weights = adapter_files(directory)
    config = plain_lora(path, raw, (*PLAIN_STARTS, *REPEATABLE))
    if "calora" in raw:
        raise refused(path, "an adapter of CA-LoRA with parts for its own base", str(raw["calora"]), LOAD)
    if config.modules_to_save:
        raise refused(path, FEATURES["modules_to_save"][0], f"modules_to_save: {config.modules_to_save}", MERGE)
    layers, wanted = linear_layers(model), _targeted(path, model, config)
    adapter = Adapter(config, _by_layer(weights, tensors, model))
    check_values(weights, adapter.lora)
    check_lora(weights, adapter, layers)
    have = set(adapter.lora_layers)
    for expected, found in ((wanted, have), (have, wanted)):
        for layer in sorted(expected - found):
            what = "no tensors of it" if expected is wanted else "tensors of a layer that target_modules does not name"
            raise CaloraError(f"{weights}, layer {layer}", "the layers of target_modules", what, FIX)
    ranks = {layer: lora_rank(config, layer) for layer in have}
    scales = {layer: lora_scale(config, layer) for layer in have}
    start = str(raw.get("init_lora_weights")).lower()
    if start in REPEATABLE:
        for layer in have:
            adapter.lora |= _from_the_base(adapter.lora, layer, layers[layer], ranks[layer], scales[layer], start)
        ranks = {layer: 2 * rank for layer, rank in ranks.items()}
    return Adapter(plain_config(ranks, scales, module_names(model)), dict(sorted(adapter.lora.items())))


def _from_the_base(
    lora: Mapping[str, Tensor], layer: str, module: nn.Linear, rank: int, scale: float, start: str
) -> dict[str, Tensor]:
    """A LoRA that counts from W - s B0 A0 as one that counts from W: s (B A - B0 A0) = s [B, -B0] [A; A0], exactly.

    B0 A0 is what the start takes from W, which PEFT finds again for a copy of the layer.
    """
    copied = nn.ModuleDict({"copy": nn.Linear(module.in_features, module.out_features, bias=False)})
    copied["copy"].weight = nn.Parameter(module.weight.detach().float().clone())
    options: dict[str, Any] = {"r": rank, "lora_alpha": scale * rank, "init_lora_weights": start}
    inject(copied, LoraConfig(target_modules=["copy"], **options))
    first = lora_state(copied)
    a, b = (lora[f"{layer}.lora_{side}.weight"].float() for side in "AB")
    return {
        f"{layer}.lora_A.weight": torch.cat([a, first["copy.lora_A.weight"]]),
        f"{layer}.lora_B.weight": torch.cat([b, -first["copy.lora_B.weight"]], dim=1),
    }


def _targeted(path: Path, model: PreTrainedModel, config: LoraConfig) -> set[str]:
    """`targeted`, or a `CaloraError` if it is not linear layers of the blocks alone."""
    try:
        found = targeted(model, config)
    except (ValueError, TypeError, re.error) as error:
        wrong = " ".join(str(error).split())
        raise CaloraError(path, "target_modules that PEFT can read", wrong, "name a folder that PEFT wrote") from None
    layers, tables = linear_layers(model), tables_of(model)
    for name in sorted(found - layers.keys()):
        if name in tables:
            raise refused(path, f"LoRA on {tables[name]}", f"target_modules: {name}", MERGE)
        raise CaloraError(path, "target_modules that are linear layers of the base", name, "train a LoRA on those")
    if not found:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
        raise CaloraError(path, f"target_modules among {known}", config.target_modules, OWN_BASE)
    return found


def tables_of(model: PreTrainedModel) -> dict[str, str]:
    """Name -> what it is, of the modules that hold a row for each token."""
    head = model.get_output_embeddings()
    tables = {name: "embeddings" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    return tables | {name: "the output head" for name, module in model.named_modules() if module is head}


def _by_layer(path: Path, tensors: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """`<layer>.lora_A.weight` and `<layer>.lora_B.weight` by the base's own names."""
    layers, tables = linear_layers(model), tables_of(model)
    found: dict[str, Tensor] = {}
    adapters: set[str | None] = set()
    for key, tensor in sorted(tensors.items()):
        match = FACTOR.fullmatch(key)
        if match is None:
            if feature := beyond_factors(path, key, tensor, model):
                raise refused(path, feature[0], key, feature[1])
            continue
        adapters.add(match["adapter"])
        layer = module_of(path, match["path"], [*layers, *tables])
        if layer in tables:
            raise refused(path, f"LoRA on {tables[layer]}", key, MERGE)
        name = f"{layer}.{match['factor']}.weight"
        if name in found:
            raise CaloraError(path, f"one tensor for {name}", f"a second one, {key}", FIX)
        found[name] = tensor
    if len(adapters) > 1:
        raise CaloraError(path, "one adapter", f"tensors of several: {sorted(map(str, adapters))}", "save them apart")
    return found


def module_of(path: Path, name: str, modules: Iterable[str]) -> str:
    """The module of the base that a name means, whatever stands in front of the base's own name or is left out."""
    bare = ".".join(part for part in name.removeprefix(PREFIX).split(".") if part not in WRAPPERS)
    known = list(modules)
    if bare in known:
        return bare
    fits = [own for own in known if bare.endswith(f".{own}") or own.endswith(f".{bare}")]
    if len(fits) != 1:
        found = f"{name}, which fits {' and '.join(fits[:2]) if fits else 'none'}"
        raise CaloraError(path, "tensors that each fit one layer of the base", found, OWN_BASE)
    return fits[0]


def beyond_factors(path: Path, key: str, tensor: Tensor, model: PreTrainedModel) -> tuple[str, str] | None:
    """Of a tensor that is no factor of a LoRA: the feature that it is of, and the way to a plain LoRA.

    None if it only repeats weights of the base.

    Raises:
        CaloraError: it is of no module of the base.
    """
    for part, feature in PARTS.items():
        if part in key:
            return FEATURES[feature]
    if ".lora_embedding_" in key:
        return "LoRA on embeddings", MERGE
    if key.endswith(".bias"):
        return "biases of the base, trained (bias)", MERGE
    owner = key.removesuffix(".weight").removesuffix(".base_layer")
    try:
        table = model.get_submodule(module_of(path, owner, [name for name, _ in model.named_modules() if name]))
    except CaloraError:
        raise CaloraError(path, "LoRA factors of the base's layers alone", key, OWN_BASE) from None
    own: Any = getattr(table, "weight", None)
    same = isinstance(table, nn.Embedding | nn.Linear) and own is not None and tensor.shape == own.shape
    if same and torch.equal(tensor.to(own.dtype), own.detach().cpu()):
        return None
    return FEATURES["modules_to_save"]


def check_vocabulary(path: Path, tensors: Mapping[str, Tensor], model: PreTrainedModel) -> None:
    """Raise `CaloraError` if a tensor has rows for another number of tokens than the base."""
    for key, axis, own in token_axes(tensors, model):
        tokens = tensors[key].shape[axis]
        if tokens != own:
            fix = "name the base with those tokens: model.resize_token_embeddings(n), then save_pretrained(folder)"
            raise CaloraError(f"{path}, {key}", f"{own} tokens, the base's", f"{tokens} tokens", fix)


def token_axes(tensors: Mapping[str, Tensor], model: PreTrainedModel) -> list[tuple[str, int, int]]:
    """(name, axis, tokens of the base) of the tensors that have an entry for each token."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    named = model.named_modules(remove_duplicate=False)
    tables: dict[str, Any] = {name.rpartition(".")[2]: module for name, module in named if module in ends}
    others = (".lora_A", ".lora_embedding_B", ".trainable_tokens", ".token_adapter")
    found = []
    for key, tensor in sorted(tensors.items()):
        owner = next((part for part in key.split(".") if part in tables), None)
        if owner is not None and tensor.ndim == 2 and not any(part in key for part in others):
            found.append((key, 1 if ".lora_embedding_A" in key else 0, len(tables[owner].weight)))
    return found


def check_values(path: Path, lora: Mapping[str, Tensor]) -> None:
    """Raise `CaloraError` unless there are tensors, all of finite floating point numbers."""
    if not lora:
        raise CaloraError(path, "lora_A and lora_B of at least one layer", "none", PLAIN)
    for key, tensor in lora.items():
        if not tensor.is_floating_point():
            raise CaloraError(f"{path}, {key}", "floating point numbers", tensor.dtype, "save it as fp32, fp16 or bf16")
        if tensor.numel() and not bool(tensor.float().isfinite().all()):
            raise CaloraError(f"{path}, {key}", "finite values", "NaN or Inf", "name an adapter that is not broken")
