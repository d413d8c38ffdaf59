"""Random Llama-like models of any size, written tensor by tensor: for what is measured and not judged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from calora.common.tensors import write_tensors
from calora.models.tasks import Example


@dataclass(frozen=True)
class Size:
    """Widths of a model: hidden, feed-forward, blocks, heads, key-value heads, vocabulary (at least 260)."""

    hidden: int
    inner: int
    layers: int
    heads: int
    groups: int
    vocabulary: int

    @property
    def block(self) -> int:
        """Weights of one block."""
        attention = 2 * self.hidden**2 + 2 * self.hidden * self.hidden * self.groups // self.heads
        return attention + 3 * self.hidden * self.inner

    @property
    def table(self) -> int:
        """Weights of the embeddings, which are the head too."""
        return self.vocabulary * self.hidden


def make(folder: Path, size: Size, seed: int = 0) -> Path:
    """A model folder in bf16, a file a block; no more than a block is in memory."""
    folder.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=size.inner, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.groups, tie_word_embeddings=True, max_position_embeddings=2048,
        pad_token_id=0, bos_token_id=None, eos_token_id=1, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    index: dict[str, str] = {}
    for number, tensors in enumerate(pieces(size, generator)):
        name = f"model-{number + 1:05d}-of-{size.layers + 1:05d}.safetensors"
        write_tensors(folder / name, tensors)
        index |= dict.fromkeys(tensors, name)
    total = 2 * (size.layers * (size.block + 2 * size.hidden) + size.table + size.hidden)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    tokenizer(size.vocabulary).save_pretrained(folder)
    return folder


def pieces(size: Size, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    """What is outside of the blocks, then each block; values of the spread that keeps activations as large as they were."""

    def matrix(rows: int, columns: int) -> Tensor:
        values = torch.empty(rows, columns, dtype=torch.bfloat16)
        return values.normal_(0, columns**-0.5, generator=generator)

    ones, keys = torch.ones(size.hidden, dtype=torch.bfloat16), size.hidden * size.groups // size.heads
    yield {"model.embed_tokens.weight": matrix(size.vocabulary, size.hidden), "model.norm.weight": ones}
    shapes = {
        "self_attn.q_proj": (size.hidden, size.hidden), "self_attn.k_proj": (keys, size.hidden),
        "self_attn.v_proj": (keys, size.hidden), "self_attn.o_proj": (size.hidden, size.hidden),
        "mlp.gate_proj": (size.inner, size.hidden), "mlp.up_proj": (size.inner, size.hidden),
        "mlp.down_proj": (size.hidden, size.inner),
    }  # fmt: skip
    for layer in range(size.layers):
        block = f"model.layers.{layer}"
        norms = {f"{block}.{name}_layernorm.weight": ones.clone() for name in ("input", "post_attention")}
        yield norms | {f"{block}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Bytes, and one pair of them: llama.cpp reads no vocabulary without."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *letters, "Ġa"])}
    assert len(words) <= vocabulary
    whole = Tokenizer(models.BPE(words, [("Ġ", "a")], unk_token="<unk>"))
    whole.pre_tokenizer, whole.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=whole, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def texts(count: int, tokens: int, vocabulary: int, seed: int = 0) -> list[Example]:
    """Random tokens, each text with one more as its answer."""
    ids = torch.randint(3, vocabulary, (count, tokens + 1), generator=torch.Generator().manual_seed(seed)).tolist()
    return [Example(row[:-1], row[-1:], 0) for row in ids]
