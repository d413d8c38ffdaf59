"""Structured pruning: feed-forward neurons, attention heads by key-value group, whole layers. Tensors really get smaller.

Every block keeps the same number of neurons and heads, so that the result is an ordinary, smaller model of its kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from calora.common.batching import equal_length_batches
from calora.common.leastsquares import compensated
from calora.compression.options import FIX, one_of, parse, share
from calora.compression.walk import BATCH, Block, Calibration, Change, each_block
from calora.errors import CaloraError
from calora.layers.layout import dense_layer, rows_of
from calora.models.anatomy import FeedForward, Heads, feed_forward, heads, linear_layers, stacks
from calora.models.families import family_of
from calora.models.tasks import Example

MULTIPLE = 64  # neurons are kept in whole multiples of this (or of all of them, where there are fewer): kernels like it


@dataclass(frozen=True)
class Options:
    """Options of `shrink`: the share that is cut of each part, 0 or above and below 1.

    Args:
        neurons: of the feed-forward; what is kept is rounded to a multiple of 64.
        heads: of the key-value groups of an attention (each with all its query heads).
        layers: of the blocks of each stack.
        importance: `activation`, sum over tokens of ||h_j w_j||^2, w_j the column of the layer that reads neuron j
            (of a layer: 1 - cos(input, output), arXiv 2403.03853), or `taylor`, |sum of h_j dL/dh_j| with L the loss on
            the calibration texts (arXiv 1905.10650; arXiv 2305.11627).
        compensate: fit the layer that reads the kept inputs to the old outputs by least squares:
            W' = W C[:, S] C[S, S]^-1, C = X^T X.
    """

    importance: str
    compensate: bool
    neurons: float = 0.0
    heads: float = 0.0
    layers: float = 0.0

    def __post_init__(self) -> None:
        one_of("shrink.importance", self.importance, ("activation", "taylor"))
        one_of("shrink.compensate", self.compensate, (True, False))
        for part in ("neurons", "heads", "layers"):
            share(f"shrink.{part}", getattr(self, part), zero=True)
        if not (self.neurons or self.heads or self.layers):
            raise CaloraError("shrink", "neurons, heads or layers above 0", "none", FIX)


def check(model: PreTrainedModel, options: dict[str, Any]) -> None:
    """Raise `CaloraError` if the options are wrong, or too little would be left."""
    chosen = parse(Options, "shrink", options)
    for stack, blocks in stacks(model).items():
        if chosen.layers and len(blocks) - round(chosen.layers * len(blocks)) < 1:
            raise CaloraError(
                "shrink.layers", f"at least one of {len(blocks)} layers left in {stack}", chosen.layers, FIX
            )
        if chosen.neurons:
            feed_forward(f"{stack}.0", blocks[0])
        if chosen.heads:
            groups = heads(f"{stack}.0", blocks[0], model).groups
            if groups - round(chosen.heads * groups) < 1:
                raise CaloraError(
                    "shrink.heads", f"at least one of {groups} key-value heads left", f"{chosen.heads} cut", FIX
                )
            if round(chosen.heads * groups) < 1:
                raise CaloraError(
                    "shrink.heads", f"a share that cuts one of {groups} key-value heads", chosen.heads, FIX
                )


def shrink(model: PreTrainedModel, options: dict[str, Any], calibration: Calibration) -> dict[str, Any]:
    """Cut layers, then heads, then neurons; each kind with the inputs that the model has by then."""
    chosen = parse(Options, "shrink", options)
    report: dict[str, Any] = {"layers": {}, "blocks": {}, "kept": {}, "layers_kept": {}}
    if chosen.layers:
        report["layers_kept"] = cut_layers(model, chosen, calibration.examples)
    taylor = taylor_products(model, calibration.examples) if chosen.importance == "taylor" else None
    for part, change in (("heads", _cut_heads), ("neurons", _cut_neurons)):
        if getattr(chosen, part):

            def apply(block: Block, change: Any = change) -> Change:
                made: Change = change(model, block, chosen, taylor)
                return made

            done = each_block(model, calibration, f"shrink {part}", apply)
            for key in ("layers", "blocks", "kept"):
                report[key] |= done[key]
    _tell_config(model)
    return report


def _cut_neurons(model: PreTrainedModel, block: Block, options: Options, taylor: dict[str, Tensor] | None) -> Change:
    part: FeedForward = feed_forward(block.name, block.module)
    reader, moment = block.layers[part.output], block.moments()[part.output]
    width = reader.in_features
    wanted = (1 - options.neurons) * width
    kept = round(wanted) if width < 2 * MULTIPLE else max(MULTIPLE, round(wanted / MULTIPLE) * MULTIPLE)
    importance = _energy(reader, moment) if taylor is None else taylor[part.output].abs()
    neurons = importance.topk(kept).indices.sort().values
    return _keep(block, part.inputs, [neurons] * len(part.inputs), part.output, neurons, moment, options)


def _cut_heads(model: PreTrainedModel, block: Block, options: Options, taylor: dict[str, Tensor] | None) -> Change:
    part: Heads = heads(block.name, block.module, model)
    reader, moment = block.layers[part.output], block.moments()[part.output]
    importance = _energy(reader, moment) if taylor is None else taylor[part.output]
    by_group = importance.view(part.groups, -1).sum(1).abs()
    groups = by_group.topk(part.groups - round(options.heads * part.groups)).indices.sort().values
    queries, keys = _spread(groups, part.queries * part.width), _spread(groups, part.width)
    return _keep(
        block, (part.query, part.key, part.value), [queries, keys, keys], part.output, queries, moment, options
    )


def _spread(groups: Tensor, width: int) -> Tensor:
    """Indices of all places of the groups, each `width` wide."""
    return (groups.unsqueeze(1) * width + torch.arange(width)).flatten()


def _energy(reader: nn.Linear, moment: Tensor) -> Tensor:
    """sum over tokens of ||h_j w_j||^2 for each input j of a layer."""
    return moment.diagonal() * reader.weight.detach().float().square().sum(0)


def _keep(
    block: Block,
    makers: Sequence[str],
    rows: Sequence[Tensor],
    reader: str,
    columns: Tensor,
    moment: Tensor,
    options: Options,
) -> Change:
    """Keep some outputs of the layers that make a part's inner values, and the same inputs of the one that reads them."""
    made = Change()
    for name, own in zip(makers, rows, strict=True):
        made.modules[name] = rows_of(block.layers[name], own)
        made.kept[f"{name}.rows"] = own.int()
        made.notes[name] = {"kept": len(own)}
    layer = block.layers[reader]
    weight = (
        compensated(layer.weight.detach(), moment, columns) if options.compensate else layer.weight[:, columns].clone()
    )
    made.modules[reader] = dense_layer(weight, layer.bias)
    made.kept[f"{reader}.columns"] = columns.int()
    made.notes[reader] = {"kept": len(columns)}
    return made


