"""Import a LoRA that somebody else made: as plain PEFT computes it in eval mode, or refused by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn
from transformers import PreTrainedModel

from calora.adapters.features import FEATURES, MERGE, PLAIN, plain_lora, refused
from calora.adapters.folder import CONFIG, FIX, LORA
from calora.adapters.lora import OWN_BASE, PREFIX, Adapter, check_lora, lora_rank, lora_scale, plain_config
from calora.common.artifacts import read_json, read_tensors
from calora.errors import CaloraError
from calora.models.anatomy import linear_layers

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # torch.compile's, FSDP's
FACTOR = re.compile(r"(?P<path>.+)\.(?P<factor>lora_[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
PARTS = {  # of a tensor's name -> key of FEATURES
    ".lora_magnitude_vector": "use_dora",
    ".lora_B.bias": "lora_bias",
    ".modules_to_save": "modules_to_save",
    ".token_adapter": "trainable_token_indices",
    ".trainable_tokens_": "trainable_token_indices",
}


def import_lora(directory: Path, model: PreTrainedModel) -> Adapter:
    """Read a PEFT folder for the base `model`; every layer is then named, with its rank and its scale, explicitly.

    What is for training only (dropout, the start of A and B) is left out. The names of the tensors may lack PEFT's
    prefix, or hold those of torch.compile, FSDP, DeepSpeed or of one adapter, as long as each fits one layer.

    Args:
        model: the uncompressed base; it is only looked at.

    Raises:
        CaloraError: a file is missing or broken, the adapter is more than a plain LoRA, or it is of another base.
    """
    path = directory / CONFIG
    config = plain_lora(path, read_json(path, FIX))
    if config.modules_to_save:
        raise refused(path, FEATURES["modules_to_save"][0], f"modules_to_save: {config.modules_to_save}", MERGE)
    layers = linear_layers(model)
    wanted = _targeted(path, model, config)
    adapter = Adapter(config, _by_layer(directory / LORA, read_tensors(directory / LORA, FIX), model))
    _check_values(directory / LORA, adapter.lora)
    check_lora(directory / LORA, adapter, layers)
    have = set(adapter.lora_layers)
    for expected, found in ((wanted, have), (have, wanted)):
        for layer in sorted(expected - found):
            what = "no tensors of it" if expected is wanted else "tensors of a layer that target_modules does not name"
            raise CaloraError(f"{directory / LORA}, layer {layer}", "the layers of target_modules", what, FIX)
    ranks = {layer: lora_rank(config, layer) for layer in have}
    scales = {layer: lora_scale(config, layer) for layer in have}
    return Adapter(plain_config(ranks, scales, layers), dict(sorted(adapter.lora.items())))


def targeted(model: PreTrainedModel, config: LoraConfig) -> set[str]:
    """The modules that PEFT would put a LoRA of this configuration on, by name."""
    targets: Any = config.target_modules
    if targets is None:
        targets = LoraModel.target_module_mapping.get(model.config.model_type)
    layers = linear_layers(model)
    everything = isinstance(targets, str) and targets.lower() == "all-linear"
    own = LoraConfig(
        target_modules=list(layers) if everything or targets is None else targets,
        exclude_modules=config.exclude_modules,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
    )
    if targets is None:
        return set()
    names = {name.replace(".base_layer", "") for name, _ in model.named_modules() if name and ".lora_" not in name}
    return {name for name in names if check_target_module_exists(own, name)}


def _targeted(path: Path, model: PreTrainedModel, config: LoraConfig) -> set[str]:
    """`targeted`, or a `CaloraError` if it is not linear layers of the blocks alone."""
    try:
        found = targeted(model, config)
    except (ValueError, TypeError, re.error) as error:
        raise CaloraError(path, "target_modules that PEFT can read", error, "name a folder that PEFT wrote") from None
    layers, tables = linear_layers(model), _tables(model)
    for name in sorted(found - layers.keys()):
        if name in tables:
            raise refused(path, f"LoRA on {tables[name]}", f"target_modules: {name}", MERGE)
        raise CaloraError(path, "target_modules that are linear layers of the base", name, OWN_BASE)
    if not found:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
        raise CaloraError(path, f"target_modules among {known}", config.target_modules, OWN_BASE)
    return found


def _tables(model: PreTrainedModel) -> dict[str, str]:
    """Name -> what it is, of the modules that hold a row for each token."""
    head = model.get_output_embeddings()
    tables = {name: "embeddings" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    return tables | {name: "the output head" for name, module in model.named_modules() if module is head}


def _by_layer(path: Path, tensors: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """`<layer>.lora_A.weight` and `<layer>.lora_B.weight` by the base's own names."""
    layers, tables = linear_layers(model), _tables(model)
    found: dict[str, Tensor] = {}
    adapters: set[str | None] = set()
    for key, tensor in sorted(tensors.items()):
        match = FACTOR.fullmatch(key)
        if match is None:
            _refuse_tensor(path, key, tensor, model)
            continue
        adapters.add(match["adapter"])
        layer = _module(path, match["path"], [*layers, *tables])
        if layer in tables:
            raise refused(path, f"LoRA on {tables[layer]}", key, MERGE)
        name = f"{layer}.{match['factor']}.weight"
        if name in found:
            raise CaloraError(path, f"one tensor for {name}", f"a second one, {key}", FIX)
        found[name] = tensor
    if len(adapters) > 1:
        raise CaloraError(path, "one adapter", f"tensors of several: {sorted(map(str, adapters))}", "save them apart")
    return found


