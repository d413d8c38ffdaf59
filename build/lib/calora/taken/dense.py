"""The dense view of a checkpoint, as a model of its own: what stands for the uncompressed base where there is none."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from calora.errors import CaloraError
from calora.taken.checkpoint import Checkpoint
from calora.taken.gguf import Gguf
from calora.taken.values import dense_of


def dense_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """A model in bf16 with the values of all codes; nothing of it says that they were codes.

    Raises:
        CaloraError: a tensor of the model is not in the checkpoint.
    """
    if isinstance(checkpoint, Gguf):
        return plain(checkpoint.dense())
    cls: Any = type(checkpoint.empty)
    model: PreTrainedModel = cls._from_config(checkpoint.empty.config, dtype=torch.bfloat16)
    held = checkpoint.names
    for name, parameter in model.named_parameters():
        if name not in held:
            raise CaloraError(
                f"{checkpoint.path}, {name}", "a whole model", "no tensor of that name", "name a whole one"
            )
        parameter.data = dense_of(checkpoint.values(name), torch.bfloat16).reshape(parameter.shape)
    return model


def plain(model: PreTrainedModel) -> PreTrainedModel:
    """A model that was unpacked as it was read: its weights are dense, and nothing may say that they are quantised."""
    holder: Any = model
    if hasattr(holder.config, "quantization_config"):
        del holder.config.quantization_config
    holder.hf_quantizer = None
    for name in ("is_quantized", "quantization_method"):
        if name in vars(holder):
            delattr(holder, name)
    assert isinstance(model, nn.Module)
    return model
