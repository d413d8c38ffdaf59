"""Tiny checkpoints in the layouts of other packages, packed bit by bit as those document them, with their values beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

GROUP = 32
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def words(numbers: Tensor, bits: int) -> Tensor:
    """Numbers [n, m] as a stream of bits along each row, in int32 words [n, m bits / 32]."""
    spread = np.unpackbits(numbers.numpy().astype(np.uint8)[..., None], axis=-1, count=bits, bitorder="little")
    packed = np.packbits(spread.reshape(len(numbers), -1), axis=1, bitorder="little")
    return torch.from_numpy(packed.view(np.int32).copy())


def rounded(weight: Tensor, bits: int, group: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers [out, in] of `bits` bits, scales and zero points [out, groups]: w ~ (number - zero) * scale."""
    parts, top = weight.float().view(len(weight), -1, group), 2**bits - 1
    low, high = parts.amin(-1), parts.amax(-1)
    scale = (2 * parts.abs().amax(-1) / top if symmetric else (high - low) / top).half()
    zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else (-low / scale.float()).round().clamp(0, top)
    numbers = (parts / scale.float().unsqueeze(-1) + zero.float().unsqueeze(-1)).round().clamp(0, top)
    return numbers.flatten(1).to(torch.int64), scale, zero.to(torch.int64)


def values(numbers: Tensor, scale: Tensor, zero: Tensor, index: Tensor | None = None) -> Tensor:
    """fp32 [out, in]."""
    width = numbers.shape[1]
    index = torch.arange(width) // (width // scale.shape[1]) if index is None else index
    return (numbers - zero[:, index]).float() * scale.float()[:, index]


Made = tuple[dict[str, Tensor], Tensor]  # the tensors of one layer, and what they stand for


def gptq(weight: Tensor, bits: int = 4, symmetric: bool = True, ordered: bool = False) -> Made:
    width, index = weight.shape[1], None
    if ordered:  # act-order: groups of inputs that are not neighbours
        order = torch.randperm(width, generator=torch.Generator().manual_seed(0))
        index = torch.empty(width, dtype=torch.int64)
        index[order] = torch.arange(width) // GROUP
        numbers, scale, zero = rounded(weight[:, order], bits, GROUP, symmetric)
        numbers = numbers[:, torch.argsort(order)]
    else:
        numbers, scale, zero = rounded(weight, bits, GROUP, symmetric)
    less = (zero - 1) % 2**bits if bits == 3 else zero - 1
    tensors = {
        "qweight": words(numbers, bits).T.contiguous(),
        "qzeros": words(less.T, bits).contiguous(),
        "scales": scale.T.contiguous(),
        "g_idx": (torch.arange(width) // GROUP if index is None else index).int(),
    }
    return tensors, values(numbers, scale, zero, index)


def awq(weight: Tensor) -> Made:
    numbers, scale, zero = rounded(weight, 4, GROUP, symmetric=False)

    def columns(matrix: Tensor) -> Tensor:  # [n, out]: of eight neighbours 0, 2, 4, 6, 1, 3, 5, 7 follow one another
        return words(matrix.view(len(matrix), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1), 4)

    tensors = {"qweight": columns(numbers.T), "qzeros": columns(zero.T), "scales": scale.T.contiguous()}
    return tensors, values(numbers, scale, zero)


def packed(weight: Tensor, symmetric: bool = True) -> Made:
    numbers, scale, zero = rounded(weight, 4, GROUP, symmetric)
    tensors = {
        "weight_packed": words(numbers, 4),
        "weight_scale": scale.bfloat16(),
        "weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = words(zero.T, 4).T.contiguous()
    return tensors, values(numbers, scale.bfloat16(), zero)


def int8(weight: Tensor) -> Made:
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    codes = (weight.float() / scale).round()
    return {"weight": codes.to(torch.int8), "weight_scale": scale}, codes * scale


def bnb8(weight: Tensor) -> Made:
    tensors, plain = int8(weight)
    return {"weight": tensors["weight"], "SCB": tensors["weight_scale"].flatten() * 127}, plain


def fp8(weight: Tensor) -> Made:
    scale = weight.float().abs().amax(1, keepdim=True) / 448
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def ao(weight: Tensor) -> Made:
    numbers, scale, zero = rounded(weight, 4, GROUP, symmetric=False)
    tensors = {
        "qdata": (numbers - 8).to(torch.int8),
        "scale": scale.bfloat16(),
        "zero_point": (zero - 8).to(torch.int8),
    }
    return {f"_weight_{name}": tensor for name, tensor in tensors.items()}, values(numbers, scale.bfloat16(), zero)


AO_KIND = {
    "_type": "IntxUnpackedToInt8Tensor", "_tensor_data_names": ["qdata", "scale", "zero_point"],
    "_data": {"target_dtype": {"_type": "torch.dtype", "_data": "int4"}, "block_size": [1, GROUP]},
}  # fmt: skip


def write(base: Path, folder: Path, make: Callable[[Tensor], Made], settings: dict[str, object]) -> dict[str, Tensor]:
    """A checkpoint of a base; the values of all its tensors, by the model's names."""
    folder.mkdir(parents=True)
    stored: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    header = {"format": "pt"}
    for name, tensor in load_file(base / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        if layer.rpartition(".")[2] not in LINEAR:
            stored[name] = plain[name] = tensor
            continue
        tensors, plain[name] = make(tensor)
        stored |= {f"{layer}.{part}": value for part, value in tensors.items()}
        if settings["quant_method"] == "torchao":
            header[name] = json.dumps(AO_KIND)
    save_file(stored, folder / "model.safetensors", metadata=header)
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return plain


LLAMA = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(base: Path, file: Path, kind: str = "Q4_0") -> dict[str, Tensor]:
    """The same as a GGUF file of a Llama, with a small tokenizer; queries and keys are in llama.cpp's order there."""
    config = AutoConfig.from_pretrained(base)
    writer, quantised = gguf.GGUFWriter(file, "llama"), gguf.GGMLQuantizationType[kind]
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<pad>", "</s>", "<unk>", *(chr(ord("a") + at) for at in range(config.vocab_size - 4)), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges([f"{tokens[3]} {tokens[4]}"])
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    plain: dict[str, Tensor] = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        array, kept = tensor.float().numpy(), gguf.GGMLQuantizationType.F32
        if name.startswith("model.layers."):
            _, _, index, rest = name.split(".", 3)
            own = f"blk.{index}.{LLAMA[rest.removesuffix('.weight')]}.weight"
        else:
            own = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
        if array.ndim == 2 and name != "model.embed_tokens.weight":
            data = gguf.quantize(array, quantised)
            plain[name], array, kept = torch.from_numpy(gguf.dequantize(data, quantised)), data, quantised
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(own.split(".")[2])
            if heads:  # of each head the first half of the rows and the second in turn
                array = data.reshape(heads, 2, -1, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        else:
            plain[name] = tensor.float()
        writer.add_tensor(own, np.ascontiguousarray(array), raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return plain
