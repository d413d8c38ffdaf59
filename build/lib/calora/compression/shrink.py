"""Structured pruning: feed-forward neurons, attention heads by key-value group, whole layers. Tensors really get smaller.

Every block keeps the same number of neurons and heads, so that the result is an ordinary, smaller model of its kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from calora.common.batching import equal_length_batches
from calora.common.leastsquares import compensated
from calora.compression.options import FIX, Plan, one_of, share
from calora.compression.walk import Block, Change
from calora.errors import CaloraError
from calora.layers.layout import dense_layer, rows_of
from calora.models.anatomy import (
    HEADS,
    FeedForward,
    Heads,
    block_layers,
    by_layer,
    feed_forward,
    first_stays,
    heads,
    linear_layers,
    size_entry,
    stacks,
    with_sizes,
)
from calora.models.families import Classifier, family_of
from calora.models.moments import BATCH, as_read
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


def check(model: PreTrainedModel, options: Options) -> PreTrainedModel:
    """The empty model of the sizes that will be left.

    Raises:
        CaloraError: too little would be left or nothing cut, or no configuration of transformers can say the sizes.
    """
    if options.importance == "taylor" and isinstance(family_of(model), Classifier):
        unlike = f"{type(model).__name__}, whose labels the texts do not say"
        raise CaloraError("shrink.importance (taylor)", "a language model", unlike, "set it to activation")
    shapes: dict[str, tuple[int, int]] = {}  # layer -> in, out, by the names of a model whose last layers were cut
    for stack, blocks in stacks(model).items():
        for index in range(_left(options, "layers", stack, len(blocks)) if options.layers else len(blocks)):
            name, block = f"{stack}.{index}", blocks[index]
            layers = block_layers(name, block)
            own = {key: [layer.in_features, layer.out_features] for key, layer in layers.items()}
            if options.neurons:
                part = feed_forward(name, block)
                kept = _left(options, "neurons", name, layers[part.output].in_features)
                own[part.output][0] = kept
                for key in part.inputs:
                    own[key][1] = kept
            if options.heads:
                attention = heads(name, block)
                groups = _left(options, "heads", name, attention.groups)
                queries, keys = groups * attention.queries * attention.width, groups * attention.width
                own[attention.output][0] = own[attention.query][1] = queries
                own[attention.key][1] = own[attention.value][1] = keys
            shapes |= {key: (inputs, outputs) for key, (inputs, outputs) in own.items()}
    empty = with_sizes(model, sizes_left(model, options))
    found = {name: (layer.in_features, layer.out_features) for name, layer in linear_layers(empty).items()}
    for name in {**shapes, **found}:
        if shapes.get(name) != found.get(name):
            told = f"{found.get(name, 'none')} where its configuration says {sizes_left(model, options)}"
            fix = "leave `shrink` out for this base, or cut another part"
            raise CaloraError(f"{type(model).__name__} of transformers", f"{name} of {shapes.get(name)}", told, fix)
    return empty


def sizes_left(model: PreTrainedModel, options: Options) -> dict[str, Any]:
    """Entries of the configuration that say the sizes that will be left."""
    changed: dict[str, Any] = {}
    for stack, blocks in stacks(model).items():
        own: dict[str, Any] = {}
        if options.layers:
            count = _left(options, "layers", stack, len(blocks))
            own[size_entry(model, stack, "layers", len(blocks))] = count
            own |= {name: values[:count] for name, values in by_layer(model).items()}
        if options.neurons:
            layer = model.get_submodule(feed_forward(f"{stack}.0", blocks[0]).output)
            assert isinstance(layer, nn.Linear)
            kept = _left(options, "neurons", stack, layer.in_features)
            own[size_entry(model, stack, "neurons", layer.in_features)] = kept
        if options.heads:
            part = heads(f"{stack}.0", blocks[0])
            groups = _left(options, "heads", stack, part.groups)
            own |= dict(zip(HEADS, (groups, groups * part.queries, part.width), strict=True))
        changed |= own
    return changed


def _left(options: Options, part: str, where: str, count: int) -> int:
    """How many of `count` layers, neurons or key-value heads stay."""
    share_cut: float = getattr(options, part)
    left = count - round(share_cut * count)
    if part == "neurons" and count >= 2 * MULTIPLE:
        left = max(MULTIPLE, round((1 - share_cut) * count / MULTIPLE) * MULTIPLE)
    called = {"layers": "layers", "neurons": "neurons", "heads": "key-value heads"}[part]
    if left < 1:
        raise CaloraError(f"shrink.{part}", f"at least one of {count} {called} left in {where}", share_cut, FIX)
    if left == count:
        whole_ones = f", in multiples of {MULTIPLE}" if part == "neurons" else ""
        raise CaloraError(f"shrink.{part}", f"a share that cuts some of {count} {called}{whole_ones}", share_cut, FIX)
    return left


def plan(model: PreTrainedModel, options: Options, examples: Sequence[Example]) -> Plan:
    """Cut layers; the first-order importance of inputs, if asked."""
    sizes = sizes_left(model, options)
    kept = cut_layers(model, options, examples) if options.layers else {}
    values = taylor_products(model, examples) if options.importance == "taylor" else {}
    return Plan(values, kept, sizes | by_layer(model) if options.layers else sizes)


def cut_heads(block: Block, options: Options, plan: Plan) -> Change:
    """Cut key-value groups with their query heads."""
    if not options.heads:
        return Change()
    part: Heads = heads(block.name, block.module)
    reader = block.layers[part.output]
    importance = plan.values.get(part.output)
    importance = _energy(reader, block.moments()[part.output]) if importance is None else importance
    by_group = importance.view(part.groups, -1).sum(1).abs()  # [groups]
    groups = by_group.topk(_left(options, "heads", block.name, part.groups)).indices.sort().values
    queries, keys = _spread(groups, part.queries * part.width), _spread(groups, part.width)
    return _keep(block, {part.query: queries, part.key: keys, part.value: keys}, part.output, queries, options)


def cut_neurons(block: Block, options: Options, plan: Plan) -> Change:
    """Cut neurons of the feed-forward."""
    if not options.neurons:
        return Change()
    part: FeedForward = feed_forward(block.name, block.module)
    reader = block.layers[part.output]
    importance = plan.values.get(part.output)
    importance = _energy(reader, block.moments()[part.output]) if importance is None else importance.abs()
    kept = _left(options, "neurons", block.name, reader.in_features)
    neurons = importance.topk(kept).indices.sort().values
    return _keep(block, dict.fromkeys(part.inputs, neurons), part.output, neurons, options)


def finish(model: PreTrainedModel, _: Options, plan: Plan) -> list[str]:
    """Make the configuration say the sizes that are left, so that plain transformers can build the model."""
    for name, value in plan.sizes.items():
        setattr(model.config, name, value)
    return []


def needs_whole(options: Options) -> str:
    """What of these options looks at the model as a whole: gradients, or the output of every block before one is cut."""
    if options.importance == "taylor":
        return "shrink.importance: taylor"
    return "shrink.layers" if options.layers else ""


def _spread(groups: Tensor, width: int) -> Tensor:
    """Indices of all places of the groups, each `width` wide."""
    return (groups.unsqueeze(1) * width + torch.arange(width, device=groups.device)).flatten()


def _energy(reader: nn.Linear, moment: Tensor) -> Tensor:
    """sum over tokens of ||h_j w_j||^2 for each input j of a layer."""
    return moment.diagonal() * reader.weight.detach().float().square().sum(0)


def _keep(block: Block, rows: Mapping[str, Tensor], reader: str, columns: Tensor, options: Options) -> Change:
    """Keep some outputs of the layers that make a part's inner values, and the same inputs of the one that reads them."""
    made, layers = Change(), block.layers
    for name, own in rows.items():
        made.modules[name] = rows_of(layers[name], own)
        made.kept[f"{name}.rows"] = own.int()
        made.notes[name] = {"kept": len(own)}
    layer = layers[reader]
    weight = layer.weight.detach()
    if options.compensate:  # rounded now: the blocks after it see what will be stored
        new = compensated(weight, block.moments()[reader], columns).to(block.dtype).to(weight.dtype)
    else:
        new = weight[:, columns].clone()
    made.modules[reader] = dense_layer(new, layer.bias)
    made.kept[f"{reader}.columns"] = columns.int()
    made.notes[reader] = {"kept": len(columns)}
    return made


