"""Linear and embedding layers whose weight stays packed: codes of 8 to 2 bits, the kept values of a sparse pattern, or both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calora.layers.codes import (
    Grid,
    fit_grid,
    fit_table,
    nearest_rows,
    pack,
    pack_mask,
    pack_nibbles,
    pack_planes,
    unpack,
    unpack_mask,
    unpack_nibbles,
    unpack_planes,
)
from calora.layers.int4 import MANY_ROWS, unpacked, unpacks

FEW_ROWS = 16  # up to here torch's int8 kernel beats unpacking the weight for a bf16 product (2 cores, AVX-512)
MANY_OUTPUTS = 2048  # of an int4 head that has no kernel: it is unpacked and multiplied so many rows at a time
BITS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}


@dataclass(frozen=True)
class Packing:
    """How a weight is stored.

    Args:
        format: `native` (the dtype of the base), `int8`, `int4`, `int3` or `int2`.
        sparse: only the kept values are stored, with one bit a weight that says which they are.
        group: inputs that share a scale; the whole row for int8, but for codes that were taken from elsewhere.
        symmetric: whether the grid is symmetric about 0.
        outliers: number of input columns kept in the dtype of the base (LLM.int8, arXiv 2208.07339).
    """

    format: str
    sparse: bool = False
    group: int = 0
    symmetric: bool = True
    outliers: int = 0


class PackedLinear(nn.Linear):
    """y = x W^T + b with W stored packed; where a kernel is missing, the dense W exists within one forward call only.

    Make one with `pack` (from a dense layer) or `restore` (from stored tensors). `tensors()` are what is stored.
    """

    trains_scales = False
    exchanged: tuple[Tensor, Tensor] | None = None  # while a task's scales are in use: the base's own, and the ratio

    def __init__(self, in_features: int, out_features: int, packing: Packing, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.packing, self.dtype = in_features, out_features, packing, dtype
        self.kernel: tuple[Tensor, ...] = ()  # 4 bits and less: the layout and scales of torch's int4 kernel
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)

    @classmethod
    def pack(
        cls,
        layer: nn.Linear,
        packing: Packing,
        *,
        weight: Tensor | None = None,
        keep: Tensor | None = None,
        grid: Grid | None = None,
        outliers: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> PackedLinear:
        """Pack a dense layer.

        Args:
            weight: values [out, in] to store instead of the layer's own.
            keep: bool [out, in], the pattern of a sparse packing.
            grid: of a quantised packing.
            outliers: indices of the columns that stay in the base's dtype.
            dtype: of what is not quantised; None for the layer's own.
        """
        dense = (layer.weight if weight is None else weight).detach()
        made = cls(layer.in_features, layer.out_features, packing, dtype or layer.weight.dtype)
        tensors: dict[str, Tensor] = {} if layer.bias is None else {"bias": layer.bias.detach().to(made.dtype)}
        if outliers is not None:
            tensors |= {"outlier_columns": outliers.int(), "outlier_weight": dense[:, outliers].to(made.dtype)}
            dense = dense.clone().index_fill_(1, outliers, 0)
        if keep is not None:
            tensors["mask"] = pack_mask(keep)
        if grid is None:
            values = dense.to(made.dtype)
            tensors["weight"] = values if keep is None else values[keep]
        else:
            codes = grid.encode(dense)  # [out, in]
            tensors |= packed_tensors(codes if keep is None else codes[keep], grid, packing)
        return made.restore(tensors)

    @classmethod
    def on_grid(
        cls, codes: Tensor, grid: Grid, bias: Tensor | None, dtype: torch.dtype, order: Tensor | None = None
    ) -> PackedLinear:
        """A layer of codes that others made, as they are.

        Args:
            codes: int8 [out, in].
            dtype: of what is not quantised; scales keep their own.
            order: the input that each column is of, where it is not that of its place.
        """
        out, width = codes.shape
        format = next(name for name, bits in BITS.items() if bits == grid.bits)
        packing = Packing(format, group=width // grid.scale.shape[1], symmetric=grid.zero is None)
        tensors = packed_tensors(codes, grid, packing)
        tensors |= {} if bias is None else {"bias": bias.to(dtype)}
        tensors |= {} if order is None else {"column_order": order.int()}
        return cls(width, out, packing, dtype).restore(tensors)

    def restore(self, tensors: Mapping[str, Tensor]) -> PackedLinear:
        """Take stored tensors; the inverse of `tensors()`."""
        for name, tensor in tensors.items():
            if name in ("weight", "bias"):
                setattr(self, name, nn.Parameter(aligned(tensor), requires_grad=False))
            else:
                self.register_buffer(name, tensor)
        return self

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by name."""
        return dict(self.state_dict())

    def describe(self) -> dict[str, Any]:
        """What is needed, besides its tensors, to make the layer again."""
        ordered = {} if self.order is None else {"ordered": True}
        return {"in": self.in_features, "out": self.out_features, **asdict(self.packing), **ordered}

    @property
    def qweight(self) -> Tensor:
        """What stands for the weight, where PEFT looks for it: a layer of 4 bits or less has no `weight`.

        int8, because transformers' T5 casts its activations to any other dtype that it finds there.
        """
        if self.weight is not None:
            return self.weight
        return (self.kernel[0] if self.kernel else self.get_buffer("weight_packed")).view(torch.int8)

    @property
    def order(self) -> Tensor | None:
        """The input that each stored column is of, int32 [in], where groups are not of neighbours (GPTQ's act-order)."""
        return self._buffers.get("column_order")

    @property
    def rowwise(self) -> bool:
        """Whether it holds int8 codes with one scale a row and no zero point, as torch's kernel takes them."""
        packing = self.packing
        return (
            packing.format == "int8" and not packing.sparse and packing.symmetric and packing.group == self.in_features
        )

    @property
    def keep(self) -> Tensor | None:
        """The pattern, bool [out, in], of a sparse layer."""
        return unpack_mask(self.get_buffer("mask"), self.in_features) if self.packing.sparse else None

    @property
    def grid(self) -> Grid:
        """The grid of a quantised layer."""
        zero, bits = getattr(self, "weight_zero_point", None), BITS[self.packing.format]
        if zero is not None and bits < 8:
            zero = unpack(zero.T, self.out_features, bits).T
        return Grid(self.get_buffer("weight_scale"), zero, bits)

    def codes(self, into: Tensor | None = None) -> Tensor:
        """int8 [out, in] of a quantised layer, the code of 0 where nothing was kept; written to `into`, which is 0.

        A half-step grid has no code of 0: there the pattern has to be applied to the values.
        """
        packing, shape = self.packing, (self.out_features, self.in_features)
        bits = BITS[packing.format]
        if not packing.sparse:
            if self.weight is None:
                return unpack(self.get_buffer("weight_packed"), shape[1], bits)
            codes = self.weight.detach()
            return codes if bits == 8 else unpack_nibbles(codes.view(torch.uint8), shape[1])
        keep = unpack_mask(self.get_buffer("mask"), shape[1])
        if packing.symmetric:
            full = torch.zeros(shape, dtype=torch.int8, device=keep.device) if into is None else into
        else:
            full = self.grid.encode(torch.zeros(shape, device=keep.device))
        if bits == 8:
            return full.masked_scatter_(keep, self.weight.detach())
        packed, count = self.get_buffer("weight_packed"), int(keep.sum())
        kept = unpack_nibbles(packed, count) if bits == 4 else unpack_planes(packed, count, bits)
        return full.masked_scatter_(keep, kept)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """W [out, in] in `dtype`: the dense view of the same values."""
        weight, order = self._columns(dtype), self.order
        return weight if order is None else torch.empty_like(weight).index_copy_(1, order.long(), weight)

    def _columns(self, dtype: torch.dtype) -> Tensor:
        """W [out, in], its columns in the order in which they are stored."""
        if self.kernel and self.weight is None:  # torch's own layout: its product with the identity is W^T, exactly
            eye = torch.eye(self.in_features, dtype=self.dtype)
            return self._int4(eye).T.contiguous().to(dtype)
        keep = self.keep
        if self.packing.format != "native":
            grid = self.grid
            weight = grid.decode(self.codes()).to(self.dtype).to(dtype)
            if keep is not None and grid.half_step:
                weight *= keep
        else:
            weight = self.weight.detach().to(dtype)
            if keep is not None:
                weight = torch.zeros(keep.shape, dtype=dtype, device=weight.device).masked_scatter_(keep, weight)
        if self.packing.outliers:
            weight[:, self.get_buffer("outlier_columns")] = self.get_buffer("outlier_weight").to(dtype)
        return weight

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows `ids` of W [len(ids), in]; only a head, a dense int8 or int4 weight, can be read by rows."""
        return stored_rows(self, ids, self.in_features).to(dtype)

    def room(self, compute: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """Room for what `prepare` makes: codes of a sparse int8 layer, or layout and scales of torch's int4 kernel.

        That kernel computes with the values of int3 and int2 too, exactly, at the memory of 4 bits.

        To be taken for all layers before any is prepared: what is made in between would leave holes in the heap.

        Args:
            compute: the dtype of the inputs to come, by default the layer's own; torch's int4 kernel takes bf16 alone.
        """
        packing, shape = self.packing, (self.out_features, self.in_features)
        if packing.format == "int8":
            return (torch.zeros(shape, dtype=torch.int8),) if packing.sparse else ()
        if self.dtype != torch.bfloat16 or (compute or self.dtype) != torch.bfloat16:
            return ()
        few = BITS.get(packing.format, 8) <= 4
        if not few or shape[1] % 2 or shape[0] % 16 or packing.group not in (32, 64, 128, 256):
            return ()
        layout = torch.empty(shape[0], shape[1] // 2, dtype=torch.uint8)
        return layout, torch.empty(shape[1] // packing.group, shape[0], 2, dtype=self.dtype)

    def prepare(self, room: tuple[Tensor, ...]) -> None:
        """Change to the form that a CPU computes with fastest: dense int8 codes, or torch's int4 layout.

        Sparse codes are filled up with zeros: a CPU has no kernel for them. The stored form is given up, but for that of
        an int4 head: it is the table's too, and single rows are read from it.

        Args:
            room: of `room()`.
        """
        if self.packing.format == "int8" and not self.packing.sparse:
            self.weight = nn.Parameter(aligned(self.weight.detach()), requires_grad=False)
        if not room:
            return
        if self.packing.format == "int8":
            self.weight = nn.Parameter(self.codes(room[0]), requires_grad=False)
            self.packing = replace(self.packing, sparse=False)
            del self.mask
            return
        layout, scales = room  # [out, in / 2], [groups, out, 2]
        codes, grid = self._codes_of_4_bits()
        layout.copy_(torch._convert_weight_to_int4pack_for_cpu((codes + 8).int(), 1))  # from [out, in]
        fill_kernel(scales, grid)
        self.kernel, self.packing = room, replace(self.packing, format="int4", symmetric=grid.zero is None)
        if self.weight is None:
            for name in set(self._buffers) - {"column_order"}:
                delattr(self, name)

    def _codes_of_4_bits(self) -> tuple[Tensor, Grid]:
        """The codes [out, in] as int4 ones, 0 or the code of 0 where nothing was kept, and their grid."""
        codes, grid = self.codes(), self.grid
        if grid.bits == 4:
            return codes, grid
        codes, wide = grid.widened(codes)
        keep = self.keep
        return codes if keep is None else codes * keep, wide

    def unprepare(self) -> None:
        """Give up torch's int4 layout for int4 codes and scales as they are stored; a sparse layer's are dense from then on."""
        if self.weight is not None:  # a head still has its stored form
            self.kernel = ()
            return
        weight, grid = self._columns(torch.float32), self._kernel_grid()
        self.kernel, self.packing = (), replace(self.packing, sparse=False)
        self.restore(packed_tensors(grid.encode(weight), grid, self.packing))

    def _kernel_grid(self) -> Grid:
        """The grid of torch's int4 layout."""
        scales = self.kernel[1].float()  # [groups, out, 2]
        scale = scales[..., 0].T.contiguous()  # [out, groups]
        zero = None if self.packing.symmetric else (-scales[..., 1].T / scale).round().to(torch.int8)
        return Grid(scale.to(self.dtype), zero, BITS["int4"])

    @property
    def scale_groups(self) -> int:
        """Scales of each output; 0 where the weight is on no grid, or its groups are not of neighbours."""
        if self.packing.format == "native" or self.order is not None:
            return 0
        return len(self.kernel[1]) if self.kernel else self.get_buffer("weight_scale").shape[1]

    def rescale(self, ratio: Tensor | None) -> None:
        """From now on w = (code - zero) * scale * (1 + ratio); None: with the base's own scales, the very same tensor.

        Whatever is on no grid stays: outlier columns, the bias, the base's recovery. torch's int4 kernel has bf16 scales.

        Args:
            ratio: [out, scale_groups].
        """
        if self.exchanged is not None:
            self._compute_with(self.exchanged[0])
            self.exchanged = None
        if ratio is None:
            return
        if self.kernel:
            own = self.kernel[1]
            self._compute_with(fill_kernel(torch.empty_like(own), self._kernel_grid().rescaled(ratio)))
        else:
            own = self.get_buffer("weight_scale")
            self._compute_with(self.grid.rescaled(ratio).scale)
        self.exchanged = own, ratio

    def _compute_with(self, scales: Tensor) -> None:
        """Put other scales into the place of those in use."""
        if self.kernel:
            self.kernel = self.kernel[0], scales
        else:
            self.register_buffer("weight_scale", scales)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Move, or change the dtype. torch's int4 layout is for CPUs: it does not go along to another device."""
        ratio = None if self.exchanged is None else fn(self.exchanged[1])
        self.rescale(None)  # what moves is the base's
        if self.kernel and fn(self.kernel[0][:0]).device.type != "cpu":
            self.unprepare()
        moved: PackedLinear = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.rescale(ratio)
        return moved

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], computed in the dtype of `x`."""
        if self.kernel and x.dtype == torch.bfloat16 and self.order is not None:
            x = x[..., self.order.long()]
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.kernel and x.dtype == torch.bfloat16:
            out = self._int4(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        elif self.rowwise:
            out = self._int8(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        elif self.weight is not None and self.packing.format == "int4":
            pieces = torch.arange(self.out_features, device=x.device).split(MANY_OUTPUTS)
            out = torch.cat([F.linear(x, self.rows(ids, x.dtype)) for ids in pieces], -1)
        else:
            return F.linear(x, self.dense_weight(x.dtype), bias)
        return out if bias is None else out + bias

    def _int4(self, x: Tensor) -> Tensor:
        layout, scales = self.kernel
        if len(x) >= MANY_ROWS and self.weight is None and unpacks(layout):  # a head is too large, and reads few rows
            return x @ unpacked(layout, scales)
        return torch._weight_int4pack_mm_for_cpu(x.contiguous(), layout, self.packing.group, scales)

    def _int8(self, x: Tensor) -> Tensor:
        codes, scale = self.weight, self.get_buffer("weight_scale").to(x.dtype).flatten()
        if x.shape[0] <= FEW_ROWS and not x.requires_grad and kernel_takes(codes, x):  # that kernel has no derivative
            out = torch._weight_int8pack_mm(x.contiguous(), codes, scale)
        else:
            out = F.linear(x, codes.to(x.dtype)).mul_(scale)
        if self.packing.outliers:
            columns, weight = self.get_buffer("outlier_columns"), self.get_buffer("outlier_weight")
            out = out + F.linear(x[:, columns], weight.to(x.dtype))
        return out

    def extra_repr(self) -> str:
        """Shape and packing, as `print(model)` shows them."""
        sparse = ", sparse" if self.packing.sparse else ""
        return f"{self.in_features} -> {self.out_features}, {self.packing.format}{sparse}"


def kernel_takes(codes: Tensor, x: Tensor) -> bool:
    """Whether torch's int8 kernel can multiply x [n, in] with these codes [out, in].

    On a CPU it loads 16 codes at once from places that it takes for aligned: else it ends the process.
    """
    here = x.device.type == "cpu" and x.dtype == torch.bfloat16
    return here and codes.shape[1] % 16 == 0 and codes.data_ptr() % 16 == 0


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it where it does not start at a multiple of 16 bytes (in a mapped file, for example)."""
    return tensor if tensor.is_meta or tensor.data_ptr() % 16 == 0 else tensor.clone()