def _module(path: Path, name: str, modules: Iterable[str]) -> str:
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


def _refuse_tensor(path: Path, key: str, tensor: Tensor, model: PreTrainedModel) -> None:
    """Raise `CaloraError` for a tensor that is no factor of a LoRA, unless it only repeats the base's embeddings."""
    for part, feature in PARTS.items():
        if part in key:
            raise refused(path, FEATURES[feature][0], key, FEATURES[feature][1])
    if ".lora_embedding_" in key:
        raise refused(path, "LoRA on embeddings", key, MERGE)
    if key.endswith(".bias"):
        raise refused(path, "biases of the base, trained (bias)", key, MERGE)
    owner = key.removesuffix(".weight").removesuffix(".base_layer")
    try:
        table = model.get_submodule(_module(path, owner, [name for name, _ in model.named_modules() if name]))
    except CaloraError:
        raise CaloraError(path, "LoRA factors of the base's layers alone", key, OWN_BASE) from None
    own = getattr(table, "weight", None)
    if own is None or not isinstance(table, nn.Embedding | nn.Linear):
        raise refused(path, FEATURES["modules_to_save"][0], key, MERGE)
    if tensor.ndim == 2 and tensor.shape[1] == own.shape[1] and tensor.shape[0] != own.shape[0]:
        fix = "name the base with those tokens: model.resize_token_embeddings(n), merge_and_unload, save_pretrained"
        raise CaloraError(f"{path}, {key}", f"{own.shape[0]} tokens, the base's", f"{tensor.shape[0]} tokens", fix)
    if tensor.shape != own.shape or not torch.equal(tensor.to(own.dtype), own.detach().cpu()):
        raise refused(path, FEATURES["modules_to_save"][0], key, MERGE)


def _check_values(path: Path, lora: Mapping[str, Tensor]) -> None:
    """Raise `CaloraError` unless there are tensors, all of finite floating point numbers."""
    if not lora:
        raise CaloraError(path, "lora_A and lora_B of at least one layer", "none", PLAIN)
    for key, tensor in lora.items():
        if not tensor.is_floating_point():
            raise CaloraError(f"{path}, {key}", "floating point numbers", tensor.dtype, "save it as fp32, fp16 or bf16")
        if tensor.numel() and not bool(tensor.float().isfinite().all()):
            raise CaloraError(f"{path}, {key}", "finite values", "NaN or Inf", "name an adapter that is not broken")
