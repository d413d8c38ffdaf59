"""The recovery that belongs to the compressed base: a linear low-rank map beside a layer, on under every adapter and without one.

y = x W_c^T + L(x), L(x) = (x * a) D^T U^T * b. The factors are stored in the dtype of the base (a = b = 1), or as int8
codes: `a` has a scale for each input, so that a few inputs with huge activations do not round off the others, `b` one for
each output. Layers that read one input share D, and compute x D^T once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

CHILD = "base_recovery"  # under this name a linear layer holds it
FORMATS = ("native", "int8")
LARGEST = 127


@dataclass(frozen=True)
class Factors:
    """L as it is stored, for the layers that read one input.

    Args:
        down: D [k, in], int8 or the dtype of the base.
        inputs: a [in]; None for ones.
        up: layer -> U [out, k], int8 or the dtype of the base.
        outputs: layer -> b [out]; empty for ones.
    """

    down: Tensor
    inputs: Tensor | None
    up: dict[str, Tensor]
    outputs: dict[str, Tensor]

    @classmethod
    def of(cls, p: Tensor, q: dict[str, Tensor], format: str, dtype: torch.dtype) -> Factors:
        """Store the map x -> x P Q_layer.

        Args:
            p: P [in, k].
            q: layer -> Q [k, out].
            format: `native` or `int8`.
            dtype: of the base: of the factors, or of their scales.
        """
        sizes = torch.cat(list(q.values()), dim=1).norm(dim=1) / p.norm(dim=0).clamp_min(1e-30)  # [k]
        balance = sizes.clamp_min(1e-30).sqrt()  # D and U share the size of each direction
        down, ups = (p * balance).T, {name: (part / balance.unsqueeze(1)).T for name, part in q.items()}
        if format == "native":
            return cls(
                down.contiguous().to(dtype), None, {name: up.contiguous().to(dtype) for name, up in ups.items()}, {}
            )
        inputs = _scale(down, 0, dtype)  # [in]
        outputs = {name: _scale(up, 1, dtype) for name, up in ups.items()}  # each [out]
        codes = {name: _codes(up, outputs[name].unsqueeze(1)) for name, up in ups.items()}
        return cls(_codes(down, inputs), inputs, codes, outputs)

    def weight(self, name: str) -> Tensor:
        """What L adds to the weight of a layer, fp32 [out, in]."""
        return SharedRecovery(self, name).weight()


def _scale(values: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    largest = values.abs().amax(dim)
    return torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest)).to(dtype)


def _codes(values: Tensor, scale: Tensor) -> Tensor:
    return (values / scale.float()).round().clamp(-LARGEST, LARGEST).to(torch.int8).contiguous()


class SharedRecovery(nn.Module):
    """L of one layer. Its tensors are `down` [k, in] and `up` [out, k], and of int8 codes `inputs` [in], `outputs` [out]."""

    down: Tensor
    up: Tensor
    inputs: Tensor | None
    outputs: Tensor | None
    reading: Reading | None = None
    hook: RemovableHandle
    unpacked = False  # whether its tensors are those that it computes with, not the stored ones

    def __init__(self, factors: Factors | None = None, name: str = "") -> None:
        super().__init__()
        self.restore({"inputs": None, "outputs": None})
        if factors is not None:
            self.restore({"down": factors.down, "up": factors.up[name]})
            self.restore({"inputs": factors.inputs, "outputs": factors.outputs.get(name)})

    def __getstate__(self) -> dict[str, Any]:
        """Without the hook: a copy is not what it takes off, and the layer that had it may be gone."""
        return {name: value for name, value in self.__dict__.items() if name != "hook"}

    def restore(self, tensors: Mapping[str, Tensor | None]) -> SharedRecovery:
        """Take stored tensors, as `state_dict` gives them."""
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        return self

    def values(self) -> tuple[Tensor, Tensor]:
        """D [k, in] and U [out, k] in fp32."""
        down, up = self.down.float(), self.up.float()
        if self.inputs is None or self.outputs is None:
            return down, up
        return down * self.inputs.float(), up * self.outputs.float().unsqueeze(1)

    def weight(self) -> Tensor:
        """What L adds to the layer's weight, fp32 [out, in]."""
        down, up = self.values()
        return up @ down

    def hidden(self, x: Tensor) -> Tensor:
        """(x * a) D^T: [..., in] -> [..., k]; computed once for all layers that read `x`."""
        if self.reading is None:
            return self.read(x)
        return self.reading.of(x, self.read)

    def read(self, x: Tensor) -> Tensor:
        """(x * a) D^T."""
        inputs = self._buffers.get("inputs")
        return F.linear(x if inputs is None else x * inputs.to(x.dtype), self.down.to(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of `x`."""
        out, outputs = F.linear(self.hidden(x), self.up.to(x.dtype)), self._buffers.get("outputs")
        return out if outputs is None else out * outputs.to(x.dtype)

    def describe(self) -> dict[str, Any]:
        """What is needed, besides its tensors, to make it again."""
        return {"rank": len(self.down), "format": "int8" if self.down.dtype == torch.int8 else "native"}

    def extra_repr(self) -> str:
        """Shapes, as `print(model)` shows them."""
        return f"{self.down.shape[1]} -> {len(self.down)} -> {len(self.up)}, {self.describe()['format']}"


class Reading:
    """What the layers that read one input share: what D makes of it, for as long as that input lives."""

    held: tuple[weakref.ref[Tensor], Tensor] | None = None

    def of(self, x: Tensor, read: Callable[[Tensor], Tensor]) -> Tensor:
        """D's product with `x`, made by the first that asks."""
        if x.requires_grad:  # what is held would keep the graph
            return read(x)
        held = self.held  # once: another thread may set it meanwhile
        if held is None or held[0]() is not x:
            held = self.held = (weakref.ref(x, self._forget), read(x))
        return held[1]

    def _forget(self, ended: weakref.ref[Tensor]) -> None:
        held = self.held
        if held is not None and held[0] is ended:
            self.held = None


def _add(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    recovery: Any = layer._modules[CHILD]  # not by getattr, which is slow: this runs for each token
    recovered: Tensor = recovery(args[0])
    return output + recovered


def attach_shared(layer: nn.Module, recovery: SharedRecovery) -> None:
    """From now on layer(x) is its own output + L(x)."""
    layer.add_module(CHILD, recovery)
    recovery.hook = layer.register_forward_hook(_add)


def detach_shared(layer: nn.Module) -> SharedRecovery | None:
    """Take the recovery, if there is one, from a layer of the base."""
    recovery = shared_of(layer)
    if recovery is not None:
        recovery.hook.remove()
        del layer._modules[CHILD]
    return recovery


def shared_of(layer: nn.Module) -> SharedRecovery | None:
    """The recovery of a layer of the base, if it has one."""
    found: Any = layer._modules.get(CHILD)
    recovery: SharedRecovery | None = found
    return recovery


def by_down(model: nn.Module) -> list[list[SharedRecovery]]:
    """All of a model, those that share D together."""
    groups: dict[int, list[SharedRecovery]] = {}
    for module in model.modules():
        if isinstance(module, SharedRecovery):
            groups.setdefault(module.down.data_ptr(), []).append(module)
    return list(groups.values())


def read_once(model: nn.Module) -> None:
    """Let the layers that share D compute its product once."""
    for group in by_down(model):
        reading = Reading() if len(group) > 1 else None
        for recovery in group:
            recovery.reading = reading


def unpack(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring all factors into the dtype to compute in, for good: codes would be converted in each call."""
    for group in by_down(model):
        down = group[0].values()[0].to(dtype)
        for recovery in group:
            _, up = recovery.values()
            recovery.restore({"down": down, "up": up.to(dtype), "inputs": None, "outputs": None})
            recovery.unpacked = True
