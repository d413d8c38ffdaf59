"""Open a model folder: safetensors and local files only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from calora.common.devices import accelerated, chosen_device
from calora.common.files import check_tensors
from calora.errors import CaloraError
from calora.models.uniform import uniform

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
BF16_FEATURES = ("avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16")  # of x86, and of ARM, as torch names them


def model_class(config: PretrainedConfig, where: Path) -> type[PreTrainedModel]:
    """The transformers class that `config.json` names under `architectures`."""
    names = config.architectures or ["nothing"]
    cls = getattr(transformers, names[0], None)
    if cls is None:
        raise CaloraError(where / "config.json", "an architecture of transformers", names[0], "name a supported base")
    return cls  # type: ignore[no-any-return]


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; nothing is ever looked up on a hub."""
    if not any((directory / name).exists() for name in ("tokenizer.json", "tokenizer.model", "spiece.model")):
        raise CaloraError(directory, "the base's tokenizer (tokenizer.json)", "none", "name a base that ships it")
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    return tokenizer


def compute_dtype() -> torch.dtype:
    """The dtype to compute in here: bfloat16 where the processor has kernels for it, else float32.

    On an AVX2 CPU products in bfloat16 take eight times as long as in float32. CALORA_DTYPE is another choice; `auto` is none.

    Raises:
        CaloraError: CALORA_DTYPE is neither `bfloat16` nor `float32`.
    """
    chosen = os.environ.get("CALORA_DTYPE") or "auto"
    if chosen != "auto":
        if chosen not in DTYPES:
            raise CaloraError("CALORA_DTYPE", f"one of {', '.join(DTYPES)}", chosen, "set one of them, or unset it")
        return DTYPES[chosen]
    if chosen_device() != "cpu" and torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        processor = torch.cpu.get_capabilities()
        fast = any(processor.get(feature) for feature in BF16_FEATURES)
    return torch.bfloat16 if fast else torch.float32


def training_attention() -> str:
    """The attention to train with: `eager` on a CPU (bf16 SDPA has a slow backward there), `sdpa` on a GPU."""
    return "sdpa" if accelerated() else "eager"


def attention_of(attention: str) -> str | None:
    """What transformers takes for it: by None it chooses SDPA where the model's class has it (not Gemma-2's), else eager."""
    return None if attention == "sdpa" else attention


def load_model(
    directory: Path, dtype: torch.dtype | None = None, attention: str = "sdpa", labels: int | None = None
) -> PreTrainedModel:
    """An uncompressed model from a local folder of safetensors, frozen, in eval mode, and `uniform`.

    Args:
        dtype: to compute in; by default that of `compute_dtype`.
        attention: `sdpa` (eager where the model's class has none), or `eager`; to train, `training_attention()`.
        labels: if given, a classifier with that many labels is built on the encoder.
    """
    files = sorted(directory.glob("*.safetensors")) or [directory / "model.safetensors"]
    for file in files:
        check_tensors(file, "make it again, or name a folder that holds safetensors")
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    cls: Any = model_class(config, directory)
    options: dict[str, Any] = {}
    if labels is not None:
        cls, options = transformers.AutoModelForSequenceClassification, {"num_labels": labels}
    model = cls.from_pretrained(
        directory,
        dtype=dtype or compute_dtype(),
        attn_implementation=attention_of(attention),
        local_files_only=True,
        use_safetensors=True,
        **options,
    )
    loaded: PreTrainedModel = uniform(model).eval().requires_grad_(False)
    return loaded
