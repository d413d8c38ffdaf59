"""Any adapter that PEFT computes on the uncompressed base: a plain LoRA to carry over, or a teacher whose outputs are distilled."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    VeraConfig,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calora.adapters.codes import FIX
from calora.adapters.features import FEATURES, FIELDS, MERGE, PLAIN, PLAIN_STARTS, plain_lora, refused
from calora.adapters.folder import read_plain_lora
from calora.adapters.foreign import (
    FACTOR,
    REPEATABLE,
    WRAPPERS,
    beyond_factors,
    check_values,
    check_vocabulary,
    module_of,
    plain_of,
    tables_of,
    token_axes,
)
from calora.adapters.layouts import read_folder
from calora.adapters.lora import OWN_BASE, PREFIX, Adapter, attach_adapter, set_active
from calora.adapters.places import CONFIG, LORA, adapter_files
from calora.common.files import read_json, whole_directory, write_json
from calora.common.tensors import read_tensors, write_tensors
from calora.errors import CaloraError
from calora.models.anatomy import linear_layers
from calora.models.loading import load_tokenizer

WHOLE = "whole"  # the folder inside a teacher's that holds what is more than its LoRA
NAME = "teacher"  # of such an adapter on a model
KIND = "kind.json"
TARGETED = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "fan_in_fan_out",
)
LYCORIS = (*TARGETED, "r", "alpha", "rank_pattern", "alpha_pattern")
KINDS: dict[str, tuple[str, type[PeftConfig], tuple[str, ...]]] = {  # peft_type -> name, configuration, entries of it
    "LORA": (
        "LoRA", LoraConfig, (*FIELDS, "fan_in_fan_out", "use_dora", "lora_bias", "bias", "trainable_token_indices"),
    ),
    "IA3": ("(IA)3", IA3Config, (*TARGETED, "feedforward_modules")),
    "VERA": ("VeRA", VeraConfig, (*TARGETED, "r", "projection_prng_key", "save_projection", "bias")),
    "ADALORA": (
        "AdaLoRA", AdaLoraConfig,
        (*TARGETED, "target_r", "init_r", "lora_alpha", "rank_pattern", "bias"),
    ),
    "LOHA": ("LoHa", LoHaConfig, LYCORIS),
    "LOKR": ("LoKr", LoKrConfig, (*LYCORIS, "decompose_both", "decompose_factor")),
}  # fmt: skip
BEYOND = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices")  # a LoRA with these is a teacher
HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # task types with a head that the base has not


@dataclass(frozen=True)
class Whole:
    """An adapter that no plain LoRA on the blocks' linear layers holds.

    Args:
        config: PEFT's.
        tensors: by PEFT's own names, as it stores them.
        beyond: what is more than such a LoRA, by name; at least one.
        lora: the part that is one, exactly; None where the method is another one.
    """

    config: PeftConfig
    tensors: dict[str, Tensor]
    beyond: list[str]
    lora: Adapter | None = None

    @property
    def parameters(self) -> int:
        """Number of stored parameters."""
        return sum(tensor.numel() for tensor in self.tensors.values())


def import_adapter(
    directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, texts: Sequence[str] = ()
) -> Adapter | Whole:
    """Read an adapter folder for the base `model`: a plain LoRA if it is one, else what PEFT computes there.

    Args:
        model: the uncompressed base; it is only looked at.
        tokenizer, texts: the base's, and texts of the task. An adapter with more tokens than the base is taken if its own
            tokenizer reads them alike: then the further tokens are never met, and their rows are left out.

    Raises:
        CaloraError: a file is missing or broken, PEFT computes no such adapter here, or it is of another base.
    """
    raw, tensors = read_folder(directory)
    path, weights = adapter_files(directory)
    if "calora" in raw:
        return plain_of(directory, raw, tensors, model)  # refuses it
    if raw.get("task_type") in HEADS:
        raise refused(path, "a head of its own", f"task_type: {raw['task_type']}", "train it to write the label")
    tensors = _of_the_base_s_tokens(directory, tensors, model, tokenizer, texts)
    _check_kind(path, raw)
    beyond = _beyond(weights, raw, tensors, model)
    if not beyond:
        return plain_of(directory, raw, tensors, model)
    if raw["peft_type"] == "LORA":
        _check_plain(path, raw, PLAIN_STARTS)  # PiSSA's start is taken off a plain LoRA alone
    named = _by_peft_s_names(weights, tensors, model)
    check_values(weights, named)
    return Whole(_config_of(path, raw), named, beyond, _carried(directory, raw, tensors, model))


def attach_whole(model: PreTrainedModel, whole: Whole, where: object = "adapter") -> None:
    """Put an adapter on the base, as PEFT does for inference: in use, in place, for good.

    Args:
        where: what a message calls it.

    Raises:
        CaloraError: a tensor is missing, of another shape, or of no module of the base; the model is of no use then.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of projections that are drawn again, of embeddings that are trained
            theirs = PeftModel(model, copy.deepcopy(whole.config), NAME)
            expected = get_peft_model_state_dict(theirs, adapter_name=NAME, save_embedding_layers=False)
            _check_shapes(where, expected, whole.tensors)
            result: Any = set_peft_model_state_dict(theirs, dict(whole.tensors), adapter_name=NAME)
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        found = " ".join(str(error).split())[:200]
        raise CaloraError(where, "an adapter that PEFT can put on the base", found, OWN_BASE) from None
    if result.unexpected_keys:
        raise CaloraError(where, "tensors of the base's modules", result.unexpected_keys[0], OWN_BASE)
    theirs.eval().requires_grad_(False)


