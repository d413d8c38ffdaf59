"""Open a model folder: safetensors and local files only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from calora.common.artifacts import check_tensors
from calora.errors import CaloraError


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


def load_model(
    directory: Path, dtype: torch.dtype, attention: str = "sdpa", labels: int | None = None
) -> PreTrainedModel:
    """An uncompressed model from a local folder of safetensors, frozen and in eval mode.

    Args:
        attention: `sdpa`, or `eager`, which is faster on a CPU with short texts (bf16 SDPA has a slow backward there).
        labels: if given, a classifier with that many labels is built on the encoder.
    """
    files = sorted(directory.glob("*.safetensors")) or [directory / "model.safetensors"]
    for file in files:
        check_tensors(file, "run `dvc repro` to make it, or name a folder that holds safetensors")
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    cls: Any = model_class(config, directory)
    options: dict[str, Any] = {}
    if labels is not None:
        cls, options = transformers.AutoModelForSequenceClassification, {"num_labels": labels}
    model = cls.from_pretrained(
        directory, dtype=dtype, attn_implementation=attention, local_files_only=True, use_safetensors=True, **options
    )
    loaded: PreTrainedModel = model.eval().requires_grad_(False)
    return loaded
