"""The parts of a model: stacks of blocks, their linear layers, feed-forwards and heads, and how its configuration names sizes.

Whatever depends on the kind of model, apart from how it is run (`calora.models.families`), is asked here.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from calora.errors import CaloraError
from calora.models.uniform import uniform

FEED_FORWARDS = (  # layers that make the neurons (of two the first goes through the activation), layer that reads them
    (("gate_proj", "up_proj"), "down_proj"),
    (("wi_0", "wi_1"), "wo"),
    (("wi",), "wo"),
    (("fc1",), "fc2"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("c_fc",), "c_proj"),
    (("intermediate.dense",), "output.dense"),
)
FUSED_FEED_FORWARDS = ((("gate_up_proj",), "down_proj"),)  # gate and up in one layer
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FUSED = ("qkv_proj", "query_key_value", "c_attn")  # queries, keys and values in one layer
NAMES = {  # word -> last parts of the names of such layers in an attention
    "query": ("q_proj", "q", "query", *FUSED),
    "key": ("k_proj", "k", "key", *FUSED),
    "value": ("v_proj", "v", "value", *FUSED),
}
WORDS = ("all-linear", "attention", "feed_forward", "feed_forward_in", *NAMES)  # what may stand for names of layers
KNOWN = 0.95  # of a block's weights have to be in linear layers
ENTRIES: dict[str, dict[str, tuple[str, ...]]] = {  # stack -> part -> what a configuration may call its size
    "": {
        "layers": ("num_hidden_layers", "n_layer"),
        "neurons": ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner"),
    },
    "encoder": {"layers": ("num_layers", "encoder_layers"), "neurons": ("d_ff", "encoder_ffn_dim")},
    "decoder": {"layers": ("num_decoder_layers", "decoder_layers"), "neurons": ("d_ff", "decoder_ffn_dim")},
}
HEADS = ("num_key_value_heads", "num_attention_heads", "head_dim")
BY_LAYER = ("layer_types",)  # lists with an entry for each block
SIZES = frozenset(
    {*(name for parts in ENTRIES.values() for names in parts.values() for name in names), *HEADS, *BY_LAYER}
)


def stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The lists of transformer blocks, by name, in the order in which they compute."""
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(isinstance(block, GradientCheckpointingLayer) for block in module)
    }
    if not found:
        raise CaloraError(type(model).__name__, "transformer blocks", "none", "use a model of transformers 5")
    return found


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the transformer blocks, by name: what is compressed and what is recovered."""
    return {
        name: layer
        for stack, blocks in stacks(model).items()
        for index, block in enumerate(blocks)
        for name, layer in block_layers(f"{stack}.{index}", block).items()
    }


def block_layers(name: str, block: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the block called `name`, by their full names; without gates of one output and adapters."""
    return {
        f"{name}.{path}".replace(".base_layer", ""): module
        for path, module in block.named_modules()
        if isinstance(module, nn.Linear) and module.out_features > 1 and ".lora_" not in f".{path}"
    }