def cut_layers(model: PreTrainedModel, options: Options, examples: Sequence[Example]) -> dict[str, list[int]]:
    """Remove the least important blocks of each stack; returns stack -> indices of those that remain."""
    influence = block_influence(model, examples, options.importance)
    kept: dict[str, list[int]] = {}
    for name, stack in stacks(model).items():
        values = influence[name]
        if first_stays(stack):
            values[0] = torch.inf
        remain = sorted(values.topk(_left(options, "layers", name, len(stack))).indices.tolist())
        kept[name] = remain
        model.set_submodule(name, nn.ModuleList([stack[i] for i in remain]))
        for entry, own in by_layer(model).items():
            setattr(model.config, entry, [own[i] for i in remain])
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
                    sums[name][index] += (step * grad.float()).sum().cpu()

                after.register_hook(see)
            else:
                sums[name][index] += (1 - F.cosine_similarity(before.float(), after.float(), dim=-1)).sum().cpu()

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
    read = [as_read(model, e) for e in examples]
    if not model.config.is_encoder_decoder:
        read = [Example(e.prompt_ids[:1], e.prompt_ids[1:]) for e in read]
    whole = [Example(e.prompt_ids, e.answer_ids or e.prompt_ids[-1:]) for e in read]
    batch = family.collate(whole, model)
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
