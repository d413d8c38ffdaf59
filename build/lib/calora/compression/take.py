"""Take a checkpoint that others have compressed as C: codes on a grid of ours as they are, all else as plain values.

Nothing is rounded anew: what the recipe compresses is what stands on disk. Everything that the checkpoint holds is taken, its norms,
biases and tables too. Where it was scaled before it was rounded (AWQ, SmoothQuant), the base is brought into the same coordinates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from calora.compression import quantize
from calora.compression.options import FIX, Plan, one_of
from calora.compression.walk import Block, Change
from calora.errors import CaloraError
from calora.models.anatomy import linear_layers
from calora.models.tasks import Example
from calora.taken import open_checkpoint
from calora.taken.checkpoint import Checkpoint
from calora.taken.coordinates import rescaled
from calora.taken.values import dense_of, layer_of

ALIKE = 0.5  # least cosine of a layer's weights and the base's: rounding to 2 bits leaves more
SAME = ("model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rope_parameters")
OTHER = "take a checkpoint of this base, or use it as the base itself (base: {source: path, ...}): its dense view is then the teacher's"


@dataclass(frozen=True)
class Options:
    """Options of `take`.

    Args:
        path: a folder of safetensors whose config.json has a `quantization_config`, or a GGUF file.
        embeddings: `int8`, `int4` or `none`, as in `quantize`: checkpoints mostly leave the table in 16 bits.
    """

    path: str
    embeddings: str = "none"

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            raise CaloraError("take.path", "a folder or a GGUF file", repr(self.path), FIX)
        one_of("take.embeddings", self.embeddings, ("int8", "int4", "none"))


def check(model: PreTrainedModel, options: Options) -> None:
    """Raise `CaloraError` unless the checkpoint can be read, and is of the base's kind and shape."""
    checkpoint = open_checkpoint(Path(options.path))
    ours, theirs = model.state_dict(), checkpoint.empty.state_dict()
    if type(checkpoint.empty).__name__ != type(model).__name__:
        raise CaloraError(options.path, f"a {type(model).__name__}", f"a {type(checkpoint.empty).__name__}", OTHER)
    for name, tensor in ours.items():
        shape = theirs[name].shape if name in theirs else None
        if shape != tensor.shape:
            found = "none" if shape is None else list(shape)
            raise CaloraError(f"{options.path}, {name}", f"the base's shape {list(tensor.shape)}", found, OTHER)
    for key, value in _settings(model.config).items():
        own = _settings(checkpoint.empty.config).get(key)
        if not _alike(value, own):
            raise CaloraError(f"{options.path}, {key}", f"{value}, as the base has it", own, OTHER)
    held = checkpoint.names
    for name, _ in model.named_parameters():
        if name not in held:
            raise CaloraError(
                f"{options.path}, {name}", "all tensors of the base", "none of that name", "take a whole one"
            )
    if options.embeddings != "none":
        quantize.check_tables(model, options.embeddings)


def _settings(config: PretrainedConfig) -> dict[str, Any]:
    """What shapes do not show."""
    told = config.get_text_config().to_dict()
    return {key: told[key] for key in SAME if told.get(key) is not None}


def _alike(one: Any, other: Any) -> bool:
    """Equal, numbers within single precision, in which GGUF keeps them."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return all(_alike(one[key], other[key]) for key in set(one) & set(other))
    if isinstance(one, int | float) and isinstance(other, int | float):
        return abs(one - other) <= 1e-6 * abs(one)
    return bool(one == other)


def plan(model: PreTrainedModel, options: Options, examples: Sequence[Example]) -> Plan:
    """Bring the base into the checkpoint's coordinates, and give it what the checkpoint holds outside of linear layers.

    Raises:
        CaloraError: the weights are not those of the base, or it has a head of its own where the base has none.
    """
    checkpoint = open_checkpoint(Path(options.path))
    kept, layers = rescaled(model, checkpoint), linear_layers(model)
    weights = {f"{name}.weight" for name in layers}
    for name, parameter in model.named_parameters():
        if name not in weights:
            parameter.data = dense_of(checkpoint.values(name), parameter.dtype).reshape(parameter.shape)
    _check_head(model, checkpoint)
    first = next(iter(layers)).rpartition(".")[0]
    for name, layer in layers.items():
        if name.startswith(first):
            theirs = dense_of(checkpoint.values(f"{name}.weight"), torch.float32)
            alike = float(F.cosine_similarity(theirs.flatten(), layer.weight.float().flatten(), dim=0))
            if alike < ALIKE:
                found = f"a cosine of {alike:.2f}: another model's, or rotated ones"
                raise CaloraError(f"{options.path}, {name}", "weights that are the base's, rounded", found, OTHER)
    told = {"path": options.path, "method": checkpoint.method, "bytes": checkpoint.bytes}
    return Plan({"checkpoint": checkpoint}, kept=kept, taken={**told, "rescaled": len(kept)})


def _check_head(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Raise unless the checkpoint's head is its table where the base's is."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not table.weight:
        return
    name = next(path for path, module in model.named_modules() if module is head) + ".weight"
    if name in checkpoint.names:
        own: Tensor = dense_of(checkpoint.values(name), table.weight.dtype)
        if not torch.equal(own, table.weight):
            raise CaloraError(
                f"{checkpoint.path}, {name}", "the table's weights, as in the base", "a head of its own", OTHER
            )


def change(block: Block, options: Options, plan: Plan) -> Change:
    """Put what the checkpoint holds in the place of every linear layer of the block."""
    checkpoint: Checkpoint = plan.values["checkpoint"]
    made = Change()
    for name, layer in block.layers.items():
        values = checkpoint.values(f"{name}.weight")
        plain = isinstance(values, Tensor)
        taken = layer_of(values, layer.bias, block.dtype)
        made.modules[name] = taken.to(layer.weight.dtype) if plain else taken
        made.notes[name] = {
            "taken": "plain values" if plain else "codes",
            "bytes_in_checkpoint": checkpoint.bytes_of(f"{name}.weight"),
        }
    return made


def finish(model: PreTrainedModel, options: Options, _: Plan) -> list[str]:
    """Quantise the embeddings if asked; the names of the new modules."""
    return quantize.quantise_tables(model, options.embeddings)
