"""Bring a model of transformers into the one form that calora works on: linear layers, computed in the dtype of their input.

GPT-2 holds its layers in Conv1D, which are linear layers with the weight transposed: [in, out]. T5 casts what its
feed-forward's last layer reads to the dtype of that layer's weight, which loses digits where the weight is packed: kept values
and nf4 codes are stored as bf16, whatever the model computes in.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

M = TypeVar("M", bound=nn.Module)


def uniform(model: M) -> M:
    """Change `model` in place: each Conv1D becomes an `nn.Linear` of the same name, and T5's feed-forwards cast nothing."""
    for name in conv1d_layers(model):
        model.set_submodule(name, _linear(model.get_submodule(name)))
    keep_dtype(model)
    return model


def conv1d_layers(model: nn.Module) -> list[str]:
    """The names of its Conv1D."""
    return [name for name, module in model.named_modules() if isinstance(module, Conv1D)]


def was_conv1d(model: PreTrainedModel) -> list[str]:
    """The names of the layers that are Conv1D where transformers makes such a model."""
    with torch.device("meta"):
        made: nn.Module = type(model)(model.config)
    return conv1d_layers(made)


def _linear(layer: Any) -> nn.Linear:
    with torch.device("meta"):
        made = nn.Linear(layer.nx, layer.nf)
    made.weight = nn.Parameter(layer.weight.detach().T.contiguous(), requires_grad=layer.weight.requires_grad)
    made.bias = layer.bias
    return made


class KeepsDtype:
    """A feed-forward of T5 without its cast: wo(act(wi(x))), or wo(act(wi_0(x)) * wi_1(x))."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        if hasattr(self, "wi"):
            hidden = self.act(self.wi(hidden_states))
        else:
            hidden = self.act(self.wi_0(hidden_states)) * self.wi_1(hidden_states)
        out: Tensor = self.wo(self.dropout(hidden))
        return out


def keep_dtype(model: nn.Module) -> None:
    """Let the feed-forwards of T5 and its kin leave their values in the dtype that the model computes in."""
    for module in model.modules():
        cls = type(module)
        theirs = cls.__name__.endswith(("DenseActDense", "DenseGatedActDense")) and hasattr(module, "wo")
        if theirs and not isinstance(module, KeepsDtype):
            module.__class__ = type(cls.__name__, (KeepsDtype, cls), {})
