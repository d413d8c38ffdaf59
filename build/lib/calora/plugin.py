"""Import this, and `from_pretrained` of transformers loads the folders that calora writes in its own format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from calora.formats import OURS
from calora.layers.layout import build, prepare
from calora.models.uniform import keep_dtype
from calora.recovery.shared import read_once, unpack

INITIALISED = "_is_hf_initialized"


@register_quantization_config(OURS)
class CaloraConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json: how each layer is stored, and which tensors are one."""

    def __init__(self, layers: dict[str, Any], tied: dict[str, str], **rest: Any) -> None:
        self.quant_method = OURS  # type: ignore[assignment]  # transformers takes any registered name
        self.layers, self.tied = layers, tied


@register_quantizer(OURS)
class CaloraQuantizer(HfQuantizer):
    """Puts the packed layers in place, lets transformers fill them, then brings them into the form that computes."""

    requires_calibration = True
    quantization_config: CaloraConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] = (), **rest: Any
    ) -> None:
        empty: dict[str, Tensor] = {}
        for path in checkpoint_files:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  # not a mapping
                    part = file.get_slice(name)
                    empty[name] = torch.empty(part.get_shape(), dtype=DTYPES[part.get_dtype()], device="meta")
        config = self.quantization_config
        build(model, config.layers, empty, config.tied)
        keep_dtype(model)
        for layer in config.layers:  # transformers would set the weights of layers (and of what holds them) at random
            while layer:
                setattr(model.get_submodule(layer), INITIALISED, True)
                layer = layer.rpartition(".")[0]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **rest: Any) -> None:
        _tie(model, self.quantization_config.tied)  # an int4 head is prepared from the table's tensors,
        if model.device.type == "cpu":
            prepare(model)
            unpack(model, model.dtype)
        _tie(model, self.quantization_config.tied)  # and an int8 one is a parameter of its own after that
        read_once(model)

    def is_serializable(self) -> bool:
        """The form that computes is not the stored one."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Adapters on top can be trained."""
        return True


def _tie(model: PreTrainedModel, tied: dict[str, str]) -> None:
    for alias, stored in tied.items():
        owner, _, part = alias.rpartition(".")
        source, _, own = stored.rpartition(".")
        setattr(model.get_submodule(owner), part, getattr(model.get_submodule(source), own))


DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "I8": torch.int8, "U8": torch.uint8,
    "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
