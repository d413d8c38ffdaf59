"""The parts of a model: its stacks of blocks, their linear layers, feed-forwards and attention heads."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from calora.errors import CaloraError

FEED_FORWARDS = (  # layers that make the neurons (of two the first goes through the activation), layer that reads them
    (("gate_proj", "up_proj"), "down_proj"),
    (("wi_0", "wi_1"), "wo"),
    (("wi",), "wo"),
    (("fc1",), "fc2"),
)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linear layers of the transformer blocks, by name: what is compressed and what is recovered.

    The output head is left out: it belongs with the embeddings.
    """
    head = model.get_output_embeddings()
    return {
        name.replace(".base_layer", ""): module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and ".lora_" not in name
    }


def stacks(model: PreTrainedModel) -> dict[str, nn.ModuleList]:
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


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward: its own name, and the full names of its layers."""

    name: str
    inputs: tuple[str, ...]
    output: str


def feed_forward(name: str, block: nn.Module) -> FeedForward:
    """The feed-forward of the block called `name`.

    Raises:
        CaloraError: it has none that calora knows.
    """
    for path, module in block.named_modules():
        for inputs, output in FEED_FORWARDS:
            # A block that holds them itself (OPT's) has no feed-forward to put another in place of.
            if path and all(isinstance(getattr(module, part, None), nn.Linear) for part in (*inputs, output)):
                own = f"{name}.{path}"
                return FeedForward(own, tuple(f"{own}.{part}" for part in inputs), f"{own}.{output}")
    known = "; ".join("/".join((*inputs, output)) for inputs, output in FEED_FORWARDS)
    raise CaloraError(f"feed-forward of {name}", f"layers called {known}", "none", "leave this step out for this base")


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


def heads(name: str, block: nn.Module, model: PreTrainedModel) -> Heads:
    """The attention of the block called `name`.

    Raises:
        CaloraError: its heads cannot be cut one by one.
    """
    for path, module in block.named_modules():
        layers = [getattr(module, part, None) for part in ATTENTION]
        if all(isinstance(layer, nn.Linear) for layer in layers):
            own = [f"{name}.{path}.{part}" for part in ATTENTION]
            width = int(getattr(module, "head_dim", 0))
            query, key = layers[0].out_features, layers[1].out_features  # type: ignore[union-attr]
            if width and query % key == 0 and key % width == 0:
                return Heads(key // width, query // key, width, *own)
    kind = type(model).__name__
    reason = "T5's blocks share one position bias by head" if hasattr(model.config, "d_kv") else "unknown attention"
    raise CaloraError(
        "shrink.heads", "q_proj, k_proj, v_proj, o_proj with separate heads", f"{kind}: {reason}", "set `heads` to 0"
    )