def fill_kernel(scales: Tensor, grid: Grid) -> Tensor:
    """Fill the scales [groups, out, 2] of torch's int4 kernel, w = code * scales[..., 0] + scales[..., 1], and return them."""
    scales[..., 0] = grid.scale.T
    scales[..., 1] = 0 if grid.zero is None else -(grid.zero.float() * grid.scale.float()).T
    return scales


def packed_tensors(codes: Tensor, grid: Grid, packing: Packing) -> dict[str, Tensor]:
    """How codes, int8 [out, in] or those of the kept weights [n], and their grid are stored."""
    tensors = {"weight_scale": grid.scale}
    if grid.zero is not None:
        few = grid.bits < 8
        tensors["weight_zero_point"] = pack(grid.zero.T.contiguous(), grid.bits).T.contiguous() if few else grid.zero
    if grid.bits == 8:
        return tensors | {"weight": codes}
    if packing.sparse:
        return tensors | {"weight_packed": pack_nibbles(codes) if grid.bits == 4 else pack_planes(codes, grid.bits)}
    tensors["weight_packed"] = pack(codes, grid.bits)
    # compressed-tensors reads the shape; it has no format for fewer bits.
    return tensors | ({"weight_shape": torch.tensor(codes.shape)} if grid.bits == 4 else {})


