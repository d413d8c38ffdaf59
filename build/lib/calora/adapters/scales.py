"""The scales of a task: W = (codes - zero) * scale * (1 + ratio), the codes and zero points the base's (PEQA, arXiv 2305.14152).

A ratio of 0 is the base exactly. It is a ratio, and no scale or difference of scales, because a step of the optimiser is
then the same share of each scale, whatever the layer, and because 8 bits of a small difference are precise where 8 bits of
a scale are not.

What a layer does with a ratio is its own matter (`calora.layers`): a packed one exchanges the tensor of its scales, a
dense view computes with the ratio, so that it can be trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor, nn

CHILD = "scales"  # under this name a linear layer holds the ratios of its tasks
PART = f".{CHILD}"  # what follows the layer's name in the name of a stored ratio


class OnGrid(Protocol):
    """A linear layer whose weight is on a grid; some pass a gradient on to the ratio."""

    trains_scales: bool

    @property
    def scale_groups(self) -> int:
        """Scales of each output."""

    def rescale(self, ratio: Tensor | None) -> None:
        """From now on compute with scale * (1 + ratio), ratio [out, scale_groups]; None: with the base's own scales."""


def on_grid(layer: nn.Module) -> OnGrid | None:
    """The layer, if its weight is on a grid."""
    found: Any = layer
    grid: OnGrid | None = found if getattr(layer, "scale_groups", 0) else None
    return grid


class TaskScales(nn.Module):
    """The ratios [out, scale_groups] of one layer, a parameter for each adapter, by its name."""

    in_use: str | None = None

    def of(self, name: str | None) -> Tensor | None:
        """The ratio of an adapter."""
        return self._parameters.get(name or "")


def scales_of(model: nn.Module) -> Iterator[tuple[str, OnGrid, TaskScales]]:
    """(layer name, layer, ratios) of a model; PEFT's own wrapping does not show in the layer name."""
    for name, layer in model.named_modules():
        scales = layer._modules.get(CHILD)
        if isinstance(scales, TaskScales):
            found: Any = layer
            yield name.removesuffix(".base_layer"), found, scales


def attach_scales(layer: nn.Module, name: str, ratio: Tensor) -> None:
    """Let a layer on a grid use `ratio` whenever the adapter `name` is active."""
    if CHILD not in layer._modules:
        layer.add_module(CHILD, TaskScales())
    layer.get_submodule(CHILD).register_parameter(name, nn.Parameter(ratio, requires_grad=False))


def activate_scales(model: nn.Module, name: str | None) -> None:
    """Exchange the scales for those of the adapter `name`, where it has any, else for the base's own."""
    for _, layer, scales in scales_of(model):
        scales.in_use = name
        layer.rescale(scales.of(name))


def detach_scales(model: nn.Module, name: str) -> None:
    """Take the ratios called `name` off; a layer without any other is as it was before the first."""
    for _, layer, scales in list(scales_of(model)):
        if scales.of(name) is not None:
            if scales.in_use == name:
                scales.in_use = None
                layer.rescale(None)
            del scales._parameters[name]
            if not scales._parameters:
                delattr(layer, CHILD)


def scales_state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The tensors of the adapter `name`: `<layer>.scales` [out, scale_groups]."""
    found = {layer: scales.of(name) for layer, _, scales in scales_of(model)}
    return {f"{layer}{PART}": ratio.detach() for layer, ratio in found.items() if ratio is not None}
