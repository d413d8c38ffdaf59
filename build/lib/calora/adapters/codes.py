"""The recovery part of an adapter in 8 or 4 bits: codes, with a scale for each input and for each output.

A scale is shared along the rank alone. A few inputs are huge, and their rows of D are unlike the others: a scale for
both would round one of them off, and so it is with outputs and U (docs/method.md has the figures).

These are not the grids of `calora.layers`: what trains on the uncompressed model uses adapters and no such layers, and
would be made again after each change there.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from calora.errors import CaloraError

FORMATS = ("bf16", "int8", "int4")
GROUP = 32  # values along the rank that share a scale in int4; the last group may be shorter
# Most bytes of the header of a safetensors file of up to 10 GB: its own, and a tensor's besides its layer's name.
HEADER, ENTRY = 48, 92
FIX = "make the adapter again, or name another folder"


def encode_recovery(recovery: Mapping[str, Tensor], kind: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of recovery.safetensors.

    Args:
        recovery: `<layer>.down` [in, rank] and `<layer>.up` [rank, out].
        kind: `bf16` stores them as they are, in `dtype`. `int8` and `int4` store `<name>.codes` and `<name>.scale`
            of D [in, rank] and of U^T [out, rank], which are T below [n, rank]: value = code * scale.
            int8: codes int8 [n, rank], scale [n, 1]. int4: codes uint8 [ceil(n / 2), rank], the even one of two rows
            in the low bits, scale [n, ceil(rank / 32)].
        dtype: of the values, or of the scales.

    Raises:
        CaloraError: there is no such format, or a value is not finite.
    """
    _known(kind)
    if kind == "bf16":
        return {name: tensor.to(dtype) for name, tensor in recovery.items()}
    stored: dict[str, Tensor] = {}
    for name, tensor in recovery.items():
        if not bool(tensor.isfinite().all()):
            raise CaloraError(f"bypass {name}", "finite values", "NaN or infinity", "train it again at a lower rate")
        codes, scale = _encode(_tall(name, tensor.detach().float()), kind, dtype)
        stored |= {f"{name}.codes": codes, f"{name}.scale": scale}
    return stored


def _known(kind: str) -> None:
    if kind not in FORMATS:
        raise CaloraError("format of the bypass", f"one of {', '.join(FORMATS)}", kind, "choose one of them")


def stored_bytes(layer: str, inputs: int, outputs: int, rank: int, kind: str) -> int:
    """Most bytes of one layer's bypass in recovery.safetensors: values, or codes and scales, and their part of the header.

    Args:
        layer: its full name.
        inputs, outputs, rank: D is [inputs, rank], U [rank, outputs].
        kind: `bf16`, `int8` or `int4`; values and scales are of 2 bytes.

    Raises:
        CaloraError: there is no such format.
    """
    _known(kind)
    rows = inputs + outputs
    if rank == 0:
        return 0
    if kind == "bf16":
        return 2 * rows * rank + 2 * (ENTRY + len(layer))
    codes, scales = (rows, 1) if kind == "int8" else ((inputs + 1) // 2 + (outputs + 1) // 2, -(-rank // GROUP))
    return codes * rank + 2 * rows * scales + 4 * (ENTRY + len(layer))


def decode_recovery(stored: Mapping[str, Tensor], kind: str, where: object) -> dict[str, Tensor]:
    """The inverse of `encode_recovery` but for the rounding: `<layer>.down` and `<layer>.up`, of codes in fp32.

    Raises:
        CaloraError: codes or a scale are missing, or do not fit each other; `where` names the file.
    """
    if kind == "bf16":
        return dict(stored)
    recovery: dict[str, Tensor] = {}
    for name in sorted({key.rpartition(".")[0] for key in stored}):
        codes, scale = stored.get(f"{name}.codes"), stored.get(f"{name}.scale")
        if codes is None or scale is None:
            found = ", ".join(sorted(key for key in stored if key.rpartition(".")[0] == name))
            raise CaloraError(where, f"{name or 'each factor'}.codes and .scale, as {kind} has them", found, FIX)
        _check(codes, scale, kind, f"{where}: {name}")
        recovery[name] = _tall(name, _decode(codes, scale, kind)).contiguous()
    return recovery


def rounded(recovery: Mapping[str, Tensor], kind: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a reader of the stored recovery part has."""
    return decode_recovery(encode_recovery(recovery, kind, dtype), kind, "the bypass")


def _tall(name: str, factor: Tensor) -> Tensor:
    """D as it is, U [rank, out] as U^T and back: rows are inputs or outputs, columns the rank."""
    return factor.T if name.endswith(".up") else factor


def _encode(values: Tensor, kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows, rank = values.shape
    group, low, high = (rank, -127, 127) if kind == "int8" else (GROUP, -8, 7)
    groups = F.pad(values, (0, -rank % group)).view(rows, -1, group)
    scale = (groups.abs().amax(-1) * 2 / (high - low)).to(dtype)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = (groups / scale.float().unsqueeze(-1)).round().clamp(low, high).view(rows, -1)[:, :rank]
    return (codes.to(torch.int8) if kind == "int8" else _pack(codes)), scale


def _decode(codes: Tensor, scale: Tensor, kind: str) -> Tensor:
    """[n, rank] in fp32."""
    values = codes.float() if kind == "int8" else _unpack(codes)[: len(scale)]
    group = values.shape[1] if kind == "int8" else GROUP
    return values * scale.float().repeat_interleave(group, 1)[:, : values.shape[1]]


def _pack(codes: Tensor) -> Tensor:
    """Codes -8 to 7 [n, rank] -> uint8 [ceil(n / 2), rank]."""
    pairs = F.pad(codes + 8, (0, 0, 0, len(codes) % 2)).to(torch.uint8)
    return pairs[::2] | (pairs[1::2] << 4)


def _unpack(packed: Tensor) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], 1).flatten(0, 1).float() - 8


def _check(codes: Tensor, scale: Tensor, kind: str, where: str) -> None:
    rows = len(scale) if kind == "int8" else (len(scale) + 1) // 2
    dtype = torch.int8 if kind == "int8" else torch.uint8
    if codes.dtype != dtype or codes.ndim != 2 or len(codes) != rows or not codes.numel():
        expected = f"codes [{rows}, rank] of {dtype}, for {len(scale)} scales"
        raise CaloraError(where, expected, f"{list(codes.shape)} of {codes.dtype}", FIX)
    groups = 1 if kind == "int8" else -(-codes.shape[1] // GROUP)
    if not scale.is_floating_point() or scale.ndim != 2 or scale.shape[1] != groups:
        raise CaloraError(where, f"scales [n, {groups}]", f"{list(scale.shape)} of {scale.dtype}", FIX)
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise CaloraError(where, "finite scales above 0", "others", FIX)