def stored_rows(layer: PackedLinear | PackedEmbedding, ids: Tensor, width: int) -> Tensor:
    """Rows `ids` [...] of a table or of a head, fp32 [..., width]: what else it holds stays packed.

    int4 values are rounded to the dtype of their scales, as the dense view's are.
    """
    scale = layer.get_buffer("weight_scale")
    codes, scales = layer.weight.detach()[ids], scale[ids]  # [..., width] or [..., width / 2], [..., groups]
    if codes.shape[-1] == width:
        return codes.float() * scales.float()
    words = layer.get_buffer("weight_zero_point")[ids // 8]  # [..., groups]: eight rows in one
    zero = (words >> (ids % 8 * 4).unsqueeze(-1) & 15) - 8
    grid = Grid(scales, zero, BITS["int4"])
    return grid.decode(unpack_nibbles(codes.view(torch.uint8), width)).to(scale.dtype).float()


def table_packing(width: int, format: str) -> Packing:
    """How a head of this width is packed that may share its table: int8 or int4, with group 0 where none divides it."""
    group = width if format == "int8" else next((group for group in (64, 32) if width % group == 0), 0)
    return Packing(format, group=group, symmetric=format == "int8")


def table_tensors(table: Tensor, format: str) -> dict[str, Tensor]:
    """How a table [rows, width] is stored, and a head that shares it: int8 with one scale a row, or int4 by groups.

    int4 is asymmetric with searched ranges; two codes a byte are called `weight`, so that transformers can tie them.
    """
    if format == "int8":
        codes, scale = nearest_rows(table)
        return {"weight": codes, "weight_scale": scale}
    packing = table_packing(table.shape[1], format)
    fit = partial(fit_grid, bits=4, group=packing.group, symmetric=False, dtype=table.dtype, search=True)
    codes, grid = fit_table(table, fit)
    tensors = packed_tensors(codes, grid, packing)
    return {"weight": pack_nibbles(codes).view(torch.int8)} | {
        name: tensors[name] for name in ("weight_scale", "weight_zero_point")
    }


class PackedEmbedding(nn.Embedding):
    """An embedding table in int8 with one scale a row, or in int4 by groups; rows come out in `dtype`.

    They are multiplied by `factor` where the base's class has one.
    """

    def __init__(
        self,
        rows: int,
        width: int,
        padding_idx: int | None,
        dtype: torch.dtype,
        factor: float | None = None,
        format: str = "int8",
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.padding_idx = rows, width, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.dtype, self.factor, self.format = dtype, factor, format

    @classmethod
    def pack(cls, layer: nn.Embedding, format: str = "int8") -> PackedEmbedding:
        """Quantise an embedding table row by row."""
        table = layer.weight.detach()
        sizes = (layer.num_embeddings, layer.embedding_dim, layer.padding_idx)
        return cls(*sizes, table.dtype, factor_of(layer), format).restore(table_tensors(table, format))

    def restore(self, tensors: Mapping[str, Tensor]) -> PackedEmbedding:
        """Take stored tensors."""
        for name, tensor in tensors.items():
            if name == "weight":
                self.weight = nn.Parameter(tensor, requires_grad=False)
            else:
                self.register_buffer(name, tensor)
        return self

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """The table [rows, width] in `dtype`."""
        every = torch.arange(self.num_embeddings, device=self.weight.device).split(MANY_OUTPUTS)
        return torch.cat([stored_rows(self, ids, self.embedding_dim).to(self.dtype).to(dtype) for ids in every])

    def forward(self, input: Tensor) -> Tensor:
        """Ids [...] -> vectors [..., width]."""
        rows = stored_rows(self, input, self.embedding_dim).to(self.dtype)
        return rows if self.factor is None else rows * self.factor


def factor_of(table: nn.Embedding) -> float | None:
    """What a table of transformers multiplies its vectors with (Gemma's, BART's), as it does so; None for a plain one."""
    factor: Tensor | float | None = getattr(table, "embed_scale", None)
    if isinstance(factor, Tensor):  # Gemma's: rounded to the table's dtype
        return float(torch.tensor(table.scalar_embed_scale).to(table.weight.dtype))
    return factor


class ScaledEmbedding(nn.Embedding):
    """A dense table whose vectors are multiplied by `factor`."""

    def __init__(self, weight: Tensor, padding_idx: int | None, factor: float) -> None:
        super().__init__(weight.shape[0], weight.shape[1], padding_idx=padding_idx, _weight=weight)
        self.factor = factor

    def forward(self, input: Tensor) -> Tensor:
        """Ids [...] -> vectors [..., width]."""
        return super().forward(input) * self.factor
