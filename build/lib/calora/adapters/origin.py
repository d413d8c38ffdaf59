"""Where each layer of a compressed model comes from: which layer of the original, which of its outputs and inputs, how scaled.

AWQ and SmoothQuant divide an input by s and multiply the weights by s before they round: W' = diag(r) W diag(s) reads x / s
and gives r y. So a LoRA's A becomes A diag(s), and its B diag(r) B.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from calora.common.leastsquares import compensated
from calora.errors import CaloraError


@dataclass(frozen=True)
class Origin:
    """What remains of the original, in the order of the compressed model.

    Args:
        kept: `<layer>.rows` / `<layer>.columns` -> indices of the original's outputs / inputs; none where all stay.
            `<layer>.output_scale` / `<layer>.input_scale` -> r [out] / s [in]; none where they are as they were.
        layers: stack -> index that each of its blocks had; none where all stay.
    """

    kept: Mapping[str, Tensor] = field(default_factory=dict)
    layers: Mapping[str, list[int]] = field(default_factory=dict)

    def source(self, layer: str) -> str:
        """The original's name of a layer."""
        for stack, indices in self.layers.items():
            if layer.startswith(f"{stack}."):
                index, _, rest = layer[len(stack) + 1 :].partition(".")
                return f"{stack}.{indices[int(index)]}.{rest}"
        return layer

    def rows(self, layer: str) -> Tensor | None:
        """Outputs of the original that a layer still has, in its order; None for all."""
        return self._indices(f"{layer}.rows")

    def columns(self, layer: str) -> Tensor | None:
        """Inputs of the original that a layer still has, in its order; None for all."""
        return self._indices(f"{layer}.columns")

    def _indices(self, name: str) -> Tensor | None:
        found = self.kept.get(name)
        return None if found is None else found.long()

    def slice_rows(self, layer: str, values: Tensor) -> Tensor:
        """The remaining first indices of a tensor [out, ...] of the original layer, scaled as its outputs are."""
        rows, scale = self.rows(layer), self.kept.get(f"{layer}.output_scale")
        values = values if rows is None else values[rows]
        return values if scale is None else (values.float() * scale.view(-1, *[1] * (values.ndim - 1))).to(values.dtype)

    def slice_columns(self, layer: str, values: Tensor) -> Tensor:
        """The remaining second indices of a tensor [..., in] of the original layer, scaled against its inputs."""
        columns, scale = self.columns(layer), self.input_scale(layer)
        values = values if columns is None else values[..., columns]
        return values if scale is None else (values.float() * scale).to(values.dtype)

    def input_scale(self, layer: str) -> Tensor | None:
        """s [in], where the layer reads x / s."""
        return self.kept.get(f"{layer}.input_scale")

    def fit_columns(self, layer: str, values: Tensor, moment: Tensor) -> Tensor:
        """A tensor A [..., in] of the original layer for the inputs S that remain, which make up for the lost ones R.

        A' = A[:, S] + A[:, R] C[R, S] C[S, S]^-1 (least squares), C = X^T X [in, in] the moment of the original's inputs.
        """
        columns = self.columns(layer)
        return values.clone() if columns is None else compensated(values, moment, columns)

    def carry(self, lora: Mapping[str, Tensor], layers: Iterable[str]) -> tuple[dict[str, Tensor], list[str]]:
        """A LoRA of the original, cut to the shape of the compressed model: A loses inputs, B loses outputs.

        Args:
            lora: `<layer>.lora_A.weight` [r, in] and `<layer>.lora_B.weight` [out, r] by the original's names.
            layers: the compressed model's linear layers.

        Returns:
            The tensors by the compressed model's names, and the tensors of layers that were cut.

        Raises:
            CaloraError: a tensor is of no layer that the original had.
        """
        carried: dict[str, Tensor] = {}
        used: set[str] = set()
        for layer in layers:
            source = self.source(layer)
            a, b = f"{source}.lora_A.weight", f"{source}.lora_B.weight"
            if (a in lora) != (b in lora):
                raise CaloraError(
                    f"inherited layer {source}", "both lora_A and lora_B", "one of them", "retrain the adapter"
                )
            if a in lora:
                carried[f"{layer}.lora_A.weight"] = self.slice_columns(layer, lora[a]).clone()
                carried[f"{layer}.lora_B.weight"] = self.slice_rows(layer, lora[b]).clone()
                used |= {a, b}
        dropped = sorted(set(lora) - used)
        for key in dropped:
            if not self._was_cut(key):
                raise CaloraError(
                    f"inherited tensor {key}",
                    "a linear layer of the compressed base",
                    "none of that name",
                    "use an adapter of this base",
                )
        return carried, dropped

    def _was_cut(self, key: str) -> bool:
        for stack, indices in self.layers.items():
            if key.startswith(f"{stack}."):
                return int(key[len(stack) + 1 :].partition(".")[0]) not in indices
        return False
