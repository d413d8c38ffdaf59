"""Bring a base into the coordinates of a checkpoint that was scaled before it was rounded (AWQ, arXiv 2306.00978; SmoothQuant, 2211.10438).

They divide what a layer reads by s and multiply its columns by s: into the norm before it, or into the rows of the layer
before it (values before the output projection, up before down). The model computes the same; its weights are others.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calora.errors import CaloraError
from calora.models.anatomy import feed_forward, heads, linear_layers, stacks
from calora.models.moments import norms_of
from calora.taken.checkpoint import Checkpoint
from calora.taken.values import dense_of

NEARER = 0.9  # of the squared error of before: a scale that is estimated and brings less is the rounding's own


def rescaled(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Scale the base's weights, in place, as the checkpoint's were; norms that it scales are the checkpoint's afterwards.

    Returns:
        `<layer>.input_scale` s [in] and `<layer>.output_scale` r [out] of each layer that was scaled: W' = diag(r) W diag(s).
    """
    layers, kept = linear_layers(model), dict[str, Tensor]()
    for norm, readers in norms_of(model).items():
        own = model.get_submodule(norm)
        theirs = _with(own, norm, checkpoint)
        scale = _ratio(_gain(own), _gain(theirs))  # s [in]
        if bool((scale == 1).all()):
            continue
        before, after = (_distance(layers, readers, checkpoint, by) for by in (None, scale))
        if after < before:
            model.set_submodule(norm, theirs)
            for name in readers:
                _scale_columns(layers[name], scale)
                kept[f"{name}.input_scale"] = scale.clone()
    for maker, reader in _pairs(model):
        weight, theirs_too = layers[maker].weight.float(), dense_of(checkpoint.values(f"{maker}.weight"), torch.float32)
        rows = (weight * theirs_too).sum(1) / weight.square().sum(1)  # r [out], least squares
        if not bool((rows > 0).all()):
            continue
        before, after = (_distance(layers, [reader], checkpoint, by) for by in (None, 1 / rows))
        if after < NEARER * before:
            _scale_rows(layers[maker], rows)
            _scale_columns(layers[reader], 1 / rows)
            kept[f"{maker}.output_scale"], kept[f"{reader}.input_scale"] = rows, 1 / rows
    return kept


def _with(module: nn.Module, name: str, checkpoint: Checkpoint) -> nn.Module:
    """A norm with the checkpoint's parameters."""
    made = copy.deepcopy(module)
    for part, parameter in made.named_parameters():
        parameter.data = dense_of(checkpoint.values(f"{name}.{part}"), parameter.dtype)
    return made


def _gain(norm: nn.Module) -> Tensor:
    """What a norm multiplies by [in], however it keeps it (Gemma's is 1 + w): of +-1 in turn it is the answer's size."""
    width = norm.get_parameter("weight").shape[0]
    probe = torch.ones(width, dtype=torch.float64)
    probe[1::2] = -1
    norm = copy.deepcopy(norm).double()
    with torch.no_grad():
        gain: Tensor = (norm(probe.view(1, 1, -1)) - norm(-probe.view(1, 1, -1))).view(-1) / 2 * probe
    return gain


def _ratio(ours: Tensor, theirs: Tensor) -> Tensor:
    """s = ours / theirs, 1 where either is 0."""
    usable = (ours * theirs) > 0
    return torch.where(usable, ours / torch.where(usable, theirs, 1), 1).float()


def _distance(
    layers: dict[str, nn.Linear], names: Sequence[str], checkpoint: Checkpoint, scale: Tensor | None
) -> float:
    """Squared distance of the checkpoint's weights from the base's, whose columns are scaled."""
    total = 0.0
    for name in names:
        own = layers[name].weight.float()
        theirs = dense_of(checkpoint.values(f"{name}.weight"), torch.float32)
        total += float((theirs - (own if scale is None else own * scale)).square().sum())
    return total


def _scale_columns(layer: nn.Linear, scale: Tensor) -> None:
    layer.weight.data = (layer.weight.float() * scale).to(layer.weight.dtype)


def _scale_rows(layer: nn.Linear, scale: Tensor) -> None:
    layer.weight.data = (layer.weight.float() * scale.unsqueeze(1)).to(layer.weight.dtype)
    if layer.bias is not None:
        layer.bias.data = (layer.bias.float() * scale).to(layer.bias.dtype)


def _pairs(model: PreTrainedModel) -> Iterator[tuple[str, str]]:
    """Layers of which one reads the other's outputs, channel by channel: (values, output) and (up, down)."""
    for stack, blocks in stacks(model).items():
        for index, block in enumerate(blocks):
            name = f"{stack}.{index}"
            try:
                attention = heads(name, block)
                if attention.queries == 1:  # each channel has one reader
                    yield attention.value, attention.output
            except CaloraError:
                pass
            try:
                neurons = feed_forward(name, block)
                yield neurons.inputs[-1], neurons.output
            except CaloraError:
                pass
