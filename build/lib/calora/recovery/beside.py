"""What acts beside the layers of a packed model, as one low-rank part for each: the base's recovery, a LoRA, a bypass.

All of them are x -> sigma(x D) U. Layers that read one input compute H = sigma(x [D_1 | D_2 | ...]) once, and each adds its
own columns of H times its U to its output, within one product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from calora.recovery.bypass import ACTIVATIONS, plus_product
from calora.recovery.shared import Reading, SharedRecovery, shared_of


@dataclass(frozen=True)
class Part:
    """x -> sigma(x D) U for the layers that share D.

    Args:
        down: D^T [k, in].
        up: layer -> U [k, out].
        activation: sigma.
    """

    down: Tensor
    up: dict[str, Tensor]
    activation: str = "identity"

    def apply(self, fn: Callable[[Tensor], Tensor]) -> Part:
        """The same with other tensors: moved, or of another dtype."""
        return replace(self, down=fn(self.down), up={name: fn(up) for name, up in self.up.items()})


class Hidden:
    """H = sigma(x [D_1 | D_2 | ...]) of the layers that read one input, made by the first of them that asks."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.down = torch.cat([part.down for part in parts])  # [R, in]
        self.sigma, self.curved = None, torch.zeros(len(self.down), dtype=torch.bool, device=self.down.device)
        ends = accumulate(len(part.down) for part in parts)
        for part, end in zip(parts, ends, strict=True):
            if part.activation != "identity":  # one adapter has one
                self.sigma, self.curved[end - len(part.down) : end] = ACTIVATIONS[part.activation], True
        self.reading = Reading()

    def of(self, x: Tensor) -> Tensor:
        """x [..., in] -> [n, R], or [R] of one token."""
        return self.reading.of(x, self.read)

    def read(self, x: Tensor) -> Tensor:
        """One product."""
        x, width = x.to(self.down.dtype), self.down.shape[1]
        hidden = torch.mv(self.down, x.reshape(-1)) if x.numel() == width else F.linear(x.reshape(-1, width), self.down)
        return hidden if self.sigma is None else torch.where(self.curved, self.sigma(hidden), hidden)


@dataclass(frozen=True)
class Beside:
    """What is added to one layer: its columns of H, from `start` on, times U [columns, out]."""

    hidden: Hidden
    start: int
    up: Tensor

    def added(self, output: Tensor, x: Tensor) -> Tensor:
        """output [..., out] + H U."""
        return plus_product(output, self.hidden.of(x).narrow(-1, self.start, len(self.up)), self.up)


def joined(parts: Sequence[Part]) -> dict[str, Beside]:
    """Layer -> what is added to it, of the parts of the layers that read one input.

    Where others' columns stand between a layer's own, its U is 0 there.
    """
    if not parts:
        return {}
    hidden, ends, made = Hidden(parts), list(accumulate(len(part.down) for part in parts)), {}
    for name in dict.fromkeys(name for part in parts for name in part.up):
        places = [place for place, part in enumerate(parts) if name in part.up]
        first, among = places[0], parts[places[0] : places[-1] + 1]
        width = parts[first].up[name].shape[1]
        up = torch.cat([part.up.get(name, part.down.new_zeros(len(part.down), width)) for part in among])
        made[name] = Beside(hidden, ends[first] - len(parts[first].down), up)
    return made


@dataclass(frozen=True)
class Group:
    """The layers that read one input.

    Args:
        layers: by name.
        bases: the base's recoveries, those that share D together.
    """

    layers: dict[str, nn.Linear]
    bases: list[dict[str, SharedRecovery]]

    @classmethod
    def of(cls, layers: dict[str, nn.Linear]) -> Group:
        """Find the recoveries of layers that read one input."""
        bases: dict[int, dict[str, SharedRecovery]] = {}
        for name, layer in layers.items():
            recovery = shared_of(layer)
            if recovery is not None:
                recovery.hook.remove()  # it is one of the parts from now on
                bases.setdefault(recovery.down.data_ptr(), {})[name] = recovery
        return cls(layers, list(bases.values()))

    def join(self, own: Mapping[str, Sequence[Part]]) -> dict[str, Beside]:
        """What is added to each layer: the base's recovery, and its own parts of an adapter.

        The base's columns come after the first layer's own: of two layers none has the other's between its own then.
        The recoveries keep no tensors of their own beside these.
        """
        parts: list[Part] = []
        starts: list[tuple[int, dict[str, SharedRecovery]]] = []
        for name in self.layers:
            parts += own.get(name, ())
            for base in self.bases:
                if name == next(iter(base)):
                    starts.append((sum(len(part.down) for part in parts), base))
                    parts.append(Part(base[name].down, {key: recovery.up.T for key, recovery in base.items()}))
        made = joined(parts)
        for start, base in starts:
            for name, recovery in base.items():
                beside, size = made[name], len(recovery.down)
                up = beside.up[start - beside.start :][:size].T
                recovery.restore({"down": beside.hidden.down[start : start + size], "up": up})
        return made


class Sides:
    """What is beside the layers of a packed model: the base's recovery always, and the parts of one adapter.

    Args:
        layers: those of the base, by name; their recoveries are unpacked (`calora.recovery.shared.unpack`).
        groups: the names of those that read one input.
    """

    def __init__(self, layers: Mapping[str, nn.Linear], groups: Iterable[Iterable[str]]) -> None:
        self.groups = [Group.of({name: layers[name] for name in group}) for group in groups]
        self.adapters: dict[str, dict[str, list[Part]]] = {}  # name -> layer -> its parts
        self.active: str | None = None
        self.hooks: dict[str, RemovableHandle] = {}
        self.use(None)

    def use(self, name: str | None) -> None:
        """Put the parts of the adapter `name` beside the layers, and the base's; None: the base's alone."""
        self.active = name
        for group in self.groups:
            made = group.join(self.adapters[name] if name else {})
            for key, layer in group.layers.items():
                self._put(key, layer, made.get(key))

    def remove(self, name: str) -> None:
        """Forget the adapter `name`, if it is there; if it is in use, none is then."""
        self.adapters.pop(name, None)
        if self.active == name:
            self.use(None)

    def _put(self, name: str, layer: Any, beside: Beside | None) -> None:
        """From now on layer(x) is its own output + what `beside` adds."""
        layer.beside = beside
        if beside is None and name in self.hooks:
            self.hooks.pop(name).remove()
        elif beside is not None and name not in self.hooks:
            self.hooks[name] = layer.register_forward_hook(_add)

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move all parts, or change their dtype, after the layers were."""
        for parts in self.adapters.values():
            for name, own in parts.items():
                parts[name] = [part.apply(fn) for part in own]
        self.use(self.active)


def _add(layer: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    beside: Beside = layer.beside
    return beside.added(output, args[0])
