"""nf4 layers: bitsandbytes' own codes and kernels (arXiv 2305.14314, section 3), under tensor names of a plain state dict."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STATE = "quant_state"  # of bitsandbytes' `weight.quant_state.bitsandbytes__nf4`; the other names lack its `weight.`
THEIRS = "quant_state.bitsandbytes__nf4"


STATISTICS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE)


def their_name(name: str) -> str:
    """bitsandbytes' name of a tensor of an nf4 layer; other names stay."""
    layer, _, part = name.rpartition(".")
    return f"{layer}.weight.{part.replace(STATE, THEIRS)}" if part in STATISTICS else name


def _bitsandbytes() -> Any:
    """Imported only where a recipe uses nf4: it takes seconds."""
    return import_module("bitsandbytes")


class Nf4Linear(nn.Linear):
    """y = x W^T + b with W in bitsandbytes' nf4 with double quantisation.

    Make one with `pack` or `restore`. Until `prepare`, W is dequantised in each call; then bitsandbytes' kernel runs.
    """

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.kernel: Any = None
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)

    @classmethod
    def pack(cls, layer: nn.Linear, dtype: torch.dtype | None = None) -> Nf4Linear:
        """Quantise a dense layer; its bias is stored in `dtype`, or its own."""
        weight = layer.weight.detach().to(dtype or layer.weight.dtype)
        # T5 casts a layer's input to the dtype of its weight: the codes are stored as that dtype, never as uint8.
        codes, state = _bitsandbytes().functional.quantize_4bit(
            weight, quant_type="nf4", compress_statistics=True, quant_storage=weight.dtype
        )
        tensors = {key.replace(THEIRS, STATE): value for key, value in state.as_dict(packed=True).items()}
        bias = {} if layer.bias is None else {"bias": layer.bias.detach().to(weight.dtype)}
        return cls(layer.in_features, layer.out_features, weight.dtype).restore({"weight": codes, **tensors, **bias})

    def restore(self, tensors: Mapping[str, Tensor]) -> Nf4Linear:
        """Take stored tensors, as `state_dict` gives them or by bitsandbytes' names."""
        for name, tensor in tensors.items():
            name = name.removeprefix("weight.").replace(THEIRS, STATE)
            if name in ("weight", "bias"):
                setattr(self, name, nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(name, tensor)
        return self

    def statistics(self) -> dict[str, Tensor]:
        """The tensors beside the codes, by bitsandbytes' names."""
        return {
            THEIRS if name == STATE else name: tensor for name, tensor in self._buffers.items() if tensor is not None
        }

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """W [out, in] in `dtype`."""
        functional = _bitsandbytes().functional
        if self.kernel is None:
            codes, state = self.weight, functional.QuantState.from_dict(self.statistics(), device=self.weight.device)
        else:
            self.kernel.state_dict()  # undoes the reordering that the CPU kernel leaves behind in the codes
            codes, state = self.kernel.weight, self.kernel.weight.quant_state
        weight: Tensor = functional.dequantize_4bit(codes.detach(), state)
        return weight.to(dtype)

    def prepare(self) -> None:
        """Hand the codes to bitsandbytes' own `Linear4bit`; the stored form is given up."""
        bnb = _bitsandbytes()
        with torch.device("meta"):
            kernel = bnb.nn.Linear4bit(
                self.in_features, self.out_features, self.bias is not None, compute_dtype=self.dtype,
                compress_statistics=True, quant_type="nf4", quant_storage=self.dtype,
            )  # fmt: skip
        # Its fast CPU kernel computes in bf16, and reshapes by blocks of 64 inputs: it fails where a row holds no whole ones.
        fits = self.dtype == torch.bfloat16 and self.in_features % 64 == 0
        kernel.support_avx512bf16_for_cpu = kernel.support_avx512bf16_for_cpu and fits
        kernel.weight = bnb.nn.Params4bit.from_prequantized(
            data=self.weight.detach(), quantized_stats=self.statistics(), requires_grad=False,
            device=str(self.weight.device), module=kernel,
        )  # fmt: skip
        kernel.quant_state, kernel.bias = kernel.weight.quant_state, self.bias
        self.kernel = kernel.requires_grad_(False).eval()
        for name in list(self._buffers):
            delattr(self, name)
        self.weight = nn.Parameter(self.weight.detach()[:0], requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if self.kernel is not None:
            out: Tensor = self.kernel(x)
            return out
        return F.linear(x, self.dense_weight(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def extra_repr(self) -> str:
        """Shape and packing, as `print(model)` shows them."""
        return f"{self.in_features} -> {self.out_features}, nf4"