def check_known(model: nn.Module) -> None:
    """Raise unless the linear layers of each block hold its weights (biases, norms and embeddings aside).

    Raises:
        CaloraError: less than 95 % are in them: 3-D experts, GPT-2's Conv1D.
    """
    for stack, blocks in stacks(model).items():
        for index, block in enumerate(blocks):
            name, sizes = f"{stack}.{index}", Counter[str]()
            layers = set(map(id, block_layers(name, block).values()))
            for path, module in block.named_modules():
                matrices = sum(p.numel() for p in module.parameters(recurse=False) if p.ndim > 1)
                if not isinstance(module, nn.Embedding):
                    sizes["" if id(module) in layers else f"{path} ({type(module).__name__})"] += matrices
            whole = max(sum(sizes.values()), 1)
            if (known := sizes.pop("", 0)) < KNOWN * whole:
                where = ", ".join(path for path, count in sizes.most_common() if count)
                raise CaloraError(
                    f"{type(model).__name__}, weights of {name}",
                    f"{KNOWN:.0%} in linear layers (nn.Linear)",
                    f"{known / whole:.0%}; the others are in {where}",
                    "use another base: calora would leave these weights as they are",
                )


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward: its own name (the block's, where the block holds its layers), and the full names of its layers."""

    name: str
    inputs: tuple[str, ...]
    output: str


def feed_forward(name: str, block: nn.Module) -> FeedForward:
    """The feed-forward of the block called `name`.

    Raises:
        CaloraError: it has none that calora knows.
    """
    found = "none of these"
    if any(parameter.ndim > 2 for parameter in block.parameters()):
        found = "experts"
    else:
        part = _feed_forward(name, block, FEED_FORWARDS)
        if part:
            return part
    known = "; ".join("/".join((*inputs, output)) for inputs, output in FEED_FORWARDS)
    raise CaloraError(f"feed-forward of {name}", f"layers called {known}", found, "leave this out for this base")


def _feed_forward(name: str, block: nn.Module, known: Sequence[tuple[tuple[str, ...], str]]) -> FeedForward | None:
    """The first module of a block that has all layers of one of the known kinds."""
    for path, module in block.named_modules():
        for inputs, output in known:
            if all(isinstance(_part(module, part), nn.Linear) for part in (*inputs, output)):
                own = f"{name}.{path}" if path else name
                return FeedForward(own, tuple(f"{own}.{part}" for part in inputs), f"{own}.{output}")
    return None


def _part(module: nn.Module, path: str) -> nn.Module | None:
    """The module at a dotted path, if there is one."""
    found: nn.Module | None = module
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def words_of(name: str, block: nn.Module) -> dict[str, set[str]]:
    """Full name of each linear layer of the block called `name` -> the words of WORDS that it answers to.

    Attention is what is inside a module whose class says so (cross-attention too); the feed-forward is found by the names
    of its layers. A layer of another kind answers to `all-linear` alone.
    """
    layers = block_layers(name, block)
    words: dict[str, set[str]] = {layer: {"all-linear"} for layer in layers}
    for path, module in block.named_modules():
        if path and "attention" in type(module).__name__.lower():
            for layer in layers:
                if layer.startswith(f"{name}.{path}."):
                    last = layer.rpartition(".")[2]
                    words[layer] |= {"attention", *(word for word, names in NAMES.items() if last in names)}
    part = _feed_forward(name, block, (*FEED_FORWARDS, *FUSED_FEED_FORWARDS))
    if part:
        for layer in (*part.inputs, part.output):
            words[layer.replace(".base_layer", "")].add("feed_forward")
        for layer in part.inputs:
            words[layer.replace(".base_layer", "")].add("feed_forward_in")
    return words


def module_names(model: nn.Module) -> list[str]:
    """Full names of all modules, as they are without PEFT's wrapping: what PEFT looks for its targets among."""
    names = [name for name, _ in model.named_modules() if name and ".lora_" not in name]
    return list(dict.fromkeys(name.replace(".base_layer", "") for name in names))


def words_of_all(model: nn.Module) -> dict[str, set[str]]:
    """`words_of` of all blocks."""
    return {
        layer: own
        for stack, blocks in stacks(model).items()
        for index, block in enumerate(blocks)
        for layer, own in words_of(f"{stack}.{index}", block).items()
    }


def named(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Names of layers as PEFT takes them, in the order of `targets`, for names and words of WORDS.

    A word becomes the shortest ends of names (`q_proj`, `attn.c_proj`) that name its layers and no other module, or, where
    there are none, full names.

    Raises:
        CaloraError: a word is of no layer of this model.
    """
    words = words_of_all(model)
    found: dict[str, None] = {}
    for target in targets:
        if target not in WORDS:
            found[target] = None
            continue
        wanted = [layer for layer, own in words.items() if target in own]
        if not wanted:
            last = ", ".join(sorted({layer.rpartition(".")[2] for layer in words}))
            expected = f"layers of this model for the word '{target}'"
            none = f"none that calora knows in {type(model).__name__}"
            raise CaloraError("targets", expected, none, f"name them: {last}; or write all-linear")
        others = sorted(set(module_names(model)) - set(wanted))
        for layer in wanted:
            found[_shortest(layer, others)] = None
    return list(found)


def _shortest(layer: str, others: Sequence[str]) -> str:
    """The shortest end of a layer's name that none of the other names ends in."""
    parts = layer.split(".")
    for start in range(len(parts) - 1, 0, -1):
        end = ".".join(parts[start:])
        if not any(other == end or other.endswith(f".{end}") for other in others):
            numbered = any(part.isdigit() for part in parts[start:-1])
            return layer if numbered else end
    return layer


@dataclass(frozen=True)
class Heads:
    """Attention by key-value groups: full names of its layers, and the widths of a group.

    Args:
        groups: number of key-value heads.
        queries: query heads that share one key-value head.
        width: of a head.
    """

    groups: int
    queries: int
    width: int
    query: str
    key: str
    value: str
    output: str


def heads(name: str, block: nn.Module) -> Heads:
    """The attention of the block called `name`.

    Raises:
        CaloraError: its heads cannot be cut one by one.
    """
    reason = f"no layers called {', '.join(ATTENTION)}"
    if any(isinstance(module, nn.Embedding) for module in block.modules()):
        reason = "a position bias by head, which all blocks share"
    for path, module in block.named_modules():
        layers = [getattr(module, part, None) for part in ATTENTION]
        if all(isinstance(layer, nn.Linear) for layer in layers):
            own = [f"{name}.{path}.{part}" for part in ATTENTION]
            width = int(getattr(module, "head_dim", 0))
            query, key = layers[0].out_features, layers[1].out_features  # type: ignore[union-attr]
            wide = [
                part
                for part, tensor in module.named_parameters()
                if part.split(".")[0] not in ATTENTION and tensor.numel() != width
            ]
            if width and query % key == 0 and key % width == 0 and not wide:
                return Heads(key // width, query // key, width, *own)
            reason = f"{wide[0]}, which spans all heads" if wide else "queries that no key-value head divides"
    fix = "set shrink's `heads` to 0 for this base"
    raise CaloraError(f"heads of {name}", "attention whose heads are separate", reason, fix)


def first_stays(blocks: nn.ModuleList) -> bool:
    """Whether a stack needs its first block: it holds something for all of them (T5's position bias)."""
    names = [{name for name, _ in block.named_parameters()} for block in blocks]
    return len(blocks) > 1 and bool(names[0] - names[1])


def size_entry(model: PreTrainedModel, stack: str, part: str, size: int) -> str:
    """What the model's configuration calls the number of `layers` or `neurons` of a stack.

    Raises:
        CaloraError: no entry says it, so no configuration can describe a smaller model.
    """
    role = ("encoder" if "encoder" in stack else "decoder") if model.config.is_encoder_decoder else ""
    entries = model.config.to_dict()
    for name in ENTRIES[role][part]:
        if name in entries and entries[name] in (size, None):  # GPT-2 leaves the neurons open: four times its width
            return name
    raise CaloraError(
        f"{part} of {stack}",
        f"an entry of the configuration that says {size}, such as {ENTRIES[role][part][0]}",
        f"none in that of {type(model).__name__}",
        f"set shrink's `{part}` to 0 for this base",
    )


def by_layer(model: PreTrainedModel) -> dict[str, list[Any]]:
    """The entries of the configuration that list something for each block."""
    found = {name: getattr(model.config, name, None) for name in BY_LAYER}
    return {name: values for name, values in found.items() if values}


def sizes(model: PreTrainedModel) -> dict[str, Any]:
    """The entries of config.json that a smaller model of the same kind needs."""
    return {name: value for name, value in model.config.to_dict().items() if name in SIZES}


def with_sizes(model: PreTrainedModel, changed: Mapping[str, Any]) -> PreTrainedModel:
    """An empty model (on the meta device) of the same class, whose configuration says other sizes.

    Raises:
        CaloraError: transformers refuses the configuration.
    """
    config = copy.deepcopy(model.config)
    try:
        config = type(config).from_dict({**config.to_dict(), **changed})
        with torch.device("meta"):
            empty: PreTrainedModel = uniform(type(model)(config))
    except Exception as error:  # transformers checks sizes by many kinds of errors
        told = str(error).strip().splitlines()[-1]
        raise CaloraError(
            "sizes of the smaller model", "a configuration that transformers takes", told, "cut another share"
        ) from None
    return empty