def cut_layers(model: PreTrainedModel, options: Options, examples: Sequence[Example]) -> dict[str, list[int]]:
    """Remove the least important blocks of each stack; returns stack -> indices of those that remain."""
    influence = block_influence(model, examples, options.importance)
    kept: dict[str, list[int]] = {}
    for name, stack in stacks(model).items():
        values = influence[name]
        remain = sorted(values.topk(len(stack) - round(options.layers * len(stack))).indices.tolist())
        if 0 not in remain and hasattr(model.config, "d_kv"):
            remain = sorted([0, *remain[1:]])  # T5's first block holds the position bias of all
        kept[name] = remain
        model.set_submodule(name, nn.ModuleList([stack[i] for i in remain]))
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = [model.config.layer_types[i] for i in remain]
        for index, block in enumerate(stack[i] for i in remain):
            for module in block.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = index
    return kept


def block_influence(model: PreTrainedModel, examples: Sequence[Example], importance: str) -> dict[str, Tensor]:
    """Stack -> importance of each block: mean over tokens of 1 - cos(input, output), or |sum of (out - in) dL/d(out)|."""
    sums = {name: torch.zeros(len(stack)) for name, stack in stacks(model).items()}
    family, taylor = family_of(model), importance == "taylor"

    def watch(name: str, index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            before, after = args[0], out if isinstance(out, Tensor) else out[0]
            if taylor:
                step = (after - before).detach().float()

                def see(grad: Tensor) -> None:
                    sums[name][index] += (step * grad.float()).sum()

                after.register_hook(see)
            else:
                sums[name][index] += (1 - F.cosine_similarity(before.float(), after.float(), dim=-1)).sum()

        return hook

    handles = [
        block.register_forward_hook(watch(name, i))
        for name, stack in stacks(model).items()
        for i, block in enumerate(stack)
    ]
    try:
        for indices in equal_length_batches([len(e.prompt_ids) for e in examples], BATCH):
            chosen = [examples[i] for i in indices]
            if taylor:
                language_loss(model, chosen).backward()
            else:
                with torch.no_grad():
                    family.forward(
                        model, family.collate([Example(e.prompt_ids) for e in chosen], model), torch.tensor([0])
                    )
    finally:
        for handle in handles:
            handle.remove()
    return {name: values.abs() for name, values in sums.items()}


def taylor_products(model: PreTrainedModel, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Layer -> sum over tokens of x_j dL/dx_j, fp32 [in]: what the loss would lose to first order without input j."""
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]

            def see(grad: Tensor) -> None:
                value = (x.detach().float() * grad.float()).flatten(0, -2).sum(0)
                sums[name] = sums[name] + value if name in sums else value

            if x.requires_grad:
                x.register_hook(see)

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in linear_layers(model).items()]
    try:
        for indices in equal_length_batches([len(e.prompt_ids) for e in examples], BATCH):
            language_loss(model, [examples[i] for i in indices]).backward()
    finally:
        for handle in handles:
            handle.remove()
    return sums


def language_loss(model: PreTrainedModel, examples: Sequence[Example]) -> Tensor:
    """Sum over tokens of the loss of the model's own kind: the next token, or T5's second half of a text after its first.

    Gradients flow to the activations, not to the weights, which are frozen.
    """
    family = family_of(model)
    parts = [_split(e.prompt_ids, model.config.is_encoder_decoder) for e in examples]
    batch = family.collate([Example(prompt, answer) for prompt, answer in parts], model)
    table = model.get_input_embeddings().weight
    handles = [
        module.register_forward_hook(lambda _, __, out: out.requires_grad_())
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.weight is table
    ]
    try:
        output = family.forward(model, batch, None)
    finally:
        for handle in handles:
            handle.remove()
    return F.cross_entropy(output.logits.float(), batch.labels, reduction="sum")


def _split(ids: list[int], halves: bool) -> tuple[list[int], list[int]]:
    at = max(1, len(ids) // 2) if halves else 1
    return ids[:at], ids[at:] or ids[-1:]


def _tell_config(model: PreTrainedModel) -> None:
    """Make the configuration say the sizes that are left, so that plain transformers can build the model."""
    config, lists = model.config, stacks(model)
    for name, stack in lists.items():
        layer = model.get_submodule(feed_forward(f"{name}.0", stack[0]).output)
        assert isinstance(layer, nn.Linear)
        if hasattr(config, "d_ff"):
            config.d_ff = layer.in_features
        else:
            config.intermediate_size = layer.in_features
        if hasattr(config, "d_kv"):
            if name.startswith("decoder") or len(lists) == 1:
                config.num_decoder_layers = len(stack)
            else:
                config.num_layers = len(stack)
        else:
            config.num_hidden_layers = len(stack)
            attention = heads(f"{name}.0", stack[0], model)
            config.head_dim = attention.width
            config.num_key_value_heads = attention.groups
            config.num_attention_heads = attention.groups * attention.queries