def write_whole(directory: Path, whole: Whole) -> None:
    """Write an adapter as PEFT writes it (safetensors), and what it is more than a LoRA."""
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in whole.config.to_dict().items()}
    with whole_directory(directory) as scratch:
        write_json(scratch / CONFIG, values)
        write_tensors(scratch / LORA, whole.tensors)
        write_json(scratch / KIND, {"beyond": whole.beyond})


def read_whole(directory: Path) -> Whole:
    """Read what `write_whole` wrote, without its `lora`."""
    path = directory / CONFIG
    config = _config_of(path, read_json(path, FIX))
    return Whole(config, read_tensors(directory / LORA, FIX), read_json(directory / KIND, FIX)["beyond"])


def attach_teacher(model: PreTrainedModel, directory: Path, name: str) -> int:
    """Put the teacher of a folder on the base, in use; returns the number of its parameters.

    The folder holds a plain LoRA, and where the teacher is more than that, all of it in WHOLE.
    """
    if (directory / WHOLE).exists():
        whole = read_whole(directory / WHOLE)
        attach_whole(model, whole)
        return whole.parameters
    adapter = read_plain_lora(directory)
    attach_adapter(model, adapter, name)
    set_active(model, name)
    return adapter.parameters


def _check_kind(path: Path, raw: Mapping[str, Any]) -> None:
    """Raise `CaloraError` unless PEFT computes an adapter of these entries here, in eval mode, for any text."""
    kind = raw.get("peft_type")
    if kind not in KINDS:
        known = ", ".join(name for name, _, _ in KINDS.values())
        prompts = "PROMPT" in str(kind) or kind in ("PREFIX_TUNING", "P_TUNING", "CARTRIDGE")
        raise CaloraError(path, f"{known}, or DoRA (peft_type)", kind, PLAIN if prompts else MERGE)
    if kind == "LORA":
        _check_plain(path, raw, (*PLAIN_STARTS, *REPEATABLE))


def _check_plain(path: Path, raw: Mapping[str, Any], starts: Sequence[str]) -> None:
    """`plain_lora`, but for what makes a LoRA a teacher."""
    plain_lora(path, {key: value for key, value in raw.items() if key not in BEYOND}, starts)


def _beyond(path: Path, raw: Mapping[str, Any], tensors: Mapping[str, Tensor], model: PreTrainedModel) -> list[str]:
    """What of an adapter is more than a plain LoRA on the linear layers, by name, each once."""
    if raw["peft_type"] != "LORA":
        return [KINDS[raw["peft_type"]][0]]
    found = [FEATURES[key][0] for key in BEYOND if raw.get(key)]
    if not raw.get("use_dora") and any(".lora_magnitude_vector" in key for key in tensors):
        fix = "write use_dora: true into adapter_config.json, if it was trained so"
        raise refused(path, "DoRA", "magnitudes, of which the configuration does not say", fix)
    tables, layers = tables_of(model), linear_layers(model)
    for key, tensor in sorted(tensors.items()):
        match = FACTOR.fullmatch(key)
        if match is None:
            feature = beyond_factors(path, key, tensor, model)
            found += [feature[0]] if feature else []
        elif (layer := module_of(path, match["path"], [*layers, *tables])) in tables:
            found.append(f"LoRA on {tables[layer]}")
    return list(dict.fromkeys(found))


