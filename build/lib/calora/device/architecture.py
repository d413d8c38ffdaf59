"""How llama.cpp calls what transformers calls otherwise: architectures, names of tensors, sizes, and the order of heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch
from gguf import MODEL_ARCH
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from calora.device.blocks import Blocks, plain
from calora.errors import CaloraError

KNOWN = {  # class of transformers -> (llama.cpp's architecture, whether it turns neighbours in a head)
    "LlamaForCausalLM": (MODEL_ARCH.LLAMA, True),
    "MistralForCausalLM": (MODEL_ARCH.LLAMA, True),
    "Qwen2ForCausalLM": (MODEL_ARCH.QWEN2, False),
    "Qwen3ForCausalLM": (MODEL_ARCH.QWEN3, False),
}
FIX = "serve it with calora.load, or export `peft` and `dense` for a runtime that has it"


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp has for a model of transformers.

    Args:
        kind: of gguf.
        turns_neighbours: it rotates the entries 2 i and 2 i + 1 of a head where transformers rotates i and i + half, so
            that the rows of queries and keys stand in another order.
        config: of the model.
    """

    kind: MODEL_ARCH
    turns_neighbours: bool
    config: PreTrainedConfig

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Architecture:
        """Raises `CaloraError` where llama.cpp has none that computes the same."""
        name = (config.architectures or ["nothing"])[0]
        if name not in KNOWN:
            raise CaloraError("export to gguf", f"one of {', '.join(KNOWN)}", name, FIX)
        made = cls(*KNOWN[name], config)
        made._check()
        return made

    def _check(self) -> None:
        activation, rope = self.config.hidden_act, self.rope_type
        if activation != "silu":
            raise CaloraError("export to gguf", "the activation silu", activation, FIX)
        known = ("default", "linear", "llama3") if self.kind == MODEL_ARCH.LLAMA else ("default", "linear")
        if rope not in known:
            raise CaloraError("export to gguf", f"a rope_type among {', '.join(known)}", rope, FIX)

    @property
    def name(self) -> str:
        """As `general.architecture` has it."""
        return gguf.MODEL_ARCH_NAMES[self.kind]

    @property
    def rope_type(self) -> str:
        """How positions are stretched."""
        return str(self.config.rope_parameters.get("rope_type", "default"))

    @property
    def head_width(self) -> int:
        """Of a head."""
        config = self.config
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

    @property
    def context(self) -> int:
        """Most positions; within a sliding window, where there is one, attention is full and so the same."""
        window = getattr(self.config, "sliding_window", None)
        return int(min(self.config.max_position_embeddings, window or self.config.max_position_embeddings))

    def tensor_name(self) -> Callable[[str], str]:
        """A function from transformers' name of a tensor to llama.cpp's."""
        known = gguf.get_tensor_name_map(self.kind, self.config.num_hidden_layers)

        def name(theirs: str) -> str:
            found = known.get_name(theirs, try_suffixes=(".weight", ".bias"))
            if found is None:
                raise CaloraError("export to gguf", f"a tensor that {self.name} has", theirs, FIX)
            return str(found)

        return name

    def order(self, name: str) -> np.ndarray[Any, Any] | None:
        """In which order the outputs of a layer stand, by transformers' name of it or of its tensor; None: as they are."""
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        count = next((count for part, count in heads.items() if part in name.split(".")), None)
        if count is None or not self.turns_neighbours:
            return None
        return np.arange(count * self.head_width).reshape(count, 2, self.head_width // 2).swapaxes(1, 2).ravel()

    def in_order(self, name: str, outputs: Tensor) -> Tensor:
        """A tensor [out, ...] with its outputs in llama.cpp's order."""
        order = self.order(name)
        return outputs if order is None else outputs[torch.from_numpy(order)]

    def describe(self, writer: gguf.GGUFWriter) -> None:
        """The sizes."""
        config = self.config
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(self.context)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(self.head_width)
        writer.add_value_length(self.head_width)
        writer.add_rope_dimension_count(self.head_width)
        writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        if self.rope_type == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(config.rope_parameters["factor"]))

    def rope_factors(self, model: PreTrainedModel) -> dict[str, Blocks]:
        """What llama.cpp divides each frequency by, for Llama 3's stretched positions."""
        if self.rope_type != "llama3":
            return {}
        width, base = self.head_width, float(self.config.rope_parameters["rope_theta"])
        frequencies: Any = model.get_decoder().rotary_emb.inv_freq
        plainly = base ** (-torch.arange(0, width, 2).float() / width)
        return {"rope_freqs.weight": plain(plainly / frequencies.float())}