def _carried(
    directory: Path, raw: Mapping[str, Any], tensors: Mapping[str, Tensor], model: PreTrainedModel
) -> Adapter | None:
    """The LoRA on the blocks' linear layers, where it stands beside other things; None where it acts through them (DoRA)."""
    if raw["peft_type"] != "LORA" or raw.get("use_dora"):
        return None
    path, layers, tables = adapter_files(directory)[1], linear_layers(model), tables_of(model)
    factors: dict[str, Tensor] = {}
    named: set[str] = set()
    for key, tensor in tensors.items():
        match = FACTOR.fullmatch(key)
        if match and (layer := module_of(path, match["path"], [*layers, *tables])) in layers:
            factors[key] = tensor
            named.add(layer)
    if not factors:
        return Adapter(None, {})
    entries = {
        key: value for key, value in raw.items() if key not in (*BEYOND, "exclude_modules", "layers_to_transform")
    }
    return plain_of(directory, {**entries, "layers_pattern": None, "target_modules": sorted(named)}, factors, model)


def _config_of(path: Path, raw: Mapping[str, Any]) -> PeftConfig:
    """PEFT's configuration, of the entries alone that say what is computed: nothing is imported or downloaded by it."""
    _, cls, fields = KINDS[raw["peft_type"]]
    known = {field.name for field in dataclasses.fields(cls)}
    values = {key: raw[key] for key in fields if key in known and raw.get(key) is not None}
    if raw["peft_type"] == "ADALORA":
        values["total_step"] = 1  # the schedule is over: any that PEFT takes
    try:
        return cls(**values, inference_mode=True)
    except (TypeError, ValueError) as error:
        found = " ".join(str(error).split())
        raise CaloraError(path, "a configuration that PEFT can read", found, "name a folder that PEFT wrote") from None


def _by_peft_s_names(path: Path, tensors: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors as PEFT stores them, whatever stands in front of the base's own names."""
    modules = [name for name, _ in model.named_modules() if name]
    found: dict[str, Tensor] = {}
    for key, tensor in sorted(tensors.items()):
        if _shared(key):
            found[key] = tensor
            continue
        parts = [part for part in key.removeprefix(PREFIX).split(".") if part not in (*WRAPPERS, "modules_to_save")]
        own = next((i for i, part in enumerate(parts) if _is_part(part)), len(parts) - 1)
        if parts[own] in ("weight", "base_layer") and beyond_factors(path, key, tensor, model) is None:
            continue  # it repeats the base's embeddings
        rest = [part for part in parts[own:] if part != "default"]
        module = module_of(path, ".".join(parts[:own]), modules)
        name = f"{PREFIX}{module}.{'.'.join(rest)}"
        if name in found:
            raise CaloraError(path, f"one tensor for {name}", f"a second one, {key}", FIX)
        found[name] = tensor.contiguous()
    return found


def _shared(key: str) -> bool:
    """Whether a tensor is one of VeRA's two projections, which all layers share."""
    return key.removeprefix(PREFIX).split(".")[-1] in ("vera_A", "vera_B")


def _is_part(name: str) -> bool:
    """Whether a part of a tensor's name begins what PEFT added to a module."""
    return name.startswith(("lora_", "ia3_", "vera_", "hada_", "lokr_", "token_adapter", "ranknum", "base_layer"))


def _check_shapes(where: object, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise `CaloraError` unless all that PEFT stores of such an adapter is there, in its shape: it would leave out the rest."""
    for key, tensor in sorted(expected.items()):
        if key not in found:
            raise CaloraError(where, f"a tensor {key}", "none", OWN_BASE)
        if found[key].shape != tensor.shape:
            raise CaloraError(f"{where}, {key}", tuple(tensor.shape), tuple(found[key].shape), OWN_BASE)


def _of_the_base_s_tokens(
    directory: Path, tensors: dict[str, Tensor], model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None, texts: Sequence[str],
) -> dict[str, Tensor]:  # fmt: skip
    """The tensors without the rows of tokens that the base has not, if none of them is in the task's texts.

    Raises:
        CaloraError: the adapter has no tokenizer of its own to tell, or it reads the texts in other tokens.
    """
    path = adapter_files(directory)[1]
    more = [(key, axis, own) for key, axis, own in token_axes(tensors, model) if tensors[key].shape[axis] > own]
    if not more or tokenizer is None or not (directory / "tokenizer.json").exists():
        check_vocabulary(path, tensors, model)
        return tensors
    theirs = load_tokenizer(directory)
    for text in texts:
        if theirs(text).input_ids != tokenizer(text).input_ids:
            fix = "name the base with those tokens: model.resize_token_embeddings(n), then save_pretrained(folder)"
            found = f"others by its own tokenizer: {text!r:.60}"
            raise CaloraError(directory, "the task's texts in tokens of the base", found, fix)
    cut = {key: tensors[key].narrow(axis, 0, own).contiguous() for key, axis, own in more}
    check_vocabulary(path, {**tensors, **cut}, model)  # nor fewer
    return {**tensors, **cut}
